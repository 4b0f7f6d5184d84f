"""`gateway.side_threads`: jobs, their number, and an end that does not wait for ever."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from gateway.side_threads import SideThreads

STUCK = """\
import asyncio, threading
from gateway.side_threads import SideThreads

async def main():
    asyncio.get_running_loop().set_default_executor(SideThreads(grace_s=0.05))
    reached = threading.Event()
    stuck = asyncio.ensure_future(asyncio.to_thread(lambda: (reached.set(), threading.Event().wait())))
    await asyncio.to_thread(reached.wait)
    stuck.cancel()
    print("ended", flush=True)

asyncio.run(main())
"""


def test_results_and_errors_come_back() -> None:
    threads = SideThreads()
    assert isinstance(threads, ThreadPoolExecutor), "the loop takes nothing else"
    assert threads.submit(pow, 2, exp=5).result(10) == 32
    with pytest.raises(ZeroDivisionError):
        threads.submit(lambda: 1 / 0).result(10)
    assert list(threads.map(abs, [-1, 2, -3], timeout=10)) == [1, 2, 3]
    threads.shutdown()


def test_stuck_jobs_hold_up_nobody_until_all_threads_are_taken() -> None:
    threads, go = SideThreads(most=3), threading.Event()
    stuck = [threads.submit(go.wait) for _ in range(2)]
    assert [threads.submit(threading.get_ident).result(10) for _ in range(5)].count(threading.get_ident()) == 0
    stuck.append(threads.submit(go.wait))
    waits = threads.submit(pow, 2, 2)
    assert repr(threads) == "<SideThreads 3 of 3, 0 idle>"
    go.set()
    assert waits.result(10) == 4
    assert [job.result(10) for job in stuck] == [True] * 3
    threads.shutdown()


def test_idle_threads_are_used_again() -> None:
    threads = SideThreads()
    for _ in range(50):
        threads.submit(int).result(10)
    assert len(threads._alive) == 1
    threads.shutdown()


def test_what_is_cancelled_before_its_turn_does_not_run() -> None:
    threads, go = SideThreads(most=1), threading.Event()
    ran: list[int] = []
    first = threads.submit(go.wait)
    second = threads.submit(ran.append, 1)
    assert second.cancel()
    go.set()
    assert first.result(10)
    threads.shutdown()
    assert ran == []


def test_an_end_waits_for_what_is_done_in_time_and_takes_nothing_new() -> None:
    threads, go = SideThreads(grace_s=60), threading.Event()
    job = threads.submit(go.wait)
    threading.Timer(0.05, go.set).start()
    threads.shutdown()
    assert job.done()
    assert threads._alive == set()
    with pytest.raises(RuntimeError, match="stopped"):
        threads.submit(int)


def test_a_process_ends_although_a_job_never_does() -> None:
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")
