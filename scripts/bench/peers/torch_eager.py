"""transformers' own Qwen2, eager: `... FOLDER NUM_THREADS DTYPE`.

The straightforward engine: one forward pass a step over a growing cache, greedy by argmax.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import transformers

from scripts.bench.peers.protocol import Facts, Run, Stopwatch, answer, claim_answers


class TorchEager:
    """A model of transformers and its cache."""

    def __init__(self, folder: str, num_threads: int, dtype: str) -> None:
        torch.set_num_threads(num_threads)
        self._num_threads = num_threads
        self._dtype = dtype
        loader: Any = transformers.AutoModelForCausalLM
        self._model = loader.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def facts(self) -> Facts:
        version = f"{transformers.__version__}, torch {torch.__version__}"
        return Facts("transformers", version, self._num_threads, f"{self._dtype}, KV {self._dtype}")

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Run:
        watch = Stopwatch(len(prompts))
        with torch.inference_mode():
            token_ids = torch.tensor(prompts)
            cache = None
            for _ in range(num_tokens):
                output = self._model(
                    token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                cache = output.past_key_values
                token_ids = output.logits[:, -1:].argmax(dim=-1)
                for index, (token_id,) in enumerate(token_ids.tolist()):
                    watch.take(index, [token_id])
                watch.end_step()
        return watch.run()


if __name__ == "__main__":
    answers = claim_answers()
    answer(TorchEager(sys.argv[1], int(sys.argv[2]), sys.argv[3]), answers)
