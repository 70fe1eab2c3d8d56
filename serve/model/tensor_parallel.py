"""How the ranks of one model meet: two collectives, in the same order on every rank.

Not the transport: sockets or shared memory lie behind the protocol (`serve.shards.collectives`).
The one decision behind it: sums run in rank order, so that every rank has the same bits and a
result does not depend on who was first.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Collectives(Protocol):
    """The ranks of one model, seen from one of them."""

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of every rank's `x`, in rank order: the same bits on every rank.

        Raises:
            CollectiveError: a rank is gone or out of step.
        """
        ...

    def gather_last_dim(self, x: Tensor) -> Tensor | None:
        """On rank 0 every rank's `x`, concatenated along the last dimension; elsewhere None.

        Raises:
            CollectiveError: a rank is gone or out of step.
        """
        ...

    def close(self) -> None:
        """Leave the group; the other ranks' collectives fail from now on."""
        ...


class SingleRank:
    """A group of one."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """`x` itself."""
        return x

    def gather_last_dim(self, x: Tensor) -> Tensor | None:
        """`x` itself."""
        return x

    def close(self) -> None:
        """Nothing to leave."""
