"""What ctypes believes of the kernels is what their header says."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from serve.kernels.abi import SIGNATURES, STRUCTURES
from serve.kernels.build import SOURCES

HEADER = SOURCES / "shoal.h"

TYPES = {
    "void": None,
    "int": ctypes.c_int,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
}


def _ctype(declared: str) -> type | None:
    if declared.startswith("const char*"):
        return ctypes.c_char_p
    return ctypes.c_void_p if "*" in declared else TYPES[declared.split()[0]]


def _declared_functions() -> dict[str, tuple[type | None, list[type | None]]]:
    text = re.sub(r"//[^\n]*", "", HEADER.read_text())
    found = re.findall(r"SHOAL_API\s+([^;(]*?)(shoal_\w+)\(([^)]*)\);", text)
    return {
        name: (_ctype(result), [_ctype(a.strip()) for a in arguments.split(",") if a != "void"])
        for result, name, arguments in found
    }


def test_signatures_are_the_header_s():
    declared = _declared_functions()
    assert declared.keys() == SIGNATURES.keys()
    for name, (result, arguments) in declared.items():
        assert SIGNATURES[name] == (result, arguments), name


def test_structures_lie_in_memory_as_the_compiler_lays_them(tmp_path: Path):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    expected = {
        f"{name}.{field}": getattr(structure, field).offset
        for name, structure in STRUCTURES.items()
        for field, *_ in structure._fields_
    }
    expected |= {name: ctypes.sizeof(structure) for name, structure in STRUCTURES.items()}
    lines = [
        f'std::printf("{entry} %zu\\n", '
        + (f"offsetof({entry.replace('.', ', ')})" if "." in entry else f"sizeof({entry})")
        + ");"
        for entry in expected
    ]
    source = tmp_path / "layout.cpp"
    source.write_text(
        f'#include <cstddef>\n#include <cstdio>\n#include "{HEADER}"\n'
        f"int main() {{ {' '.join(lines)} }}\n"
    )
    program = tmp_path / "layout"
    subprocess.run([compiler, "-o", program, source], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    got = {entry: int(value) for entry, value in map(str.split, printed.splitlines())}
    assert got == expected
