"""Which compiled kernels run here: chosen by what the CPU has, else the torch reference.

Not the kernels themselves (`csrc`) nor how they are built (`build`). The one decision behind it: a
library is used only where the CPU has its instruction set and it was built from the sources beside
it; everything else is one line that says why not and what to do.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from dataclasses import dataclass
from pathlib import Path

from serve.errors import ConfigurationError

from . import build
from .abi import SIGNATURES

REBUILD = "python -m serve.kernels.build"


class NativeLibrary:
    """One library of kernels, its functions typed.

    Calls release the GIL. `functions.shoal_...` are those of `csrc/shoal.h`.
    """

    def __init__(self, path: Path) -> None:
        """Open the library at `path`.

        Raises:
            OSError: it is not a library, or not for this machine.
        """
        self.functions = ctypes.CDLL(os.fspath(path))
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(self.functions, name)
            function.restype, function.argtypes = result, arguments
        self.isa: str = self.functions.shoal_isa().decode()
        self.panel_width: int = self.functions.shoal_panel_width()

    def prepare(self) -> bool:
        """Ask the system for what the instruction set needs; False where it refuses.

        Once in a process, before any kernel runs.
        """
        return bool(self.functions.shoal_prepare())

    def pool(self, num_threads: int) -> Pool:
        """Threads for this library's kernels."""
        return Pool(self, num_threads)


class Pool:
    """`num_threads` threads that share the work of a kernel; the caller is one of them.

    One caller at a time. They end with `close`, or when nothing refers to the pool any more.
    """

    def __init__(self, library: NativeLibrary, num_threads: int) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads must be >= 1, got {num_threads}")
        self.library = library
        self.handle: int = library.functions.shoal_pool_new(num_threads)
        self.close = weakref.finalize(self, library.functions.shoal_pool_delete, self.handle)
        self.close.atexit = False  # a thread of Python may still be in a kernel then


@dataclass(frozen=True, slots=True)
class _Choice:
    library: NativeLibrary | None
    reason: str


def load(kernels: str = "auto") -> NativeLibrary | None:
    """The library for `kernels`; None where the torch reference shall run.

    Args:
        kernels: "auto" (the best that this CPU has), "torch", or an instruction set.

    Raises:
        ConfigurationError: a named instruction set cannot run here.
    """
    choice = _choose(kernels)
    if choice.library is None and kernels not in {"auto", "torch"}:
        raise ConfigurationError(f"hardware.kernels is {kernels}, but {choice.reason}")
    return choice.library


def reason(kernels: str = "auto") -> str:
    """Why `load(kernels)` gives what it gives, in one line."""
    return _choose(kernels).reason


def _choose(kernels: str) -> _Choice:
    if kernels == "torch":
        return _Choice(None, "hardware.kernels is torch")
    usable = build.usable_isas()
    if not usable:
        return _Choice(None, "there are CPU kernels for Linux on x86-64 with AVX2 only")
    if kernels not in {"auto", *usable}:
        return _Choice(None, f"this CPU has only: {', '.join(usable)}")
    problem = f"no CPU kernels are built; build them with: {REBUILD}"
    for isa in usable if kernels == "auto" else [kernels]:
        path = build.library_path(isa)
        if not path.exists():
            continue
        if build.SOURCES.is_dir() and not build.is_current(path):
            problem = f"the CPU kernels are stale; rebuild them with: {REBUILD}"
            continue
        library = NativeLibrary(path)
        if library.prepare():
            return _Choice(library, f"this CPU has {isa}")
        problem = f"the system refuses {isa} to this process"
    return _Choice(None, problem)
