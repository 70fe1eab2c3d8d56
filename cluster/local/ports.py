"""Free TCP ports, and who holds one that is not free.

Not a reservation: a port found free may be taken before it is bound; whoever binds it says so.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import socket
from collections.abc import Collection

import psutil

ANOTHER_PORT = "Choose another one: --port N, or `http: {port: N}` in the configuration."
# Above the ports of Ray's workers, below those that systems hand out by themselves: Ray's servers
# and everybody's connections take those, also between our finding a port and binding it.
_BLOCK_PORTS = range(20_000, 24_000)
_SINGLE_PORTS = range(24_000, 30_000)


def is_port_free(port: int, *, host: str = "127.0.0.1") -> bool:
    """Whether `port` can be bound on `host` now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def listening_error(host: str, port: int) -> OSError | None:
    """Why nobody can listen on `port` of `host` now; None where it is free."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as exc:
        return exc
    return None


def port_taken(host: str, port: int) -> str | None:
    """In a sentence that `port` of `host` is in use by a process that is not below this one."""
    error = listening_error(host, port)
    if error is None or error.errno != errno.EADDRINUSE:
        return None
    ours = {child.pid for child in psutil.Process().children(recursive=True)} | {os.getpid()}
    if any(pid in ours for pid in _listeners(port)):
        return None
    return f"port {port} is in use by {describe_listener(port)}"


def find_free_ports(num_ports: int, *, besides: Collection[int] = ()) -> list[int]:
    """`num_ports` different free ports, none of them among `besides`.

    Raises:
        OSError: there are not so many.
    """
    wanted = random.sample(_SINGLE_PORTS, len(_SINGLE_PORTS))
    free = (port for port in wanted if port not in besides and is_port_free(port))
    found = list(itertools.islice(free, num_ports))
    if len(found) < num_ports:
        raise OSError(f"no {num_ports} free ports {_between(_SINGLE_PORTS)}")
    return found


def find_free_block(size: int, *, besides: Collection[int] = ()) -> int:
    """The first port of `size` neighbouring free ports, none of them among `besides`.

    Raises:
        OSError: there is no such block.
    """
    starts = range(_BLOCK_PORTS.start, _BLOCK_PORTS.stop - size + 1, size)
    for start in random.sample(starts, len(starts)):
        block = range(start, start + size)
        if all(port not in besides and is_port_free(port) for port in block):
            return start
    raise OSError(f"no {size} neighbouring free ports {_between(_BLOCK_PORTS)}")


def describe_listener(port: int) -> str:
    """Who listens on `port`, as "haproxy (pid 12)"; "another process" where that is not known."""
    for pid in _listeners(port):
        with contextlib.suppress(psutil.Error):
            return f"{psutil.Process(pid).name()} (pid {pid})"
    return "another process"


def _listeners(port: int) -> list[int]:
    """Processes that listen on `port`, as far as this user may see them."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.Error:
        return []
    return [
        connection.pid
        for connection in connections
        if connection.status == psutil.CONN_LISTEN
        and connection.laddr[1:] == (port,)
        and connection.pid is not None
    ]


def _between(ports: range) -> str:
    return f"from {ports.start} to {ports.stop - 1}"
