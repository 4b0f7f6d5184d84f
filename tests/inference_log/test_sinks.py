"""The loop that ships: what it does when its target fails, and what it says of itself."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest

from gateway.inference_log import private_files, segments
from gateway.inference_log.segments import Layout, Segment
from gateway.inference_log.sink_feed import Feed, Piece
from gateway.inference_log.sink_state import Job, SinkState, command, read_state, shipped_up_to, state_file
from gateway.inference_log.sinks import FEWEST_ROWS, Shipment, Shipper, TooSlow, Unavailable
from tests.inference_log.log_rows import NOON, encoded, new_epoch, segment_bytes

PAUSES_S = (0.001, 0.01)


class Memory:
    """A target that keeps (epoch, position) of what it took, and fails when it is told to."""

    def __init__(self) -> None:
        self.rows: set[tuple[str, int]] = set()
        self.positions: dict[str, int] = {}
        self.failures: list[Unavailable] = []
        """Raised one after the other, before anything is taken; None in between takes a piece."""
        self.lost_answers = 0
        """So many pieces are taken, and then the connection breaks before that is said."""
        self.sizes: list[int] = []
        self.opened = 0
        self.closed = True

    async def open(self) -> Mapping[str, int]:
        assert self.closed, "it is closed before it is opened again"
        self.opened += 1
        self.closed = False
        return self.positions

    async def ship(self, piece: Piece) -> Shipment:
        self.sizes.append(piece.rows)
        if self.failures:
            raise self.failures.pop(0)
        new = {(piece.epoch, position) for table in piece.tables.values() for position in table["position"].to_pylist()}
        done = Shipment(len(new - self.rows), len(new & self.rows), 0)
        self.rows |= new
        self.positions = {**self.positions, piece.epoch: piece.next}
        if self.lost_answers:
            self.lost_answers -= 1
            raise Unavailable("the connection broke")
        return done

    def check(self) -> None:
        assert not self.closed

    async def close(self) -> None:
        self.closed = True


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return segments.prepare(tmp_path / "log").directory


def write(directory: Path, rows: int, number: int = 0, epoch: str = "") -> str:
    epoch = epoch or new_epoch()
    layout = Layout(directory)
    private_files.make_directory(layout.epoch(epoch))
    frames = [(encoded([n]), 1) for n in range(rows)]
    layout.segment(Segment(epoch, number)).write_bytes(segment_bytes(epoch, number, number * rows, frames, end=True))
    return epoch


async def ship(directory: Path, target: Memory, rows: int = 5000) -> SinkState:
    shipper = Shipper(
        Feed(directory, rows=rows), target, "memory", poll_s=0.001, pauses_s=PAUSES_S, clock=lambda: NOON, once=True
    )
    assert await shipper.run()
    assert target.closed
    assert read_state(directory, "memory") == shipper.state
    return shipper.state


async def test_everything_is_shipped_and_said(directory: Path) -> None:
    epoch = write(directory, 10)
    target = Memory()
    state = await ship(directory, target, rows=3)
    assert target.rows == {(epoch, position) for position in range(10)}
    assert (state.shipped_rows, state.duplicate_rows, state.lag_rows, state.lag_bytes) == (10, 0, 0, 0)
    assert (state.failing, state.oldest_unshipped_us, state.at_us) == (None, None, NOON * 10**6)
    assert shipped_up_to(directory, "memory") == {epoch: 10}
    assert shipped_up_to(directory, "another") == {}
    write(directory, 10, 1, epoch)
    assert (await ship(directory, target)).shipped_rows == 20, "it counts on from what it said before"


async def test_failures_are_waited_out_and_nothing_is_shipped_twice(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(directory, 10)
    target = Memory()
    target.failures = [Unavailable("away")] * 4
    target.lost_answers = 2
    state = await ship(directory, target, rows=2)
    assert len(target.rows) == 10
    assert state.failing is None
    assert target.opened >= 6
    assert [record.message for record in caplog.records if "away" in record.message] == [
        f"sink memory: away; rows wait in {directory} meanwhile"
    ], "it is told once, not at every try"


async def test_rows_that_are_nowhere_are_counted_and_told(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    epoch = write(directory, 10, number=1)
    state = await ship(directory, Memory())
    assert (state.shipped_rows, state.missing_rows, state.epochs) == (10, 10, {epoch: 20})
    assert "10 rows of the log are nowhere to be read" in caplog.text


async def test_while_it_fails_it_says_so_and_how_much_waits(directory: Path) -> None:
    epoch = write(directory, 10)
    target = Memory()
    target.failures = [Unavailable("disk full")] * 1000
    shipper = Shipper(Feed(directory), target, "memory", poll_s=0.001, pauses_s=PAUSES_S, clock=lambda: NOON)
    work = asyncio.ensure_future(shipper.run())
    while len(target.sizes) < 5:
        await asyncio.sleep(0)
    shipper.stop()
    assert not await work
    state = read_state(directory, "memory")
    assert state is not None
    assert (state.failing, state.failing_since_us) == ("disk full", NOON * 10**6)
    assert state.lag_rows > 0
    assert state.oldest_unshipped_us == NOON * 10**6
    assert state.epochs.get(epoch, 0) == 0


async def test_a_target_that_is_too_slow_gets_fewer_rows_and_then_more(directory: Path) -> None:
    write(directory, 1000)
    target = Memory()
    target.failures = [TooSlow("slow")] * 2
    await ship(directory, target, rows=400)
    assert target.sizes[:3] == [400, 200, 100]
    assert max(target.sizes[3:]) > 100
    target = Memory()
    target.failures = [TooSlow("slow")] * 20
    await ship(directory, target, rows=400)
    assert min(target.sizes[:20]) == FEWEST_ROWS, "it never ends at nothing"


async def test_the_state_names_only_epochs_of_this_log(directory: Path) -> None:
    epoch = write(directory, 1)
    target = Memory()
    target.positions = {new_epoch(): 77}  # another gateway's, in the same database
    await ship(directory, target)
    assert shipped_up_to(directory, "memory") == {epoch: 1}


async def test_a_state_that_cannot_be_written_does_not_stop_it(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(directory, 3)
    state_file(directory, "memory").mkdir()
    shipper = Shipper(Feed(directory), target := Memory(), "memory", pauses_s=PAUSES_S, clock=lambda: NOON, once=True)
    assert await shipper.run()
    assert len(target.rows) == 3
    assert "cannot be written" in caplog.text


def test_the_command_line_names_where_the_secret_is(tmp_path: Path) -> None:
    job = Job(tmp_path, tmp_path / "spill", "env:LOG_DSN", "audit", True, 100, 5.0)
    line = command(job, "info", "json")
    assert line[1:4] == ["-m", "gateway.inference_log.sink_process", str(tmp_path)]
    for option in (["--dsn", "env:LOG_DSN"], ["--schema", "audit"], ["--spill", str(tmp_path / "spill")]):
        assert line[line.index(option[0]) + 1] == option[1]
    assert "--showcase-tables" in line
