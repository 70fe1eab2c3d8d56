"""What an ingress process knows of every replica: the one place where router and sockets meet.

The router is made by Ray Serve, the token sockets by the ingress; both live in the ingress process
and find each other here. This is the only module-level state of the data plane. Methods are called
on the ingress' event loop, but for `set_replicas`, which the router may call from another thread.
"""

from __future__ import annotations

import asyncio
import threading

from serve.messages import Load


class ReplicaTable:
    """The replicas of one model.

    A replica is ready from the moment that Serve lists it, until a sign of its shards' death; then
    the ingress asks it to say when it is ready again, and marks it so.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listed: frozenset[str] = frozenset()
        self._not_ready: set[str] = set()
        self._loads: dict[str, Load] = {}
        self._num_open: dict[str, int] = {}
        self._num_chosen: dict[str, int] = {}
        self._waiters: set[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = set()

    def set_replicas(self, replica_ids: frozenset[str]) -> None:
        """Serve's list changed."""
        with self._lock:
            self._listed = replica_ids
            self._not_ready &= replica_ids
            for gone in (self._loads.keys() | self._num_chosen.keys()) - replica_ids:
                self._forget_load(gone)
        self._wake()

    @property
    def replica_ids(self) -> frozenset[str]:
        """Every replica that Serve lists."""
        return self._listed

    @property
    def ready_ids(self) -> frozenset[str]:
        """Replicas that take requests."""
        with self._lock:
            return self._listed - self._not_ready

    def mark_not_ready(self, replica_id: str) -> bool:
        """Skip a replica from now on, and forget its load; False where it was marked already."""
        with self._lock:
            if replica_id in self._not_ready:
                return False
            self._not_ready.add(replica_id)
            self._forget_load(replica_id)
            return True

    def mark_ready(self, replica_id: str) -> None:
        """A replica takes requests again."""
        with self._lock:
            self._not_ready.discard(replica_id)
        self._wake()

    def set_load(self, replica_id: str, load: Load) -> None:
        """A frame told a replica's load; it outweighs what was guessed of requests on their way."""
        self._loads[replica_id] = load
        self._num_chosen.pop(replica_id, None)

    def choose(self, replica_id: str) -> None:
        """A request is about to go to a replica."""
        self._num_chosen[replica_id] = self._num_chosen.get(replica_id, 0) + 1

    def book(self, replica_id: str, change: int) -> None:
        """Count requests of this process that are open on a replica (+1 once it says so, -1)."""
        _count(self._num_open, replica_id, change)
        if change > 0:
            _count(self._num_chosen, replica_id, -1)

    def score(self, replica_id: str) -> tuple[int, int]:
        """What to minimise: sequences in the engine or on their way, then tokens that wait."""
        load = self._loads.get(replica_id, _IDLE)
        known = max(load.num_running + load.num_waiting, self._num_open.get(replica_id, 0))
        return known + self._num_chosen.get(replica_id, 0), load.num_waiting_tokens

    async def wait_ready(self) -> None:
        """Return as soon as some replica is ready; the caller sets the time limit."""
        while not self.ready_ids:
            loop = asyncio.get_running_loop()
            waiter = (loop, loop.create_future())
            self._waiters.add(waiter)
            try:
                if not self.ready_ids:
                    await waiter[1]
            finally:
                self._waiters.discard(waiter)

    def _forget_load(self, replica_id: str) -> None:
        self._loads.pop(replica_id, None)
        self._num_chosen.pop(replica_id, None)

    def _wake(self) -> None:
        for loop, future in list(self._waiters):
            loop.call_soon_threadsafe(_resolve, future)


def _count(counts: dict[str, int], key: str, change: int) -> None:
    """Change a count that is never negative and not kept at 0."""
    count = counts.get(key, 0) + change
    if count > 0:
        counts[key] = count
    else:
        counts.pop(key, None)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


_IDLE = Load()
_tables: dict[str, ReplicaTable] = {}
_tables_lock = threading.Lock()


def table(app_name: str) -> ReplicaTable:
    """The table of the model that Serve runs as application `app_name`, made on first use."""
    with _tables_lock:
        return _tables.setdefault(app_name, ReplicaTable())
