"""Ray Serve's request router for replicas: skip those that are not ready, prefer the least loaded.

Serve pickles this class by value and makes it in each process that has a handle, so it holds no
state of its own: what it knows is in `registry`. It runs on Serve's router loop. The one decision
behind it: a request is never kept here. Serve's routing loop asks again at once, without a pause,
when it is given no replica, and that stops the event loop of the whole HTTP tier; where none is
ready, a request goes to one that says so itself, and the dispatcher waits and tries again.
"""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica


class LeastLoadedRouter(RequestRouter):
    """Routes by the load that token frames report, one step old.

    A call with the keyword `replica_id` goes to that replica while Serve lists it.
    """

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's list of running replicas changed; a draining one is off it at once."""
        super().update_replicas(replicas)
        self._tell_table()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """A call or a probe found a replica dead, before Serve's list says so."""
        super().on_replica_actor_died(replica_id)
        self._tell_table()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """One rank per ready replica, best first; every replica in one rank where none is ready."""
        from serve.routing import registry

        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        wanted = None
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # else Serve never pauses
            wanted = pending_request.kwargs.get("replica_id")
        if wanted is not None:
            return [[by_id[wanted]]] if wanted in by_id else [candidate_replicas]
        table = registry.table(self.app_name)
        ready = [replica_id for replica_id in by_id if replica_id in table.ready_ids]
        if not ready:
            return [candidate_replicas]
        ranked = sorted(ready, key=table.score)
        table.choose(ranked[0])
        return [[by_id[replica_id]] for replica_id in ranked]

    def _tell_table(self) -> None:
        from serve.routing import registry

        ids = frozenset(replica_id.unique_id for replica_id in self.curr_replicas)
        registry.table(self.app_name).set_replicas(ids)
