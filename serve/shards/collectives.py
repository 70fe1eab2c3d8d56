"""Collectives of tensor parallelism over connected sockets: a star around rank 0.

Rank 0 receives every rank's part, sums in rank order and sends the sum back, so all ranks have the
same bits. Not the handshake (`serve.transport.rendezvous`), and not for many ranks: it is what
works on one machine and across nodes until shared memory takes over on the former. The one decision
behind it: a rank that fails closes its sockets, so one death reaches every rank at once as the end
of a socket, and a rank that hangs runs into the time-out.

A message is one collective of one rank, little endian::

    | sequence number: 4 bytes | payload bytes: 4 bytes | float32 values |
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from serve.errors import CollectiveError

_HEADER = struct.Struct("<II")


class LoopbackCollectives:
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
        self.rank = rank
        self.size = size
        self._peers = [
            _Peer(number, connected, timeout_s)
            for number, connected in enumerate(sockets, start=1 if rank == 0 else 0)
        ]
        self._sequence = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of every rank's `x` in rank order, in float32; returned in the dtype of `x`."""
        mine = x.to(torch.float32).contiguous()
        total = torch.empty_like(mine)
        try:
            if self.rank == 0:
                self._sum_into(mine, total)
            else:
                self._peers[0].send(self._sequence, mine)
                self._peers[0].receive(self._sequence, total)
        except CollectiveError:
            self.close()
            raise
        self._sequence += 1
        return total.to(x.dtype)

    def gather_last_dim(self, x: Tensor) -> Tensor | None:
        """On rank 0 every rank's `x`, concatenated along the last dimension; elsewhere None."""
        mine = x.to(torch.float32).contiguous()
        parts = [mine]
        try:
            if self.rank > 0:
                self._peers[0].send(self._sequence, mine)
            else:
                for peer in self._peers:
                    parts.append(torch.empty_like(mine))
                    peer.receive(self._sequence, parts[-1])
        except CollectiveError:
            self.close()
            raise
        self._sequence += 1
        return torch.cat(parts, dim=-1).to(x.dtype) if self.rank == 0 else None

    def close(self) -> None:
        """Leave the group; the other ranks' collectives fail from now on."""
        for peer in self._peers:
            peer.close()

    def _sum_into(self, mine: Tensor, total: Tensor) -> None:
        """Rank 0: receive, sum, send back."""
        total.copy_(mine)
        part = torch.empty_like(mine)
        for peer in self._peers:
            peer.receive(self._sequence, part)
            total.add_(part)
        for peer in self._peers:
            peer.send(self._sequence, total)


class _Peer:
    """One connected rank."""

    def __init__(self, rank: int, connected: socket.socket, timeout_s: float) -> None:
        self._rank = rank
        self._socket = connected
        self._timeout_s = timeout_s
        connected.settimeout(timeout_s)
        if connected.family in (socket.AF_INET, socket.AF_INET6):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, sequence: int, values: Tensor) -> None:
        """Send a contiguous float32 tensor."""
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

    def receive(self, sequence: int, into: Tensor) -> None:
        """Fill a contiguous float32 tensor with what this rank sent for the same collective."""
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


def _bytes_of(values: Tensor) -> memoryview:
    return values.numpy().data.cast("B")
