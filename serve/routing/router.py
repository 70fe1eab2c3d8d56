"""Ray Serve's request router for replicas: skip those that are not ready, prefer the least loaded.

Serve pickles this class by value and makes it in each process that has a handle, so it holds no
state of its own: what it knows is in `registry`. It runs on Serve's router loop.
"""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica


class LeastLoadedRouter(RequestRouter):
    """Routes by the load that token frames report, one step old.

    A call with the keyword `replica_id` goes to that replica while Serve lists it.
    """

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's list of running replicas changed; a draining one is off it at once."""
        from serve.routing import registry

        super().update_replicas(replicas)
        ids = frozenset(replica.replica_id.unique_id for replica in replicas)
        registry.table(self.app_name).set_replicas(ids)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """One rank per replica, best first; empty where none is ready."""
        from serve.routing import registry

        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        wanted = None if pending_request is None else pending_request.kwargs.get("replica_id")
        if wanted is not None:
            return [[by_id[wanted]]] if wanted in by_id else [candidate_replicas]
        table = registry.table(self.app_name)
        ready = [replica_id for replica_id in by_id if replica_id in table.ready_ids]
        ranked = sorted(ready, key=table.score)
        if ranked:
            table.choose(ranked[0])
        return [[by_id[replica_id]] for replica_id in ranked]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: object
    ) -> None:
        """A call was sent to a replica."""
        from serve.routing import registry

        registry.table(self.app_name).book(replica_id.unique_id, +1)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """A call ended, well or badly."""
        from serve.routing import registry

        registry.table(self.app_name).book(replica_id.unique_id, -1)
