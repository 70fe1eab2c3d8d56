from __future__ import annotations

from typing import Any

import pytest

from serve.app import _ShardActor, build_model
from serve.config import HardwareConfig, ModelConfig
from serve.shards.spec import ShardSpec


class _ActorClass:
    """Keeps the options that an actor is made with."""

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}

    def options(self, **options: Any) -> _ActorClass:
        self.made = options
        return self

    def remote(self, spec: ShardSpec) -> None:
        assert spec.rank == 1


@pytest.mark.parametrize(("device", "num_gpus"), [("cpu", 0), ("cuda", 1)])
def test_a_shard_asks_ray_for_the_gpu_that_its_bundle_holds(device: Any, num_gpus: int) -> None:
    hardware = HardwareConfig(device=device)
    spec = ShardSpec(ModelConfig(name="m"), hardware, 1, 2, "r", "", b"", "")
    actor_class = _ActorClass()
    _ShardActor(actor_class, None, spec, name="m/r/rank1")  # type: ignore[arg-type]
    assert actor_class.made["num_gpus"] == num_gpus
    assert actor_class.made["scheduling_strategy"].placement_group_bundle_index == 1


def test_a_model_on_gpus_is_built() -> None:
    args = {"model": {"name": "m", "path": "/models/m"}, "hardware": {"device": "cuda"}}
    assert build_model(args) is not None
