"""How far a replica's start is, as one small JSON file that `shoal up` draws a bar from.

Only where a run folder is known (a local Shoal); elsewhere nothing is written. A file, since the
reader is no Ray process and the replica answers no calls before it is ready.
"""

from __future__ import annotations

import os
from collections.abc import Set
from pathlib import Path

import msgspec

from serve.messages import ShardProgress


class ProgressFile:
    """Keeps `<folder>/<name>.json` up to date; `folder` None means that nobody looks."""

    def __init__(self, folder: Path | None, name: str) -> None:
        self._path = None if folder is None else folder / f"{name}.json"
        self._ranks: dict[int, ShardProgress] = {}

    def update(self, progress: ShardProgress) -> None:
        """A shard got further."""
        self._ranks[progress.rank] = progress
        self._write(is_ready=False)

    def ready(self, *, kernels: Set[str]) -> None:
        """All shards are ready, and compute with these; shown by `shoal status`."""
        self._write(is_ready=True, kernels=kernels)

    def fail(self, error: str) -> None:
        """The start failed for this reason."""
        self._write(is_ready=False, error=error)

    def remove(self) -> None:
        """The replica goes."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _write(self, *, is_ready: bool, error: str = "", kernels: Set[str] = frozenset()) -> None:
        if self._path is None:
            return
        ranks = self._ranks.values()
        order = ("import", "connect", "weights", "warm_up")
        phase = min((rank.phase for rank in ranks), key=order.index, default="import")
        state = {
            "phase": phase,
            "num_bytes": sum(rank.num_bytes for rank in ranks),
            "num_total_bytes": sum(rank.num_total_bytes for rank in ranks),
            "ready": is_ready,
            "error": error,
            "kernels": sorted(kernels - {""}),
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".part")
        partial.write_bytes(msgspec.json.encode(state))
        os.replace(partial, self._path)
