"""How the ranks of a group find each other: all dial rank 0, once for each channel, with a secret.

::

    | secret: 32 bytes | channel: 1 byte | rank: 2 bytes, little endian |

Blocking, since it happens once, before there is a step.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import socket
import time
from collections.abc import Iterator, Sequence

from serve.errors import CollectiveError
from serve.transport.address import Address

SECRET_BYTES = 32
_HELLO_BYTES = SECRET_BYTES + 3


def accept_ranks(
    listener: socket.socket, *, size: int, num_channels: int, secret: bytes, timeout_s: float
) -> list[list[socket.socket]]:
    """Rank 0's side: for each channel the sockets of ranks 1 to size - 1, in that order.

    A caller without the secret is sent away. The listener is closed and its Unix path removed.

    Raises:
        CollectiveError: not every rank called within `timeout_s`.
    """
    deadline_s = time.monotonic() + timeout_s
    found: dict[tuple[int, int], socket.socket] = {}
    wanted = [(channel, rank) for channel in range(num_channels) for rank in range(1, size)]
    with _closing(listener):
        while len(found) < len(wanted):
            listener.settimeout(max(deadline_s - time.monotonic(), 0.001))
            try:
                caller, _ = listener.accept()
                key = _read_hello(caller, secret)
            except OSError as exc:
                missing = sorted({rank for key in wanted if key not in found for rank in key[1:]})
                raise CollectiveError(
                    f"ranks {missing} did not connect within {timeout_s:g} s"
                ) from exc
            if key is None or key not in wanted or key in found:
                caller.close()
            else:
                found[key] = _prepare(caller)
    return [[found[channel, rank] for rank in range(1, size)] for channel in range(num_channels)]


def dial_root(
    addresses: str, *, rank: int, num_channels: int, secret: bytes, timeout_s: float
) -> list[socket.socket]:
    """The side of the others: one connected socket for each channel.

    Raises:
        CollectiveError: rank 0 does not listen.
    """
    channels = []
    for channel in range(num_channels):
        root = _dial(Address.parse_all(addresses), timeout_s)
        root.sendall(secret + bytes([channel]) + rank.to_bytes(2, "little"))
        channels.append(_prepare(root))
    return channels


@contextlib.contextmanager
def _closing(listener: socket.socket) -> Iterator[None]:
    path = listener.getsockname() if listener.family == socket.AF_UNIX else ""
    try:
        with listener:
            yield
    finally:
        if path:
            os.unlink(path)


def _dial(addresses: Sequence[Address], timeout_s: float) -> socket.socket:
    failures = []
    for address in addresses:
        family = socket.AF_UNIX if address.path else socket.AF_INET
        root = socket.socket(family, socket.SOCK_STREAM)
        root.settimeout(timeout_s)
        try:
            root.connect(address.path or (address.host, address.port))
        except OSError as exc:
            root.close()
            failures.append(f"{address}: {exc}")
        else:
            return root
    raise CollectiveError(f"rank 0 cannot be reached: {'; '.join(failures)}")


def _read_hello(caller: socket.socket, secret: bytes) -> tuple[int, int] | None:
    """Channel and rank of a caller with the secret, else None."""
    caller.settimeout(1.0)
    hello = b""
    while len(hello) < _HELLO_BYTES:
        try:
            data = caller.recv(_HELLO_BYTES - len(hello))
        except OSError:
            return None
        if not data:
            return None
        hello += data
    if not hmac.compare_digest(hello[:SECRET_BYTES], secret):
        return None
    return hello[SECRET_BYTES], int.from_bytes(hello[SECRET_BYTES + 1 :], "little")


def _prepare(connected: socket.socket) -> socket.socket:
    connected.settimeout(None)
    if connected.family == socket.AF_INET:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connected
