"""Our engine, as the other engines are asked: `... FOLDER NUM_THREADS DTYPE NUM_RANKS`."""

from __future__ import annotations

import sys
from pathlib import Path

import serve
from scripts.bench.local_group import GroupOptions, LocalGroup
from scripts.bench.peers.protocol import Facts, Run, Stopwatch, answer, claim_answers
from serve.engine.ledger import StepResult


class Shoal:
    """A group of `num_ranks` processes with `num_threads` threads each."""

    def __init__(self, folder: str, num_threads: int, dtype: str, num_ranks: int) -> None:
        self._group = LocalGroup(
            GroupOptions(Path(folder), num_ranks=num_ranks, num_threads=num_threads, dtype=dtype)
        )

    def facts(self) -> Facts:
        options = self._group.options
        return Facts(
            f"Shoal, TP {options.num_ranks} x {options.num_threads}",
            serve.__version__,
            options.num_ranks * options.num_threads,
            f"{options.dtype}, KV {options.dtype}",
            [f"kernels: {self._group.kernels}"],
        )

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Run:
        watch = Stopwatch(len(prompts))
        index_of = {
            self._group.add(prompt, num_tokens=num_tokens): index
            for index, prompt in enumerate(prompts)
        }

        def take(result: StepResult) -> None:
            for delta in result.deltas:
                watch.take(index_of[delta.stream_id], delta.token_ids)
            if result.deltas:
                watch.end_step()

        self._group.run(take)
        return watch.run()


if __name__ == "__main__":
    answers = claim_answers()
    answer(Shoal(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])), answers)
