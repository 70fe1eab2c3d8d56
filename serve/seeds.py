"""The hash behind every random number: a pure function of (seed, position), in integers.

Not a generator: it holds no state, so a sequence draws the same numbers in any batch, on any
replica and after preemption. The mixer is the finalizer of SplitMix64 (Steele, Lea, Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014), exact on every platform::

    uniform(seed, p)     = top 53 bits of mix(mix(seed) + (p + 1) * GOLDEN) / 2^53
    choice_seed(seed, i) = top 63 bits of mix(mix(seed ^ CHOICE) + (i + 1) * GOLDEN)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_CHOICE = 0x63686F6963650000  # keeps choice seeds apart from positions of the same seed


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that samples output position `position` of a sequence with `seed`."""
    return (_mix(_mix(seed) + (position + 1) * _GOLDEN) >> 11) * 2.0**-53


def uniforms(
    seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """`uniform` of each pair, the same bits; a seed is taken modulo 2^64."""
    steps = (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    top_bits = _mix_all(_mix_all(seeds) + steps) >> np.uint64(11)
    return top_bits * np.float64(2.0**-53)


def choice_seed(seed: int, choice: int) -> int:
    """The seed, in [0, 2^63), of choice `choice` of a request with `seed` (any integer)."""
    return _mix(_mix(seed ^ _CHOICE) + (choice + 1) * _GOLDEN) >> 1


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _mix_all(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
