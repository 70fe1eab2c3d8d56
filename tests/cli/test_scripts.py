from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / "scripts" / "environment.sh"
LOCKS = ("requirements.txt", "requirements-test.txt")


def bash(code: str, *, cwd: Path, path: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/bash", "-c", f". '{ENVIRONMENT}'; {code}"],
        cwd=cwd,
        env={"PATH": path},
        capture_output=True,
        text=True,
    )


def fake(folder: Path, name: str, code: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{code}\n")
    (folder / name).chmod(0o755)


def test_machine_without_a_python_is_told_what_to_install(tmp_path: Path) -> None:
    fake(tmp_path / "bin", "python3", "exit 1")
    result = bash("find_python", cwd=tmp_path, path=str(tmp_path / "bin"))
    assert (result.returncode, result.stdout) == (1, "")
    assert "Shoal needs Python 3.11, 3.12 or 3.13" in result.stderr


def test_newest_python_that_works_is_chosen(tmp_path: Path) -> None:
    fake(tmp_path / "bin", "python3.13", "exit 1")
    fake(tmp_path / "bin", "python3.12", "exit 0")
    fake(tmp_path / "bin", "python3.11", "exit 0")
    result = bash("find_python", cwd=tmp_path, path=str(tmp_path / "bin"))
    assert result.stdout == "python3.12\n"


def test_install_happens_once_for_each_content_of_the_lock(tmp_path: Path) -> None:
    fake_bin = tmp_path / ".venv" / "bin"
    fake_bin.mkdir(parents=True)
    fake(fake_bin, "python", 'echo "$2" >> calls')
    (tmp_path / "lock.txt").write_text("a==1\n")
    (tmp_path / "pyproject.toml").write_text("")
    calls = tmp_path / "calls"

    def install() -> list[str]:
        calls.write_text("")
        result = bash("set -e; install_locked lock.txt", cwd=tmp_path, path=os.environ["PATH"])
        assert result.returncode == 0, result.stderr
        return calls.read_text().split()

    kernels = "serve.kernels.build"  # compiles what changed, so it is asked each time
    assert install() == ["pip", "pip", kernels]
    assert install() == [kernels]
    (tmp_path / "lock.txt").write_text("a==2\n")
    assert install() == ["pip", "pip", kernels]


@pytest.mark.parametrize("name", LOCKS)
def test_lock_pins_every_package_by_hash_and_names_no_index(name: str) -> None:
    text = (ROOT / name).read_text()
    assert "://" not in text
    assert "--index" not in text
    entries = re.split(r"\n(?=[a-z])", re.sub(r"(?m)^ *#.*\n", "", text).strip())
    for entry in entries:
        first = entry.splitlines()[0]
        assert re.match(r"[a-z0-9.\-\[\]]+==", first), first
        assert "--hash=sha256:" in entry, first


def test_test_lock_has_the_same_versions() -> None:
    pinned = [
        set(re.findall(r"(?m)^([a-z0-9.\-]+==\S+)", (ROOT / name).read_text())) for name in LOCKS
    ]
    assert pinned[0] <= pinned[1]
