from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import AlreadyRunningError, NotRunningError, UsageError
from cluster.local.environment import RunPorts, build_environment
from cluster.local.folder import create_run, list_runs, open_run, runs_path

MAX_SOCKET_PATH_BYTES = 107


def test_run_is_private_owned_and_gone_after_remove(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    run = create_run("one", root=root)
    assert run.path.stat().st_mode & 0o777 == 0o700
    assert run.token_path.stat().st_mode & 0o777 == 0o600
    assert len(run.token_path.read_text()) == 64
    assert run.state.is_owned()
    run.update(port=8080, phase="ready")
    assert open_run("one", root=root).state == run.state
    run.remove()
    assert not root.exists()


def test_second_run_of_a_name_is_refused_and_leaves_the_first(tmp_path: Path) -> None:
    first = create_run("one", root=tmp_path / "runs")
    with pytest.raises(AlreadyRunningError):
        create_run("one", root=tmp_path / "runs")
    assert [path.name for path in first.path.parent.iterdir()] == ["one"]
    assert [run.state for run in list_runs(root=tmp_path / "runs")] == [first.state]


def test_run_whose_owner_is_gone_is_not_owned(tmp_path: Path) -> None:
    run = create_run("one", root=tmp_path / "runs")
    run.update(owner=replace(run.state.owner, started_at=1.0))
    assert not open_run("one", root=tmp_path / "runs").state.is_owned()


def test_unknown_run_is_not_running(tmp_path: Path) -> None:
    with pytest.raises(NotRunningError):
        open_run("one", root=tmp_path)


@pytest.mark.parametrize("name", ["", "Upper", "a/b", "..", "-a", "a" * 13])
def test_name_that_makes_no_short_path_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="1 to 12"):
        create_run(name, root=tmp_path / "runs")


def test_folder_of_runs_that_others_can_read_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    root.mkdir()
    root.chmod(0o755)
    with pytest.raises(UsageError, match="nobody else may read"):
        create_run("one", root=root)


def test_longest_socket_paths_fit_with_the_longest_name() -> None:
    """Ray adds a session and a node id; HAProxy binds under a temporary name first."""
    longest = len(str(runs_path())) - len(str(os.getuid())) + len("4294967294") + 1 + 12
    session = "/session_2026-11-22_06-14-50_437157_4194304"
    ray_socket = longest + len("/r") + len(session) + len("/sockets/plasma_store.0")
    proxy_socket = longest + len("/p/") + 56 + len("/m.4194304.tmp")
    assert max(ray_socket, proxy_socket) <= MAX_SOCKET_PATH_BYTES


def test_environment_keeps_every_place_private_and_no_foreign_ray_setting(tmp_path: Path) -> None:
    run = create_run("one", root=tmp_path / "runs")
    base = {"RAY_ADDRESS": "10.0.0.1:6379", "PATH": "/bin", "TMPDIR": "/tmp"}
    environment = build_environment(
        run, RunPorts.choose("one", port=8080), longest_generation_s=600.0, base=base
    )
    assert "RAY_ADDRESS" not in environment
    assert environment["PATH"] == "/bin"
    assert environment["RAY_AUTH_MODE"] == "token"
    private = ("TMPDIR", "HF_HOME", "XDG_CACHE_HOME", "RAY_AUTH_TOKEN_PATH", "SHOAL_RUN_DIR")
    for variable in private:
        assert Path(environment[variable]).is_relative_to(run.path), variable
