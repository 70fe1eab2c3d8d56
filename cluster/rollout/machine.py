"""What `follow` feeds: a state machine of snapshots and a clock; and the two short ones.

The long one is `rollout`. These wait for an end: of the pods of a suspended Shoal, and of a removed
one. Pure like it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from .snapshot import Snapshot

State = Literal["going on", "ready", "failed", "out of time"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """How it ended; `message` and `hint` are the root cause, if it did not end well."""

    state: State
    message: str = ""
    hint: str = ""


GOING_ON = Verdict("going on")


class Machine(Protocol):
    """Feed it snapshots; it answers the lines that are new, until it has a verdict."""

    @property
    def verdict(self) -> Verdict: ...

    def observe(self, snapshot: Snapshot, *, now_s: float) -> list[str]: ...


class Ending:
    """Waits until no pod is left: suspended, or (`is_removal`) without a RayService any more.

    "Suspended" comes before the pods are gone, and GPUs are free only then.
    """

    def __init__(self, name: str, *, is_removal: bool, now_s: float, limit_s: float | None) -> None:
        self._name = name
        self._is_removal = is_removal
        self._started_s = now_s
        self._limit_s = limit_s
        self._told = ""
        self.verdict = GOING_ON

    def observe(self, snapshot: Snapshot, *, now_s: float) -> list[str]:
        """The one line that says what is left, when it changes."""
        is_ended = snapshot.service is None if self._is_removal else snapshot.is_true("Suspended")
        if is_ended and not snapshot.pods:
            self.verdict = Verdict("ready")
        elif self._limit_s is not None and now_s - self._started_s >= self._limit_s:
            self.verdict = self._out_of_time(snapshot)
        line = self._describe(snapshot)
        is_new, self._told = line != self._told, line
        return [line] if is_new else []

    def _describe(self, snapshot: Snapshot) -> str:
        pods = f"{len(snapshot.pods)} pod{'' if len(snapshot.pods) == 1 else 's'}"
        if snapshot.pods:
            return f"pods: {pods} to end"
        if snapshot.service is not None and self._is_removal:
            return "service: waits for the operator to let it go"
        if self._is_removal or snapshot.is_true("Suspended"):
            return "pods: all gone"
        return "service: suspending"

    def _out_of_time(self, snapshot: Snapshot) -> Verdict:
        if snapshot.pods:
            names = ", ".join(pod["metadata"]["name"] for pod in snapshot.pods)
            return Verdict(
                "out of time",
                f"pods have not ended: {names}",
                "Streams may run to their grace period; kubectl describe pod says what holds them.",
            )
        if not self._is_removal:
            return Verdict(
                "out of time",
                "the RayService is not suspended",
                "Only a running KubeRay operator (1.7 or later) does that: is it alive?",
            )
        return Verdict(
            "out of time",
            f"RayService {self._name} still has its finalizer, which only the operator removes",
            "Start KubeRay's operator again; if it is gone for good: kubectl patch rayservice"
            f' {self._name} --type merge -p \'{{"metadata":{{"finalizers":null}}}}\'',
        )
