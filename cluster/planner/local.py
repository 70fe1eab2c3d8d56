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

from .alternatives import alternatives
from .hardware import cpu_node
from .layouts import Demand
from .machine import Machine
from .memory import BYTES_PER_VALUE, GB

# What shards can compute on (serve.runner).
_DEVICES = ("cpu",)
# A cache that is worth starting with; the engine takes what is free.
_LEAST_KV_TOKENS = 2_048


def check_local(config: ShoalConfig, machine: Machine) -> None:
    """Refuse what cannot run here, before anything starts.

    Raises:
        ConfigurationError: the device is one that shards cannot compute on, the CPU lacks what the
            named kernels need, or the models' weights with a least KV cache are more than the
            memory that is free.
    """
    hardware = config.hardware
    assert isinstance(hardware, HardwareConfig), "the planner resolved the hardware"
    if hardware.device not in _DEVICES:
        raise ConfigurationError(
            f"hardware {hardware.name!r} has device {hardware.device}: in this version shards"
            " compute on the CPU only. Use `hardware: cpu` here; `shoal plan` plans for GPUs"
        )
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
    free = (
        "" if machine.available_bytes is None else f", {machine.available_bytes / GB:.1f} GB free"
    )
    where = f"CPU, {machine.num_cores} cores{free}"
    lines = [f"{where}: {_choice(model, hardware, machine)}" for model in config.models]
    if machine.gpus:
        counts = Counter(gpu.name for gpu in machine.gpus)
        names = " and ".join(f"{count} x {name}" for name, count in counts.items())
        lines.append(
            f"Found {names}: this version computes on the CPU only; see `shoal plan` for the GPUs."
        )
    return lines


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
