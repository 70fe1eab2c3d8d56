"""How fast a model will be: a roofline whose every term can be looked at.

Not memory (`cluster.planner.memory`) and not a measurement. A step takes as long as reading the
weights and the cache, or as the arithmetic, whichever is longer, plus the all-reduces, plus what it
costs to launch each layer's kernels. The one decision: three shares of the data sheet are all that
is calibrated, on published figures (`python -m scripts.bench.plan_error` prints the fit and the
error of every figure that it has not seen).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from serve.catalog import ModelShape


@dataclass(frozen=True, slots=True)
class Calibration:
    """What is reached of a device's own limits.

    `bandwidth_share` and `flops_share` are of the data sheet's, or of what was measured on a CPU;
    `layer_s` is what a layer's kernels cost beyond their bytes, each step.
    """

    bandwidth_share: float
    flops_share: float
    layer_s: float


# Fitted to batch 1 of the sizes up to 14B, and to one long prompt of the 7B, on an A100 80GB (vLLM
# 0.6.3, Qwen's own speed benchmark). Larger models, tensor parallelism, long texts and other GPUs
# are predicted.
GPU_CALIBRATION = Calibration(bandwidth_share=0.82, flops_share=0.62, layer_s=115e-6)
# Our kernels on a CPU, against what numpy reaches in `measure_cpu` (`python -m scripts.bench.engine
# --compare-plan` prints the shares that its run asks for, and the error of these).
CPU_CALIBRATION = Calibration(bandwidth_share=0.95, flops_share=1.05, layer_s=20e-6)
# Torch's own linear layers on a CPU: 14.5 tok/s where the bandwidth allows 31 (0.5B, 2 cores).
TORCH_CALIBRATION = Calibration(bandwidth_share=0.47, flops_share=0.8, layer_s=50e-6)


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, or the whole CPU of a machine, as the roofline sees it.

    `link_bytes_per_s` and `link_s` are what an all-reduce reaches a device, and its latency.
    `is_shared`: all ranks of a replica compute on this one device, a CPU.
    """

    bandwidth_bytes_per_s: float
    flops_per_s: float
    link_bytes_per_s: float
    link_s: float
    calibration: Calibration
    is_shared: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """One step's terms, in seconds."""

    weights_s: float
    kv_s: float
    flops_s: float
    all_reduce_s: float
    launch_s: float

    @property
    def seconds(self) -> float:
        """Bytes and arithmetic overlap; the rest comes on top."""
        return max(self.weights_s + self.kv_s, self.flops_s) + self.all_reduce_s + self.launch_s

    @property
    def bound(self) -> str:
        """The term that costs most."""
        terms = {
            "weights": self.weights_s,
            "KV cache": self.kv_s,
            "arithmetic": self.flops_s,
            "all-reduce": self.all_reduce_s,
            "launches": self.launch_s,
        }
        return max(terms, key=terms.__getitem__)


@dataclass(frozen=True, slots=True)
class Roofline:
    """Predicts the steps of one replica: `size` ranks of `shape` on devices of one kind."""

    shape: ModelShape
    size: int
    device: Device
    bytes_per_value: int = 2

    def decode(self, batch: int, context_tokens: int) -> Step:
        """One token for each of `batch` sequences that hold `context_tokens` each."""
        return self._step(batch, cached_tokens=batch * context_tokens, attended=context_tokens)

    def prefill_s(self, num_tokens: int, token_budget: int) -> float:
        """From an idle engine to the first token of a prompt, computed in chunks."""
        seconds = 0.0
        for begin in range(0, num_tokens, token_budget):
            chunk = min(token_budget, num_tokens - begin)
            step = self._step(chunk, cached_tokens=begin, attended=begin + chunk / 2, num_logits=1)
            seconds += step.seconds
        return seconds

    def tokens_per_s(self, batch: int, context_tokens: int) -> float:
        """Decoded tokens a second, all sequences of the batch together."""
        return batch / self.decode(batch, context_tokens).seconds

    @property
    def read_bytes(self) -> int:
        """Weights that a rank reads each step: all but an input embedding of its own."""
        shape = self.shape
        table = 0 if shape.is_tied else math.ceil(shape.vocab_size / self.size) * shape.hidden
        return (shape.num_shard_params(self.size) - table) * self.bytes_per_value

    def _step(
        self,
        num_tokens: int,
        *,
        cached_tokens: float,
        attended: float,
        num_logits: int | None = None,
    ) -> Step:
        """`num_tokens` new tokens, each attending to `attended`, over `cached_tokens` KV slots."""
        shape, device, reached = self.shape, self.device, self.device.calibration
        share = 1 if device.is_shared else self.size
        ranks_on_device = self.size if device.is_shared else 1
        bandwidth = device.bandwidth_bytes_per_s * reached.bandwidth_share
        per_token = shape.kv_bytes_per_token(bytes_per_value=self.bytes_per_value, size=self.size)
        num_logits = num_tokens if num_logits is None else num_logits
        attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim * attended
        flops = num_tokens * (2 * shape.num_non_embedding_params + attention)
        flops += 2 * num_logits * shape.vocab_size * shape.hidden
        return Step(
            weights_s=ranks_on_device * self.read_bytes / bandwidth,
            kv_s=ranks_on_device * per_token * cached_tokens / bandwidth,
            flops_s=flops / share / (device.flops_per_s * reached.flops_share),
            all_reduce_s=self._all_reduce_s(num_tokens),
            launch_s=shape.num_layers * reached.layer_s,
        )

    def _all_reduce_s(self, num_tokens: int) -> float:
        """Two a layer, and one for the embedding; each moves 2 (size - 1) / size of its bytes."""
        if self.size == 1:
            return 0.0
        num_bytes = num_tokens * self.shape.hidden * self.bytes_per_value
        moved_s = 2 * (self.size - 1) / self.size * num_bytes / self.device.link_bytes_per_s
        return (2 * self.shape.num_layers + 1) * (self.device.link_s + moved_s)
