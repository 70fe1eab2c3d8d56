"""The team: processes that train one network together, one thread and one core each.

Threads inside an operation meet thousands of times a step, and on a machine shared with others each
meeting waits for the slower one; a team meets a few times a step. Its members hold the same weights
because they start from one seed and apply the same sums.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

T = TypeVar("T")


class Team:
    """This process's place in the team."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def share(self, things: Sequence[T]) -> Sequence[T]:
        """Returns this member's part of the work."""
        return things[self.rank :: self.size]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replaces the tensors by their sums over the team."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        sizes = [tensor.numel() for tensor in tensors]
        for tensor, total in zip(tensors, torch.split(flat, sizes), strict=True):
            tensor.copy_(total.view_as(tensor))


def run_team(size: int, task: Callable[..., None], *arguments: Any) -> None:
    """Runs `task(team, *arguments)` in each member and waits for them."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{os.path.join(folder, 'meeting')}"
        spawn(_member, (size, meeting, task, arguments), size)  # type: ignore[no-untyped-call]


def _member(
    rank: int, size: int, meeting: str, task: Callable[..., None], arguments: Sequence[Any]
) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    task(Team(rank, size), *arguments)
    if size > 1:
        dist.destroy_process_group()
