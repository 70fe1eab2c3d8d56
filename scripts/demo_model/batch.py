"""Batches: samples as token ids, in parts of similar length.

Samples are not packed end to end (they would attend to each other); each step's samples are sorted
by length and cut into parts, so that a causal mask needs no padding mask and little is wasted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .corpus import Sample

_PART_TOKENS = 1536


@dataclass(frozen=True, slots=True)
class Part:
    """Right-padded inputs, and for each the next token and its weight (0 on prompt and padding).

    `num_tokens` leaves out the padding.
    """

    inputs: Tensor  # [num_samples, length]
    targets: Tensor  # [num_samples, length]
    weights: Tensor  # [num_samples, length]
    num_tokens: int


class Batches:
    """Encodes a stream of samples into steps."""

    def __init__(self, samples: Iterator[Sample], tokenizer: Tokenizer, *, batch_size: int) -> None:
        self._samples = samples
        self._tokenizer = tokenizer
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[list[Part]]:
        while True:
            rows = sorted(
                (self._encode(sample) for sample in islice(self._samples, self._batch_size)),
                key=lambda row: len(row[0]),
            )
            yield [_stack(part) for part in _cut(rows)]

    def _encode(self, sample: Sample) -> tuple[list[int], int]:
        """Prompt and answer apart, as the server will see them; returns ids and prompt length."""
        prompt = self._tokenizer.encode(sample.prompt).ids
        return prompt + self._tokenizer.encode(sample.answer).ids, len(prompt)


def _cut(rows: Sequence[tuple[list[int], int]]) -> Iterator[list[tuple[list[int], int]]]:
    part: list[tuple[list[int], int]] = []
    for row in rows:
        if part and (len(part) + 1) * len(row[0]) > _PART_TOKENS:
            yield part
            part = []
        part.append(row)
    yield part


def _stack(rows: list[tuple[list[int], int]]) -> Part:
    shape = (len(rows), max(len(ids) for ids, _ in rows) - 1)
    inputs = torch.zeros(shape, dtype=torch.long)
    targets, weights = torch.zeros_like(inputs), torch.zeros(shape)
    for index, (ids, num_prompt) in enumerate(rows):
        end = len(ids) - 1
        inputs[index, :end] = torch.tensor(ids[:-1])
        targets[index, :end] = torch.tensor(ids[1:])
        weights[index, num_prompt - 1 : end] = (len(ids) - num_prompt) ** -0.5
    return Part(inputs, targets, weights, sum(len(ids) - 1 for ids, _ in rows))
