from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from serve.config import Kernels
from serve.kernels import native
from serve.testing.checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 8 query and 4 KV heads: legal at TP 1, 2 and 4, on any kernels."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return make_checkpoint(folder, num_heads=8, num_kv_heads=4, head_dim=32, vocab_size=150)


@pytest.fixture(params=["torch", "native"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Each kind of kernels that runs here, by its name in `hardware.kernels`."""
    if request.param == "torch":
        return "torch"
    library = native.load()
    if library is None:
        pytest.skip(native.reason())
    return cast(Kernels, library.isa)
