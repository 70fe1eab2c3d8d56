"""What the engine needs of whatever runs the model.

Not an implementation: `serve.runner` has one per device, `serve.testing` two without a model. The
one decision behind it: a step is started and sampled by two calls, so that masks are computed and
tokens are told while the forward pass runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from serve.messages import StepInput, StepOutput


class PendingOutput(Protocol):
    """The tokens of a step that is sampled, or will be as soon as the device gets there."""

    def result(self) -> StepOutput:
        """Wait for the tokens. Only rank 0 is asked.

        Raises:
            CollectiveError: a rank is gone.
        """
        ...


class Runner(Protocol):
    """Runs steps strictly in order: `start` and `sample` alternate, on every rank."""

    def start(self, step: StepInput) -> None:
        """Begin the forward pass of `step` and return at once.

        Raises:
            CollectiveError: a rank is gone.
        """
        ...

    def sample(self, masks: Mapping[int, np.ndarray]) -> PendingOutput:
        """Sample the step that was started last.

        `masks` are the tokens that grammars allow, by slot: uint32, bit i % 32 of word i // 32.

        Raises:
            CollectiveError: a rank is gone.
        """
        ...
