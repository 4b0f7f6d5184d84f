"""Four replicas under load in virtual time: what the balancing of resilience notes §2 is for, as inequalities."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable

import pytest

from gateway.core.fleet import Fleet, FleetPolicy, Member
from gateway.core.outcome import Failure, FailureKind
from gateway.core.resilience import Balancing
from tests.core.fleet_bench import ERROR, Place

MAX_ROWS = 32
Service = Callable[[str, int, float], tuple[float, Failure | None]]
"""Name of the replica, rows, now → seconds, and the failure if it is one."""


class World:
    """One central queue of rows, late binding; failed rows are not retried, as that is not the fleet's business."""

    def __init__(self, places: list[Place], service: Service, balancing: Balancing = "pull", seed: int = 1) -> None:
        self.rng = random.Random(seed)
        self.fleet = Fleet(FleetPolicy(balancing), self.rng, MAX_ROWS)
        for place in places:
            self.fleet.join(place, 0.0)
        self.service = service
        self.rows: Counter[str] = Counter()
        self.waits: list[float] = []
        self.sent: list[tuple[str, float]] = []

    def run(self, rows_per_s: float, seconds: float) -> World:
        rng, fleet = self.rng, self.fleet
        queue: list[float] = []
        now, order = 0.0, 0
        ends: list[tuple[float, int, Member, int, float, Failure | None]] = []
        arrival = rng.expovariate(rows_per_s)
        while now < seconds:
            wake = fleet.next_wake(now) or seconds
            now = min(arrival, ends[0][0] if ends else seconds, wake)
            if now == arrival:
                queue.append(now)
                arrival = now + rng.expovariate(rows_per_s)
            while ends and ends[0][0] <= now:
                _, _, member, rows, took_s, failure = heapq.heappop(ends)
                place = member.replica
                assert isinstance(place, Place)
                place.in_flight -= 1
                if failure is None:
                    fleet.succeeded(member, rows, took_s, 0.0, now)
                else:
                    fleet.failed(member, rows, failure, took_s, now)
            while queue and (chosen := fleet.choose(now, min(len(queue), MAX_ROWS))):
                rows = min(len(queue), fleet.row_limit(chosen, now))
                self.waits += [now - at for at in queue[:rows]]
                del queue[:rows]
                took_s, failure = self.service(chosen.name, rows, now)
                self.rows[chosen.name] += rows
                self.sent.append((chosen.name, now))
                place = chosen.replica
                assert isinstance(place, Place)
                place.in_flight += 1
                fleet.began(chosen, rows, now)
                order += 1
                heapq.heappush(ends, (now + took_s, order, chosen, rows, took_s, failure))
        return self

    def share(self, name: str) -> float:
        return self.rows[name] / self.rows.total()

    def wait_s(self, quantile: float) -> float:
        return sorted(self.waits)[int(quantile * len(self.waits))]


def batch_s(rows: int) -> float:
    return 0.003 + 0.0003 * rows


CAPACITY = MAX_ROWS / batch_s(MAX_ROWS)
"""Rows per second of one replica."""


def four(**weights: float) -> list[Place]:
    return [Place(name, slots=1, weight=weights.get(name, 1.0)) for name in "abcd"]


def healthy(name: str, rows: int, now: float) -> tuple[float, Failure | None]:
    return batch_s(rows), None


@pytest.mark.parametrize("balancing", ["pull", "p2c_ewma", "least_rows", "round_robin"])
@pytest.mark.parametrize("load", [0.1, 0.7])
def test_equals_share_the_work(balancing: Balancing, load: float) -> None:
    world = World(four(), healthy, balancing).run(4 * load * CAPACITY, 4.0)
    assert all(0.17 < world.share(name) < 0.33 for name in "abcd"), world.rows


@pytest.mark.parametrize("balancing", ["pull", "p2c_ewma", "least_rows", "round_robin"])
@pytest.mark.parametrize("load", [0.1, 0.7])
def test_a_fast_failing_replica_attracts_hardly_anything(balancing: Balancing, load: float) -> None:
    def service(name: str, rows: int, now: float) -> tuple[float, Failure | None]:
        return (0.0005, ERROR) if name == "a" and now > 1.0 else (batch_s(rows), None)

    world = World(four(), service, balancing).run(4 * load * CAPACITY, 12.0)
    after = world.share("a") - 1 / 4 / 12  # its fair share of the first second
    assert after < 0.01, world.rows


def test_a_replica_that_refuses_quickly_attracts_hardly_anything() -> None:
    busy = Failure(FailureKind.OVERLOAD, "429")

    def service(name: str, rows: int, now: float) -> tuple[float, Failure | None]:
        return (0.0005, busy) if name == "a" else (batch_s(rows), None)

    assert World(four(), service).run(2.8 * CAPACITY, 10.0).share("a") < 0.01


@pytest.mark.parametrize(("load", "most"), [(0.01, 0.02), (0.7, 0.17)])
def test_a_slow_replica_is_only_used_when_the_others_are_busy(load: float, most: float) -> None:
    def service(name: str, rows: int, now: float) -> tuple[float, Failure | None]:
        return batch_s(rows) * (2.9 if name == "a" else 1.0), None

    assert World(four(), service).run(load * 3.3 * CAPACITY, 6.0).share("a") < most


def test_a_grey_replica_is_ejected_within_three_seconds_and_comes_back() -> None:
    def service(name: str, rows: int, now: float) -> tuple[float, Failure | None]:
        return batch_s(rows) * (10.0 if name == "a" and 4.0 < now < 8.0 else 1.0), None

    world = World(four(), service)
    told: list[tuple[str, str]] = []
    world.fleet.watchers.append(lambda member, before: told.append((member.name, member.breaker.state.value)))
    world.run(2.4 * CAPACITY, 7.0)
    starved = world.fleet.members[0].time.load(7.0) > 3.0
    assert told[:1] == [("a", "open")] or starved
    assert all(name == "a" for name, _ in told)
    assert world.wait_s(0.99) < 4 * batch_s(MAX_ROWS)


def test_healthy_replicas_are_never_ejected_however_sizes_vary() -> None:
    rng = random.Random(9)

    def service(name: str, rows: int, now: float) -> tuple[float, Failure | None]:
        return batch_s(rows) * rng.lognormvariate(0.0, 0.3), None

    world = World(four(), service)
    told: list[str] = []
    world.fleet.watchers.append(lambda member, before: told.append(member.name))
    world.run(3.2 * CAPACITY, 8.0)
    assert told == []


def test_weights_are_respected_at_low_load() -> None:
    world = World(four(a=3.0), healthy).run(0.02 * CAPACITY, 60.0)
    assert abs(world.share("a") - 0.5) < 0.07, world.rows


def test_back_after_a_failure_it_has_its_full_share_within_fifteen_seconds() -> None:
    def service(name: str, rows: int, now: float) -> tuple[float, Failure | None]:
        return (0.0005, ERROR) if name == "a" and now < 2.0 else (batch_s(rows), None)

    world = World(four(), service)
    world.run(1.2 * CAPACITY, 18.0)
    assert world.fleet.members[0].breaker.state.value == "closed"
    late = Counter(name for name, at in world.sent if at > 16.0)
    assert 0.15 < late["a"] / late.total() < 0.35, late
