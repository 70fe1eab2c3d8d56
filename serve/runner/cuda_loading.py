"""From a plan to a runner on a device: weights, memory for the KV cache, graphs.

The one decision behind it: the KV cache gets what is left below a share of the card, measured after
the weights are there and the largest steps have run once, so that no later step needs more.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from serve.attention.cuda import DeviceAttention, DeviceCache
from serve.catalog import num_shard_kv_heads
from serve.errors import ConfigurationError
from serve.kernels.device import DeviceKernels, DeviceKernelsChoice, Workspace, load_device_kernels
from serve.kernels.dtypes import BYTES_PER_VALUE
from serve.limits import GPU_MARGIN
from serve.model.cuda_qwen2 import CudaQwen2
from serve.model.weights import load

from .cuda import CudaRunner
from .cuda_pass import CudaPass
from .cuda_sampler import DeviceSampler
from .cuda_tables import DeviceTables
from .cuda_warm_up import explained, warm_up
from .model_runner import RunnerFacts
from .plan import RunnerPlan

logger = logging.getLogger("shoal.runner")

# What a captured graph takes beside its tensors: its nodes and their arguments.
_GRAPH_BYTES = 16 << 20
_CPU_KV_TOKENS = 16_384
# A batch's logits in float32: the graphs' own, and copies that sampling makes at its worst.
_LOGITS_COPIES = 9


@dataclass(frozen=True, slots=True)
class DeviceOptions:
    """How to run on a device, beside what every runner is told.

    Attributes:
        device: "cuda" takes the first one that the process sees; "cpu" is for tests.
        token_budget: most rows of a step, beside decodes.
        kernels: see `serve.kernels.device`.
        has_graphs: CUDA graphs for decodes; None: on a GPU with Triton.
        check_group: raises where the group of ranks is broken.
    """

    device: torch.device
    token_budget: int
    kernels: DeviceKernelsChoice = "auto"
    has_graphs: bool | None = None
    check_group: Callable[[], None] | None = None


def load_cuda_runner(plan: RunnerPlan, options: DeviceOptions) -> CudaRunner:
    """Load this rank's part of the model onto its device.

    Raises:
        CheckpointError: the folder cannot be used.
        ConfigurationError: no such device, or its memory does not hold the model.
        CollectiveError: another rank is gone.
    """
    check_device(options.device)
    kernels = load_device_kernels(options.device, options.kernels)
    with torch.inference_mode():
        model = make_model(plan, kernels, options.device)
        num_read_bytes = load(plan.checkpoint, model.cuts(), plan.on_progress)
        model.finish()
        return make_runner(plan, model, kernels, options, num_read_bytes=num_read_bytes)


def check_device(device: torch.device) -> None:
    """Whether there is such a device.

    Raises:
        ConfigurationError: there is none.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            "hardware.device is cuda, but this process sees no GPU that torch can use: check"
            " nvidia-smi, or set `hardware: cpu`"
        )


def make_model(plan: RunnerPlan, kernels: DeviceKernels, device: torch.device) -> CudaQwen2:
    """An empty model on `device`.

    Raises:
        ConfigurationError: its memory does not hold the weights.
    """
    # cuBLAS would add parts of a long sum in the narrow type: the reference never does.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    try:
        return CudaQwen2(
            plan.shape,
            plan.collectives,
            kernels.decoder,
            dtype=getattr(torch, plan.dtype),
            num_positions=plan.max_model_len,
            device=device,
        )
    except torch.OutOfMemoryError as exc:
        num_params = plan.shape.num_shard_params(plan.collectives.size)
        num_bytes = num_params * BYTES_PER_VALUE[plan.dtype]
        raise ConfigurationError(
            f"the weights of a shard need {num_bytes / 1e9:.1f} GB, which this GPU does not have"
            " free: use a larger tensor_parallel, or a smaller model"
        ) from exc


def make_runner(
    plan: RunnerPlan,
    model: CudaQwen2,
    kernels: DeviceKernels,
    options: DeviceOptions,
    *,
    num_read_bytes: int = 0,
) -> CudaRunner:
    """A runner over `model`, which is loaded: measures, takes the KV cache, captures graphs.

    Raises:
        ConfigurationError: not even one block fits, or no room is left for steps or graphs.
    """
    has_graphs = options.has_graphs
    if has_graphs is None:
        has_graphs = options.device.type == "cuda" and kernels.name == "triton"
    most_sequences = f"engine.max_running_sequences ({plan.max_running_sequences})"
    parts = _Parts(plan, model, kernels, options.device)
    num_blocks = _num_blocks(plan, parts, options)
    tables, forward = parts.make(num_blocks, has_graphs=has_graphs)
    warm_up(
        forward, options.device, token_budget=options.token_budget, max_model_len=plan.max_model_len
    )
    with explained("capturing CUDA graphs", most_sequences):
        forward.graphs.capture()
    sampling = plan.make_sampling()
    sampler = DeviceSampler(
        kernels.sampling,
        sampling=sampling,
        tables=tables,
        num_ids=plan.num_real_tokens,
        device=options.device,
    )
    if plan.collectives.rank == 0:
        with explained("sampling", most_sequences):
            sampler.warm_up(plan.max_running_sequences, plan.shape.vocab_size)
    logger.info("kernels: %s, CUDA graphs: %s", kernels.name, "on" if has_graphs else "off")
    return CudaRunner(
        forward,
        sampler,
        collectives=plan.collectives,
        check_group=options.check_group,
        sequences=plan.make_sequences(),
        sampling=sampling,
        tables=tables,
        facts=RunnerFacts(
            kernels=kernels.name,
            num_total_blocks=num_blocks,
            max_model_len=plan.max_model_len,
            vocab_size=plan.shape.vocab_size,
            num_weight_bytes=model.num_weight_bytes,
            num_read_bytes=num_read_bytes,
        ),
        device=options.device,
    )


class _Parts:
    """What a runner is made of, for a given number of blocks."""

    def __init__(
        self, plan: RunnerPlan, model: CudaQwen2, kernels: DeviceKernels, device: torch.device
    ) -> None:
        self._plan = plan
        self._model = model
        self._kernels = kernels
        self.device = device
        size = plan.collectives.size
        self._num_heads = plan.shape.num_heads // size
        self._num_kv_heads = num_shard_kv_heads(plan.shape, size)

    @property
    def num_block_bytes(self) -> int:
        """Memory of one block on this rank."""
        shape, plan = self._plan.shape, self._plan
        values = 2 * shape.num_layers * self._num_kv_heads * shape.head_dim
        return values * plan.block_size * BYTES_PER_VALUE[plan.dtype]

    def make(self, num_blocks: int, *, has_graphs: bool) -> tuple[DeviceTables, CudaPass]:
        """Tables and a pass over a cache of so many blocks.

        Raises:
            ConfigurationError: the device does not hold so many blocks.
        """
        try:
            return self._make(num_blocks, has_graphs=has_graphs)
        except torch.OutOfMemoryError as exc:
            num_bytes = num_blocks * self.num_block_bytes
            raise ConfigurationError(
                f"engine.kv_cache_tokens: {num_blocks * self._plan.block_size} tokens need"
                f" {num_bytes / 1e9:.1f} GB, which the GPU does not have free: ask for fewer,"
                ' or write "auto"'
            ) from exc

    def _make(self, num_blocks: int, *, has_graphs: bool) -> tuple[DeviceTables, CudaPass]:
        plan, shape, max_rows = self._plan, self._plan.shape, self._plan.max_running_sequences
        cache = DeviceCache.make(
            num_layers=shape.num_layers,
            num_blocks=num_blocks,
            block_size=plan.block_size,
            num_kv_heads=self._num_kv_heads,
            head_dim=shape.head_dim,
            dtype=getattr(torch, plan.dtype),
            device=self.device,
        )
        workspace = Workspace.make(
            max_rows=max_rows,
            num_heads=self._num_heads,
            head_dim=shape.head_dim,
            max_tokens=plan.max_model_len,
            device=self.device,
        )
        tables = DeviceTables(
            max_slots=max_rows,
            max_blocks=-(-plan.max_model_len // plan.block_size),
            scratch_block=num_blocks,
            vocab_size=shape.vocab_size if plan.collectives.rank == 0 else 0,
            device=self.device,
        )
        attention = DeviceAttention(self._kernels.attention, cache, workspace)
        forward = CudaPass(
            self._model,
            attention,
            tables,
            max_rows=max_rows,
            device=self.device,
            has_graphs=has_graphs,
        )
        return tables, forward


def _num_blocks(plan: RunnerPlan, parts: _Parts, options: DeviceOptions) -> int:
    """Blocks of the KV cache, the same on every rank."""
    if plan.kv_cache_tokens is not None:
        num_blocks = plan.kv_cache_tokens // plan.block_size
    elif parts.device.type == "cuda":
        room = _room_bytes(plan, parts, options)
        gc.collect()  # a pass and its graphs hold each other: give their memory to the real ones
        mine = max(room, 0) // parts.num_block_bytes
        num_blocks = min(plan.collectives.numbers(mine))
    else:
        num_blocks = _CPU_KV_TOKENS // plan.block_size
    if num_blocks < 1:
        raise ConfigurationError(
            "the KV cache must hold at least one block"
            f" ({plan.block_size} tokens, {parts.num_block_bytes / 1e6:.1f} MB), and the GPU has"
            " no memory left for it beside the weights: use a larger tensor_parallel, a smaller"
            " model, or a lower engine.max_running_sequences or engine.token_budget"
        )
    return num_blocks


def _room_bytes(plan: RunnerPlan, parts: _Parts, options: DeviceOptions) -> int:
    """Memory left for the KV cache once the largest steps have run over a cache of one block."""
    _, forward = parts.make(1, has_graphs=False)
    num_graph_bytes = warm_up(
        forward, options.device, token_budget=options.token_budget, max_model_len=plan.max_model_len
    )
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    num_sizes = len(forward.graphs.sizes)
    num_logits_bytes = _LOGITS_COPIES * 4 * plan.shape.vocab_size * plan.max_running_sequences
    taken = num_graph_bytes + num_sizes * _GRAPH_BYTES + num_logits_bytes
    return int(free_bytes - GPU_MARGIN * total_bytes - taken)
