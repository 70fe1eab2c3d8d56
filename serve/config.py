"""The one configuration: what a user writes, what the chart carries, what `serve.app` builds from.

Pydantic, frozen, unknown keys refused. Not here: reading YAML with line numbers
(`cluster.plan`), and anything that needs the machine or the checkpoint: "auto" is resolved once by
the planner, which returns a new object without "auto" in it.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Dtype = Literal["float32", "bfloat16"]
Auto = Literal["auto"]
Kernels = Literal["auto", "torch", "avx2", "avx512", "amx"]
DeviceName = Literal["cpu", "cuda"]

# Of `engine.token_budget: auto`. A GPU computes few tokens no faster than many; on a CPU more of
# them would only lengthen the step that running answers wait for.
_TOKEN_BUDGETS: dict[DeviceName, int] = {"cpu": 512, "cuda": 2048}


class Section(BaseModel):
    """Base of every part of the configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class HttpConfig(Section):
    """Where the API and the page are served."""

    host: str = Field(
        "127.0.0.1",
        description="Address to listen on; beyond loopback only with keys or allow_anonymous.",
    )
    port: int = Field(8080, ge=1, le=65535, description="TCP port of the API and the page.")
    max_body_bytes: int = Field(
        4 * 1024 * 1024, ge=1024, description="Largest request body, in bytes."
    )
    page: bool = Field(True, description="Serve the page at / beside the API.")
    keys_file: Path | None = Field(
        None, description="File of hashed API keys; with one, every request needs a key."
    )
    allow_anonymous: bool = Field(
        False, description="Serve beyond loopback without keys, to anyone who can reach it."
    )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the host."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @model_validator(mode="after")
    def _check_access(self) -> HttpConfig:
        if self.allow_anonymous and self.keys_file is not None:
            raise ValueError(
                "allow_anonymous and keys_file exclude each other: with keys, every"
                " request needs one"
            )
        return self


class ReplicasConfig(Section):
    """How many copies of a model run; Ray Serve scales between the bounds on open requests."""

    min: int = Field(1, ge=1, le=256, description="Fewest copies of the model.")
    max: int = Field(1, ge=1, le=256, description="Most copies of the model.")
    target_open_requests: float = Field(
        16.0, gt=0, description="Open requests a copy at which Serve adds one."
    )

    @model_validator(mode="after")
    def _check_bounds(self) -> ReplicasConfig:
        if self.max < self.min:
            raise ValueError(f"replicas.max must be >= replicas.min ({self.min}), got {self.max}")
        return self


class EngineConfig(Section):
    """Limits of one replica's engine."""

    max_running_sequences: int = Field(64, ge=1, le=1024, description="Most sequences in one step.")
    token_budget: Annotated[int, Field(ge=16, le=65536)] | Auto = Field(
        "auto",
        description="Most tokens in one step (prefill is chunked to fit); auto: 2048 on a GPU,"
        " 512 on a CPU.",
    )
    max_step_s: float = Field(
        1.0,
        gt=0,
        description="The token budget shrinks until a step takes at most this, in seconds.",
    )
    max_decode_slowdown: float = Field(
        2.25,
        gt=1,
        description="How many times longer a long prompt may make the steps of running answers.",
    )
    max_waiting_requests: int = Field(
        256, ge=0, description="Requests that may wait; more are refused with 429."
    )
    max_waiting_tokens: int = Field(
        262_144, ge=1, description="Prompt tokens that may wait; more are refused with 429."
    )
    block_size: int = Field(16, ge=1, le=256, description="KV slots in a block, in tokens.")
    kv_cache_tokens: int | Auto = Field(
        "auto", description="KV slots of a replica, in tokens; auto: what memory allows."
    )
    prefix_cache: bool = Field(
        True, description="Keep the KV blocks of answered requests for others that begin alike."
    )

    def budget(self, device: DeviceName) -> int:
        """The token budget of a step on `device`, in tokens."""
        return _TOKEN_BUDGETS[device] if self.token_budget == "auto" else self.token_budget

    @model_validator(mode="after")
    def _check_kv_cache(self) -> EngineConfig:
        if isinstance(self.kv_cache_tokens, int) and self.kv_cache_tokens < self.block_size:
            raise ValueError(
                f"kv_cache_tokens must be >= block_size ({self.block_size}),"
                f" got {self.kv_cache_tokens}"
            )
        return self


class StandInConfig(Section):
    """Benchmarks and tests: a step of fixed length in the place of the model's."""

    step_ms: float = Field(20.0, ge=0, description="Length of every step, in milliseconds.")


class PredictionConfig(Section):
    """What the plan expects of one copy, exported beside what is measured."""

    decode_tokens_per_s: dict[str, float] = Field(
        description="Tokens a second of all sequences together, by batch size."
    )
    ttft_s: float = Field(description="From an idle copy to its first token, in seconds.")


class ModelConfig(Section):
    """One served model."""

    preset: str | None = Field(
        None, description="Name of a file in configs/models whose keys this entry starts from."
    )
    name: str | None = Field(
        None,
        min_length=1,
        max_length=128,
        description="Name that clients ask for; default: the preset's or the folder's.",
    )
    path: Path | None = Field(
        None, description="Folder with config.json, tokenizer.json and *.safetensors."
    )
    repository: str | None = Field(
        None, description="Where a hub has the weights, as `Qwen/Qwen2.5-7B-Instruct`."
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit of `repository`; default: its main branch."
    )
    is_default: bool = Field(
        False, description="Answer requests that name no model (one model of several)."
    )
    tensor_parallel: int | Auto = Field(
        "auto", description="Shards that one copy is split into; auto: 2 on CPU."
    )
    dtype: Dtype | Auto = Field(
        "auto",
        description="Type of weights and KV cache; auto: bfloat16 but on a CPU without kernels.",
    )
    max_model_len: Annotated[int, Field(ge=16)] | Auto = Field(
        "auto", description="Prompt plus answer, in tokens; auto: the checkpoint's positions."
    )
    yarn: bool | Auto = Field(
        "auto",
        description="Stretch the positions by YaRN; auto: where max_model_len is beyond them.",
    )
    max_answer_tokens: int = Field(
        8192, ge=1, description="Largest max_tokens that a request may ask for."
    )
    longest_generation_s: float = Field(
        600.0, gt=0, description="Grace for running answers when a copy is stopped, in seconds."
    )
    build_timeout_s: float = Field(
        1800.0, gt=0, description="Longest time that a copy's shards may take to load, in seconds."
    )
    replicas: ReplicasConfig = Field(ReplicasConfig(), description="Copies of the model.")
    engine: EngineConfig = Field(EngineConfig(), description="Limits of a copy's engine.")
    stand_in: StandInConfig | None = Field(
        None, description="Benchmarks and tests only: no model is loaded."
    )
    prediction: PredictionConfig | None = Field(
        None, description="Written by the plan, which knows it where it knows the hardware."
    )

    @property
    def application(self) -> str:
        """Name of the Serve application that runs this model (its name must be known)."""
        assert self.name is not None, "the planner resolved the name"
        return "model-" + re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


class TolerationConfig(Section):
    """A taint that engine pods accept, in the words of Kubernetes."""

    key: str | None = Field(None, description="Key of the taint; none: every key.")
    operator: Literal["Exists", "Equal"] = Field("Exists", description="How it is compared.")
    value: str | None = Field(None, description="Value of the taint, with Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="Effect of the taint; none: every effect."
    )


class PodConfig(Section):
    """What one engine pod, which holds one replica, asks of Kubernetes. Unused elsewhere."""

    cpu: str | None = Field(None, description="CPU that a pod requests, as `4` or `500m`.")
    memory: str | None = Field(None, description="Memory that a pod requests and is held to.")
    shm: str | None = Field(None, description="Size of /dev/shm, which counts as memory.")
    node_selector: dict[str, str] = Field({}, description="Labels that its node must have.")
    tolerations: tuple[TolerationConfig, ...] = Field((), description="Taints that it accepts.")
    runtime_class: str | None = Field(None, description="RuntimeClass, as `nvidia`.")


class HardwareConfig(Section):
    """What shards run on."""

    name: str = Field("cpu", description="Name of the preset in configs/hardware.")
    device: DeviceName = Field("cpu", description="Where shards compute.")
    gpu: str | None = Field(None, description="Name of the GPU in configs/gpus.yaml.")
    gpus_per_node: int = Field(0, ge=0, le=64, description="GPUs of one machine.")
    threads_per_shard: Annotated[int, Field(ge=1)] | Auto = Field(
        "auto", description="CPU threads of a shard; auto: cores / shards, at least 1."
    )
    kernels: Kernels = Field(
        "auto",
        description="Kernels on a CPU; auto: the best that it has; torch: the slow reference.",
    )
    has_spare: bool = Field(
        True, description="A second copy fits beside the first one while an update rolls out."
    )
    upgrade: Literal["None", "NewCluster", "Incremental"] = Field(
        "None", description="What KubeRay does when pods change: see the README's upgrade table."
    )
    env: dict[str, str] = Field({}, description="Environment variables of every shard.")
    pod: PodConfig = Field(PodConfig(), description="What an engine pod asks of Kubernetes.")


class ShoalConfig(Section):
    """The whole file."""

    http: HttpConfig = Field(HttpConfig(), description="Where the API and the page are served.")
    hardware: HardwareConfig | str = Field(
        HardwareConfig(), description="A preset's name (configs/hardware) or its keys."
    )
    models: tuple[ModelConfig, ...] = Field(
        min_length=1, max_length=32, description="The served models."
    )
    ingress_copies: Annotated[int, Field(ge=1, le=64)] | Auto = Field(
        "auto", description="HTTP processes; auto: 2, or 1 where there are fewer than 4 cores."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe level that is logged."
    )

    @model_validator(mode="after")
    def _check_names(self) -> ShoalConfig:
        names = [model.name for model in self.models if model.name is not None]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"model names must be unique, got twice: {', '.join(twice)}")
        if sum(model.is_default for model in self.models) > 1:
            raise ValueError("at most one model may have is_default: true")
        return self
