"""Length-prefixed msgpack frames.

::

    | length: 4 bytes, little endian | msgpack of one message |

Not a protocol of its own: what a message means is `serve.messages`' business. A frame longer than
`MAX_FRAME_BYTES` ends the connection, since a peer that sends one is not ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

HEADER_BYTES = 4
MAX_FRAME_BYTES = 64 * 1024 * 1024

_encoder = msgspec.msgpack.Encoder()


class FrameError(Exception):
    """A peer sent something that is not a frame of ours."""


def encode_frame(message: msgspec.Struct) -> bytes:
    """One message with its length in front."""
    buffer = bytearray(HEADER_BYTES)
    _encoder.encode_into(message, buffer, HEADER_BYTES)
    size = len(buffer) - HEADER_BYTES
    if size > MAX_FRAME_BYTES:
        raise FrameError(f"a frame must be <= {MAX_FRAME_BYTES} bytes, got {size}")
    buffer[:HEADER_BYTES] = size.to_bytes(HEADER_BYTES, "little")
    return bytes(buffer)


class FrameDecoder:
    """Bytes in, messages out, whatever the boundaries at which bytes arrive."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[Any]) -> None:
        self._decoder = decoder
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """Every message that `data` completes.

        Raises:
            FrameError: too long, or not one of the decoder's messages.
        """
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= HEADER_BYTES:
                size = int.from_bytes(buffer[start : start + HEADER_BYTES], "little")
                if size > MAX_FRAME_BYTES:
                    raise FrameError(f"a frame must be <= {MAX_FRAME_BYTES} bytes, got {size}")
                end = start + HEADER_BYTES + size
                if len(buffer) < end:
                    break
                payload = bytes(buffer[start + HEADER_BYTES : end])
                start = end
                try:
                    message = self._decoder.decode(payload)
                except msgspec.MsgspecError as exc:
                    raise FrameError(f"not a message of this connection: {exc}") from exc
                yield message
        finally:
            del buffer[:start]
