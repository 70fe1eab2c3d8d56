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
    "emulated": ["-Wno-psabi", "-O1"],
    "emulated_amx": ["-Wno-psabi", "-O1"],
}
"""How each instruction set is compiled; the emulated ones are for tests, on any CPU."""

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
    if not _is_supported() or not cpu_info.exists():
        return []
    lines = cpu_info.read_text(encoding="utf-8").splitlines()
    has = set(next((line for line in lines if line.startswith("flags")), "").split())
    return [isa for isa in INSTALLED_ISAS if _CPU_FLAGS[isa] <= has]


def is_current(library: Path) -> bool:
    """Whether `library` exists and was built from the sources as they are."""
    return library.exists() and source_hash().encode() in library.read_bytes()


def build(isas: Sequence[str] = INSTALLED_ISAS, folder: Path = LIBRARIES) -> list[Path]:
    """Build those libraries of `isas` in `folder` that are not current; the paths of all.

    Raises:
        BuildError: no compiler, or it does not compile one of them; the others are built.
    """
    _check_machine()
    libraries = {isa: library_path(isa, folder) for isa in isas}
    missing = [isa for isa, path in libraries.items() if not is_current(path)]
    errors = []
    if missing:
        compiler = _find_compiler()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for isa in missing:
                try:
                    _build_isa(compiler, isa, folder=folder, pool=pool)
                except BuildError as error:
                    errors.append(f"{isa}: {error}")
    if errors:
        raise BuildError("; ".join(errors))
    return list(libraries.values())


def _is_supported() -> bool:
    return (platform.system(), platform.machine()) == ("Linux", "x86_64")


def _check_machine() -> None:
    if not _is_supported():
        machine = f"{platform.system()} on {platform.machine() or 'an unknown machine'}"
        raise BuildError(f"they are for Linux on x86-64, this is {machine}")


def _find_compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if path := shutil.which(name):
            return path
    raise BuildError("no C++ compiler was found (Debian, Ubuntu: apt-get install g++)")


def _build_isa(compiler: str, isa: str, *, folder: Path, pool: ThreadPoolExecutor) -> None:
    objects = folder / "objects" / isa
    objects.mkdir(parents=True, exist_ok=True)
    command = [compiler, *_FLAGS, *ISA_FLAGS[isa], f"-DSHOAL_ISA_{isa.upper()}"]
    headers = sorted(SOURCES.glob("*.h"))
    built_from = source_hash()  # first: a source that changes meanwhile makes the library stale

    def compile_one(source: Path) -> Path:
        own = [f'-DSHOAL_SOURCE_HASH="{built_from}"'] if source.stem == "identity" else []
        target = objects / f"{source.stem}.{_digest(command, own, source, *headers)}.o"
        if not target.exists():
            _write(target, [*command, *own, "-c", str(source)])
            for old in set(objects.glob(f"{source.stem}.*.o")) - {target}:
                old.unlink(missing_ok=True)
        return target

    parts = list(pool.map(compile_one, sorted(SOURCES.glob("*.cpp"))))
    _write(library_path(isa, folder), [compiler, "-shared", "-pthread", *map(str, parts)])


def _write(target: Path, command: Sequence[str]) -> None:
    """Run a compiler's command; `target` appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="making-") as folder:
        made = Path(folder) / target.name
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.splitlines() or [f"{command[0]} exited with {done.returncode}"]
            raise BuildError(next((line for line in lines if "error" in line), lines[-1]))
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
    """Build what this CPU can run, and say so, or in one line why not."""
    parser = argparse.ArgumentParser(
        prog="python -m serve.kernels.build", description="Compile the CPU kernels."
    )
    parser.add_argument("--isa", action="append", choices=sorted(ISA_FLAGS), help="only this one")
    parser.add_argument("--output", type=Path, default=LIBRARIES, help="folder of the libraries")
    parser.add_argument("--quiet", action="store_true", help="silent where nothing is to be done")
    chosen = parser.parse_args(arguments)
    isas = chosen.isa or usable_isas() or INSTALLED_ISAS
    if all(is_current(library_path(isa, chosen.output)) for isa in isas):
        if not chosen.quiet:
            print(f"CPU kernels are up to date: {', '.join(isas)}")  # noqa: T201
        return 0
    print(f"Building the CPU kernels: {', '.join(isas)} (half a minute) ...")  # noqa: T201
    try:
        build(isas, chosen.output)
    except BuildError as error:
        print(f"CPU kernels not built: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
