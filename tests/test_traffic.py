"""The split between champion and canary: who can take a request, and where sequences stay."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from gateway.catalog import ServedVersion
from gateway.core.request import InferRequest, SequenceStep
from gateway.core.traffic_split import SplitRule
from gateway.ensemble import Ensemble
from gateway.sequence_scheduler import SequenceScheduler
from gateway.traffic import TOLD_EVERY_S, Split
from tests.scripted import request_of, simulated
from tests.sequence_bench import SequenceBench


class Sequences(SequenceScheduler):
    """As much of one as a split looks at."""

    def __init__(self, *held: int | str) -> None:
        self.held = set(held)

    def holds(self, identity: int | str) -> bool:
        return identity in self.held


class Steps(Ensemble):
    def __init__(self) -> None:
        pass


@dataclass
class Version:
    """As much of a served version as a split meets."""

    version: str
    scheduler: Any = None
    ready: bool = True
    obstacle: str = ""
    chosen: int = 0
    read: list[str] = field(default_factory=list)


class Road:
    def __init__(self, percent: float = 50.0, header: dict[str, str] | None = None, sticky: str | None = None) -> None:
        self.now = 0.0
        self.split = Split("m", SplitRule.of("m", percent, header or {}, sticky), random.Random(1), lambda: self.now)
        self.champion, self.canary = Version("1"), Version("2")
        self.split.canary = cast("ServedVersion", self.canary)
        self.request = request_of([1])
        self.reads = 0

    def read(self, version: ServedVersion) -> InferRequest:
        assert cast("Version", version) is self.champion, "the champion's clients are read as the champion does"
        self.reads += 1
        return self.request

    def choose(self, *headers: tuple[bytes, bytes]) -> str:
        return self.split.choose(cast("ServedVersion", self.champion), headers, self.read).version


def test_both_get_their_share_and_it_is_counted() -> None:
    road = Road(30.0)
    met = [road.choose() for _ in range(1000)]
    assert met.count("2") == road.canary.chosen
    assert met.count("1") == road.champion.chosen
    assert 230 < road.canary.chosen < 370
    assert road.reads == 0, "nothing is decoded to choose between versions without sequences"


def test_a_new_share_holds_at_once() -> None:
    road = Road(0.0)
    assert road.choose() == "1"
    road.split.rule = SplitRule.of("m", 100.0, {}, None)
    assert road.choose() == "2"


@pytest.mark.parametrize("gone", [True, False])
def test_the_champion_answers_for_a_canary_that_cannot(gone: bool, caplog: pytest.LogCaptureFixture) -> None:
    road = Road(100.0, {"X-Variant": "canary"})
    road.canary.ready, road.canary.obstacle = False, "no worker is available"
    if gone:
        road.split.canary = None
    with caplog.at_level(logging.WARNING):
        assert [road.choose((b"x-variant", b"canary")), road.choose()] == ["1", "1"]
        assert len(caplog.messages) == 1, "told once, not for every request"
        assert ("it is not loaded" if gone else "no worker is available") in caplog.text
        road.now += TOLD_EVERY_S
        road.choose()
        assert "2 of its requests" in caplog.messages[-1]
    assert (road.split.fallbacks, road.champion.chosen, road.canary.chosen) == (3, 3, 0)


def test_a_sequence_stays_where_it_began_whatever_the_share_becomes() -> None:
    road = Road(100.0)
    road.champion.scheduler, road.canary.scheduler = Sequences(), Sequences()
    road.request.sequence = SequenceStep(7, start=True)
    assert road.choose() == "2"
    road.canary.scheduler.held.add(7)
    road.request.sequence = SequenceStep(7)
    road.split.rule = SplitRule.of("m", 0.0, {}, None)
    assert [road.choose() for _ in range(3)] == ["2"] * 3
    road.request.sequence = SequenceStep(7, end=True)
    assert road.choose() == "2"
    road.canary.scheduler.held.clear()
    road.request.sequence = SequenceStep(7, start=True)
    assert road.choose() == "1", "a new one of the same id is drawn anew"


def test_a_sequence_stays_with_a_canary_that_fails() -> None:
    """The champion knows nothing of its steps so far: an error is the only right answer."""
    road = Road(100.0)
    road.champion.scheduler, road.canary.scheduler = Sequences(), Sequences(7)
    road.canary.ready = False
    road.request.sequence = SequenceStep(7)
    assert road.choose() == "2"


def test_the_champion_s_sequences_stay_with_it() -> None:
    road = Road(100.0, {"X-Variant": "canary"})
    road.champion.scheduler, road.canary.scheduler = Sequences(7), Sequences()
    road.request.sequence = SequenceStep(7)
    assert road.choose((b"x-variant", b"canary")) == "1"


def test_a_step_of_no_known_sequence_is_the_champion_s_to_refuse() -> None:
    road = Road(100.0)
    road.champion.scheduler, road.canary.scheduler = Sequences(), Sequences()
    road.request.sequence = SequenceStep(7)
    assert road.choose() == "1"
    road.request.sequence = None
    assert road.choose() == "2", "what names no sequence is drawn"


def test_steps_of_sequences_through_an_ensemble_stay_with_the_champion() -> None:
    road = Road(100.0)
    road.champion.scheduler = Steps()
    road.request.sequence = SequenceStep("s", start=True)
    assert road.choose() == "1"
    road.request.sequence = None
    assert road.choose() == "2"


@simulated
async def test_a_real_sequence_scheduler_says_what_it_holds() -> None:
    bench = SequenceBench()
    assert not bench.scheduler.holds(1)
    bench.send(5, 1, start=True)
    assert bench.scheduler.holds(1)
    (await bench.expect_batch([5])).reply()
    bench.send(6, 1, end=True)
    assert not bench.scheduler.holds(1), "its END is in: a step of this id begins another one"
    (await bench.expect_batch([6])).reply()
    await bench.finish()
