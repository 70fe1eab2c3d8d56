"""Shared memory and sockets give the same bits; the memory is nobody else's and leaves no trace."""

from __future__ import annotations

import ctypes
import gc
import itertools
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import CollectiveError
from serve.kernels import native
from serve.model.tensor_parallel import Collectives
from serve.shards.collectives import LoopbackCollectives, make_collectives
from serve.shards.shared_memory import NUM_SLOT_VALUES, SharedMemoryCollectives
from serve.testing.ranks import connected_ranks, over_sockets, run_ranks

pytestmark = pytest.mark.usefixtures("kernels")

Result = TypeVar("Result")

KINDS = {"shared memory": make_collectives, "sockets": over_sockets}


class Group:
    """Ranks that stay, each in a thread of its own."""

    def __init__(self, ranks: list[Collectives]) -> None:
        self.ranks = ranks
        self._threads = ThreadPoolExecutor(len(ranks))

    def run(self, task: Callable[[Collectives], Result]) -> list[Result]:
        return list(self._threads.map(task, self.ranks))

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()
        self._threads.shutdown()


@pytest.fixture(scope="module", params=itertools.product(KINDS, [2, 3, 4]), ids=str)
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    kind, size = request.param
    group = Group(connected_ranks(size, make=KINDS[kind]))
    yield group
    group.close()


def _values(rank: int, num_values: int, seed: int) -> np.ndarray:
    """Values whose sum depends on the order."""
    numbers = np.random.default_rng([seed, rank]).standard_normal(num_values)
    return (numbers * 10.0 ** (3 * rank)).astype(np.float32)


def _sum_in_rank_order(parts: list[np.ndarray]) -> bytes:
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total.tobytes()


def _native(rank: Collectives, values: np.ndarray, *, is_gather: bool) -> bytes | None:
    """A collective through the functions that the C decoder calls."""
    functions = rank.native()
    if not is_gather:
        total = values.copy()
        assert functions.all_reduce(functions.context, total.ctypes.data, total.size) == 0
        return total.tobytes()
    out = np.empty((rank.size, values.size), np.float32) if rank.rank == 0 else None
    address = None if out is None else out.ctypes.data
    assert functions.gather(functions.context, values.ctypes.data, values.size, address) == 0
    return None if out is None else out.tobytes()


sizes = st.one_of(
    st.integers(0, 5000),
    # around the places where a slot is full, and where ranks share the summation
    st.builds(int.__add__, st.sampled_from([16384, NUM_SLOT_VALUES]), st.integers(-2, 2)),
    st.integers(NUM_SLOT_VALUES, 3 * NUM_SLOT_VALUES),
)


@settings(max_examples=30, deadline=None)
@given(
    collectives=st.lists(st.tuples(sizes, st.booleans()), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_rank_gets_the_bits_of_a_sum_in_rank_order(group, collectives, seed):
    def run(rank: Collectives) -> list[bytes | None]:
        return [
            _native(rank, _values(rank.rank, size, seed), is_gather=is_gather)
            for size, is_gather in collectives
        ]

    found = group.run(run)

    for number, (size, is_gather) in enumerate(collectives):
        parts = [_values(rank.rank, size, seed) for rank in group.ranks]
        if is_gather:
            rest: list[bytes | None] = [None] * (len(parts) - 1)
            assert [line[number] for line in found] == [b"".join(map(bytes, parts)), *rest]
        else:
            assert [line[number] for line in found] == [_sum_in_rank_order(parts)] * len(parts)


def test_tensors_of_any_type_and_layout_are_summed_and_left_as_they_were(group):
    x = torch.arange(12.0, dtype=torch.bfloat16).reshape(3, 4).T

    sums = group.run(lambda rank: rank.all_reduce(x))
    parts = group.run(lambda rank: rank.gather_last_dim(x))

    assert all(torch.equal(found, x * len(sums)) for found in sums)
    assert {found.dtype for found in sums} == {torch.bfloat16}
    assert torch.equal(parts[0], torch.cat([x] * len(sums), dim=-1))
    assert torch.equal(x, torch.arange(12.0, dtype=torch.bfloat16).reshape(3, 4).T)


def test_every_rank_hears_every_number(group):
    found = group.run(lambda rank: rank.numbers(2**24 - 1 - rank.rank))
    assert found == [[2**24 - 1 - rank for rank in range(len(found))]] * len(found)


def test_thousands_of_rounds_stay_in_step():
    def run(rank: Collectives) -> int:
        num_wrong = 0
        x, out = np.empty(40, np.float32), np.empty((3, 40), np.float32)
        functions = rank.native()
        to = out.ctypes.data if rank.rank == 0 else None
        for number in range(3000):
            x[:] = number + rank.rank
            functions.gather(functions.context, x.ctypes.data, x.size, to)
            functions.all_reduce(functions.context, x.ctypes.data, x.size)
            num_wrong += int((x != 3 * number + 3).any())
            num_wrong += int(rank.rank == 0 and (out[:, 7] != number + np.arange(3)).any())
        return num_wrong

    assert run_ranks(3, run, make=make_collectives) == [0, 0, 0]


def test_a_rank_that_waits_sleeps_and_gives_up_at_the_time_out():
    root, silent = connected_ranks(2, timeout_s=0.8, make=make_collectives)
    began_s, began_cpu_s = time.monotonic(), time.thread_time()
    with pytest.raises(CollectiveError, match=r"rank 1 was silent for 0\.8 s"):
        root.all_reduce(torch.ones(3))
    used_s, took_s = time.thread_time() - began_cpu_s, time.monotonic() - began_s
    assert took_s >= 0.8
    assert used_s < took_s / 4
    with pytest.raises(CollectiveError, match=r"this rank was silent for 0\.8 s"):
        silent.all_reduce(torch.ones(4))
    root.close()
    silent.close()


@pytest.mark.parametrize("leaving", [0, 1, 2])
def test_a_rank_that_leaves_fails_every_other_by_its_number(leaving):
    ranks = connected_ranks(3, make=make_collectives)

    def take_part(rank: Collectives) -> str:
        try:
            while True:
                rank.all_reduce(torch.ones(100))
        except CollectiveError as error:
            return str(error)

    rest = [rank for rank in ranks if rank.rank != leaving]
    with ThreadPoolExecutor(2) as threads:
        messages = threads.map(take_part, rest)
        ranks[leaving].close()
        assert list(messages) == [f"rank {leaving} is gone: its socket ended"] * 2
    with pytest.raises(CollectiveError, match="this rank left the group"):
        ranks[leaving].all_reduce(torch.ones(100))
    for rank in rest:
        rank.close()


def test_a_rank_that_leaves_wakes_those_that_sleep():
    ranks = connected_ranks(3, timeout_s=100, make=make_collectives)
    errors: list[str] = []

    def take_part(rank: Collectives) -> None:
        try:
            rank.all_reduce(torch.ones(100))
        except CollectiveError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=take_part, args=(rank,), daemon=True) for rank in ranks[:2]]
    for thread in threads:
        thread.start()
    for thread in threads:
        _see_asleep(thread)
    ranks[2].close()
    for thread in threads:
        thread.join(60)

    assert errors == ["rank 2 is gone: its socket ended"] * 2
    for rank in ranks:
        rank.close()


def _see_asleep(thread: threading.Thread) -> None:
    """Returns when the thread's CPU clock stands still."""
    assert thread.ident is not None
    clock = time.pthread_getcpuclockid(thread.ident)
    before_s, now_s = -1.0, time.clock_gettime(clock)
    while now_s != before_s:
        threading.Event().wait(0.02)
        before_s, now_s = now_s, time.clock_gettime(clock)


@pytest.mark.parametrize(
    "other",
    [
        lambda rank: rank.all_reduce(torch.ones(5)),
        lambda rank: rank.all_reduce(torch.ones(4 + NUM_SLOT_VALUES)),
        lambda rank: rank.gather_last_dim(torch.ones(4)),
    ],
)
def test_a_rank_that_is_out_of_step_is_refused_before_its_values_are_used(other):
    ranks = connected_ranks(2, make=make_collectives)
    with ThreadPoolExecutor(1) as threads:
        late = threads.submit(other, ranks[1])
        with pytest.raises(CollectiveError, match=r"rank (1 )?is out of step"):
            ranks[0].all_reduce(torch.ones(4))
        late.exception()
    with pytest.raises(CollectiveError, match="out of step"):
        ranks[1].all_reduce(torch.ones(4))
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_native_collective_says_that_the_group_is_broken_and_why(kind):
    root, other = connected_ranks(2, make=KINDS[kind])
    other.close()
    functions = root.native()
    x = np.ones(3, np.float32)
    assert functions.all_reduce(functions.context, x.ctypes.data, 3) == 1
    assert isinstance(root.failure(), CollectiveError)
    assert str(root.failure()).startswith("rank 1 is gone")
    root.close()


def test_the_memory_has_no_name_and_goes_with_its_ranks():
    def mapped() -> set[str]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return {line.split()[-2] for line in lines if "memfd:shoal" in line}

    gc.collect()
    before = Path("/proc/self/maps").read_text().count("memfd:shoal")
    ranks = connected_ranks(2, make=make_collectives)
    assert Path("/proc/self/maps").read_text().count("memfd:shoal") == before + 2
    assert mapped() == {"/memfd:shoal"}  # shown as deleted: it lies in no folder
    for rank in ranks:
        rank.close()
    del rank, ranks
    gc.collect()
    assert Path("/proc/self/maps").read_text().count("memfd:shoal") == before


def test_without_compiled_kernels_ranks_meet_over_sockets(monkeypatch, caplog):
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(native, "reason", lambda: "no compiler was found")
    caplog.set_level(logging.INFO, "shoal.shard")
    ranks = connected_ranks(3, make=make_collectives)
    assert [type(rank) for rank in ranks] == [LoopbackCollectives] * 3
    assert caplog.messages == [
        "3 ranks meet over sockets, not in shared memory: rank 0: no compiler was found"
    ]
    for rank in ranks:
        rank.close()


def test_ranks_on_a_network_meet_over_sockets(caplog):
    caplog.set_level(logging.INFO, "shoal.shard")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname())
        near, _ = listener.accept()
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(make_collectives, 1, 2, [far], 60)
        root = make_collectives(0, 2, [near], 60)
        sums = threads.submit(other.result().all_reduce, torch.ones(2))
        assert torch.equal(root.all_reduce(torch.ones(2)), sums.result())
    assert "rank 1 is connected over the network" in caplog.text
    root.close()
    other.result().close()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"\0\x0cno room here", "rank 1: no room here"),
        (b"\1\x20" + bytes(32), "rank 1 has other memory"),
    ],
)
def test_one_rank_without_the_memory_sends_all_to_sockets(answer, reason, caplog):
    caplog.set_level(logging.INFO, "shoal.shard")
    near, far = socket.socketpair()
    with far, ThreadPoolExecutor(1) as threads:
        root = threads.submit(make_collectives, 0, 2, [near], 60)
        assert far.recv(256)[0] == 1
        far.sendall(answer.ljust(256, b"\0"))
        assert far.recv(256)[0] == 0
        assert isinstance(root.result(), LoopbackCollectives)
        assert reason in caplog.text
        root.result().close()


def test_a_rank_that_dies_during_the_handshake_is_an_error():
    near, far = socket.socketpair()
    far.close()
    with near, pytest.raises(CollectiveError, match="rank 1 is gone"):
        make_collectives(0, 2, [near], 60)


def test_closing_twice_and_from_another_thread_is_fine():
    ranks = connected_ranks(2, make=make_collectives)
    assert {type(rank) for rank in ranks} == {SharedMemoryCollectives}
    thread = threading.Thread(target=ranks[0].close)
    thread.start()
    thread.join(60)
    for rank in [*ranks, *ranks]:
        rank.close()
    assert ctypes.sizeof(ranks[0].native()) == 32
