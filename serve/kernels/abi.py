"""`csrc/shoal.h` as ctypes sees it: structures and signatures.

Not the kernels' documentation, which is the header's. The one decision behind it: every pointer is
an address (`c_void_p`), so `tensor.data_ptr()`, `ctypes.byref(structure)` and None all pass, and a
call costs no conversion.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import (
    CFUNCTYPE,
    c_char_p,
    c_double,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_void_p,
)

F32, BF16, F16 = 0, 1, 2

AllReduce = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int64)
Gather = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int64, c_void_p)


class Matrix(ctypes.Structure):
    """`shoal_matrix`."""

    _fields_ = (
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("num_outputs", c_int64),
        ("num_inputs", c_int64),
        ("dtype", c_int32),
    )


class Heads(ctypes.Structure):
    """`shoal_heads`."""

    _fields_ = (
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("block_size", c_int32),
        ("dtype", c_int32),
    )


class Span(ctypes.Structure):
    """`shoal_span`."""

    _fields_ = (
        ("first_row", c_int64),
        ("num_tokens", c_int64),
        ("first_position", c_int64),
        ("block_table", c_void_p),
    )


class Collectives(ctypes.Structure):
    """`shoal_collectives`."""

    _fields_ = (
        ("context", c_void_p),
        ("rank", c_int32),
        ("size", c_int32),
        ("all_reduce", AllReduce),
        ("gather", Gather),
    )


class Layer(ctypes.Structure):
    """`shoal_layer`."""

    _fields_ = (
        ("input_norm", c_void_p),
        ("qkv", Matrix),
        ("output", Matrix),
        ("ffn_norm", c_void_p),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("keys", c_void_p),
        ("values", c_void_p),
    )


class Decoder(ctypes.Structure):
    """`shoal_decoder`."""

    _fields_ = (
        ("hidden", c_int64),
        ("ffn", c_int64),
        ("num_layers", c_int64),
        ("eps", c_float),
        ("heads", Heads),
        ("layers", c_void_p),
        ("embedding", Matrix),
        ("first_token_id", c_int64),
        ("num_token_ids", c_int64),
        ("final_norm", c_void_p),
        ("head", Matrix),
        ("cos", c_void_p),
        ("sin", c_void_p),
    )


class Step(ctypes.Structure):
    """`shoal_step`."""

    _fields_ = (
        ("num_rows", c_int64),
        ("token_ids", c_void_p),
        ("spans", c_void_p),
        ("num_spans", c_int64),
        ("sampled_rows", c_void_p),
        ("num_sampled", c_int64),
        ("logits", c_void_p),
    )


class Sampling(ctypes.Structure):
    """`shoal_sampling`."""

    _fields_ = (
        ("temperature", c_float),
        ("top_p", c_float),
        ("min_p", c_float),
        ("repetition_penalty", c_float),
        ("presence_penalty", c_float),
        ("frequency_penalty", c_float),
        ("top_k", c_int32),
        ("num_logprobs", c_int32),
        ("number", c_double),
        ("mask", c_void_p),
        ("prompt_ids", c_void_p),
        ("num_prompt_ids", c_int64),
        ("output_ids", c_void_p),
        ("output_counts", c_void_p),
        ("num_output_ids", c_int64),
        ("bias_ids", c_void_p),
        ("biases", c_void_p),
        ("num_biases", c_int64),
        ("held_back_ids", c_void_p),
        ("num_held_back_ids", c_int64),
    )


STRUCTURES: Mapping[str, type[ctypes.Structure]] = {
    "shoal_matrix": Matrix,
    "shoal_heads": Heads,
    "shoal_span": Span,
    "shoal_collectives": Collectives,
    "shoal_layer": Layer,
    "shoal_decoder": Decoder,
    "shoal_step": Step,
    "shoal_sampling": Sampling,
}

_POOL = c_void_p
_ADDRESS = c_void_p


def _addresses(num: int) -> list[type]:
    return [_ADDRESS] * num


SIGNATURES: Mapping[str, tuple[type | None, list[type]]] = {
    "shoal_isa": (c_char_p, []),
    "shoal_source_hash": (c_char_p, []),
    "shoal_panel_width": (c_int, []),
    "shoal_prepare": (c_int, []),
    "shoal_pool_new": (_POOL, [c_int]),
    "shoal_pool_delete": (None, [_POOL]),
    "shoal_pool_size": (c_int, [_POOL]),
    "shoal_packed_bytes": (c_int64, [c_int32, c_int64, c_int64]),
    "shoal_pack": (
        c_int,
        [_POOL, _ADDRESS, c_int32, c_int64, c_int64, c_int64, _ADDRESS, c_int32, c_int64, c_int64],
    ),
    "shoal_unpack_rows": (None, [_POOL, _ADDRESS, _ADDRESS, c_int64, _ADDRESS]),
    "shoal_linear": (None, [_POOL, _ADDRESS, _ADDRESS, c_int64, c_int64, _ADDRESS, c_int64]),
    "shoal_linear_swiglu": (None, [_POOL, _ADDRESS, _ADDRESS, c_int64, c_int64, _ADDRESS, c_int64]),
    "shoal_add_rms_norm": (
        None,
        [_POOL, _ADDRESS, _ADDRESS, _ADDRESS, c_float, c_int64, c_int64, _ADDRESS],
    ),
    "shoal_cache_bytes": (c_int64, [_ADDRESS, c_int64]),
    "shoal_attend": (
        None,
        [_POOL, *_addresses(4), c_int64, *_addresses(4)],
    ),
    "shoal_group_bytes": (c_int64, [c_int32, c_int64]),
    "shoal_group_join": (c_void_p, [_ADDRESS, c_int32, c_int32, c_int64, c_int64]),
    "shoal_group_limit_silence": (None, [_ADDRESS, c_int64]),
    "shoal_group_leave": (None, [_ADDRESS]),
    "shoal_group_break": (None, [_ADDRESS, c_int32]),
    "shoal_group_failure": (c_int, [_ADDRESS, _ADDRESS]),
    "shoal_group_all_reduce": (c_int, [_ADDRESS, _ADDRESS, c_int64]),
    "shoal_group_gather": (c_int, [_ADDRESS, _ADDRESS, c_int64, _ADDRESS]),
    "shoal_forward": (c_int, [_POOL, _ADDRESS, _ADDRESS, _ADDRESS]),
    "shoal_sample": (
        None,
        [_POOL, _ADDRESS, c_int64, c_int64, _ADDRESS, c_int64, *_addresses(5), c_int64],
    ),
}
"""What each exported function returns and takes."""
