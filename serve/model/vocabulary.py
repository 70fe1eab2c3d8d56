"""Input embedding and LM head, split by vocabulary rows.

Each rank holds the same number of rows, rounded up so that the product has no ragged edge; rows
behind the vocabulary are zero. A tied head is the same tensor as the embedding. Ids that the
tokenizer cannot produce are the sampler's to mask.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from serve.catalog import ModelShape
from serve.kernels.linear import EDGE, linear

from .rank_ranges import vocabulary_rows
from .tensor_destination import TensorDestination
from .tensor_parallel import Collectives
from .weights import Cut


class VocabularyTable:
    """This rank's rows of an embedding or of an LM head, or of one table that is both."""

    def __init__(self, shape: ModelShape, collectives: Collectives, *, dtype: torch.dtype) -> None:
        (self._start, self._end), num_rows = vocabulary_rows(
            shape, rank=collectives.rank, size=collectives.size, edge=EDGE
        )
        self._vocab_size = shape.vocab_size
        self._collectives = collectives
        self.weight = torch.zeros(num_rows, shape.hidden, dtype=dtype)

    def cuts(self, name: str) -> Iterator[Cut]:
        """This rank's rows of `name`.weight."""
        into = self.weight[: self._end - self._start]
        if len(into):  # a small vocabulary may end before the last rank
            rows = (self._start, self._end)
            yield Cut(f"{name}.weight", (rows, (0, self.weight.shape[1])), TensorDestination(into))

    def embed(self, token_ids: Tensor) -> Tensor:
        """Rows of `token_ids` (int64 [num_tokens]) as float32 [num_tokens, hidden]."""
        local = token_ids - self._start
        is_elsewhere = (local < 0) | (local >= self._end - self._start)
        rows = self.weight[local.masked_fill(is_elsewhere, 0)].float()
        rows.masked_fill_(is_elsewhere.unsqueeze(-1), 0.0)
        return self._collectives.all_reduce(rows)

    def logits(self, hidden: Tensor) -> Tensor | None:
        """float32 [num_rows, vocab_size] of `hidden` [num_rows, hidden] on rank 0, else None."""
        gathered = self._collectives.gather_last_dim(linear(hidden, self.weight))
        return None if gathered is None else gathered[:, : self._vocab_size]
