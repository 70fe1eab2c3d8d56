"""vLLM's CPU build, with its own Python: `... FOLDER NUM_THREADS DTYPE`.

Its engine in this process, stepped by hand, so that the time between steps is all its own.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from scripts.bench.peers.protocol import Facts, Run, Stopwatch, answer, claim_answers

MAX_MODEL_LEN = 9_216
MAX_SEQUENCES = 16
MAX_STEP_TOKENS = 2_048
KV_CACHE_GIB = 1


class VllmCpu:
    """A vLLM engine."""

    def __init__(self, folder: str, num_threads: int, dtype: str) -> None:
        cores = sorted(os.sched_getaffinity(0))[:num_threads]
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "OMP_NUM_THREADS": str(num_threads),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        import vllm  # type: ignore[import-not-found]

        self._vllm: Any = vllm
        self._num_threads = num_threads
        self._dtype = dtype
        self._engine: Any = vllm.LLM(
            model=folder,
            dtype=dtype,
            skip_tokenizer_init=True,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_SEQUENCES,
            max_num_batched_tokens=MAX_STEP_TOKENS,
        ).llm_engine
        self._num_requests = 0

    def facts(self) -> Facts:
        import torch

        version = f"{self._vllm.__version__}, torch {torch.__version__}"
        return Facts("vLLM (CPU)", version, self._num_threads, f"{self._dtype}, KV {self._dtype}")

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Run:
        params = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        watch = Stopwatch(len(prompts))
        index_of = {}
        for index, prompt in enumerate(prompts):
            self._num_requests += 1
            index_of[str(self._num_requests)] = index
            self._engine.add_request(str(self._num_requests), {"prompt_token_ids": prompt}, params)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                index = index_of[output.request_id]
                so_far = output.outputs[0].token_ids
                watch.take(index, list(so_far[len(watch.token_ids[index]) :]))
            watch.end_step()
        return watch.run()


if __name__ == "__main__":
    answers = claim_answers()
    answer(VllmCpu(sys.argv[1], int(sys.argv[2]), sys.argv[3]), answers)
