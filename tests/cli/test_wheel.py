from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling")

ROOT = Path(__file__).resolve().parents[2]
PLAN = """
from pathlib import Path
import cluster
from cluster.plan import configs_path, preset_names
assert Path(cluster.__file__).is_relative_to(Path("../unpacked").resolve()), cluster.__file__
assert configs_path().is_relative_to(Path("../unpacked").resolve())
print(*preset_names("models"), *preset_names("hardware"))
"""


@pytest.mark.timeout(600)  # the first time it compiles the kernels of every instruction set
def test_wheel_runs_from_another_folder_with_its_presets(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "unpacked")
    assert not [name for name in names if name.startswith(("tests/", "scripts/"))]
    chart = (tmp_path / "unpacked" / "cluster" / "_helm" / "shoal").resolve()
    assert (chart / "Chart.yaml").is_file()
    assert (chart / "templates" / "rayservice.yaml").is_file()
    presets = chart / "files" / "configs"
    assert presets.is_dir()
    assert not presets.is_symlink()
    assert (presets / "fits.yaml").read_bytes() == (ROOT / "configs" / "fits.yaml").read_bytes()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "unpacked")}

    def run(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-P", *arguments],
            cwd=elsewhere,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    assert "qwen2.5-7b-instruct" in run("-c", PLAN)
    assert "cpu" in run("-c", PLAN).split()
    assert "--detach" in run("-m", "cluster", "up", "--help")
    assert list(elsewhere.iterdir()) == []
