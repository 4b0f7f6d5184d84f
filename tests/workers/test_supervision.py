"""Decisions about dying workers, with time and chance as arguments."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.workers.supervision import (
    FAIL_CRASHES,
    MAX_DELAY_S,
    TRANSITIONS,
    Backoff,
    Blame,
    Death,
    Sentence,
    Verdict,
    WorkerEvent,
    WorkerState,
    describe_exit,
    is_crash,
    next_state,
)


class Highest(random.Random):
    """Chance at its worst: the upper end of every interval."""

    def uniform(self, a: float, b: float) -> float:
        return b


def test_every_state_but_the_last_can_be_left_and_stopped() -> None:
    for state in WorkerState:
        leaving = {event for (from_state, event) in TRANSITIONS if from_state is state}
        assert (WorkerEvent.STOP in leaving) is (state is not WorkerState.STOPPED)


def test_a_transition_not_listed_raises() -> None:
    with pytest.raises(KeyError):
        next_state(WorkerState.STOPPED, WorkerEvent.UP)


def test_the_first_restart_is_immediate_and_the_next_ones_wait_longer_and_longer() -> None:
    backoff = Backoff()
    delays = [backoff.died(0.0, Highest()) for _ in range(10)]
    assert delays == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, MAX_DELAY_S, MAX_DELAY_S, MAX_DELAY_S]


def test_a_healthy_minute_forgets_earlier_deaths() -> None:
    backoff = Backoff()
    for _ in range(5):
        backoff.died(0.0, Highest())
    backoff.up(100.0)
    assert backoff.died(159.9, Highest()) > 0
    backoff.up(200.0)
    assert backoff.died(260.0, Highest()) == 0.0


def test_a_serving_worker_that_somebody_killed_is_started_again_at_once_however_often() -> None:
    backoff = Backoff()
    for second in range(20):
        backoff.up(float(second))
        assert backoff.died(second + 0.5, Highest(), Death.OUTSIDE) == 0.0
    # ... and kills do not hide crashes, nor a worker that is killed before it ever serves.
    backoff.up(30.0)
    assert backoff.died(30.1, Highest(), Death.CRASH) == 0.0
    assert backoff.died(30.2, Highest(), Death.OUTSIDE) > 0.0


def test_a_worker_that_its_input_killed_is_started_again_within_half_a_second_however_often() -> None:
    backoff = Backoff()

    def killed(death: Death) -> float:
        backoff.up(0.0)
        return backoff.died(0.0, Highest(), death)

    assert [killed(Death.INPUT) for _ in range(6)] == [0.0, 0.5, 0.5, 0.5, 0.5, 0.5]
    # ... and does not make the delay of a crash that is not the input's doing longer than one death would.
    assert [killed(Death.CRASH) for _ in range(3)] == [1.0, 2.0, 4.0]
    assert [killed(Death.INPUT), killed(Death.CRASH)] == [0.5, 1.0]


def test_a_worker_that_never_served_was_not_killed_by_input() -> None:
    """Its model answers in another process, and crashes this one while it loads: that must not go on twice a second."""
    backoff = Backoff()
    delays = [backoff.died(0.0, Highest(), Death.INPUT) for _ in range(9)]
    assert delays == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


@given(st.integers(0, 2**32), st.integers(1, 2000))
def test_jitter_is_full_and_bounded(seed: int, deaths: int) -> None:
    backoff, rng = Backoff(), random.Random(seed)
    assert all(0.0 <= backoff.died(0.0, rng) <= MAX_DELAY_S for _ in range(deaths))


def test_a_death_with_nothing_running_blames_nobody() -> None:
    blame: Blame[str] = Blame()
    assert all(blame.crash(float(n), []) == [] for n in range(100))


def test_suspects_of_two_crashes_are_isolated_once() -> None:
    blame: Blame[str] = Blame()
    assert blame.crash(0.0, ["a", "b"]) == []
    assert blame.crash(1.0, ["b", "c"]) == [Verdict("b", Sentence.ISOLATE, 2)]
    assert blame.crash(2.0, ["b", "c"]) == [Verdict("c", Sentence.ISOLATE, 2)]


def test_crashes_in_company_never_fail_a_model() -> None:
    blame: Blame[str] = Blame()
    verdicts = [verdict for n in range(50) for verdict in blame.crash(n * 0.1, ["a", "b"])]
    assert {verdict.sentence for verdict in verdicts} == {Sentence.ISOLATE}


def test_more_than_five_crashes_alone_within_a_minute_fail_the_model() -> None:
    blame: Blame[str] = Blame()
    blame.isolated("a")
    assert all(blame.crash(float(n), ["a"]) == [] for n in range(FAIL_CRASHES))
    assert blame.crash(59.0, ["a"]) == [Verdict("a", Sentence.FAIL, FAIL_CRASHES + 1)]


def test_the_same_crashes_spread_over_more_than_a_minute_do_not() -> None:
    blame: Blame[str] = Blame()
    blame.isolated("a")
    assert all(blame.crash(12.1 * n, ["a"]) == [] for n in range(50))


def test_one_model_repeated_is_still_alone() -> None:
    blame: Blame[str] = Blame()
    blame.isolated("a")
    verdicts = [blame.crash(float(n), ["a", "a"]) for n in range(FAIL_CRASHES + 1)]
    assert verdicts[-1] == [Verdict("a", Sentence.FAIL, FAIL_CRASHES + 1)]


def test_on_probation_the_first_crash_fails_it_again() -> None:
    blame: Blame[str] = Blame()
    blame.isolated("a")
    blame.on_probation("a", 100.0)
    assert blame.crash(159.0, ["a"]) == [Verdict("a", Sentence.FAIL, 1)]
    assert blame.crash(161.0, ["a"]) == []


def test_a_model_that_answers_between_its_crashes_never_fails() -> None:
    blame: Blame[str] = Blame()
    blame.isolated("a")
    assert all(blame.crash(n * 0.1, ["a"], {"a"}) == [] for n in range(600))
    # Another model's answers are no excuse, and without answers the count starts at the last one.
    verdicts = [blame.crash(61.0 + n, ["a"], {"b"}) for n in range(FAIL_CRASHES)]
    assert verdicts == [*[[]] * (FAIL_CRASHES - 1), [Verdict("a", Sentence.FAIL, FAIL_CRASHES + 1)]]


def test_a_model_on_probation_that_answers_has_passed_it() -> None:
    blame: Blame[str] = Blame()
    blame.isolated("a")
    blame.on_probation("a", 100.0)
    assert blame.crash(101.0, ["a"], {"a"}) == []
    assert blame.crash(102.0, ["a"]) == []


def test_a_forgotten_model_starts_clean() -> None:
    blame: Blame[str] = Blame()
    blame.crash(0.0, ["a"])
    blame.forget("a")
    assert blame.crash(1.0, ["a"]) == []


@pytest.mark.parametrize(
    ("exit_code", "killed_by_us", "out_of_memory", "expected"),
    [
        (-11, False, False, True),
        (-6, False, False, True),
        (70, False, False, True),
        (-9, False, False, False),
        (-9, True, False, True),
        (-9, False, True, True),
        (0, False, False, False),
    ],
)
def test_what_counts_as_a_crash(exit_code: int, killed_by_us: bool, out_of_memory: bool, expected: bool) -> None:
    assert is_crash(exit_code, killed_by_us=killed_by_us, out_of_memory=out_of_memory) is expected


def test_exits_in_words() -> None:
    assert describe_exit(-11) == "signal SIGSEGV"
    assert describe_exit(70) == "exit code 70"
    assert describe_exit(-200) == "signal 200"
