"""What becomes of frames when there is no room: no row vanishes without being counted."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.log_policy import Overflow
from gateway.inference_log import frame, outlet
from gateway.inference_log.frame import Requests, Row
from gateway.inference_log.outlet import GAP_S, Outlet
from tests.inference_log.row_reader import Frames, Later

FRAME = 200
"""Bytes of one row's frame, at least."""


class Bench:
    def __init__(self, room: float = 1000.0, reserve: float = 1000.0, spill: float | None = None) -> None:
        self.now = 100.0
        self.writer = Frames(room, reserve)
        self.spill = None if spill is None else Frames(spill)
        self.later = Later()
        self.outlet = Outlet(
            self.writer, int(min(room, 1e12)), self.later, lambda: self.now, lambda: int(self.now * 1e9), self.spill
        )
        self.count = 0

    def put(self, policy: Overflow, rows: int = 1, model: str = "m") -> list[int]:
        """Frames of one row or more; each row says its number."""
        numbers = list(range(self.count, self.count + rows))
        self.count += rows
        made = [
            Row(b"%036d" % n, 1.0, 1.0, "http", "infer", 200, None, 1, 1, -1, 0, 1.0, None, "x" * 100, None, None)
            for n in numbers
        ]
        data = frame.encode(Requests(1, 1.0, model, "1", "", "", [], made, [], []))
        self.outlet.put(data, rows, policy, model, "1")
        return numbers

    def pass_time(self, seconds: float = GAP_S) -> None:
        self.now += seconds
        self.later.run()

    def written(self) -> list[int]:
        return [int(row.row.request_id) for sink in (self.writer, self.spill) if sink for row in sink.rows]

    def gaps(self) -> list[dict[str, int | str]]:
        return [
            {**json.loads(event.details), "model": event.model, "kind": event.kind}
            for event in self.writer.events
            if event.stream == "gap"
        ]


def test_with_room_everything_is_taken_at_once() -> None:
    bench = Bench()
    for policy in ("drop", "spill", "block"):
        bench.put(policy)
    assert bench.written() == [0, 1, 2]
    assert not bench.later.due


def test_refusing_does_not_end_while_rows_of_what_was_executed_wait() -> None:
    bench = Bench(room=300, reserve=0)
    bench.put("block")
    bench.put("block")
    assert bench.outlet.blocked
    bench.writer.synced()
    assert bench.outlet.blocked, "there is room again, and the row that waits has not got any yet"
    bench.pass_time(0.05)
    assert bench.written() == [0, 1]
    bench.writer.synced()
    assert not bench.outlet.blocked


def test_what_was_executed_has_a_reserve() -> None:
    bench = Bench(room=300, reserve=1000)
    bench.put("block")
    bench.put("block")
    bench.put("drop")
    assert bench.written() == [0, 1]
    assert bench.outlet.statistics().waiting_rows == 0
    assert bench.outlet.statistics().lost_rows == 1


def test_entries_of_the_lifecycle_do_not_overtake_one_another() -> None:
    bench = Bench(room=300, reserve=0)
    for number, text in enumerate(("x" * 400, "", "")):
        assert bench.outlet.event("lifecycle", str(number), "m", "1", {"text": text})
    assert bench.writer.events == []
    bench.writer.room = 10_000
    bench.pass_time()
    assert [event.kind for event in bench.writer.events] == ["0", "1", "2"]


def test_entries_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlet, "MAX_WAITING_EVENTS", 2)
    bench = Bench(room=10, reserve=0)
    taken = [bench.outlet.event("lifecycle", str(number), "m", "1", {}) for number in range(4)]
    assert taken == [True, True, False, False]
    bench.writer.room = 10_000
    bench.pass_time()
    assert [(gap["rows"], gap["reason"]) for gap in bench.gaps()] == [(2, "lifecycle_full")]


def test_what_is_dropped_is_counted_and_recorded_with_its_span() -> None:
    bench = Bench(room=600)
    bench.put("drop", 2)
    bench.put("drop", 3)
    bench.now += 0.5
    bench.put("drop", 4)
    assert bench.written() == [0, 1]
    assert bench.outlet.statistics().lost_rows == 7
    bench.pass_time()
    (gap,) = bench.gaps()
    assert (gap["rows"], gap["reason"], gap["model"], gap["kind"]) == (7, "queue_full", "m", "dropped")
    assert (gap["from_ns"], gap["to_ns"]) == (int(100.0e9), int(100.5e9))
    assert bench.outlet.statistics().open_gaps == 0
    bench.put("drop", 5)
    bench.pass_time()
    assert [gap["rows"] for gap in bench.gaps()] == [7, 5]


def test_a_gap_that_finds_no_room_waits_and_grows() -> None:
    bench = Bench(room=10, reserve=0)
    for n in range(1, 4):
        bench.put("drop", n)
        bench.pass_time()
    assert bench.gaps() == []
    bench.writer.room = 10_000
    bench.pass_time()
    (gap,) = bench.gaps()
    assert gap["rows"] == 6
    assert not bench.later.due, "nothing ticks once all is recorded"


def test_each_model_has_its_own_gap() -> None:
    bench = Bench(room=10)
    bench.put("drop", 2, "a")
    bench.put("drop", 3, "b")
    bench.pass_time()
    assert {gap["model"]: gap["rows"] for gap in bench.gaps()} == {"a": 2, "b": 3}


def test_spilling_uses_the_second_place_and_then_drops() -> None:
    bench = Bench(room=10, spill=700)
    bench.put("spill", 2)
    bench.put("spill", 9)
    assert bench.written() == [0, 1]
    assert bench.outlet.statistics().spilled_rows == 2
    bench.pass_time()
    (gap,) = bench.gaps()
    assert (gap["rows"], gap["reason"]) == (9, "spill_full")


def test_blocking_loses_nothing_and_keeps_the_order() -> None:
    bench = Bench(room=500, reserve=400)
    for _ in range(8):
        bench.put("block")
    assert bench.outlet.blocked
    assert len(bench.written()) < 8
    while bench.outlet.statistics().waiting_rows:
        bench.writer.synced()
        bench.pass_time(0.05)
    assert bench.written() == list(range(8))
    assert bench.outlet.statistics().lost_rows == 0
    bench.writer.synced()
    assert not bench.outlet.blocked


def test_what_no_log_could_take_does_not_block_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlet, "MAX_PAYLOAD_BYTES", 10)
    bench = Bench()
    bench.put("block")
    statistics = bench.outlet.statistics()
    assert (statistics.lost_rows, statistics.waiting_rows, bench.outlet.blocked) == (1, 0, False)
    bench.pass_time()
    assert [gap["reason"] for gap in bench.gaps()] == ["too_large"]


def test_blocking_ends_only_when_a_quarter_is_free() -> None:
    bench = Bench(room=1000)
    bench.writer.pending_bytes = 1000
    assert bench.outlet.blocked
    bench.writer.pending_bytes = 751
    assert bench.outlet.blocked
    blocked = []
    for nbytes in (750, 999):
        bench.writer.pending_bytes = nbytes
        blocked.append(bench.outlet.blocked)
    assert blocked == [False, False]


def test_refused_requests_have_a_place_in_a_gap_record() -> None:
    bench = Bench()
    for _ in range(3):
        bench.outlet.refused("m", "1")
    bench.pass_time()
    (gap,) = bench.gaps()
    assert (gap["rows"], gap["kind"], gap["reason"]) == (3, "refused", "refused")
    assert bench.outlet.statistics().refused_requests == 3
    assert bench.outlet.statistics().lost_rows == 0


def test_lifecycle_waits_for_room_and_feedback_is_refused() -> None:
    bench = Bench(room=10, reserve=0)
    assert bench.outlet.event("lifecycle", "swapped", "m", "2", {"from": "1"})
    assert not bench.outlet.event("feedback", "label", "m", "", {"label": 1})
    bench.writer.room = 10_000
    bench.pass_time()
    kinds = [(event.stream, event.kind) for event in bench.writer.events]
    assert kinds[0] == ("lifecycle", "swapped")
    (gap,) = bench.gaps()
    assert (gap["rows"], gap["reason"]) == (1, "feedback_full")


@pytest.mark.parametrize("details", [{"source": "half a pair: \ud800"}, {"source": {1, 2}}])
def test_an_entry_that_cannot_be_written_fails_nobody_and_is_a_gap(
    details: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench()
    assert not bench.outlet.event("lifecycle", "serving", "m", "1", details)
    bench.pass_time()
    (gap,) = bench.gaps()
    assert (gap["reason"], gap["rows"], bench.outlet.statistics().lost_rows) == ("faulty", 1, 1)
    assert "could not be noted" in caplog.text


def test_at_the_end_what_was_not_taken_is_counted() -> None:
    bench = Bench(room=10, reserve=0)
    bench.put("block", 3)
    bench.put("drop", 2)
    assert not bench.outlet.finish()
    assert bench.outlet.give_up() == 3
    assert bench.outlet.statistics().lost_rows == 5


@pytest.mark.parametrize("seed", range(3))
def test_long_histories_add_up(seed: int) -> None:
    history(random.Random(seed), 400)


@given(st.randoms(use_true_random=False))
def test_every_row_is_written_or_counted_once(rng: random.Random) -> None:
    history(rng, 40)


def history(rng: random.Random, steps: int) -> None:
    bench = Bench(room=2000, reserve=rng.choice([0, 500]), spill=rng.choice([None, 1500.0]))
    blocking: list[int] = []
    for _ in range(steps):
        action = rng.random()
        if action < 0.6:
            policy: Overflow = rng.choice(["drop", "spill", "block"])
            numbers = bench.put(policy, rng.randrange(1, 5), rng.choice(["a", "b"]))
            blocking += numbers if policy == "block" else []
        elif action < 0.75:
            bench.writer.synced()
        elif action < 0.8 and bench.spill is not None:
            bench.spill.synced()
        else:
            bench.pass_time(rng.choice([0.05, GAP_S]))
    while not bench.outlet.finish():
        bench.writer.synced()
    statistics = bench.outlet.statistics()
    written = bench.written()
    assert max(Counter(written).values(), default=1) == 1
    assert len(written) + statistics.lost_rows == bench.count
    assert sum(int(gap["rows"]) for gap in bench.gaps()) == statistics.lost_rows
    assert [n for n in written if n in set(blocking)] == blocking, "none lost, none out of order"
    assert statistics.waiting_rows == statistics.waiting_bytes == 0
