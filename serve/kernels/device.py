"""What a model on a device asks of its kernels, and which implementation computes it.

Not the kernels: `triton_*` are compiled for the GPU, `device_torch` says the same in torch: their
slow twin, the path of a CPU device in tests, and of a GPU where Triton cannot compile. The one
decision behind it: both are modules with the same functions, so a test runs either on one input.

Matrices, activations and the KV cache have the model's dtype; the residual stream, norms, softmax
and logits are float32. A cache of one layer is [num_blocks, block_size, num_kv_heads, head_dim].
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

logger = logging.getLogger("shoal.kernels")

DeviceKernelsChoice = Literal["auto", "triton", "torch"]


@dataclass(frozen=True, slots=True)
class Places:
    """Where the rows of a step stand: row i is position `positions[i]` of slot `slots[i]`."""

    slots: Tensor  # int32 [num_rows]
    positions: Tensor  # int32 [num_rows]
    block_tables: Tensor  # int32 [num_slots, max_blocks]

    def first(self, num_rows: int) -> Places:
        """Those of the first rows."""
        return Places(self.slots[:num_rows], self.positions[:num_rows], self.block_tables)


class DecoderKernels(Protocol):
    """Everything between matrix products, and the products of a single row."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """Normed rows of float32 `x` [num_rows, hidden], scaled by `weight`, in `dtype`."""
        ...

    def add_rms_norm(self, x: Tensor, update: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Add `update` [num_rows, hidden] to `x` in place; normed rows in the dtype of `update`."""
        ...

    def silu_and_multiply(self, gate_up: Tensor) -> Tensor:
        """`silu(gate) * up` of [num_rows, 2 * ffn], the gate first."""
        ...

    def rotate_and_store(
        self, qkv: Tensor, angles: Tensor, places: Places, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Rotate queries and keys, write keys and values to their slots; the queries.

        Args:
            qkv: [num_rows, query heads and twice the KV heads, head_dim].
            angles: float32 [num_positions, head_dim], cosines before sines.
            places: of the rows; every row's slot is written.
            keys: cache of the layer.
            values: the same.
        """
        ...

    def multiply_row(
        self,
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        norm: tuple[Tensor, float] | None = None,
        bias: Tensor | None = None,
        is_added: bool = False,
    ) -> Tensor:
        """`weight @ x` of one row [1, num_inputs] into `out` [1, num_outputs]; returns `out`.

        `norm` is the weight and the epsilon of an RMSNorm of `x` before, `bias` float32; where
        `is_added` the product is added to what `out` holds.
        """
        ...

    def multiply_gate_up_row(self, x: Tensor, weight: Tensor, norm: tuple[Tensor, float]) -> Tensor:
        """`silu(gate) * up` of one row: norm, product with [2 * ffn, hidden] and activation."""
        ...


class AttentionKernels(Protocol):
    """Attention over the paged cache; rows see their own position and all before it."""

    def attend_decodes(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        places: Places,
        workspace: Workspace,
        out: Tensor,
    ) -> None:
        """One row a sequence: `query` [num_rows, num_heads, head_dim] into `out`, alike."""
        ...

    def attend_tiles(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        block_tables: Tensor,
        tiles: Tensor,
        out: Tensor,
    ) -> None:
        """Rows of prompts, in tiles of at most `QUERY_TILE` neighbours of one sequence.

        `tiles` is int32 [num_tiles, 4]: first row, number of rows, first position, slot.
        """
        ...


class SamplingKernels(Protocol):
    """What a sampler does to whole rows of logits; see `serve.runner.sampler` for the order."""

    def adjust(self, logits: Tensor, rules: Rules, num_ids: int) -> Tensor:
        """Scores [num_rows, num_ids] after penalties and masks; `logits` stays as it was."""
        ...

    def draw(self, scores: Tensor, drawing: Drawing) -> Tensor:
        """The drawn id of each row, int64; rows of temperature 0 hold no meaning."""
        ...


@dataclass(frozen=True, slots=True)
class Workspace:
    """Memory for the parts of long contexts, one part for `chunk_tokens` positions.

    A part's bits depend on positions alone, and parts are summed in order: what else the batch
    holds, and how parts are spread over the GPU, changes nothing.
    """

    chunk_tokens: int
    sums: Tensor  # float32 [max_rows, num_heads, max_chunks, head_dim]
    stats: Tensor  # float32 [max_rows, num_heads, max_chunks, 2]: largest score, sum of weights

    @classmethod
    def make(
        cls, *, max_rows: int, num_heads: int, head_dim: int, max_tokens: int, device: torch.device
    ) -> Workspace:
        """For `max_rows` sequences of up to `max_tokens` tokens."""
        chunk_tokens = _MIN_CHUNK_TOKENS
        while chunk_tokens * _MAX_CHUNKS < max_tokens:
            chunk_tokens *= 2
        dims = (max_rows, num_heads, -(-max_tokens // chunk_tokens))
        return cls(
            chunk_tokens=chunk_tokens,
            sums=torch.empty(*dims, head_dim, device=device),
            stats=torch.empty(*dims, 2, device=device),
        )


_MIN_CHUNK_TOKENS = 256
_MAX_CHUNKS = 128
QUERY_TILE = 64


@dataclass(frozen=True, slots=True)
class Rules:
    """What changes a row's logits, for each row; counts are kept by slot.

    `penalties` are repetition, presence and frequency. A row whose `mask_rows` is -1 has no mask.
    """

    slots: Tensor  # int32 [num_rows]
    penalties: Tensor  # float32 [num_rows, 3]
    is_in_prompt: Tensor  # bool [num_slots, vocab_size]
    counts: Tensor  # int16 [num_slots, vocab_size], tokens of the output
    mask_rows: Tensor  # int32 [num_rows]
    masks: Tensor  # int32 [num_masks, num_words], bit i % 32 of word i // 32: allowed


@dataclass(frozen=True, slots=True)
class Drawing:
    """How each row is drawn; see `serve.messages.SamplingParams`. `numbers` are in [0, 1)."""

    temperatures: Tensor  # float32 [num_rows], 0: greedy
    top_k: Tensor  # int64, 0: all
    top_p: Tensor  # float64
    min_p: Tensor  # float32
    numbers: Tensor  # float64


@dataclass(frozen=True, slots=True)
class DeviceKernels:
    """The kernels of one device, and what they are called."""

    name: Literal["triton", "torch"]
    decoder: DecoderKernels
    attention: AttentionKernels
    sampling: SamplingKernels


def load_device_kernels(
    device: torch.device, choice: DeviceKernelsChoice = "auto"
) -> DeviceKernels:
    """The kernels for `device`; "auto" falls back to torch, with one line that says why.

    Raises:
        RuntimeError: Triton was asked for and cannot compile here.
    """
    if choice == "torch" or (choice == "auto" and device.type != "cuda"):
        return _torch_kernels()
    try:
        kernels = _triton_kernels()
        _try(kernels, device)
    except Exception as exc:  # a compiler, a driver, a header: whatever Triton misses here
        reason = f"{type(exc).__name__}: {str(exc).strip().splitlines()[:1]}"
        if choice == "triton":
            raise RuntimeError(f"Triton cannot compile here: {reason}") from exc
        logger.warning(
            "GPU kernels in plain torch, several times slower: Triton failed, %s", reason
        )
        return _torch_kernels()
    return kernels


def _torch_kernels() -> DeviceKernels:
    from . import device_torch

    return DeviceKernels("torch", device_torch, device_torch, device_torch)


def _triton_kernels() -> DeviceKernels:
    from . import triton_attention, triton_decoder, triton_sampling

    return DeviceKernels("triton", triton_decoder, triton_attention, triton_sampling)


def _try(kernels: DeviceKernels, device: torch.device) -> None:
    """Compile and run the smallest kernel."""
    ones = torch.ones(1, 16, device=device)
    normed = kernels.decoder.rms_norm(ones, ones[0], 0.0, torch.float32)
    if not torch.allclose(normed, ones, atol=1e-5):
        raise RuntimeError(f"a kernel gave {normed[0, 0].item()} in the place of 1.0")
