"""What this machine has: cores, and which number formats they compute in.

Not the plan. The one decision: what cannot be found out is left at the cautious value, so that
probing never stops a start.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


@dataclass(frozen=True, slots=True)
class Machine:
    """What the plan depends on."""

    num_cores: int
    has_bfloat16: bool

    @classmethod
    def detect(cls) -> Machine:
        """This machine, as far as this process may use it."""
        if hasattr(os, "sched_getaffinity"):
            num_cores = len(os.sched_getaffinity(0))
        else:
            num_cores = os.cpu_count() or 1
        return cls(num_cores, has_bfloat16=bool(_BFLOAT16_FLAGS & _cpu_flags()))


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
