"""How fast one copy of a model will be, in the numbers that a user compares: load, TTFT, tokens.

Not the roofline itself (`cluster.planner.speed`). The one decision: a prediction is plain data, the
same for the table, for `--json` and for whoever holds it against what is measured.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from serve.config import EngineConfig, HardwareConfig, ModelConfig, PredictionConfig, ShoalConfig
from serve.errors import ConfigurationError

from .accelerators import find_gpu, known_gpus
from .hardware import cpu_device, gpu_device
from .machine import Machine, measure_cpu
from .memory import BYTES_PER_VALUE
from .speed import CPU_CALIBRATION, TORCH_CALIBRATION, Device, Roofline, Step
from .subjects import subject_of

BATCHES = (1, 8, 64)
PROMPT_TOKENS = 1_024
CONTEXT_TOKENS = 2_048
# Assumed: Ray, Serve and imports; with CUDA also contexts, NCCL and captured graphs; and what one
# machine's disk or volume gives all its shards together.
_START_S = 10.0
_CUDA_START_S = 15.0
_READ_BYTES_PER_S = 1.5e9


@dataclass(frozen=True, slots=True)
class Prediction:
    """One copy of a model. `steps` are decode steps by batch, of `context_tokens` a sequence.

    `ttft_s` is of a prompt of `prompt_tokens` on an idle copy, without the network.
    """

    load_s: float
    ttft_s: float
    prompt_tokens: int
    context_tokens: int
    steps: dict[int, Step]

    def tokens_per_s(self, batch: int) -> float:
        """Decoded tokens a second of all sequences of the batch."""
        return batch / self.steps[batch].seconds

    def to_config(self) -> PredictionConfig:
        """What a copy exports, rounded to what a roofline is good for."""
        return PredictionConfig(
            decode_tokens_per_s={
                str(batch): round(self.tokens_per_s(batch), 1) for batch in self.steps
            },
            ttft_s=round(self.ttft_s, 4),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON: every term in seconds."""
        return {
            "load_s": self.load_s,
            "ttft_s": self.ttft_s,
            "prompt_tokens": self.prompt_tokens,
            "context_tokens": self.context_tokens,
            "decode": {
                str(batch): {
                    "tokens_per_s": self.tokens_per_s(batch),
                    "step_s": step.seconds,
                    "bound_by": step.bound,
                    **asdict(step),
                }
                for batch, step in self.steps.items()
            },
        }


def predict_copy(
    roofline: Roofline, engine: EngineConfig, *, prompt_tokens: int = PROMPT_TOKENS
) -> Prediction:
    """The prediction for one copy on an otherwise idle node."""
    num_bytes = roofline.shape.num_params * roofline.bytes_per_value
    start_s = _START_S if roofline.device.is_shared else _START_S + _CUDA_START_S
    context = min(CONTEXT_TOKENS, roofline.shape.max_positions)
    return Prediction(
        load_s=start_s + num_bytes / _READ_BYTES_PER_S,
        ttft_s=roofline.prefill_s(prompt_tokens, engine.budget(roofline.device.name)),
        prompt_tokens=prompt_tokens,
        context_tokens=context,
        steps={batch: roofline.decode(batch, context) for batch in BATCHES},
    )


def predict(
    model: ModelConfig, hardware: HardwareConfig, *, machine: Machine | None = None
) -> Prediction | None:
    """The prediction for a resolved model on resolved hardware.

    On a CPU the memory's pace is measured here (about 0.8 s). None: a stand-in, or a GPU whose
    figures are not known.

    Raises:
        CheckpointError: its config.json cannot be used.
    """
    if model.stand_in is not None:
        return None
    device = _device(hardware, machine)
    return None if device is None else _predict_on(device, model)


def with_predictions(config: ShoalConfig, machine: Machine) -> ShoalConfig:
    """A resolved configuration whose models carry what is expected of them, where that is known.

    Raises:
        CheckpointError: a model's config.json cannot be used.
    """
    assert isinstance(config.hardware, HardwareConfig), "the planner resolved the hardware"
    device = _device(config.hardware, machine)
    if device is None:
        return config
    models = [
        model
        if model.stand_in is not None
        else model.model_copy(update={"prediction": _predict_on(device, model).to_config()})
        for model in config.models
    ]
    return config.model_copy(update={"models": tuple(models)})


def _predict_on(device: Device, model: ModelConfig) -> Prediction:
    assert isinstance(model.tensor_parallel, int), "the planner resolved the size"
    assert model.dtype != "auto", "the planner resolved the type"
    roofline = Roofline(
        subject_of(model).shape, model.tensor_parallel, device, BYTES_PER_VALUE[model.dtype]
    )
    return predict_copy(roofline, model.engine)


def measured_cpu(machine: Machine, kernels: str = "auto") -> Device:
    """This machine's CPU, measured; bfloat16 units do about twice the float32 arithmetic.

    `kernels` is `hardware.kernels`; what the CPU could run is taken to be built.
    """
    bandwidth, flops = measure_cpu(machine.num_cores)
    factor = 2 if machine.has_bfloat16 else 1
    has_kernels = kernels != "torch" and bool(machine.kernels)
    return cpu_device(
        bandwidth_bytes_per_s=bandwidth,
        flops_per_s=factor * flops,
        calibration=CPU_CALIBRATION if has_kernels else TORCH_CALIBRATION,
    )


def _device(hardware: HardwareConfig, machine: Machine | None) -> Device | None:
    if hardware.device == "cpu":
        machine = machine or Machine.detect()
        return measured_cpu(machine, hardware.kernels)
    try:
        return gpu_device(find_gpu(hardware.gpu or "", known_gpus()))
    except ConfigurationError:
        return None
