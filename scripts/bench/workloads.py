"""What engines are asked to do, and the limit that the machine sets for each.

The limits come from the planner's roofline with nothing taken off: every weight and cached key read
once a step at the measured bandwidth, or the arithmetic at the measured rate, whichever is longer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from cluster.planner.speed import Calibration, Device, Roofline
from scripts.bench.checkpoint import NUM_TOKENS
from scripts.bench.peers.protocol import Run
from scripts.bench.probes import Limits
from serve.catalog import ModelShape

_IDEAL = Calibration(bandwidth_share=1.0, flops_share=1.0, layer_s=0.0)


@dataclass(frozen=True, slots=True)
class Workload:
    """`batch` prompts of `prompt_tokens`, then `num_tokens` tokens of each.

    A prefill's speed is prompt tokens over the time to the first token; decoding's is that of the
    steps after it in which all prompts decode. With `repeats_prompts` every round asks the same
    prompts, so that an engine may keep their keys and values; else each round's are new.
    `ours_only`: the bar needs no peer.
    """

    name: str
    batch: int
    prompt_tokens: int
    num_tokens: int
    repeats_prompts: bool = True
    ours_only: bool = False

    @property
    def is_prefill(self) -> bool:
        """Whether the prompt is what is measured."""
        return self.num_tokens == 1

    def prompts(self, round_number: int) -> list[list[int]]:
        """Random ids, the same for every engine."""
        seed = f"{self.name}/{0 if self.repeats_prompts else round_number}"
        draw = random.Random(seed)
        return [
            [draw.randrange(NUM_TOKENS) for _ in range(self.prompt_tokens)]
            for _ in range(self.batch)
        ]

    def tokens_per_s(self, run: Run) -> float | None:
        """The speed that this workload is about; None: its prompts never all decoded at once."""
        if self.is_prefill:
            return self.batch * self.prompt_tokens / run.first_s
        return run.num_rest_tokens / run.rest_s if run.num_rest_tokens else None

    def num_computed_tokens(self, run: Run) -> int:
        """What the order's CPU time went to: a prefill's prompt, else the tokens it made."""
        return self.batch * self.prompt_tokens if self.is_prefill else sum(map(len, run.token_ids))

    def limit_tokens_per_s(self, shape: ModelShape, limits: Limits) -> float:
        """What the machine allows at most."""
        device = Device(limits.read_bytes_per_s, limits.flops, 1.0, 0.0, _IDEAL, is_shared=True)
        return self.predicted_tokens_per_s(Roofline(shape, 1, device))

    def predicted_tokens_per_s(self, roofline: Roofline, *, token_budget: int = 1 << 20) -> float:
        """What a roofline says; a prompt is cut into chunks of `token_budget`."""
        if self.is_prefill:
            return self.prompt_tokens / roofline.prefill_s(self.prompt_tokens, token_budget)
        return roofline.tokens_per_s(self.batch, self.prompt_tokens + self.num_tokens // 2)


def workloads(*, is_quick: bool) -> list[Workload]:
    """The issue's: decoding at three batch sizes, a prompt, and a long context.

    The largest batch goes on for longer: ours starts its prompts in some steps, beside the decodes.
    """
    num_tokens, many_tokens, long_tokens = (5, 25, 512) if is_quick else (33, 49, 8_192)
    return [
        Workload("decode, batch 1", 1, 32, num_tokens),
        Workload("decode, batch 4", 4, 32, num_tokens),
        Workload("decode, batch 16", 16, 32, many_tokens),
        Workload("prefill, 1,024 tokens", 1, 1_024, 1, repeats_prompts=False),
        Workload(f"decode at {long_tokens:,} tokens", 1, long_tokens, num_tokens, ours_only=True),
    ]
