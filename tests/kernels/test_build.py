"""Kernels are built where a compiler is, told apart when stale, and never in the way."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from serve.errors import ConfigurationError
from serve.kernels import native
from serve.kernels.build import SOURCES, usable_isas

ROOT = Path(__file__).resolve().parents[2]

IDENTITY = ("shoal_isa", "shoal_source_hash", "shoal_panel_width", "shoal_prepare")

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler"
)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Shoal with kernels that say what they are and can do nothing: they compile at once."""
    copy = tmp_path / "shoal"
    for name in ("helm", "configs"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True)
    kernels = copy / "serve" / "kernels"
    (kernels / "csrc").mkdir(parents=True)
    (copy / "cluster").mkdir()
    (copy / "cluster" / "__init__.py").touch()
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, copy)
    for name in ("__init__", "errors"):
        shutil.copy(ROOT / "serve" / f"{name}.py", copy / "serve")
    for name in ("__init__", "abi", "build", "build_hook", "native"):
        shutil.copy(ROOT / "serve" / "kernels" / f"{name}.py", kernels)
    for source in [*SOURCES.glob("vec*.h"), SOURCES / "shoal.h", SOURCES / "identity.cpp"]:
        shutil.copy(source, kernels / "csrc")
    with (kernels / "abi.py").open("a") as abi:
        abi.write(f"SIGNATURES = {{name: SIGNATURES[name] for name in {IDENTITY}}}\n")
    (kernels / "csrc" / "other.cpp").write_text("int shoal_other() { return 1; }\n")
    return copy


@pytest.fixture
def without_compiler(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine that has no compiler."""
    (tmp_path / "empty").mkdir()
    environment = {**os.environ, "PATH": str(tmp_path / "empty")}
    environment.pop("CXX", None)
    return environment


def _python(
    project: Path, *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)


def _build(
    project: Path, *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return _python(project, "-m", "serve.kernels.build", *arguments, env=env)


def _reason(project: Path) -> str:
    script = "from serve.kernels import native; print(native.reason()); native.load()"
    done = _python(project, "-c", script)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _objects(project: Path) -> dict[str, Path]:
    """The object of each source, by its stem."""
    found = (project / "serve/kernels/lib/objects").glob("*/*.o")
    return {path.name.partition(".")[0]: path for path in found}


@needs_compiler
@pytest.mark.skipif(not usable_isas(), reason="this CPU has none of the instruction sets")
def test_only_what_changed_is_built_again_and_stale_kernels_are_not_used(project: Path):
    isa = usable_isas()[-1]
    assert "build them with: python -m serve.kernels.build" in _reason(project)
    first = _build(project, "--isa", isa)
    assert (first.returncode, first.stderr) == (0, "")
    assert _reason(project) == f"this CPU has {isa}"
    assert "up to date" in _build(project, "--isa", isa).stdout
    assert _build(project, "--isa", isa, "--quiet").stdout == ""
    before = _objects(project)

    with (project / "serve/kernels/csrc/other.cpp").open("a") as source:
        source.write("int shoal_another() { return 2; }\n")

    assert "rebuild them with: python -m serve.kernels.build" in _reason(project)
    assert "Building" in _build(project, "--isa", isa, "--quiet").stdout
    assert _reason(project) == f"this CPU has {isa}"
    after = _objects(project)
    assert after.keys() == before.keys() == {"identity", "other"}
    assert after["other"] != before["other"]


@needs_compiler
def test_an_object_that_is_known_is_not_compiled_again(project: Path):
    assert _build(project, "--isa", "emulated").returncode == 0
    known = _objects(project)["other"]
    made_at = known.stat().st_mtime_ns
    with (project / "serve/kernels/csrc/identity.cpp").open("a") as source:
        source.write("// changed\n")
    assert _build(project, "--isa", "emulated").returncode == 0
    assert _objects(project)["other"].stat().st_mtime_ns == made_at


@needs_compiler
def test_sources_that_do_not_compile_are_named_in_one_line(project: Path):
    (project / "serve/kernels/csrc/other.cpp").write_text("int shoal_other() { return; }\n")
    done = _build(project, "--isa", "emulated")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.search(r"CPU kernels not built: emulated: .*other\.cpp:1:.*error", line)


def test_without_a_compiler_one_line_says_so_and_torch_serves(
    project: Path, without_compiler: dict[str, str]
):
    done = _build(project, env=without_compiler)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "CPU kernels not built: no C++ compiler was found" in line
    script = "from serve.kernels import native; assert native.load() is None"
    assert _python(project, "-c", script, env=without_compiler).returncode == 0


def _wheel(project: Path, env: dict[str, str] | None = None) -> tuple[Path, str]:
    """The wheel that hatchling builds, and all that it says."""
    built = _python(project, "-m", "hatchling", "build", "-t", "wheel", env=env)
    assert built.returncode == 0, built.stderr
    (wheel,) = (project / "dist").glob("*.whl")
    return wheel, built.stdout + built.stderr


@needs_compiler
def test_a_wheel_holds_kernels_their_sources_and_its_platform(project: Path):
    pytest.importorskip("hatchling")
    wheel, _ = _wheel(project)
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    libraries = {name for name in names if name.startswith("serve/kernels/lib/")}
    assert libraries == {
        f"serve/kernels/lib/libshoal_{isa}.so" for isa in ("amx", "avx512", "avx2")
    }
    assert "serve/kernels/csrc/identity.cpp" in names


def test_a_wheel_without_a_compiler_is_pure_and_says_why(
    project: Path, without_compiler: dict[str, str]
):
    pytest.importorskip("hatchling")
    wheel, said = _wheel(project, without_compiler)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert said.count("CPU kernels not built, torch serves instead: no C++ compiler") == 1
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]


@needs_compiler
@pytest.mark.skipif(not usable_isas(), reason="this CPU has none of the instruction sets")
def test_an_editable_installation_builds_what_its_machine_can_run(project: Path):
    """By the hook that `pip install --no-build-isolation --editable .` calls."""
    pytest.importorskip("hatchling")
    script = "from hatchling.build import build_editable; print(build_editable('.'))"
    done = _python(project, "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("-py3-none-any.whl")
    built = {path.name for path in (project / "serve/kernels/lib").glob("*.so")}
    assert built == {f"libshoal_{isa}.so" for isa in usable_isas()}


def test_a_source_distribution_holds_the_sources(project: Path):
    pytest.importorskip("hatchling")
    done = _python(project, "-m", "hatchling", "build", "-t", "sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = (project / "dist").glob("*.tar.gz")
    unpacked = project / "unpacked"
    shutil.unpack_archive(archive, unpacked, filter="data")
    assert list(unpacked.glob("*/serve/kernels/csrc/identity.cpp"))
    assert list(unpacked.glob("*/serve/kernels/build_hook.py"))
    assert not list(unpacked.glob("*/serve/kernels/lib"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx2 fma f16c", ["avx2"]),
        ("fpu avx2 fma", []),
        ("avx2 fma f16c avx512f avx512bw avx512vl avx512dq", ["avx2"]),
        (
            "avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_bf16",
            ["avx512", "avx2"],
        ),
        (
            "avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_bf16 amx_tile amx_bf16",
            ["amx", "avx512", "avx2"],
        ),
    ],
)
def test_instruction_sets_follow_what_the_cpu_has(tmp_path: Path, flags: str, expected: list[str]):
    cpu_info = tmp_path / "cpuinfo"
    cpu_info.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t:\n\nprocessor\t: 1\n")
    assert usable_isas(cpu_info) == expected


def test_an_instruction_set_that_cannot_run_here_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("serve.kernels.build.usable_isas", lambda: ["avx2"])
    with pytest.raises(ConfigurationError, match=r"hardware\.kernels is amx.*has only: avx2"):
        native.load("amx")
    assert native.load("torch") is None


def test_a_machine_without_any_instruction_set_is_served_by_torch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("serve.kernels.build.usable_isas", list)
    assert native.load() is None
    assert native.reason() == "there are CPU kernels for Linux on x86-64 with AVX2 only"


@pytest.mark.parametrize("system", [("Darwin", "arm64"), ("Linux", "aarch64")])
def test_another_machine_is_told_what_the_kernels_are_for(project: Path, system: tuple[str, str]):
    script = (
        "import platform, sys; from serve.kernels import build\n"
        f"platform.system, platform.machine = (lambda: {system[0]!r}), (lambda: {system[1]!r})\n"
        "assert build.usable_isas() == []\n"
        "sys.exit(build.main([]))"
    )
    done = _python(project, "-c", script)
    assert done.returncode == 1
    expected = f"they are for Linux on x86-64, this is {system[0]} on {system[1]}"
    assert done.stderr == f"CPU kernels not built: {expected}\n"
