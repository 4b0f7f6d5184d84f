"""The gateway broken on purpose, at least one way for each invariant: a checker that does not notice is no checker.

A control replaces one function of the real code while it is applied. `test_simulation.py` plays histories until the
invariant it is for is reported broken, and fails if that takes more than `seeds` histories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final
from unittest import mock

from gateway import dispatcher_failures
from gateway.core import retry
from gateway.core.batch_queue import BatchQueue
from gateway.core.breaker import Breaker
from gateway.core.fleet import Fleet
from gateway.core.outcome import Failure, FailureKind
from gateway.core.poison import Denylist
from gateway.core.retry_budget import RetryBudget
from gateway.dispatcher import Dispatcher
from gateway.errors import GatewayError
from gateway.scheduler import Scheduler
from gateway.scheduler_door import Door
from gateway.scheduler_replicas import BackendWatch
from tests.simulation.histories import history
from tests.simulation.play import play_history

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Control:
    invariant: str
    what: str
    """What is broken."""
    where: Any
    """Class or module whose function is replaced."""
    name: str
    broken: Callable[[Function], Function]
    """The function as it is → the broken one."""
    themes: tuple[str, ...] = ()
    """Histories to look at; empty: all."""
    histories: int = 1500
    """... within which the checker must notice."""

    def noticed(self) -> int | None:
        """The first seed in whose history the checker notices; None: in none of them."""
        left, seed = self.histories, -1
        with self.applied():
            while left:
                seed += 1
                made = history(seed)
                if self.themes and made.theme not in self.themes:
                    continue
                left -= 1
                if self.invariant in play_history(made).broken:
                    return seed
        return None

    @contextmanager
    def applied(self) -> Iterator[None]:
        with mock.patch.object(self.where, self.name, self.broken(getattr(self.where, self.name))):
            yield


def returning(value: object) -> Callable[[Function], Function]:
    return lambda _: lambda *_arguments, **_named: value


def told_twice(settle: Function) -> Function:
    def broken(self: Any, request: Any, error: Any) -> None:
        settle(self, request, error)
        request.settle(request)

    return broken


def mixed_up(succeeded: Function) -> Function:
    return lambda self, members, batch: succeeded(self, [*reversed(members)], batch)


def kept(failed: Function) -> Function:
    def broken(self: Any, member: Any, rows: int, *arguments: Any) -> None:
        failed(self, member, rows, *arguments)
        member.rows_in_flight += 1

    return broken


def cancellation_counts(failed: Function) -> Function:
    def broken(self: Any, member: Any, rows: int, failure: Failure, *arguments: Any) -> None:
        if failure.kind is FailureKind.CANCELLED:
            failure = replace(failure, kind=FailureKind.BROKEN)
        failed(self, member, rows, failure, *arguments)

    return broken


def avoiding_nobody(choose: Function) -> Function:
    return lambda self, now, rows, avoid=(), affinity=None: choose(self, now, rows, (), affinity)


def anybody(choose: Function) -> Function:
    """Whoever is not the right one."""

    def broken(self: Any, *arguments: Any) -> Any:
        return self.members[-1] if choose(self, *arguments) is not None else None

    return broken


def connectable(_choose: Function) -> Function:
    """Any replica with a free slot, whatever its breaker says."""

    def broken(self: Any, _now: float, _rows: int, avoid: Any = (), _affinity: Any = None) -> Any:
        for member in self.members:
            if member.replica.available and member.replica.free_slots and member not in avoid:
                return member
        return None

    return broken


def undocumented(failed: Function) -> Function:
    return lambda self, members, _error: failed(self, members, GatewayError("something happened"))


def raising(after: Function) -> Function:
    def broken(self: Any, *arguments: Any) -> None:
        after(self, *arguments)
        raise RuntimeError("broken on purpose")

    return broken


CONTROLS: Final[dict[str, Control]] = {
    "deadlines_forgotten": Control("I1", "nobody looks at deadlines", BatchQueue, "next_deadline", returning(None)),
    "told_twice": Control("I1", "whoever fails is told twice", Scheduler, "_settle", told_twice),
    "answers_mixed_up": Control("I2", "batch-mates get each other's rows", Scheduler, "batch_succeeded", mixed_up),
    "repeats_anything": Control(
        "I3", "what must not be repeated is repeated", retry, "_final", returning(retry.Verdict.RETRY)
    ),
    "budget_without_bound": Control(
        "I4", "the retry budget never refuses", RetryBudget, "withdraw", returning(True), ("outage",)
    ),
    "rows_never_returned": Control("I5", "a failed batch keeps a row in flight", Fleet, "failed", kept),
    "no_bound": Control("I6", "everybody is let in", Door, "why_not", returning(None), ("overload",)),
    "no_second_attempt": Control("answered", "the retry budget is empty", RetryBudget, "withdraw", returning(False)),
    "cancellation_counts": Control(
        "calm", "a cancelled attempt is a broken one", Fleet, "failed", cancellation_counts, ("calm",)
    ),
    "avoids_nobody": Control("avoid", "a retry may go anywhere", Fleet, "choose", avoiding_nobody),
    "breakers_ignored": Control("ejected", "an open breaker stops nobody", Fleet, "choose", connectable),
    "slots_ignored": Control("slots", "a busy replica gets more", Fleet, "choose", anybody),
    "never_cancels": Control("abandoned", "nothing is cancelled", Dispatcher, "cancel", returning(None)),
    "undocumented": Control("reasons", "an error of no kind", Scheduler, "batch_failed", undocumented),
    "never_denied": Control(
        "denied", "nobody remembers what broke replicas", Denylist, "denied", returning(False), ("poison",)
    ),
    "never_gives_up": Control(
        "nobody", "nobody is told that none is left", BackendWatch, "_give_up", returning(None), ("storm", "outage")
    ),
    "expired_are_sent": Control(
        "wasted", "rows past their deadline are sent", BatchQueue, "next_deadline", returning(None)
    ),
    "no_pause": Control(
        "pace",
        "what nobody takes is offered again at once",
        dispatcher_failures,
        "pause_s",
        returning(0.0),
        ("storm", "outage"),
    ),
    "never_trips": Control("sinkhole", "failures never eject", Breaker, "_judge", returning(None), ("one_bad",)),
    "never_tried_again": Control("heals", "an open breaker stays open", Breaker, "advance", returning(None)),
    "raises": Control("mishap", "an exception in a callback", Scheduler, "_pump", raising),
}
