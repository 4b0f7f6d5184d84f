"""A remote replica that lets an attempt time out in silence is asked (cause `silent`): what asks it, what answers, and
what else may happen to it meanwhile."""

from __future__ import annotations

from math import inf

import pytest

from gateway.core.breaker import BREAKER, Cause, State
from gateway.core.outcome import Failure, FailureKind, Sign
from tests.core.fleet_bench import (
    BUSY,
    CANCELLED,
    ERROR,
    MISSING,
    OK,
    REFUSED,
    RESET,
    STALE_CONNECTION,
    SUSPECT,
    TIMEOUT,
    WRONG,
    Bench,
    Place,
    bench,
)

LATE_ANSWER = Failure(FailureKind.TIMEOUT, "DEADLINE_EXCEEDED", Sign.ANSWERED)


def silent_bench(count: int = 2) -> Bench:
    """Somebody probes with a sample, and the first member has just kept a caller waiting in vain."""
    it = bench(count)
    it.fleet.sampled = True
    it.run(it.members[0], OK)
    it.run(it.members[0], TIMEOUT, took_s=0.1)
    return it


def test_who_is_silent_is_asked_before_it_gets_more() -> None:
    it = silent_bench()
    first, second = it.members
    assert it.states() == ["open", "closed"]
    assert not it.fleet.usable(first, it.now)
    it.wait(0.02)
    assert it.fleet.choose(it.now, 1) is second
    assert it.fleet.probes_due(it.now) == [first]
    it.probe(first, OK)
    assert it.states() == ["closed", "closed"], "one answer is enough, and there is no ramp"
    seen = it.fleet.statistics(it.now).members[0]
    assert (seen.level, seen.ejections) == (0, {"silent": 1})
    assert it.fleet.choose(it.now, 1) is second, "its failure is not forgotten"


def slow_bench() -> Bench:
    """Three of which two are known to take 10 ms; the first was silent and is about to be asked."""
    it = bench(3)
    it.fleet.sampled = True
    for member in it.members:
        it.run(member, *[OK] * 10)
    it.run(it.members[0], TIMEOUT, took_s=0.1)
    it.wait(0.02)
    assert it.fleet.probes_due(it.now) == it.members[:1]
    return it


def test_who_answers_much_later_than_its_peers_is_asked_once_more() -> None:
    it = slow_bench()
    first = it.members[0]
    it.probe(first, OK, took_s=0.3)
    assert it.states()[0] == "half_open", "it may only just have woken up"
    assert it.fleet.probes_due(it.now) == [first]
    it.probe(first, OK, took_s=0.01)
    assert it.states()[0] == "closed"
    assert it.fleet.statistics(it.now).members[0].level == 0


def test_who_answers_late_twice_is_slow() -> None:
    it = slow_bench()
    first = it.members[0]
    for _ in range(2):
        it.probe(first, OK, took_s=0.1)
        it.fleet.probes_due(it.now)
    seen = it.fleet.statistics(it.now).members[0]
    assert (it.states()[0], seen.level, seen.ejections) == ("open", 1, {"silent": 1, "slow": 1})
    assert not it.fleet.usable(first, it.now)


def test_a_batch_that_came_back_much_later_than_from_its_peers_ends_no_doubt() -> None:
    it = bench(3)
    it.fleet.sampled = True
    for member in it.members:
        it.run(member, *[OK] * 10)
    first = it.members[0]
    late = it.begin(first)
    it.now += 0.05
    it.run(first, TIMEOUT, took_s=0.1)
    assert it.states()[0] == "open"
    it.end(first, late, OK)
    assert it.states()[0] == "open"
    it.wait(0.02)
    assert it.fleet.probes_due(it.now) == [first]
    it.probe(first, OK)
    assert it.states()[0] == "closed"


def test_who_is_silent_when_asked_is_out_as_after_any_trip() -> None:
    it = silent_bench()
    it.wait(0.02)
    assert it.fleet.probes_due(it.now) == it.members[:1]
    it.probe(it.members[0], TIMEOUT, took_s=1.0)
    seen = it.fleet.statistics(it.now).members[0]
    assert (seen.level, seen.ejections) == (1, {"silent": 1, "trial": 1})
    it.wait(0.9)
    assert it.states() == ["open", "closed"]
    it.wait(0.2)
    for _ in range(3):
        assert it.fleet.probes_due(it.now) == it.members[:1]
        it.probe(it.members[0], OK)
    assert it.states() == ["ramp", "closed"]


def test_a_late_answer_ends_the_doubt() -> None:
    it = bench(2)
    it.fleet.sampled = True
    first = it.members[0]
    late = it.begin(first)
    it.now += 0.01
    it.run(first, TIMEOUT, took_s=0.1)
    assert it.states() == ["open", "closed"]
    it.end(first, late, OK)
    assert it.states() == ["closed", "closed"]


def test_who_answers_nothing_but_probes_trips_all_the_same() -> None:
    it = silent_bench()
    first = it.members[0]
    for _ in range(3):
        it.wait(0.02)
        assert it.fleet.probes_due(it.now) == [first]
        it.probe(first, OK)
        it.run(first, TIMEOUT, took_s=0.1)
    it.wait(0.02)
    assert it.fleet.probes_due(it.now) == [first]
    it.probe(first, OK)
    it.run(first, TIMEOUT, took_s=0.1)
    assert it.fleet.statistics(it.now).members[0].ejections == {"silent": 4, "consecutive": 1}
    assert it.fleet.statistics(it.now).members[0].level == 1


def test_a_silence_of_all_ejects_at_most_half() -> None:
    it = bench(3)
    it.fleet.sampled = True
    for member in it.members:
        it.run(member, TIMEOUT, took_s=0.1)
    assert it.fleet.panic
    assert all(it.fleet.usable(member, it.now) for member in it.members)


def test_a_worker_that_was_silent_is_replaced_and_not_asked() -> None:
    it = Bench(Place("onnx-0", "onnx"), Place("onnx-1", "onnx"))
    it.fleet.sampled = True
    it.run(it.members[0], TIMEOUT, took_s=0.1)
    assert it.states() == ["closed", "closed"]


def asked_bench(count: int = 2) -> Bench:
    """... and now is the moment to ask it."""
    it = silent_bench(count)
    it.wait(BREAKER.ask_s)
    assert it.states()[0] == "half_open"
    return it


def ejections(it: Bench, place: int = 0) -> dict[str, int]:
    return dict(it.fleet.statistics(it.now).members[place].ejections)


def silent_again(it: Bench, took_s: float = 0.1) -> None:
    it.run(it.members[0], TIMEOUT, took_s=took_s)


# -- what is an answer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [BUSY, WRONG])
def test_a_refusal_of_the_probe_is_an_answer(answer: Failure) -> None:
    """An overloaded server is left alone as long as it wants, and one wrong answer is one: nothing of that ejects."""
    it = asked_bench()
    first = it.members[0]
    assert it.fleet.probes_due(it.now) == [first]
    it.probe(first, answer)
    assert it.states() == ["closed", "closed"]
    assert ejections(it) == {"silent": 1}
    assert it.fleet.usable(first, it.now) == (answer is WRONG)
    assert first.breaker.window.failed == 2


@pytest.mark.parametrize(
    ("failure", "cause"),
    [(ERROR, "trial"), (RESET, "trial"), (SUSPECT, "trial"), (REFUSED, "connect"), (MISSING, "missing")],
)
def test_a_probe_that_fails_is_an_answer_too_and_ejects(failure: Failure, cause: str) -> None:
    it = asked_bench()
    it.fleet.probes_due(it.now)
    it.probe(it.members[0], failure)
    assert it.states() == ["open", "closed"]
    assert ejections(it) == {"silent": 1, cause: 1}
    assert it.members[0].breaker.level == 1


@pytest.mark.parametrize("outcome", [None, STALE_CONNECTION, CANCELLED])
def test_a_probe_that_says_nothing_is_made_again(outcome: Failure | None) -> None:
    it = asked_bench()
    first = it.members[0]
    for _ in range(3):
        assert it.fleet.probes_due(it.now) == [first]
        it.probe(first, outcome)
        assert it.fleet.probes_due(it.now) == [], "not at once"
        it.wait(BREAKER.probe_again_s)
    assert it.states() == ["half_open", "closed"]
    it.fleet.probes_due(it.now)
    it.probe(first, OK)
    assert it.states() == ["closed", "closed"]


@pytest.mark.parametrize("answer", [OK, ERROR, SUSPECT, BUSY, WRONG])
@pytest.mark.parametrize("wait_s", [0.0, 0.03])
def test_any_answer_to_a_batch_that_was_under_way_ends_the_doubt(answer: Failure, wait_s: float) -> None:
    it = bench(2)
    it.fleet.sampled = True
    first = it.members[0]
    late = it.begin(first)
    it.now += 0.01
    silent_again(it)
    assert it.states() == ["open", "closed"]
    it.wait(wait_s)
    it.end(first, late, answer)
    assert it.states() == ["closed", "closed"]
    assert ejections(it) == {"silent": 1}


@pytest.mark.parametrize("outcome", [TIMEOUT, LATE_ANSWER, RESET, CANCELLED, STALE_CONNECTION])
@pytest.mark.parametrize("wait_s", [0.0, 0.03])
def test_more_silence_is_no_answer(outcome: Failure, wait_s: float) -> None:
    """Of eight batches that were under way the first to time out asks; the others change nothing."""
    it = bench(2)
    it.fleet.sampled = True
    first = it.members[0]
    under_way = [it.begin(first) for _ in range(7)]
    silent_again(it)
    it.wait(wait_s)
    before = it.states()
    assert before[0] in ("open", "half_open")
    for began in under_way:
        it.end(first, began, outcome)
    assert it.states() == before
    assert ejections(it) == {"silent": 1}


def test_a_batch_answered_late_breaks_the_row_of_failures() -> None:
    it = bench(2)
    it.fleet.sampled = True
    first = it.members[0]
    for _ in range(8):
        late = it.begin(first)
        it.now += 0.01
        silent_again(it)
        it.end(first, late, OK)
    assert it.states() == ["closed", "closed"]
    assert ejections(it) == {"silent": 8}
    assert (first.breaker.window.failed, first.breaker.window.total) == (8, 16)


def test_an_answer_late_or_not_is_no_reason_to_forget_how_slow_it_is() -> None:
    it = bench(2)
    it.fleet.sampled = True
    first = it.members[0]
    it.run(first, *[OK] * 5)
    late = it.begin(first)
    it.now += 0.01
    silent_again(it)
    it.end(first, late, OK)
    assert it.states() == ["closed", "closed"]
    assert first.time.load(it.now) > 10.0


# -- what is not forgotten -----------------------------------------------------------------------------------------


def closed_again(it: Bench) -> None:
    silent_again(it)
    it.wait(BREAKER.ask_s)
    assert it.fleet.probes_due(it.now) == it.members[:1]
    it.probe(it.members[0], OK)
    assert it.states()[0] == "closed"


def test_the_share_of_failures_outlives_the_question() -> None:
    it = bench(2)
    it.fleet.sampled = True
    first = it.members[0]
    for _ in range(9):
        it.run(first, OK)
        closed_again(it)
    it.run(first, OK, ERROR)
    assert ejections(it) == {"silent": 9, "ratio": 1}


def test_questions_do_not_hold_up_that_its_trips_are_forgotten() -> None:
    it = bench(2)
    first = it.members[0]
    it.run(first, *[ERROR] * 5)
    it.recover(first)
    it.wait(10.0)
    assert it.states() == ["closed", "closed"]
    it.fleet.sampled = True
    assert first.breaker.level_at(it.now) == 1
    for _ in range(4):
        it.wait(14.0)
        it.run(first, OK)
        closed_again(it)
    it.wait(10.0)
    assert first.breaker.level_at(it.now) == 0
    silent_again(it)
    it.wait(BREAKER.ask_s)
    it.fleet.probes_due(it.now)
    it.probe(first, TIMEOUT, took_s=1.0)
    assert (it.states()[0], first.breaker.level) == ("open", 1)


def test_who_is_asked_serves_on_as_far_as_coming_and_going_is_concerned() -> None:
    """Level 1, served for a minute, asked, and then gone: that is one that settled, and it is back after its second."""
    it = bench(2)
    first = it.members[0]
    it.run(first, *[ERROR] * 5)
    it.recover(first)
    it.wait(30.0)
    it.fleet.sampled = True
    closed_again(it)
    it.now += 1.0
    assert isinstance(first.replica, Place)
    first.replica.available = False
    it.fleet.availability_changed(first, it.now)
    assert first.breaker.level == 1


# -- what else may happen meanwhile --------------------------------------------------------------------------------


@pytest.mark.parametrize("wait_s", [0.0, 0.03])
def test_who_goes_away_while_it_is_asked_has_gone_away(wait_s: float) -> None:
    """It is not taken back at once on a ramp because it was silent first: one that comes and goes waits."""
    it = silent_bench()
    first = it.members[0]
    it.wait(wait_s)
    assert isinstance(first.replica, Place)
    first.replica.available = False
    it.fleet.availability_changed(first, it.now)
    assert it.states() == ["unavailable", "closed"]
    assert ejections(it) == {"silent": 1, "lost": 1}
    it.wait(0.1)
    first.replica.available = True
    it.fleet.availability_changed(first, it.now)
    assert it.states() == ["open", "closed"], "its second is not over"
    it.wait(1.2)
    assert it.states() == ["half_open", "closed"]
    it.probe(first, OK)
    assert it.states() == ["half_open", "closed"], "one answer is not enough any more"


def test_who_was_drained_while_it_was_asked_comes_back_with_a_clean_sheet() -> None:
    it = asked_bench()
    first = it.members[0]
    it.fleet.probes_due(it.now)
    it.fleet.force(first, "open", it.now)
    it.probe(first, OK)
    assert it.states() == ["drained", "closed"], "an answer does not lift an operator's order"
    it.fleet.force(first, None, it.now)
    assert it.states() == ["ramp", "closed"]
    assert (first.breaker.cause, first.breaker.window.total) == (Cause.NONE, 0)


def test_who_is_pinned_is_not_asked_and_stays_pinned_if_it_was() -> None:
    it = bench(2)
    it.fleet.sampled = True
    first = it.members[0]
    it.fleet.force(first, "closed", it.now)
    silent_again(it)
    assert first.breaker.state is State.PINNED
    it.fleet.force(first, None, it.now)
    silent_again(it)
    it.fleet.force(first, "closed", it.now)
    it.probe(first, TIMEOUT, took_s=1.0)
    assert first.breaker.state is State.PINNED


def test_silence_on_the_ramp_is_a_failed_trial() -> None:
    it = bench(2)
    first = it.members[0]
    it.run(first, *[ERROR] * 5)
    it.recover(first)
    it.fleet.sampled = True
    assert it.states() == ["ramp", "closed"]
    silent_again(it)
    assert ejections(it) == {"consecutive": 1, "trial": 1}


def test_who_was_told_to_be_left_alone_gets_nothing_that_one_would_have_to_ask_for() -> None:
    """A question would count as a trip towards panic, for as long as it is left alone."""
    it = bench(3)
    it.fleet.sampled = True
    for member in it.members[:2]:
        late = it.begin(member)
        it.now += 0.01
        it.run(member, Failure(FailureKind.OVERLOAD, "503", retry_after_s=30.0))
        it.end(member, late, TIMEOUT)
    assert it.states() == ["closed"] * 3
    assert not it.fleet.panic


def test_who_leaves_while_it_is_asked_is_gone() -> None:
    it = asked_bench()
    first, second = it.members
    assert it.fleet.probes_due(it.now) == [first]
    it.fleet.leave(first)
    it.probe(first, TIMEOUT, took_s=1.0)
    assert it.fleet.members == [second]
    assert not it.fleet.panic
    assert it.fleet.choose(it.now, 1) is second
    assert it.fleet.next_wake(it.now) is None


def test_callers_ask_where_the_sample_was_taken_away_meanwhile() -> None:
    it = asked_bench()
    first = it.members[0]
    it.fleet.sampled = False
    assert it.fleet.choose(it.now, 8) is first
    assert it.fleet.row_limit(first, it.now) == 4
    began = it.begin(first)
    assert it.fleet.choose(it.now, 8) is it.members[1], "one at a time"
    it.now += 0.1
    it.end(first, began, TIMEOUT)
    assert ejections(it) == {"silent": 1, "trial": 1}


@pytest.mark.parametrize(
    ("count", "silent", "panic"),
    [(1, 1, True), (2, 1, False), (2, 2, True), (3, 1, False), (3, 2, True), (9, 4, False), (9, 5, True)],
)
def test_a_pause_of_all_of_them_ejects_nobody(count: int, silent: int, panic: bool) -> None:
    """They are asked, used meanwhile if they are too many, and all in full use once they answer, however many batches
    timed out before."""
    it = bench(count)
    it.fleet.sampled = True
    for member in it.members:
        it.run(member, OK)
    slow = it.members[:silent]
    began = {member: it.begin(member) for member in slow}
    it.now += 0.1
    for member in slow:
        it.end(member, began[member], TIMEOUT)
    assert it.fleet.panic is panic
    assert sum(it.fleet.usable(member, it.now) for member in it.members) >= (count + 1) // 2
    it.wait(0.03)
    probes = dict.fromkeys(it.fleet.probes_due(it.now), it.now)
    assert [*probes] == slow
    for _ in range(3 if panic else 0):  # callers' batches go there, too, and hang with the probes
        for member in slow:
            began[member] = it.begin(member)
        it.now += 0.1
        for member in slow:
            it.end(member, began[member], TIMEOUT)
    assert it.states()[:silent] == ["half_open"] * silent
    for member, since in probes.items():
        it.fleet.probed(member, OK, it.now - since, it.now)
    for member in it.fleet.probes_due(it.now):  # that took long, so they are asked once more
        it.fleet.probed(member, OK, 0.01, it.now)
    assert it.states() == ["closed"] * count
    assert not it.fleet.panic
    assert all(breaker.level_at(it.now) == 0 for breaker in (member.breaker for member in it.members))


def test_a_batch_that_hangs_beside_the_question_is_no_verdict_but_other_failures_are() -> None:
    it = bench(1)
    it.fleet.sampled = True
    silent_again(it)
    it.wait(0.03)
    silent_again(it)
    assert it.states() == ["half_open"]
    it.run(it.members[0], RESET)
    assert ejections(it) == {"silent": 1, "trial": 1}


def test_of_a_tripped_one_silence_is_a_verdict() -> None:
    it = bench(1)
    it.run(it.members[0], *[RESET] * 5)
    it.fleet.sampled = True
    it.wait(it.members[0].breaker.until - it.now)
    assert it.states() == ["half_open"]
    silent_again(it)
    assert ejections(it) == {"consecutive": 1, "trial": 1}


def test_who_has_only_peers_that_are_silent_is_waited_for() -> None:
    it = bench(3)
    it.fleet.sampled = True
    first, second, third = it.members
    for member in it.members:
        it.run(member, *[OK] * 250)
    usual_s = it.fleet.attempt_timeout_s(third, 1, it.now, it.now + 8.0)
    assert usual_s == pytest.approx(0.05)
    began = [(member, it.begin(member)) for member in it.members]
    it.now += 0.1
    for member, since in began[:2]:
        it.end(member, since, TIMEOUT)
    assert it.fleet.panic
    assert it.fleet.attempt_timeout_s(third, 1, it.now, it.now + 8.0) == pytest.approx(2.0)
    assert it.fleet.attempt_timeout_s(first, 1, it.now, it.now + 8.0) <= 2 * usual_s, "it has the third"
    it.end(*began[2], TIMEOUT)
    assert it.fleet.attempt_timeout_s(first, 1, it.now, it.now + 80.0) == pytest.approx(5.0)
    it.wait(0.03)
    it.fleet.probes_due(it.now)
    for member in (second, third):
        it.probe(member, TIMEOUT, took_s=1.0)
    assert it.states() == ["half_open", "open", "open"]
    assert it.fleet.attempt_timeout_s(first, 1, it.now, it.now + 80.0) < 1.0, "no longer than for the question"
    for member in (second, third):
        it.fleet.force(member, "open", it.now)
    assert it.fleet.attempt_timeout_s(first, 1, it.now, it.now + 80.0) == pytest.approx(5.0), (
        "drained ones are no peers"
    )


def test_a_question_is_asked_in_time_and_once() -> None:
    it = silent_bench()
    first = it.members[0]
    assert it.fleet.next_wake(it.now) == pytest.approx(it.now + BREAKER.ask_s)
    assert it.fleet.probes_due(it.now) == []
    it.wait(BREAKER.ask_s)
    assert it.fleet.probes_due(it.now) == [first]
    assert it.fleet.probes_due(it.now) == []
    assert (it.fleet.next_wake(it.now) or inf) > it.now


@pytest.mark.parametrize("slots", [2, 8])
def test_of_many_batches_under_way_the_first_to_time_out_asks(slots: int) -> None:
    """They were sent one after the other, each as soon as an earlier one was answered: the first was not sent into
    silence. Five of them must not be five failures in a row."""
    it = bench(2, slots=slots)
    it.fleet.sampled = True
    first = it.members[0]
    under_way = []
    for _ in range(slots):
        under_way.append(it.begin(first))
        it.run(first, OK, took_s=0.06 / slots)
    for began in under_way:
        it.now = began + 0.1
        it.fleet.next_wake(it.now)
        it.end(first, began, TIMEOUT)
    assert ejections(it) == {"silent": 1}
    assert it.fleet.probes_due(it.now) in ([], [first])
    it.fleet.probed(first, OK, 0.0, it.now)
    assert it.states() == ["closed", "closed"]


def test_a_ping_like_success_of_before_the_silence_is_not_taken_for_one_after_it() -> None:
    """Something came from there while the attempt was under way: that is late, not silent."""
    it = bench(2)
    it.fleet.sampled = True
    first = it.members[0]
    began = it.begin(first)
    it.now += 0.07
    it.probe(first, OK)
    it.now += 0.02
    it.end(first, began, TIMEOUT)
    assert it.states() == ["closed", "closed"]
    assert ejections(it) == {}
