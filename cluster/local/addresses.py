"""Where a server that listens on a host is reached: by this machine, and by others.

Not name resolution for clients. The one decision: whatever the host, our own commands talk to the
server over one address, `contact_host`.
"""

from __future__ import annotations

import ipaddress
import socket

LOOPBACK = "127.0.0.1"


def is_wildcard(host: str) -> bool:
    """Whether `host` means every address of the machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def contact_host(host: str) -> str:
    """The address at which this machine reaches a server that listens on `host`."""
    return LOOPBACK if is_wildcard(host) else host


def listening_addresses(host: str) -> list[str]:
    """The addresses at which a server that listens on `host` is reached, loopback first."""
    return [LOOPBACK, *_own_addresses(host)] if is_wildcard(host) else [host]


def url_of(host: str, port: int) -> str:
    """The URL of a server; IPv6 in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _own_addresses(host: str) -> list[str]:
    """Addresses of this machine's interfaces that are up, of the wildcard's kind."""
    import psutil

    kinds = {socket.AF_INET, socket.AF_INET6} if ":" in host else {socket.AF_INET}
    states = psutil.net_if_stats()
    found = [
        entry.address
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in kinds and name in states and states[name].isup
    ]
    return [text for text in found if _is_reachable(text)]


def _is_reachable(text: str) -> bool:
    """Whether others can use an address: not loopback, and not bound to one link."""
    address = ipaddress.ip_address(text.partition("%")[0])
    return not address.is_loopback and not address.is_link_local
