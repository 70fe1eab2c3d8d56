"""Resolves every "auto" of a configuration, once, into a new object without one.

Not reading files (`cluster.plan`). The one decision: all that depends on the machine is a `Machine`
passed in, so the same file gives the same plan in a test. The KV cache's size alone stays "auto":
only the shard knows what is left once its weights are loaded.
"""

from __future__ import annotations

from pathlib import Path

from serve.catalog import ModelShape, legal_tensor_parallel_sizes, shape_for_length
from serve.checkpoint import inspect_checkpoint
from serve.config import Dtype, HardwareConfig, ModelConfig, ShoalConfig
from serve.errors import ConfigurationError

from .accelerators import find_gpu, known_gpus
from .choice import choose
from .hardware import gpu_node, machine_gpus
from .layouts import Demand, layouts_of
from .machine import Machine

_CPU_TENSOR_PARALLEL = 2
_FEW_CORES = 4
_STAND_IN_POSITIONS = 32_768


def resolve(config: ShoalConfig, machine: Machine) -> ShoalConfig:
    """`config` with every "auto" replaced (but `kv_cache_tokens`), names and paths filled in.

    Raises:
        CheckpointError: a model folder cannot be used (`load_config` would have said so).
        ConfigurationError: GPUs that `configs/gpus.yaml` does not have.
    """
    hardware = choose_hardware(config, machine)
    models = tuple(_resolve_model(model, hardware, machine) for model in config.models)
    num_shards = sum(_num_shards(model) for model in models)
    if hardware.threads_per_shard == "auto":
        threads = max(1, machine.num_cores // num_shards)
        hardware = hardware.model_copy(update={"threads_per_shard": threads})
    copies = config.ingress_copies
    if copies == "auto":
        copies = 1 if machine.num_cores < _FEW_CORES else 2
    # One address for every part: "localhost" is ::1 for some and 127.0.0.1 for others.
    host = "127.0.0.1" if config.http.host == "localhost" else config.http.host
    return config.model_copy(
        update={
            "http": config.http.model_copy(update={"host": host}),
            "hardware": hardware,
            "models": models,
            "ingress_copies": copies,
        }
    )


def choose_hardware(config: ShoalConfig, machine: Machine) -> HardwareConfig:
    """What the configuration names; where it names nothing, this machine's GPUs if we know them."""
    if "hardware" not in config.model_fields_set and machine.gpus:
        try:
            return machine_gpus(machine, known_gpus())[0]
        except ConfigurationError:
            return HardwareConfig()
    if isinstance(config.hardware, str):
        return HardwareConfig(name=config.hardware)
    return config.hardware


def _resolve_model(model: ModelConfig, hardware: HardwareConfig, machine: Machine) -> ModelConfig:
    shape = _shape_of(model)
    return model.model_copy(
        update={
            "name": model.name or (model.path.name.lower() if model.path else "stand-in"),
            "path": model.path.resolve() if model.path else None,
            "tensor_parallel": _tensor_parallel(model, shape, hardware),
            "dtype": _dtype(model, hardware, machine),
            "yarn": _yarn(model, shape),
            "max_model_len": _max_model_len(model, shape),
            "engine": model.engine.model_copy(
                update={"token_budget": model.engine.budget(hardware.device)}
            ),
        }
    )


def _shape_of(model: ModelConfig) -> ModelShape | None:
    if model.path is None:
        return None
    shape = inspect_checkpoint(Path(model.path)).shape
    return shape_for_length(shape, yarn=model.yarn, max_model_len=model.max_model_len)


def _tensor_parallel(model: ModelConfig, shape: ModelShape | None, hardware: HardwareConfig) -> int:
    if model.tensor_parallel != "auto":
        return model.tensor_parallel
    if hardware.device == "cuda":
        return 1 if shape is None else _size_on_gpus(model, shape, hardware)
    is_legal = shape is None or _CPU_TENSOR_PARALLEL in legal_tensor_parallel_sizes(shape)
    return _CPU_TENSOR_PARALLEL if is_legal else 1


def _size_on_gpus(model: ModelConfig, shape: ModelShape, hardware: HardwareConfig) -> int:
    """The size that the plan chooses for one node; 1 where nothing fits, which is refused later."""
    node = gpu_node(hardware, find_gpu(hardware.gpu or "", known_gpus()))
    demand = Demand(
        engine=model.engine,
        max_model_len=_max_model_len(model, shape),
        yarn=_yarn(model, shape),
        bytes_per_value=4 if model.dtype == "float32" else 2,
    )
    found = choose(layouts_of(shape, node, demand), node)
    return 1 if found is None else found[0].size


def _dtype(model: ModelConfig, hardware: HardwareConfig, machine: Machine) -> Dtype:
    if model.dtype != "auto":
        return model.dtype
    is_narrow = hardware.device == "cuda" or machine.stores_bfloat16(hardware.kernels)
    return "bfloat16" if is_narrow else "float32"


def _yarn(model: ModelConfig, shape: ModelShape | None) -> bool:
    if model.yarn != "auto":
        return model.yarn
    return shape is not None and shape.yarn is not None


def _max_model_len(model: ModelConfig, shape: ModelShape | None) -> int:
    if model.max_model_len != "auto":
        return model.max_model_len
    return _STAND_IN_POSITIONS if shape is None else shape.max_positions


def _num_shards(model: ModelConfig) -> int:
    assert isinstance(model.tensor_parallel, int)
    return model.tensor_parallel * model.replicas.min
