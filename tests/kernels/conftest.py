"""The kernels of every instruction set that can run here, the emulated ones always among them."""

from __future__ import annotations

import pytest

from serve.kernels.build import BuildError, build, usable_isas
from serve.kernels.native import NativeLibrary


@pytest.fixture(scope="session", params=[*usable_isas(), "emulated", "emulated_amx"])
def library(request: pytest.FixtureRequest) -> NativeLibrary:
    """Built from the sources as they are, into pytest's cache: once for each of their versions."""
    try:
        (path,) = build([request.param], request.config.cache.mkdir("kernels"))
    except BuildError as error:
        if "no C++ compiler" in str(error):
            pytest.skip(str(error))
        raise
    library = NativeLibrary(path)
    if not library.prepare():
        pytest.skip(f"the system refuses {library.isa} to this process")
    return library
