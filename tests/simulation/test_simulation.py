"""Seeded histories of the data path; what the simulation itself promises; the negative controls."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from tests.simulation.campaign import campaign, reduced, sweep
from tests.simulation.controls import CONTROLS
from tests.simulation.histories import THEMES, history
from tests.simulation.loop import BusyLoop, SimulatedLoop
from tests.simulation.play import play, play_history

REPOSITORY = Path(__file__).parent.parent.parent
MANY = 100_000
FEW = 400
HAPPENS = (
    "answered", "told DeadlineExceeded", "told ModelError", "told PoisonRequest", "told BackendError",
    "told NoBackend", "told Overloaded", "told Cancelled", "trips", "not_sent/connect", "not_sent/missing",
    "overload/answered", "broken/none", "broken/exit", "broken/bystander", "broken/answered", "suspect/answered",
    "timeout/none", "cancelled/none", "from the lane retry", "from the lane quarantine", "from the lane isolated",
    "from the lane sequence",
)  # fmt: skip
"""What a campaign has to have seen, or it would prove nothing about it."""


def test_the_invariants_hold_in_a_few_hundred_histories() -> None:
    done = sweep(range(FEW))
    assert done.failures == []
    assert done.histories == FEW


def test_two_processes_play_what_one_does() -> None:
    alone, shared = campaign(7, 31), campaign(7, 31, processes=2)
    assert shared.failures == alone.failures == []
    assert shared.tally == alone.tally
    assert shared.histories == 31
    assert shared.cpu_seconds > 0


@pytest.mark.slow
def test_the_invariants_hold_in_a_hundred_thousand_histories() -> None:
    done = campaign(1_000_000, MANY, processes=min(2, os.cpu_count() or 1))
    print(done.figures())  # noqa: T201  # shown with -s, and where the test fails
    assert done.failures == []
    assert done.histories == MANY
    assert [what for what in (*HAPPENS, *(theme.__name__ for _, theme in THEMES)) if not done.tally[what]] == []


@pytest.mark.parametrize("name", sorted(CONTROLS))
def test_a_broken_gateway_is_noticed(name: str) -> None:
    control = CONTROLS[name]
    assert control.noticed() is not None, f"{control.what}, and nobody noticed in {control.histories} histories"


def test_every_invariant_has_a_control() -> None:
    assert {"I1", "I2", "I3", "I4", "I5", "I6"} <= {control.invariant for control in CONTROLS.values()}


def test_a_seed_says_what_happens_to_the_last_callback() -> None:
    for seed in range(30):
        one, other = play(seed, verbose=True), play(seed, verbose=True)
        assert one.trace == other.trace
        assert one.trace


def test_a_seed_says_the_same_in_another_process() -> None:
    """Whatever depends on addresses or on the seed of hashes would differ."""
    script = (
        "import hashlib\nfrom tests.simulation.play import play\n"
        "print(hashlib.sha256(repr([play(seed, True).trace for seed in range(60)]).encode()).hexdigest())"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}, cwd=REPOSITORY, check=True,
            capture_output=True, text=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(said) == 1


def test_a_failing_history_is_reduced_to_what_it_needs() -> None:
    control = CONTROLS["answers_mixed_up"]
    seed = control.noticed()
    assert seed is not None
    with control.applied():
        shorter = reduced(history(seed))
        assert "I2" in play_history(shorter).broken
    assert len(shorter.arrivals) * 2 < len(history(seed).arrivals)
    assert play_history(shorter).violations == []


def test_a_campaign_prints_the_seed_of_what_failed_and_the_seed_replays_it() -> None:
    command = [sys.executable, "-m", "tests.simulation", "--control", "answers_mixed_up"]
    said = subprocess.run(
        [*command, "--histories", "200", "--keep-going", "1"], cwd=REPOSITORY, capture_output=True, check=False
    )
    assert said.returncode == 1
    last = said.stdout.decode().splitlines()[-1]
    assert last.startswith("seed ")
    assert "I2 at" in last
    seed = last.split()[1]
    again = subprocess.run([*command, "--seed", seed, "-v"], cwd=REPOSITORY, capture_output=True, check=False)
    assert again.returncode == 1
    assert "VIOLATION I2" in again.stdout.decode()


# -- the loop --------------------------------------------------------------------------------------------------------


def test_timers_fire_in_the_order_of_time_and_never_early() -> None:
    loop = SimulatedLoop(Random(1), late_s=0.001)
    fired: list[tuple[float, float]] = []
    instants = [loop.now + Random(2).random() for _ in range(200)]
    for instant in instants:
        loop.call_at(instant, lambda instant: fired.append((instant, loop.now)), instant)
    loop.run(loop.now + 2.0)
    assert len(fired) == 200
    assert all(0.0 <= now - instant <= 0.0011 for instant, now in fired)
    assert loop.timers == 0


def test_timers_of_one_instant_fire_in_an_order_that_the_seed_says() -> None:
    def order(seed: int) -> list[int]:
        loop = SimulatedLoop(Random(seed))
        fired: list[int] = []
        for number in range(8):
            loop.call_later(0.5, fired.append, number)
        loop.run(loop.now + 1.0)
        return fired

    assert order(3) == order(3)
    assert len({tuple(order(seed)) for seed in range(10)}) > 1


def test_what_was_cancelled_is_not_called() -> None:
    loop = SimulatedLoop(Random(1))
    fired: list[str] = []
    loop.call_later(0.1, fired.append, "later").cancel()
    loop.call_soon(fired.append, "soon").cancel()
    loop.call_later(0.2, fired.append, "kept")
    loop.run(loop.now + 1.0)
    assert fired == ["kept"]
    assert loop.timers == 0


def test_an_event_of_asyncio_wakes_a_task() -> None:
    loop = SimulatedLoop(Random(1))
    woken: list[float] = []

    async def waits(event: asyncio.Event) -> None:
        await event.wait()
        woken.append(asyncio.get_running_loop().time())

    async def begins() -> None:
        event = asyncio.Event()
        asyncio.get_running_loop().call_later(0.25, event.set)
        await waits(event)

    task = loop.create_task(begins())
    loop.run(loop.now + 1.0)
    assert task.done()
    assert woken == [1000.25]


def test_a_busy_loop_is_reported() -> None:
    loop = SimulatedLoop(Random(1))

    def again() -> None:
        loop.call_soon(again)

    loop.call_soon(again)
    with pytest.raises(BusyLoop):
        loop.run(loop.now + 1.0)


def test_an_exception_in_a_callback_is_kept() -> None:
    loop = SimulatedLoop(Random(1))
    loop.call_soon(lambda: 1 // 0)
    loop.run(loop.now + 1.0)
    assert len(loop.mishaps) == 1
    assert "ZeroDivisionError" in loop.mishaps[0]
