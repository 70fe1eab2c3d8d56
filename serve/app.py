"""The only place where the parts are wired together, and where Ray Serve's decorators are.

Two kinds of Serve application, so that changing one model leaves the others' processes alone::

    shoal            route /      build_ingress: the HTTP tier
    model-<name>     no route     build_model: replicas of one model

Both are built from the one configuration (`ShoalConfig`), already resolved. What may change in
place (counts, autoscaling, bundles) is in the deploy request (`cluster.manifests`), not here.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray import serve as ray_serve
from ray.util import metrics as ray_metrics
from ray.util.placement_group import PlacementGroup, get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from serve.config import HardwareConfig, HttpConfig, ModelConfig, Section
from serve.logs import configure_logs
from serve.messages import Prediction
from serve.replica.metrics import ReplicaMetrics
from serve.replica.progress import ProgressFile
from serve.replica.replica import Replica
from serve.shards.actor import Shard
from serve.shards.group import ShardGroup
from serve.shards.spec import ShardSpec

RUN_FOLDER_VARIABLE = "SHOAL_RUN_DIR"
REPLICA = "Replica"
INGRESS = "Ingress"
DOOR = "Door"


class IngressArgs(Section):
    """What `build_ingress` gets."""

    http: HttpConfig
    models: tuple[ModelConfig, ...]
    log_level: str = "info"


class ModelArgs(Section):
    """What `build_model` gets."""

    model: ModelConfig
    hardware: HardwareConfig
    log_level: str = "info"


class Tunables(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`user_config` of a `Replica` deployment."""

    prediction: Prediction | None = None


def build_ingress(args: dict[str, Any]) -> ray_serve.Application:
    """The application `shoal`."""
    IngressArgs.model_validate(args)
    return _IngressDeployment.bind(args)  # type: ignore[attr-defined, no-any-return]


def build_model(args: dict[str, Any]) -> ray_serve.Application:
    """The application of one model."""
    ModelArgs.model_validate(args)
    return _Door.bind(_ReplicaDeployment.bind(args))  # type: ignore[attr-defined, no-any-return]


@ray_serve.deployment(
    name=REPLICA,
    max_ongoing_requests=100_000,
    request_router_config={
        "request_router_class": "serve.routing.router:LeastLoadedRouter",
        "max_backoff_s": 0.05,
    },
)
class _ReplicaDeployment:
    """A `Replica` as Serve runs it."""

    async def __init__(self, args: dict[str, Any]) -> None:  # type: ignore[misc]
        settings = ModelArgs.model_validate(args)
        configure_logs(settings.log_level)
        context = ray_serve.get_replica_context()
        replica_id = context.replica_id.unique_id
        model = settings.model
        assert model.name is not None
        self._replica = Replica(
            model=model.name,
            replica_id=replica_id,
            make_group=_group_maker(settings, replica_id),
            progress=ProgressFile(_progress_folder(), f"{model.application}-{replica_id}"),
            metrics=ReplicaMetrics(
                ray_metrics,
                model=model.name,
                application=model.application,
                replica_id=replica_id,
            ),
            build_timeout_s=model.build_timeout_s,
        )
        await self._replica.start()

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take what changes in place, without a restart (keys of `Tunables`)."""
        self._replica.prediction = msgspec.convert(user_config, Tunables).prediction

    async def generate(self, payload: bytes) -> AsyncIterator[bytes]:
        async for item in self._replica.generate(payload):
            yield item

    async def wait_ready(self, replica_id: str) -> str:
        return await self._replica.wait_ready(replica_id)

    async def stats(self, replica_id: str) -> bytes:
        """`replica_id` is the router's: it sends the call there."""
        return await self._replica.stats()

    def __del__(self) -> None:
        replica = getattr(self, "_replica", None)
        if replica is not None:
            replica.stop()


@ray_serve.deployment(
    name=DOOR,
    autoscaling_config={"min_replicas": 0, "initial_replicas": 0, "max_replicas": 1},
)
class _Door:
    """First deployment of a model's application, of which no process ever starts.

    In HAProxy mode Serve refuses a router on the first deployment of an application, and a model
    needs an application of its own: so something without a router stands before its replicas.
    """

    def __init__(self, replicas: object) -> None:
        self._replicas = replicas


@ray_serve.deployment(name=INGRESS, max_ongoing_requests=100_000)
@ray_serve.ingress()
class _IngressDeployment:
    """The HTTP tier as Serve runs it."""

    async def __init__(self, args: dict[str, Any]) -> None:  # type: ignore[misc]
        from serve.ingress.app import build_app
        from serve.ingress.dispatch import ServeDispatcher
        from serve.ingress.served_model import load_served_model
        from serve.routing import registry

        settings = IngressArgs.model_validate(args)
        configure_logs(settings.log_level)
        names = {model.name or "": model.application for model in settings.models}
        handles = {
            name: ray_serve.get_deployment_handle(REPLICA, app_name=app)
            for name, app in names.items()
        }
        self._dispatcher = ServeDispatcher(
            handles=handles,
            tables={name: registry.table(app) for name, app in names.items()},
            socket_dir=_socket_folder(),
            host=_node_address(),
        )
        await self._dispatcher.start()
        is_only = len(settings.models) == 1
        self._app = build_app(
            http=settings.http,
            models=[
                load_served_model(model, is_default=is_only or model.is_default)
                for model in settings.models
            ],
            dispatcher=self._dispatcher,
        )

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    def __del__(self) -> None:
        dispatcher = getattr(self, "_dispatcher", None)
        if dispatcher is not None:
            dispatcher.stop()


class _ShardActor:
    """A Ray actor of `actor_class`, as a `ShardHandle`."""

    def __init__(
        self, actor_class: Any, placement: PlacementGroup, spec: ShardSpec, *, name: str
    ) -> None:
        strategy = PlacementGroupSchedulingStrategy(
            placement, placement_group_bundle_index=spec.rank
        )
        is_cuda = spec.hardware.device == "cuda"
        self._actor = actor_class.options(
            name=name,
            num_cpus=1,
            num_gpus=1 if is_cuda else 0,
            max_concurrency=2,
            max_restarts=0,
            scheduling_strategy=strategy,
        ).remote(spec)

    async def watch(self) -> None:
        await self._actor.watch.remote()

    def kill(self) -> None:
        ray.kill(self._actor, no_restart=True)


def _group_maker(settings: ModelArgs, replica_id: str) -> Any:
    """A function that makes the next generation of a replica's shards."""
    model, hardware = settings.model, settings.hardware
    size = model.tensor_parallel
    assert isinstance(size, int), "the planner resolved the size"
    socket_dir, host = _socket_folder(), _node_address()
    placement = get_current_placement_group()
    assert placement is not None, "a replica is deployed with one bundle for each shard"
    actor_class: Any = ray.remote(Shard)  # once: Ray keeps a copy of each such class for ever
    generation = 0

    def make_group(on_message: Any, on_progress: Any, on_lost: Any) -> ShardGroup:
        nonlocal generation
        suffix = f"#{generation}" if generation else ""
        generation += 1

        def specs(control_address: str, secret: bytes) -> list[ShardSpec]:
            return [
                ShardSpec(
                    model=model,
                    hardware=hardware,
                    rank=rank,
                    size=size,
                    replica_id=replica_id,
                    control_address=control_address,
                    secret=secret,
                    socket_dir=socket_dir,
                    log_level=settings.log_level,
                )
                for rank in range(size)
            ]

        def start_shard(spec: ShardSpec) -> _ShardActor:
            name = f"{model.name}/{replica_id}/rank{spec.rank}{suffix}"
            return _ShardActor(actor_class, placement, spec, name=name)

        return ShardGroup(
            specs=specs,
            start_shard=start_shard,
            on_message=on_message,
            on_progress=on_progress,
            on_lost=on_lost,
            socket_dir=socket_dir,
            host=host,
        )

    return make_group


def _run_folder() -> Path | None:
    """The private folder of a local Shoal, where there is one."""
    text = os.environ.get(RUN_FOLDER_VARIABLE)
    return Path(text) if text else None


def _progress_folder() -> Path | None:
    run = _run_folder()
    return None if run is None else run / "progress"


def _socket_folder() -> str:
    """A private folder with a short path for this process' Unix sockets."""
    run = _run_folder()
    if run is None:
        return tempfile.mkdtemp(prefix="shoal-", dir="/tmp")
    folder = run / "s"
    folder.mkdir(mode=0o700, exist_ok=True)
    return str(folder)


def _node_address() -> str:
    address: Any = ray.util.get_node_ip_address
    return str(address())
