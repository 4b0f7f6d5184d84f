"""The receiver: whole, byte by byte and cut anywhere, the same bytes are the same events."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import GatewayError, RequestTimeout
from gateway.protocol.http1 import Continue, Event, Head, Heads, Held, HttpLimits, Receiver, Reject, Request
from tests.protocol.test_http1_head import REFUSED, block, get, post

LIMITS = HttpLimits()
MANY = 10_000

Seen = tuple[str, bytes, bytes] | tuple[str, int, bool]


def receiver(limits: HttpLimits = LIMITS, now: float = 0.0, held: Held | None = None) -> Receiver:
    return Receiver(Heads(limits, lambda head: None), held or Held(limits.max_held_bytes), now)


def seen(events: list[Event]) -> list[Seen]:
    """Events as plain values; `Continue` left out, as it depends on the cuts."""
    out: list[Seen] = []
    for event in events:
        if isinstance(event, Request):
            out.append(("request", event.head.target, event.body))
        elif isinstance(event, Reject):
            out.append(("reject", event.error.status, event.close))
    return out


def feed(data: bytes, cuts: list[int], limits: HttpLimits = LIMITS) -> list[Seen]:
    subject = receiver(limits)
    edges = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    events: list[Event] = []
    for start, stop in pairwise(edges):
        events += subject.receive(data[start:stop], 0.0, MANY)
    return seen(events)


def bytewise(data: bytes) -> list[int]:
    return list(range(len(data)))


def infer(body: bytes, *fields: bytes) -> bytes:
    return post(b"Content-Length: %d" % len(body), *fields) + body


CHUNKED = post(b"Transfer-Encoding: chunked") + b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nT: u\r\n\r\n"
TARGET = b"/v2/models/m/infer"


def test_the_latest_head_is_taken_for_no_other() -> None:
    """Each read is one whole request; the head of the one before it is compared first."""
    subject = receiver()
    one, other, longer = infer(b"ab"), infer(b"abc"), infer(b"ab", b"X: y")
    for data in [one, one, other, one, longer, longer + b"GET", b" / HTTP/1.1\r\nHost: x\r\n\r\n", one]:
        fresh = receiver()
        if data.startswith(b" /"):
            fresh.receive(b"GET")
        assert seen(subject.receive(data, 0.0, MANY)) == seen(fresh.receive(data, 0.0, MANY))


def test_a_head_that_was_forgotten_is_read_anew_also_where_it_was_the_latest() -> None:
    resolved: list[Head] = []
    heads = Heads(LIMITS, resolved.append)
    subject = Receiver(heads, Held(LIMITS.max_held_bytes), 0.0)
    for expected in (1, 1):
        subject.receive(infer(b"ab"))
        assert len(resolved) == expected
    heads.forget()
    assert subject.take_whole(infer(b"ab")) is None
    subject.receive(infer(b"ab"))
    subject.receive(infer(b"ab"))
    assert len(resolved) == 2


# -- framing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (get(), [("request", b"/v2", b"")]),
        (infer(b"hello"), [("request", TARGET, b"hello")]),
        (infer(b""), [("request", TARGET, b"")]),
        (CHUNKED, [("request", TARGET, b"abcde")]),
        (infer(b"a\r\n\r\nb") + get() + CHUNKED, [
            ("request", TARGET, b"a\r\n\r\nb"), ("request", b"/v2", b""), ("request", TARGET, b"abcde"),
        ]),
        (b"\r\n" * 4 + get() + b"\r\n" + get(), [("request", b"/v2", b"")] * 2),
        (b"\r\n" * 5 + get(), [("reject", 400, True)]),
        (b"\n" + get(), [("reject", 400, True)]),
        (get(b"Connection: close") + get(), [("request", b"/v2", b"")]),
        (block(b"GET / HTTP/1.0") + get(), [("request", b"/", b"")]),
        (get() + b"nonsense\r\n\r\n" + get(), [("request", b"/v2", b""), ("reject", 400, True)]),
        (post(b"Transfer-Encoding: chunked") + b"x\r\n" + get(), [("reject", 400, True)]),
        (infer(b"abc", b"Expect: 100-continue"), [("request", TARGET, b"abc")]),
        # A length that is too short leaves the rest of the body as the next request, which it is not.
        (post(b"Content-Length: 2") + b"abc\r\n\r\n", [("request", TARGET, b"ab"), ("reject", 400, True)]),
    ],
)  # fmt: skip
def test_events(data: bytes, expected: list[Seen]) -> None:
    assert feed(data, []) == expected
    assert feed(data, bytewise(data)) == expected


@pytest.mark.parametrize("raw", [case[1] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refused_heads_end_the_connection_and_what_follows_is_never_read(raw: bytes) -> None:
    smuggled = raw + b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
    for cuts in ([], bytewise(smuggled) if len(smuggled) < 3000 else [7, 9000, 20_000]):
        events = feed(smuggled, cuts)
        assert len(events) == 1
        assert events[0][0] == "reject"
        assert events[0][2] is True


BROKEN_BYTES = [
    ("bare LF", b"GET / HTTP/1.1\nHost: a\n\n", 400),
    ("bare LF in a field", b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n", 400),
    ("bare CR in a field", b"GET / HTTP/1.1\r\nHost: a\rX: b\r\n\r\n", 400),
    ("bare CR at a line's end", b"GET / HTTP/1.1\r\nX: b\r\r\nHost: a\r\n\r\n", 400),
    ("LF CR", b"GET / HTTP/1.1\n\rHost: a\r\n\r\n", 400),
    ("NUL", b"GET / HTTP/1.1\r\nHost: a\x00\r\n\r\n", 400),
    ("vertical tab", b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\x0bchunked\r\n\r\n", 400),
    ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ("long URL", b"GET /" + b"a" * 2**20, 414),
    ("long field", b"GET / HTTP/1.1\r\nX: " + b"a" * 2**20, 431),
    ("many fields", b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 20_000, 431),
    ("NUL behind a long URL", b"GET /" + b"a" * 8192 + b"\x00", 414),
    ("NUL ahead of it", b"GET /\x00" + b"a" * 8192, 400),
    ("LF behind 64 KiB", b"GET / HTTP/1.1\r\nX: " + b"a" * 65_536 + b"\n", 431),
]


@pytest.mark.parametrize(("raw", "status"), [c[1:] for c in BROKEN_BYTES], ids=[c[0] for c in BROKEN_BYTES])
def test_broken_bytes_are_refused_before_the_head_is_complete(raw: bytes, status: int) -> None:
    expected = [("reject", status, True)]
    assert feed(raw, []) == expected
    assert feed(raw, list(range(0, len(raw), 1 if len(raw) < 3000 else 997))) == expected


def test_a_bare_cr_is_refused_with_the_byte_behind_it() -> None:
    subject = receiver()
    assert subject.receive(b"GET / HTTP/1.1\r\nHost: a\r", 0.0) == []
    assert seen(subject.receive(b"X", 0.0)) == [("reject", 400, True)]


def test_at_most_64_kib_of_a_head_are_held() -> None:
    held = Held(10**9)
    subject = receiver(held=held)
    most = 0
    for _ in range(2000):
        subject.receive(b"GET / HTTP/1.1\r\nX: " if not most else b"a" * 512, 0.0)
        most = max(most, held.used_bytes)
    assert most <= LIMITS.max_head_bytes + 512
    assert held.used_bytes == 0


@pytest.mark.parametrize(("extra", "accepted"), [(0, True), (1, False)])
def test_the_request_line_limit_is_exact(extra: int, accepted: bool) -> None:
    limit = LIMITS.max_request_line_bytes
    line = b"GET /" + b"a" * (limit - len("GET / HTTP/1.1\r\n") + extra) + b" HTTP/1.1"
    events = feed(block(line, b"Host: a"), [])
    assert events[0][0] == ("request" if accepted else "reject")


@pytest.mark.parametrize(("extra", "accepted"), [(0, True), (1, False)])
def test_the_head_limit_is_exact(extra: int, accepted: bool) -> None:
    limits = HttpLimits(max_head_bytes=1000)
    raw = get(b"X: ")
    raw = get(b"X: " + b"a" * (1000 - len(raw) + extra))
    for cuts in ([], bytewise(raw)):
        assert feed(raw, cuts, limits)[0][0] == ("request" if accepted else "reject")


_MESSAGES = st.one_of(
    st.sampled_from(
        [get(), CHUNKED, b"\r\n", infer(b""), get(b"Connection: close"), b"GET / HTTP/1.1\r\n", b"\r", b"\n"]
    ),
    st.binary(max_size=40).map(infer),
    st.binary(max_size=12),
    st.sampled_from([case[1] for case in REFUSED if len(case[1]) < 300]),
)


@settings(max_examples=300)
@given(st.lists(_MESSAGES, max_size=5).map(b"".join), st.lists(st.integers(min_value=0), max_size=8))
def test_events_do_not_depend_on_the_cuts(data: bytes, cuts: list[int]) -> None:
    whole = feed(data, [])
    assert feed(data, cuts) == whole
    assert feed(data, bytewise(data)) == whole


@settings(max_examples=300)
@given(st.lists(st.one_of(st.binary(max_size=80), _MESSAGES), max_size=8))
def test_no_bytes_raise_and_nothing_stays_held(pieces: list[bytes]) -> None:
    held = Held(10**6)
    subject = receiver(held=held)
    taken = 0
    for piece in pieces:
        taken += sum(len(e.body) for e in subject.receive(piece, 0.0, MANY) if isinstance(e, Request))
        assert held.used_bytes >= taken
    subject.close()
    assert held.used_bytes == taken


# -- the remembered head -------------------------------------------------------------------------------------


def test_the_second_request_reuses_the_head_of_the_first() -> None:
    subject = receiver()
    heads: list[Head] = []
    for number in range(3):
        (event,) = subject.receive(infer(b"%d" % number), 0.0)
        assert isinstance(event, Request)
        assert event.body == b"%d" % number
        heads.append(event.head)
    assert heads[0] is heads[1] is heads[2]


@given(st.integers(min_value=0, max_value=200))
def test_a_known_head_with_less_than_its_body_waits(cut: int) -> None:
    subject = receiver()
    data = infer(b"hello world")
    subject.receive(data, 0.0)
    cut %= len(data)
    assert seen(subject.receive(data[:cut], 0.0)) == []
    assert seen(subject.receive(data[cut:], 0.0)) == [("request", TARGET, b"hello world")]


# -- look-ahead ----------------------------------------------------------------------------------------------


def test_no_more_requests_than_asked_for_and_the_rest_later() -> None:
    subject = receiver()
    data = b"".join(infer(b"%d" % number) for number in range(10, 20))
    bodies: list[bytes] = []
    got = subject.receive(data, 0.0, 3)
    while got:
        assert len(got) <= 3
        bodies += [event.body for event in got if isinstance(event, Request)]
        got = subject.receive(b"", 0.0, 3)
    assert bodies == [b"%d" % number for number in range(10, 20)]
    assert not subject.more


def test_no_request_at_all_when_there_is_no_room() -> None:
    subject = receiver()
    subject.receive(get(), 0.0)
    assert subject.receive(get(), 0.0, 0) == []
    assert subject.more
    assert len(subject.receive(b"", 0.0, 1)) == 1
    assert not subject.more


# -- 100-continue --------------------------------------------------------------------------------------------


def test_continue_is_asked_for_only_while_no_body_is_here() -> None:
    head = post(b"Content-Length: 3", b"Expect: 100-continue")
    waiting = receiver()
    assert [type(event) for event in waiting.receive(head, 0.0)] == [Continue]
    assert seen(waiting.receive(b"abc", 0.0)) == [("request", TARGET, b"abc")]
    sending = receiver()
    assert sending.receive(head + b"a", 0.0) == []
    assert seen(sending.receive(b"bc", 0.0)) == [("request", TARGET, b"abc")]


def test_a_refused_length_is_refused_before_the_client_is_told_to_go_on() -> None:
    events = receiver().receive(post(b"Content-Length: 99999999999", b"Expect: 100-continue"), 0.0)
    assert seen(events) == [("reject", 413, True)]
    assert len(events) == 1


# -- held bytes ----------------------------------------------------------------------------------------------


def test_when_too_much_is_held_a_small_body_is_skipped_and_the_connection_stays() -> None:
    held = Held(100)
    held.used_bytes = 99
    subject = receiver(held=held)
    assert seen(subject.receive(infer(b"abc")[:-1], 0.0)) == [("reject", 503, False)]
    assert subject.skipping
    held.used_bytes = 0
    assert seen(subject.receive(b"c" + infer(b"x"), 0.0)) == [("request", TARGET, b"x")]


@pytest.mark.parametrize(
    "raw",
    [
        post(b"Transfer-Encoding: chunked"),
        post(b"Content-Length: 5", b"Expect: 100-continue"),
        post(b"Content-Length: 2000000"),
        post(b"Content-Length: 5", b"Connection: close"),
    ],
)
def test_when_too_much_is_held_what_cannot_be_skipped_exactly_ends_the_connection(raw: bytes) -> None:
    held = Held(100)
    held.used_bytes = 101
    assert seen(receiver(held=held).receive(raw, 0.0)) == [("reject", 503, True)]
    assert held.used_bytes == 101


def test_bodies_that_grow_over_the_limit_together_are_cut_off() -> None:
    held = Held(1000)
    first, second = receiver(held=held), receiver(held=held)
    for subject in (first, second):
        assert subject.receive(post(b"Content-Length: 900"), 0.0) == []
    assert first.receive(b"a" * 600, 0.0) == []
    assert seen(second.receive(b"a" * 600, 0.0)) == [("reject", 503, True)]
    assert held.used_bytes == 600
    assert seen(first.receive(b"a" * 300, 0.0)) == [("request", TARGET, b"a" * 900)]


@given(st.lists(st.integers(min_value=1, max_value=9000), min_size=1, max_size=30))
def test_a_body_in_pieces_of_any_size_is_whole_and_accounted(sizes: list[int]) -> None:
    held = Held(10**9)
    subject = receiver(held=held)
    body = bytes(sum(sizes))
    subject.receive(post(b"Content-Length: %d" % len(body)), 0.0)
    at = 0
    events: list[Event] = []
    for size in sizes:
        assert not events
        events = subject.receive(body[at : at + size], 0.0)
        at += size
        assert held.used_bytes == at
    assert seen(events) == [("request", TARGET, body)]


def test_a_body_in_one_byte_reads_holds_no_more_than_itself() -> None:
    subject = receiver()
    subject.receive(post(b"Content-Length: 200000"), 0.0)
    tracemalloc.start()
    try:
        for _ in range(100_000):
            subject.receive(b"x", 0.0)
        now, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert now < 300_000


@pytest.mark.slow
def test_a_million_one_byte_chunks_end_at_the_limit_with_flat_memory() -> None:
    subject = receiver()
    subject.receive(post(b"Transfer-Encoding: chunked"), 0.0)
    piece = b"1\r\nx\r\n" * 100
    events: list[Event] = []
    tracemalloc.start()
    try:
        for _ in range(10_000):
            events += subject.receive(piece, 0.0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seen(events) == [("reject", 400, True)]
    assert peak < 1_000_000


# -- time ----------------------------------------------------------------------------------------------------


def status_of(error: GatewayError | None) -> int | None:
    return None if error is None else error.status


def test_the_first_head_is_timed_from_the_connect() -> None:
    subject = receiver(now=100.0)
    assert subject.expired(109.9) is None
    assert isinstance(subject.expired(110.0), RequestTimeout)
    subject.receive(b"G", 109.0)
    assert isinstance(subject.expired(110.0), RequestTimeout)


def test_later_heads_are_timed_from_their_first_byte() -> None:
    subject = receiver()
    subject.receive(get(), 5.0)
    before = subject.idle
    assert subject.expired(1000.0) is None
    for byte in range(20):
        subject.receive(get()[byte : byte + 1], 1000.0 + byte / 2)
    assert (before, subject.idle) == (True, False)
    assert subject.expired(1009.9) is None
    assert isinstance(subject.expired(1010.0), RequestTimeout)


def test_a_head_behind_a_request_in_the_same_read_is_timed_from_then() -> None:
    subject = receiver()
    subject.receive(get(), 0.0)
    subject.receive(get() + b"G", 50.0)
    assert subject.expired(59.9) is None
    assert isinstance(subject.expired(60.0), RequestTimeout)


def test_a_stray_empty_line_does_not_start_the_timer() -> None:
    subject = receiver()
    subject.receive(get() + b"\r\n", 0.0)
    assert subject.idle
    assert subject.expired(1000.0) is None
    subject.receive(b"GET", 1000.0)
    assert subject.expired(1009.9) is None
    assert isinstance(subject.expired(1010.0), RequestTimeout)


@pytest.mark.parametrize("fields", [[b"Content-Length: 50000"], [b"Transfer-Encoding: chunked"]])
def test_a_body_at_one_byte_a_second_is_given_up_after_the_grace(fields: list[bytes]) -> None:
    subject = receiver()
    subject.receive(post(*fields) + b"9fff\r\n", 0.0)
    for second in range(1, 5):
        subject.receive(b"x", float(second))
        assert subject.expired(float(second)) is None
    assert isinstance(subject.expired(5.0), RequestTimeout)


def test_a_body_at_the_minimum_rate_is_let_finish() -> None:
    subject = receiver()
    subject.receive(post(b"Content-Length: 60000"), 0.0)
    events: list[Event] = []
    for second in range(1, 61):
        events += subject.receive(b"x" * 1000, float(second))
        assert subject.expired(float(second)) is None
    assert len(events) == 1


def test_a_fast_start_does_not_pay_for_a_stall() -> None:
    subject = receiver()
    subject.receive(post(b"Content-Length: 50000000") + b"x" * 40_000_000, 0.0)
    assert subject.expired(5.0) is None
    assert isinstance(subject.expired(10.0), RequestTimeout)


def test_time_in_which_we_did_not_read_is_excused() -> None:
    subject = receiver()
    subject.receive(post(b"Content-Length: 50000"), 0.0)
    subject.excuse(100.0)
    assert subject.expired(104.9) is None
    assert isinstance(subject.expired(105.0), RequestTimeout)
