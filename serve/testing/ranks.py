"""Tensor-parallel ranks as threads of one process, joined by the real collectives.

What a test needs to run a model at any size without Ray: every rank gets its own thread and its own
end of real sockets. Not a stand-in for a shard's process: torch's settings are shared.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from serve.model.tensor_parallel import Collectives, SingleRank
from serve.shards.collectives import LoopbackCollectives

Result = TypeVar("Result")


def connected_ranks(size: int, *, timeout_s: float = 20.0) -> list[Collectives]:
    """The collectives of every rank of a group of `size`, over socket pairs."""
    if size == 1:
        return [SingleRank()]
    pairs = [socket.socketpair() for _ in range(size - 1)]
    root = LoopbackCollectives(
        rank=0, size=size, sockets=[near for near, _ in pairs], timeout_s=timeout_s
    )
    others = [
        LoopbackCollectives(rank=rank, size=size, sockets=[far], timeout_s=timeout_s)
        for rank, (_, far) in enumerate(pairs, start=1)
    ]
    return [root, *others]


def run_ranks(size: int, task: Callable[[Collectives], Result]) -> list[Result]:
    """What `task` returns on each rank, in rank order.

    A rank that fails leaves the group, so that the others fail too; the first rank's error, in rank
    order, is raised.
    """

    def run(collectives: Collectives) -> Result:
        try:
            return task(collectives)
        finally:
            collectives.close()

    with ThreadPoolExecutor(size) as executor:
        futures = [executor.submit(run, member) for member in connected_ranks(size)]
    return [future.result() for future in futures]
