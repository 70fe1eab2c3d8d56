"""What a plan is made for: so many GPUs of a kind in a node, or the cores and memory of a machine.

Not probing (`cluster.planner.machine`). The one decision: presets, the user's own files, a name
with a count ("h100x8") and a probed machine all become one `Node`, so the planner asks no further.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.plan import configs_path, preset_names
from serve.config import HardwareConfig
from serve.errors import ConfigurationError

from .accelerators import GpuSpec, LinkSpec, find_gpu, known_gpus, parse_gpu
from .machine import Machine
from .speed import CPU_CALIBRATION, GPU_CALIBRATION, Calibration, Device

# One all-reduce of a few kilobytes, in seconds, inside a captured graph.
_NVLINK_S = 10e-6
_PCIE_S = 20e-6
_THROUGH_HOST_S = 30e-6
# What an all-reduce reaches of a link; through the host's memory every byte crosses it twice.
_LINK_SHARE = 0.7
_THROUGH_HOST_SHARE = 0.35
# Ranks on one CPU meet in shared memory.
_SHARED_MEMORY_S = 10e-6
_SHARED_MEMORY_BYTES_PER_S = 2e9

_COUNTED = re.compile(r"^(?P<gpu>.+?)\s*[x*]\s*(?P<count>\d{1,2})$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Node:
    """One machine. `config` is its preset; a node without GPUs has `num_gpus` 0.

    `usable_bytes` and `total_bytes` are of one GPU, or of the machine; `device` is None where the
    speed is not known.
    """

    config: HardwareConfig
    num_gpus: int
    total_bytes: int
    usable_bytes: int
    device: Device | None
    num_cores: int | None = None
    has_bfloat16: bool = True

    @property
    def title(self) -> str:
        """As a reader would call it."""
        if not self.num_gpus:
            cores = "" if self.num_cores is None else f"{self.num_cores} cores, "
            return f"{self.config.name} ({cores}{self.total_bytes / 2**30:.0f} GiB)"
        return f"{self.num_gpus} x {self.config.gpu}"


def gpu_node(config: HardwareConfig, gpu: GpuSpec) -> Node:
    """The node of a preset with its GPU's figures."""
    return Node(
        config=config,
        num_gpus=config.gpus_per_node,
        total_bytes=gpu.total_bytes,
        usable_bytes=gpu.usable_bytes,
        device=gpu_device(gpu),
    )


def gpu_device(gpu: GpuSpec) -> Device:
    """What the roofline needs of a GPU."""
    latency_s, share = _link_figures(gpu.link)
    return Device(
        bandwidth_bytes_per_s=gpu.bandwidth_gb_s * 1e9,
        flops_per_s=gpu.bf16_tflops * 1e12,
        link_bytes_per_s=gpu.link.gb_s * 1e9 * share,
        link_s=latency_s,
        calibration=GPU_CALIBRATION,
    )


def cpu_device(
    *,
    bandwidth_bytes_per_s: float,
    flops_per_s: float,
    calibration: Calibration = CPU_CALIBRATION,
) -> Device:
    """What the roofline needs of a machine's CPU, from what was measured on it."""
    return Device(
        bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        flops_per_s=flops_per_s,
        link_bytes_per_s=_SHARED_MEMORY_BYTES_PER_S,
        link_s=_SHARED_MEMORY_S,
        calibration=calibration,
        is_shared=True,
    )


def cpu_node(machine: Machine, *, device: Device | None = None) -> Node:
    """This machine without its GPUs: what it has free now, or its container."""
    return Node(
        config=HardwareConfig(),
        num_gpus=0,
        total_bytes=machine.total_bytes or 0,
        usable_bytes=machine.available_bytes or 0,
        device=device,
        num_cores=machine.num_cores,
        has_bfloat16=machine.stores_bfloat16(),
    )


def machine_gpus(machine: Machine, gpus: dict[str, GpuSpec]) -> tuple[HardwareConfig, GpuSpec]:
    """The GPUs of this machine, as hardware; of several kinds, the one with most cards.

    Raises:
        ConfigurationError: a GPU that is not in the table.
    """
    names = [gpu.name for gpu in machine.gpus]
    name = max(sorted(set(names)), key=names.count)
    gpu = find_gpu(name, gpus)
    key = next(key for key, value in gpus.items() if value is gpu)
    count = names.count(name)
    config = HardwareConfig(name=f"{key}-x{count}", device="cuda", gpu=key, gpus_per_node=count)
    return config, gpu


def find_hardware(text: str, *, gpus_file: Path | None = None) -> tuple[HardwareConfig, GpuSpec]:
    """The GPU hardware that `--hardware` names: a preset, a file, or a GPU with a count.

    Raises:
        ConfigurationError: there is no such preset or GPU, or a file with mistakes in it.
    """
    gpus = known_gpus(gpus_file)
    if text in preset_names("hardware"):
        return _from_values(read_mapping(configs_path() / "hardware" / f"{text}.yaml"), gpus, text)
    if text.endswith((".yaml", ".yml")):
        return _from_values(read_mapping(Path(text).expanduser()), gpus, text)
    counted = _COUNTED.match(text.strip())
    name, count = (counted["gpu"], int(counted["count"])) if counted else (text.strip(), 1)
    try:
        gpu = find_gpu(name, gpus)
    except ConfigurationError as exc:
        presets = ", ".join(preset_names("hardware"))
        raise ConfigurationError(
            f"hardware {text!r}: {exc.message}. Presets of whole machines: {presets}"
        ) from exc
    if not 1 <= count <= 64:
        raise ConfigurationError(f"hardware {text!r}: a node has 1 to 64 GPUs, got {count}")
    key = next(key for key, value in gpus.items() if value is gpu)
    config = HardwareConfig(name=f"{key}-x{count}", device="cuda", gpu=key, gpus_per_node=count)
    return config, gpu


def _from_values(
    values: dict[str, Any], gpus: dict[str, GpuSpec], source: str
) -> tuple[HardwareConfig, GpuSpec]:
    written = values.get("gpu")
    if isinstance(written, dict):
        values = {**values, "gpu": str(values.get("name", "gpu"))}
    try:
        config = HardwareConfig.model_validate({"device": "cuda", "gpus_per_node": 1, **values})
    except ValidationError as exc:
        problems = [
            f"{source}: {'.'.join(map(str, error['loc']))}: {error['msg'].lower()}"
            for error in exc.errors()
        ]
        raise ConfigurationError("\n".join(problems)) from exc
    if config.gpu is None or config.device != "cuda":
        raise ConfigurationError(f"{source}: gpu: is missing: a GPU's name, or its figures")
    if isinstance(written, dict):
        return config, parse_gpu("gpu", written, source=source)
    return config, find_gpu(config.gpu, gpus)


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file of hardware keys.

    Raises:
        ConfigurationError: it cannot be read, or is no mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigurationError(f"{path}: cannot be read: {exc.strerror}") from exc
    except (UnicodeDecodeError, yaml.YAMLError) as exc:
        raise ConfigurationError(f"{path}: cannot be read: {exc}") from exc
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}: must be a mapping with the keys of configs/hardware")
    return values


def _link_figures(link: LinkSpec) -> tuple[float, float]:
    """Latency of one small all-reduce in seconds, and the share of the link that one reaches."""
    if not link.peer_to_peer:
        return _THROUGH_HOST_S, _THROUGH_HOST_SHARE
    return (_NVLINK_S if link.kind == "nvlink" else _PCIE_S), _LINK_SHARE
