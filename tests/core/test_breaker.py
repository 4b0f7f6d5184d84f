from __future__ import annotations

import random
from math import inf, nan

import pytest

from gateway.core.breaker import (
    BREAKER,
    Breaker,
    BreakerPolicy,
    Cause,
    Event,
    State,
    Weight,
    weigh,
)
from gateway.core.breaker_states import SOFT, TRANSITIONS
from gateway.core.outcome import Failure, FailureKind, Sign
from tests.core import fleet_bench as fb
from tests.core.fleet_bench import Middle

NOW = 1000.0


def breaker(start: State = State.CLOSED, policy: BreakerPolicy = BREAKER) -> Breaker:
    return Breaker(policy, Middle(), NOW, start)


def blows(it: Breaker, weight: Weight, count: int, now: float = NOW) -> None:
    for _ in range(count):
        it.failed(weight, now, now)


def state(it: Breaker) -> State:
    """Said by a call, so that a type checker does not take it for settled."""
    return it.state


def half_open(level: int = 1) -> Breaker:
    """In its HALF_OPEN state since `until`, after so many trips."""
    it = breaker()
    for _ in range(level):
        if state(it) is State.CLOSED:
            blows(it, Weight.HARD, 5)
        else:
            it.failed(Weight.HARD, it.until, it.until)
        it.advance(it.until)
    assert state(it) is State.HALF_OPEN
    assert it.level == level
    return it


# -- the table -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", State)
@pytest.mark.parametrize("event", Event)
def test_what_is_not_in_the_table_raises_and_changes_nothing(start: State, event: Event) -> None:
    it = breaker(start)
    if (start, event) in TRANSITIONS:
        it._go(event, NOW + 1)
        assert state(it) is TRANSITIONS[start, event]
        assert it.since == NOW + 1
        return
    with pytest.raises(KeyError):
        it._trip(event, Cause.RATIO, NOW + 1)
    assert (it.state, it.since, it.level, it.until, dict(it.trips)) == (start, NOW, 0, NOW, {})


def test_every_state_can_be_left_and_reached() -> None:
    assert {before for before, _ in TRANSITIONS} == set(State) == set(TRANSITIONS.values())


@pytest.mark.parametrize(
    ("failure", "weight"),
    [
        (fb.ERROR, Weight.HARD),
        (fb.RESET, Weight.HARD),
        (fb.TIMEOUT, Weight.HARD),
        (fb.EXIT, Weight.HARD),
        (fb.WRONG, Weight.MISMATCH),
        (fb.BUSY, Weight.OVERLOAD),
        (fb.REFUSED, Weight.CONNECT),
        (fb.MISSING, Weight.MISSING),
        (fb.STALE_CONNECTION, Weight.NEUTRAL),
        (fb.SUSPECT, Weight.NEUTRAL),
        (fb.CANCELLED, Weight.NEUTRAL),
        (fb.BYSTANDER, Weight.NEUTRAL),
    ],
)
def test_weights(failure: Failure, weight: Weight) -> None:
    assert weigh(failure) is weight


def test_every_failure_has_a_weight() -> None:
    assert {weigh(Failure(kind, "", sign)) for kind in FailureKind for sign in Sign} == set(Weight)


# -- CLOSED --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "harmless", "cause"),
    [
        (Weight.HARD, 4, Cause.CONSECUTIVE),
        (Weight.CONNECT, 1, Cause.CONNECT),
        (Weight.MISMATCH, 1, Cause.MISMATCH),
        (Weight.MISSING, 0, Cause.MISSING),
        (Weight.OVERLOAD, 19, Cause.RATIO),
    ],
)
def test_so_many_in_a_row_are_borne_and_one_more_is_not(weight: Weight, harmless: int, cause: Cause) -> None:
    it = breaker()
    blows(it, weight, harmless)
    assert state(it) is State.CLOSED
    blows(it, weight, 1)
    assert state(it) is State.OPEN
    assert it.cause is cause
    assert dict(it.trips) == {cause: 1}


@pytest.mark.parametrize(("weight", "harmless"), [(Weight.HARD, 4), (Weight.CONNECT, 1)])
def test_a_success_breaks_the_row(weight: Weight, harmless: int) -> None:
    it = breaker()
    for _ in range(3):
        blows(it, weight, harmless)
        it.succeeded(NOW, NOW, False)
    assert state(it) is State.CLOSED


def test_an_overload_is_no_part_of_a_row_and_does_not_break_it() -> None:
    it = breaker()
    blows(it, Weight.HARD, 4)
    blows(it, Weight.OVERLOAD, 3)
    assert state(it) is State.CLOSED
    blows(it, Weight.HARD, 1)
    assert it.cause is Cause.CONSECUTIVE


@pytest.mark.parametrize(("failed", "total", "trips"), [(10, 20, True), (9, 19, False), (9, 20, False), (15, 30, True)])
def test_half_of_twenty_trips(failed: int, total: int, trips: bool) -> None:
    it = breaker()
    outcomes = [True] * failed + [False] * (total - failed)
    random.Random(5).shuffle(outcomes)
    outcomes.sort(key=lambda bad: bad)  # failures last: they are what trips
    for bad in outcomes:
        if bad:
            it.failed(Weight.OVERLOAD, NOW, NOW)
        else:
            it.succeeded(NOW, NOW, False)
    assert (state(it) is State.OPEN) == trips
    assert (it.cause is Cause.RATIO) == trips


def test_failures_of_more_than_ten_seconds_ago_are_forgotten() -> None:
    it = breaker()
    blows(it, Weight.OVERLOAD, 19)
    it.failed(Weight.OVERLOAD, NOW + 10, NOW + 10)
    assert state(it) is State.CLOSED


@pytest.mark.parametrize(
    ("slow", "total", "trips"), [(16, 20, True), (15, 20, False), (15, 19, False), (19, 19, False)]
)
def test_four_fifths_of_twenty_slow_ones_trip(slow: int, total: int, trips: bool) -> None:
    it = breaker()
    for at in range(total):
        it.succeeded(NOW, NOW, False, slow=at >= total - slow)
    assert (state(it) is State.OPEN) == trips
    assert (it.cause is Cause.SLOW) == trips


@pytest.mark.parametrize(("apart_s", "trips"), [(59.9, True), (60.1, False)])
def test_two_wrong_answers_within_a_minute(apart_s: float, trips: bool) -> None:
    it = breaker()
    it.failed(Weight.MISMATCH, NOW, NOW)
    it.succeeded(NOW, NOW, False)
    it.failed(Weight.MISMATCH, NOW + apart_s, NOW + apart_s)
    assert (state(it) is State.OPEN) == trips
    if trips:
        assert it.until >= NOW + apart_s + 60.0


def test_three_failed_health_probes_in_a_row() -> None:
    it = breaker()
    for _ in range(2):
        it.health_probe_failed(NOW, NOW)
    it.health_probe_succeeded()
    for _ in range(2):
        it.health_probe_failed(NOW, NOW)
    it.succeeded(NOW, NOW, False)
    for _ in range(2):
        it.health_probe_failed(NOW, NOW)
    assert state(it) is State.CLOSED
    it.health_probe_failed(NOW, NOW)
    assert (it.state, it.cause) == (State.OPEN, Cause.PROBES)


def test_cancellations_mean_nothing() -> None:
    it = breaker()
    blows(it, Weight.NEUTRAL, 10_000)
    assert state(it) is State.CLOSED
    assert it.window.total == 0


# -- OPEN ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "seconds"), [(1, 1), (2, 2), (3, 4), (4, 8), (5, 16), (6, 32), (7, 60), (8, 60), (20, 60)]
)
def test_every_trip_doubles_the_time_up_to_a_minute(level: int, seconds: float) -> None:
    it = half_open(1)
    for _ in range(level - 1):
        at = it.until
        it.failed(Weight.HARD, at, at)
        it.advance(it.until)
    it_opened = it.until - seconds
    assert it.level == min(level, 7)
    assert it.since == pytest.approx(it_opened + seconds)
    it.failed(Weight.HARD, it.since, it.since)
    assert it.until - it.since == pytest.approx(min(2.0 ** min(level, 6), 60.0))


def test_jitter_is_a_fifth_either_way() -> None:
    rng = random.Random(3)
    lengths = []
    for _ in range(2000):
        it = Breaker(BREAKER, rng, NOW)
        blows(it, Weight.HARD, 5)
        lengths.append(it.until - NOW)
    assert 0.8 <= min(lengths) < 0.81
    assert 1.19 < max(lengths) <= 1.2


def test_it_stays_open_until_its_time_and_then_is_half_open() -> None:
    it = breaker()
    blows(it, Weight.HARD, 5)
    assert it.next_wake(NOW) == NOW + 1.0
    it.advance(NOW + 0.999)
    assert state(it) is State.OPEN
    it.advance(NOW + 1.0)
    assert state(it) is State.HALF_OPEN


@pytest.mark.parametrize(("asked", "seconds"), [(2.0, 2.0), (299.0, 299.0), (301.0, 300.0), (inf, 300.0)])
def test_retry_after_is_obeyed_up_to_five_minutes(asked: float, seconds: float) -> None:
    it = half_open()
    at = it.since
    it.failed(Weight.OVERLOAD, at, at, asked)
    assert state(it) is State.OPEN
    assert it.cause is Cause.OVERLOAD
    assert it.until == it.blocked_until == at + seconds


@pytest.mark.parametrize("asked", [0.0, -5.0, nan])
def test_without_a_usable_retry_after_it_is_left_alone_briefly_and_then_longer(asked: float) -> None:
    it = breaker()
    pauses = []
    for _ in range(7):
        it.failed(Weight.OVERLOAD, NOW, NOW, asked)
        pauses.append(it.blocked_until - NOW)
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0])
    it.succeeded(NOW, NOW, False)
    assert it.pauses == 0


# -- HALF_OPEN -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "cause"),
    [
        (Weight.HARD, Cause.TRIAL),
        (Weight.OVERLOAD, Cause.OVERLOAD),
        (Weight.CONNECT, Cause.CONNECT),
        (Weight.MISSING, Cause.MISSING),
        (Weight.MISMATCH, Cause.MISMATCH),
    ],
)
def test_a_failed_probe_opens_it_again_for_longer(weight: Weight, cause: Cause) -> None:
    it = half_open()
    it.failed(weight, it.since, it.since)
    assert (it.state, it.level, it.cause) == (State.OPEN, 2, cause)


def test_three_successful_probes_in_a_row_end_it() -> None:
    it = half_open()
    for _ in range(2):
        it.succeeded(it.since, it.since, False)
    assert state(it) is State.HALF_OPEN
    it.succeeded(it.since, it.since, False)
    assert state(it) is State.RAMP


def test_in_use_all_the_same_it_closes_at_once() -> None:
    it = half_open()
    for _ in range(3):
        it.succeeded(it.since, it.since, True)
    assert state(it) is State.CLOSED


def test_what_was_sent_before_says_nothing() -> None:
    it = half_open()
    before = it.since - 0.5
    for _ in range(5):
        it.succeeded(before, it.since, False)
    it.failed(Weight.HARD, before, it.since)
    it.health_probe_failed(before, it.since)
    it.take_permit(it.since)
    it.return_permit(it.since, before)
    assert state(it) is State.HALF_OPEN
    assert not it.may_probe(it.since)


def test_one_permit() -> None:
    it = half_open()
    now = it.since
    assert it.may_probe(now)
    it.take_permit(now)
    assert not it.may_probe(now + 1)
    it.return_permit(now + 1, now)
    assert it.may_probe(now + 1)


def test_a_permit_that_nobody_returns_is_given_up_after_a_minute() -> None:
    it = half_open()
    now = it.since
    it.take_permit(now)
    assert it.next_wake(now) == now + 60
    it.advance(now + 59.9)
    assert not it.may_probe(now + 59.9)
    it.advance(now + 60)
    assert it.may_probe(now + 60)


def test_a_probe_that_could_not_be_made_is_not_due_at_once() -> None:
    it = half_open()
    now = it.since
    it.take_permit(now)
    it.return_permit(now, now)
    it.rest(now)
    assert not it.may_probe(now)
    assert it.next_wake(now) == now + BREAKER.probe_again_s
    assert it.may_probe(now + BREAKER.probe_again_s)


# -- RAMP ----------------------------------------------------------------------------------------------------------


def ramp() -> Breaker:
    it = half_open()
    for _ in range(3):
        it.succeeded(it.since, it.since, False)
    return it


def test_a_ramp_takes_ten_seconds() -> None:
    it = ramp()
    start = it.since
    assert it.next_wake(start) == start + 10
    it.advance(start + 9.99)
    assert state(it) is State.RAMP
    it.advance(start + 10)
    assert state(it) is State.CLOSED


@pytest.mark.parametrize(
    ("weight", "count", "cause"),
    [
        (Weight.HARD, 1, Cause.TRIAL),
        (Weight.MISMATCH, 1, Cause.MISMATCH),
        (Weight.MISSING, 1, Cause.MISSING),
        (Weight.CONNECT, 2, Cause.CONNECT),
        (Weight.OVERLOAD, 20, Cause.RATIO),
    ],
)
def test_a_ramp_ends_by(weight: Weight, count: int, cause: Cause) -> None:
    it = ramp()
    blows(it, weight, count - 1, it.since)
    assert state(it) is State.RAMP
    blows(it, weight, 1, it.since)
    assert (it.state, it.cause, it.level) == (State.OPEN, cause, 2)


# -- level ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("closed_s", "level"), [(59.0, 4), (60.0, 3), (179.0, 2), (180.0, 1), (10_000.0, 1)])
def test_a_minute_closed_takes_one_trip_back(closed_s: float, level: int) -> None:
    it = half_open(3)
    for _ in range(3):
        it.succeeded(it.since, it.since, False)
    it.advance(it.since + 10)
    closed = it.since
    assert state(it) is State.CLOSED
    blows(it, Weight.HARD, 5, closed + closed_s)
    assert it.level == level


# -- availability and orders ---------------------------------------------------------------------------------------


def test_a_worker_comes_back_closed_and_untainted() -> None:
    it = breaker()
    blows(it, Weight.HARD, 4)
    it.lost(NOW, remote=False)
    blows(it, Weight.HARD, 4)
    it.back(NOW + 0.1, cold=False)
    blows(it, Weight.HARD, 4, NOW + 0.2)
    assert (it.state, it.level, dict(it.trips)) == (State.CLOSED, 0, {})


def test_a_server_comes_back_by_a_ramp() -> None:
    it = breaker()
    it.lost(NOW, remote=True)
    assert state(it) is State.UNAVAILABLE
    it.back(NOW + 2, cold=True)
    assert state(it) is State.RAMP


def test_a_flapping_server_is_kept_open_for_longer_and_longer() -> None:
    it, now, flips = breaker(), NOW, 0
    for _ in range(60):  # two minutes of two seconds up, two seconds down
        it.lost(now, remote=True)
        now += 2.0
        it.advance(now)
        it.back(now, cold=True)
        flips += state(it) is State.RAMP
        now += 2.0
        it.advance(now)
    assert flips <= 12
    assert it.level >= 3


def test_a_server_that_served_well_before_it_went_away_is_let_back_soon_every_time() -> None:
    it, now = breaker(), NOW
    for _ in range(20):
        now += 12.0
        it.advance(now)
        it.lost(now, remote=True)
        assert it.level == 1
        assert it.until <= now + 1.2
        now += 1.5
        it.back(now, cold=True)
        assert state(it) is State.RAMP


def test_a_ramp_ends_early_where_every_batch_is_in_time() -> None:
    it = ramp()
    start = it.since
    for n in range(40):
        it.succeeded(start + 0.02 * n, start + 0.02 * (n + 1), False)
    assert state(it) is State.RAMP  # a second has not passed
    it.succeeded(start + 1.0, start + 1.1, False)
    assert state(it) is State.CLOSED


def test_a_late_batch_starts_the_ramp_anew() -> None:
    it = ramp()
    now = it.since + 2.0
    shares = []
    for late in (False, False, False, True, False):
        it.succeeded(now, now + 0.1, False, late=late)
        now += 0.1
        shares.append(it.ramp_share(it.since + 0.9, 0.1))
    assert shares == pytest.approx([0.2, 0.4, 0.8, 0.1, 0.2])
    assert state(it) is State.RAMP


def test_the_share_never_grows_faster_than_a_quick_ramp() -> None:
    it = ramp()
    for n in range(30):
        it.succeeded(it.since + 0.001 * n, it.since + 0.001 * (n + 1), False)
    assert it.ramp_share(it.since + 0.03, 0.1) == pytest.approx(0.1)
    assert it.ramp_share(it.since + 0.5, 0.1) == pytest.approx(0.5)


def test_drained_is_for_good_whatever_happens() -> None:
    it = breaker()
    it.force(State.DRAINED, NOW, True, True)
    it.lost(NOW, True)
    it.back(NOW, True)
    it.advance(NOW + 1e6)
    blows(it, Weight.HARD, 50, NOW)
    assert state(it) is State.DRAINED
    it.force(None, NOW, True, True)
    assert state(it) is State.RAMP


def test_pinned_is_for_good_whatever_happens() -> None:
    it = half_open()
    it.force(State.PINNED, NOW, True, True)
    for weight in Weight:
        blows(it, weight, 50, NOW)
    it.health_probe_failed(NOW, NOW)
    it.lost(NOW, True)
    assert state(it) is State.PINNED
    it.force(None, NOW, False, True)
    assert state(it) is State.UNAVAILABLE


def test_lifting_what_was_not_ordered_changes_nothing() -> None:
    it = half_open()
    it.force(None, NOW, True, True)
    assert state(it) is State.HALF_OPEN


def test_what_cannot_be_reached_or_answers_wrongly_is_not_soft() -> None:
    assert set(Cause) - SOFT == {Cause.NONE, Cause.MISMATCH, Cause.CONNECT, Cause.MISSING, Cause.OPERATOR}
