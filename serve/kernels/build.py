"""Compiles the CPU kernels: `python -m serve.kernels.build`.

Not what chooses or loads a library; `native` does. Plain Python without a dependency, because the
build hook runs it before anything is installed. The one decision behind it: everything that a
library depends on (sources, flags) goes into one hash that the library carries, so whoever loads it
can tell whether it is that of the sources beside it. Objects are kept by content, so only what
changed is compiled again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
LIBRARIES = Path(__file__).parent / "lib"

_FLAGS = [
    *("-O3", "-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-ffp-contract=off", "-fno-math-errno"),
]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma", "-mf16c"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # GCC 12 warns of its own header
]

ISA_FLAGS: Mapping[str, Sequence[str]] = {
    "avx2": _AVX2,
    "avx512": _AVX512,
    "amx": [*_AVX512, "-mamx-tile", "-mamx-bf16"],
    "emulated": ["-Wno-psabi"],
    "emulated_amx": ["-Wno-psabi"],
}
"""How each instruction set is compiled; the emulated ones are for tests where the CPU lacks them."""

INSTALLED_ISAS = ("amx", "avx512", "avx2")
"""What a user gets, the best first."""

_CPU_FLAGS: Mapping[str, frozenset[str]] = {
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "avx512": frozenset(
        {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "fma", "f16c"}
    ),
}
_CPU_FLAGS = {**_CPU_FLAGS, "amx": _CPU_FLAGS["avx512"] | {"amx_tile", "amx_bf16"}}


class BuildError(Exception):
    """No library can be built; the message is one line for the user."""


def library_path(isa: str, folder: Path = LIBRARIES) -> Path:
    """Where the library of `isa` lies."""
    return folder / f"libshoal_{isa}.so"


def source_hash(sources: Path = SOURCES) -> str:
    """Of all sources and flags: 16 hexadecimal digits."""
    files = sorted(sources.glob("*.cpp")) + sorted(sources.glob("*.h"))
    return _digest(_FLAGS, sorted(ISA_FLAGS.items()), *files)


def usable_isas(cpu_info: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Those of `INSTALLED_ISAS` that this CPU and its system have, the best first."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64") or not cpu_info.exists():
        return []
    lines = cpu_info.read_text(encoding="utf-8").splitlines()
    has = set(next((line for line in lines if line.startswith("flags")), "").split())
    return [isa for isa in INSTALLED_ISAS if _CPU_FLAGS[isa] <= has]


def build(isas: Sequence[str] = INSTALLED_ISAS, folder: Path = LIBRARIES) -> list[Path]:
    """Build the libraries of `isas` in `folder` and return their paths.

    Raises:
        BuildError: no compiler, or it does not compile the sources.
    """
    compiler = _find_compiler()
    known = source_hash()
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [_build_isa(compiler, isa, known, folder=folder, pool=pool) for isa in isas]


def _find_compiler() -> str:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise BuildError(f"they are for Linux on x86-64, not {platform.system()} on {_machine()}")
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if path := shutil.which(name):
            return path
    raise BuildError("no C++ compiler was found (Debian, Ubuntu: apt-get install g++)")


def _machine() -> str:
    return platform.machine() or "an unknown machine"


def _build_isa(
    compiler: str, isa: str, known: str, *, folder: Path, pool: ThreadPoolExecutor
) -> Path:
    objects = folder / "objects" / isa
    objects.mkdir(parents=True, exist_ok=True)
    command = [compiler, *_FLAGS, *ISA_FLAGS[isa], f"-DSHOAL_ISA_{isa.upper()}"]
    headers = sorted(SOURCES.glob("*.h"))

    def compile_one(source: Path) -> Path:
        own = [f'-DSHOAL_SOURCE_HASH="{known}"'] if source.stem == "identity" else []
        target = objects / f"{source.stem}.{_digest(command, own, source, *headers)}.o"
        if not target.exists():
            _write(target, [*command, *own, "-c", str(source)])
            for old in set(objects.glob(f"{source.stem}.*.o")) - {target}:
                old.unlink(missing_ok=True)
        return target

    parts = list(pool.map(compile_one, sorted(SOURCES.glob("*.cpp"))))
    library = library_path(isa, folder)
    _write(library, [compiler, "-shared", "-pthread", *map(str, parts)])
    return library


def _write(target: Path, command: Sequence[str]) -> None:
    """Run a compiler's command; `target` appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="making-") as folder:
        made = Path(folder) / target.name
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"{Path(command[0]).name} failed:\n{done.stderr.strip()}")
        if done.stderr:
            print(done.stderr.strip(), file=sys.stderr)  # noqa: T201 (a compiler's warnings)
        made.replace(target)


def _digest(*parts: object) -> str:
    """Of values by their repr, and of files by name and content."""
    result = hashlib.sha256()
    for chunk in _chunks(parts):
        result.update(len(chunk).to_bytes(8, "little") + chunk)
    return result.hexdigest()[:16]


def _chunks(parts: Sequence[object]) -> Iterator[bytes]:
    for part in parts:
        if isinstance(part, Path):
            yield part.name.encode()
            yield part.read_bytes()
        else:
            yield repr(part).encode()


def main(arguments: Sequence[str] | None = None) -> int:
    """Build and print what was built, or one line why not."""
    parser = argparse.ArgumentParser(prog="python -m serve.kernels.build", description=__doc__)
    parser.add_argument("--isa", action="append", choices=sorted(ISA_FLAGS), help="only this one")
    parser.add_argument("--output", type=Path, default=LIBRARIES, help="folder of the libraries")
    chosen = parser.parse_args(arguments)
    try:
        built = build(chosen.isa or usable_isas() or INSTALLED_ISAS, chosen.output)
    except BuildError as error:
        print(f"CPU kernels not built: {error}", file=sys.stderr)  # noqa: T201
        return 1
    for path in built:
        print(path)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
