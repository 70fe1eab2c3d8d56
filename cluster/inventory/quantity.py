"""Kubernetes' quantities as numbers: `500m` is half a core, `16Gi` are bytes."""

from __future__ import annotations

import re

_FORM = re.compile(r"^([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)([A-Za-z]*)$")
_FACTORS = {
    "": 1.0,
    "n": 1e-9,
    "u": 1e-6,
    "m": 1e-3,
    **{letter: 1000.0**power for power, letter in enumerate("kMGTPE", start=1)},
    **{f"{letter}i": 1024.0**power for power, letter in enumerate("KMGTPE", start=1)},
}


def parse_quantity(text: str | int | float) -> float:
    """The number.

    Raises:
        ValueError: it is no quantity.
    """
    found = _FORM.fullmatch(str(text))
    if found is None or found[2] not in _FACTORS:
        raise ValueError(f"{text!r} is no quantity")
    return float(found[1]) * _FACTORS[found[2]]


def render_amount(resource: str, amount: float) -> str:
    """An amount for a message: `16.0 GiB`, `4 CPUs`, `1 nvidia.com/gpu`."""
    if resource == "memory" or resource.endswith("storage"):
        return f"{amount / 1024**3:.1f} GiB of {resource}"
    return f"{amount:g} {'CPUs' if resource == 'cpu' else resource}"
