"""Rank 0 tells the other ranks what the next step is: one frame a step over a blocking socket.

Never through Ray and never through the event loop: the engine thread writes, the followers' only
thread reads. A follower answers nothing, it meets rank 0 in the collectives; a dead rank shows
there, or as the end of this socket.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence

import msgspec

from serve.errors import CollectiveError
from serve.messages import StepInput
from serve.transport.frames import FrameDecoder, FrameError, encode_frame

_CHUNK_BYTES = 1 << 16


class StepSender:
    """Rank 0's end: `followers[i]` is the connected socket of rank i + 1."""

    def __init__(self, followers: Sequence[socket.socket]) -> None:
        self._followers = list(followers)

    def send(self, step: StepInput) -> None:
        """Send a step to every follower.

        Raises:
            CollectiveError: a follower is gone.
        """
        if not self._followers:
            return
        frame = encode_frame(step)
        for index, follower in enumerate(self._followers):
            try:
                follower.sendall(frame)
            except OSError as exc:
                raise CollectiveError(f"rank {index + 1} left: {exc}") from exc

    def close(self) -> None:
        """End the channel; followers see the end of the socket."""
        for follower in self._followers:
            follower.close()


class StepReceiver:
    """A follower's end."""

    def __init__(self, root: socket.socket) -> None:
        self._root = root
        self._frames = FrameDecoder(msgspec.msgpack.Decoder(StepInput))

    def steps(self) -> Iterator[StepInput]:
        """Steps as they come, until rank 0 closes the channel.

        Raises:
            CollectiveError: what arrived is not a step.
        """
        while True:
            try:
                data = self._root.recv(_CHUNK_BYTES)
            except OSError:
                return
            if not data:
                return
            try:
                yield from self._frames.feed(data)
            except FrameError as exc:
                raise CollectiveError(f"rank 0 sent no step: {exc}") from exc

    def close(self) -> None:
        """End this side."""
        self._root.close()
