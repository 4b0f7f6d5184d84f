"""Request heads: what is accepted, what is refused and as what, and that remembering changes neither."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import GatewayError
from gateway.protocol import http1_head
from gateway.protocol.http1_head import (
    CHUNKED,
    MAX_REMEMBERED_BLOCK_BYTES,
    MAX_REMEMBERED_BLOCKS,
    Head,
    Heads,
    parse_head,
)
from gateway.protocol.http1_limits import HttpLimits

LIMITS = HttpLimits()


def block(*lines: bytes) -> bytes:
    return b"\r\n".join(lines) + b"\r\n\r\n"


def get(*fields: bytes) -> bytes:
    return block(b"GET /v2 HTTP/1.1", b"Host: a", *fields)


def post(*fields: bytes) -> bytes:
    return block(b"POST /v2/models/m/infer HTTP/1.1", b"Host: a:8000", *fields)


def content(head: Head) -> dict[str, Any]:
    return {name: getattr(head, name) for name in Head.__slots__}


REFUSED = [
    # The eight that llhttp lets through (resilience notes, fact 6).
    ("no host", block(b"GET / HTTP/1.1"), 400),
    ("two hosts", get(b"Host: a"), 400),
    ("two different hosts", get(b"host: b"), 400),
    ("http 0.9", block(b"GET /"), 400),
    ("http 0.9 spelled out", block(b"GET / HTTP/0.9"), 505),
    ("chunked on 1.0", block(b"POST / HTTP/1.0", b"Transfer-Encoding: chunked"), 400),
    ("101 fields", get(*[b"A: b"] * 100), 431),
    ("300 fields", get(*[b"A: b"] * 300), 431),
    ("long field", get(b"A: " + b"b" * 16_384), 431),
    # Versions and request lines.
    ("http 1.2", block(b"GET / HTTP/1.2", b"Host: a"), 505),
    ("http 2", block(b"PRI * HTTP/2.0"), 505),
    ("version in lower case", block(b"GET / http/1.1", b"Host: a"), 400),
    ("version with a plus", block(b"GET / HTTP/+1.1", b"Host: a"), 400),
    ("two digits", block(b"GET / HTTP/1.10", b"Host: a"), 400),
    ("two spaces", block(b"GET  / HTTP/1.1", b"Host: a"), 400),
    ("tab as a space", block(b"GET\t/ HTTP/1.1", b"Host: a"), 400),
    ("trailing space", block(b"GET / HTTP/1.1 ", b"Host: a"), 400),
    ("space in the target", block(b"GET /a b HTTP/1.1", b"Host: a"), 400),
    ("fragment", block(b"GET /a#b HTTP/1.1", b"Host: a"), 400),
    ("bytes over 127 in the target", block(b"GET /\xc3\xa4 HTTP/1.1", b"Host: a"), 400),
    ("no path", block(b"GET v2 HTTP/1.1", b"Host: a"), 400),
    ("star with GET", block(b"GET * HTTP/1.1", b"Host: a"), 400),
    ("unknown method", block(b"FROB / HTTP/1.1", b"Host: a"), 400),
    ("method in lower case", block(b"get / HTTP/1.1", b"Host: a"), 400),
    ("connect", block(b"CONNECT a:443 HTTP/1.1", b"Host: a:443"), 400),
    ("another authority", block(b"GET http://b/ HTTP/1.1", b"Host: a"), 400),
    ("bad host", block(b"GET / HTTP/1.1", b"Host: a b"), 400),
    ("host with a path", block(b"GET / HTTP/1.1", b"Host: a/b"), 400),
    # Body framing.
    ("length and chunked", post(b"Content-Length: 5", b"Transfer-Encoding: chunked"), 400),
    ("chunked and length", post(b"Transfer-Encoding: chunked", b"Content-Length: 5"), 400),
    ("two lengths", post(b"Content-Length: 5", b"Content-Length: 6"), 400),
    ("two equal lengths", post(b"Content-Length: 5", b"Content-Length: 5"), 400),
    ("list of lengths", post(b"Content-Length: 5, 5"), 400),
    ("empty length", post(b"Content-Length:"), 400),
    ("negative length", post(b"Content-Length: -1"), 400),
    ("signed length", post(b"Content-Length: +5"), 400),
    ("hex length", post(b"Content-Length: 0x5"), 400),
    ("underscore in length", post(b"Content-Length: 1_0"), 400),
    ("fraction", post(b"Content-Length: 5.0"), 400),
    ("space in length", post(b"Content-Length: 5 5"), 400),
    ("arabic digits", post(b"Content-Length: \xd9\xa5"), 400),
    ("19 digits", post(b"Content-Length: 0000000000000000005"), 400),
    ("2**64", post(b"Content-Length: 18446744073709551616"), 400),
    ("over the limit", post(b"Content-Length: 67108865"), 413),
    ("18 digits", post(b"Content-Length: 999999999999999999"), 413),
    ("gzip, chunked", post(b"Transfer-Encoding: gzip, chunked"), 400),
    ("chunked, identity", post(b"Transfer-Encoding: chunked, identity"), 400),
    ("identity", post(b"Transfer-Encoding: identity"), 400),
    ("xchunked", post(b"Transfer-Encoding: xchunked"), 400),
    ("chunked in another case", post(b"Transfer-Encoding: Chunked"), 400),
    ("chunked in quotes", post(b'Transfer-Encoding: "chunked"'), 400),
    ("chunked twice", post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"), 400),
    ("chunked, chunked", post(b"Transfer-Encoding: chunked, chunked"), 400),
    ("identity then chunked", post(b"Transfer-Encoding: identity", b"Transfer-Encoding: chunked"), 400),
    ("empty coding", post(b"Transfer-Encoding:"), 400),
    # Fields.
    ("space before the colon", post(b"Content-Length : 5"), 400),
    ("tab before the colon", post(b"Transfer-Encoding\t: chunked"), 400),
    ("folded field", post(b"X: a", b" b"), 400),
    ("folded with a tab", post(b"X: a", b"\tTransfer-Encoding: chunked"), 400),
    ("folded first field", block(b"GET / HTTP/1.1", b" Host: a"), 400),
    ("no colon", post(b"Content-Length"), 400),
    ("empty name", post(b": a"), 400),
    ("brackets in a name", post(b"A[0]: b"), 400),
    ("bytes over 127 in a name", post(b"\xc3\xa4: b"), 400),
    ("delete character", post(b"X: a\x7f"), 400),
    ("two header lengths", post(b"Inference-Header-Content-Length: 1", b"inference-header-content-length: 2"), 400),
    ("two encodings", post(b"Content-Encoding: gzip", b"Content-Encoding: identity"), 400),
    ("two request ids", post(b"X-Request-Id: a", b"X-Request-Id: b"), 400),
    # Expectations.
    ("unknown expectation", post(b"Expect: 200-ok"), 417),
    ("two expectations", post(b"Expect: 100-continue", b"Expect: 100-continue"), 417),
]


@pytest.mark.parametrize(("raw", "status"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refused(raw: bytes, status: int) -> None:
    heads = Heads(LIMITS, lambda head: None)
    with pytest.raises(GatewayError) as caught:
        heads.read(raw)
    assert caught.value.status == status
    assert "Traceback" not in str(caught.value)
    assert not heads.remembered


def test_plain_post() -> None:
    head = parse_head(post(b"Content-Length: 0017", b"X-Empty:", b"Accept:  a \t"), LIMITS)
    assert (head.method, head.target, head.path) == (b"POST", b"/v2/models/m/infer", b"/v2/models/m/infer")
    assert (head.content_length, head.length, head.chunked, head.keep_alive) == (17, 17, False, True)
    assert head.headers == (
        (b"host", b"a:8000"),
        (b"content-length", b"0017"),
        (b"x-empty", b""),
        (b"accept", b"a"),
    )
    assert (head.http10, head.uncommon, head.expect_continue) == (False, False, False)


def test_without_a_body() -> None:
    head = parse_head(get(), LIMITS)
    assert (head.content_length, head.length, head.chunked) == (None, 0, False)


def test_chunked() -> None:
    head = parse_head(post(b"Transfer-Encoding: chunked"), LIMITS)
    assert (head.content_length, head.length, head.chunked) == (None, CHUNKED, True)


def test_query_and_escapes_stay_out_of_and_in_the_path() -> None:
    head = parse_head(block(b"GET /v2/models/a%2fb?x=/y?z HTTP/1.1", b"Host: a"), LIMITS)
    assert head.path == b"/v2/models/a%2fb"
    assert head.target == b"/v2/models/a%2fb?x=/y?z"


@pytest.mark.parametrize(
    ("target", "path"), [(b"http://A:80/v2?q", b"/v2"), (b"HTTP://a:80", b"/"), (b"https://a:80?q", b"/")]
)
def test_absolute_form(target: bytes, path: bytes) -> None:
    assert parse_head(block(b"GET " + target + b" HTTP/1.1", b"Host: a:80"), LIMITS).path == path


def test_options_star() -> None:
    assert parse_head(block(b"OPTIONS * HTTP/1.1", b"Host: a"), LIMITS).path == b"*"


@pytest.mark.parametrize(
    ("version", "connection", "keep_alive"),
    [
        (b"1.1", None, True),
        (b"1.1", b"keep-alive", True),
        (b"1.1", b"Close", False),
        (b"1.1", b"foo, close", False),
        (b"1.1", b"close, keep-alive", False),
        (b"1.0", None, False),
        (b"1.0", b"Keep-Alive", True),
        (b"1.0", b"foo", False),
    ],
)
def test_keep_alive(version: bytes, connection: bytes | None, keep_alive: bool) -> None:
    fields = [] if connection is None else [b"Connection: " + connection]
    head = parse_head(block(b"GET / HTTP/" + version, b"Host: a", *fields), LIMITS)
    assert head.keep_alive is keep_alive
    assert head.http10 is head.uncommon is (version == b"1.0")


@pytest.mark.parametrize("fields", [[b"Connection: Upgrade", b"Upgrade: websocket"], [b"Upgrade: h2c"]])
def test_upgrade_offers_are_ignored(fields: list[bytes]) -> None:
    head = parse_head(post(*fields, b"Content-Length: 3"), LIMITS)
    assert (head.keep_alive, head.length) == (True, 3)


def test_expect() -> None:
    assert parse_head(post(b"Expect: 100-Continue", b"Content-Length: 3"), LIMITS).expect_continue
    assert not parse_head(post(b"Expect: 100-continue"), LIMITS).expect_continue
    old = block(b"POST / HTTP/1.0", b"Expect: other", b"Content-Length: 3")
    assert not parse_head(old, LIMITS).expect_continue


def test_named_fields() -> None:
    head = parse_head(
        post(
            b"INFERENCE-header-content-length: 1_0",
            b"Content-Encoding: gzip",
            b"X-Request-Timeout-Ms: 5",
            b"X-Request-Id: a.B-9_",
        ),
        LIMITS,
    )
    assert head.inference_header_length == b"1_0"
    assert head.content_encoding == b"gzip"
    assert head.request_timeout_ms == b"5"
    assert head.client_request_id == b"a.B-9_"


@pytest.mark.parametrize("value", [b"", b"a b", b"a" * 129, b"a\xff", b'"a"', b"a;b", b"a\tb"])
def test_a_client_request_id_unfit_to_echo_is_dropped(value: bytes) -> None:
    assert parse_head(post(b"X-Request-Id: " + value), LIMITS).client_request_id is None


def test_the_413_names_the_limit_and_the_option() -> None:
    with pytest.raises(GatewayError) as caught:
        parse_head(post(b"Content-Length: 11"), HttpLimits(max_body_bytes=10))
    assert "10 bytes" in str(caught.value)
    assert "max_body_bytes" in str(caught.value)


# -- remembering ---------------------------------------------------------------------------------------------

_FIELDS = st.lists(
    st.sampled_from(
        [
            b"Content-Length: 5",
            b"Content-Type: application/json",
            b"Connection: close",
            b"Expect: 100-continue",
            b"X-Request-Id: abc",
            b"Content-Encoding: gzip",
            b"Transfer-Encoding: chunked",
            b"Upgrade: h2c",
        ]
    ),
    unique=True,
    max_size=5,
)
_BLOCKS = st.builds(
    lambda method, version, fields: block(method + b" /x?y HTTP/" + version, b"Host: a", *fields),
    st.sampled_from([b"GET", b"POST", b"HEAD"]),
    st.sampled_from([b"1.0", b"1.1"]),
    _FIELDS,
)


@given(_BLOCKS)
def test_a_remembered_head_equals_a_freshly_parsed_one(raw: bytes) -> None:
    heads = Heads(LIMITS, lambda head: None)
    try:
        fresh = parse_head(raw, LIMITS)
    except GatewayError:
        with pytest.raises(GatewayError):
            heads.read(raw)
        assert not heads.remembered
        return
    first = heads.read(raw)
    second = heads.read(bytes(bytearray(raw)))
    assert second is first
    assert content(first) == content(fresh)


@given(_BLOCKS, st.integers(min_value=0), st.integers(min_value=1, max_value=255))
def test_a_block_that_differs_in_one_byte_is_checked_in_full(raw: bytes, place: int, change: int) -> None:
    heads = Heads(LIMITS, lambda head: None)
    try:
        known = heads.read(raw)
    except GatewayError:
        return
    place %= len(raw) - 4
    other = raw[:place] + bytes([raw[place] ^ change]) + raw[place + 1 :]
    try:
        expected = parse_head(other, LIMITS)
    except GatewayError as error:
        with pytest.raises(type(error)):
            heads.read(other)
        return
    found = heads.read(other)
    assert found is not known
    assert content(found) == content(expected)


def test_a_head_is_resolved_once() -> None:
    resolved: list[Head] = []

    def resolve(head: Head) -> int:
        resolved.append(head)
        return len(resolved)

    heads = Heads(LIMITS, resolve)
    assert [heads.read(get()).route, heads.read(get()).route] == [1, 1]
    heads.forget()
    assert heads.read(get()).route == 2


def test_large_blocks_are_not_remembered() -> None:
    heads = Heads(LIMITS, lambda head: None)
    heads.read(get(b"A: " + b"b" * MAX_REMEMBERED_BLOCK_BYTES))
    assert not heads.remembered


def test_the_number_of_remembered_blocks_is_bounded_and_the_oldest_goes_first() -> None:
    heads = Heads(LIMITS, lambda head: None)
    blocks = [get(b"A: %d" % number) for number in range(MAX_REMEMBERED_BLOCKS + 3)]
    for raw in blocks:
        heads.read(raw)
    assert list(heads.remembered) == blocks[3:]


_FRAMING = [case for case in REFUSED if any(word in case[0] for word in ("length", "chunked", "host", "1.0", "coding"))]


@pytest.mark.parametrize("case", _FRAMING, ids=lambda case: case[0])
def test_the_checks_of_framing_do_not_lean_on_llhttp(
    case: tuple[str, bytes, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http1_head, "_ask_llhttp", lambda raw: http1_head._split_fields(raw[:-4].split(b"\r\n")[1:]))
    with pytest.raises(GatewayError) as caught:
        parse_head(case[1], LIMITS)
    assert caught.value.status == case[2]
