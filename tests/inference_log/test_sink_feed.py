"""The log in shipping order: every row once, wherever its segment lies and whenever it is looked at."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.inference_log import frame, merging, private_files, segments, sink_feed, wal
from gateway.inference_log.frame import Column, Event, Requests
from gateway.inference_log.sealing import seal
from gateway.inference_log.segments import Layout, Segment
from gateway.inference_log.sink_feed import Feed, Piece
from tests.inference_log.log_rows import DAY_S, NOON, encoded, new_epoch, requests, segment_bytes

NOW_US = NOON * 1_000_000


def write(
    directory: Path, epoch: str, number: int, position: int, numbers: Sequence[Sequence[int]], *, end: bool = True
) -> Path:
    """A segment whose frames hold these numbers."""
    layout = Layout(directory)
    private_files.make_directory(layout.epoch(epoch))
    path = layout.segment(Segment(epoch, number))
    path.write_bytes(segment_bytes(epoch, number, position, [(encoded(one), len(one)) for one in numbers], end=end))
    return path


def numbers(piece: Piece) -> list[int]:
    table = piece.tables.get("requests")
    if table is None:
        return []
    assert table["position"].to_pylist() == sorted(table["position"].to_pylist())
    return [int(struct.unpack("<d", row[0]["data"])[0]) for row in table["inputs"].to_pylist()]


def ship(feed: Feed, shipped: dict[str, int]) -> list[int]:
    """Take every piece there is; what they held."""
    found = []
    for piece in feed.pieces(shipped):
        assert shipped.get(piece.epoch, 0) + piece.missing == piece.first
        found += numbers(piece)
        shipped[piece.epoch] = piece.next
    return found


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return segments.prepare(tmp_path / "log").directory


def test_rows_come_in_the_order_of_epochs_segments_and_positions(directory: Path) -> None:
    first, second = new_epoch(NOON), new_epoch(NOON + 5)
    write(directory, second, 0, 0, [[7, 8]])
    write(directory, first, 0, 0, [[0, 1], [2]])
    write(directory, first, 1, 3, [[3], [4, 5, 6]])
    feed, shipped = Feed(directory), dict[str, int]()
    assert ship(feed, shipped) == list(range(9))
    assert shipped == {first: 7, second: 2}
    assert ship(feed, shipped) == []
    assert feed.epochs() == {first, second}


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_pieces_are_bounded_and_leave_nothing_out(directory: Path, rows: int) -> None:
    epoch = new_epoch()
    write(directory, epoch, 0, 0, [[0], [1], [2], [3], [4, 5], [6]])
    shipped: dict[str, int] = {}
    pieces = []
    for piece in Feed(directory, rows=rows).pieces(shipped):
        pieces.append(piece)
        shipped[epoch] = piece.next
    assert [n for piece in pieces for n in numbers(piece)] == list(range(7))
    assert max(piece.rows for piece in pieces) <= max(rows + 1, 2)  # a frame is not cut


def test_a_growing_segment_is_followed_and_its_torn_end_waits(directory: Path) -> None:
    epoch = new_epoch()
    path = write(directory, epoch, 0, 0, [[0, 1], [2, 3]], end=False)
    whole = path.read_bytes()
    feed, shipped = Feed(directory), dict[str, int]()
    found: list[int] = []
    for length in range(0, len(whole) + 1, 7):
        path.write_bytes(whole[:length])
        found += ship(feed, shipped)
    path.write_bytes(whole)
    found += ship(feed, shipped)
    assert found == [0, 1, 2, 3]
    assert feed.backlog(shipped).bytes == 0


def test_sealing_at_any_moment_neither_loses_nor_repeats(directory: Path) -> None:
    epoch = new_epoch()
    layout = Layout(directory)
    feed, shipped = Feed(directory, rows=2), dict[str, int]()
    found: list[int] = []
    for number in range(6):
        write(directory, epoch, number, number * 4, [[number * 4, number * 4 + 1], [number * 4 + 2, number * 4 + 3]])
        if number % 2:
            pieces = feed.pieces(shipped)
            piece = next(pieces)  # one piece of a segment, and then it is sealed under us
            found += numbers(piece)
            shipped[epoch] = piece.next
            seal(layout, Segment(epoch, number - 1), NOW_US)
            seal(layout, Segment(epoch, number), NOW_US)
            for piece in pieces:
                found += numbers(piece)
                shipped[epoch] = piece.next
    found += ship(feed, shipped)
    assert found == list(range(24))
    assert feed.backlog(shipped).rows == 0


def test_behind_a_segment_that_is_sealed_meanwhile_the_epoch_waits(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch, layout = new_epoch(), Layout(directory)
    for number in range(2):
        write(directory, epoch, number, number * 2, [[number * 2], [number * 2 + 1]])

    def sealed_first(path: Path, start: int = 0) -> bytes:
        monkeypatch.undo()
        seal(layout, Segment(epoch, 0), NOW_US)
        return private_files.read_file(path, start)

    monkeypatch.setattr(sink_feed, "read_file", sealed_first)
    feed, shipped = Feed(directory), dict[str, int]()
    assert (ship(feed, shipped), shipped) == ([], {}), "the first segment's rows have not been seen yet"
    assert (ship(feed, shipped), shipped) == ([0, 1, 2, 3], {epoch: 4})


def test_what_could_not_be_shipped_comes_again(directory: Path) -> None:
    epoch = new_epoch()
    write(directory, epoch, 0, 0, [[0, 1], [2, 3], [4, 5]])
    feed, shipped = Feed(directory, rows=2), dict[str, int]()
    pieces = feed.pieces(shipped)
    first = next(pieces)
    shipped[epoch] = first.next
    assert numbers(next(pieces)) == [2, 3]
    pieces.close()  # the second could not be shipped
    assert ship(feed, shipped) == [2, 3, 4, 5]


def test_a_target_that_was_set_back_gets_everything_from_there(directory: Path) -> None:
    epoch = new_epoch()
    write(directory, epoch, 0, 0, [[0, 1], [2, 3]])
    write(directory, epoch, 1, 4, [[4, 5], [6]])
    seal(Layout(directory), Segment(epoch, 0), NOW_US)
    ship(Feed(directory), {})
    assert ship(Feed(directory), {epoch: 3}) == [3, 4, 5, 6]
    assert ship(Feed(directory), {epoch: 5}) == [5, 6]


def test_rows_of_merged_files_and_folded_records_are_found(directory: Path) -> None:
    epoch, layout = new_epoch(), Layout(directory)
    for number in range(6):
        write(directory, epoch, number, number * 2, [[number * 2], [number * 2 + 1]])
        seal(layout, Segment(epoch, number), NOW_US)
    stale = Feed(directory, rows=3)
    assert ship(stale, {epoch: 11}) == [11]
    later = NOW_US + DAY_S * 10**6
    assert merging.merge_all(layout, [layout], later, {}) == 5
    assert merging.fold(layout, [layout], later, many=1) == 6
    assert layout.committed() == set()
    for feed in (Feed(directory, rows=3), stale):
        assert ship(feed, {epoch: 3}) == list(range(3, 12))
        assert feed.unreadable_rows == 0


def test_of_a_merged_file_each_epoch_gets_its_own_rows(directory: Path) -> None:
    layout, epochs = Layout(directory), [new_epoch(NOON), new_epoch(NOON + 5)]
    for first, epoch in zip((10, 20), epochs, strict=True):
        for number in range(2):
            write(directory, epoch, number, number, [[first + number]])
            seal(layout, Segment(epoch, number), NOW_US)
    assert merging.merge_all(layout, [layout], NOW_US + DAY_S * 10**6, {}) == 3
    assert ship(Feed(directory), {}) == [10, 11, 20, 21]
    assert ship(Feed(directory), {epochs[0]: 2}) == [20, 21]
    assert ship(Feed(directory), {epochs[0]: 1, epochs[1]: 1}) == [11, 21]


def test_rows_that_retention_took_are_counted(directory: Path) -> None:
    epoch, layout = new_epoch(), Layout(directory)
    for number in range(2):
        write(directory, epoch, number, number * 2, [[number * 2], [number * 2 + 1]])
        seal(layout, Segment(epoch, number), NOW_US)
    min(layout.parquet("requests")).unlink()
    feed, shipped = Feed(directory), dict[str, int]()
    assert ship(feed, shipped) == [2, 3]
    assert (feed.unreadable_rows, shipped) == (2, {epoch: 4})


def test_the_spill_directory_is_shipped_too(directory: Path, tmp_path: Path) -> None:
    spill = segments.prepare(tmp_path / "spill").directory
    first, second = new_epoch(NOON), new_epoch(NOON + 1)
    write(directory, first, 0, 0, [[0]])
    write(spill, second, 0, 0, [[1]])
    assert ship(Feed(directory, spill), {}) == [0, 1]


def test_side_streams_come_with_the_rows_around_them(directory: Path) -> None:
    epoch = new_epoch()
    layout = Layout(directory)
    private_files.make_directory(layout.epoch(epoch))
    event = frame.encode(Event(NOON * 10**9, "lifecycle", "loaded", "digits", "3", "{}"))
    frames = [(encoded([0, 1]), 2), (event, 1), (encoded([2]), 1)]
    layout.segment(Segment(epoch, 0)).write_bytes(segment_bytes(epoch, 0, 0, frames, end=True))
    for sealed in (False, True):
        if sealed:
            seal(layout, Segment(epoch, 0), NOW_US)
        (piece,) = Feed(directory).pieces({})
        assert piece.tables["lifecycle"]["position"].to_pylist() == [2]
        assert piece.tables["requests"]["position"].to_pylist() == [0, 1, 3]
        assert (piece.first, piece.next, piece.rows, piece.oldest_us) == (0, 4, 4, NOW_US)


def test_damage_is_counted_and_the_rest_goes_on(directory: Path) -> None:
    epoch = new_epoch()
    path = write(directory, epoch, 0, 0, [[0, 1], [2, 3], [4, 5]])
    data = bytearray(path.read_bytes())
    middle = wal.HEADER_BYTES + wal.RECORD_BYTES + len(encoded([0, 1])) + wal.RECORD_BYTES + 10
    data[middle] ^= 1
    path.write_bytes(data)
    pieces = list(Feed(directory, rows=1).pieces({}))
    assert [numbers(piece) for piece in pieces] == [[0, 1], [4, 5]]
    assert [piece.missing for piece in pieces] == [0, 2]
    feed, shipped = Feed(directory, rows=1), dict[str, int]()
    assert ship(feed, shipped) == [0, 1, 4, 5]
    assert feed.backlog(shipped).bytes == 0, "the damage was passed, not stuck at"


def test_a_frame_that_contradicts_itself_is_left_out_and_counted(directory: Path) -> None:
    epoch = new_epoch()
    layout = Layout(directory)
    private_files.make_directory(layout.epoch(epoch))
    good = requests([1])
    bad = Requests(
        *[
            *(getattr(good, name) for name in Requests.__struct_fields__[:-1]),
            [Column("y", "FP64", None, [(1,)], b"123", [9], "keep", None)],
        ]
    )
    frames = [(encoded([0]), 1), (frame.encode(bad), 1), (b"no frame", 2), (encoded([2]), 1)]
    layout.segment(Segment(epoch, 0)).write_bytes(segment_bytes(epoch, 0, 0, frames, end=True))
    feed, shipped = Feed(directory), dict[str, int]()
    assert ship(feed, shipped) == [0, 2]
    assert (feed.unreadable_rows, shipped) == (3, {epoch: 5})


def test_backlog_says_what_waits(directory: Path) -> None:
    epoch = new_epoch()
    write(directory, epoch, 0, 0, [[0, 1], [2, 3]])
    write(directory, epoch, 1, 4, [[4, 5]], end=False)
    seal(Layout(directory), Segment(epoch, 0), NOW_US)
    feed = Feed(directory)
    waiting = feed.backlog({epoch: 1})
    assert waiting.rows >= 4  # three are sealed, the others are guessed from bytes
    assert waiting.bytes > 0
    ship(feed, shipped := {epoch: 1})
    assert feed.backlog(shipped) == type(waiting)(0, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 4), max_size=4), min_size=1, max_size=5), st.data())
def test_every_row_once_whatever_is_sealed_and_however_often_it_stops(
    tmp_path_factory: pytest.TempPathFactory, shape: list[list[int]], data: st.DataObject
) -> None:
    directory = segments.prepare(tmp_path_factory.mktemp("feed") / "log").directory
    layout, epoch, position = Layout(directory), new_epoch(), 0
    feed, shipped = Feed(directory, rows=data.draw(st.integers(1, 5))), dict[str, int]()
    found: list[int] = []
    for number, counts in enumerate(shape):
        frames, start = [], position
        for count in counts:
            frames.append(list(range(position, position + count)))
            position += count
        write(directory, epoch, number, start, frames)
        pieces = feed.pieces(shipped)
        for piece in pieces:
            if data.draw(st.booleans(), "the target fails"):
                break
            found += numbers(piece)
            shipped[epoch] = piece.next
            if data.draw(st.booleans(), "a segment is sealed meanwhile"):
                with contextlib.suppress(FileNotFoundError):  # it is already
                    seal(layout, Segment(epoch, data.draw(st.integers(0, number))), NOW_US)
        pieces.close()
    found += ship(feed, shipped)
    found += ship(feed, shipped)
    assert found == list(range(position))
