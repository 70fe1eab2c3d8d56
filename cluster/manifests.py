"""What is deployed, as data: the body of `PUT /api/serve/applications/`, the same everywhere.

Locally `shoal up` sends it; in a RayService it is `serveConfigV2`. `args` holds only what needs a
restart of its application; counts and time limits are beside it and change in place.
"""

from __future__ import annotations

from typing import Any

from serve.config import HardwareConfig, ModelConfig, ShoalConfig

INGRESS_APPLICATION = "shoal"
# A share that lets two copies and their successors fit beside the replica of an engine pod.
INGRESS_CPUS = 0.25
_ELSEWHERE = {"preset", "repository", "revision", "replicas", "prediction"}
_HARDWARE_OF_SHARDS = {"name", "device", "threads_per_shard"}
_CHOSEN_BY_SHARDS = {"kernels"}  # where nobody chose: what each one's CPU has


def serve_applications(config: ShoalConfig) -> dict[str, Any]:
    """The deploy request for a resolved configuration (no "auto" left in it)."""
    hardware = config.hardware
    assert isinstance(hardware, HardwareConfig), "the planner resolved the hardware"
    return {
        "http_options": {"host": config.http.host, "port": config.http.port},
        "applications": [
            *(_model_application(model, hardware, config) for model in config.models),
            _ingress_application(config),
        ],
    }


def placement_bundles(model: ModelConfig, hardware: HardwareConfig) -> list[dict[str, float]]:
    """One bundle per shard; the replica's own share is added to the first."""
    assert isinstance(model.tensor_parallel, int), "the planner resolved the size"
    gpu = {"GPU": 1.0} if hardware.device == "cuda" else {}
    shards: list[dict[str, float]] = [{"CPU": 1.0, **gpu} for _ in range(model.tensor_parallel)]
    shards[0]["CPU"] += 1.0
    return shards


def _model_application(
    model: ModelConfig, hardware: HardwareConfig, config: ShoalConfig
) -> dict[str, Any]:
    deployment: dict[str, Any] = {
        "name": "Replica",
        "graceful_shutdown_timeout_s": model.longest_generation_s,
        "graceful_shutdown_wait_loop_s": 0.5,
        "ray_actor_options": {"num_cpus": 1},
        "placement_group_bundles": placement_bundles(model, hardware),
        "placement_group_strategy": "STRICT_PACK",
        # Without room for a second copy its start would wait for ever: stop the first one then.
        "max_surge_percent": 100 if hardware.has_spare else 0,
        **_counts(model),
        **_user_config(model),
    }
    return {
        "name": model.application,
        "route_prefix": None,
        "import_path": "serve.app:build_model",
        "args": {
            "model": _model_args(model),
            "hardware": _hardware_args(hardware),
            "log_level": config.log_level,
        },
        "deployments": [deployment],
    }


def _model_args(model: ModelConfig) -> dict[str, Any]:
    """What was written or resolved: a default that nobody chose is the version's own."""
    return model.model_dump(mode="json", exclude_unset=True, exclude=_ELSEWHERE)


def _hardware_args(hardware: HardwareConfig) -> dict[str, Any]:
    always = hardware.model_dump(mode="json", include=_HARDWARE_OF_SHARDS)
    return always | hardware.model_dump(
        mode="json", include=_CHOSEN_BY_SHARDS, exclude_defaults=True
    )


def _user_config(model: ModelConfig) -> dict[str, Any]:
    """What a running copy takes in place (`serve.app.Tunables`)."""
    if model.prediction is None:
        return {}
    return {"user_config": {"prediction": model.prediction.model_dump(mode="json")}}


def _counts(model: ModelConfig) -> dict[str, Any]:
    bounds = model.replicas
    if bounds.min == bounds.max:
        return {"num_replicas": bounds.min}
    return {
        "autoscaling_config": {
            "min_replicas": bounds.min,
            "max_replicas": bounds.max,
            "target_ongoing_requests": bounds.target_open_requests,
            "metrics_interval_s": 1.0,
            "look_back_period_s": 5.0,
            "upscale_delay_s": 3.0,
            "downscale_delay_s": 120.0,
        }
    }


def _ingress_application(config: ShoalConfig) -> dict[str, Any]:
    longest_s = max(model.longest_generation_s for model in config.models)
    return {
        "name": INGRESS_APPLICATION,
        "route_prefix": "/",
        "import_path": "serve.app:build_ingress",
        "args": {
            "http": config.http.model_dump(mode="json", exclude_unset=True),
            "models": [_model_args(model) for model in config.models],
            "log_level": config.log_level,
        },
        "deployments": [
            {
                "name": "Ingress",
                "num_replicas": config.ingress_copies,
                "graceful_shutdown_timeout_s": longest_s,
                "graceful_shutdown_wait_loop_s": 0.5,
                "ray_actor_options": {"num_cpus": INGRESS_CPUS},
                "max_surge_percent": 100,
            }
        ],
    }
