"""How the ranks of one model meet: collectives, in the same order on every rank.

Not the transport: sockets or shared memory lie behind the protocol (`serve.shards.collectives`).
The one decision behind it: sums run in rank order, so that every rank has the same bits and a
result does not depend on who was first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from serve.errors import CollectiveError
from serve.kernels import abi

if TYPE_CHECKING:
    from torch import Tensor


class Collectives(Protocol):
    """The ranks of one model, seen from one of them.

    Whoever is in a collective waits for the others as long as the group was made with, which is
    for loading; `limit_silence` says how long from then on. Between collectives nobody waits.
    """

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

    def numbers(self, number: int) -> list[int]:
        """What each rank gave as `number`, on every rank; exact below 2**24.

        Raises:
            CollectiveError: a rank is gone or out of step.
        """
        ...

    def native(self) -> abi.Collectives:
        """The same two collectives for C, float32 only; valid as long as this object lives.

        A function's 1 means that the group is broken: raise `failure()`.
        """
        ...

    def limit_silence(self, timeout_s: float) -> None:
        """From the next collective on, a rank that is waited for longer breaks the group.

        Every rank calls this for itself, between two collectives.
        """
        ...

    def failure(self) -> Exception:
        """Why a native collective returned 1."""
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

    def numbers(self, number: int) -> list[int]:
        """`number` itself."""
        return [number]

    def native(self) -> abi.Collectives:
        """A group of one, without functions: there is nobody to meet."""
        return abi.Collectives(rank=0, size=1)

    def limit_silence(self, timeout_s: float) -> None:
        """Nobody to wait for."""

    def failure(self) -> Exception:
        """Never asked: a group of one does not break."""
        return CollectiveError("a single rank has no group to break")

    def close(self) -> None:
        """Nothing to leave."""
