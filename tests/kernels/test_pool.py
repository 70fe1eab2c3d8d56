"""Threads of the kernels: more of them than cores, asleep between calls, ended with their owner."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from serve.kernels.native import NativeLibrary, Pool
from serve.kernels.packed import PackedMatrix


def _product(pool: Pool) -> Callable[[], torch.Tensor]:
    """A product of dozens of tasks, to be asked for again and again."""
    weight = torch.randn(10 * pool.library.panel_width, 64, generator=torch.Generator())
    matrix = PackedMatrix(pool, "float32", weight.shape[0], num_inputs=64)
    assert matrix.fill_rows(0, 1, weight.numpy())
    rows = torch.arange(weight.shape[0]).repeat(2)

    def unpack() -> torch.Tensor:
        out = torch.empty(len(rows), 64)
        pool.library.functions.shoal_unpack_rows(
            pool.handle,
            ctypes.byref(matrix.struct),
            rows.data_ptr(),
            len(rows),
            out.data_ptr(),
        )
        return out

    return unpack


def _num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def _wait_for_num_threads(expected: int) -> None:
    """A thread that was joined is listed for a moment more."""
    deadline_s = time.monotonic() + 10
    while _num_threads() != expected:
        assert time.monotonic() < deadline_s, f"{_num_threads()} threads, expected {expected}"
        time.sleep(0.001)


@pytest.mark.parametrize("num_threads", [1, 2, 5, 16])
def test_every_task_is_done_once_with_more_threads_than_cores(
    library: NativeLibrary, num_threads: int
):
    pool = library.pool(num_threads)
    product = _product(pool)
    expected = product()
    for _ in range(100):
        assert torch.equal(product(), expected)
    pool.close()


def test_several_pools_work_side_by_side(library: NativeLibrary):
    problems: list[str] = []

    def use_a_pool() -> None:
        pool = library.pool(3)
        product = _product(pool)
        expected = product()
        problems.extend("differs" for _ in range(40) if not torch.equal(product(), expected))
        pool.close()

    callers = [threading.Thread(target=use_a_pool) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert problems == []


def test_idle_threads_sleep_and_wake_again(library: NativeLibrary):
    pool = library.pool(4)
    product = _product(pool)
    expected = product()
    _wait_until_asleep()
    assert torch.equal(product(), expected)
    pool.close()


def _wait_until_asleep() -> None:
    """Until no thread of this process but this one runs."""
    deadline = time.monotonic() + 30
    own = str(threading.get_native_id())
    while time.monotonic() < deadline:
        states = [
            (task / "stat").read_text().rpartition(")")[2].split()[0]
            for task in Path("/proc/self/task").iterdir()
            if task.name != own
        ]
        if "R" not in states:
            return
    raise AssertionError("threads still run after 30 s")


def test_threads_end_with_the_pool(library: NativeLibrary):
    before = _num_threads()
    pool = library.pool(6)
    _wait_for_num_threads(before + 5)
    pool.close()
    _wait_for_num_threads(before)
    kept = library.pool(3)
    _wait_for_num_threads(before + 2)
    del kept
    _wait_for_num_threads(before)


def test_a_pool_has_at_least_one_thread(library: NativeLibrary):
    with pytest.raises(ValueError, match="num_threads must be >= 1, got 0"):
        library.pool(0)
