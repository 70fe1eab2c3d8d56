"""The one configuration: what a user writes, what the chart carries, what `serve.app` builds from.

Pydantic, frozen, unknown keys refused. Not here: reading YAML with line numbers
(`cluster.plan`), and anything that needs the machine or the checkpoint: "auto" is resolved once by
the planner, which returns a new object without "auto" in it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Dtype = Literal["float32", "bfloat16"]
Auto = Literal["auto"]


class Section(BaseModel):
    """Base of every part of the configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class HttpConfig(Section):
    """Where the API and the page are served."""

    host: str = Field("127.0.0.1", description="Address to listen on; loopback only, until keys.")
    port: int = Field(8080, ge=1, le=65535, description="TCP port of the API and the page.")
    max_body_bytes: int = Field(
        4 * 1024 * 1024, ge=1024, description="Largest request body, in bytes."
    )


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
    token_budget: int = Field(
        512, ge=16, le=65536, description="Most tokens in one step (prefill is chunked to fit)."
    )
    max_step_s: float = Field(
        1.0,
        gt=0,
        description="The token budget shrinks until a step takes at most this, in seconds.",
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
    is_default: bool = Field(
        False, description="Answer requests that name no model (one model of several)."
    )
    tensor_parallel: int | Auto = Field(
        "auto", description="Shards that one copy is split into; auto: 2 on CPU."
    )
    dtype: Dtype | Auto = Field(
        "auto", description="Type to compute in; auto: bfloat16 where the hardware has it."
    )
    max_model_len: Annotated[int, Field(ge=16)] | Auto = Field(
        "auto", description="Prompt plus answer, in tokens; auto: the checkpoint's positions."
    )
    yarn: bool = Field(
        False, description="Stretch the positions by YaRN as the checkpoint's family allows."
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

    @property
    def application(self) -> str:
        """Name of the Serve application that runs this model (its name must be known)."""
        assert self.name is not None, "the planner resolved the name"
        return "model-" + re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


class HardwareConfig(Section):
    """What shards run on."""

    name: str = Field("cpu", description="Name of the preset in configs/hardware.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where shards compute.")
    threads_per_shard: Annotated[int, Field(ge=1)] | Auto = Field(
        "auto", description="CPU threads of a shard; auto: cores / shards, at least 1."
    )


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
