"""How fast is this machine: a fixed batch on one device, without Ray, HTTP or an engine.

    python -m serve.runner.offline CHECKPOINT --batch 8
    python -m serve.runner.offline --random-shape qwen2.5-7b --device cuda --batch 64

With `--random-shape` the weights are made on the device, so a bare machine measures a model that it
does not have. The measuring is `.offline_batch`'s, which scripts import.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .cuda import CudaRunner
    from .model_runner import ModelRunner
    from .offline_batch import Speed

_DTYPES = ("bfloat16", "float16", "float32")
_SHAPES = ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m serve.runner.offline",
        description="Prefill and decode speed of a fixed batch on one device, without Ray.",
    )
    parser.add_argument("checkpoint", nargs="?", type=Path, help="folder of the model")
    parser.add_argument(
        "--random-shape",
        choices=[*(f"qwen2.5-{size}" for size in _SHAPES), "tiny"],
        help="random weights of this shape instead",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default 1)")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="of each (default 512)")
    parser.add_argument("--new-tokens", type=int, default=128, help="of each (default 128)")
    parser.add_argument("--token-budget", type=int, default=4096, help="of a prefill step")
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, help="1: ranks need Ray, as `shoal up` gives it"
    )
    parser.add_argument(
        "--kernels",
        choices=("auto", "triton", "torch"),
        default="auto",
        help="auto: Triton on a GPU, C++ for a checkpoint on a CPU",
    )
    parser.add_argument("--no-graphs", action="store_true", help="launch each kernel by itself")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if (options.checkpoint is None) == (options.random_shape is None):
        parser.error("give a checkpoint or --random-shape, one of the two")
    if options.tensor_parallel != 1:
        parser.error("--tensor-parallel must be 1: ranks need Ray, as `shoal up` gives it")
    for name in ("batch", "prompt_tokens", "new_tokens", "token_budget"):
        if getattr(options, name) < 1 + (name == "new_tokens"):
            parser.error(f"--{name.replace('_', '-')} is too small: {getattr(options, name)}")
    return options


def _load(
    options: argparse.Namespace, device: torch.device, max_model_len: int
) -> tuple[CudaRunner | ModelRunner, int]:
    """The runner that a replica would have, and the bytes that a one-row step reads."""
    from .offline_batch import load_offline_runner, make_offline_runner, random_shape

    if device.type == "cpu" and options.checkpoint is not None and options.kernels == "auto":
        return load_offline_runner(
            options.checkpoint,
            dtype=options.dtype,
            max_running_sequences=options.batch,
            max_model_len=max_model_len,
        )
    return make_offline_runner(
        options.checkpoint or random_shape(options.random_shape),
        device=device,
        dtype=options.dtype,
        max_running_sequences=options.batch,
        max_model_len=max_model_len,
        token_budget=options.token_budget,
        kernels=options.kernels,
        has_graphs=False if options.no_graphs else None,
    )


def main(arguments: list[str]) -> int:
    """The command; returns its exit status."""
    options = _parse(arguments)
    import torch

    from serve.errors import ShoalError

    from .offline_batch import generate, random_prompts

    has_gpu = torch.cuda.is_available()
    device = torch.device(options.device or ("cuda" if has_gpu else "cpu"))
    if device.type == "cpu" and options.dtype == "float16":
        print("error: float16 needs a GPU: choose bfloat16 or float32", file=sys.stderr)  # noqa: T201
        return 1
    max_model_len = options.prompt_tokens + options.new_tokens
    try:
        runner, num_step_bytes = _load(options, device, max_model_len)
    except ShoalError as exc:
        print(f"error: {exc}", file=sys.stderr)  # noqa: T201
        return 1
    prompts = random_prompts(options.batch, options.prompt_tokens, runner.facts.vocab_size)
    for _ in range(2):  # the first round compiles what prompts need
        _, speed = generate(
            runner,
            prompts,
            num_new_tokens=options.new_tokens,
            token_budget=options.token_budget,
            max_model_len=max_model_len,
        )
    _print(speed, runner, device, num_step_bytes, is_json=options.json)
    return 0


def _print(
    speed: Speed,
    runner: CudaRunner | ModelRunner,
    device: torch.device,
    num_step_bytes: int,
    *,
    is_json: bool,
) -> None:
    read = num_step_bytes * speed.decode_tokens_per_s / speed.batch
    if is_json:
        facts = {"kernels": runner.facts.kernels, "device": str(device)}
        print(json.dumps({**facts, **speed.report(), "weight_bytes_per_s": read}))  # noqa: T201
        return
    print(  # noqa: T201
        f"{device}, {runner.facts.kernels} kernels, batch {speed.batch}:"
        f" prefill {speed.prefill_tokens_per_s:,.1f} tok/s,"
        f" decode {speed.decode_tokens_per_s:,.1f} tok/s"
        f" (weights read at {read / 1e9:,.1f} GB/s)"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
