"""The group of a device's ranks, in processes, with gloo in the place of NCCL."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serve.shards.nccl import _is_one_machine, _meet

SIZE = 3


def test_the_store_of_the_ranks_of_one_machine_is_out_of_reach_for_others() -> None:
    near, far = socket.socketpair()
    with near, far, ThreadPoolExecutor(1) as threads:
        other = threads.submit(_meet, 1, 2, [far], 30.0)
        store = _meet(0, 2, [near], 30.0)
        store.set("key", "found")
        assert other.result().get("key") == b"found"
        lines = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
        listening = [line.split()[1] for line in lines.splitlines() if line.split()[3] == "0A"]
        found = [address for address in listening if address.endswith(f":{store.port:04X}")]
        assert found == [f"0100007F:{store.port:04X}"]


def _connect(kind: str) -> tuple[socket.socket, socket.socket]:
    if kind == "unix":
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname())
        return listener.accept()[0], far


@pytest.mark.parametrize(
    ("kinds", "is_one"), [(["unix", "unix"], True), (["unix", "tcp"], False), (["tcp"], False)]
)
def test_every_rank_knows_whether_all_are_on_one_machine(kinds: list[str], is_one: bool) -> None:
    """A rank beside rank 0 must not choose the loopback where another one is far away."""
    pairs = [_connect(kind) for kind in kinds]
    size = 1 + len(pairs)

    stores = []  # rank 0's is there for as long as somebody asks

    def find(rank: int) -> bool:
        sockets = [near for near, _ in pairs] if rank == 0 else [pairs[rank - 1][1]]
        stores.append(_meet(rank, size, sockets, 30.0))
        return _is_one_machine(rank, sockets, stores[-1])

    with ThreadPoolExecutor(size) as threads:
        assert list(threads.map(find, range(size))) == [is_one] * size
    for pair in pairs:
        for connected in pair:
            connected.close()


def _start(size: int) -> list[subprocess.Popen[str]]:
    """The ranks of a group, each about to say what its collectives gave."""
    pairs = [socket.socketpair() for _ in range(size - 1)]
    ends = [[near for near, _ in pairs], *([far] for _, far in pairs)]
    root = Path(__file__).parents[2]
    ranks = []
    for rank, sockets in enumerate(ends):
        numbers = [one.fileno() for one in sockets]
        command = [sys.executable, str(Path(__file__).parent / "group_rank.py"), str(rank)]
        ranks.append(
            subprocess.Popen(
                [*command, str(size), *map(str, numbers)],
                pass_fds=numbers,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
            )
        )
    for sockets in ends:
        for one in sockets:
            one.close()
    return ranks


def _read(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def _order(process: subprocess.Popen[str], order: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{order}\n")
    process.stdin.flush()


def test_ranks_sum_gather_and_notice_a_death() -> None:
    """The last rank dies: rank 0 sees its socket end and leaves, and so does rank 1."""
    ranks = _start(SIZE)
    found = [_read(process) for process in ranks]
    for process in ranks[:-1]:
        _order(process, "60")
    _order(ranks[-1], "die")
    results = [process.communicate(timeout=60) for process in ranks]
    everything = [[0.0, 0.0, 1.0, 1.0, 2.0, 2.0]] * 2
    numbers = [2**24 - 1, 2**24 - 2, 2**24 - 3]
    assert found == [
        f"[6.0, 60.0] {everything} {numbers}\n",
        *[f"[6.0, 60.0] None {numbers}\n"] * 2,
    ], results
    reasons = [said.splitlines()[-1] for said, _ in results[:-1]]
    assert reasons == [
        f"rank {SIZE - 1} is gone: its socket ended",
        "rank 0 is gone: its socket ended",
    ], results


def test_a_wait_that_takes_too_long_names_the_silent_rank_and_an_idle_group_is_fine() -> None:
    ranks = _start(2)
    for process in ranks:
        _read(process)
    ranks[1].send_signal(signal.SIGSTOP)
    _order(ranks[0], "1")
    found = ranks[0].communicate(timeout=60)
    ranks[1].kill()
    ranks[1].communicate(timeout=60)
    assert found[0] == "idle\nrank 1 was silent for 1 s\n", found
