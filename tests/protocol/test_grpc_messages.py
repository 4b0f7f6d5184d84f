"""Messages cut out of a call's bytes."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from gateway.protocol.grpc_messages import MessageBuffer


def prefixed(message: bytes, flag: int = 0) -> bytes:
    return bytes((flag,)) + len(message).to_bytes(4, "big") + message


@given(st.lists(st.binary(max_size=30), max_size=8), st.integers(1, 17))
def test_messages_come_out_as_they_went_in(messages: list[bytes], step: int) -> None:
    stream = b"".join(map(prefixed, messages))
    buffer, found = MessageBuffer(), []
    for at in range(0, len(stream), step):
        buffer.add(stream[at : at + step])
        while buffer.length >= 0 and buffer.missing <= 0:
            found.append(buffer.pop())
    assert found == messages
    assert len(buffer) == 0


def test_what_is_missing() -> None:
    buffer = MessageBuffer()
    assert (buffer.length, buffer.missing) == (-1, 5)
    buffer.add(b"\1\0\0\0")
    assert (buffer.length, buffer.missing) == (-1, 1)
    buffer.add(b"\3a")
    assert (buffer.length, buffer.missing, buffer.flag) == (3, 2, 1)
    buffer.add(b"bcXY")
    assert buffer.missing == -2
    assert bytes(buffer.only()) == b"abcXY"


def test_the_only_message_is_not_copied() -> None:
    buffer = MessageBuffer()
    buffer.add(prefixed(b"abc"))
    view = buffer.only()
    assert (bytes(view), view.readonly) == (b"abc", True)
    assert view.obj is buffer._bytes


def test_the_buffer_does_not_keep_what_was_taken() -> None:
    buffer = MessageBuffer()
    for _ in range(100):
        buffer.add(prefixed(bytes(10_000)) * 2 + b"\0\0")
        buffer.pop()
        buffer.pop()
        buffer.add(b"\0\0\0")
        buffer.pop()
        assert len(buffer) == 0
    buffer.add(prefixed(bytes(50_000)) * 3)
    buffer.pop()
    buffer.pop()
    assert len(buffer._bytes) < 110_000
