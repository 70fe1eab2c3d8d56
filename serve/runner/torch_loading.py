"""From a plan to the torch reference on this machine's CPU; `.loading` chooses it."""

from __future__ import annotations

import torch

from serve.attention.paged import PagedAttention
from serve.model.qwen2 import Qwen2Model
from serve.model.weights import load

from .loaded_pass import LoadedPass
from .plan import RunnerPlan
from .torch_kv_pool import TorchKVPool
from .torch_pass import TorchPass


def load_torch(plan: RunnerPlan) -> LoadedPass:
    """See `.loading.load_pass`."""
    torch.set_num_threads(plan.num_threads)
    shape, size, dtype = plan.shape, plan.collectives.size, getattr(torch, plan.dtype)
    model = Qwen2Model(shape, plan.collectives, dtype=dtype, num_positions=plan.max_model_len)
    num_read_bytes = load(plan.checkpoint, model.cuts(), plan.on_progress)
    kv_pool = TorchKVPool(
        shape,
        size=size,
        num_blocks=plan.num_blocks(),
        block_size=plan.block_size,
        dtype=dtype,
    )
    attention = PagedAttention(
        kv_pool.keys, kv_pool.values, block_size=plan.block_size, num_heads=shape.num_heads // size
    )
    return LoadedPass(
        TorchPass(model, attention),
        pool=None,
        block_stride=1,
        kernels="torch",
        num_total_blocks=kv_pool.num_blocks,
        num_weight_bytes=sum(cut.into.num_bytes for cut in model.cuts()),
        num_read_bytes=num_read_bytes,
    )
