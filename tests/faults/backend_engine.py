"""What both protocols of a programmable backend share: faults by the coin, execution one at a time, the log."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tests.faults.backend_log import ARRIVED, EXECUTED, ExecutionLog
from tests.faults.behaviour import HEALTHY, Behaviour, Fault, Pace
from tests.faults.nonce import POISON, Nonces, answers

NOT_EXECUTED = frozenset(
    {Fault.HANG, Fault.RESET_BEFORE, Fault.CLOSE_REUSED, Fault.STATUS, Fault.GOAWAY, Fault.REFUSED_STREAM}
)


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of an execution: the fault to answer with, and the values."""

    fault: Fault
    values: Nonces
    status: int = 500


class Engine:
    """Runs batches one at a time at the pace given, and decides what goes wrong with each."""

    def __init__(self, log: ExecutionLog, pace: Pace, seed: int) -> None:
        self.behaviour = HEALTHY
        self.requests = 0
        self.hits = 0
        """Faults that the present behaviour has injected."""
        self.injected = 0
        """Faults injected since the start."""
        self._log = log
        self._pace = pace
        self._rng = random.Random(seed)
        self._waiting: deque[tuple[Nonces, Fault, Callable[[Ended], None]]] = deque()
        self._busy = False

    def behave(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.hits = 0

    def submit(self, nonces: Nonces, reused: bool, done: Callable[[Ended], None]) -> None:
        """`done` is called once: at once for what is not executed (never for a hang), else when the batch has run.

        Args:
            nonces: one INT64 per row.
            reused: whether its connection has served a request before.
        """
        self.requests += 1
        self._log.write(ARRIVED, nonces)
        fault = self._draw(reused)
        if fault is Fault.HANG:
            return
        if fault in NOT_EXECUTED:
            done(Ended(fault, nonces, self.behaviour.status))
            return
        self._waiting.append((nonces, fault, done))
        if not self._busy:
            self._next()

    def _draw(self, reused: bool) -> Fault:
        behaviour = self.behaviour
        if behaviour.fault is Fault.NONE or (behaviour.times and self.hits >= behaviour.times):
            return Fault.NONE
        if behaviour.fault is Fault.CLOSE_REUSED and not reused:
            return Fault.NONE
        if behaviour.share < 1.0 and self._rng.random() >= behaviour.share:
            return Fault.NONE
        self.hits += 1
        self.injected += 1
        return behaviour.fault

    def _next(self) -> None:
        if not self._waiting:
            self._busy = False
            return
        self._busy = True
        nonces, fault, done = self._waiting.popleft()
        self._log.write(EXECUTED, nonces)
        took_s = self._pace.time_s(len(nonces)) * self.behaviour.slowness
        asyncio.get_running_loop().call_later(took_s, self._ran, nonces, fault, done)

    def _ran(self, nonces: Nonces, fault: Fault, done: Callable[[Ended], None]) -> None:
        self._next()
        if fault is Fault.NONE and (nonces & POISON).any():
            self.injected += 1
            done(self._poisoned(nonces))
        else:
            values = answers(nonces)
            done(Ended(fault, values ^ 1 if fault is Fault.LIE else values))

    def _poisoned(self, nonces: Nonces) -> Ended:
        mode = self.behaviour.poison
        if mode == "reset":
            return Ended(Fault.RESET_AFTER, nonces)
        if mode == "hang":
            return Ended(Fault.HANG, nonces)
        return Ended(Fault.STATUS, nonces, 400 if mode == "refused" else 500)
