"""Which heads, FFN columns and vocabulary rows are a rank's: plain numbers, whatever holds them.

Neighbouring ranks hold copies of the same KV head where ranks outnumber the KV heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from serve.catalog import ModelShape, num_shard_kv_heads

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class RankRanges:
    """Ranges [start, end) of rows of q_proj, of k_proj and v_proj, and of gate_proj and up_proj.

    `query` and `ffn` are the columns of o_proj and down_proj too.
    """

    num_heads: int
    num_kv_heads: int
    query: Range
    key_value: Range
    ffn: Range

    @classmethod
    def of(cls, shape: ModelShape, *, rank: int, size: int) -> RankRanges:
        """Those of `rank` of `size`, which must be legal for the shape."""
        num_heads, num_kv_heads = shape.num_heads // size, num_shard_kv_heads(shape, size)
        q_size, ffn_size = num_heads * shape.head_dim, shape.ffn // size
        kv_start = rank * shape.num_kv_heads // size * shape.head_dim
        return cls(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            query=(rank * q_size, (rank + 1) * q_size),
            key_value=(kv_start, kv_start + num_kv_heads * shape.head_dim),
            ffn=(rank * ffn_size, (rank + 1) * ffn_size),
        )


def vocabulary_rows(shape: ModelShape, *, rank: int, size: int, edge: int) -> tuple[Range, int]:
    """The rank's rows of the vocabulary, and the rows it holds with padding: a multiple of `edge`.

    Every rank holds the same number; a small vocabulary may end before the last rank.
    """
    num_rows = -(-shape.vocab_size // (size * edge)) * edge
    start = min(rank * num_rows, shape.vocab_size)
    return (start, min(start + num_rows, shape.vocab_size)), num_rows
