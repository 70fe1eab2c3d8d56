"""What the chart looks up instead of computing: every preset model on every preset of hardware.

Not the chart. The one decision: the table is written once, by this code, into `configs/fits.yaml`,
so that a template does only look-ups and a test can say that nothing has drifted.
"""

from __future__ import annotations

import math
from typing import Any

from cluster.plan import DEMO_MODEL_PATH, DEMO_PRESET, configs_path, preset_names
from cluster.plan.shapes import preset_shape
from serve.catalog import ModelShape, legal_tensor_parallel_sizes
from serve.checkpoint import inspect_checkpoint
from serve.config import EngineConfig, HardwareConfig

from .choice import choose
from .hardware import Node, find_hardware, gpu_node, read_mapping
from .layouts import Demand, Layout, layout_of
from .memory import cpu_pod_bytes
from .prediction import predict_copy

GIB = 1 << 30
# Of one engine pod, by GPU: cores that feed it, memory beside it, shared memory for NCCL and Ray.
_CPUS_PER_GPU = 4
_MEMORY_GIB_PER_GPU = 12
_SHM_GIB_PER_GPU = 4
# A pod on a CPU: cores, shared memory, and the largest pod that is worth asking for.
_CPU_POD_CORES = 4
_CPU_POD_SHM_GIB = 2
_CPU_POD_MAX_GIB = 64

_LARGEST_NODE = 8
# Of a volume, over the weights: files beside them, and a new revision's largest file.
_DISK_SHARE = 1.2

Fits = dict[str, dict[str, dict[str, Any]]]


def all_fits() -> Fits:
    """`{model: {hardware: {chosen, refused, disk_gib, sizes, unfit}}}`, as in configs/fits.yaml."""
    hardware = {name: _pod_node(name) for name in preset_names("hardware")}
    return {
        model: {name: _fit(shape_of_preset(model), node) for name, node in hardware.items()}
        for model in preset_names("models")
    }


def shape_of_preset(name: str) -> ModelShape:
    """Shape of a preset's model: published, or the demo's own."""
    if name == DEMO_PRESET:
        return inspect_checkpoint(DEMO_MODEL_PATH).shape
    shape = preset_shape(name)
    assert shape is not None, f"configs/models/{name}.yaml names no repository of shapes.yaml"
    return shape


def _pod_node(name: str) -> Node:
    values = read_mapping(configs_path() / "hardware" / f"{name}.yaml")
    if values["device"] == "cuda":
        return gpu_node(*find_hardware(name))
    num_bytes = (_CPU_POD_MAX_GIB - _CPU_POD_SHM_GIB) * GIB
    return Node(
        config=HardwareConfig.model_validate(values),
        num_gpus=0,
        total_bytes=num_bytes,
        usable_bytes=num_bytes,
        device=None,
        num_cores=_CPU_POD_CORES,
    )


def _fit(shape: ModelShape, node: Node) -> dict[str, Any]:
    demand = Demand(EngineConfig())
    sizes = [size for size in legal_tensor_parallel_sizes(shape) if size <= _most_shards(node)]
    layouts = [layout_of(shape, node, size, demand) for size in sizes]
    working = [layout for layout in layouts if layout.problem is None]
    chosen = choose(layouts, node)
    unfit = {str(layout.size): layout.problem for layout in layouts if layout.problem}
    return {
        "chosen": None if chosen is None else str(chosen[0].size),
        "refused": None if chosen else _refusal(shape, node, unfit),
        "disk_gib": math.ceil(2 * shape.num_params * _DISK_SHARE / GIB) + 1,
        "sizes": {str(layout.size): _size(layout, node) for layout in working},
        "unfit": unfit,
    }


def _most_shards(node: Node) -> int:
    """Largest size that is worth an entry: what a node has, or could have."""
    return _LARGEST_NODE if node.num_gpus else _CPU_POD_CORES


def _refusal(shape: ModelShape, node: Node, unfit: dict[str, str]) -> str:
    reasons = "; ".join(f"TP {size}: {reason}" for size, reason in unfit.items())
    return f"{shape.num_params / 1e9:.1f} billion parameters do not fit: {reasons}"


def _size(layout: Layout, node: Node) -> dict[str, Any]:
    size = layout.size
    model: dict[str, Any] = {
        "tensor_parallel": size,
        "dtype": "bfloat16",
        "max_model_len": layout.max_model_len,
        "yarn": layout.yarn,
    }
    if node.device is not None:
        prediction = predict_copy(layout.roofline(node.device), EngineConfig())
        model["prediction"] = prediction.to_config().model_dump()
    if node.num_gpus:
        shm = _SHM_GIB_PER_GPU * size
        cpu, threads = _CPUS_PER_GPU * size, _CPUS_PER_GPU
        memory = _MEMORY_GIB_PER_GPU * size + shm
    else:
        shm, cpu, threads = _CPU_POD_SHM_GIB, _CPU_POD_CORES, _CPU_POD_CORES // size
        engine = EngineConfig()
        num_bytes = cpu_pod_bytes(layout.shape, size=size, engine=engine, bytes_per_value=2)
        memory = -(-num_bytes // GIB) + shm
    pod = {"cpu": str(cpu), "memory": f"{memory}Gi", "shm": f"{shm}Gi"}
    return {"model": model, "hardware": {"threads_per_shard": threads, "pod": pod}}
