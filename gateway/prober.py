"""Trial inferences on backends that nothing else says anything about, and a line in the log when a backend's state
changes.

Two reasons to try one (resilience notes §1.6):
  * it was ejected, its time is up and it is being tried out (`half_open`): as often as the fleet gives a permit;
  * it is remote and silent: every `interval_s` ± 20 % in which it answered nobody, so that a server that hangs is found
    before a caller finds it. Whoever is answering callers needs no trial.

Rules:
  * a trial is the model's own made-up input, executed and checked like any batch; no ping. Where nothing may be run
    twice, or nothing is known to run, there is no trial: callers' batches try an ejected backend out, and a silent one
    is asked whether it is ready, if it can be asked;
  * callers go first: no trial while a batch is under way there or requests wait;
  * a permit that was taken is given back, whatever happens, also when the model is unloaded meanwhile;
  * one timer per model version, armed for the next exact instant; nothing ticks.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol, runtime_checkable

from gateway.backends.interface import Replica
from gateway.backends.one_shot import run_once
from gateway.catalog import ServedVersion
from gateway.core.assembly import AssemblyError, check_outputs
from gateway.core.breaker_states import WORDS, Cause
from gateway.core.fleet import Fleet, Member, State
from gateway.core.member import cause_of
from gateway.core.model import ModelSpec
from gateway.core.outcome import Failure, FailureKind, Sign, Success
from gateway.core.request import InputTensor
from gateway.core.sequence_tensors import as_executed
from gateway.scheduler import Scheduler
from gateway.sequence_scheduler import SequenceScheduler

log = logging.getLogger("gateway.backends")

TIMEOUT_S: Final = 1.0
"""Least time that a trial on a remote backend is given; more where its batches are known to take longer."""
FIRST_TIMEOUT_S: Final = 10.0
"""... and as long as nothing is known of how long they take: a first run may be slow."""
SLOWER: Final = 3.0
"""Times its longest trial so far, where callers' batches have not shown yet how long they take."""
WORKER_TIMEOUT_S: Final = 30.0
"""A worker that does not answer in time is ended. Not for a trial that a busy machine delayed."""
JITTER: Final = 0.2
SILENT: Final = 0.7
"""Who answered somebody within this share of the interval is not silent; below 1 - `JITTER`, so that a trial does not
stand for callers at the next one."""
MIN_PAUSE_S: Final = 0.005
"""Between two looks by the timer, whatever instants the fleet names."""


class Chance(Protocol):
    """`random.Random` fits."""

    def random(self) -> float: ...


@runtime_checkable
class Askable(Protocol):
    """A replica that can say whether it is ready, without executing anything."""

    async def ping(self, timeout_s: float, /) -> bool: ...


class Prober:
    """The trials of one model version."""

    def __init__(
        self,
        spec: ModelSpec,
        scheduler: Scheduler | SequenceScheduler,
        sample: Sequence[InputTensor | None] | None,
        interval_s: float,
        chance: Chance,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`sample`: a tensor per input of the executed signature; None: no trials. `clock`: the scheduler's."""
        self._spec = as_executed(spec)
        self._scheduler = scheduler
        # A lane of fixed rows cannot run input that has none of them.
        self._sample = sample if spec.resilience.idempotent and spec.scheduling.sequence is None else None
        first = next((tensor for tensor in self._sample or () if tensor is not None), None)
        self._rows = first.shape[0] if first is not None and first.shape else 1
        self._outputs = tuple(range(len(self._spec.outputs)))
        self._interval_s = interval_s
        self._chance = chance
        self._now = clock
        self._loop = asyncio.get_running_loop()
        self._due: dict[Member, float] = {}
        """When a silent remote backend is tried next."""
        self._took: dict[Member, float] = {}
        """Seconds of the longest trial of a remote backend that succeeded."""
        self._running: dict[asyncio.Task[None], Member] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._soon: asyncio.Handle | None = None
        self._closed = False
        self.trials = 0
        """Begun so far."""

    def start(self) -> None:
        """From now on; the next look is at the end of the loop's turn."""
        for fleet in self._scheduler.fleets:
            fleet.sampled = self._sample is not None
            fleet.watchers.append(self._changed)
        self._scheduler.on_fleet_changed = self.look_soon  # members that come and go
        self.look_soon()

    def close(self) -> None:
        """No more trials; those under way are given up, and their permits given back."""
        self._closed = True
        self._scheduler.on_fleet_changed = None
        for fleet in self._scheduler.fleets:
            fleet.sampled = False
            if self._changed in fleet.watchers:
                fleet.watchers.remove(self._changed)
        for handle in (self._timer, self._soon):
            if handle is not None:
                handle.cancel()
        for task in [*self._running]:
            task.cancel()

    async def closed(self) -> None:
        """After `close`: returns when nothing of it runs any more."""
        await asyncio.gather(*self._running, return_exceptions=True)

    def look_soon(self) -> None:
        """Something changed; many changes of one turn of the loop are one look."""
        if self._soon is None and not self._closed:
            self._soon = self._loop.call_soon(self._look)

    # -- what to try, and when -----------------------------------------------------------------------------------

    def _look(self) -> None:
        self._soon = None
        now = self._now()
        wake, due = math.inf, {}
        for fleet in self._scheduler.fleets:
            for member in fleet.probes_due(now):
                if not self._begin(fleet, member):
                    fleet.probed(member, None, 0.0, now)
            for member in fleet.members:
                if member.kind == "oip":
                    due[member] = self._health(fleet, member, now)
            wake = min(wake, fleet.next_wake(now) or math.inf)
        self._due = due
        self._took = {member: took_s for member, took_s in self._took.items() if member in due}
        self._arm(min(wake, min(due.values(), default=math.inf)), now)

    def _health(self, fleet: Fleet, member: Member, now: float) -> float:
        """When `member` is to be looked at next; tries it if that is now."""
        due = self._due.get(member)
        if due is not None and due > now:
            return due
        silent = due is not None and member.last_success <= now - SILENT * self._interval_s
        if silent and self._at_leisure(member) and fleet.usable(member, now):
            self._begin(fleet, member)
        return now + self._interval_s * (1.0 + JITTER * (2.0 * self._chance.random() - 1.0))

    def _at_leisure(self, member: Member) -> bool:
        """Nobody is being served there, nobody waits to be, and no trial is under way."""
        if member.replica.in_flight or member in self._running.values():
            return False
        lanes = any(dispatcher.lanes.count for dispatcher in self._scheduler.dispatchers)
        return not lanes and not self._scheduler.queue_statistics().requests

    def _arm(self, wake: float, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if wake < math.inf:
            self._timer = self._loop.call_later(max(MIN_PAUSE_S, wake - now), self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer = None
        if self._soon is None and not self._closed:
            self._look()

    # -- one trial -----------------------------------------------------------------------------------------------

    def _begin(self, fleet: Fleet, member: Member) -> bool:
        """Whether a trial could be begun."""
        if member.replica.free_slots <= 0:
            return False
        task = self._loop.create_task(self._try(fleet, member))
        self._running[task] = member
        task.add_done_callback(self._ended)
        self.trials += 1
        return True

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.pop(task, None)
        self.look_soon()

    async def _try(self, fleet: Fleet, member: Member) -> None:
        started = self._now()
        outcome: Success | Failure | None = None
        try:
            outcome = await self._executed(member)
        except asyncio.CancelledError:
            return  # by `close`, the only one who could
        except Exception:
            log.exception("model %s: backend %s could not be tried", self._spec.name, member.replica.name)
        finally:
            now = self._now()
            if isinstance(outcome, Success) and member.kind == "oip":
                self._took[member] = max(self._took.get(member, 0.0), now - started)
            fleet.probed(member, outcome, now - started, now, self._rows)
            self._scheduler.kick()  # it held a slot, and may be usable again
        if isinstance(outcome, Failure):
            text = "model %s: a trial inference on backend %s failed (%s): %s"
            log.debug(text, self._spec.name, member.replica.name, outcome.kind.value, outcome.in_full)

    async def _executed(self, member: Member) -> Success | Failure | None:
        replica, timeout_s = member.replica, self._timeout_s(member)
        if self._sample is None:
            return await _asked(replica, timeout_s)
        if replica.free_slots <= 0:
            return None  # since the turn in which the trial was begun it went away, or callers took its last slot
        outcome = await run_once(replica, self._sample, self._outputs, timeout_s)
        if isinstance(outcome, Success):
            try:
                check_outputs(self._spec, self._outputs, self._rows, list(outcome.outputs))
            except AssemblyError as error:
                return Failure(FailureKind.BROKEN, f"the backend's answer failed its checks: {error}", Sign.MISMATCH)
        elif outcome.kind is FailureKind.CANCELLED:
            return None
        return outcome

    def _timeout_s(self, member: Member) -> float:
        learned = member.time.attempt_timeout_s(self._rows)
        if member.kind == "onnx":
            return max(WORKER_TIMEOUT_S, learned or 0.0)
        if learned is None and member in self._took:
            learned = SLOWER * self._took[member]
        return FIRST_TIMEOUT_S if learned is None else max(TIMEOUT_S, learned)

    # -- changes of state ----------------------------------------------------------------------------------------

    def _changed(self, member: Member, before: State) -> None:
        """A backend is in another state than `before`: look whom to try, at the end of the turn, and tell the log."""
        self.look_soon()
        state, name = member.breaker.state, member.replica.name
        if member.kind == "onnx" and State.UNAVAILABLE in (before, state):
            return  # its worker died or is back: that is told once, not for each of the models there
        now = self._now()
        wait = f" for {max(0.0, member.breaker.until - now):.1f} s" if state is State.OPEN else ""
        cause = cause_of(member, now) if state in (State.OPEN, State.UNAVAILABLE) else ""
        level = logging.WARNING if state in (State.OPEN, State.UNAVAILABLE) else logging.INFO
        if member.breaker.cause is Cause.SILENT or (state is State.CLOSED and member.breaker.was_asked):
            level = logging.DEBUG  # a question and its answer are no news, and may be many: the metrics count them
        log.log(
            level,
            "model %s: backend %s is %s%s%s",
            self._spec.name, name, WORDS[state], wait, f": {cause}" if cause else "",
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<Prober {self._spec.name}/{self._spec.version} trials={self.trials} running={len(self._running)}>"


async def _asked(replica: Replica, timeout_s: float) -> Success | Failure | None:
    """Whether the backend says that it is ready, as the outcome of a trial; None: it cannot be asked."""
    if not isinstance(replica, Askable):
        return None
    try:
        async with asyncio.timeout(timeout_s):
            ready = await replica.ping(timeout_s)
    except TimeoutError:
        return Failure(FailureKind.TIMEOUT, f"it did not say within {timeout_s:g} s whether it is ready")
    return Success((), 0, 0, 0) if ready else Failure(FailureKind.BROKEN, "it says that it is not ready")


class Probers:
    """The probers of all model versions that are served."""

    def __init__(self, interval_s: float, chance: Chance) -> None:
        self._interval_s = interval_s
        self._chance = chance
        self._by_version: dict[ServedVersion, Prober] = {}

    def attach(self, version: ServedVersion) -> None:
        """`version` is loaded. An ensemble has no backends of its own."""
        scheduler = version.scheduler
        if isinstance(scheduler, Scheduler | SequenceScheduler):
            prober = Prober(version.spec, scheduler, version.probe, self._interval_s, self._chance)
            self._by_version[version] = prober
            prober.start()

    def detach(self, version: ServedVersion) -> None:
        """`version` is going to be freed; harmless for one that has no prober."""
        prober = self._by_version.pop(version, None)
        if prober is not None:
            prober.close()

    async def close(self) -> None:
        """End all of them."""
        probers = [*self._by_version.values()]
        for version in [*self._by_version]:
            self.detach(version)
        for prober in probers:
            await prober.closed()

    def __repr__(self) -> str:
        return f"<Probers {len(self._by_version)}>"
