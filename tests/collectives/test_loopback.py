"""The same bits on every rank, and no rank waits for a dead one."""

from __future__ import annotations

import socket
import threading

import pytest
import torch
from torch import Tensor

from serve.errors import CollectiveError
from serve.model.tensor_parallel import Collectives, SingleRank
from serve.shards.collectives import LoopbackCollectives
from serve.testing.ranks import connected_ranks, run_ranks


def _values(rank: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)) * 10.0**rank


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(1,), (3, 64), (512, 1024)])
def test_all_reduce_sums_in_rank_order_with_the_same_bits_everywhere(size, shape):
    expected = _values(0, shape)
    for rank in range(1, size):
        expected = expected + _values(rank, shape)
    sums = run_ranks(size, lambda rank: rank.all_reduce(_values(rank.rank, shape)))
    assert all(torch.equal(found, expected) for found in sums)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gather_gives_rank_0_the_parts_in_rank_order(size):
    parts = run_ranks(size, lambda rank: rank.gather_last_dim(torch.full((2, 3), rank.rank * 1.0)))
    expected = torch.arange(size, dtype=torch.float32).repeat_interleave(3).expand(2, -1)
    assert parts[0] is not None
    assert torch.equal(parts[0], expected)
    assert parts[1:] == [None] * (size - 1)


def test_bfloat16_is_summed_in_float32_and_rounded_once():
    # 1 + 2 * 2**-9: each addend alone is lost in bfloat16
    values = [1.0, 2.0**-8, 2.0**-8]
    sums = run_ranks(
        3, lambda rank: rank.all_reduce(torch.tensor([values[rank.rank]], dtype=torch.bfloat16))
    )
    assert [(found.dtype, found.item()) for found in sums] == [(torch.bfloat16, 1 + 2.0**-7)] * 3


def test_many_collectives_of_changing_kinds_and_sizes_stay_in_step():
    def run(rank: Collectives) -> list[float]:
        found = []
        for number in range(200):
            x = torch.full((1 + number % 7, 5), float(number))
            found.append(rank.all_reduce(x)[0, 0].item())
            if number % 3 == 0:
                rank.gather_last_dim(x)
        return found

    results = run_ranks(3, run)
    assert results == [[3.0 * number for number in range(200)]] * 3


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_dead_rank_fails_every_other_at_once(dead):
    ranks = connected_ranks(3, timeout_s=100)
    errors: dict[int, str] = {}

    def take_part(rank: Collectives) -> None:
        try:
            while True:
                rank.all_reduce(torch.ones(100))
        except CollectiveError as error:
            errors[rank.rank] = str(error)

    threads = [
        threading.Thread(target=take_part, args=(rank,)) for rank in ranks if rank.rank != dead
    ]
    for thread in threads:
        thread.start()
    ranks[dead].close()
    for thread in threads:
        thread.join(60)
    assert sorted(errors) == sorted({0, 1, 2} - {dead})
    assert any(f"rank {dead} is gone" in message for message in errors.values())


def test_a_silent_rank_runs_into_the_time_out():
    root, silent = connected_ranks(2, timeout_s=0.05)
    with pytest.raises(CollectiveError, match=r"rank 1 was silent for 0\.05 s"):
        root.all_reduce(torch.ones(3))
    silent.close()


def test_a_rank_that_is_out_of_step_is_refused_before_its_values_are_used():
    root, other = connected_ranks(2, timeout_s=60)
    errors: list[CollectiveError] = []

    def take_part() -> None:
        try:
            _reduce(other, 5)
        except CollectiveError as error:
            errors.append(error)

    thread = threading.Thread(target=take_part)
    thread.start()
    with pytest.raises(CollectiveError, match="rank 1 is out of step: expected collective 0"):
        _reduce(root, 4)
    thread.join(60)
    assert len(errors) == 1


def _reduce(rank: Collectives, num_values: int) -> Tensor:
    return rank.all_reduce(torch.ones(num_values))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rank_hears_every_number(size):
    numbers = [2**24 - 1, 0, 131_071]
    found = run_ranks(size, lambda rank: rank.numbers(numbers[rank.rank]))
    assert found == [numbers[:size]] * size


def test_it_works_over_tcp():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname())
        near, _ = listener.accept()
    root = LoopbackCollectives(rank=0, size=2, sockets=[near])
    other = LoopbackCollectives(rank=1, size=2, sockets=[far])
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(_reduce(other, 70_000)))
    thread.start()
    assert torch.equal(_reduce(root, 70_000), torch.full((70_000,), 2.0))
    thread.join(60)
    assert torch.equal(found[0], torch.full((70_000,), 2.0))
    root.close()
    other.close()


def test_a_single_rank_is_its_own_sum():
    x = torch.randn(3)
    single: Collectives = SingleRank()
    assert single.all_reduce(x) is x
    assert single.gather_last_dim(x) is x
    single.close()
