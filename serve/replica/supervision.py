"""When to rebuild a replica's shards and when to give up: a state machine without I/O.

::

    starting --ready--> ready --lost--> rebuilding --ready--> ready
        |                                   |  ^
        +--failed--> exit                   +--+ failed, once; failed twice --> exit
"""

from __future__ import annotations

from enum import Enum

MAX_FAILED_REBUILDS = 2


class State(Enum):
    """Where a replica is in its life."""

    STARTING = "starting"
    READY = "ready"
    REBUILDING = "rebuilding"
    FAILED = "failed"


class Action(Enum):
    """What the replica does next."""

    NOTHING = "nothing"
    BUILD = "build"
    EXIT = "exit"


class Supervision:
    """Takes events, returns actions; `num_rebuilds` counts rebuilds begun."""

    def __init__(self) -> None:
        self.state = State.STARTING
        self.num_rebuilds = 0
        self._num_failed = 0

    def on_ready(self) -> Action:
        """All shards of a build are ready."""
        self.state = State.READY
        self._num_failed = 0
        return Action.NOTHING

    def on_lost(self) -> Action:
        """A shard of a ready group is gone."""
        if self.state is not State.READY:
            return Action.NOTHING
        self.state = State.REBUILDING
        self.num_rebuilds += 1
        return Action.BUILD

    def on_build_failed(self) -> Action:
        """A build did not become ready."""
        self._num_failed += 1
        if self.state is State.REBUILDING and self._num_failed < MAX_FAILED_REBUILDS:
            return Action.BUILD
        self.state = State.FAILED
        return Action.EXIT
