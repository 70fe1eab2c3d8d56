from __future__ import annotations

from itertools import product

import pytest

from cluster.plan import preset_names
from cluster.planner.accelerators import known_gpus
from cluster.planner.memory import cpu_memory, cpu_pod_bytes, gpu_memory
from cluster.planner.subjects import find_subject
from serve.catalog import legal_tensor_parallel_sizes
from serve.config import EngineConfig

ENGINE = EngineConfig()
GIB = 1 << 30
SEVEN = find_subject("qwen2.5-7b-instruct").shape


def on(gpu: str, size: int, engine: EngineConfig = ENGINE):
    figures = known_gpus()[gpu]
    return gpu_memory(
        SEVEN,
        size=size,
        usable_bytes=figures.usable_bytes,
        total_bytes=figures.total_bytes,
        engine=engine,
    )


@pytest.mark.parametrize("model", preset_names("models"))
def test_parts_add_up_to_the_whole_gpu_and_only_what_fits_has_a_cache(model: str) -> None:
    shape = find_subject(model).shape
    for gpu, size in product(known_gpus().values(), legal_tensor_parallel_sizes(shape)):
        memory = gpu_memory(
            shape,
            size=size,
            usable_bytes=gpu.usable_bytes,
            total_bytes=gpu.total_bytes,
            engine=ENGINE,
        )
        parts = memory.reserved_bytes + memory.fixed_bytes + memory.kv_bytes + memory.free_bytes
        margin = 0.08 * gpu.usable_bytes
        assert parts == gpu.total_bytes if memory.kv_tokens else memory.free_bytes < margin
        assert memory.kv_tokens % ENGINE.block_size == 0
        per_token = shape.kv_bytes_per_token(bytes_per_value=2, size=size)
        assert memory.kv_bytes == memory.kv_tokens * per_token


def test_full_context_of_the_7b_is_seven_gib_of_cache() -> None:
    memory = on("a100-80gb", 1, EngineConfig(kv_cache_tokens=131_072))
    assert memory.kv_bytes == 7 * GIB


def test_splitting_leaves_more_room_for_the_cache() -> None:
    tokens = [on("rtx4090d", size).kv_tokens for size in (1, 2, 4)]
    assert tokens == sorted(tokens)
    assert tokens[0] < 131_072 < 4 * 131_072 < tokens[2]


def test_what_is_missing_is_negative_free_memory() -> None:
    shape = find_subject("qwen2.5-72b-instruct").shape
    memory = gpu_memory(shape, size=1, usable_bytes=80 * GIB, total_bytes=80 * GIB, engine=ENGINE)
    assert memory.kv_tokens == 0
    assert memory.free_bytes < -60 * GIB


def test_larger_steps_need_more_workspace() -> None:
    small = on("h100", 1, EngineConfig(token_budget=512)).activation_bytes
    large = on("h100", 1, EngineConfig(token_budget=8192)).activation_bytes
    widest = 2 * SEVEN.hidden + 3 * SEVEN.ffn
    assert large - small == (8192 - 512) * widest * 2


def test_workspace_is_for_the_step_that_the_device_takes_by_itself() -> None:
    by_itself, written = on("h100", 1), on("h100", 1, EngineConfig(token_budget=2048))
    assert by_itself.activation_bytes == written.activation_bytes
    room = {"usable_bytes": 90 * GIB, "total_bytes": 90 * GIB, "bytes_per_value": 2}
    on_cpu = [
        cpu_memory(SEVEN, size=1, engine=engine, **room).activation_bytes
        for engine in (ENGINE, EngineConfig(token_budget=512))
    ]
    assert on_cpu[0] == on_cpu[1]


def test_cpu_gives_the_cache_what_the_engine_would_take() -> None:
    memory = cpu_memory(
        SEVEN,
        size=2,
        usable_bytes=22 * GIB,
        total_bytes=24 * GIB,
        engine=ENGINE,
        bytes_per_value=2,
    )
    assert memory.weight_bytes == 2 * 2 * SEVEN.num_shard_params(2)
    assert memory.kv_bytes <= 0.4 * (22 * GIB - memory.weight_bytes)
    parts = memory.reserved_bytes + memory.fixed_bytes + memory.kv_bytes + memory.free_bytes
    assert parts == 24 * GIB


@pytest.mark.parametrize("model", ["demo", "qwen2.5-0.5b-instruct", "qwen2.5-7b-instruct"])
def test_cpu_pod_has_room_for_all_that_the_engine_may_take_by_itself(model: str) -> None:
    shape = find_subject(model).shape
    pod = cpu_pod_bytes(shape, size=2, engine=ENGINE, bytes_per_value=2)
    memory = cpu_memory(
        shape, size=2, usable_bytes=1 << 50, total_bytes=1 << 50, engine=ENGINE, bytes_per_value=2
    )
    assert memory.kv_tokens == 131_072
    assert pod == memory.fixed_bytes + memory.kv_bytes
