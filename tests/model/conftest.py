from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from serve.config import Kernels
from serve.kernels import native
from serve.testing.checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a checkpoint of the given options, once a session."""
    made: dict[str, Path] = {}

    def make(**options: Any) -> Path:
        key = repr(sorted(options.items()))
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def kernels_of() -> Callable[[str], Kernels]:
    """The name in `hardware.kernels` of "torch", or of "native": the best that runs here."""

    def find(wanted: str) -> Kernels:
        if wanted == "torch":
            return "torch"
        library = native.load()
        if library is None:
            pytest.skip(native.reason())
        return cast(Kernels, library.isa)

    return find
