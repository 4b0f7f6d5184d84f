"""What may go and what must stay: holds before sinks before days; nothing for want of disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from gateway.errors import ConfigError
from gateway.inference_log import private_files, retention, sealing, segments
from gateway.inference_log.frame import Event
from gateway.inference_log.retention import Hold, Partition, RetentionPolicy
from gateway.inference_log.sealer import Sealer
from gateway.inference_log.sealer_settings import SealerSettings
from gateway.inference_log.segments import Layout, Segment
from gateway.inference_log.writer import write_events
from tests.inference_log.log_rows import DAY_S, NOON, encoded, new_epoch, numbers_in_parquet, segment_bytes

TODAY = date(2026, 9, 21)
HOLD = Hold("case-7", "litigation", "legal@example.org", "2026-09-01T00:00:00Z")


def stored(layout: Layout, ages: Mapping[int, str]) -> str:
    """One row of each age in days, numbered by it; the epoch."""
    epoch = new_epoch()
    frames = [(encoded([age], model=model, at=NOON - age * DAY_S), 1) for age, model in ages.items()]
    segments.prepare(layout.directory)
    private_files.make_directory(layout.epoch(epoch))
    layout.segment(Segment(epoch, 0)).write_bytes(segment_bytes(epoch, 0, 0, frames, end=True))
    sealing.seal(layout, Segment(epoch, 0), NOON * 10**6)
    return epoch


def applied(layout: Layout, policy: RetentionPolicy, shipped: Mapping[str, Mapping[str, int]] | None = None) -> int:
    return retention.apply(layout, policy, NOON * 10**6, shipped or {}).partitions


def left(layout: Layout) -> list[int]:
    return sorted(numbers_in_parquet(layout.directory))


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "log")


def test_a_day_is_kept_to_its_last_day_and_then_goes(layout: Layout) -> None:
    stored(layout, {182: "digits", 183: "digits", 184: "digits", 300: "digits"})
    assert applied(layout, RetentionPolicy()) == 2
    assert left(layout) == [182, 183]
    assert applied(layout, RetentionPolicy()) == 0


def test_a_model_may_have_days_of_its_own(layout: Layout) -> None:
    stored(layout, {200: "digits", 201: "salary", 400: "salary"})
    assert applied(layout, RetentionPolicy(models={"salary": 365})) == 2
    assert left(layout) == [201]


def test_a_deletion_is_recorded_before_it_is_done(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(layout, {200: "digits"})

    unlink = Path.unlink

    def dies(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".parquet":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", dies)
    with pytest.raises(KeyboardInterrupt):
        applied(layout, RetentionPolicy())
    monkeypatch.undo()
    assert left(layout) == [200]
    assert applied(layout, RetentionPolicy()) == 1
    sealer = Sealer(SealerSettings(layout.directory), lambda: NOON * 10**6)
    sealer.open()
    sealer.seal()
    sealer.close()
    events = [line for path in layout.parquet("lifecycle") for line in pq.ParquetFile(path).read().to_pylist()]
    assert [event["kind"] for event in events] == ["retention", "retention"]
    details = json.loads(events[0]["details"])
    assert details["partition"] == f"requests/model=digits/date={TODAY - timedelta(200)}"
    assert (details["files"], details["retention_days"]) == (1, 183)


def test_a_hold_wins_over_everything(layout: Layout) -> None:
    stored(layout, {200: "digits", 201: "digits", 202: "salary"})
    day = str(TODAY - timedelta(200))
    retention.place_hold(layout, Hold("case-7", "r", "b", "t", models=["digits"], first=day, last=day))
    assert applied(layout, RetentionPolicy()) == 2
    assert left(layout) == [200]
    retention.release_hold(layout, "case-7")
    assert applied(layout, RetentionPolicy()) == 1
    assert left(layout) == []


def test_a_hold_that_cannot_be_read_keeps_everything_and_is_told(layout: Layout) -> None:
    stored(layout, {200: "digits"})
    (layout.holds / "typo.json").write_text('{"name": "typo", "modles": ["digits"]}')
    assert applied(layout, RetentionPolicy()) == 0
    sealer = Sealer(SealerSettings(layout.directory), lambda: NOON * 10**6)
    sealer.open()
    sealer.keep()
    sealer.report()
    sealer.close()
    state = private_files.read_json(layout.sealer_state, segments.SealerState)
    assert state is not None
    assert "holds/typo.json cannot be read" in (state.failing or "")
    assert left(layout) == [200]


@pytest.mark.parametrize(
    ("hold", "covered"),
    [
        (HOLD, True),
        (Hold("h", "", "", "", models=["other"]), False),
        (Hold("h", "", "", "", first="2026-01-02"), False),
        (Hold("h", "", "", "", last="2025-12-31"), False),
        (Hold("h", "", "", "", first="2026-01-01", last="2026-01-01"), True),
    ],
)
def test_what_a_hold_covers(hold: Hold, covered: bool) -> None:
    partition = Partition("requests", "digits", "2026-01-01", Path())
    assert hold.covers("requests", partition.model, partition.date) is covered
    if hold.models:
        assert hold.covers("feedback", "", partition.date), "labels of held rows may be anybody's"


@pytest.mark.parametrize(
    "hold",
    [
        Hold("../x", "", "", ""),
        Hold("", "", "", ""),
        Hold("h", "", "", "", first="01.02.2026"),
        Hold("h", "", "", "", first="2026-02-02", last="2026-02-01"),
    ],
)
def test_holds_that_would_not_hold_are_refused(layout: Layout, hold: Hold) -> None:
    with pytest.raises(ConfigError):
        retention.place_hold(layout, hold)
    assert retention.holds(layout) == retention.Holds((), ())


def test_a_hold_is_not_replaced_or_released_by_mistake(layout: Layout) -> None:
    retention.place_hold(layout, HOLD)
    with pytest.raises(ConfigError, match="in force already"):
        retention.place_hold(layout, HOLD)
    with pytest.raises(ConfigError, match="no hold named"):
        retention.release_hold(layout, "case-8")
    assert retention.holds(layout).held == (HOLD,)


@pytest.mark.parametrize("name", ["../sealer", "../sealed/x", "a/b", ".hidden", ""])
def test_a_hold_s_name_is_no_path(layout: Layout, name: str) -> None:
    segments.prepare(layout.directory)
    victim = layout.holds / f"{name}.json"
    victim.parent.mkdir(exist_ok=True)
    victim.write_bytes(b"{}")
    with pytest.raises(ConfigError, match="there is no hold named"):
        retention.release_hold(layout, name)
    assert victim.read_bytes() == b"{}"


def test_what_a_sink_has_not_shipped_stays(layout: Layout) -> None:
    epoch = stored(layout, {200: "digits", 201: "digits", 202: "salary"})
    assert applied(layout, RetentionPolicy(), {"postgres": {}}) == 0
    assert applied(layout, RetentionPolicy(), {"postgres": {epoch: 2}, "other": {epoch: 1}}) == 1
    assert left(layout) == [201, 202]
    assert applied(layout, RetentionPolicy(), {"postgres": {epoch: 3}}) == 2


def test_side_streams_are_kept_as_long_as_any_model_and_lifecycle_for_ever(layout: Layout) -> None:
    old = (NOON - 300 * DAY_S) * 10**9
    write_events(layout.directory, [Event(old, stream, "x", "", "", "{}") for stream in ("gap", "lifecycle")], old)
    sealer = Sealer(SealerSettings(layout.directory), lambda: NOON * 10**6)
    sealer.open()
    sealer.seal()
    sealer.close()
    assert applied(layout, RetentionPolicy(models={"salary": 365})) == 0
    assert applied(layout, RetentionPolicy()) == 1
    assert layout.parquet("gap") == []
    assert len(layout.parquet("lifecycle")) == 1


def test_a_full_disk_is_an_alarm_and_deletes_nothing(layout: Layout) -> None:
    stored(layout, {1: "digits", 100: "digits"})
    sealer = Sealer(SealerSettings(layout.directory, max_disk_bytes=10), lambda: NOON * 10**6)
    sealer.open()
    sealer.keep()
    sealer.close()
    assert sealer.statistics().over_limit
    assert sealer.statistics().disk_bytes > 10
    assert left(layout) == [1, 100]


@pytest.mark.parametrize(
    ("first", "last"), [("yesterday", ""), ("2026-02-30", ""), ("20260101", ""), ("2026-09-02", "2026-09-01")]
)
def test_a_hold_whose_dates_make_no_sense_keeps_everything(layout: Layout, first: str, last: str) -> None:
    stored(layout, {400: "digits"})
    private_files.make_directory(layout.holds)
    fields = {"name": "odd", "reason": "r", "by": "b", "at": "2026-09-01T00:00:00Z", "models": ["other"]}
    private_files.write_json(layout.holds / "odd.json", fields | {"first": first, "last": last})
    assert retention.holds(layout).unreadable == ("odd.json",)
    assert applied(layout, RetentionPolicy(200)) == 0
    assert left(layout) == [400]
