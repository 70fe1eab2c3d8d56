"""The chart's values as types: `values.yaml`, its schema and the chart's README come from here.

Not the merge with presets (`resolved`). The one decision: whatever concerns the model or the
hardware is written in the configuration's own snake_case keys below `overrides`, so that one
vocabulary describes a served model on a laptop and on a cluster.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.alias_generators import to_camel

from serve.config import HardwareConfig, ModelConfig

Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
Labels = dict[str, str]
Resources = dict[Literal["requests", "limits"], dict[str, Quantity]]
KubernetesObject = dict[str, Any]

# Keys of the configuration that have a value of their own, or follow from one.
NOT_MODEL_OVERRIDES = frozenset(
    {"preset", "path", "tensor_parallel", "replicas", "stand_in", "prediction"}
)
NOT_HARDWARE_OVERRIDES = frozenset({"name", "device", "gpu", "gpus_per_node", "upgrade"})
# "auto" that is resolved where the model is loaded; every other one is resolved by the plan.
LATE_AUTO = frozenset({"kernels", "kv_cache_tokens", "token_budget"})


class Values(BaseModel):
    """Base of every part of the values."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        populate_by_name=True,
        protected_namespaces=(),
    )


def _check_overrides(
    overrides: dict[str, Any], section: type[BaseModel], refused: frozenset[str]
) -> None:
    for key, value in overrides.items():
        if key in refused:
            raise ValueError(f"overrides.{key}: is not an override: it has a value of its own")
        if value == "auto" and key not in LATE_AUTO:
            raise ValueError(f"overrides.{key}: must not be auto: the plan has resolved it")
    try:
        section.model_validate(overrides)
    except ValidationError as exc:
        error = exc.errors(include_url=False)[0]
        key = ".".join(map(str, error["loc"]))
        raise ValueError(f"overrides.{key}: {error['msg']}") from exc


def _model_overrides(overrides: dict[str, Any]) -> dict[str, Any]:
    _check_overrides(overrides, ModelConfig, NOT_MODEL_OVERRIDES)
    return overrides


def _hardware_overrides(overrides: dict[str, Any]) -> dict[str, Any]:
    _check_overrides(overrides, HardwareConfig, NOT_HARDWARE_OVERRIDES)
    return overrides


def _pod_labels(labels: Labels) -> Labels:
    for key in labels:
        if key.startswith(("app.kubernetes.io/", "ray.io/")):
            raise ValueError(f"{key}: pods are found by it; choose another label")
    return labels


PodLabels = Annotated[
    Labels,
    AfterValidator(_pod_labels),
    WithJsonSchema(
        {
            "type": "object",
            "additionalProperties": {"type": "string"},
            "patternProperties": {"^(app[.]kubernetes|ray)[.]io/": False},
        }
    ),
]
ModelOverrides = Annotated[dict[str, Any], AfterValidator(_model_overrides)]
HardwareOverrides = Annotated[dict[str, Any], AfterValidator(_hardware_overrides)]


class ModelValues(Values):
    """The served model."""

    preset: str = Field(
        "qwen2.5-7b-instruct", description="Name of a file in configs/models, or `demo`."
    )
    overrides: ModelOverrides = Field(
        {},
        description="Merged over the preset: the configuration's own keys (name, dtype,"
        " max_model_len, yarn, max_answer_tokens, longest_generation_s, repository, engine...).",
    )


class HardwareValues(Values):
    """What engine pods run on."""

    preset: str = Field("a100-80gb", description="Name of a file in configs/hardware.")
    overrides: HardwareOverrides = Field(
        {},
        description="Merged over the preset: the configuration's own keys (env, has_spare,"
        " threads_per_shard, kernels, and pod: cpu, memory, shm, node_selector, tolerations,"
        " runtime_class).",
    )


class ReplicasValues(Values):
    """Copies of this model."""

    min: int = Field(1, ge=1, le=256, description="Fewest copies of the model.")
    max: int = Field(1, ge=1, le=256, description="Most copies of the model; at least min.")
    target_ongoing: float = Field(
        16, gt=0, description="Open requests a copy at which Serve adds one."
    )

    @model_validator(mode="after")
    def _check_bounds(self) -> ReplicasValues:
        if self.max < self.min:
            raise ValueError(f"replicas.max must be >= replicas.min ({self.min}), got {self.max}")
        return self


class ServedModelValues(Values):
    """One of several models."""

    preset: str = Field(description="Name of a file in configs/models, or `demo`.")
    overrides: ModelOverrides = Field(
        {}, description="Merged over the preset: the configuration's own keys."
    )
    tensor_parallel: int | None = Field(
        None, ge=1, le=64, description="Shards of one copy; null: what the plan chose."
    )
    replicas: ReplicasValues = ReplicasValues()


class AutoscalerValues(Values):
    """Ray's autoscaler."""

    enabled: bool = Field(
        True, description="Ray's autoscaler adds engine pods when Serve wants more copies."
    )
    idle_seconds: int = Field(
        600, ge=1, description="Time without work after which an engine pod is given back."
    )
    max_pods: int = Field(
        256,
        ge=1,
        le=1024,
        description="Most engine pods. Roomy, since a running cluster never learns of a new bound;"
        " replicas.max is the limit that counts.",
    )


class IncrementalValues(Values):
    """For Incremental."""

    gateway_class_name: str = Field(
        "", description="GatewayClass of the Gateway that KubeRay makes; needed for Incremental."
    )
    step_percent: int = Field(
        20, ge=1, le=100, description="Share of the traffic that moves at once."
    )
    interval_seconds: int = Field(60, ge=1, description="Pause between two such moves.")
    max_surge_percent: int = Field(
        100, ge=1, le=100, description="Copies of the new version beyond those that exist."
    )


class UpgradeValues(Values):
    """How a new version comes in."""

    type: Literal["None", "NewCluster", "Incremental"] | None = Field(
        None,
        description="What KubeRay does when pods change. None: nothing until a recreate; NewCluster"
        " and Incremental need as many free GPUs again. null: what the hardware preset says.",
    )
    incremental: IncrementalValues = IncrementalValues()


class ImageValues(Values):
    """The container image."""

    repository: str = Field(
        "example.org/shoal", min_length=1, description="Where the image is, without a tag."
    )
    tag: str = Field("", description="Empty: the chart's appVersion with -cuda or -cpu.")
    digest: str = Field(
        "", pattern=r"^(sha256:[0-9a-f]{64})?$", description="Used in the place of the tag."
    )
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        "IfNotPresent", description="When a node pulls the image."
    )
    pull_secrets: tuple[str, ...] = Field((), description="Names of Secrets to pull it with.")


class PvcValues(Values):
    """For pvc."""

    existing_claim: str = Field("", description="A claim to use; empty: the chart makes one.")
    storage_class: str = Field("", description="StorageClass; empty: the cluster's default.")
    access_mode: Literal["ReadWriteOnce", "ReadWriteMany"] = Field(
        "ReadWriteOnce", description="ReadWriteMany where engine pods run on several nodes."
    )
    size: Quantity | None = Field(
        None,
        description="Size of the claim; null: what the plan says for the models, and never less"
        " than it has.",
    )
    read_only: bool = Field(
        False, description="Mount it read-only; the weights must be there already."
    )


class DownloadValues(Values):
    """For pvc and ephemeral."""

    enabled: bool = Field(
        True, description="Download weights that are not there yet before the engine starts."
    )
    endpoint: str = Field("", description="Address of the hub; empty: huggingface.co.")


class WeightsValues(Values):
    """Where the weights are."""

    from_: Literal["pvc", "image", "baked", "ephemeral"] | None = Field(
        None,
        alias="from",
        description="pvc: a volume claim. image: an OCI image as a volume (Kubernetes 1.35)."
        " baked: in the container image. ephemeral: downloaded by every pod. null: baked for the"
        " demo model, else pvc.",
    )
    pvc: PvcValues = PvcValues()
    oci_image: str = Field(
        "", description="For image: its reference; it holds a folder for each served name."
    )
    download: DownloadValues = DownloadValues()
