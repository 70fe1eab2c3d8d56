"""Tensor-parallel ranks as processes, which can be stopped and killed.

Not a shard: no model, no Ray, only the collectives. The one decision behind it: a server process
that has imported everything forks the ranks, so that starting a group takes milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Sequence
from multiprocessing.connection import Connection

import numpy as np
import torch

from serve.errors import CollectiveError
from serve.shards.collectives import make_collectives
from serve.testing.ranks import MakeCollectives

_PATIENCE_S = 60.0


class RankProcess:
    """One rank in a process of its own.

    Args:
        rank: this rank.
        size: ranks in the group.
        sockets: on rank 0 those of the others, in order; elsewhere rank 0's alone.
        timeout_s: what the group is made with.
        silence_s: what it is limited to once the ranks have met; None: never.
        cores: how many of the machine's it may use.
        make: makes the collectives.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        sockets: Sequence[socket.socket],
        *,
        timeout_s: float,
        silence_s: float | None,
        cores: int | None,
        make: MakeCollectives,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._pipe, far = context.Pipe()
        self._process = context.Process(
            target=_take_part,
            args=(far, rank, size, list(sockets), timeout_s, silence_s, cores, make),
            daemon=True,
        )
        self._process.start()
        far.close()

    def all_reduce(self, values: np.ndarray, *, rounds: int = 1) -> None:
        """Begin `rounds` sums of `values` over the ranks, every third one followed by a gather."""
        self._pipe.send((values, rounds))

    def answer(self) -> np.ndarray | str:
        """The last sum, or the error's message.

        Raises:
            TimeoutError: it does not answer.
        """
        if not self._pipe.poll(_PATIENCE_S):
            raise TimeoutError("the rank does not answer")
        found: np.ndarray | str = self._pipe.recv()
        return found

    def meets_in(self) -> str:
        """How this rank's collectives are called; asked once, first."""
        return str(self.answer())

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Kill it as the system would, and see it gone."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def rank_processes(
    size: int,
    *,
    timeout_s: float = _PATIENCE_S,
    silence_s: float | None = None,
    cores: int | None = None,
    make: MakeCollectives = make_collectives,
) -> list[RankProcess]:
    """A group of `size` ranks, each in a process of its own."""
    pairs = [socket.socketpair() for _ in range(size - 1)]
    sockets = [[near for near, _ in pairs], *([far] for _, far in pairs)]
    ranks = [
        RankProcess(
            rank,
            size,
            connected,
            timeout_s=timeout_s,
            silence_s=silence_s,
            cores=cores,
            make=make,
        )
        for rank, connected in enumerate(sockets)
    ]
    for near, far in pairs:
        near.close()
        far.close()
    return ranks


def _take_part(
    pipe: Connection,
    rank: int,
    size: int,
    sockets: list[socket.socket],
    timeout_s: float,
    silence_s: float | None,
    cores: int | None,
    make: MakeCollectives,
) -> None:
    if cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    collectives = make(rank, size, sockets, timeout_s)
    if silence_s is not None:
        collectives.limit_silence(silence_s)
    pipe.send(type(collectives).__name__)
    while True:
        values, rounds = pipe.recv()
        x = torch.from_numpy(values)
        try:
            for number in range(rounds):
                total = collectives.all_reduce(x)
                if number % 3 == 2:
                    collectives.gather_last_dim(x)
            pipe.send(total.numpy())
        except CollectiveError as error:
            pipe.send(str(error))
