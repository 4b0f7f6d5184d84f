"""Credit for work that nobody waits for."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from gateway.traffic_leisure import BURST_S, HIDDEN, LEAST, MOST, SCHEDULE, WINDOW_S, Leisure, occupied_s


class Loop:
    def __init__(self) -> None:
        self.now = 100.0
        self.occupied_s = 5.0
        self.leisure = Leisure(lambda: self.now, lambda: self.occupied_s)

    def live(self, seconds: float, occupied: float) -> None:
        """`occupied`: share of the time."""
        self.now += seconds
        self.occupied_s += seconds * occupied

    def work(self) -> float:
        """Seconds of work until there is no time left."""
        done = 0.0
        while self.leisure.left():
            begun = self.now
            self.now += 1e-5  # the clock passes, and the loop is occupied meanwhile
            self.occupied_s += 1e-5
            self.leisure.spent(begun)
            done += 1e-5
        return done


@pytest.mark.parametrize(("occupied", "rate"), [(0.0, MOST), (0.8, 0.1), (0.95, 0.025), (1.0, LEAST)])
def test_credit_follows_what_the_loop_has_to_spare(occupied: float, rate: float) -> None:
    loop = Loop()
    loop.live(WINDOW_S, occupied)
    loop.work()
    earned = 0.0
    for _ in range(100):
        loop.live(WINDOW_S, occupied)
        earned += loop.work()
    assert earned * HIDDEN == pytest.approx(100 * WINDOW_S * rate, rel=0.15)


def test_no_more_than_a_burst_is_saved_up() -> None:
    loop = Loop()
    loop.live(3600.0, 0.0)
    assert loop.work() * HIDDEN == pytest.approx(BURST_S, rel=0.1)


def test_the_kernel_says_how_long_a_thread_ran_or_waited() -> None:
    if not SCHEDULE.exists():
        pytest.skip("this kernel has no schedstat: mount /proc, or build it with CONFIG_SCHED_INFO")
    before, ran = occupied_s(), time.thread_time()
    while time.thread_time() < ran + 0.05:
        pass
    assert occupied_s() - before >= 0.045, "running counts, and so does waiting for a core"
    before = occupied_s()
    threading.Event().wait(0.2)
    assert occupied_s() - before < 0.15, "sleeping does not"


@pytest.mark.parametrize("content", [None, b"", b"1", b"a b c"])
def test_without_the_kernel_s_word_running_counts(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "schedstat"
    if content is not None:
        file.write_bytes(content)
    assert occupied_s(file) == pytest.approx(time.thread_time(), abs=1.0)
