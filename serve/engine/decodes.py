"""The sequences that decode, and what of them a step can take over as it is from the one before.

Not scheduling. The one decision: the list is replaced, never changed, so that steps in flight share
it, and it is replaced only after somebody joined or left.
"""

from __future__ import annotations

from array import array
from itertools import chain

from .sequence import Sequence, SequenceState


class Decodes:
    """`sequences`, oldest first, their `slots` as int32, and whether any of them has a grammar."""

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.slots = b""
        self.has_grammar = False
        self._joining: list[Sequence] = []
        self._is_stale = False

    def join(self, sequence: Sequence) -> None:
        """Decode `sequence`, whose last known token was just scheduled, from the next step on."""
        self._joining.append(sequence)
        self._is_stale = True

    def mark_stale(self) -> None:
        """Look again, before the next step, at who still decodes."""
        self._is_stale = True

    def refresh(self) -> None:
        """Take in who joined; leave out who left or gets its last token from a step in flight."""
        if self._is_stale:
            everybody, self._joining = chain(self.sequences, self._joining), []
            self._set(
                [
                    one
                    for one in everybody
                    if one.state is SequenceState.RUNNING
                    and one.num_computed_tokens + 1 < one.max_len
                ]
            )
            self._is_stale = False

    def leave_out_preempted(self) -> None:
        """Keep only who still runs, and who gets the last token in the step being put together."""
        self._set([one for one in self.sequences if one.state is SequenceState.RUNNING])

    def _set(self, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        self.slots = array("i", [sequence.slot for sequence in sequences]).tobytes()
        self.has_grammar = any(sequence.matcher is not None for sequence in sequences)
