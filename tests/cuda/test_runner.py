"""The runner of a device, on a CPU device: the reference's tokens, step for step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from serve.attention.cuda import cut_tiles
from serve.messages import SamplingParams, StepOutput
from serve.model.tensor_parallel import Collectives
from serve.runner.cuda import CudaRunner
from serve.runner.cuda_graphs import batch_sizes
from serve.runner.model_runner import ModelRunner
from serve.testing.ranks import run_ranks
from serve.testing.steps import StepRunner, StepWriter

BLOCK_SIZE = 16
EOS = 139
PROMPT = [7, 99, 3, 120, 55, 8, 8, 31, 64, 17, 2, 0, 88, 139, 5, 71, 23, 42, 11, 90]
Load = Callable[..., CudaRunner]

PARAMS = [
    SamplingParams(seed=1, max_tokens=99, temperature=0.0, logprobs=3),
    SamplingParams(seed=2, max_tokens=99, temperature=0.9, top_p=0.9, logprobs=0),
    SamplingParams(seed=3, max_tokens=99, temperature=0.7, top_k=20, top_p=0.8),
    SamplingParams(seed=4, max_tokens=99, temperature=1.3, min_p=0.02),
    SamplingParams(seed=5, max_tokens=99, temperature=0.0, repetition_penalty=1.4),
    SamplingParams(seed=6, max_tokens=99, presence_penalty=0.9, frequency_penalty=0.4),
    SamplingParams(seed=7, max_tokens=99, logit_bias={3: 4.0, 141: 90.0, 8: -100.0}),
    SamplingParams(seed=8, max_tokens=99, temperature=0.0, min_tokens=90, stop_token_ids=(4, 5)),
]


def _mask(*token_ids: int) -> np.ndarray:
    mask = np.zeros(5, np.uint32)
    for token_id in token_ids:
        mask[token_id // 32] |= np.uint32(1) << np.uint32(token_id % 32)
    return mask


def _story(runner: StepRunner, *, tells_tokens: bool = True) -> list[StepOutput]:
    """Sequences that come and go: chunks beside decodes, masks, a slot that is used again."""
    writer = StepWriter(runner, BLOCK_SIZE, tells_tokens)
    for slot, params in enumerate(PARAMS):
        writer.add(slot, PROMPT[slot:] + PROMPT, params)
    lengths = [2 * len(PROMPT) - slot for slot in range(len(PARAMS))]
    found = [writer.step(chunks=[(slot, 0, lengths[slot]) for slot in range(5)])]
    found.append(writer.step(range(5), [(5, 0, 10), (6, 0, lengths[6])]))
    found.append(writer.step([0, 1, 2, 3, 4, 6], [(5, 10, lengths[5]), (7, 0, lengths[7])]))
    for _ in range(9):
        found.append(writer.step(range(8)))
    masks = {1: _mask(3, 77, EOS), 7: _mask(9)}
    found.append(writer.step(range(8), masks=masks))
    for slot in (0, 3, 5):
        writer.release(slot)
    writer.add(3, PROMPT, PARAMS[5], output=[4, 4, 9])
    found.append(writer.step([1, 2, 4, 6, 7], [(3, 0, len(PROMPT) + 3)]))
    for _ in range(4):
        found.append(writer.step([1, 2, 3, 4, 6, 7]))
    for slot in (1, 2, 4, 6, 7):
        writer.release(slot)
    for _ in range(4):
        found.append(writer.step([3]))
    return found


def _assert_same(found: list[StepOutput], wanted: list[StepOutput]) -> None:
    assert [step.token_ids for step in found] == [step.token_ids for step in wanted]
    assert [step.errors for step in found] == [step.errors for step in wanted]
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.logprobs.keys() == theirs.logprobs.keys()
        for row, logprobs in mine.logprobs.items():
            assert logprobs.top_ids == theirs.logprobs[row].top_ids
            numbers = [logprobs.logprob, *logprobs.top_logprobs]
            expected = [theirs.logprobs[row].logprob, *theirs.logprobs[row].top_logprobs]
            assert numbers == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("tells_tokens", [True, False], ids=["told", "own"])
def test_tokens_are_the_references(
    load_device: Load, reference: ModelRunner, tells_tokens: bool
) -> None:
    found = _story(load_device(), tells_tokens=tells_tokens)
    _assert_same(found, _story(reference))
    assert sum(len(step.logprobs) for step in found) > 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("kernels", "has_graphs"), [("torch", False), ("triton", False), ("triton", True)]
)
def test_tokens_on_a_gpu_are_the_references(
    load_device: Load, reference: ModelRunner, kernels: str, has_graphs: bool
) -> None:
    runner = load_device(device="cuda", kernels=kernels, has_graphs=has_graphs)
    _assert_same(_story(runner, tells_tokens=False), _story(reference))


def test_two_ranks_sample_what_one_does(load_device: Load) -> None:
    """Tokens stay the ranks' own: the second one gets them from the first."""
    params = PARAMS[:3]

    def run(rank: Collectives | None) -> list[list[int]]:
        writer = StepWriter(load_device(rank), BLOCK_SIZE, tells_tokens=False)
        for slot, each in enumerate(params):
            writer.add(slot, PROMPT, each)
        found = [writer.step(chunks=[(slot, 0, len(PROMPT)) for slot in range(3)])]
        found += [writer.step(range(3)) for _ in range(12)]
        found += [writer.step([1]) for _ in range(3)]
        return [step.token_ids for step in found]

    first, second = run_ranks(2, run)
    assert first == run(None)
    assert not any(second)


def test_a_row_without_finite_logits_ends_alone(
    load_device: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = load_device()
    writer = StepWriter(runner, BLOCK_SIZE)
    for slot in range(3):
        writer.add(slot, PROMPT, PARAMS[slot])
    first = writer.step(chunks=[(slot, 0, len(PROMPT)) for slot in range(3)])
    sample = runner._sampler.sample

    def poisoned(logits: torch.Tensor, *others: object) -> object:
        logits = logits.clone()
        logits[1, 5] = torch.nan
        return sample(logits, *others)  # type: ignore[arg-type]

    fine = StepWriter(load_device(), BLOCK_SIZE)
    for slot in range(3):
        fine.add(slot, PROMPT, PARAMS[slot])
    assert fine.step(chunks=[(slot, 0, len(PROMPT)) for slot in range(3)]) == first
    wanted = fine.step(range(3))
    monkeypatch.setattr(runner._sampler, "sample", poisoned)
    found = writer.step(range(3))
    assert found.errors == {1: "The model's logits are not finite"}
    assert [found.token_ids[row] for row in (0, 2)] == [wanted.token_ids[row] for row in (0, 2)]
    nothing = fine.step([0], masks={0: np.zeros(5, np.uint32)})
    assert nothing.errors == {0: "No token is allowed here"}


def test_padding_changes_no_token(load_device: Load) -> None:
    """Three decodes run as four rows; the fourth is nobody's."""
    writer = StepWriter(load_device(), BLOCK_SIZE)
    alone = StepWriter(load_device(), BLOCK_SIZE)
    for slot in range(3):
        writer.add(slot, PROMPT[slot:], PARAMS[slot])
    alone.add(2, PROMPT[2:], PARAMS[2])
    writer.step(chunks=[(slot, 0, len(PROMPT) - slot) for slot in range(3)])
    alone.step(chunks=[(2, 0, len(PROMPT) - 2)])
    for _ in range(20):
        assert writer.step(range(3)).token_ids[2] == alone.step([2]).token_ids[0]


def test_batch_sizes_end_with_the_most_sequences() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(3) == [1, 2, 3]
    assert batch_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert batch_sizes(300)[-3:] == [224, 256, 300]


@pytest.mark.parametrize("cut", [1, 37, 64, 100, 129])
def test_tiles_cover_each_row_once_however_a_prompt_is_cut(cut: int) -> None:
    length = 130
    sizes = np.array([cut, length - cut])
    starts = np.array([0, cut])
    tiles = cut_tiles(starts, sizes, starts, np.array([3, 3], np.int32))
    rows = [row for first, count, *_ in tiles.tolist() for row in range(first, first + count)]
    assert rows == list(range(length))
    assert {slot for *_, slot in tiles.tolist()} == {3}
    edges = {position for _, _, position, _ in tiles.tolist()}
    assert edges == {0, 64, 128, cut}
