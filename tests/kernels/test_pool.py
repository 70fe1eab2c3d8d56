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


def _threads() -> set[str]:
    return {task.name for task in Path("/proc/self/task").iterdir()}


def _new_threads(before: set[str], num_expected: int) -> set[str]:
    """So many threads that were not there before, once they are there."""
    _wait_until(lambda: len(_threads() - before) == num_expected, f"{num_expected} new threads")
    return _threads() - before


def _wait_until_gone(threads: set[str]) -> None:
    """A thread that was joined is listed for a moment more."""
    _wait_until(lambda: not threads & _threads(), "end of threads")


def _wait_until(is_true: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline_s, f"no {what} in time"
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
    _wait_until(_are_others_asleep, "sleep of the threads")
    assert torch.equal(product(), expected)
    pool.close()


def _are_others_asleep() -> bool:
    """Whether no thread of this process but this one runs."""
    return "R" not in map(_state, _threads() - {str(threading.get_native_id())})


def _state(thread: str) -> str:
    try:
        stat = Path("/proc/self/task", thread, "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # one of an earlier test's has just ended
        return "gone"
    return stat.rpartition(")")[2].split()[0]


def test_threads_end_with_the_pool(library: NativeLibrary):
    before = _threads()
    pool = library.pool(6)
    made = _new_threads(before, 5)
    pool.close()
    _wait_until_gone(made)
    kept = library.pool(3)
    made = _new_threads(before, 2)
    del kept
    _wait_until_gone(made)


def test_a_pool_has_at_least_one_thread(library: NativeLibrary):
    with pytest.raises(ValueError, match="num_threads must be >= 1, got 0"):
        library.pool(0)
