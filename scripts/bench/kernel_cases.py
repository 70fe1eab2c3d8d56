"""The kernels of a model's shape as calls that can be timed, each with what it must move and add.

Plain callers of the C ABI (`serve/kernels/csrc/shoal.h`). The one decision: what a real step finds
cold is cold here, too. Weights are as many copies, and the KV pool as many blocks, as overflow
every cache of the CPU, and each call takes the next ones.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from serve.catalog import ModelShape
from serve.kernels import abi
from serve.kernels.native import Pool
from serve.kernels.native_attention import SPAN_DTYPE, attend, attention_heads
from serve.kernels.native_sampling import SAMPLING_DTYPE
from serve.runner.kv_pool import NativeKVPool

LINEAR_ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 1_024)
NORM_ROWS = (1, 16, 512)
SAMPLED_ROWS = (1, 16)
DECODE_CONTEXTS = ((1, 512), (1, 2_048), (1, 8_192), (1, 32_768), (16, 512), (16, 2_048))
CHUNK_TOKENS = 512
CHUNK_STARTS = (0, 2_048, 8_192)
BLOCK_SIZE = 16
_COLD_BYTES = 256 << 20
_HUGE_PAGE = 2 << 20
_BFLOAT16_BYTES = 2


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel at one size: `call` runs it once; bytes and operations are the least it needs.

    `is_cold`: its data comes from memory, as in a step; else from the CPU's caches.
    """

    kernel: str
    size: str
    call: Callable[[], object]
    num_bytes: float
    num_operations: float
    is_cold: bool = True


@dataclass(frozen=True, slots=True)
class _Linear:
    name: str
    num_inputs: int
    num_outputs: int
    is_swiglu: bool = False


def linear_cases(pool: Pool, shape: ModelShape, *, rows: tuple[int, ...]) -> Iterator[Case]:
    """Every projection of a layer, and the head."""
    heads = shape.num_heads * shape.head_dim
    key_values = 2 * shape.num_kv_heads * shape.head_dim
    for linear in (
        _Linear("qkv", shape.hidden, heads + key_values),
        _Linear("output", heads, shape.hidden),
        _Linear("gate_up", shape.hidden, 2 * shape.ffn, is_swiglu=True),
        _Linear("down", shape.ffn, shape.hidden),
        _Linear("head", shape.hidden, shape.vocab_size),
    ):
        weights = _Weights(pool, linear)
        for num_rows in rows:
            yield weights.case(num_rows)


class _Weights:
    """Copies of one packed weight, used in turn."""

    def __init__(self, pool: Pool, linear: _Linear) -> None:
        self._pool = pool
        self._linear = linear
        functions = pool.library.functions
        width = pool.library.panel_width
        self._num_outputs = -(-linear.num_outputs // width) * width
        size = functions.shoal_packed_bytes(abi.BF16, self._num_outputs, linear.num_inputs)
        self._num_bytes = size
        stride = -(-size // _HUGE_PAGE) * _HUGE_PAGE
        num_copies = max(2, _COLD_BYTES // size)
        self._memory, first = _huge(num_copies * stride)
        source = _random_bfloat16(self._num_outputs, linear.num_inputs)
        is_finite = functions.shoal_pack(
            *(pool.handle, first, abi.BF16, linear.num_inputs, 0, 1),
            *(source.ctypes.data, abi.BF16, self._num_outputs, linear.num_inputs),
        )
        assert is_finite, "random weights are finite"
        for copy in range(1, num_copies):
            ctypes.memmove(first + copy * stride, first, size)
        self._matrices = itertools.cycle(
            [
                abi.Matrix(
                    first + copy * stride, None, self._num_outputs, linear.num_inputs, abi.BF16
                )
                for copy in range(num_copies)
            ]
        )

    def case(self, num_rows: int) -> Case:
        """A product with `num_rows` rows."""
        linear, functions = self._linear, self._pool.library.functions
        num_outputs = self._num_outputs // 2 if linear.is_swiglu else self._num_outputs
        x = _random(num_rows, linear.num_inputs)
        out = np.empty((num_rows, num_outputs), np.float32)
        kernel = functions.shoal_linear_swiglu if linear.is_swiglu else functions.shoal_linear

        def call() -> None:
            kernel(
                *(self._pool.handle, ctypes.byref(next(self._matrices)), x.ctypes.data),
                *(linear.num_inputs, num_rows, out.ctypes.data, num_outputs),
            )

        operations = 2 * num_rows * linear.num_inputs * linear.num_outputs
        return Case(linear.name, f"{num_rows} rows", call, self._num_bytes, operations)


def attention_cases(pool: Pool, shape: ModelShape) -> Iterator[Case]:
    """Decoding at several contexts, and chunks of a prompt behind several starts."""
    spans = [(batch, 1, context - 1) for batch, context in DECODE_CONTEXTS]
    spans += [(1, CHUNK_TOKENS, start) for start in CHUNK_STARTS]
    longest = max(batch * (tokens + start + BLOCK_SIZE) for batch, tokens, start in spans)
    heads = attention_heads(
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        block_size=BLOCK_SIZE,
        dtype=abi.BF16,
    )
    num_blocks = -(-longest // BLOCK_SIZE)
    kv_pool = NativeKVPool(pool.library, heads, num_layers=shape.num_layers, num_blocks=num_blocks)
    # What was never written is one page of zeros, which would not be cold.
    ctypes.memset(kv_pool.memory.address, 0, kv_pool.memory.num_bytes)
    for batch, num_tokens, start in spans:
        yield _attention_case(pool, heads, kv_pool, batch=batch, num_tokens=num_tokens, start=start)


def _attention_case(
    pool: Pool,
    heads: abi.Heads,
    kv_pool: NativeKVPool,
    *,
    batch: int,
    num_tokens: int,
    start: int,
) -> Case:
    context = start + num_tokens
    num_blocks = -(-context // BLOCK_SIZE)
    num_copies = kv_pool.num_blocks // (batch * num_blocks)
    order = np.arange(num_copies * batch * num_blocks, dtype=np.int32)
    tables = order.reshape(-1, num_blocks) * kv_pool.block_stride
    spans = np.zeros((num_copies, batch), SPAN_DTYPE)
    spans["first_row"] = np.arange(batch) * num_tokens
    spans["num_tokens"], spans["first_position"] = num_tokens, start
    spans.ravel()["block_table"] = [table.ctypes.data for table in tables]
    width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    qkv = _random(batch * num_tokens, width)
    cos = np.ones((context, heads.head_dim // 2), np.float32)
    sin = np.zeros_like(cos)
    # As steps do: all layers of some blocks before the next ones.
    turns = itertools.cycle(itertools.product(range(num_copies), range(len(kv_pool.caches))))

    def call() -> None:
        assert len(tables) == num_copies * batch  # spans hold their addresses
        copy, layer = next(turns)
        attend(pool, heads, kv_pool.caches[layer], spans=spans[copy], qkv=qkv, cos=cos, sin=sin)

    kept = batch * 2 * heads.num_kv_heads * heads.head_dim * context * _BFLOAT16_BYTES
    seen = batch * num_tokens * (start + (num_tokens + 1) / 2)
    operations = 4 * heads.num_heads * heads.head_dim * seen
    name = "decode" if num_tokens == 1 else f"chunk of {num_tokens}"
    return Case(f"attention, {name}", f"{batch} x {context:,}", call, kept, operations)


def norm_cases(pool: Pool, shape: ModelShape) -> Iterator[Case]:
    """The residual's sum with its norm. What it touches is warm, as in a step."""
    functions = pool.library.functions
    weight = np.ones(shape.hidden, np.float32)
    for num_rows in NORM_ROWS:
        residual, delta = _random(num_rows, shape.hidden), 0 * _random(num_rows, shape.hidden)
        out = np.empty_like(residual)

        def call(
            residual: np.ndarray = residual, delta: np.ndarray = delta, out: np.ndarray = out
        ) -> None:
            functions.shoal_add_rms_norm(
                *(pool.handle, residual.ctypes.data, delta.ctypes.data, weight.ctypes.data),
                *(1e-6, len(residual), residual.shape[1], out.ctypes.data),
            )

        yield Case("norm", f"{num_rows} rows", call, 4 * residual.nbytes, 6 * residual.size, False)


def sampling_cases(pool: Pool, shape: ModelShape) -> Iterator[Case]:
    """Greedy, and as Qwen2.5's own generation_config says."""
    functions = pool.library.functions
    for name, fields in (
        ("greedy", {"temperature": 0.0}),
        ("sampled", {"temperature": 0.7, "top_p": 0.8, "top_k": 20}),
    ):
        for num_rows in SAMPLED_ROWS:
            rows = np.zeros(num_rows, SAMPLING_DTYPE)
            settings = {"top_p": 1.0, "repetition_penalty": 1.0, "num_logprobs": -1, "number": 0.5}
            for field, value in {**settings, **fields}.items():
                rows[field] = value
            logits = _random(num_rows, shape.vocab_size)
            token_ids, errors = np.zeros((2, num_rows), np.int32)

            def call(
                rows: np.ndarray = rows,
                logits: np.ndarray = logits,
                token_ids: np.ndarray = token_ids,
                errors: np.ndarray = errors,
            ) -> None:
                functions.shoal_sample(
                    *(pool.handle, logits.ctypes.data, logits.shape[1], logits.shape[1]),
                    *(rows.ctypes.data, len(rows), token_ids.ctypes.data, errors.ctypes.data),
                    *(None, None, None, 0),
                )

            yield Case(
                f"sampling, {name}", f"{num_rows} rows", call, logits.nbytes, logits.size, False
            )


def _huge(num_bytes: int) -> tuple[mmap.mmap, int]:
    """Memory in huge pages, and the address of its first whole one."""
    memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE)
    memory.madvise(mmap.MADV_HUGEPAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return memory, -(-address // _HUGE_PAGE) * _HUGE_PAGE


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _random_bfloat16(*shape: int) -> np.ndarray:
    """The bits of bfloat16 numbers; rows repeat, which no kernel can know."""
    some = (_random(min(64, shape[0]), *shape[1:]).view(np.uint32) >> 16).astype(np.uint16)
    return np.resize(some, shape)
