"""Compiles every Triton kernel for a GPU that need not be there; prints what each one takes.

Run by `test_kernels.py` in a process of its own: it puts a driver without a device under Triton.
The shape is that of Qwen2.5 7B, whose alignment decides how kernels are specialised.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from serve.kernels import triton_attention, triton_decoder, triton_sampling
from serve.kernels.device import Drawing, Places, Rules, Workspace

_SHARED_BYTES = 99 * 1024  # what a program may have on a GeForce of compute capability 8.9
_VOCAB = 152_064


class _DriverWithoutDevice:
    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _compile_all(dtype: torch.dtype, *, hidden: int, ffn: int, heads: int, kv_heads: int) -> None:
    head_dim = hidden // heads
    x, norm = torch.zeros(4, hidden), (torch.zeros(hidden), 1e-6)
    triton_decoder.rms_norm(x, *norm, dtype)
    triton_decoder.add_rms_norm(x, x.to(dtype), *norm)
    triton_decoder.silu_and_multiply(torch.zeros(4, 2 * ffn, dtype=dtype))
    keys = torch.zeros(8, 16, kv_heads, head_dim, dtype=dtype)
    places = Places(torch.zeros(4).int(), torch.zeros(4).int(), torch.zeros(5, 2048).int())
    qkv = torch.zeros(4, heads + 2 * kv_heads, head_dim, dtype=dtype)
    query = triton_decoder.rotate_and_store(qkv, torch.zeros(9, head_dim), places, keys, keys)
    weight, row = torch.zeros(64, hidden, dtype=dtype), torch.zeros(1, 64)
    triton_decoder.multiply_row(x[:1], weight, row.to(dtype), norm, torch.zeros(64))
    triton_decoder.multiply_row(x[:1].to(dtype), weight, row, is_added=True)
    triton_decoder.multiply_row(x[:1], weight, row, norm)
    triton_decoder.multiply_gate_up_row(x[:1], weight, norm)
    workspace = Workspace.make(
        max_rows=4,
        num_heads=heads,
        head_dim=head_dim,
        max_tokens=32_768,
        device=torch.device("cpu"),
    )
    triton_attention.attend_decodes(query, keys, keys, places, workspace, query)
    tiles = torch.zeros(3, 4).int()
    triton_attention.attend_tiles(query, keys, keys, places.block_tables, tiles, query)


def _compile_sampling() -> None:
    logits, column = torch.zeros(2, _VOCAB), torch.zeros(2)
    rules = Rules(
        column.int(),
        torch.zeros(2, 3),
        torch.zeros(3, _VOCAB, dtype=torch.bool),
        torch.zeros(3, _VOCAB, dtype=torch.int16),
        column.int(),
        torch.zeros(1, _VOCAB // 32).int(),
    )
    triton_sampling.adjust(logits, rules, _VOCAB - 399)
    drawing = Drawing(column, column.long(), column.double(), column, column.double())
    triton_sampling.draw(logits, drawing)


def main(capability: int) -> None:
    found: list[tuple[str, int]] = []

    def compile_only(self: Any, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            kernel = self.run(*args, grid=grid, warmup=True, **options)
            found.append((self.__name__, kernel.metadata.shared))

        return launch

    driver.set_active(_DriverWithoutDevice(capability))
    JITFunction.__getitem__ = compile_only
    _compile_all(torch.bfloat16, hidden=3584, ffn=18_944, heads=28, kv_heads=4)
    _compile_sampling()
    for name, shared in found:
        print(name, shared)
        assert shared <= _SHARED_BYTES, f"{name} wants {shared} bytes of shared memory"


if __name__ == "__main__":
    warnings.simplefilter("error")
    main(int(sys.argv[1]))
