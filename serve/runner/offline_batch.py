"""A fixed batch through a runner: the functions behind `python -m serve.runner.offline`.

Not a server and no scheduler: every sequence has the same length and none ends early. The one
decision behind it: it drives a replica's own runner as the engine does, one step ahead, so what it
measures is what a replica can reach.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serve.catalog import ModelShape
from serve.checkpoint import Checkpoint, inspect_checkpoint
from serve.kernels.device import DeviceKernelsChoice, load_device_kernels
from serve.kernels.dtypes import BYTES_PER_VALUE, DtypeName
from serve.messages import Chunk, NewSequence, SamplingParams, StepInput
from serve.model.tensor_parallel import SingleRank
from serve.model.weights import load

from .cuda import CudaRunner
from .cuda_loading import DeviceOptions, check_device, make_model, make_runner
from .model_runner import ModelRunner
from .plan import RunnerPlan

_BLOCK_SIZE = 16
# hidden, layers, heads, KV heads, FFN, vocabulary, whether the head is the embedding
SHAPES = {
    "qwen2.5-0.5b": (896, 24, 14, 2, 4864, 151_936, True),
    "qwen2.5-1.5b": (1536, 28, 12, 2, 8960, 151_936, True),
    "qwen2.5-3b": (2048, 36, 16, 2, 11_008, 151_936, True),
    "qwen2.5-7b": (3584, 28, 28, 4, 18_944, 152_064, False),
    "qwen2.5-14b": (5120, 48, 40, 8, 13_824, 152_064, False),
    "qwen2.5-32b": (5120, 64, 40, 8, 27_648, 152_064, False),
    "qwen2.5-72b": (8192, 80, 64, 8, 29_568, 152_064, False),
    "tiny": (64, 2, 4, 2, 96, 160, True),
}


@dataclass(frozen=True, slots=True)
class Speed:
    """What one batch took; tokens of all its sequences together."""

    batch: int
    num_prompt_tokens: int
    num_new_tokens: int
    prefill_s: float
    decode_s: float

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens a second."""
        return self.batch * self.num_prompt_tokens / self.prefill_s

    @property
    def decode_tokens_per_s(self) -> float:
        """New tokens a second, the first of each sequence left out: prefill makes it."""
        return self.batch * (self.num_new_tokens - 1) / self.decode_s

    def report(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **asdict(self),
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
        }


def random_shape(name: str) -> ModelShape:
    """A shape of the family, or `tiny`, by its name."""
    hidden, num_layers, num_heads, num_kv_heads, ffn, vocab_size, is_tied = SHAPES[name]
    return ModelShape(
        hidden=hidden,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=hidden // num_heads,
        ffn=ffn,
        vocab_size=vocab_size,
        is_tied=is_tied,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        max_positions=32_768,
    )


def make_offline_runner(
    source: ModelShape | Path,
    *,
    device: torch.device,
    dtype: DtypeName,
    max_running_sequences: int,
    max_model_len: int,
    token_budget: int,
    kernels: DeviceKernelsChoice = "auto",
    has_graphs: bool | None = None,
) -> tuple[CudaRunner, int]:
    """A runner of a checkpoint, or of a shape with random weights; bytes a one-row step reads.

    Raises:
        CheckpointError: the folder cannot be used.
        ConfigurationError: the device is missing, or too small.
    """
    check_device(device)
    is_random = isinstance(source, ModelShape)
    checkpoint = (
        Checkpoint(Path(), source, {}, {})
        if isinstance(source, ModelShape)
        else inspect_checkpoint(source)
    )
    plan = _plan(
        checkpoint,
        dtype=dtype,
        max_running_sequences=max_running_sequences,
        max_model_len=max_model_len,
    )
    options = DeviceOptions(device, token_budget, kernels, has_graphs)
    found = load_device_kernels(device, options.kernels)
    with torch.inference_mode():
        model = make_model(plan, found, device)
        if is_random:
            model.fill_randomly(seed=0)
        else:
            load(checkpoint, model.cuts())
            model.finish()
        return make_runner(plan, model, found, options), model.num_step_bytes


def load_offline_runner(
    folder: Path, *, dtype: DtypeName, max_running_sequences: int, max_model_len: int
) -> tuple[ModelRunner, int]:
    """A checkpoint's runner as a replica on a CPU has it; bytes a one-row step reads.

    Raises:
        CheckpointError: the folder cannot be used.
        ConfigurationError: memory does not hold it.
    """
    from .loading import load_cpu_runner

    plan = _plan(
        inspect_checkpoint(folder),
        dtype=dtype,
        max_running_sequences=max_running_sequences,
        max_model_len=max_model_len,
    )
    plan.check()
    runner, shape = load_cpu_runner(plan, "auto"), plan.shape
    num_embedding_params = 0 if shape.is_tied else shape.vocab_size * shape.hidden
    return runner, (shape.num_params - num_embedding_params) * BYTES_PER_VALUE[dtype]


def _plan(
    checkpoint: Checkpoint, *, dtype: DtypeName, max_running_sequences: int, max_model_len: int
) -> RunnerPlan:
    """One rank's, with room for every sequence and no text: no id is padding, none ends."""
    return RunnerPlan(
        checkpoint=checkpoint,
        shape=checkpoint.shape,
        collectives=SingleRank(),
        dtype=dtype,
        block_size=_BLOCK_SIZE,
        num_threads=torch.get_num_threads(),
        num_real_tokens=checkpoint.shape.vocab_size,
        eos_token_ids=(),
        max_running_sequences=max_running_sequences,
        max_model_len=max_model_len,
        kv_cache_tokens=_num_blocks(max_model_len) * _BLOCK_SIZE * max_running_sequences,
        on_progress=None,
    )


def generate(
    runner: CudaRunner | ModelRunner,
    prompts: list[list[int]],
    *,
    num_new_tokens: int,
    token_budget: int,
    max_model_len: int,
) -> tuple[list[list[int]], Speed]:
    """Greedy continuations of `prompts`, all of one length, and what they took.

    The steps are those of an engine one step ahead: each is launched before the tokens of the one
    before it are read. Prompts are computed first, in chunks of the token budget.
    """
    params = SamplingParams(seed=0, max_tokens=num_new_tokens, temperature=0.0)
    num_blocks = _num_blocks(max_model_len)
    new = [
        NewSequence(
            slot,
            prompt,
            len(prompt),
            params,
            list(range(slot * num_blocks, (slot + 1) * num_blocks)),
        )
        for slot, prompt in enumerate(prompts)
    ]
    found: list[list[int]] = [[] for _ in prompts]
    began_s = time.perf_counter()
    pending = []
    for step, slots in _prefill_steps(new, token_budget):
        runner.start(step)
        pending.append((slots, runner.sample({})))
    for slots, output in pending:
        for slot, token_id in zip(slots, output.result().token_ids, strict=True):
            found[slot].append(token_id)
    prefill_s = time.perf_counter() - began_s
    _decode(runner, found, num_new_tokens)
    decode_s = time.perf_counter() - began_s - prefill_s
    everyone = list(range(len(prompts)))
    runner.start(StepInput(0, everyone, [], [], b"", b"", []))
    runner.sample({})
    speed = Speed(len(prompts), len(prompts[0]), num_new_tokens, prefill_s, decode_s)
    return found, speed


def _num_blocks(num_tokens: int) -> int:
    """Blocks that hold so many tokens of a sequence."""
    return -(-num_tokens // _BLOCK_SIZE)


def _prefill_steps(
    new: list[NewSequence], token_budget: int
) -> Iterator[tuple[StepInput, list[int]]]:
    """Steps that compute every prompt, and the slots that each one samples."""
    waiting, chunks, room = list(new), [], token_budget
    slots: list[int] = []
    for sequence in new:
        start, length = 0, len(sequence.token_ids)
        while start < length:
            count = min(room, length - start)
            is_sampled = start + count == length
            chunks.append(Chunk(sequence.slot, start, count, is_sampled))
            slots += [sequence.slot] * is_sampled
            start, room = start + count, room - count
            if not room:
                yield StepInput(0, [], waiting, [], b"", b"", chunks), slots
                waiting, chunks, slots, room = [], [], [], token_budget
    if chunks:
        yield StepInput(0, [], waiting, [], b"", b"", chunks), slots


def _decode(runner: CudaRunner | ModelRunner, found: list[list[int]], num_new_tokens: int) -> None:
    """Go on until each of `found` has so many tokens; they stay on the device between steps."""
    step = StepInput(0, [], [], [], np.arange(len(found), dtype=np.int32).tobytes(), b"", [])
    pending: Any = None
    for _ in range(num_new_tokens - 1):
        runner.start(step)
        if pending is not None:
            _append(found, pending.result().token_ids)
        pending = runner.sample({})
    if pending is not None:
        _append(found, pending.result().token_ids)


def _append(found: list[list[int]], token_ids: list[int]) -> None:
    for row, token_id in zip(found, token_ids, strict=True):
        row.append(token_id)


def random_prompts(batch: int, num_tokens: int, vocab_size: int) -> list[list[int]]:
    """Prompts that differ from each other and are the same in every run."""
    generator = np.random.default_rng(1)
    return [generator.integers(0, vocab_size, num_tokens).tolist() for _ in range(batch)]
