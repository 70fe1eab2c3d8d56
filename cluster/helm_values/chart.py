"""All values of the chart, and those of the cluster around the model.

Not what a model needs (`values`). The one decision: the defaults here are the defaults of the
chart, for `values.yaml` is written from this class.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from .access import AuthValues, ExposeValues, ServiceValues, WebValues
from .values import (
    AutoscalerValues,
    HardwareValues,
    ImageValues,
    KubernetesObject,
    Labels,
    ModelValues,
    PodLabels,
    ReplicasValues,
    Resources,
    ServedModelValues,
    UpgradeValues,
    Values,
    WeightsValues,
)


class FaultToleranceValues(Values):
    """What happens when the head is lost."""

    enabled: bool = Field(
        False, description="Keep Ray's state in Redis, so that a head that restarts goes on."
    )
    redis_address: str = Field("", description="Address of Redis, as `redis:6379`.")
    password_secret: str = Field(
        "", description="A Secret with the key `password`; empty: no password."
    )


class HeadValues(Values):
    """The pod of Ray's head."""

    resources: Resources = Field(
        {
            "requests": {"cpu": "1", "memory": "4Gi"},
            "limits": {"cpu": "2", "memory": "4Gi"},
        },
        description="Of the Ray head, which runs no model.",
    )
    autoscaler_resources: Resources = Field(
        {
            "requests": {"cpu": "100m", "memory": "256Mi"},
            "limits": {"cpu": "500m", "memory": "512Mi"},
        },
        description="Of the autoscaler beside it.",
    )
    node_selector: Labels = Field(
        {}, description="Labels that its node must have, and that of `helm test`."
    )
    tolerations: tuple[KubernetesObject, ...] = Field(
        (), description="Taints that it accepts, and `helm test`."
    )
    gcs_fault_tolerance: FaultToleranceValues = FaultToleranceValues()


class MonitoringValues(Values):
    """Metrics and alerts."""

    pod_monitor: bool = Field(
        False, description="A PodMonitor for head and engine pods (prometheus-operator)."
    )
    rules: bool = Field(
        False,
        description="A PrometheusRule with Shoal's alerts. They cover every release that its"
        " Prometheus scrapes: true in one of them is enough.",
    )
    dashboards: bool = Field(
        False, description="A ConfigMap with a Grafana dashboard, for every release like the rules."
    )
    labels: Labels = Field(
        {}, description="Labels of these objects, as your Prometheus or Grafana selects them."
    )


class SecurityValues(Values):
    """Network and users."""

    network_policy: bool = Field(
        True, description="Let nothing into the pods but requests, KubeRay and Prometheus."
    )
    operator_namespace: str = Field(
        "kuberay-system", min_length=1, description="Where KubeRay runs; it must reach the head."
    )
    monitoring_namespace: str = Field(
        "monitoring", min_length=1, description="Where Prometheus runs; it may read metrics."
    )
    allow_from: tuple[KubernetesObject, ...] = Field(
        (), description="NetworkPolicyPeers that may reach the API; empty: all."
    )
    run_as_user: int = Field(1000, ge=1, description="User id of every container.")


class DisruptionValues(Values):
    """What a drain of nodes must leave."""

    enabled: bool = Field(
        True, description="A PodDisruptionBudget for engine pods. It holds up `kubectl drain`."
    )
    min_available: int = Field(
        1, ge=1, description="Engine pods that must stay; a number, since Ray has no scale."
    )


class SchedulingValues(Values):
    """Where pods go."""

    priority_class_name: str = Field("", description="PriorityClass of head and engine pods.")
    queue_name: str = Field("", description="Kueue's LocalQueue.")
    topology_spread: bool = Field(True, description="Spread engine pods over nodes where it can.")
    scheduler_name: str = Field("", description="Another scheduler than the default one.")


class ExtraValues(Values):
    """What nobody thought of."""

    env: tuple[KubernetesObject, ...] = Field((), description="EnvVars of head and engine.")
    env_from: tuple[KubernetesObject, ...] = Field((), description="EnvFromSources of both.")
    volumes: tuple[KubernetesObject, ...] = Field((), description="Volumes of engine pods.")
    volume_mounts: tuple[KubernetesObject, ...] = Field((), description="Their mounts.")
    init_containers: tuple[KubernetesObject, ...] = Field(
        (), description="Init containers of engine pods, before the download."
    )
    objects: tuple[KubernetesObject, ...] = Field(
        (), description="Whole objects that come and go with the release."
    )


class TestKeyValues(Values):
    """The key that it asks for a completion with."""

    existing_secret: str = Field(
        "", description="A Secret with a plain API key; empty: only readiness is asked for."
    )
    key: str = Field("key", min_length=1, description="The key of that Secret.")


class TestsValues(Values):
    """`helm test`."""

    enabled: bool = Field(True, description="A pod for `helm test`.")
    timeout_seconds: int = Field(120, ge=1, description="How long it waits for an answer.")
    api_key: TestKeyValues = TestKeyValues()


class ChartValues(Values):
    """`values.yaml`."""

    fullname_override: str = Field(
        "", description="Name of the objects; empty: the release's. At most 47 characters."
    )
    model: ModelValues = ModelValues()
    models: tuple[ServedModelValues, ...] = Field(
        (),
        max_length=32,
        description="Several models behind one address, in the place of model, tensorParallel and"
        " replicas. All of one tensor-parallel size; the first one sizes the pods.",
    )
    hardware: HardwareValues = HardwareValues()
    tensor_parallel: int | None = Field(
        None,
        ge=1,
        le=64,
        description="Shards of one copy, which is the GPUs of a pod; null: what the plan chose.",
    )
    replicas: ReplicasValues = ReplicasValues()
    ingress_copies: int = Field(
        2,
        ge=1,
        le=64,
        description="HTTP processes; they run in the engine pods, at most four of them to a pod.",
    )
    max_body_bytes: int | None = Field(
        None, ge=1024, description="Largest request body; null: 4 MiB."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe level that is logged."
    )
    autoscaler: AutoscalerValues = AutoscalerValues()
    suspend: bool = Field(
        False, description="Delete every pod and keep claims, keys and addresses."
    )
    upgrade: UpgradeValues = UpgradeValues()
    image: ImageValues = ImageValues()
    weights: WeightsValues = WeightsValues()
    auth: AuthValues = AuthValues()
    service: ServiceValues = ServiceValues()
    expose: ExposeValues = ExposeValues()
    web: WebValues = WebValues()
    head: HeadValues = HeadValues()
    monitoring: MonitoringValues = MonitoringValues()
    security: SecurityValues = SecurityValues()
    pod_disruption_budget: DisruptionValues = DisruptionValues()
    scheduling: SchedulingValues = SchedulingValues()
    extra: ExtraValues = ExtraValues()
    pod_labels: PodLabels = Field(
        {},
        description="Labels of head and engine pods, but those that they are found by"
        " (app.kubernetes.io/*, ray.io/*). A change replaces every pod.",
    )
    pod_annotations: Labels = Field(
        {}, description="Annotations of both. A change replaces every pod."
    )
    tests: TestsValues = TestsValues()
    global_: dict[str, Any] = Field(
        {}, alias="global", description="Set by Helm where this is part of another chart; unused."
    )
