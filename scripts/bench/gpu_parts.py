"""The parts of `scripts.bench.gpu`, one a process: what each measures, kept as it is found.

Not the budget nor the summary. The one decision behind it: a finding is on disk before the next one
begins, so a kernel that hangs or a context that breaks costs what comes after it in its part, and
nothing of other parts.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_NUM_ROUNDS = 3
# Products of one row: name, outputs and inputs of the 7B shape.
_ROW_SHAPES = {
    "qkv": (4608, 3584),
    "output": (3584, 3584),
    "gate_up": (37_888, 3584),
    "down": (3584, 18_944),
    "head": (152_064, 3584),
}
_ROW_VARIANTS = ((2, 1024, 4), (4, 512, 2), (4, 1024, 4), (8, 512, 4), (4, 512, 1), (8, 256, 1))


class Bench:
    """Parts of the measurement on one device.

    Args:
        shape: of the model, see `serve.runner.offline`.
        is_rehearsal: on the CPU, a tiny shape.
        limits: what the part of that name found, empty where it failed.
        path: file of the findings.
    """

    def __init__(
        self, *, shape: str, is_rehearsal: bool, limits: dict[str, float], path: Path
    ) -> None:
        import torch

        self.is_rehearsal = is_rehearsal
        self.device = torch.device("cpu" if is_rehearsal else "cuda")
        self.dtype_name = "float32" if is_rehearsal else "bfloat16"
        self.dtype = getattr(torch, self.dtype_name)
        self.shape = shape
        self.found: dict[str, Any] = {}
        self._card = limits
        self._path = path

    def run(self, name: str) -> None:
        """Run one part; an error is a result too, beside what was found before it."""
        try:
            self._parts()[name]()
        except Exception:  # its text may be all that comes back from that machine
            self.keep("error", traceback.format_exc())

    def _parts(self) -> dict[str, Callable[[], None]]:
        return {
            "environment": self.environment,
            "limits": self.limits,
            "decode": lambda: self.decode(has_graphs=True),
            "agreement": self.agreement,
            "prefill": self.prefill,
            "decode without graphs": lambda: self.decode(has_graphs=False),
            "row products": self.row_products,
            "long context": self.long_context,
            "kernels against their twins": self.kernels_agree,
        }

    def keep(self, name: str, value: Any) -> None:
        """Print one finding and write all so far: whatever comes next, this much is there."""
        self.found[name] = value
        print(line_of(name, value), flush=True)
        beside = self._path.with_suffix(".part")
        beside.write_text(json.dumps(self.found, indent=1))
        beside.replace(self._path)  # at once: this process may be ended at any time

    # Limits of the card.

    def environment(self) -> None:
        """What runs.

        Raises:
            RuntimeError: there is no GPU.
        """
        import torch

        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("no GPU that torch can use: --rehearse runs on the CPU")
        found: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0]}
        if importlib.util.find_spec("triton"):
            import triton

            found["triton"] = triton.__version__
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(0)
            found["gpu"] = properties.name
            found["memory_gb"] = round(properties.total_memory / 1e9, 1)
        for name, value in found.items():
            self.keep(name, value)

    def limits(self) -> None:
        """Bytes read a second by a maximum over memory, copied, and operations of a product."""
        import torch

        num_values = (1 << 22) if self.is_rehearsal else (1 << 32)
        memory = torch.ones(num_values, dtype=self.dtype, device=self.device)
        read_s = self._seconds(lambda: memory.view(-1, 4096).amax(dim=1))
        self.keep("read_gb_per_s", memory.nbytes / read_s / 1e9)
        copy_s = self._seconds(memory.clone)
        self.keep("copy_gb_per_s", 2 * memory.nbytes / copy_s / 1e9)
        self.keep("limit_gb_per_s", max(self.found["read_gb_per_s"], self.found["copy_gb_per_s"]))
        side = 256 if self.is_rehearsal else 8192
        square = torch.randn(side, side, device=self.device).to(self.dtype)
        product_s = self._seconds(lambda: square @ square)
        self.keep("bf16_tflops", 2 * side**3 / product_s / 1e12)

    def _seconds(self, work: Callable[[], Any], repeats: int = 10) -> float:
        """Median of `work`, by events on a GPU."""
        import torch

        work()
        taken = []
        for _ in range(repeats):
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                work()
                end.record()
                end.synchronize()
                taken.append(start.elapsed_time(end) / 1e3)
            else:
                began_s = time.perf_counter()
                work()
                taken.append(time.perf_counter() - began_s)
        return statistics.median(taken)

    # Kernels.

    def kernels_agree(self) -> None:
        """The tests of the kernels, run on this device against their twins."""
        if importlib.util.find_spec("pytest") is None:
            self.keep("skipped", "pytest is not installed")
            return
        root = Path(__file__).resolve().parents[2]
        command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider",
                   "-o", "addopts=--import-mode=importlib", "-o", "filterwarnings=",
                   str(root / "tests" / "cuda" / "kernel_cases.py")]  # fmt: skip
        if self.is_rehearsal:
            command.append("--collect-only")
        result = subprocess.run(command, cwd=root, capture_output=True, text=True)
        if result.returncode:
            self.keep("error", result.stdout[-3000:] + result.stderr[-1000:])
        else:
            self.keep("pytest", result.stdout.strip().splitlines()[-1])

    def row_products(self) -> None:
        """GB/s of products of one row: our kernel in several sizes, and torch's."""
        if self.is_rehearsal:
            self.keep("skipped", "needs a GPU")
            return
        import torch
        from torch.nn.functional import linear

        from serve.kernels import triton_decoder

        for name, (num_outputs, num_inputs) in _ROW_SHAPES.items():
            # Several weights in turn, so that none is still in the cache.
            num_weights = max(2, (1 << 29) // (2 * num_outputs * num_inputs))
            weights = torch.randn(num_weights, num_outputs, num_inputs, device=self.device,
                                  dtype=self.dtype)  # fmt: skip
            x = torch.randn(1, num_inputs, device=self.device)
            out, narrow = x.new_empty(1, num_outputs), x.to(self.dtype)

            def per_second(product: Callable[[Any], Any], weights: Any = weights) -> float:
                def everything() -> None:
                    for weight in weights:
                        product(weight)

                return float(weights.nbytes / self._graph_seconds(everything) / 1e9)

            found = {"torch": per_second(lambda w, x=narrow: linear(x, w))}
            for variant in _ROW_VARIANTS:
                sizes = dict(zip(("ROWS", "COLUMNS", "num_warps"), variant, strict=True))

                def product(w: Any, sizes: Any = sizes, x: Any = x, out: Any = out) -> None:
                    triton_decoder.row_product_kernel[(-(-len(w) // sizes["ROWS"]),)](
                        x, w, x, x, out, w.shape[1], len(w), 1e-6, HAS_NORM=False, HAS_BIAS=False,
                        IS_ADDED=False, enable_fp_fusion=True, **sizes,
                    )  # fmt: skip

                found["rows {} columns {} warps {}".format(*variant)] = per_second(product)
            self.keep(name, found)

    def _graph_seconds(self, work: Callable[[], Any]) -> float:
        """Median of the replays of a graph of `work`, without the host's launches."""
        import torch

        work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return self._seconds(graph.replay)

    # The model.

    def decode(self, *, has_graphs: bool) -> None:
        """Decode speed by batch size, and the share of the bandwidth limit that it is."""
        batches = (1, 3) if self.is_rehearsal else (1, 64, 8, 32, 2, 4, 16)
        num_prompt, num_new = (16, 8) if self.is_rehearsal else (128, 129)
        runner, num_step_bytes = self._runner(max(batches), num_prompt + num_new, has_graphs)
        self.keep("kernels", runner.facts.kernels)
        limit = self._card.get("limit_gb_per_s")
        for batch in batches if has_graphs else (1, max(batches)):
            speed = self._median(runner, batch, num_prompt, num_new, by="decode_s")
            steps_per_s = speed.decode_tokens_per_s / batch
            row = {
                "tokens_per_s": speed.decode_tokens_per_s,
                "step_ms": 1e3 / steps_per_s,
                "weights_gb_per_s": num_step_bytes * steps_per_s / 1e9,
            }
            if limit:
                row["share_of_limit"] = row["weights_gb_per_s"] / limit
            self.keep(f"batch {batch}", row)

    def prefill(self) -> None:
        """Prompt tokens a second, and the share of the products' limit that they are."""
        sizes = ((2, 40),) if self.is_rehearsal else ((1, 2048), (8, 1024), (1, 512), (1, 8192))
        budget = max(batch * length for batch, length in sizes)
        length = max(length for _, length in sizes)
        runner, num_step_bytes = self._runner(max(b for b, _ in sizes), length + 2, True, budget)
        limit = self._card.get("bf16_tflops")
        for batch, num_prompt in sizes:
            speed = self._median(runner, batch, num_prompt, 2, by="prefill_s")
            # Two operations a weight and token; the head's rows are few.
            tflops = speed.prefill_tokens_per_s * num_step_bytes / self.dtype.itemsize * 2 / 1e12
            row = {"tokens_per_s": speed.prefill_tokens_per_s, "tflops": tflops}
            if limit:
                row["share_of_limit"] = tflops / limit
            self.keep(f"{batch} x {num_prompt}", row)

    def long_context(self) -> None:
        """Decode speed at one sequence by the length of its context."""
        lengths = (64,) if self.is_rehearsal else (1024, 8192, 30_000)
        num_new = 8 if self.is_rehearsal else 65
        runner, _ = self._runner(1, max(lengths) + num_new, True, 4096)
        for length in lengths:
            speed = self._median(runner, 1, length, num_new, by="decode_s")
            self.keep(f"{length} tokens", {"tokens_per_s": speed.decode_tokens_per_s})

    def _runner(
        self, max_rows: int, max_tokens: int, has_graphs: bool, token_budget: int = 4096
    ) -> tuple[Any, int]:
        from serve.runner.offline_batch import make_offline_runner, random_shape

        self._max_tokens, self._token_budget = max_tokens, token_budget
        return make_offline_runner(
            random_shape("tiny" if self.is_rehearsal else self.shape),
            device=self.device,
            dtype=self.dtype_name,
            max_running_sequences=max_rows,
            max_model_len=max_tokens,
            token_budget=token_budget,
            has_graphs=has_graphs and not self.is_rehearsal,
        )

    def _median(self, runner: Any, batch: int, num_prompt: int, num_new: int, *, by: str) -> Any:
        """The median of a few rounds by one of their times; the first does not count."""
        from serve.runner.offline_batch import generate, random_prompts

        speeds = [
            generate(
                runner,
                random_prompts(batch, num_prompt, runner.facts.vocab_size),
                num_new_tokens=num_new,
                token_budget=self._token_budget,
                max_model_len=self._max_tokens,
            )[1]
            for _ in range(1 + _NUM_ROUNDS)
        ]
        return sorted(speeds[1:], key=lambda speed: getattr(speed, by))[_NUM_ROUNDS // 2]

    # Text.

    def agreement(self) -> None:
        """Greedy text of the shipped demo model: this device against the CPU's reference, and a
        batch of 16 against each of its sequences alone."""
        import serve.demo
        from serve.runner.offline_batch import generate, make_offline_runner, random_prompts

        folder = Path(str(serve.demo.__file__)).parent
        num_new = 8 if self.is_rehearsal else 64
        for dtype in ("float32", "bfloat16"):
            prompts = random_prompts(16, 32, 200)
            options = {
                "num_new_tokens": num_new,
                "token_budget": 4096,
                "max_model_len": 32 + num_new,
            }
            runner, _ = make_offline_runner(
                folder,
                device=self.device,
                dtype=dtype,
                max_running_sequences=16,
                max_model_len=32 + num_new,
                token_budget=4096,
            )
            together = generate(runner, prompts, **options)[0]
            alone = [generate(runner, [prompt], **options)[0][0] for prompt in prompts]
            reference = _reference(folder, dtype, runner.facts.vocab_size, 32 + num_new)
            cpu = generate(reference, prompts, **options)[0]
            self.keep(f"{dtype}, against the CPU", _agreement(together, cpu))
            self.keep(f"{dtype}, batch of 16 against 1", _agreement(together, alone))


def _reference(folder: Path, dtype: str, vocab_size: int, max_model_len: int) -> Any:
    """The CPU's reference runner."""
    import torch

    from serve.model.tensor_parallel import SingleRank
    from serve.runner.loading import load_runner

    return load_runner(
        path=folder,
        collectives=SingleRank(),
        dtype=dtype,
        block_size=16,
        num_threads=torch.get_num_threads(),
        num_real_tokens=vocab_size,
        eos_token_ids=(),
        max_running_sequences=16,
        token_budget=512,
        kernels="torch",
        kv_cache_tokens=16 * (-(-max_model_len // 16)) * 16,
        max_model_len=max_model_len,
    )


def _agreement(found: list[list[int]], wanted: list[list[int]]) -> dict[str, Any]:
    """How many texts are equal, and how many tokens come before the first difference."""
    pairs = list(zip(found, wanted, strict=True))
    same = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in pairs
    ]
    return {
        "equal_texts": sum(x == y for x, y in pairs),
        "texts": len(pairs),
        "equal_tokens_share": sum(same) / sum(len(x) for x in found),
    }


def line_of(name: str, value: Any) -> str:
    """One finding as a line of a table."""
    values = value if isinstance(value, dict) else {"": value}
    text = "  ".join(f"{key} {_number(number)}".strip() for key, number in values.items())
    return f"{name:28s} {text}"


def _number(value: Any) -> str:
    return f"{value:,.3g}" if isinstance(value, float) and abs(value) < 100 else (
        f"{value:,.0f}" if isinstance(value, float) else str(value)
    )  # fmt: skip
