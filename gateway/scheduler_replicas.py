"""What a scheduler has to do with its replicas besides sending batches: it lets others look after them, and it counts
how long nobody could take one.

Rules:
  * whoever changes something in a fleet calls the scheduler's `kick` afterwards;
  * requests wait for a replica to come back, but not for ever: after `NO_BACKEND_S`, or `NO_REMOTE_S` where nobody here
    is about to start one, all who wait are told, and so are newcomers from then on, until one can be reached again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final

from gateway.backends.interface import Replica
from gateway.core.fleet import Fleet, Member
from gateway.dispatcher import Dispatcher, Observer
from gateway.errors import GatewayError, NoBackend

NO_BACKEND_S: Final = 5.0
"""How long requests wait for a worker to come back before they are refused. A worker is back within a second;
this leaves room for a large model to load."""
NO_REMOTE_S: Final = 1.0
"""The same where all replicas are remote servers: nobody here is about to start one (resilience notes §1.6)."""


class FleetAccess:
    """What both kinds of scheduler offer to whoever probes, drains, counts or compares their replicas."""

    _now: Callable[[], float]

    @property
    def dispatchers(self) -> tuple[Dispatcher, ...]:
        """Who sends the batches of each of `fleets`: lanes, budget, hooks."""
        raise NotImplementedError

    @property
    def fleets(self) -> tuple[Fleet, ...]:
        """What is known of the replicas: one fleet, or one for each lane of sequences."""
        return tuple([dispatcher.fleet for dispatcher in self.dispatchers])

    @property
    def retry_budget_rows(self) -> float:
        """How many more requests may be executed again just now."""
        now = self._now()
        return sum([dispatcher.budget.available(now) for dispatcher in self.dispatchers])

    @property
    def on_executed(self) -> Observer | None:
        """Told of every batch that succeeded, before its members are; one batch at a time, in this turn of the loop."""
        return self.dispatchers[0].on_executed

    @on_executed.setter
    def on_executed(self, observer: Observer | None) -> None:
        for dispatcher in self.dispatchers:
            dispatcher.on_executed = observer

    @property
    def on_fleet_changed(self) -> Callable[[], None] | None:
        """Told whenever an attempt failed, or a replica came, went or flipped: `Fleet.next_wake` may have changed."""
        return self.dispatchers[0].on_fleet_changed

    @on_fleet_changed.setter
    def on_fleet_changed(self, changed: Callable[[], None] | None) -> None:
        for dispatcher in self.dispatchers:
            dispatcher.on_fleet_changed = changed


class BackendWatch:
    """Who there is, and whether there is anyone to wait for. See the module's docstring."""

    __slots__ = ("_dispatcher", "_given_up", "_kick", "_loop", "_now", "hopeless", "since")

    def __init__(
        self,
        dispatcher: Dispatcher,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
        given_up: Callable[[GatewayError], None],
        kick: Callable[[], None],
    ) -> None:
        """`given_up`: told what those who wait are to be told. `kick`: looks at whoever waits again."""
        self.since: float | None = None
        """Since when no replica can be reached; None: one can, or nobody has looked."""
        self.hopeless: GatewayError | None = None
        """What those who wait were told when no replica was left to wait for."""
        self._dispatcher = dispatcher
        self._loop = loop
        self._now = clock
        self._given_up = given_up
        self._kick = kick

    # -- who there is ----------------------------------------------------------------------------------------------

    def join(self, replica: Replica) -> None:
        """Batches may go there; what happens to it is heard of from now on."""
        member = self._dispatcher.join(replica)
        replica.set_listener(partial(self._changed, member))

    async def part_from(self, replica: Replica) -> None:
        """No batch goes there any more; returns when those under way are over. Harmless for one that is not here."""
        member = self._dispatcher.member_of(replica)
        if member is None:
            return
        replica.set_listener(_nobody_listens)
        over = asyncio.Event()
        self._dispatcher.leave(member, over.set)
        self._kick()
        await over.wait()

    def _changed(self, member: Member) -> None:
        now = self._now()
        self._dispatcher.fleet.availability_changed(member, now)
        self._dispatcher.fleet_changed()
        if self._dispatcher.reachable(now):
            self.hopeless = None
        self._kick()

    # -- whether anyone can be reached -----------------------------------------------------------------------------

    def look(self, now: float) -> None:
        """Start, or stop, to count how long nobody could take a batch."""
        if self._dispatcher.reachable(now):
            if self.since is not None:
                self.since = self.hopeless = None
        elif self.since is None:
            self.since = now
            patience_s = NO_BACKEND_S if self._dispatcher.has_workers else NO_REMOTE_S
            self._loop.call_later(patience_s, self._give_up, now)

    def forget(self) -> None:
        """As if nobody had looked yet."""
        self.since = self.hopeless = None

    def _give_up(self, since: float) -> None:
        if self.since == since:
            self.look(self._now())  # one may have become usable by itself
        if self.since == since:
            name = self._dispatcher.spec.name
            self._given_up(NoBackend(f"model '{name}': no backend is available; retry later"))

    def __repr__(self) -> str:
        return f"<BackendWatch {'reachable' if self.since is None else f'nobody since {self.since:.3f}'}>"


def _nobody_listens() -> None:
    """A replica that was removed has nothing to say any more."""
