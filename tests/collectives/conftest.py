"""What tests of shared memory need: the compiled kernels."""

from __future__ import annotations

import pytest

from serve.kernels import native


@pytest.fixture(scope="session")
def kernels() -> native.NativeLibrary:
    """The library that this CPU uses."""
    library = native.load()
    if library is None:
        pytest.skip(native.reason())
    return library
