"""What operators see of backends, and what they can do with them: drain one, and put it back.

Rules:
  * a name is a backend's (`onnx-1`, `triton-a:8000`) or a server's, which means the server's replicas of every model;
    an address (`triton-a:8000`, also as a URL) means everything there, whatever it is called;
  * drained stays drained until it is undrained or leaves the configuration: a restart of it, another version of the
    model and a reload that makes its replicas anew change nothing (`core/drains.py`);
  * the last backend that can serve a model is not drained unless that is insisted on; then nothing at all is changed;
  * draining ends nothing: batches under way are answered, new ones go elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

from gateway.catalog import ServedVersion
from gateway.core.breaker_states import State
from gateway.core.drains import Drains, Order
from gateway.core.fleet import Fleet, Member, MemberStatistics

Action = Literal["drain", "undrain"]

MAX_WAIT_S: Final = 600.0
MAX_HANDED_OVER: Final = 100_000
"""Characters; the system takes 131 071 bytes in one variable of an environment."""
LOOK_S: Final = 0.02
"""Between two looks at what is still under way, while somebody waits for it."""

audit = logging.getLogger("gateway.audit")
log = logging.getLogger("gateway.backends")


@dataclass(frozen=True, slots=True)
class BackendView:
    """One backend of one model version, as `/api/backends` shows it; the field names are part of the interface."""

    model: str
    version: str
    backend: str
    server: str
    """Name of the server it is on; empty for a worker of this machine."""
    kind: str
    """`onnx`: a worker of the gateway; `oip`: a remote server."""
    url: str
    zone: str
    weight: float
    state: str
    """`closed` (in full use), `open` (ejected), `half_open` (being tried out), `ramp` (back with a growing share),
    `unavailable`, `drained`."""
    cause: str
    """Why it is in this state, in words; empty where there is nothing to say."""
    until: str | None
    """When this state ends by itself: UTC, ISO 8601. None: it does not."""
    seconds_left: float | None
    slots: int
    """Batches it is given at one time, at most."""
    in_flight: int
    latency_ms: float | None
    """How long a batch like its latest would take now, by what was seen; None: nothing was, or it is away."""
    share: float
    """Its part of the attempts of this model version in the last ten seconds."""


@dataclass(frozen=True, slots=True)
class Changed:
    """One backend of one model version that an action changed, or found as wanted."""

    model: str
    version: str
    backend: str
    state: str
    in_flight: int


@dataclass(frozen=True, slots=True)
class Done:
    """What an action did. `idle`: nothing is under way on the backends named, as far as it was waited for."""

    action: Action
    name: str
    backends: Sequence[Changed]
    idle: bool


class UnknownBackend(Exception):
    """No backend and no server has this name."""


class LastBackend(Exception):
    """A model would be left without a backend that can serve it."""


def member_statistics(version: ServedVersion, now: float) -> list[tuple[Member, MemberStatistics]]:
    """Every backend of a version with what is known of it now. `now`: monotonic seconds."""
    found: list[tuple[Member, MemberStatistics]] = []
    for fleet in version.fleets:
        found += zip(fleet.members, fleet.statistics(now).members, strict=True)
    return found


class Backends:
    """The backends of every model that is served."""

    def __init__(
        self,
        versions: Callable[[], Iterable[ServedVersion]],
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock`: the schedulers'; `wall_clock`: seconds since 1970, for people."""
        self._versions = versions
        self._now = clock
        self._wall_clock = wall_clock
        self._drains = Drains()

    # -- what was drained stays so -------------------------------------------------------------------------------

    def attach(self, version: ServedVersion) -> None:
        """A version was loaded and takes no requests yet; backends of it that were drained get none, now and later."""
        version.on_joined = self._hold
        self._hold(version)

    def _hold(self, version: ServedVersion) -> None:
        """Before any batch can go to a replica that came."""
        now = self._now()
        for fleet in version.fleets:
            for member in fleet.members:
                state = member.breaker.state
                if state is not State.DRAINED and self._drains.drained(version.name, names_of(member)):
                    fleet.force(member, "open", now)
                    log.info("model %s: backend %s stays drained", version.name, member.replica.name)

    def drained(self, model: str, server: str, url: str) -> bool:
        """Whether replicas of `model` get no batches on the server of that name and URL."""
        return self._drains.drained(model, _names(server, server, url))

    def orders_as_text(self) -> str:
        """For a successor's `adopt`; empty: nothing is drained."""
        orders = [[order.name, order.model, order.drained] for order in self._drains.orders]
        text = json.dumps(orders) if orders else ""
        if len(text) > MAX_HANDED_OVER:
            log.warning("a successor is not told which %d backends are drained: their names are too long", len(orders))
            return ""
        return text

    def adopt(self, text: str) -> None:
        """Drain what a predecessor's operators had drained, as far as it comes. What cannot be read is told only."""
        try:
            orders = [_order(*given) for given in json.loads(text)] if text else []
        except (ValueError, TypeError) as error:
            log.error("which backends the predecessor had drained cannot be read: %s", error)
            return
        self._drains = Drains(orders)

    def reloaded(self, configured: Collection[str]) -> None:
        """Another configuration holds. What was drained and is neither `configured` (names and addresses of servers)
        nor there any more is forgotten."""
        there = {
            (name, version.name)
            for version in self._versions()
            for fleet in version.fleets
            for member in fleet.members
            for name in names_of(member)
        }
        names = {name for name, _ in there}
        models = {version.name for version in self._versions()}

        def exists(name: str, model: str | None) -> bool:
            # One of several addresses of a name, as `name/address`, may be away for a while.
            server = name in configured or name.partition("/")[0] in configured
            return name in names or server if model is None else (name, model) in there or (server and model in models)

        for order in self._drains.keep(exists):
            of = f" of model {order.model}" if order.model is not None else ""
            log.info("backend %s%s left the configuration, and is not drained if it comes back", order.name, of)

    # -- what there is -------------------------------------------------------------------------------------------

    def views(self) -> list[BackendView]:
        """By model, version and the order in which they came."""
        return [view for version in self._versions() for view in self._of(version)]

    def _of(self, version: ServedVersion) -> list[BackendView]:
        now = self._now()
        return [self._view(version, member, seen, now) for member, seen in member_statistics(version, now)]

    def _view(self, version: ServedVersion, member: Member, seen: MemberStatistics, now: float) -> BackendView:
        traits = member.replica.traits
        left = max(0.0, seen.until - now) if seen.until is not None and math.isfinite(seen.until) else None
        until = None if left is None else datetime.fromtimestamp(self._wall_clock() + left, UTC)
        return BackendView(
            model=version.name,
            version=version.version,
            backend=seen.name,
            server=traits.server,
            kind=traits.kind,
            url=str(getattr(member.replica, "url", "")),
            zone=traits.zone,
            weight=traits.weight,
            state=seen.state,
            cause=cause_of(member, seen),
            until=None if until is None else until.isoformat(timespec="milliseconds"),
            seconds_left=None if left is None else round(left, 3),
            slots=seen.slots,
            in_flight=seen.in_flight,
            # Of one that is away it would be the penalty for how it left.
            latency_ms=round(seen.ewma_s * 1e3, 3) if seen.ewma_s > 0.0 and seen.state != "unavailable" else None,
            share=round(seen.share, 4),
        )

    # -- what can be done with it --------------------------------------------------------------------------------

    async def act(self, action: Action, name: str, model: str | None, *, force: bool, wait_s: float) -> Done:
        """Drain or undrain what is called `name`, of all models or of `model`; wait until it is idle, at most `wait_s`.

        Raises:
            UnknownBackend: nothing of that name; the text says what there is.
            LastBackend: a model would have nothing left; nothing was changed.
        """
        now = self._now()
        found = self._named(name, model)
        if action == "drain" and not force:
            self._check_others(found, name, now)
        for version, fleet, member in found:
            fleet.force(member, "open" if action == "drain" else None, now)
            version.kick()
        self._drains.give(Order(name, model, drained=action == "drain"))
        audit.info("%s of backend %s, model %s, force %s", action, name, model or "any", force)
        idle = await self._idle([member for _, _, member in found], wait_s if action == "drain" else 0.0)
        return Done(action, name, [self._changed(*one) for one in found], idle)

    def _named(self, name: str, model: str | None) -> list[tuple[ServedVersion, Fleet, Member]]:
        every = [
            (version, fleet, member)
            for version in self._versions()
            if model in (None, version.name)
            for fleet in version.fleets
            for member in fleet.members
        ]
        found = [one for one in every if name in names_of(one[2])]
        if not found:
            names = sorted({member.replica.name for _, _, member in every})
            of = f" of model '{model}'" if model is not None else ""
            raise UnknownBackend(f"no backend{of} is named '{name}'; there are: {', '.join(names) or 'none'}")
        return found

    def _check_others(self, found: Sequence[tuple[ServedVersion, Fleet, Member]], name: str, now: float) -> None:
        going = {member for _, _, member in found}
        stranded = []
        for version in dict.fromkeys(version for version, _, _ in found):
            for fleet in version.fleets:
                usable = [member for member in fleet.members if fleet.usable(member, now)]
                if usable and going.issuperset(usable):
                    stranded.append(f"{version.name} version {version.version}")
        if stranded:
            what = ", ".join(dict.fromkeys(stranded))
            raise LastBackend(
                f"'{name}' is all that can serve {what} now, and nothing was changed; bring up or undrain another "
                "backend first, or insist with force=true (--force)"
            )

    async def _idle(self, members: Sequence[Member], wait_s: float) -> bool:
        deadline = self._now() + wait_s
        while any(member.replica.in_flight for member in members):
            if self._now() >= deadline:
                return False
            await asyncio.sleep(LOOK_S)
        return True

    def _changed(self, version: ServedVersion, fleet: Fleet, member: Member) -> Changed:
        seen = dict(zip(fleet.members, fleet.statistics(self._now()).members, strict=True)).get(member)
        state = "removed" if seen is None else seen.state
        return Changed(version.name, version.version, member.replica.name, state, member.replica.in_flight)


def _order(name: object, model: object, drained: object) -> Order:
    if not isinstance(name, str) or not isinstance(model, str | None) or not isinstance(drained, bool):
        raise TypeError("an order is a name, a model or null, and true or false")
    return Order(name, model, drained)


def names_of(member: Member) -> frozenset[str]:
    """What people may call it: its own name, its server's, the server's address and URL."""
    replica = member.replica
    return _names(replica.name, replica.traits.server, str(getattr(replica, "url", "")))


def _names(backend: str, server: str, url: str) -> frozenset[str]:
    # Workers have no server and no URL: an empty name means nobody, not all of them.
    return frozenset((backend, server, url, url.rpartition("//")[2])) - {""}


def cause_of(member: Member, seen: MemberStatistics) -> str:
    """Why a backend is in its state: what the fleet says, or the replica itself where it is the one who knows."""
    if seen.state == "unavailable":
        return str(getattr(member.replica, "cause", "")) or seen.cause
    return seen.cause
