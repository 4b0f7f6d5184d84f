"""The framing of the WAL under every kind of damage: never a wrong row, never a crash, losses counted."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.inference_log import wal
from tests.inference_log.log_rows import new_epoch, segment_bytes

EPOCH = new_epoch()
FRAMES = [(b"first frame", 3), (b"", 0), (b"second" * 9, 1), (b"\0" * 40, 64), (b"last", 2)]
FRAMES = [frame for frame in FRAMES if frame[1]]
START = 1000


def whole(*, end: bool = True) -> bytes:
    return segment_bytes(EPOCH, 7, START, FRAMES, end=end)


def expected() -> list[tuple[int, int, bytes]]:
    found, position = [], START
    for data, rows in FRAMES:
        found.append((position, rows, data))
        position += rows
    return found


def told(reading: wal.Reading) -> list[tuple[int, int, bytes]]:
    return [(record.position, record.rows, bytes(record.payload)) for record in reading.records]


def test_what_was_written_is_read() -> None:
    reading = wal.read(whole(), EPOCH, 7)
    assert told(reading) == expected()
    assert (reading.closed, reading.damages, reading.next_position) == (True, (), START + 70)
    assert reading.header == wal.SegmentHeader(EPOCH, 7, START, 0)
    assert reading.good_bytes == len(whole())


def test_the_tail_says_whether_a_segment_is_closed() -> None:
    tail = whole()[-wal.RECORD_BYTES :]
    assert wal.is_end(tail, EPOCH, 7)
    assert not wal.is_end(tail, EPOCH, 8)
    assert not wal.is_end(whole(end=False)[-wal.RECORD_BYTES :], EPOCH, 7)
    assert not wal.is_end(tail[1:], EPOCH, 7)


@pytest.mark.parametrize("length", range(len(whole()) + 1))
def test_a_segment_cut_at_any_byte_gives_the_whole_records_before_the_cut(length: int) -> None:
    data = whole()
    reading = wal.read(data[:length], EPOCH, 7)
    assert told(reading) == [one for one, end in zip(expected(), ends(), strict=True) if end <= length]
    assert all(damage.torn for damage in reading.damages)
    boundaries = {0, wal.HEADER_BYTES, *ends(), len(data)}
    assert (reading.damages == ()) == (length in boundaries)


def ends() -> list[int]:
    found, at = [], wal.HEADER_BYTES
    for data, _ in FRAMES:
        at += wal.RECORD_BYTES + len(data)
        found.append(at)
    return found


def test_every_flipped_bit_costs_at_most_its_own_record_and_is_told() -> None:
    data = whole()
    spans = list(zip([wal.HEADER_BYTES, *ends()[:-1]], ends(), expected(), strict=True))
    for bit in range(len(data) * 8):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        reading = wal.read(bytes(broken), EPOCH, 7)
        hit = [one for start, end, one in spans if start <= bit // 8 < end]
        assert told(reading) == [one for one in expected() if one not in hit], bit
        assert reading.damages, bit
        lost = [damage.rows for damage in reading.damages if damage.rows]
        assert lost == [rows for _, rows, _ in hit], bit
        assert all(damage.start <= bit // 8 < damage.end for damage in reading.damages), bit


@given(st.randoms(use_true_random=False), st.integers(1, 6))
def test_whatever_happens_to_the_bytes_only_what_was_written_is_read(rng: random.Random, wounds: int) -> None:
    data = bytearray(whole())
    for _ in range(wounds):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.randrange(60))
        match rng.randrange(4):
            case 0:
                data[start:end] = rng.randbytes(end - start)
            case 1:
                del data[start:end]
            case 2:
                data[start:start] = data[start:end]  # a piece of it twice
            case _:
                data[start:end] = bytes(end - start)
    found = told(wal.read(bytes(data), EPOCH, 7))
    assert [one for one in expected() if one in found] == found, "something else, something twice, or out of order"


@given(st.binary(max_size=400))
def test_bytes_of_any_kind_are_read_without_a_crash(data: bytes) -> None:
    assert wal.read(data, EPOCH, 7).records == ()


def test_a_payload_that_contains_a_segment_is_not_taken_for_one() -> None:
    """Damage in front of it makes the reader search; what it finds must not come out of somebody's payload."""
    inner = segment_bytes(new_epoch(), 7, START, [(b"forged", 1)], end=False)
    data = bytearray(segment_bytes(EPOCH, 7, START, [(inner, 1), (b"real", 1)], end=True))
    data[wal.HEADER_BYTES + 20] ^= 1
    assert told(wal.read(bytes(data), EPOCH, 7)) == [(START + 1, 1, b"real")]


def test_records_of_another_segment_are_not_taken() -> None:
    assert wal.read(whole(), EPOCH, 8).records == ()
    assert wal.read(whole(), new_epoch(), 7).records == ()


def test_a_damaged_end_closes_nothing() -> None:
    for place in range(wal.RECORD_BYTES):
        data = bytearray(whole())
        data[place - wal.RECORD_BYTES] ^= 4
        assert not wal.is_end(bytes(data[-wal.RECORD_BYTES :]), EPOCH, 7)
        assert not wal.read(bytes(data), EPOCH, 7).closed


def test_nothing_is_read_behind_the_end() -> None:
    mark = wal.marker(EPOCH, 7)
    behind = wal.record_header(mark, START + 70, 1, b"late") + b"late"
    reading = wal.read(whole() + behind, EPOCH, 7)
    assert told(reading) == expected()
    assert [(damage.start, damage.rows, damage.torn) for damage in reading.damages] == [(len(whole()), 0, True)]


@pytest.mark.parametrize(("rows", "payload"), [(0, b"rows of none"), (3, b"")])
def test_a_record_that_contradicts_itself_is_neither_rows_nor_an_end(rows: int, payload: bytes) -> None:
    data = whole(end=False) + wal.record_header(wal.marker(EPOCH, 7), START + 70, rows, payload) + payload
    reading = wal.read(data, EPOCH, 7)
    assert told(reading) == expected()
    assert not reading.closed
    assert reading.next_position == START + 70


def test_a_hole_in_the_positions_is_a_loss_even_where_no_byte_is_damaged() -> None:
    data = bytearray(whole())
    del data[ends()[0] : ends()[1]]
    reading = wal.read(bytes(data), EPOCH, 7)
    assert [(damage.rows, damage.position, damage.torn) for damage in reading.damages] == [(1, START + 3, False)]
    assert len(reading.records) == len(FRAMES) - 1


def test_a_segment_is_followed_as_it_grows() -> None:
    data = whole()
    found: list[tuple[int, int, bytes]] = []
    at, position = wal.HEADER_BYTES, START
    for length in range(wal.HEADER_BYTES, len(data) + 1, 5):
        reading = wal.read_on(data[at:length], EPOCH, 7, position)
        found += told(reading)
        at, position = at + reading.good_bytes, reading.next_position
    found += told(wal.read_on(data[at:], EPOCH, 7, position))
    assert found == expected()
