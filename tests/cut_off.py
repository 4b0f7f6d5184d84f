"""Cutting a coroutine off at each of its awaits in turn, so that none is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any


class CutOff:
    """Runs a coroutine, and something else as soon as it waits for the `at`-th time."""

    def __init__(self, work: Coroutine[Any, Any, Any], at: int, cut: Callable[[], object]) -> None:
        self.awaits = 0
        self._work = work
        self._at = at
        self._cut = cut

    def __await__(self) -> Generator[Any, Any, Any]:
        running = self._work.__await__()
        resume = partial(next, running)
        while True:
            try:
                waits = resume()
            except StopIteration as over:
                return over.value
            self.awaits += 1
            if self.awaits == self._at:
                asyncio.get_running_loop().call_soon(self._cut)
            try:
                yield waits
                resume = partial(next, running)
            except BaseException as error:
                resume = partial(running.throw, error)
