"""Tensor-parallel ranks as threads of one process, joined by the real collectives.

What a test needs to run a model at any size without Ray: every rank gets its own thread and its own
end of real sockets. Not a stand-in for a shard's process: torch's settings are shared.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from serve.model.tensor_parallel import Collectives
from serve.shards.collectives import LoopbackCollectives, make_collectives

Result = TypeVar("Result")

MakeCollectives = Callable[[int, int, Sequence[socket.socket], float], Collectives]


def over_sockets(
    rank: int, size: int, sockets: Sequence[socket.socket], timeout_s: float
) -> Collectives:
    """Like `make_collectives`, never in shared memory."""
    if size == 1:
        return make_collectives(rank, size, sockets, timeout_s)
    return LoopbackCollectives(rank=rank, size=size, sockets=sockets, timeout_s=timeout_s)


def connected_ranks(
    size: int, *, timeout_s: float = 60.0, make: MakeCollectives = over_sockets
) -> list[Collectives]:
    """The collectives of every rank of a group of `size`, over socket pairs.

    `make(rank, size, sockets, timeout_s)` makes them, each rank's in a thread of its own.
    """
    pairs = [socket.socketpair() for _ in range(size - 1)]
    sockets = [[near for near, _ in pairs], *([far] for _, far in pairs)]
    with ThreadPoolExecutor(size) as executor:
        futures = [
            executor.submit(make, rank, size, connected, timeout_s)
            for rank, connected in enumerate(sockets)
        ]
    return [future.result() for future in futures]


def run_ranks(
    size: int, task: Callable[[Collectives], Result], *, make: MakeCollectives = over_sockets
) -> list[Result]:
    """What `task` returns on each rank, in rank order.

    A rank that fails leaves the group at once, so that the others fail too; the first rank's error,
    in rank order, is raised. The others leave together: who is done with the last collective must
    not go while a neighbour is still in it.
    """

    def run(collectives: Collectives) -> Result:
        try:
            return task(collectives)
        except BaseException:
            collectives.close()
            raise

    members = connected_ranks(size, make=make)
    with ThreadPoolExecutor(size) as executor:
        futures = [executor.submit(run, member) for member in members]
    for member in members:
        member.close()
    return [future.result() for future in futures]
