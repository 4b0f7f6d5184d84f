"""gRPC as bytes: heads, timeouts, status texts, metadata."""

from __future__ import annotations

import urllib.parse

import hypothesis.strategies as st
import pytest
from hpack import Decoder
from hypothesis import given

from gateway.protocol import grpc_wire
from gateway.protocol.hpack_blocks import Fields
from gateway.protocol.http2_fields import read_request
from tests.protocol.http2_peer import REQUEST


def head_of(*extra: tuple[bytes, bytes], without: bytes = b"-") -> grpc_wire.CallHead:
    return grpc_wire.read_head(read_request([pair for pair in [*REQUEST, *extra] if pair[0] != without]))


def test_a_plain_head() -> None:
    head = head_of((b"user-agent", b"x"), (b"x-a", b"1"), (b"x-a", b"2"))
    assert (head.path, head.timeout_s, head.encoding, head.http_status) == (b"/a.B/C", None, b"identity", 200)
    assert head.metadata == ((b"user-agent", b"x"), (b"x-a", b"1"), (b"x-a", b"2")), "gRPC's own fields are no metadata"
    assert (head.refusal, head.accept_encoding) == (None, ())


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"1H", 3600.0),
        (b"2M", 120.0),
        (b"3S", 3.0),
        (b"4m", 0.004),
        (b"5u", 5e-6),
        (b"6n", 6e-9),
        (b"99999999n", 0.099999999),
        (b"0S", 0.0),
        (b"99999999H", grpc_wire.MAX_TIMEOUT_S),
        (b"", None),
        (b"1", None),
        (b"S", None),
        (b"1s", None),
        (b"123456789S", None),
        (b"-1S", None),
        (b"1.5S", None),
        (b"1S ", None),
        ("1S".encode("utf-16"), None),
        ("\u0661S".encode(), None),
    ],
)
def test_timeouts(value: bytes, seconds: float | None) -> None:
    found = grpc_wire.timeout_of(value)
    assert found == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    ("field", "status"),
    [((b"grpc-timeout", b"soon"), 3), ((b"grpc-encoding", b"br"), 12), ((b"grpc-encoding", b"GZIP"), 12)],
)
def test_heads_that_cannot_be_served(field: tuple[bytes, bytes], status: int) -> None:
    refusal = head_of(field).refusal
    assert refusal is not None
    assert refusal[0] == status
    assert field[0].decode() in refusal[1]
    assert field[1].decode() in refusal[1]


def test_encodings() -> None:
    head = head_of((b"grpc-encoding", b"gzip"), (b"grpc-accept-encoding", b"identity, deflate , br,gzip"))
    assert (head.encoding, head.accept_encoding) == (b"gzip", (b"deflate", b"gzip"))


def test_what_is_no_grpc() -> None:
    assert head_of(without=b"content-type").http_status == 415
    get: Fields = [(name, b"GET" if name == b":method" else value) for name, value in REQUEST]
    assert grpc_wire.read_head(read_request(get)).http_status == 405


@given(st.text(max_size=200))
def test_status_texts_survive(text: str) -> None:
    clean = text.encode("utf-8", "replace").decode()
    encoded = grpc_wire.percent_encoded(text)
    assert all(0x20 <= byte <= 0x7E for byte in encoded)
    assert urllib.parse.unquote_to_bytes(encoded).decode("utf-8", "replace") == clean


def test_a_status_text_is_bounded() -> None:
    assert len(grpc_wire.percent_encoded("x" * 10**6)) == grpc_wire.MAX_MESSAGE_TEXT_BYTES


@pytest.mark.parametrize("character", ["\u00e9", "\u2603", "\U0001f389", "%", "\n"])
@pytest.mark.parametrize("before", range(10))
def test_a_status_text_is_cut_behind_a_whole_character(character: str, before: int) -> None:
    """A long text of characters that are encoded must neither outgrow what clients take nor end within one."""
    encoded = grpc_wire.percent_encoded("x" * before + character * 5000)
    one = 3 * len(character.encode())
    assert grpc_wire.MAX_MESSAGE_TEXT_BYTES - one < len(encoded) <= grpc_wire.MAX_MESSAGE_TEXT_BYTES
    text = urllib.parse.unquote_to_bytes(encoded).decode()
    assert text == "x" * before + character * ((len(encoded) - before) // one)


def decoded(block: bytes) -> list[tuple[str, ...]]:
    return [tuple(map(str, field)) for field in Decoder().decode(block)]


def test_trailers() -> None:
    assert decoded(grpc_wire.trailers(3, "a%b", grpc_wire.binary_literal(b"x-bin", b"\0\xff"))) == [
        ("grpc-status", "3"),
        ("grpc-message", "a%25b"),
        ("x-bin", "AP8"),
    ]
    assert decoded(grpc_wire.TRAILERS_OK) == [("grpc-status", "0")]
    assert decoded(grpc_wire.HEADERS_BLOCK) == [(":status", "200"), ("content-type", "application/grpc")]


@given(st.binary(max_size=50))
def test_binary_metadata(value: bytes) -> None:
    ((_, text),) = Decoder().decode(grpc_wire.binary_literal(b"x-bin", value), raw=True)
    assert grpc_wire.binary_value(text) == value
    assert grpc_wire.binary_value(text + b"=" * (-len(text) % 4)) == value, "padded is fine too"


@pytest.mark.parametrize("value", [b"a", b"a*b=", b"\xff\xff"])
def test_binary_metadata_that_is_none(value: bytes) -> None:
    assert grpc_wire.binary_value(value) is None
