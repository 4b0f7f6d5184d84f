"""Threads beside the event loop, for what blocks: disks, registries, subprocesses.

asyncio's own executor has six threads on two cores and the process does not end before they have: registries that hang
would hold up access checks and the log, and a stop. Here are more threads, and an end waits for what is being done no
longer than `GRACE_S`. Whatever runs here has to bear being cut off, as by `kill -9`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Final, ParamSpec, TypeVar

MOST: Final = 64
GRACE_S: Final = 2.0
P = ParamSpec("P")
T = TypeVar("T")


class SideThreads(ThreadPoolExecutor):
    """Fits `loop.set_default_executor`, which takes nothing else. Daemon threads, made when no other is idle."""

    def __init__(self, most: int = MOST, grace_s: float = GRACE_S) -> None:
        super().__init__(most)
        self._most = most
        self._grace_s = grace_s
        self._waiting: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0
        """Threads that wait, less jobs that wait for one of them."""
        self._alive: set[threading.Thread] = set()
        self._closed = False

    def __repr__(self) -> str:
        return f"<SideThreads {len(self._alive)} of {self._most}, {max(self._idle, 0)} idle>"

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """See `concurrent.futures.Executor`. Raises RuntimeError after `shutdown`."""
        future: Future[T] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                self._is_idle()
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:
                self._is_idle()
                future.set_exception(error)
            else:
                self._is_idle()  # before anyone knows of the result: whoever comes with it finds this thread
                future.set_result(result)

        with self._lock:
            if self._closed:
                raise RuntimeError("the side threads have been stopped")
            self._waiting.put(job)
            self._idle -= 1
            if self._idle < 0 and len(self._alive) < self._most:
                thread = threading.Thread(target=self._work, name=f"side-{len(self._alive)}", daemon=True)
                self._alive.add(thread)
                self._idle += 1
                thread.start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing new is taken. With `wait`: until everything is done, but no longer than the grace; what is not
        done then goes down with the process. `cancel_futures` changes nothing: what waits ends with its threads."""
        with self._lock:
            self._closed = True
            alive = list(self._alive)
        for _ in alive:
            self._waiting.put(None)
        deadline = time.monotonic() + (self._grace_s if wait else 0.0)
        for thread in alive:
            thread.join(max(deadline - time.monotonic(), 0.0))

    def _is_idle(self) -> None:
        with self._lock:
            self._idle += 1

    def _work(self) -> None:
        while (job := self._waiting.get()) is not None:
            job()
            del job  # not kept alive while the next is waited for
        with self._lock:
            self._alive.discard(threading.current_thread())
