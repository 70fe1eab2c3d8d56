"""How the ranks of a group find each other, over real sockets."""

import socket
import threading
from pathlib import Path

import pytest

from serve.errors import CollectiveError
from serve.transport.address import Address, listen_blocking
from serve.transport.rendezvous import accept_ranks, dial_root

SECRET = b"s" * 32


def _dial_in_thread(address: Address, rank: int, found: dict[int, list[socket.socket]]) -> None:
    found[rank] = dial_root(str(address), rank=rank, num_channels=2, secret=SECRET, timeout_s=60)


def _listen(folder: Path) -> tuple[socket.socket, Address]:
    return listen_blocking(Address(path=str(folder / "g")))


def test_every_rank_gets_its_own_sockets_in_rank_order(tmp_path: Path) -> None:
    listener, address = _listen(tmp_path)
    found: dict[int, list[socket.socket]] = {}
    threads = [
        threading.Thread(target=_dial_in_thread, args=(address, rank, found)) for rank in (2, 1)
    ]
    for thread in threads:
        thread.start()
    channels = accept_ranks(listener, size=3, num_channels=2, secret=SECRET, timeout_s=60)
    for thread in threads:
        thread.join()
    for channel in (0, 1):
        for rank in (1, 2):
            found[rank][channel].sendall(bytes([channel, rank]))
            assert channels[channel][rank - 1].recv(2) == bytes([channel, rank])
    for connected in [*channels[0], *channels[1], *found[1], *found[2]]:
        connected.close()
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_does_not_come_is_named_and_no_socket_file_stays(tmp_path: Path) -> None:
    listener, _ = _listen(tmp_path)
    with pytest.raises(CollectiveError, match=r"ranks \[1\]"):
        accept_ranks(listener, size=2, num_channels=1, secret=SECRET, timeout_s=0.01)
    assert list(tmp_path.iterdir()) == []


def test_a_caller_without_the_secret_is_sent_away(tmp_path: Path) -> None:
    listener, address = _listen(tmp_path)
    (forged,) = dial_root(str(address), rank=1, num_channels=1, secret=b"x" * 32, timeout_s=60)
    (honest,) = dial_root(str(address), rank=1, num_channels=1, secret=SECRET, timeout_s=60)
    ((accepted,),) = accept_ranks(listener, size=2, num_channels=1, secret=SECRET, timeout_s=60)
    honest.sendall(b"!")
    assert accepted.recv(1) == b"!"
    assert forged.recv(1) == b""
    for connected in (forged, honest, accepted):
        connected.close()


def test_a_root_that_is_gone_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(CollectiveError, match="rank 0 cannot be reached"):
        dial_root(f"unix:{tmp_path}/g", rank=1, num_channels=1, secret=SECRET, timeout_s=60)
