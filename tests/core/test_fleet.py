from __future__ import annotations

import random
from math import inf

import pytest

from gateway.core.breaker import State
from gateway.core.fleet import FULL_SCAN, FleetPolicy
from gateway.core.outcome import Failure, FailureKind
from tests.core.fleet_bench import (
    BUSY,
    BYSTANDER,
    CANCELLED,
    ERROR,
    EXIT,
    MISSING,
    OK,
    REFUSED,
    SUSPECT,
    TIMEOUT,
    WRONG,
    Bench,
    Place,
    bench,
)

TRIP = [ERROR] * 5


# -- choosing ------------------------------------------------------------------------------------------------------


def test_one_replica_is_taken_while_it_has_a_free_slot() -> None:
    it = bench(1)
    (member,) = it.members
    assert it.fleet.choose(it.now, 1) is member
    it.begin(member)
    assert it.fleet.choose(it.now, 1) is None, "slots start at one"
    assert it.fleet.choose(it.now, 1, [member]) is None


def test_a_worker_is_bounded_by_its_own_slots_only() -> None:
    it = Bench(Place("onnx-0", "onnx", slots=2))
    (member,) = it.members
    it.begin(member)
    assert it.fleet.choose(it.now, 1) is member
    it.begin(member)
    assert it.fleet.choose(it.now, 1) is None


def test_nobody_is_nobody() -> None:
    it = bench(0)
    assert it.fleet.choose(it.now, 1) is None
    assert it.fleet.next_wake(it.now) is None
    assert not it.fleet.panic


def test_the_avoided_are_never_taken() -> None:
    it = bench(2)
    first, second = it.members
    assert it.fleet.choose(it.now, 1, {first}) is second
    it.begin(second)
    assert it.fleet.choose(it.now, 1, {first}) is None
    assert it.fleet.others(it.now, {first}), "busy, but it will be free"
    assert not it.fleet.others(it.now, {first, second})


def test_a_retry_prefers_another_zone_and_then_another_host() -> None:
    places = [
        Place("a", zone="z1", host="h1"),
        Place("b", zone="z1", host="h2"),
        Place("c", zone="z2", host="h3"),
        Place("d", zone="z1", host="h1"),
    ]
    it = Bench(*places)
    a, b, c, _ = it.members
    assert it.fleet.choose(it.now, 1, [a]) is c
    it.begin(c)
    assert it.fleet.choose(it.now, 1, [a]) is b
    it.begin(b)
    assert it.fleet.choose(it.now, 1, [a]) is not None, "the same host rather than nobody"


def test_a_turn_is_taken_by_a_batch_not_by_a_question() -> None:
    it = Bench(Place("r0"), Place("r1"), policy=FleetPolicy("round_robin"))
    taken = []
    for _ in range(6):
        it.fleet.choose(it.now, 1)  # somebody only wanted to know
        member = it.fleet.choose(it.now, 1)
        assert member is not None
        taken.append(member.name)
        it.run(member, OK)
    assert taken == ["r0", "r1"] * 3


def test_who_is_in_a_hurry_goes_to_somebody_free_who_can_make_it() -> None:
    it = bench(3, slots=1)
    slow, quick, unknown = it.members
    for _ in range(20):
        slow.time.observe(1, 1.0, it.now)
        quick.time.observe(1, 0.1, it.now)
    assert it.fleet.in_time(slow, 1, it.now, it.now + 2.0) is slow
    assert it.fleet.in_time(slow, 1, it.now, it.now + 0.5) is quick
    assert it.fleet.in_time(slow, 1, it.now, it.now + 0.01) is slow, "nobody can; of the unknown nothing is expected"
    it.begin(quick)
    assert it.fleet.in_time(slow, 1, it.now, it.now + 0.5) is slow, "nobody waits for a busy one"
    assert unknown.batches == 0


def test_of_many_somebody_free_is_found() -> None:
    it = Bench(*[Place(f"r{n}") for n in range(FULL_SCAN + 12)], rng=random.Random(1))
    for _ in it.members:
        member = it.fleet.choose(it.now, 1)
        assert member is not None
        assert member.in_flight == 0
        it.begin(member)
    assert it.fleet.choose(it.now, 1) is None


def test_an_affinity_stays_with_its_replica_and_waits_for_it() -> None:
    it = bench(4)
    owner = it.fleet.choose(it.now, 1, affinity=77)
    assert owner is not None
    it.begin(owner)
    assert it.fleet.choose(it.now, 1, affinity=77) is None
    it.end(owner, it.now, OK)
    it.run(owner, *TRIP)
    other = it.fleet.choose(it.now, 1, affinity=77)
    assert other is not None
    assert other is not owner
    it.recover(owner)
    assert it.fleet.choose(it.now, 1, affinity=77) is owner


def test_who_left_is_not_chosen_and_its_last_outcome_is_taken() -> None:
    it = bench(2)
    first, second = it.members
    began = it.begin(first)
    it.fleet.leave(first)
    assert it.fleet.choose(it.now, 1) is second
    it.end(first, began, ERROR)
    assert first.batches == first.rows_in_flight == 0
    with pytest.raises(KeyError):
        it.fleet.of(first.replica)


@pytest.mark.parametrize(("kind", "state"), [("oip", "ramp"), ("onnx", "closed")])
def test_who_joins_a_fleet_at_work(kind: str, state: str) -> None:
    it = Bench(Place("a", kind))
    assert it.states() == ["closed"]
    it.run(it.members[0], OK)
    assert it.fleet.join(Place("b", kind), it.now).breaker.state.value == state


# -- ejection, guard, panic ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcomes", "state"),
    [
        ([ERROR] * 4, "closed"),
        ([ERROR] * 5, "open"),
        ([TIMEOUT] * 5, "open"),
        ([EXIT] * 5, "open"),
        ([REFUSED], "closed"),
        ([REFUSED] * 2, "open"),
        ([REFUSED, OK, REFUSED], "closed"),
        ([WRONG], "closed"),
        ([WRONG, OK, WRONG], "open"),
        ([MISSING], "open"),
        ([SUSPECT] * 50, "closed"),
        ([CANCELLED] * 50, "closed"),
        ([BYSTANDER] * 50, "closed"),
        ([BUSY] * 19, "closed"),
        ([BUSY] * 20, "open"),
    ],
)
def test_what_ejects(outcomes: list[Failure], state: str) -> None:
    it = bench(2)
    it.run(it.members[0], *outcomes)
    assert it.states() == [state, "closed"]
    if state == "open":
        assert it.fleet.choose(it.now, 1) is it.members[1]
        assert not it.fleet.usable(it.members[0], it.now)


def test_a_long_silence_is_enough() -> None:
    it = bench(2)
    it.run(it.members[0], OK)
    it.run(it.members[0], TIMEOUT, took_s=0.7)
    assert it.states() == ["closed", "closed"]
    it.run(it.members[0], TIMEOUT, took_s=1.0)
    assert it.states() == ["open", "closed"]
    assert it.fleet.statistics(it.now).members[0].ejections == {"hung": 1}


def test_one_late_answer_among_others_is_not_silence() -> None:
    it = bench(2)
    first = it.members[0]
    late = it.begin(first)
    it.run(first, *[OK] * 4, took_s=0.5)
    it.end(first, late, TIMEOUT)
    assert it.states() == ["closed", "closed"]


def test_a_batch_of_many_rows_weighs_one() -> None:
    it = bench(2)
    it.run(it.members[0], *[ERROR] * 4, rows=32)
    assert it.states() == ["closed", "closed"]


def test_blame_is_a_hard_failure() -> None:
    it = bench(2)
    it.run(it.members[0], *[SUSPECT] * 5)
    for _ in range(4):
        it.fleet.blamed(it.members[0], it.now)
    assert it.states() == ["closed", "closed"]
    it.fleet.blamed(it.members[0], it.now)
    assert it.states() == ["open", "closed"]


@pytest.mark.parametrize(("count", "ejected"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (6, 3)])
def test_failures_take_at_most_half_away(count: int, ejected: int) -> None:
    it = bench(count)
    for tripped, member in enumerate(it.members, 1):
        it.run(member, *TRIP, took_s=0.0)
        usable = [other for other in it.members if it.fleet.usable(other, it.now)]
        assert it.fleet.panic == (tripped > ejected)
        assert len(usable) == (count if it.fleet.panic else count - tripped)
    assert it.fleet.statistics(it.now).panic


@pytest.mark.parametrize("reason", [WRONG, MISSING, REFUSED])
def test_what_cannot_work_is_outside_the_guard(reason: Failure) -> None:
    it = bench(3)
    for member in it.members:
        it.run(member, reason, reason)
    assert it.states() == ["open"] * 3
    assert not it.fleet.panic
    assert it.fleet.choose(it.now, 1) is None


def test_the_dead_are_outside_the_guard() -> None:
    it = bench(3)
    it.run(it.members[0], *TRIP, took_s=0.0)
    assert not it.fleet.statistics(it.now).panic
    for place, member in zip(it.places[1:], it.members[1:], strict=True):
        place.available = False
        it.fleet.availability_changed(member, it.now)
    assert it.fleet.panic, "the last one that can be reached"
    assert it.fleet.choose(it.now, 1) is it.members[0]


def test_in_panic_everyone_gets_one_batch_at_a_time() -> None:
    it = bench(3)
    for member in it.members[:2]:
        it.run(member, *TRIP, took_s=0.0)
    assert it.fleet.panic
    for member in it.members:
        member.slots._set(5.0)
    for _ in range(3):
        chosen = it.fleet.choose(it.now, 1)
        assert chosen is not None
        it.begin(chosen)
    assert it.fleet.choose(it.now, 1) is None


def test_who_proves_itself_in_panic_closes_at_once() -> None:
    it = bench(1)
    (member,) = it.members
    it.run(member, *TRIP)
    assert it.states() == ["open"]
    it.run(member, OK, OK, ERROR, OK, OK)
    assert it.states() == ["open"]
    it.run(member, OK)
    assert it.states() == ["closed"]
    assert not it.fleet.panic


def test_in_panic_the_half_open_are_tried_although_others_answer() -> None:
    it = bench(3)
    for member in it.members:
        it.run(member, *[OK] * 5)
    for member in it.members:
        it.run(member, *TRIP, took_s=0.0)
    it.run(it.members[0], OK, OK, OK)
    assert it.states() == ["closed", "open", "open"]
    it.wait(2.0)
    for _ in range(8):
        chosen = it.fleet.choose(it.now, 1)
        assert chosen is not None
        it.run(chosen, OK)
    assert it.states() == ["closed", "closed", "ramp"]


def test_time_that_passes_between_two_looks_is_not_lost() -> None:
    it = bench(2)
    first, second = it.members
    it.run(first, *TRIP)
    it.recover(first)
    began = it.begin(second)
    it.now += 10.5  # nobody looks when the ramp ends, and then an outcome comes in
    it.end(second, began, ERROR)
    assert it.fleet.choose(it.now, 1) is not None
    assert it.states() == ["closed", "closed"]


def test_drained_ones_get_nothing_even_in_panic() -> None:
    it = bench(3)
    it.fleet.force(it.members[0], "open", it.now)
    for member in it.members[1:]:
        it.run(member, *TRIP, took_s=0.0)
    assert it.fleet.panic
    assert not it.fleet.usable(it.members[0], it.now)
    assert it.fleet.statistics(it.now).members[0].state == "drained"
    it.fleet.force(it.members[0], None, it.now)
    assert it.fleet.usable(it.members[0], it.now)


def test_an_overloaded_one_gets_nothing_until_it_said() -> None:
    it = bench(2)
    first, second = it.members
    it.run(first, Failure(FailureKind.OVERLOAD, "503", retry_after_s=2.0))
    assert it.states() == ["closed", "closed"]
    start = it.now
    assert not it.fleet.usable(first, it.now)
    assert it.fleet.next_wake(it.now) == start + 2.0
    it.begin(second)
    while it.now < start + 1.9:
        assert it.fleet.choose(it.now, 1) is None
        it.wait(0.1)
    it.wait(start + 2.0 - it.now)
    assert it.fleet.choose(it.now, 1) is first
    assert it.fleet.statistics(it.now).members[0].cause == ""


def test_the_pause_holds_in_panic_too() -> None:
    it = bench(1)
    it.run(it.members[0], *[Failure(FailureKind.OVERLOAD, "503", retry_after_s=30.0)] * 20, took_s=0.0)
    assert it.fleet.panic
    assert it.fleet.choose(it.now, 1) is None
    it.wait(29.9)
    assert it.fleet.choose(it.now, 1) is None
    it.wait(0.1)
    assert it.fleet.choose(it.now, 1) is it.members[0]


# -- slowness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "factor", "state"), [(3, 10.0, "open"), (3, 2.5, "closed"), (2, 10.0, "closed")])
def test_much_slower_than_two_peers_is_ejected(count: int, factor: float, state: str) -> None:
    it = bench(count)
    for member in it.members:
        it.run(member, *[OK] * 30, took_s=0.01, rows=8)
    it.wait(11)
    it.run(it.members[0], *[OK] * 20, took_s=0.01 * factor, rows=8)
    assert it.members[0].breaker.state.value == state


def test_bigger_batches_are_not_slow() -> None:
    it = bench(3)
    for member in it.members:
        for rows in (1, 4, 16, 32) * 12:
            it.run(member, OK, took_s=0.003 + 0.003 * rows, rows=rows)
    it.wait(11)
    it.run(it.members[0], *[OK] * 40, took_s=0.003 + 0.003 * 32, rows=32)
    assert it.states() == ["closed"] * 3


def test_a_server_is_not_measured_by_the_workers_beside_it() -> None:
    it = Bench(Place("w0", "onnx"), Place("w1", "onnx"), Place("w2", "onnx"), Place("far"))
    for member in it.members:
        it.run(member, *[OK] * 30, took_s=0.03 if member.kind == "oip" else 0.001)
    assert it.changes == []


# -- recovery ------------------------------------------------------------------------------------------------------


def test_clients_try_it_one_small_batch_at_a_time() -> None:
    it = bench(2)
    first, second = it.members
    it.run(first, *TRIP)
    assert it.fleet.choose(it.now, 1) is second
    it.wait(1.0)
    assert it.states() == ["half_open", "closed"]
    assert it.fleet.row_limit(first, it.now) == 4
    assert it.fleet.choose(it.now, 1, [second]) is first, "tried elsewhere, and nobody else is usable"
    assert it.fleet.choose(it.now, 1) is first
    began = it.begin(first)
    assert it.fleet.choose(it.now, 1) is second
    it.end(first, began, OK)
    it.run(first, OK, OK)
    assert it.states() == ["ramp", "closed"]


def test_a_row_that_failed_elsewhere_is_not_used_to_try() -> None:
    it = bench(3)
    it.run(it.members[0], *TRIP)
    it.wait(1.0)
    assert it.fleet.choose(it.now, 1, [it.members[1]]) is it.members[2]


def test_a_client_that_leaves_gives_the_permit_back() -> None:
    it = bench(2)
    first = it.members[0]
    it.run(first, *TRIP)
    it.wait(1.0)
    it.run(first, CANCELLED)
    assert it.states() == ["half_open", "closed"]
    it.wait(0.5)
    assert it.fleet.choose(it.now, 1) is first


def test_with_a_sample_only_the_prober_tries() -> None:
    it = bench(2)
    first, second = it.members
    it.fleet.sampled = True
    assert it.fleet.probes_due(it.now) == []
    it.run(first, *TRIP)
    assert it.fleet.probes_due(it.now) == []
    it.wait(1.0)
    assert it.fleet.choose(it.now, 1) is second
    assert it.fleet.probes_due(it.now) == [first]
    assert it.fleet.probes_due(it.now) == [], "one at a time"
    it.probe(first, None)
    assert it.fleet.probes_due(it.now) == [], "not at once"
    it.wait(0.3)
    for _ in range(3):
        assert it.fleet.probes_due(it.now) == [first]
        it.probe(first, OK)
    assert it.states() == ["ramp", "closed"]


@pytest.mark.parametrize("outcome", [ERROR, TIMEOUT, BUSY, SUSPECT, REFUSED, MISSING, WRONG])
def test_a_failed_probe(outcome: Failure) -> None:
    it = bench(2)
    it.fleet.sampled = True
    it.run(it.members[0], *TRIP)
    it.wait(1.0)
    assert it.fleet.probes_due(it.now) == [it.members[0]]
    it.probe(it.members[0], outcome)
    assert it.states() == ["open", "closed"]
    assert it.fleet.statistics(it.now).members[0].level == 2


@pytest.mark.parametrize(
    ("outcomes", "state"),
    [
        ([ERROR, ERROR], "closed"),
        ([TIMEOUT, SUSPECT, ERROR], "open"),
        ([ERROR, ERROR, OK, ERROR, ERROR], "closed"),
        ([ERROR, None, ERROR, None, CANCELLED], "closed"),
        ([REFUSED, REFUSED], "open"),
        ([MISSING], "open"),
    ],
)
def test_health_probes(outcomes: list[Failure], state: str) -> None:
    it = bench(2)
    it.probe(it.members[0], *outcomes)
    assert it.states() == [state, "closed"]


def test_a_ramp_is_one_batch_at_a_time_and_grows_in_rows() -> None:
    it = bench(2)
    first = it.members[0]
    it.run(first, *TRIP)
    it.recover(first)
    start = it.now
    first.slots._set(8.0)
    limits = [it.fleet.row_limit(first, start + second) for second in (0, 1, 2.5, 5, 9.99)]
    assert limits == [3, 3, 8, 16, 31]
    it.begin(first)
    it.begin(it.members[1])
    assert it.fleet.choose(it.now, 1) is None
    it.wait(10)
    assert it.states() == ["closed", "closed"]
    assert it.fleet.row_limit(first, it.now) == 32
    assert it.fleet.choose(it.now, 1) is first


def test_a_ramp_does_not_shrink_batches_that_nobody_else_could_take() -> None:
    it = bench(1)
    it.run(it.members[0], OK)
    it.places[0].available = False
    it.fleet.availability_changed(it.members[0], it.now)
    it.now += 3
    it.places[0].available = True
    it.fleet.availability_changed(it.members[0], it.now)
    assert it.states() == ["ramp"]
    assert it.fleet.row_limit(it.members[0], it.now) == 32


def test_who_is_back_is_chosen_again_although_it_failed() -> None:
    it = Bench(Place("a"), Place("b"), rng=random.Random(4))
    for member in it.members:
        it.run(member, *[OK] * 20)
    it.run(it.members[0], *TRIP)
    it.recover(it.members[0])
    it.wait(10)
    taken = [it.fleet.choose(it.now, 1) for _ in range(200)]
    assert 60 < taken.count(it.members[0]) < 140


# -- availability, orders, what is told ----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "state"), [("oip", "ramp"), ("onnx", "closed")])
def test_who_went_and_came_back(kind: str, state: str) -> None:
    it = Bench(Place("a", kind), Place("b", kind))
    first = it.members[0]
    it.run(first, OK)
    it.places[0].available = False
    assert it.fleet.choose(it.now, 1) is it.members[1], "even before anyone said so"
    it.fleet.availability_changed(first, it.now)
    assert it.states()[0] == "unavailable"
    it.wait(3.0)
    it.places[0].available = True
    it.fleet.availability_changed(first, it.now)
    assert it.states()[0] == state
    assert it.changes == [("a", "closed", "unavailable"), ("a", "unavailable", state)]


def test_orders_are_sticky() -> None:
    it = bench(2)
    it.fleet.force(it.members[0], "closed", it.now)
    it.run(it.members[0], *TRIP, MISSING, REFUSED, REFUSED)
    assert it.fleet.usable(it.members[0], it.now)
    assert it.fleet.statistics(it.now).members[0].cause == "held closed by an operator"
    it.fleet.force(it.members[0], None, it.now)
    it.run(it.members[0], *TRIP)
    assert it.states() == ["open", "closed"]


def test_what_operators_see() -> None:
    it = bench(2)
    it.run(it.members[0], *TRIP)
    it.run(it.members[1], *[OK] * 15)
    seen = it.fleet.statistics(it.now)
    first, second = seen.members
    assert (first.state, first.in_use, first.trips, first.ejections, first.level) == (
        "open", False, 1, {"consecutive": 1}, 1,
    )  # fmt: skip
    assert first.cause == "several attempts in a row failed; the last: 500"
    assert first.until is not None
    assert first.until > it.now
    assert (first.share, second.share) == (0.25, 0.75)
    assert (second.state, second.cause, second.until) == ("closed", "", None)
    assert second.ewma_s == pytest.approx(0.01, rel=0.1)
    assert seen.usable == 1
    assert "r0 open" in repr(it.fleet)


@pytest.mark.parametrize(
    ("kind", "policy", "deadline_s", "seconds"),
    [
        ("oip", FleetPolicy(), 3.0, 3.0),
        ("oip", FleetPolicy(), inf, 120.0),
        ("oip", FleetPolicy(), -1.0, 0.05),
        ("oip", FleetPolicy(attempt_timeout_s=2.0), 30.0, 2.0),
        ("oip", FleetPolicy(attempt_timeout_s=2.0), 1.0, 1.0),
        ("onnx", FleetPolicy(), 1.0, 5.0),
        ("onnx", FleetPolicy(), 30.0, 30.0),
        ("onnx", FleetPolicy(attempt_timeout_s=2.0), 1.0, 2.0),
    ],
)
def test_attempt_timeouts_before_anything_is_known(
    kind: str, policy: FleetPolicy, deadline_s: float, seconds: float
) -> None:
    it = Bench(Place("a", kind), policy=policy)
    assert it.fleet.attempt_timeout_s(it.members[0], 4, it.now, it.now + deadline_s) == pytest.approx(seconds)


def test_attempt_timeouts_are_learned() -> None:
    it = bench(2)
    it.run(it.members[0], *[OK] * 300, took_s=0.1)
    assert 0.1 < it.fleet.attempt_timeout_s(it.members[0], 1, it.now, inf) < 0.3


def test_who_has_no_peer_to_give_the_work_to_is_waited_for() -> None:
    """A pause of the only backend is no reason to use up its callers' attempts there."""
    it = bench(1)
    (member,) = it.members
    it.run(member, *[OK] * 300, took_s=0.1)
    assert it.fleet.attempt_timeout_s(member, 1, it.now, inf) == 5.0
    assert it.fleet.attempt_timeout_s(member, 1, it.now, it.now + 8.0) == pytest.approx(2.0)
    assert 0.1 < it.fleet.attempt_timeout_s(member, 1, it.now, it.now + 0.2) <= 0.2


def test_slots_are_learned_from_what_the_backend_computes() -> None:
    it = bench(1)
    (member,) = it.members
    for _ in range(40):
        it.fleet.began(member, 8, it.now)
        it.now += 0.02
        it.fleet.succeeded(member, 8, 0.02, 0.005, it.now)
    assert it.fleet.statistics(it.now).members[0].slots > 1
    assert member.breaker.state is State.CLOSED
