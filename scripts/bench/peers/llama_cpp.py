"""llama.cpp through llama-cpp-python's low-level calls: `... FOLDER NUM_THREADS DTYPE`.

The GGUF file is made from the checkpoint beside it. Several sequences are one `llama_batch`, as its
own `llama-batched-bench` does it; tokens are chosen by numpy's argmax, cheaper than its sampler.
"""

from __future__ import annotations

import ctypes
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np

from scripts.bench.peers.gguf_file import MatrixType, write_gguf
from scripts.bench.peers.protocol import Facts, Run, Stopwatch, answer, claim_answers

_BATCH_TOKENS = 2_048  # llama.cpp's own default
_ROUND_TOKENS = 256


class LlamaCpp:
    """A model of llama.cpp, with the context of the last order."""

    def __init__(self, folder: str, num_threads: int, dtype: str) -> None:
        import llama_cpp  # type: ignore[import-not-found]

        self._lib: Any = llama_cpp
        self._num_threads = num_threads
        self._dtype = dtype
        path = Path(folder) / f"{dtype}.gguf"
        if not path.exists():
            partial = path.with_suffix(".partial")
            write_gguf(Path(folder), partial, cast(MatrixType, dtype))
            partial.rename(path)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size: int = llama_cpp.llama_vocab_n_tokens(vocab)
        self._batch = llama_cpp.llama_batch_init(_BATCH_TOKENS, 0, 1)
        self._context: Any = None
        self._shape = (0, 0)
        self._cached: list[list[int]] = []

    def facts(self) -> Facts:
        flags = self._lib.llama_print_system_info().decode()
        return Facts(
            "llama.cpp",
            f"llama-cpp-python {version('llama-cpp-python')}",
            self._num_threads,
            f"{self._dtype}, KV float16",
            [flags],
        )

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Run:
        num_cached = self._open(prompts, num_tokens)
        watch = Stopwatch(len(prompts))
        rows = []
        for index, prompt in enumerate(prompts):
            rows += [
                (token_id, position, index, position == len(prompt) - 1)
                for position, token_id in enumerate(prompt)
                if position >= num_cached
            ]
        for begin in range(0, len(rows), _BATCH_TOKENS):
            self._step(rows[begin : begin + _BATCH_TOKENS], watch)
        watch.end_step()
        for number in range(num_tokens - 1):
            rows = [
                (watch.token_ids[index][-1], len(prompt) + number, index, True)
                for index, prompt in enumerate(prompts)
            ]
            self._step(rows, watch)
            watch.end_step()
        return watch.run()

    def _open(self, prompts: list[list[int]], num_tokens: int) -> int:
        """An empty context of fitting size; or the last one's prompts, all but their last token."""
        longest = len(prompts[0]) + num_tokens
        shape = (len(prompts), -(-longest // _ROUND_TOKENS) * _ROUND_TOKENS)
        if shape != self._shape:
            self._renew(*shape)
        memory = self._lib.llama_get_memory(self._context)
        num_cached = len(prompts[0]) - 1 if prompts == self._cached else 0
        for index in range(len(prompts)):
            self._lib.llama_memory_seq_rm(memory, index, num_cached, -1)
        self._cached = prompts
        return num_cached

    def _renew(self, num_sequences: int, num_tokens: int) -> None:
        if self._context is not None:
            self._lib.llama_free(self._context)
        params = self._lib.llama_context_default_params()
        params.n_ctx = num_sequences * num_tokens
        params.n_seq_max = num_sequences
        params.n_batch = _BATCH_TOKENS
        params.n_threads = params.n_threads_batch = self._num_threads
        self._context = self._lib.llama_init_from_model(self._model, params)
        assert self._context, "llama.cpp made no context"
        self._shape = (num_sequences, num_tokens)
        self._cached = []

    def _step(self, rows: list[tuple[int, int, int, bool]], watch: Stopwatch) -> None:
        batch = self._batch
        batch.n_tokens = len(rows)
        for row, (token_id, position, index, is_sampled) in enumerate(rows):
            batch.token[row] = token_id
            batch.pos[row] = position
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = index
            batch.logits[row] = is_sampled
        status = self._lib.llama_decode(self._context, batch)
        assert status == 0, f"llama_decode failed with {status}"
        for row, (_, _, index, is_sampled) in enumerate(rows):
            if is_sampled:
                found = self._lib.llama_get_logits_ith(self._context, row)
                address = ctypes.cast(found, ctypes.POINTER(ctypes.c_float))
                logits = np.ctypeslib.as_array(address, (self._vocab_size,))
                watch.take(index, [int(logits.argmax())])


if __name__ == "__main__":
    answers = claim_answers()
    answer(LlamaCpp(sys.argv[1], int(sys.argv[2]), sys.argv[3]), answers)
