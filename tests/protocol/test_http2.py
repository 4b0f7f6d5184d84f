"""HTTP/2 connections: cutting of bytes, flow control both ways, floods, remembered blocks, shutdown."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hpack import Encoder
from hypothesis import example, given
from hypothesis import settings as effort

from gateway.protocol.hpack_blocks import EMPTY_TABLE, Fields
from gateway.protocol.http2_frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    MAX_STREAM_ID,
    PING,
    PREFACE,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    frame,
    goaway,
    rst_stream,
    settings,
    window_update,
)
from gateway.protocol.http2_limits import Http2Limits, OpenCalls
from tests.protocol.http2_peer import REQUEST, Peer, Sent, block, data, end_of, headers, parse
from tests.protocol.test_http2_rules import CASES, LIMITS

CALM = ("goaway ENHANCE_YOUR_CALM",)


# -- however the bytes arrive --------------------------------------------------------------------------------------


def outcome(peer: Peer) -> object:
    return (peer.raw(), peer.ended, peer.gone, peer.opened_streams, peer.bodies, peer.http2.closed)


@given(st.lists(st.sampled_from(CASES), min_size=1, max_size=4), st.lists(st.integers(1, 40), min_size=1))
def test_cuts_change_nothing(cases: list, steps: list[int]) -> None:  # type: ignore[type-arg]
    sent = b"".join(case.sent for case in cases)
    whole, pieces = Peer(LIMITS).send(sent), Peer(LIMITS)
    at = turn = 0
    while at < len(sent):
        stop = at + steps[turn % len(steps)]
        pieces.send(sent[at:stop])
        at, turn = stop, turn + 1
    assert outcome(pieces) == outcome(whole)


@given(st.binary(max_size=400), st.booleans())
@example(b"", True)
@effort(max_examples=400)
def test_noise_never_raises(noise: bytes, greeted: bool) -> None:
    peer = Peer(LIMITS, greeted=greeted)
    peer.send(noise, noise)
    parse(peer.raw())


FRAMES = st.builds(
    frame,
    st.integers(0, 11),
    st.integers(0, 255),
    st.sampled_from([0, 1, 2, 3, 5, 7]),
    st.one_of(st.binary(max_size=20), st.just(block()), st.just(bytes(4)), st.just(bytes(8))),
)


@given(st.lists(FRAMES, max_size=12), st.integers(1, 64))
@effort(max_examples=400)
def test_any_frames_leave_the_books_in_order(frames: list[bytes], step: int) -> None:
    sent = b"".join(frames)
    whole, pieces = Peer(LIMITS).send(sent), Peer(LIMITS)
    pieces.send(*(sent[at : at + step] for at in range(0, len(sent), step)))
    assert outcome(pieces) == outcome(whole)
    assert len(whole.http2.streams) <= LIMITS.max_streams
    assert whole.held.used_bytes == 0
    assert whole.calls.count == len(whole.http2.streams)
    assert not set(whole.gone) & set(whole.http2.streams)


def test_data_is_handed_on_before_its_frame_is_complete() -> None:
    peer = Peer()
    peer.send(headers(1, end=False), data(1, b"abcdef", end=True)[:12])
    assert bytes(peer.bodies[1]) == b"abc"
    assert not peer.ended
    peer.send(data(1, b"abcdef")[12:])
    assert (bytes(peer.bodies[1]), peer.ended) == (b"abcdef", [1])


def test_a_stream_that_is_reset_within_its_data_gets_no_more() -> None:
    peer = Peer()
    peer.send(headers(1, end=False), data(1, b"abcdef")[:12])
    peer.http2.reset(1, 8)
    peer.send(data(1, b"abcdef")[12:], headers(3))
    assert (bytes(peer.bodies[1]), peer.ended) == (b"abc", [3])
    assert peer.verdict() == ("rst 1 CANCEL",)


# -- header blocks ----------------------------------------------------------------------------------------------------


def test_a_block_of_indices_is_read_once() -> None:
    peer, encoder = Peer(), Encoder()
    blocks = [encoder.encode(REQUEST) for _ in range(5)]
    for number, each in enumerate(blocks):
        peer.send(frame(HEADERS, END_HEADERS | END_STREAM, 2 * number + 1, each))
    assert peer.ended == [1, 3, 5, 7, 9]
    assert blocks[1] == blocks[4]
    assert len(peer.heads) == 2, "the first fills the table, the second is remembered"


def test_a_changed_table_changes_what_a_block_means() -> None:
    peer, encoder = Peer(), Encoder()
    one: Fields = [*REQUEST, (b"x-who", b"one")]
    two: Fields = [*REQUEST, (b"x-who", b"two")]
    peer.send(frame(HEADERS, 5, 1, encoder.encode(one)))
    repeated = encoder.encode(one)
    peer.send(frame(HEADERS, 5, 3, repeated), frame(HEADERS, 5, 5, repeated))
    assert len(peer.heads) == 2
    peer.send(frame(HEADERS, 5, 7, encoder.encode(two)))  # a new entry moves all indices by one
    assert [head.request.regular[-1][1] for head in peer.heads] == [b"one", b"one", b"two"]
    peer.sent()
    peer.send(frame(HEADERS, 5, 9, repeated))
    assert peer.verdict() == ("rst 9 PROTOCOL_ERROR",), "its indices mean other fields now"


FIELDS = st.tuples(st.sampled_from([b"x-a", b"x-b"]), st.sampled_from([b"1", b"a" * 90]), st.booleans())
TURNS = st.tuples(
    st.integers(0, 1), st.lists(FIELDS, max_size=2), st.sampled_from([None, None, 0, 100, 4096]), st.integers(0, 60)
)
MOVED = [(0, [(b"x-a", b"1", False)], None, 60)] * 2 + [(0, [(b"x-b", b"1", False)], None, 60)] * 2


@given(st.lists(TURNS, max_size=12), st.booleans())
@example(MOVED, False)
@effort(max_examples=400)
def test_whatever_the_table_goes_through_each_stream_has_its_own_fields(turns: list, huffman: bool) -> None:  # type: ignore[type-arg]
    """Two clients by turns: entries come, move, are evicted or never indexed; tables shrink; blocks are cut."""
    clients = [(Peer(), Encoder()), (Peer(), Encoder())]
    for number, (who, fields, size, cut) in enumerate(turns):
        peer, encoder = clients[who]
        stream_id = 2 * number + 1
        if size is not None:
            encoder.header_table_size = size
        sent = encoder.encode([*[(*field, True) for field in REQUEST], *fields], huffman=huffman)
        if cut < len(sent) and cut % 2:
            peer.send(frame(HEADERS, END_STREAM, stream_id, sent[:cut]))
            peer.send(frame(CONTINUATION, END_HEADERS, stream_id, sent[cut:]))
        else:
            peer.send(frame(HEADERS, END_HEADERS | (cut % 4 < 2), stream_id, sent))
        head = peer.http2.streams[stream_id].head
        assert head.request.regular == [*REQUEST[4:], *[(name, value) for name, value, _ in fields]]


def test_blocks_of_streams_that_are_refused_or_over_count_for_the_table() -> None:
    peer, encoder = Peer(Http2Limits(max_streams=1)), Encoder()
    peer.send(headers(1, end=False), frame(HEADERS, 5, 3, encoder.encode([*REQUEST, (b"x-a", b"1")])))
    peer.http2.reset(1, 8)
    peer.send(frame(HEADERS, 5, 1, encoder.encode([(b"x-b", b"2")])))
    peer.send(frame(HEADERS, 5, 5, encoder.encode([*REQUEST, (b"x-a", b"1"), (b"x-b", b"2")])))
    assert peer.verdict() == ("rst 3 REFUSED_STREAM", "rst 1 CANCEL")
    assert peer.heads[-1].request.regular[-2:] == [(b"x-a", b"1"), (b"x-b", b"2")]


def test_remembered_blocks_are_bounded() -> None:
    peer = Peer()
    for number in range(600):
        peer.send(headers(2 * number + 1, [*REQUEST, (b"x", b"%d" % number)]), rst_stream(2 * number + 1, 8))
    assert len(peer.heads) == 600
    assert len(peer.http2._blocks.remembered) <= 256
    big = [*REQUEST, (b"x", bytes(2000).replace(b"\0", b"a"))]
    peer.send(headers(2001, big), headers(2003, big))
    assert len(peer.heads) == 602, "large blocks are not kept"


def test_a_long_header_list_is_told_to_the_owner_and_a_huge_one_ends_the_connection() -> None:
    limits = Http2Limits(max_header_list_bytes=1024)
    peer = Peer(limits)
    peer.send(headers(1, [*REQUEST, (b"x", b"a" * 1024)]))
    assert peer.heads[0].list_bytes > 1024
    assert peer.verdict() == ()
    peer.send(headers(3, [*REQUEST, (b"x", b"a" * 4050)]))
    assert peer.verdict() == CALM
    # one byte of index stands for a whole field: the list counts, not the block
    encoder, bomb = Encoder(), Peer(limits)
    fields = [(b"x", b"a" * 900)]
    bomb.send(frame(HEADERS, 5, 1, encoder.encode([*REQUEST, *fields])))
    bomb.send(frame(HEADERS, 5, 3, encoder.encode([*REQUEST, *fields * 100])))
    assert bomb.verdict() == CALM


def test_a_flood_of_continuations_is_cut_off() -> None:
    peer = Peer()
    peer.send(frame(HEADERS, END_STREAM, 1, block()))
    for _ in range(33):
        peer.send(frame(CONTINUATION, 0, 1))
    assert peer.verdict() == CALM
    peer = Peer()
    peer.send(frame(HEADERS, END_STREAM, 1, block()))
    peer.send(*[frame(CONTINUATION, 0, 1, bytes(16_384))] * 4)
    assert peer.verdict() == CALM


# -- receiving: windows -----------------------------------------------------------------------------------------------


def updates(sent: list[Sent], stream_id: int) -> int:
    return sum(
        int.from_bytes(each.payload, "big") for each in sent if (each.kind, each.stream) == (WINDOW_UPDATE, stream_id)
    )


def test_what_the_server_announces() -> None:
    peer = Peer(Http2Limits(max_streams=7, stream_window_bytes=100_000, connection_window_bytes=200_000), greeted=False)
    peer.send(PREFACE, settings({}))
    first, window, ack = peer.sent()
    pairs = [first.payload[at : at + 6] for at in range(0, len(first.payload), 6)]
    assert {p[1]: int.from_bytes(p[2:], "big") for p in pairs} == {3: 7, 4: 100_000, 5: 262_144, 6: 16_384}
    assert (window.kind, window.stream, window.payload) == (WINDOW_UPDATE, 0, (200_000 - 65_535).to_bytes(4, "big"))
    assert (ack.kind, ack.flags) == (SETTINGS, ACK)


def test_windows_are_given_back_in_halves() -> None:
    peer = Peer(LIMITS)
    peer.send(headers(1, end=False))
    peer.send(data(1, bytes(16_384)))
    assert peer.sent() == []
    peer.send(data(1, bytes(16_384)))
    sent = peer.sent()
    assert (updates(sent, 0), updates(sent, 1)) == (0, 32_768)
    peer.send(data(1, b"x"))
    sent = peer.sent()
    assert (updates(sent, 0), updates(sent, 1)) == (32_768, 0)


def test_a_client_can_send_for_ever() -> None:
    peer = Peer(LIMITS)
    peer.send(headers(1, end=False))
    credit = {0: 65_535, 1: 65_535}
    for _ in range(200):
        size = min(*credit.values(), 16_384)
        assert size > 0
        peer.send(data(1, bytes(size)))
        sent = peer.sent()
        for stream_id in credit:
            credit[stream_id] += updates(sent, stream_id) - size
        peer.bodies[1].clear()


def test_the_window_opens_for_a_message_of_known_length() -> None:
    peer = Peer()
    peer.send(headers(1, end=False))
    peer.stream.wanted = 64 * 2**20
    peer.send(data(1, bytes(1000)))
    assert updates(peer.sent(), 1) == 64 * 2**20 - (2**20 - 1000)
    assert peer.stream.receive_window == 64 * 2**20


def test_a_paused_stream_gets_no_more_window_until_it_goes_on() -> None:
    peer = Peer(LIMITS)
    peer.send(headers(1, end=False))
    stream = peer.stream
    stream.paused = True
    peer.send(*[data(1, bytes(16_000))] * 4)
    sent = peer.sent()
    assert updates(sent, 1) == 0
    assert updates(sent, 0) > 0
    stream.paused = False
    peer.http2.credit(stream)
    assert updates(peer.sent(), 1) == 64_000


def test_data_of_a_stream_that_is_over_still_gives_the_connections_window_back() -> None:
    peer = Peer(LIMITS)
    peer.send(headers(1, end=False))
    peer.http2.send_headers(peer.stream, b"\x88", end=True)
    assert peer.verdict() == ("rst 1 NO_ERROR",)
    peer.send(*[data(1, bytes(16_384))] * 3)
    assert updates(peer.sent(), 0) > 0


# -- sending: windows -------------------------------------------------------------------------------------------------


def body_of(sent: list[Sent], stream_id: int) -> bytes:
    return b"".join(each.payload for each in sent if (each.kind, each.stream) == (DATA, stream_id))


def answer(peer: Peer, stream_id: int, size: int) -> None:
    stream = peer.http2.streams[stream_id]
    peer.http2.send_headers(stream, b"\x88")
    peer.http2.send_data(stream, [bytes(size)], size)
    peer.http2.send_trailers(stream, b"\x88")


def test_an_answer_respects_both_windows() -> None:
    peer = Peer()
    peer.send(headers(1))
    answer(peer, 1, 200_000)
    sent = peer.sent()
    assert len(body_of(sent, 1)) == 65_535
    assert max(len(each.payload) for each in sent) <= 16_384
    assert not end_of(sent, 1)
    assert peer.held.used_bytes == 200_000 - 65_535
    peer.send(window_update(1, 1_000_000))
    assert peer.sent() == []
    peer.send(window_update(0, 1000))
    assert len(body_of(peer.sent(), 1)) == 1000
    peer.send(window_update(0, 1_000_000))
    sent = peer.sent()
    assert len(body_of(sent, 1)) == 200_000 - 66_535
    assert end_of(sent, 1)
    assert (sent[-1].kind, peer.held.used_bytes, peer.http2.streams) == (HEADERS, 0, {})


@given(st.lists(st.integers(1, 30_000), min_size=1, max_size=5), st.lists(st.integers(500, 30_000), min_size=1))
def test_whatever_the_windows_the_bytes_are_the_same(parts: list[int], increments: list[int]) -> None:
    peer = Peer()
    peer.send(settings({4: 100}), headers(1))
    stream = peer.stream
    pieces = [bytes([number]) * size for number, size in enumerate(parts)]
    peer.http2.send_headers(stream, b"\x88")
    for piece in pieces:
        peer.http2.send_data(stream, [piece[:7], memoryview(piece)[7:]], len(piece))
    peer.http2.send_trailers(stream, b"\x88")
    out = peer.sent()
    turn = 0
    while peer.http2.streams:
        increment = increments[turn % len(increments)]
        turn += 1
        peer.send(window_update(0, increment), window_update(1, increment))
        out += peer.sent()
    assert body_of(out, 1) == b"".join(pieces)
    assert end_of(out, 1)
    assert peer.held.used_bytes == 0


def test_a_shrunk_initial_window_may_go_below_zero() -> None:
    peer = Peer()
    peer.send(headers(1))
    stream = peer.stream
    peer.http2.send_data(stream, [bytes(16_000)], 16_000)
    peer.send(settings({4: 1000}))
    assert stream.send_window == 1000 - 16_000
    peer.http2.send_data(stream, [b"x"], 1)
    peer.sent()
    peer.send(window_update(1, 15_000))
    assert body_of(peer.sent(), 1) == b""
    peer.send(settings({4: 1001}))
    assert body_of(peer.sent(), 1) == b"x"


def test_parts_may_be_views_of_any_type() -> None:
    peer = Peer()
    peer.send(settings({4: 7}), headers(1))
    numbers = memoryview(bytes(range(16))).cast("I")
    peer.http2.send_data(peer.stream, [numbers], 16)
    sent = peer.sent()
    peer.send(window_update(1, 100))
    assert body_of(sent + peer.sent(), 1) == bytes(range(16))


def test_streams_take_turns() -> None:
    peer = Peer()
    peer.send(settings({4: 2**30}), window_update(0, 2**30), headers(1), headers(3))
    answer(peer, 1, 1_000_000)
    answer(peer, 3, 1000)
    order = [each.stream for each in peer.sent() if each.kind == DATA]
    assert order.index(3) <= 1, "a short answer does not wait for a long one"


def test_a_stream_without_window_does_not_hold_up_others() -> None:
    peer = Peer()
    peer.send(settings({4: 10}), headers(1), headers(3))
    answer(peer, 1, 1000)
    peer.send(window_update(3, 5000))
    answer(peer, 3, 1000)
    assert end_of(peer.sent(), 3)


def test_larger_frames_are_sent_to_who_takes_them() -> None:
    peer = Peer()
    peer.send(settings({4: 2**30, 5: 2**20}), window_update(0, 2**30), headers(1))
    answer(peer, 1, 2_000_000)
    assert max(len(each.payload) for each in peer.sent()) == 65_536
    peer.send(settings({5: 16_384}), headers(3))
    answer(peer, 3, 500_000)
    assert max(len(each.payload) for each in peer.sent()) == 16_384


def test_a_long_header_block_is_cut() -> None:
    peer = Peer()
    peer.send(headers(1))
    long = block([(b"x", b"a" * 40_000)])
    peer.http2.send_headers(peer.stream, long, end=True)
    sent = peer.sent()
    assert [(each.kind, each.flags) for each in sent] == [
        (HEADERS, END_STREAM),
        (CONTINUATION, 0),
        (CONTINUATION, END_HEADERS),
    ]
    assert b"".join(each.payload for each in sent) == long


def test_a_client_with_a_smaller_table_is_told_that_ours_is_empty() -> None:
    peer = Peer()
    peer.send(settings({1: 100}), headers(1), headers(3))
    peer.sent()
    for stream in list(peer.http2.streams.values()):
        peer.http2.send_headers(stream, b"\x88", end=True)
    assert [each.payload for each in peer.sent()] == [EMPTY_TABLE + b"\x88", b"\x88"]
    assert Peer().send(settings({1: 8192})).http2.prefix == b""


def test_nothing_is_framed_while_the_transport_is_full() -> None:
    peer = Peer()
    peer.send(headers(1))
    peer.http2.open = False
    answer(peer, 1, 10)
    assert body_of(peer.sent(), 1) == b""
    peer.http2.open = True
    assert end_of(peer.sent(), 1)


def test_what_was_queued_for_a_stream_that_was_reset_is_dropped() -> None:
    peer = Peer()
    peer.send(settings({4: 0}), headers(1))
    answer(peer, 1, 1000)
    assert peer.held.used_bytes == 1000
    peer.send(rst_stream(1, 8), window_update(0, 1000))
    assert (peer.held.used_bytes, peer.gone, body_of(peer.sent(), 1)) == (0, [1], b"")


def test_the_owner_hears_when_a_stream_is_drained() -> None:
    peer = Peer()
    peer.send(settings({4: 0}), headers(1, end=False))
    peer.http2.send_data(peer.stream, [b"abc"], 3)
    peer.sent()
    assert peer.drained_streams == []
    peer.send(window_update(1, 3))
    assert body_of(peer.sent(), 1) == b"abc"
    assert peer.drained_streams == [1]


def test_an_early_answer_tells_the_client_to_stop_sending() -> None:
    peer = Peer()
    peer.send(headers(1, end=False))
    peer.http2.send_headers(peer.stream, b"\x88", end=True)
    assert [(each.kind, each.stream) for each in peer.sent()] == [(HEADERS, 1), (RST_STREAM, 1)]


# -- floods -----------------------------------------------------------------------------------------------------------

NOTHING = {
    "PING": frame(PING, 0, 0, b"8 bytes!"),
    "answers to PINGs": frame(PING, ACK, 0, b"8 bytes!"),
    "SETTINGS": settings({}),
    "acknowledged SETTINGS": frame(SETTINGS, ACK, 0),
    "PRIORITY": frame(PRIORITY, 0, 9, bytes(5)),
    "unknown frames": frame(99, 0, 0, b"x"),
    "empty DATA": data(1),
    "padded empty DATA": frame(DATA, 8, 1, b"\0"),
    "GOAWAY": goaway(0, 0),
    "RST_STREAM of streams that are over": rst_stream(3, 8),
}


@pytest.mark.parametrize("what", NOTHING)
def test_a_flood_of_frames_that_carry_nothing_is_cut_off(what: str) -> None:
    peer = Peer(Http2Limits(overhead_burst=100, overhead_per_s=10))
    peer.send(headers(1, end=False), headers(3), rst_stream(3, 8))
    peer.sent()
    peer.send(NOTHING[what] * 100)
    assert not peer.http2.closed
    peer.send(NOTHING[what] * 20)
    assert peer.verdict() == CALM


def test_pings_at_a_slow_rate_or_between_calls_are_fine() -> None:
    peer = Peer(Http2Limits(overhead_burst=100, overhead_per_s=10, max_streams=10**6))
    for second in range(100):
        peer.now = float(second)
        peer.send(NOTHING["PING"] * 9)
    for number in range(1000):
        peer.send(headers(2 * number + 1), NOTHING["PING"] * 3)
    assert peer.verdict() == ()


def test_calls_of_all_connections_are_bounded() -> None:
    calls = OpenCalls(3)
    first, second = Peer(calls=calls), Peer(calls=calls)
    first.send(headers(1, end=False), headers(3, end=False))
    second.send(headers(1), headers(3))
    assert second.verdict() == ("rst 3 REFUSED_STREAM",)
    first.send(rst_stream(1, 8))
    second.send(headers(5))
    assert second.verdict() == ()
    first.send(rst_stream(3, 8))
    for stream in list(second.http2.streams.values()):
        second.http2.send_headers(stream, b"\x88", end=True)
    assert calls.count == 0


def test_rapid_reset_is_cut_off() -> None:
    peer = Peer(Http2Limits(reset_burst=100, reset_per_s=10))
    for number in range(101):
        peer.send(headers(2 * number + 1), rst_stream(2 * number + 1, 8))
    assert peer.verdict() == CALM
    assert len(peer.opened_streams) == 101


@pytest.mark.parametrize("fault", [lambda n: window_update(n, 0), lambda n: data(n, b"x")])
def test_making_the_server_reset_is_cut_off_too(fault: object) -> None:
    peer = Peer(Http2Limits(reset_burst=100, reset_per_s=10))
    for number in range(101):
        peer.send(headers(2 * number + 1), fault(2 * number + 1))  # type: ignore[operator]
    assert peer.verdict()[-1:] == CALM
    assert peer.gone == peer.opened_streams, "the owner hears of each, the last one too"


def test_answered_calls_pay_for_cancelled_ones() -> None:
    peer = Peer(Http2Limits(reset_burst=10, reset_per_s=0.0))
    for number in range(0, 400, 2):
        peer.answer_at_end = True
        peer.send(headers(2 * number + 1))
        peer.answer_at_end = False
        peer.send(headers(2 * number + 3), rst_stream(2 * number + 3, 8))
    assert peer.verdict() == ()


# -- pings and shutdown -----------------------------------------------------------------------------------------------


def test_keepalive() -> None:
    peer = Peer()
    peer.now = 5.0
    peer.send(headers(1))
    peer.http2.ping()
    peer.http2.ping()
    (ping,) = [each for each in peer.sent() if each.kind == PING]
    assert peer.http2.pinged_at == 5.0
    peer.send(frame(PING, ACK, 0, b"another!"))
    assert peer.http2.pinged_at == 5.0
    peer.send(frame(PING, ACK, 0, ping.payload))
    assert peer.http2.pinged_at == 0.0


def last_stream(each: Sent) -> int:
    return int.from_bytes(each.payload[:4], "big")


def test_shutdown_serves_what_was_on_its_way() -> None:
    peer = Peer()
    peer.send(headers(1))
    peer.http2.begin_shutdown()
    first, ping = peer.sent()
    assert (first.kind, last_stream(first)) == (GOAWAY, MAX_STREAM_ID)
    peer.send(headers(3))
    assert peer.ended == [1, 3]
    peer.send(frame(PING, ACK, 0, ping.payload))
    (second,) = peer.sent()
    assert (second.kind, last_stream(second)) == (GOAWAY, 3)
    peer.send(headers(5), frame(PING, ACK, 0, ping.payload))
    assert peer.ended == [1, 3]
    assert peer.verdict() == ("rst 5 REFUSED_STREAM",)


def test_nothing_happens_after_the_end() -> None:
    peer = Peer()
    peer.send(data(1, b"x"))
    assert peer.verdict() == ("goaway PROTOCOL_ERROR",)
    peer.send(headers(1), NOTHING["PING"])
    assert (peer.raw(), peer.opened_streams) == (b"", [])


def test_a_window_taken_back_holds_up_what_waited_for_the_connections_window() -> None:
    peer = Peer()
    peer.send(settings({4: 100_000}), headers(1), headers(3))
    for stream_id in (1, 3):
        peer.http2.send_data(peer.http2.streams[stream_id], [bytes(60_000)], 60_000)
    assert sum(len(each.payload) for each in peer.sent() if each.kind == DATA) == 65_535
    peer.send(settings({4: 1000}))
    peer.send(window_update(0, 2**20))
    assert not [each for each in peer.sent() if each.kind == DATA], "both streams' windows are below zero, or zero"
    peer.send(settings({4: 100_000}))
    assert sum(len(each.payload) for each in peer.sent() if each.kind == DATA) == 120_000 - 65_535
    assert peer.held.used_bytes == 0


def test_a_later_goaway_names_no_later_stream() -> None:
    peer = Peer()
    peer.send(headers(1))
    peer.http2.begin_shutdown()
    peer.http2.end_shutdown()
    peer.sent()
    peer.send(headers(3), data(9, b"x"))
    (last,) = [each for each in peer.sent() if each.kind == GOAWAY]
    assert last_stream(last) == 1, "stream 3 was refused, and may be sent again elsewhere"


MOVES = st.one_of(
    st.tuples(st.just("answer"), st.sampled_from([1, 3, 5]), st.integers(1, 70_000)),
    st.tuples(st.just("window"), st.sampled_from([0, 1, 3, 5]), st.integers(1, 50_000)),
    st.tuples(st.just("initial"), st.just(0), st.sampled_from([0, 1, 1000, 65_535, 200_000])),
    st.tuples(st.just("reset"), st.sampled_from([1, 3, 5]), st.just(0)),
)


@given(st.lists(MOVES, max_size=25))
@effort(max_examples=400)
def test_no_window_is_ever_exceeded_and_everything_arrives(moves: list[tuple[str, int, int]]) -> None:
    peer = Peer()
    peer.send(headers(1), headers(3), headers(5))
    initial, windows, due = 65_535, {0: 65_535, 1: 65_535, 3: 65_535, 5: 65_535}, {1: 0, 3: 0, 5: 0}

    def take() -> None:
        for each in [each for each in peer.sent() if each.kind == DATA]:
            assert 0 < len(each.payload) <= min(windows[0], windows[each.stream])
            windows[0] -= len(each.payload)
            windows[each.stream] -= len(each.payload)
            due[each.stream] -= len(each.payload)

    for what, number, count in moves:
        stream = peer.http2.streams.get(number)
        if what == "answer" and stream is not None:
            peer.http2.send_data(stream, [bytes(count)], count)
            due[number] += count
        elif what == "window":
            peer.send(window_update(number, count))
            windows[number] += count
        elif what == "initial":
            peer.send(settings({4: count}))
            for each in peer.http2.streams:
                windows[each] += count - initial
            initial = count
        elif what == "reset" and stream is not None:
            peer.send(rst_stream(number, 8))
            due[number] = 0
        take()
        assert peer.held.used_bytes == sum(due.values())
    for number in [0, *peer.http2.streams]:
        peer.send(window_update(number, 2**30))
        windows[number] += 2**30
    take()
    assert (peer.held.used_bytes, set(due.values())) == (0, {0})
