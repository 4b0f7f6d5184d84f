"""Header blocks: what is read, what may be remembered, and that ours are read by others."""

from __future__ import annotations

import contextlib

import hypothesis.strategies as st
import pytest
from hpack import Decoder, Encoder
from hypothesis import given

from gateway.protocol.hpack_blocks import Blocks, list_bytes, metadata_literal, status_literal
from gateway.protocol.http2_frames import ConnectionFault, ErrorCode

FIELDS = st.lists(st.tuples(st.binary(min_size=1, max_size=20), st.binary(max_size=300)), max_size=10)


@given(FIELDS)
def test_what_we_write_is_read(fields: list[tuple[bytes, bytes]]) -> None:
    block = b"".join(metadata_literal(name, value) for name, value in fields)
    decoder = Decoder()
    assert [(name, value) for name, value in decoder.decode(block, raw=True)] == fields
    assert not decoder.header_table.dynamic_entries, "nothing we write needs a table"


@pytest.mark.parametrize("status", [200, 404, 415, 405, 999])
def test_statuses(status: int) -> None:
    ((name, value),) = Decoder().decode(status_literal(status))
    assert f"{name!s} {value!s}" == f":status {status}"


def test_static_names_are_used() -> None:
    assert len(metadata_literal(b"content-type", b"")) == 3
    assert len(metadata_literal(b"content-typo", b"")) == 15


@given(st.lists(FIELDS, max_size=4))
def test_what_others_write_is_read(lists: list[list[tuple[bytes, bytes]]]) -> None:
    encoder, blocks = Encoder(), Blocks(1 << 20)
    for fields in lists:
        assert blocks.decode(encoder.encode(fields))[0] == fields


def test_only_blocks_that_leave_the_table_alone_may_be_remembered() -> None:
    encoder, blocks = Encoder(), Blocks(1 << 16)
    first = encoder.encode([(b"x-a", b"1")])
    assert blocks.decode(first)[1] is False
    indexed = encoder.encode([(b"x-a", b"1")])
    assert blocks.decode(indexed)[1] is True
    blocks.remember(indexed, "meaning")
    assert blocks.decode(metadata_literal(b"x-b", b"2"))[1] is True
    assert blocks.remembered == {indexed: "meaning"}
    assert blocks.decode(encoder.encode([(b"x-b", b"2")]))[1] is False
    assert blocks.remembered == {}
    blocks.remember(indexed, "meaning")
    assert blocks.decode(b"\x20" + metadata_literal(b"x-b", b"2"))[1] is False, "a changed size changes the table"
    assert blocks.remembered == {}


@given(st.binary(max_size=200))
def test_noise_is_refused_or_read(noise: bytes) -> None:
    limit = 256
    with contextlib.suppress(ConnectionFault):
        fields, _ = Blocks(limit).decode(noise)
        assert list_bytes(fields) <= limit * 4


def test_faults_say_what_is_wrong() -> None:
    with pytest.raises(ConnectionFault) as caught:
        Blocks(1 << 16).decode(b"\x80")
    assert caught.value.code is ErrorCode.COMPRESSION_ERROR
    with pytest.raises(ConnectionFault) as caught:
        Blocks(10).decode(metadata_literal(b"x", b"a" * 50))
    assert caught.value.code is ErrorCode.ENHANCE_YOUR_CALM
