"""Addresses of private sockets: `unix:/path` on one node, `tcp:host:port` between nodes.

A process that does not know where its callers are listens on both and hands out both, joined by a
comma; a caller tries them in that order. A Unix path has a random name, so that it exists on the
listener's own node only.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

# A Unix socket path must fit sockaddr_un (108 bytes with the final zero); some systems have less.
MAX_UNIX_PATH_BYTES = 100


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen or dial. `path` is set for a Unix socket, `host` and `port` for TCP."""

    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else f"tcp:{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read `unix:/path` or `tcp:host:port`.

        Raises:
            ValueError: neither of the two, or a Unix path that is too long for a socket.
        """
        kind, _, rest = text.partition(":")
        if kind == "unix" and rest:
            if len(os.fsencode(rest)) > MAX_UNIX_PATH_BYTES:
                raise ValueError(
                    f"a Unix socket path must be <= {MAX_UNIX_PATH_BYTES} bytes, got {rest!r}"
                )
            return cls(path=rest)
        host, _, port = rest.rpartition(":")
        if kind == "tcp" and host and port.isdigit():
            return cls(host=host, port=int(port))
        raise ValueError(f"an address is unix:/path or tcp:host:port, got {text!r}")

    @classmethod
    def parse_all(cls, text: str) -> list[Address]:
        """Read a comma-separated list.

        Raises:
            ValueError: one of them is not an address.
        """
        return [cls.parse(part) for part in text.split(",")]


def listen_blocking(address: Address, *, backlog: int = 64) -> tuple[socket.socket, Address]:
    """A listening socket, and its address with the port that the system chose for port 0."""
    if address.path:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(address.path)
        os.chmod(address.path, 0o600)
    else:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind((address.host, address.port))
        address = Address(host=address.host, port=listener.getsockname()[1])
    listener.listen(backlog)
    return listener, address
