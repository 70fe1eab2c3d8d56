"""The largest steps of a device's pass, run once before there are sequences.

Not the loading (`.cuda_loading`). The one decision behind it: what does not fit is found here,
where the answer is a key to lower, and not by a request.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from serve.errors import ConfigurationError

from .cuda_pass import CudaPass

_CPU_WARM_UP_TOKENS = 2


def warm_up(
    forward: CudaPass, device: torch.device, *, token_budget: int, max_model_len: int
) -> int:
    """Run the largest steps once; memory that those of decodes took at most (0 on a CPU).

    Args:
        forward: the pass, over any cache.
        device: where it runs.
        token_budget: most prompt tokens of a step.
        max_model_len: tokens that a sequence may reach.

    Raises:
        ConfigurationError: the device's memory does not hold them.
    """
    num_sequences = forward.graphs.sizes[-1]
    has_gpu = device.type == "cuda"
    num_bytes_before = torch.cuda.memory_allocated() if has_gpu else 0
    if has_gpu:
        torch.cuda.reset_peak_memory_stats()
    with explained(
        f"a step of {num_sequences} sequences",
        f"engine.max_running_sequences ({num_sequences})",
    ):
        forward.graphs.warm_up()
    num_bytes = torch.cuda.max_memory_allocated() - num_bytes_before if has_gpu else 0
    num_tokens = token_budget if has_gpu else _CPU_WARM_UP_TOKENS
    with explained(f"a step of {num_tokens} prompt tokens", f"engine.token_budget ({num_tokens})"):
        forward.warm_up(num_tokens, max_model_len)
        if has_gpu:
            torch.cuda.synchronize()
    return num_bytes


@contextlib.contextmanager
def explained(work: str, key: str) -> Iterator[None]:
    """What to do where the device's memory does not hold `work`: lower `key`, or what is beside it.

    Raises:
        ConfigurationError: it does not.
    """
    try:
        yield
    except RuntimeError as exc:  # a graph that finds no memory has no class of its own
        text = str(exc)
        if "out of memory" not in text.lower():
            raise
        missing = text[: text.find(". ", text.find("Tried to allocate")) + 1] or text.split("\n")[0]
        raise ConfigurationError(
            f"the GPU has not enough memory for {work} ({missing.strip()}): lower {key} or"
            " engine.kv_cache_tokens, or use a larger tensor_parallel"
        ) from exc
