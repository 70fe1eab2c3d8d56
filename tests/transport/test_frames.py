import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.messages import Abort, Hello, Load, StreamMessage, TokenDelta, TokenFrame
from serve.transport.frames import MAX_FRAME_BYTES, FrameDecoder, FrameError, encode_frame


def _decoder() -> FrameDecoder:
    return FrameDecoder(msgspec.msgpack.Decoder(StreamMessage | Abort))


@given(ids=st.lists(st.integers(0, 2**63 - 1), max_size=20), cuts=st.lists(st.integers(1, 50)))
def test_messages_survive_any_boundaries_between_reads(ids: list[int], cuts: list[int]) -> None:
    sent = [TokenFrame(Load(1), [TokenDelta(i, 0, 0, [1, 2])]) if i % 2 else Abort(i) for i in ids]
    data = b"".join(encode_frame(message) for message in sent)
    decoder = _decoder()
    received = []
    for cut in cuts:
        received += decoder.feed(data[:cut])
        data = data[cut:]
    received += decoder.feed(data)
    assert received == sent


def test_a_frame_over_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(FrameError, match=str(MAX_FRAME_BYTES)):
        list(_decoder().feed((MAX_FRAME_BYTES + 1).to_bytes(4, "little")))


def test_bytes_that_are_no_message_end_in_a_frame_error() -> None:
    frame = encode_frame(Hello(b"s", "r"))
    with pytest.raises(FrameError, match="not a message"):
        list(_decoder().feed(frame[:4] + b"\xc1" * (len(frame) - 4)))
