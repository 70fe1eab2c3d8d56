"""How fast a model will be: a roofline whose every term can be looked at.

Not memory (`cluster.planner.memory`) and not a measurement. A step takes as long as reading the
weights and the cache, or as the arithmetic, whichever is longer, plus the all-reduces, plus what it
costs to launch each layer's kernels. A CPU hides the shorter of the two only in part, and does
attention, which reaches less of its arithmetic, after the products, not beside them.

The one decision: a few shares are all that is calibrated. A GPU's are of the data sheet, fitted to
published figures (`python -m scripts.bench.plan_error` prints the fit and the error of every figure
that it has not seen); a CPU's are of what the planner measures on it, fitted to our own engine
(`python -m scripts.bench.plan_speed`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from serve.catalog import ModelShape
from serve.config import DeviceName


@dataclass(frozen=True, slots=True)
class Calibration:
    """What is reached of a device's own limits.

    `bandwidth_share` and `flops_share` are of the data sheet's, or of what was measured on a CPU;
    `layer_s` is what a layer's kernels cost beyond their bytes, each step.

    On a CPU `attention_share` is what attention reaches of the arithmetic, and `exposed_share` how
    much of the shorter of reading and computing comes on top of the longer. None: attention is no
    phase of its own.
    """

    bandwidth_share: float
    flops_share: float
    layer_s: float
    attention_share: float | None = None
    exposed_share: float = 0.0


# Fitted to batch 1 of the sizes up to 14B, and to one long prompt of the 7B, on an A100 80GB (vLLM
# 0.6.3, Qwen's own speed benchmark). Larger models, tensor parallelism, long texts and other GPUs
# are predicted.
GPU_CALIBRATION = Calibration(bandwidth_share=0.82, flops_share=0.62, layer_s=115e-6)
# Our kernels on a CPU, against what numpy reaches in `measure_cpu`: the shares with the least
# largest error over two runs of `scripts.bench.engine`, as `scripts.bench.plan_speed` prints them.
CPU_CALIBRATION = Calibration(
    bandwidth_share=1.20,
    flops_share=1.45,
    layer_s=20e-6,
    attention_share=0.73,
    exposed_share=0.61,
)
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

    @property
    def name(self) -> DeviceName:
        """As `hardware.device` says it."""
        return "cpu" if self.is_shared else "cuda"


@dataclass(frozen=True, slots=True)
class Step:
    """One step's terms, in seconds.

    `flops_s` is all arithmetic, attention's too; `busy_s` is what it takes together with reading
    the weights and the cache.
    """

    weights_s: float
    kv_s: float
    flops_s: float
    busy_s: float
    all_reduce_s: float
    launch_s: float

    @property
    def seconds(self) -> float:
        """Reading and computing, as far as they do not overlap; the rest comes on top."""
        return self.busy_s + self.all_reduce_s + self.launch_s

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
        attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim * attended * num_tokens
        products = 2 * num_tokens * shape.num_non_embedding_params
        products += 2 * num_logits * shape.vocab_size * shape.hidden
        weights_s = ranks_on_device * self.read_bytes / bandwidth
        kv_s = ranks_on_device * per_token * cached_tokens / bandwidth
        flops_per_s = share * device.flops_per_s
        if reached.attention_share is None:
            flops_s = (products + attention) / (flops_per_s * reached.flops_share)
            busy_s = _together(weights_s + kv_s, flops_s, reached)
        else:
            products_s = products / (flops_per_s * reached.flops_share)
            attention_s = attention / (flops_per_s * reached.attention_share)
            flops_s = products_s + attention_s
            busy_s = _together(weights_s, products_s, reached)
            busy_s += _together(kv_s, attention_s, reached)
        return Step(
            weights_s=weights_s,
            kv_s=kv_s,
            flops_s=flops_s,
            busy_s=busy_s,
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


def _together(reading_s: float, computing_s: float, reached: Calibration) -> float:
    """The longer of the two, and what shows of the shorter."""
    shorter_s, longer_s = sorted((reading_s, computing_s))
    return longer_s + reached.exposed_share * shorter_s
