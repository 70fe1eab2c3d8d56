"""From what the user said about hardware, or did not, to the node that a plan is made for.

Not the figures (`cluster.planner.hardware`). The one decision: nothing said means this machine, its
GPUs first; a GPU that nobody has described is told, and the CPU planned instead.
"""

from __future__ import annotations

from pathlib import Path

from serve.config import HardwareConfig
from serve.errors import ConfigurationError

from .accelerators import find_gpu, known_gpus
from .hardware import Node, cpu_node, find_hardware, gpu_node, machine_gpus
from .machine import Machine
from .prediction import measured_cpu

_CPU = "cpu"


def find_node(
    text: str | None,
    *,
    config: HardwareConfig | None = None,
    machine: Machine,
    gpus_file: Path | None = None,
) -> tuple[Node, str]:
    """The node, and how it was found, in a sentence.

    Args:
        text: what `--hardware` says, if anything.
        config: the configuration's hardware, if there is a configuration.
        machine: this machine.
        gpus_file: the user's own table of GPUs.

    Raises:
        ConfigurationError: no such hardware, or a file with mistakes in it.
    """
    gpus = known_gpus(gpus_file)
    if text is not None and text != _CPU:
        return gpu_node(*find_hardware(text, gpus_file=gpus_file)), f"--hardware {text}"
    if text is None and config is not None and config.device == "cuda":
        gpu = find_gpu(config.gpu or "", gpus)
        return gpu_node(config, gpu), f"the configuration's hardware, {config.name}"
    if text is None and config is None and machine.gpus:
        try:
            found, gpu = machine_gpus(machine, gpus)
        except ConfigurationError as exc:
            return _this_cpu(machine), f"this machine's CPU: {exc.message}"
        return gpu_node(found, gpu), "this machine's GPUs"
    return _this_cpu(machine), "this machine's CPU"


def _this_cpu(machine: Machine) -> Node:
    return cpu_node(machine, device=measured_cpu(machine))
