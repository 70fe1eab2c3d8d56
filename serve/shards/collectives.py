"""Collectives of tensor parallelism over connected sockets: a star around rank 0.

Rank 0 receives every rank's part, sums in rank order and sends the sum back, so all ranks have the
same bits. Not the handshake (`serve.transport.rendezvous`), and not the fast way on one machine
(`.shared_memory`). The one decision behind it: a rank that fails closes its sockets, so one death
reaches every rank at once as the end of a socket, and a rank that hangs runs into the time-out.

A message is one collective of one rank, little endian::

    | sequence number: 4 bytes | payload bytes: 4 bytes | float32 values |
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
from collections.abc import Callable, Sequence

import numpy as np

from serve.errors import CollectiveError
from serve.kernels import abi
from serve.kernels.dtypes import Floats
from serve.model.tensor_parallel import Collectives, SingleRank

from .shared_memory import SharedMemoryCollectives, share_memory
from .tensor_collectives import TensorCollectives

_HEADER = struct.Struct("<II")

# How much longer a rank waits for rank 0, which may be waiting for a third one: it names that one.
_PATIENCE = 1.25


def make_collectives(
    rank: int, size: int, sockets: Sequence[socket.socket], timeout_s: float
) -> Collectives:
    """The fastest collectives that every rank of a group can use, decided together.

    Args:
        rank: this rank.
        size: ranks in the group; every one of them calls this at the same time.
        sockets: on rank 0 those of ranks 1 to size - 1, in that order; elsewhere rank 0's alone.
        timeout_s: silence after which a rank counts as lost.

    Raises:
        CollectiveError: a rank left while they agreed.
    """
    if size == 1:
        return SingleRank()
    peers = dict(enumerate(sockets, start=1 if rank == 0 else 0))
    group = share_memory(rank, size, peers, timeout_s)
    if group is not None:
        return SharedMemoryCollectives(group, peers, timeout_s)
    return LoopbackCollectives(rank=rank, size=size, sockets=sockets, timeout_s=timeout_s)


class LoopbackCollectives(TensorCollectives):
    """A `serve.model.tensor_parallel.Collectives` over blocking stream sockets.

    Args:
        rank: this rank.
        size: ranks in the group.
        sockets: on rank 0 those of ranks 1 to size - 1, in that order; elsewhere rank 0's alone.
        timeout_s: silence after which a rank counts as lost.
    """

    def __init__(
        self, *, rank: int, size: int, sockets: Sequence[socket.socket], timeout_s: float = 60.0
    ) -> None:
        assert len(sockets) == (size - 1 if rank == 0 else 1)
        super().__init__(rank, size)
        self._peers = [
            _Peer(number, connected)
            for number, connected in enumerate(sockets, start=1 if rank == 0 else 0)
        ]
        self.limit_silence(timeout_s)
        self._sequence = 0
        self._failure: Exception = CollectiveError("this rank left the group")
        self._native = abi.Collectives(
            rank=rank,
            size=size,
            all_reduce=abi.AllReduce(self._native_all_reduce),
            gather=abi.Gather(self._native_gather),
        )

    def native(self) -> abi.Collectives:
        """The same two collectives as C functions that call back into Python."""
        return self._native

    def limit_silence(self, timeout_s: float) -> None:
        """Break the group after this long a wait, from the next collective on.

        Where there are three ranks or more, others than rank 0 wait a quarter longer.
        """
        may_wait_for_third = self.rank > 0 and self.size > 2
        for peer in self._peers:
            peer.limit_silence(timeout_s * _PATIENCE if may_wait_for_third else timeout_s)

    def failure(self) -> Exception:
        """What a callback raised before it returned 1."""
        return self._failure

    def close(self) -> None:
        """Leave the group; the other ranks' collectives fail from now on."""
        for peer in self._peers:
            peer.close()

    def _all_reduce(self, values: Floats) -> None:
        try:
            if self.rank == 0:
                self._sum_into(values)
            else:
                self._peers[0].send(self._sequence, values)
                self._peers[0].receive(self._sequence, values)
        except CollectiveError:
            self.close()
            raise
        self._sequence += 1

    def _gather(self, values: Floats, out: Floats | None) -> None:
        try:
            if out is None:
                self._peers[0].send(self._sequence, values)
            else:
                out[0] = values
                for peer, row in zip(self._peers, out[1:], strict=True):
                    peer.receive(self._sequence, row)
        except CollectiveError:
            self.close()
            raise
        self._sequence += 1

    def _sum_into(self, total: Floats) -> None:
        """Rank 0: receive, sum, send back."""
        part = np.empty_like(total)
        for peer in self._peers:
            peer.receive(self._sequence, part)
            np.add(total, part, out=total)
        for peer in self._peers:
            peer.send(self._sequence, total)

    def _native_all_reduce(self, _context: int | None, x: int, num_values: int) -> int:
        return self._answer(lambda: self._all_reduce(_floats_at(x, num_values)))

    def _native_gather(self, _context: int | None, x: int, num_values: int, out: int | None) -> int:
        def gather() -> None:
            parts = _floats_at(out, self.size * num_values) if out else None
            rows = None if parts is None else parts.reshape(self.size, num_values)
            self._gather(_floats_at(x, num_values), rows)

        return self._answer(gather)

    def _answer(self, collective: Callable[[], None]) -> int:
        """C's 0 or 1: an exception cannot pass through C, so it is kept for `failure`."""
        try:
            collective()
        except Exception as exc:
            self._failure = exc
            return 1
        return 0


class _Peer:
    """One connected rank."""

    def __init__(self, rank: int, connected: socket.socket) -> None:
        self._rank = rank
        self._socket = connected
        self._timeout_s = 0.0
        if connected.family in (socket.AF_INET, socket.AF_INET6):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def limit_silence(self, timeout_s: float) -> None:
        """Wait no longer than this for the other end to send or to receive."""
        self._timeout_s = timeout_s
        self._socket.settimeout(timeout_s)

    def send(self, sequence: int, values: Floats) -> None:
        """Send contiguous values."""
        payload = _bytes_of(values)
        header = _HEADER.pack(sequence & 0xFFFFFFFF, payload.nbytes)
        try:
            num_sent = self._socket.sendmsg([header, payload])
            if num_sent < len(header):
                self._socket.sendall(header[num_sent:])
                num_sent = len(header)
            if num_sent < len(header) + payload.nbytes:
                self._socket.sendall(payload[num_sent - len(header) :])
        except OSError as exc:
            raise self._lost(exc) from exc

    def receive(self, sequence: int, into: Floats) -> None:
        """Fill contiguous values with what this rank sent for the same collective."""
        payload = _bytes_of(into)
        header = bytearray(_HEADER.size)
        try:
            self._fill(memoryview(header))
            got = _HEADER.unpack(header)
            if got != (sequence & 0xFFFFFFFF, payload.nbytes):
                raise CollectiveError(
                    f"rank {self._rank} is out of step: expected collective {sequence} of"
                    f" {payload.nbytes} bytes, got {got[0]} of {got[1]}"
                )
            self._fill(payload)
        except OSError as exc:
            raise self._lost(exc) from exc

    def close(self) -> None:
        """End the connection, also under a thread that waits in it."""
        with contextlib.suppress(OSError):  # the other side may have been first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _fill(self, buffer: memoryview) -> None:
        while buffer:
            num_bytes = self._socket.recv_into(buffer)
            if num_bytes == 0:
                raise ConnectionError("its socket ended")
            buffer = buffer[num_bytes:]

    def _lost(self, exc: OSError) -> CollectiveError:
        if isinstance(exc, TimeoutError):
            return CollectiveError(f"rank {self._rank} was silent for {self._timeout_s:g} s")
        return CollectiveError(f"rank {self._rank} is gone: {exc}")


def _bytes_of(values: Floats) -> memoryview:
    return values.data.cast("B") if values.size else memoryview(b"")


def _floats_at(address: int, num_values: int) -> Floats:
    return np.ctypeslib.as_array((ctypes.c_float * num_values).from_address(address))
