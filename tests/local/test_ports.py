from __future__ import annotations

import os
import socket
import subprocess
import sys

import psutil
import pytest

from cluster.local.ports import find_free_block, find_free_ports, port_taken


def test_port_is_taken_by_who_is_not_below_the_asking_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ask = f"from cluster.local.ports import port_taken; print(port_taken('127.0.0.1', {port}))"
        told = subprocess.run(
            [sys.executable, "-c", ask],
            capture_output=True,
            text=True,
            check=True,
        )
        own = port_taken("127.0.0.1", port)
    name = psutil.Process().name()
    assert told.stdout.strip() == f"port {port} is in use by {name} (pid {os.getpid()})"
    assert own is None


def test_free_port_is_not_taken() -> None:
    (port,) = find_free_ports(1)
    assert port_taken("127.0.0.1", port) is None


def test_free_ports_differ_and_are_not_those_that_linux_hands_out() -> None:
    ports = find_free_ports(500)
    assert len(set(ports)) == 500
    assert max(ports) < 32_768


def test_port_that_is_taken_or_promised_is_not_found() -> None:
    (taken,) = find_free_ports(1)
    with socket.create_server(("127.0.0.1", taken)):
        rest = find_free_ports(5_000, besides={24_000})
        assert not {taken, 24_000} & set(rest)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The ports that are not free, for a test to fill: nothing else on the machine counts."""
    ports: set[int] = set()
    monkeypatch.setattr("cluster.local.ports.is_port_free", lambda port: port not in ports)
    return ports


def test_block_has_no_port_that_is_taken_or_promised(taken: set[int]) -> None:
    block = find_free_block(100)
    others = {port for port in range(20_000, 24_000) if not block <= port < block + 100}
    assert find_free_block(100, besides=others) == block
    taken |= others
    assert find_free_block(100) == block
    taken.add(block + 99)
    with pytest.raises(OSError, match="no 100 neighbouring free ports from 20000 to 23999"):
        find_free_block(100)


def test_block_ends_below_where_the_blocks_end(taken: set[int]) -> None:
    taken |= {20_999}
    assert find_free_block(1_500) == 21_500
    with pytest.raises(OSError, match="no 3000 neighbouring free ports"):
        find_free_block(3_000)
    with pytest.raises(OSError, match="no 5000 neighbouring free ports"):
        find_free_block(5_000)


def test_more_ports_than_there_are_is_told() -> None:
    with pytest.raises(OSError, match="no 10000 free ports from 24000 to 29999"):
        find_free_ports(10_000)
