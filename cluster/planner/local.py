"""Whether a resolved configuration can run on this machine, and what was chosen for it, in words.

Not a plan for other machines (`cluster.planner.plan`). The one decision: only what is certain stops
a start (weights and a least cache that exceed the memory); estimates are for `shoal plan`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from serve.checkpoint import inspect_checkpoint
from serve.config import HardwareConfig, ModelConfig, ShoalConfig
from serve.errors import ConfigurationError
from serve.limits import GPU_MARGIN

from .alternatives import alternatives
from .hardware import cpu_node
from .layouts import Demand
from .machine import Machine
from .memory import BYTES_PER_VALUE, GB

# A cache that is worth starting with; the engine takes what is free.
_LEAST_KV_TOKENS = 2_048


def check_local(config: ShoalConfig, machine: Machine) -> None:
    """Refuse what cannot run here, before anything starts.

    Raises:
        ConfigurationError: there are not the GPUs that the hardware asks for, the CPU lacks what
            the named kernels need, or the models' weights with a least KV cache are more than the
            memory that is free.
    """
    hardware = config.hardware
    assert isinstance(hardware, HardwareConfig), "the planner resolved the hardware"
    if hardware.device == "cuda":
        _check_gpus(config, hardware, machine)
        return
    _check_kernels(hardware, machine)
    needs = [(model, _least_bytes(model)) for model in config.models if model.stand_in is None]
    available = machine.available_bytes
    if available is None or sum(num_bytes for _, num_bytes in needs) <= available:
        return
    lines = [f"{model.name}: {_need(model, num_bytes)}" for model, num_bytes in needs]
    largest, _ = max(needs, key=lambda item: item[1])
    raise ConfigurationError(
        f"the models do not fit in memory: {'; '.join(lines)}; free are {available / GB:.1f} GB."
        f" What would fit: {_what_would_fit(largest, machine)}"
    )


def explain(config: ShoalConfig, machine: Machine) -> list[str]:
    """What was chosen for this machine and why, in a line or two."""
    hardware = config.hardware
    assert isinstance(hardware, HardwareConfig), "the planner resolved the hardware"
    if hardware.device == "cuda":
        return [f"GPU, {_gpu_names(machine)}: {_choice_on_gpus(model)}" for model in config.models]
    free = (
        "" if machine.available_bytes is None else f", {machine.available_bytes / GB:.1f} GB free"
    )
    where = f"CPU, {machine.num_cores} cores{free}"
    lines = [f"{where}: {_choice(model, hardware, machine)}" for model in config.models]
    if machine.gpus:
        lines.append(
            f"Found {_gpu_names(machine)}, which stay unused: name them as `hardware` in a"
            " configuration file."
        )
    return lines


def _check_gpus(config: ShoalConfig, hardware: HardwareConfig, machine: Machine) -> None:
    """Enough GPUs, each with room for a shard."""
    if not machine.gpus:
        raise ConfigurationError(
            f"hardware {hardware.name!r} has device: cuda, and this machine has no GPU that"
            " nvidia-smi lists. Use `hardware: cpu` here, or check the driver"
        )
    num_shards = sum(_num_shards(model) for model in config.models)
    if num_shards > len(machine.gpus):
        needs = ", ".join(f"{model.name}: {_num_shards(model)}" for model in config.models)
        raise ConfigurationError(
            f"each shard needs a GPU of its own, {num_shards} in all ({needs}), and this machine"
            f" has {len(machine.gpus)}: lower `replicas` or `tensor_parallel`, serve fewer models,"
            " or compute on the CPU with `hardware: cpu`"
        )
    room = (1 - GPU_MARGIN) * min(gpu.memory_bytes for gpu in machine.gpus)
    for model in config.models:
        if model.stand_in is None and _least_bytes(model) / _num_shards(model) > room:
            raise ConfigurationError(
                f"{model.name} does not fit: a shard has {_need_of_shard(model)}, and a GPU here"
                f" has room for {room / GB:.1f} GB. `shoal plan` says what would fit;"
                " `hardware: cpu` computes in this machine's memory"
            )


def _num_shards(model: ModelConfig) -> int:
    assert isinstance(model.tensor_parallel, int), "the planner resolved the size"
    return model.tensor_parallel * model.replicas.min


def _need_of_shard(model: ModelConfig) -> str:
    num_bytes = _least_bytes(model) / _num_shards(model)
    return f"{num_bytes / GB:.1f} GB of weights ({model.dtype}) and least KV cache"


def _gpu_names(machine: Machine) -> str:
    counts = Counter(gpu.name for gpu in machine.gpus)
    return " and ".join(f"{count} x {name}" for name, count in counts.items())


def _choice_on_gpus(model: ModelConfig) -> str:
    copies = f" x {model.replicas.min} copies" if model.replicas.min > 1 else ""
    return f"{model.name} with TP {model.tensor_parallel}{copies}, {model.dtype}"


def _check_kernels(hardware: HardwareConfig, machine: Machine) -> None:
    usable = ("auto", "torch", *machine.kernels)
    if hardware.device == "cpu" and hardware.kernels not in usable:
        raise ConfigurationError(
            f"hardware.kernels is {hardware.kernels}, which this CPU cannot run; here it may be"
            f" {', '.join(usable)}"
        )


def _choice(model: ModelConfig, hardware: HardwareConfig, machine: Machine) -> str:
    copies = model.replicas.min
    text = f"{model.name} with TP {model.tensor_parallel}"
    text += f" x {copies} copies" if copies > 1 else ""
    threads = hardware.threads_per_shard
    text += f", {threads} {'thread' if threads == 1 else 'threads'} a shard, {model.dtype}"
    if model.dtype == "float32" and not machine.has_bfloat16:
        text += " (this CPU has no bfloat16 units)"
    if model.tensor_parallel == 2:
        return text + ": two shards use all cores and batch better than one"
    return text


def _least_bytes(model: ModelConfig) -> int:
    assert model.path is not None, "the planner resolved the path"
    assert isinstance(model.tensor_parallel, int), "the planner resolved the size"
    assert isinstance(model.max_model_len, int), "the planner resolved the length"
    assert model.dtype != "auto", "the planner resolved the type"
    shape = inspect_checkpoint(Path(model.path)).shape
    size, per_value = model.tensor_parallel, BYTES_PER_VALUE[model.dtype]
    tokens = min(_LEAST_KV_TOKENS, model.max_model_len)
    if model.engine.kv_cache_tokens != "auto":
        tokens = model.engine.kv_cache_tokens
    cache = tokens * shape.kv_bytes_per_token(bytes_per_value=per_value, size=size)
    return model.replicas.min * size * (shape.num_shard_params(size) * per_value + cache)


def _need(model: ModelConfig, num_bytes: int) -> str:
    copies = model.replicas.min
    each = f"{copies} copies of " if copies > 1 else ""
    return (
        f"{each}{num_bytes / copies / GB:.1f} GB of weights ({model.dtype}) and least KV cache"
        f"{f', {num_bytes / GB:.1f} GB in all' if copies > 1 else ''}"
    )


def _what_would_fit(model: ModelConfig, machine: Machine) -> str:
    assert model.path is not None, "the planner resolved the path"
    assert model.dtype != "auto", "the planner resolved the type"
    shape = inspect_checkpoint(Path(model.path)).shape
    demand = Demand(engine=model.engine, bytes_per_value=BYTES_PER_VALUE[model.dtype])
    found = list(alternatives(shape, cpu_node(machine), demand))
    if model.replicas.min > 1:
        found.insert(0, "fewer copies (`replicas`)")
    return "; ".join(found) or "a machine with more memory"
