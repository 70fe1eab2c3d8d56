"""Collectives of ranks on one machine, through memory that all of them have mapped.

Not the arithmetic (`csrc/all_reduce.cpp`). Rank 0 makes a file in memory and passes it over the
sockets that the ranks have already; the file has no name, so nobody else can open it and nothing is
left behind, whoever dies when. The one decision behind it: the sockets stay open and silent, so
whatever happens on one of them is the end of a rank, and a thread that waits for it breaks the
group.

::

    rank 0                                            rank r
    offer: the file, or why there is none        -->
                                                 <--  the nonce read from its mapping, or why not
    verdict: all have it, or why not             -->
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import logging
import mmap
import os
import secrets
import select
import socket
import threading
from collections.abc import Mapping, Sequence

from serve.errors import CollectiveError
from serve.kernels import abi, native
from serve.kernels.dtypes import Floats
from serve.kernels.native_group import Failure, NativeGroup

from .tensor_collectives import TensorCollectives

logger = logging.getLogger("shoal.shard")

# 256 KiB, twice a rank: a piece stays in a core's own cache until its readers have come.
NUM_SLOT_VALUES = 1 << 16

_NONCE_BYTES = 32
_OFFSET = 64  # the group lies behind the nonce
_MESSAGE_BYTES = 256


class SharedMemoryCollectives(TensorCollectives):
    """A `serve.model.tensor_parallel.Collectives` through shared memory.

    Args:
        group: this rank's handle.
        sockets: by the rank at the other end; nothing is sent over them any more.
        timeout_s: what the group was made with.
    """

    def __init__(
        self, group: NativeGroup, sockets: Mapping[int, socket.socket], timeout_s: float
    ) -> None:
        super().__init__(group.rank, group.size)
        self._group = group
        self._sockets = sockets
        self._timeout_s = timeout_s
        self._watcher = threading.Thread(
            target=_watch, args=(group, sockets), name=f"rank{group.rank}-peers", daemon=True
        )
        self._watcher.start()

    def native(self) -> abi.Collectives:
        """The same two collectives as C functions."""
        return self._group.native()

    def limit_silence(self, timeout_s: float) -> None:
        """Break the group after this long a wait, from the next collective on."""
        self._timeout_s = timeout_s
        self._group.limit_silence(timeout_s)

    def failure(self) -> CollectiveError:
        """Why the group is broken, as the first rank that noticed has it."""
        reason, rank = self._group.failure()
        who = "this rank" if rank == self.rank else f"rank {rank}"
        if reason is Failure.SILENT:
            return CollectiveError(f"{who} was silent for {self._timeout_s:g} s")
        if reason is Failure.OUT_OF_STEP:
            return CollectiveError(f"{who} is out of step: it came to another collective")
        if rank == self.rank:
            return CollectiveError("this rank left the group")
        return CollectiveError(f"rank {rank} is gone: its socket ended")

    def close(self) -> None:
        """Leave the group; the other ranks' collectives fail from now on."""
        self._group.break_off(self.rank)
        for connected in self._sockets.values():
            with contextlib.suppress(OSError):  # the other side may have been first
                connected.shutdown(socket.SHUT_RDWR)
        self._watcher.join()
        for connected in self._sockets.values():
            connected.close()

    def _all_reduce(self, values: Floats) -> None:
        if not self._group.all_reduce(values):
            raise self.failure()

    def _gather(self, values: Floats, out: Floats | None) -> None:
        if not self._group.gather(values, out):
            raise self.failure()


def share_memory(
    rank: int, size: int, sockets: Mapping[int, socket.socket], timeout_s: float
) -> NativeGroup | None:
    """This rank's handle on memory that every rank has mapped; None on all where one cannot.

    Rank 0 says in one line of the log which it is, and why.

    Args:
        rank: this rank.
        size: ranks in the group; every one of them calls this at the same time.
        sockets: by the rank at the other end.
        timeout_s: how long a rank is waited for, here and in the group.

    Raises:
        CollectiveError: a rank left meanwhile.
    """
    for connected in sockets.values():
        connected.settimeout(timeout_s)
    agree = _offer if rank == 0 else _accept
    return agree(rank, size, sockets, timeout_s)


def _watch(group: NativeGroup, sockets: Mapping[int, socket.socket]) -> None:
    """Break the group at the first end of a socket."""
    rank_of = {connected.fileno(): rank for rank, connected in sockets.items()}
    poll = select.poll()
    for descriptor in rank_of:
        poll.register(descriptor, select.POLLIN)
    descriptor, _ = poll.poll()[0]
    group.break_off(rank_of[descriptor])


class _NotPossible(Exception):
    """Why a rank cannot share memory."""


def _offer(
    rank: int, size: int, sockets: Mapping[int, socket.socket], timeout_s: float
) -> NativeGroup | None:
    """Rank 0: make the memory, hear from every rank that it has it."""
    try:
        library = _library()
        _check_is_local(sockets)
        memory, descriptor = _make_memory(_num_bytes(library, size))
    except _NotPossible as exc:
        _refuse(sockets, f"rank 0: {exc}")
        return None
    nonce = memory[:_NONCE_BYTES]
    try:
        for peer in sockets:
            _send(sockets, peer, is_yes=True, descriptor=descriptor)
    finally:
        os.close(descriptor)
    if refusal := _hear_refusal(sockets, nonce):
        _refuse(sockets, refusal)
        return None
    for peer in sockets:
        _send(sockets, peer, is_yes=True)
    logger.info("%d ranks meet in shared memory", size)
    return _join(library, memory, rank, size, timeout_s)


def _accept(
    rank: int, size: int, sockets: Mapping[int, socket.socket], timeout_s: float
) -> NativeGroup | None:
    """The side of the others."""
    is_yes, _, descriptors = _receive(sockets, 0)
    if not is_yes:
        return None
    try:
        library = _library()
        memory = _map(descriptors, _num_bytes(library, size))
    except _NotPossible as exc:
        _send(sockets, 0, is_yes=False, text=str(exc).encode())
        _receive(sockets, 0)
        return None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    _send(sockets, 0, is_yes=True, text=memory[:_NONCE_BYTES])
    is_yes = _receive(sockets, 0)[0]
    return _join(library, memory, rank, size, timeout_s) if is_yes else None


def _hear_refusal(sockets: Mapping[int, socket.socket], nonce: bytes) -> str:
    """Which rank does not have the memory, and why; empty where all have it."""
    refusal = ""
    for peer in sockets:
        is_yes, text, _ = _receive(sockets, peer)
        if not is_yes:
            refusal = f"rank {peer}: {text.decode(errors='replace')}"
        elif not hmac.compare_digest(text, nonce):
            refusal = f"rank {peer} has other memory"
    return refusal


def _refuse(sockets: Mapping[int, socket.socket], reason: str) -> None:
    logger.info("%d ranks meet over sockets, not in shared memory: %s", len(sockets) + 1, reason)
    for peer in sockets:
        _send(sockets, peer, is_yes=False)


def _library() -> native.NativeLibrary:
    library = native.load()
    if library is None:
        raise _NotPossible(native.reason())
    return library


def _check_is_local(sockets: Mapping[int, socket.socket]) -> None:
    for peer, connected in sockets.items():
        if connected.family != socket.AF_UNIX:
            raise _NotPossible(f"rank {peer} is connected over the network")


def _num_bytes(library: native.NativeLibrary, size: int) -> int:
    return _OFFSET + NativeGroup.num_bytes(library, size=size, num_slot_values=NUM_SLOT_VALUES)


def _make_memory(num_bytes: int) -> tuple[mmap.mmap, int]:
    """New memory that begins with a nonce, and its descriptor."""
    try:
        descriptor = os.memfd_create("shoal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as exc:
        raise _NotPossible(f"no shared memory: {exc}") from exc
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)  # now, rather than a signal at the first use
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        memory = mmap.mmap(descriptor, num_bytes)
    except OSError as exc:
        os.close(descriptor)
        raise _NotPossible(f"no {num_bytes} bytes of shared memory: {exc}") from exc
    memory[:_NONCE_BYTES] = secrets.token_bytes(_NONCE_BYTES)
    return memory, descriptor


def _map(descriptors: Sequence[int], num_bytes: int) -> mmap.mmap:
    """The memory that rank 0 passed."""
    if len(descriptors) != 1:
        raise _NotPossible("rank 0's memory did not arrive")
    try:
        num_found = os.fstat(descriptors[0]).st_size
        if num_found != num_bytes:
            raise _NotPossible(f"rank 0's memory has {num_found} bytes, expected {num_bytes}")
        return mmap.mmap(descriptors[0], num_bytes)
    except OSError as exc:
        raise _NotPossible(f"rank 0's memory cannot be mapped: {exc}") from exc


def _join(
    library: native.NativeLibrary, memory: mmap.mmap, rank: int, size: int, timeout_s: float
) -> NativeGroup:
    return NativeGroup(
        library,
        memory,
        offset=_OFFSET,
        rank=rank,
        size=size,
        num_slot_values=NUM_SLOT_VALUES,
        timeout_s=timeout_s,
    )


def _send(
    sockets: Mapping[int, socket.socket],
    peer: int,
    *,
    is_yes: bool,
    text: bytes = b"",
    descriptor: int | None = None,
) -> None:
    """One message: | yes: 1 byte | length: 1 byte | text, filled up |."""
    text = text[: _MESSAGE_BYTES - 2]
    message = (bytes([is_yes, len(text)]) + text).ljust(_MESSAGE_BYTES, b"\0")
    try:
        if descriptor is None:
            sockets[peer].sendall(message)
        else:
            socket.send_fds(sockets[peer], [message], [descriptor])
    except OSError as exc:
        raise CollectiveError(f"rank {peer} is gone: {exc}") from exc


def _receive(sockets: Mapping[int, socket.socket], peer: int) -> tuple[bool, bytes, Sequence[int]]:
    """A message's yes, its text and the descriptors that came with it."""
    try:
        message, descriptors, _, _ = socket.recv_fds(sockets[peer], _MESSAGE_BYTES, 1)
        while message and len(message) < _MESSAGE_BYTES:
            rest = sockets[peer].recv(_MESSAGE_BYTES - len(message))
            message = message + rest if rest else b""
    except OSError as exc:
        raise CollectiveError(f"rank {peer} is gone: {exc}") from exc
    if not message:
        raise CollectiveError(f"rank {peer} is gone: its socket ended")
    return bool(message[0]), message[2 : 2 + message[1]], descriptors
