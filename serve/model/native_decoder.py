"""One rank's decoder in packed weights: the structures that `shoal_forward` computes from.

The fast twin of `.qwen2`: the same cuts of the checkpoint, the same arithmetic in C++. The one
decision behind it: each weight is packed once, while it is read, and there is no other copy of it;
the input embedding and a tied head are one packed matrix.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import numpy as np

from serve.catalog import ModelShape
from serve.kernels import abi
from serve.kernels.dtypes import ABI_DTYPES, DtypeName, Stored
from serve.kernels.native import Pool
from serve.kernels.native_attention import BLOCK_SIZES, HEAD_DIMS, attention_heads
from serve.kernels.packed import PackedMatrix

from .rank_ranges import Range, RankRanges, vocabulary_rows
from .rotary_angles import rotary_angles
from .tensor_parallel import Collectives
from .weights import Cut, VectorDestination, whole

# A rank's vocabulary rows are a multiple of the widest panel of any instruction set, so that ranks
# on different CPUs agree on whose they are.
_VOCABULARY_EDGE = 32


def native_problem(shape: ModelShape, *, block_size: int, panel_width: int) -> str | None:
    """Why the native kernels cannot compute this shape; None where they can."""
    if shape.head_dim not in HEAD_DIMS:
        return f"head_dim must be one of {_listed(HEAD_DIMS)}, got {shape.head_dim}"
    if block_size not in BLOCK_SIZES:
        return f"engine.block_size must be one of {_listed(BLOCK_SIZES)}, got {block_size}"
    if shape.hidden % panel_width:
        return f"hidden_size must be a multiple of {panel_width}, got {shape.hidden}"
    return None


class NativeDecoder:
    """All layers of one rank; empty until its cuts are loaded.

    Args:
        shape: of the whole model, without a `native_problem`.
        collectives: this rank's view of its group; the size must be legal for the shape.
        dtype: float32 or bfloat16, the type that matrices and the KV cache are stored in.
        num_positions: positions that a sequence may reach.
        block_size: KV slots of a block.
        pool: the threads that pack.
    """

    def __init__(
        self,
        shape: ModelShape,
        collectives: Collectives,
        *,
        dtype: DtypeName,
        num_positions: int,
        block_size: int,
        pool: Pool,
    ) -> None:
        ranges = RankRanges.of(shape, rank=collectives.rank, size=collectives.size)
        self._shape = shape
        self._embedding = _Vocabulary(shape, collectives, dtype=dtype, pool=pool)
        self._head = (
            self._embedding
            if shape.is_tied
            else _Vocabulary(shape, collectives, dtype=dtype, pool=pool)
        )
        self._layers = [
            _Layer(shape, ranges, index=index, dtype=dtype, pool=pool)
            for index in range(shape.num_layers)
        ]
        self._norm = np.empty(shape.hidden, np.float32)
        self._cos, self._sin = rotary_angles(shape, num_positions)
        self.heads = attention_heads(
            num_heads=ranges.num_heads,
            num_kv_heads=ranges.num_kv_heads,
            head_dim=shape.head_dim,
            block_size=block_size,
            dtype=ABI_DTYPES[dtype],
        )
        self.num_logits = collectives.size * self._head.matrix.struct.num_outputs
        """Columns of the logits on rank 0; ids behind the vocabulary are padding."""

    def cuts(self) -> Iterator[Cut]:
        """Everything that this rank reads of the checkpoint."""
        yield from self._embedding.cuts("model.embed_tokens")
        for layer in self._layers:
            yield from layer.cuts()
        yield whole("model.norm.weight", VectorDestination(self._norm))
        if self._head is not self._embedding:
            yield from self._head.cuts("lm_head")

    def structure(self, caches: Sequence[tuple[int, int]]) -> abi.Decoder:
        """The decoder as C sees it; lives no longer than this object.

        Args:
            caches: the addresses of each layer's keys and values.
        """
        layers = [
            layer.structure(*cache) for layer, cache in zip(self._layers, caches, strict=True)
        ]
        self._structures = (abi.Layer * len(layers))(*layers)
        return abi.Decoder(
            hidden=self._shape.hidden,
            ffn=self._layers[0].ffn_size,
            num_layers=len(layers),
            eps=self._shape.rms_norm_eps,
            heads=self.heads,
            layers=ctypes.addressof(self._structures),
            embedding=self._embedding.matrix.struct,
            first_token_id=self._embedding.rows[0],
            num_token_ids=self._embedding.rows[1] - self._embedding.rows[0],
            final_norm=self._norm.ctypes.data,
            head=self._head.matrix.struct,
            cos=self._cos.ctypes.data,
            sin=self._sin.ctypes.data,
        )


class _Layer:
    """The matrices and norms of one layer."""

    def __init__(
        self,
        shape: ModelShape,
        ranges: RankRanges,
        *,
        index: int,
        dtype: DtypeName,
        pool: Pool,
    ) -> None:
        self._prefix = f"model.layers.{index}"
        self._ranges = ranges
        q_size, kv_size, ffn_size = map(_size, (ranges.query, ranges.key_value, ranges.ffn))
        self._input_norm, self._ffn_norm = (np.empty(shape.hidden, np.float32) for _ in range(2))
        self._bias = np.empty(q_size + 2 * kv_size, np.float32)
        width = pool.library.panel_width
        self.ffn_size = -(-ffn_size // width) * width
        self._qkv = PackedMatrix(
            pool, dtype, len(self._bias), num_inputs=shape.hidden, bias=self._bias
        )
        self._output = PackedMatrix(pool, dtype, shape.hidden, num_inputs=q_size)
        self._gate_up = PackedMatrix(pool, dtype, 2 * self.ffn_size, num_inputs=shape.hidden)
        self._down = PackedMatrix(pool, dtype, shape.hidden, num_inputs=ffn_size)

    def cuts(self) -> Iterator[Cut]:
        """This rank's part of the layer's tensors."""
        ranges, attention, ffn = self._ranges, f"{self._prefix}.self_attn", f"{self._prefix}.mlp"
        yield whole(f"{self._prefix}.input_layernorm.weight", VectorDestination(self._input_norm))
        first_row = 0
        for letter, rows in (("q", ranges.query), ("k", ranges.key_value), ("v", ranges.key_value)):
            name, end = f"{attention}.{letter}_proj", first_row + _size(rows)
            yield _rows_cut(f"{name}.weight", rows, self._qkv, first_row=first_row)
            yield Cut(f"{name}.bias", (rows,), VectorDestination(self._bias[first_row:end]))
            first_row = end
        yield _columns_cut(f"{attention}.o_proj.weight", ranges.query, self._output)
        yield whole(
            f"{self._prefix}.post_attention_layernorm.weight", VectorDestination(self._ffn_norm)
        )
        for panel, letter in enumerate(("gate", "up")):
            into = PackedRows(self._gate_up, _size(ranges.ffn), first_panel=panel, panel_step=2)
            yield Cut(
                f"{ffn}.{letter}_proj.weight", (ranges.ffn, (0, self._gate_up.num_inputs)), into
            )
        yield _columns_cut(f"{ffn}.down_proj.weight", ranges.ffn, self._down)

    def structure(self, keys: int, values: int) -> abi.Layer:
        """The layer as C sees it, over a cache at these addresses."""
        return abi.Layer(
            input_norm=self._input_norm.ctypes.data,
            qkv=self._qkv.struct,
            output=self._output.struct,
            ffn_norm=self._ffn_norm.ctypes.data,
            gate_up=self._gate_up.struct,
            down=self._down.struct,
            keys=keys,
            values=values,
        )


class _Vocabulary:
    """This rank's rows of an embedding or of an LM head, or of one table that is both."""

    def __init__(
        self, shape: ModelShape, collectives: Collectives, *, dtype: DtypeName, pool: Pool
    ) -> None:
        self.rows, num_rows = vocabulary_rows(
            shape, rank=collectives.rank, size=collectives.size, edge=_VOCABULARY_EDGE
        )
        self.matrix = PackedMatrix(pool, dtype, num_rows, num_inputs=shape.hidden)

    def cuts(self, name: str) -> Iterator[Cut]:
        """This rank's rows of `name`.weight."""
        if _size(self.rows):  # a small vocabulary may end before the last rank
            yield _rows_cut(f"{name}.weight", self.rows, self.matrix, first_row=0)


class PackedRows:
    """Some panels of a packed matrix, as the `Destination` of `num_rows` rows of a tensor.

    The rows go to panels `first_panel`, `first_panel + panel_step`, ...; the last is filled up with
    zeros.
    """

    def __init__(
        self, matrix: PackedMatrix, num_rows: int, *, first_panel: int, panel_step: int = 1
    ) -> None:
        self._matrix = matrix
        self._first_panel = first_panel
        self._panel_step = panel_step
        self.shape = (num_rows, matrix.num_inputs)
        num_panels = -(-num_rows // matrix.panel_width)
        self.num_bytes = matrix.num_bytes * num_panels // matrix.num_panels

    def fill(self, source: Stored, first_row: int) -> bool:
        """See `Destination.fill`; a piece's rows fill whole panels."""
        panel = self._first_panel + first_row // self._matrix.panel_width * self._panel_step
        return self._matrix.fill_rows(panel, self._panel_step, source)


def _rows_cut(name: str, rows: Range, matrix: PackedMatrix, *, first_row: int) -> Cut:
    """Whole rows of a tensor, to the matrix' outputs from `first_row` on."""
    into = PackedRows(matrix, _size(rows), first_panel=first_row // matrix.panel_width)
    return Cut(name, (rows, (0, matrix.num_inputs)), into)


def _columns_cut(name: str, columns: Range, matrix: PackedMatrix) -> Cut:
    """Columns of a tensor, which are all inputs of the matrix."""
    num_rows = matrix.struct.num_outputs
    return Cut(name, ((0, num_rows), columns), PackedRows(matrix, num_rows, first_panel=0))


def _size(limits: Range) -> int:
    return limits[1] - limits[0]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
