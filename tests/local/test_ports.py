from __future__ import annotations

import os
import socket
import subprocess
import sys

import psutil

from cluster.local.ports import find_free_ports, port_taken


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
