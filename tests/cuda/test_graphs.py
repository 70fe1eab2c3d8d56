"""Captured decodes without a GPU: a stand-in graph repeats the operations on the same memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from serve.errors import ConfigurationError
from serve.runner.cuda import CudaRunner
from serve.runner.cuda_graphs import DecodeGraphs
from serve.runner.cuda_warm_up import explained

CPU = torch.device("cpu")


class _RecordedGraph:
    """What `torch.cuda.CUDAGraph` promises: the same operations again, on the same addresses."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, torch.Tensor]] = []

    def replay(self) -> None:
        for function, args, kwargs, out in self.calls:
            out.copy_(function(*args, **kwargs))


class _Recording(TorchDispatchMode):
    def __init__(self, graph: _RecordedGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._graph.calls.append((func, args, kwargs or {}, out))
        return out


@contextlib.contextmanager
def _record(graph: _RecordedGraph, **options: Any) -> Iterator[None]:
    with _Recording(graph):
        yield


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> DecodeGraphs:
    """Of a decode whose logits are its inputs' sums, told apart by the row of a table."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", _record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    table = torch.arange(30.0).view(10, 3)

    def decode(inputs: torch.Tensor) -> torch.Tensor:
        padded = table.index_select(0, inputs[0]) * 100 + inputs[1:].sum(0).unsqueeze(1)
        return padded[:, :2]

    made = DecodeGraphs(decode, max_rows=9, scratch_slot=9, device=CPU, is_captured=True)
    made.warm_up()
    made.capture()
    return made


@pytest.mark.parametrize("num_rows", range(1, 10))
def test_a_replay_reads_this_steps_inputs(graphs: DecodeGraphs, num_rows: int) -> None:
    for step in range(2):
        inputs = graphs.inputs(num_rows)
        rows = torch.arange(num_rows, dtype=torch.int32)
        inputs.zero_()
        inputs[:, :num_rows] = torch.stack((rows, rows + step, rows))
        found = graphs.run(num_rows)
        assert found is not None
        first = 300.0 * rows + 2 * rows + step
        assert torch.equal(found, torch.stack((first, first + 100), 1))


def test_graphs_leave_their_logits_in_one_tensor(graphs: DecodeGraphs) -> None:
    found = [graphs.run(num_rows) for num_rows in range(1, 10)]
    assert len({one.data_ptr() for one in found if one is not None}) == 1


def test_inputs_of_every_batch_size_are_aligned_alike(graphs: DecodeGraphs) -> None:
    """Triton compiles a kernel anew where a pointer is no multiple of 16."""
    offsets = {
        row.storage_offset() % 4 for num_rows in range(1, 10) for row in graphs.inputs(num_rows)
    }
    assert offsets == {0}


def test_a_step_without_memory_names_the_key_to_lower() -> None:
    with (
        pytest.raises(ConfigurationError) as caught,
        explained("a step of 4096 prompt tokens", "engine.token_budget (4096)"),
    ):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23 GiB"
        )
    assert str(caught.value) == (
        "the GPU has not enough memory for a step of 4096 prompt tokens (CUDA out of memory. Tried"
        " to allocate 2.00 GiB.): lower engine.token_budget (4096) or engine.kv_cache_tokens, or"
        " use a larger tensor_parallel"
    )


def test_other_failures_of_a_device_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="illegal"), explained("a step", "a key"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_memory_that_runs_out_in_a_capture_is_said_plainly(
    load_device: Callable[..., CudaRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(graphs: DecodeGraphs) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(DecodeGraphs, "capture", fail)
    with pytest.raises(ConfigurationError, match=r"lower engine.max_running_sequences \(20\)"):
        load_device()


def test_warm_up_takes_more_tokens_than_a_sequence_may_have(
    load_device: Callable[..., CudaRunner],
) -> None:
    runner = load_device()
    with torch.inference_mode():
        runner._forward.warm_up(1100, 512)
