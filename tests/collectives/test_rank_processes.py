"""Ranks in processes of their own: killed, stopped, and more of them than cores."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import numpy as np
import pytest

from serve.testing.rank_process import RankProcess, rank_processes
from serve.testing.ranks import over_sockets

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Iterator[list[RankProcess]]:
    ranks = rank_processes(**request.param)
    is_over_sockets = request.param.get("make") is over_sockets
    kind = "LoopbackCollectives" if is_over_sockets else "SharedMemoryCollectives"
    assert [rank.meets_in() for rank in ranks] == [kind] * len(ranks)
    yield ranks
    for rank in ranks:
        rank.kill()


@pytest.mark.parametrize("ranks", [{"size": 3}], indirect=True)
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_is_an_error_with_its_number_on_every_other(ranks, victim):
    rest = [rank for rank in ranks if rank is not ranks[victim]]
    for rank in rest:
        rank.all_reduce(np.ones(896, np.float32))  # waits for the victim

    ranks[victim].signal(signal.SIGKILL)

    answers = [rank.answer() for rank in rest]
    assert answers == [f"rank {victim} is gone: its socket ended"] * 2


@pytest.mark.parametrize("ranks", [{"size": 3}], indirect=True)
def test_a_rank_killed_in_the_midst_of_collectives_hangs_nobody(ranks):
    for rank in ranks:
        rank.all_reduce(np.ones(70_000, np.float32), rounds=1_000_000)

    ranks[1].signal(signal.SIGKILL)

    answers = [ranks[number].answer() for number in (0, 2)]
    assert answers == ["rank 1 is gone: its socket ended"] * 2


@pytest.mark.parametrize("ranks", [{"size": 2, "timeout_s": 2.0}], indirect=True)
def test_a_stopped_rank_runs_into_the_time_out(ranks):
    ranks[1].signal(signal.SIGSTOP)
    ranks[0].all_reduce(np.ones(896, np.float32))
    assert ranks[0].answer() == "rank 1 was silent for 2 s"


@pytest.mark.parametrize("ranks", [{"size": 3, "silence_s": 2.0}], indirect=True)
@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_frozen_after_the_start_is_named_at_the_limit_by_all(ranks, victim):
    _sum_once(ranks)
    ranks[victim].signal(signal.SIGSTOP)
    rest = [rank for rank in ranks if rank is not ranks[victim]]
    for rank in rest:
        rank.all_reduce(np.ones(896, np.float32))
    assert [rank.answer() for rank in rest] == [f"rank {victim} was silent for 2 s"] * 2


@pytest.mark.parametrize(
    "ranks", [{"size": 3, "silence_s": 3.0, "make": over_sockets}], indirect=True
)
def test_over_sockets_rank_0_names_the_frozen_rank_and_ends_the_others(ranks):
    _sum_once(ranks)
    ranks[2].signal(signal.SIGSTOP)
    for rank in ranks[:2]:
        rank.all_reduce(np.ones(896, np.float32))
    answers = [rank.answer() for rank in ranks[:2]]
    assert answers == ["rank 2 was silent for 3 s", "rank 0 is gone: its socket ended"]


@pytest.mark.parametrize(
    "ranks", [{"size": 2, "silence_s": 2.0, "make": over_sockets}], indirect=True
)
def test_over_sockets_a_frozen_rank_0_is_noticed_too(ranks):
    _sum_once(ranks)
    ranks[0].signal(signal.SIGSTOP)
    ranks[1].all_reduce(np.ones(896, np.float32))
    assert ranks[1].answer() == "rank 0 was silent for 2 s"


@pytest.mark.parametrize("ranks", [{"size": 4, "cores": 1}], indirect=True)
def test_four_ranks_on_one_core_get_the_sum(ranks):
    values = [np.full(5120, 10.0**rank, np.float32) for rank in range(4)]
    for rank, x in zip(ranks, values, strict=True):
        rank.all_reduce(x, rounds=300)
    sums = [rank.answer() for rank in ranks]
    assert all(np.array_equal(found, np.full(5120, 1111, np.float32)) for found in sums)


def _sum_once(ranks: list[RankProcess]) -> None:
    for rank in ranks:
        rank.all_reduce(np.ones(3, np.float32))
    for rank in ranks:
        assert np.array_equal(rank.answer(), np.full(3, len(ranks), np.float32))
