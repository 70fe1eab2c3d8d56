"""The router over Serve's own routing loop, with replicas that are no processes."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from ray.exceptions import ActorUnavailableError
from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
)
from ray.serve.request_router import PendingRequest, RunningReplica

from serve.messages import Load
from serve.routing import registry
from serve.routing.router import LeastLoadedRouter

MAX_CHOICES = 50


class _Replica:
    """What the routing loop asks of a `RunningReplica`."""

    max_ongoing_requests = 100

    def __init__(self, name: str, deployment: DeploymentID) -> None:
        self.replica_id = ReplicaID(name, deployment_id=deployment)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        if self.replica_id.unique_id == "unreachable":
            raise ActorUnavailableError("no way to it", b"0" * 16)
        return 0


class _Router(LeastLoadedRouter):
    """Refuses to spin: an empty choice without a pause would stop the whole event loop."""

    num_choices = 0

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        self.num_choices += 1
        if self.num_choices > MAX_CHOICES:
            raise AssertionError("the routing loop spins")
        return await super().choose_replicas(candidate_replicas, pending_request)


class _World:
    def __init__(self, application: str) -> None:
        self.deployment = DeploymentID("Replica", application)
        self.table = registry.table(application)
        self.router = _Router(
            deployment_id=self.deployment,
            handle_source=DeploymentHandleSource.REPLICA,
            use_replica_queue_len_cache=True,
            max_backoff_s=0.05,
        )

    def list(self, *names: str) -> None:
        replicas = [_Replica(name, self.deployment) for name in names]
        self.router.update_replicas(replicas)  # type: ignore[arg-type]

    async def route(self, *, timeout_s: float = 60.0, **arguments: str) -> str:
        metadata = RequestMetadata(request_id="r", internal_request_id=f"i{id(arguments)}")
        request = PendingRequest(args=[], kwargs=arguments, metadata=metadata)
        async with asyncio.timeout(timeout_s):
            replica = await self.router._choose_replica_for_request(request)
        return replica.replica_id.unique_id


def _run(application: str, test: Callable[[_World], Awaitable[None]]) -> None:
    async def main() -> None:
        await test(_World(application))

    asyncio.run(main())


def test_requests_go_to_the_replica_with_the_least_work() -> None:
    async def test(world: _World) -> None:
        world.list("a", "b")
        world.table.set_load("a", Load(num_running=3))
        world.table.set_load("b", Load(num_running=1))
        assert [await world.route() for _ in range(3)] == ["b", "b", "a"]

    _run("least", test)


def test_a_replica_that_is_not_ready_is_skipped() -> None:
    async def test(world: _World) -> None:
        world.list("a", "b")
        world.table.mark_not_ready("a")
        assert [await world.route() for _ in range(3)] == ["b"] * 3

    _run("skip", test)


def test_requests_on_their_way_when_the_only_replica_is_marked_are_sent_and_stop_nothing() -> None:
    async def test(world: _World) -> None:
        world.list("a")
        world.table.mark_not_ready("a")
        assert await asyncio.gather(*(world.route() for _ in range(8))) == ["a"] * 8

    _run("marked", test)


def test_the_question_whether_a_replica_is_ready_overtakes_requests_that_find_none() -> None:
    async def test(world: _World) -> None:
        world.list("a")
        world.table.mark_not_ready("a")
        requests = [asyncio.create_task(world.route()) for _ in range(8)]
        await asyncio.sleep(0)
        assert await world.route(replica_id="a") == "a"
        await asyncio.gather(*requests)

    _run("overtakes", test)


def test_a_call_by_id_goes_to_that_replica_though_it_is_not_the_best() -> None:
    async def test(world: _World) -> None:
        world.list("a", "b")
        world.table.mark_not_ready("a")
        world.table.set_load("a", Load(num_running=9))
        assert await world.route(replica_id="a") == "a"

    _run("by-id", test)


def test_a_replica_that_cannot_be_reached_is_tried_with_pauses() -> None:
    async def test(world: _World) -> None:
        world.list("unreachable")
        with pytest.raises(TimeoutError):
            await world.route(timeout_s=1.0)
        assert 2 < world.router.num_choices < 40

    _run("unreachable", test)


def test_a_replica_that_a_call_found_dead_is_no_longer_listed() -> None:
    async def test(world: _World) -> None:
        world.list("a", "b")
        world.router.on_replica_actor_died(ReplicaID("a", deployment_id=world.deployment))
        assert world.table.replica_ids == {"b"}
        world.router.on_replica_actor_died(ReplicaID("b", deployment_id=world.deployment))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(world.table.wait_ready(), 0.01)

    _run("dead", test)
