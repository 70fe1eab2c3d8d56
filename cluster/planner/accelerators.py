"""GPUs as figures: memory, bandwidth, arithmetic, links; ours (`configs/gpus.yaml`) and the user's.

Not what a machine has (`cluster.planner.machine`). The one decision: a GPU is data sheet figures
with their source, never code, so that one that nobody has thought of is a few lines of YAML.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from cluster.plan import configs_path
from serve.config import Section
from serve.errors import ConfigurationError

_GIB = 1 << 30
_MIB = 1 << 20


class LinkSpec(Section):
    """How the GPUs of one node reach each other."""

    kind: Literal["nvlink", "pcie"] = Field("pcie", description="What the link is.")
    gb_s: float = Field(32.0, gt=0, description="GB/s each way of one GPU.")
    peer_to_peer: bool = Field(
        True, description="GPUs read each other's memory directly, not through the host's."
    )


class GpuSpec(Section):
    """One GPU, by its data sheet."""

    memory_mib: int = Field(ge=1024, description="Memory as nvidia-smi says, in MiB.")
    usable_gib: float | None = Field(
        None, gt=0, description="What a CUDA program sees of it, in GiB; default: 0.966 of it."
    )
    bandwidth_gb_s: float = Field(gt=0, description="Memory bandwidth, in GB/s.")
    bf16_tflops: float = Field(gt=0, description="Dense bfloat16 arithmetic, in Tflop/s.")
    link: LinkSpec = Field(LinkSpec(), description="Between the GPUs of a node.")
    names: tuple[str, ...] = Field((), description="How nvidia-smi calls it.")
    source: str = Field("", description="Where the figures are from.")

    @property
    def total_bytes(self) -> int:
        """All of its memory."""
        return self.memory_mib * _MIB

    @property
    def usable_bytes(self) -> int:
        """What a CUDA program can have, before its own context."""
        if self.usable_gib is None:
            return round(self.total_bytes * _USABLE_SHARE)
        return round(self.usable_gib * _GIB)


# Least share of nvidia-smi's total that torch reports, over the GPUs of configs/gpus.yaml.
_USABLE_SHARE = 0.966


def known_gpus(extra: Path | None = None) -> dict[str, GpuSpec]:
    """Every GPU by its short name; those of the user's file `extra` win.

    Raises:
        ConfigurationError: `extra` cannot be read, or a figure in it is missing or wrong.
    """
    return dict(_shipped_gpus()) if extra is None else {**_shipped_gpus(), **_read(extra)}


def find_gpu(name: str, gpus: dict[str, GpuSpec]) -> GpuSpec:
    """The GPU of a short name, or of the name that nvidia-smi gives it.

    Raises:
        ConfigurationError: there is none; the message lists those that are.
    """
    wanted = _plain(name)
    for key, gpu in gpus.items():
        if wanted in {_plain(key), *map(_plain, gpu.names)}:
            return gpu
    close = difflib.get_close_matches(wanted, [_plain(key) for key in gpus], n=1, cutoff=0.5)
    guess = next((f", did you mean {key!r}?" for key in gpus if [_plain(key)] == close), "")
    raise ConfigurationError(
        f"no GPU named {name!r}{guess or '.'} There are: {', '.join(gpus)}."
        " Describe another one in a file (`--gpus FILE`), with the keys of configs/gpus.yaml"
    )


def parse_gpu(name: str, values: Any, *, source: str) -> GpuSpec:
    """A GPU from the keys of a YAML mapping.

    Raises:
        ConfigurationError: a figure is missing or wrong; every one is named.
    """
    try:
        return GpuSpec.model_validate(values)
    except ValidationError as exc:
        problems = [
            f"{source}: {'.'.join(map(str, (name, *error['loc'])))}: {error['msg'].lower()}"
            for error in exc.errors()
        ]
        raise ConfigurationError("\n".join(problems)) from exc


@cache
def _shipped_gpus() -> Mapping[str, GpuSpec]:
    return _read(configs_path() / "gpus.yaml")


def _read(path: Path) -> dict[str, GpuSpec]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigurationError(f"{path}: cannot be read: {exc.strerror}") from exc
    except (UnicodeDecodeError, yaml.YAMLError) as exc:
        raise ConfigurationError(f"{path}: cannot be read: {exc}") from exc
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}: must be a mapping from a GPU's name to its figures")
    return {str(name): parse_gpu(str(name), gpu, source=str(path)) for name, gpu in values.items()}


def _plain(name: str) -> str:
    """Names are compared without maker, spaces and dashes: `RTX 4090 D` is `rtx4090d`."""
    text = name.lower().replace("nvidia", "").replace("geforce", "")
    return "".join(letter for letter in text if letter.isalnum()).removeprefix("rtx")
