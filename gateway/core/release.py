"""The releases of one model: which serves, which is on trial, which can be had back, and what is not tried again.

A *release* is what a model's source meant at one moment: one version, or several of a directory that change together.
Its life is a table. What the shell (releases.py) should do is decided here and returned as a value; time is an
argument, seconds since 1970, for these are things that people read later.

Rules:
  * one release at most is LIVE, one at most is on trial, at most `keep` are PREVIOUS (the newest of those that were
    live); nothing becomes LIVE but what was CHECKED, or was live before;
  * a release that was refused is not tried again while the source means it, unless somebody insists or the rules that
    it broke have changed (`forgive`). One that could not be fetched or tried for reasons of its surroundings
    (`abandoned`) is;
  * who rolls back is obeyed: what the source means at that moment, whether it served or was on its way, is withheld
    until the source means something else, or somebody insists. What the source means is followed again from then on;
  * a source that means a release which is kept is answered by it at once: nothing is fetched and loaded twice;
  * memory is bounded: one refusal, one thing withheld, `HISTORY` records.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass
from typing import Final, Literal

HISTORY: Final = 50
"""Records of a model that are remembered."""


class ReleaseState(enum.Enum):
    """Life of a release."""

    NOTICED = "noticed"
    """The source means it; nothing of it is here yet."""
    VERIFIED = "verified"
    """Its files are here, and are those that were wanted."""
    LOADED = "loaded"
    """It is loaded and warm, beside the one that serves."""
    CHECKED = "checked"
    """It may answer the other's callers."""
    LIVE = "live"
    PREVIOUS = "previous"
    """It was live, and stays loaded."""
    REFUSED = "refused"
    GONE = "gone"


class ReleaseEvent(enum.Enum):
    VERIFIED = "verified"
    LOADED = "loaded"
    CHECKED = "checked"
    SWAPPED = "swapped"
    """The model's name means it from now on."""
    DISPLACED = "displaced"
    """The name means another one; it stays loaded."""
    REFUSED = "refused"
    DROPPED = "dropped"
    """It is freed, or its trial was given up."""


_S, _E = ReleaseState, ReleaseEvent
TRANSITIONS: Final[dict[tuple[ReleaseState, ReleaseEvent], ReleaseState]] = {
    (_S.NOTICED, _E.VERIFIED): _S.VERIFIED,
    (_S.NOTICED, _E.REFUSED): _S.REFUSED,
    (_S.NOTICED, _E.DROPPED): _S.GONE,
    (_S.VERIFIED, _E.LOADED): _S.LOADED,
    (_S.VERIFIED, _E.REFUSED): _S.REFUSED,
    (_S.VERIFIED, _E.DROPPED): _S.GONE,
    (_S.LOADED, _E.CHECKED): _S.CHECKED,
    (_S.LOADED, _E.REFUSED): _S.REFUSED,
    (_S.LOADED, _E.DROPPED): _S.GONE,
    (_S.CHECKED, _E.SWAPPED): _S.LIVE,
    (_S.CHECKED, _E.REFUSED): _S.REFUSED,
    (_S.CHECKED, _E.DROPPED): _S.GONE,
    (_S.LIVE, _E.DISPLACED): _S.PREVIOUS,
    (_S.LIVE, _E.DROPPED): _S.GONE,
    (_S.PREVIOUS, _E.SWAPPED): _S.LIVE,
    (_S.PREVIOUS, _E.DROPPED): _S.GONE,
}
"""A pair that is not here must not happen: `Release.go` raises, and nothing has changed."""


class Release:
    """One release. Two of equal `identity` hold equal files."""

    __slots__ = ("digest", "identity", "since", "state", "uri", "version")

    def __init__(self, identity: str, version: str, uri: str, now: float, digest: str = "") -> None:
        self.identity = identity
        self.version = version
        """As clients see it; of several, joined by commas."""
        self.uri = uri
        """Where it comes from, for people."""
        self.digest = digest
        """Empty until its files are known."""
        self.state = ReleaseState.NOTICED
        self.since = now
        """When the state began."""

    def go(self, event: ReleaseEvent, now: float) -> None:
        self.state = TRANSITIONS[self.state, event]
        self.since = now

    def __repr__(self) -> str:
        return f"<Release {self.version} {self.identity} {self.state.value}>"


# -- decisions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stay:
    """Nothing is to be done. `why`: it serves already, was refused before, or was rolled back from."""

    why: Literal["serves", "refused", "withheld"]
    text: str


@dataclass(frozen=True, slots=True)
class Prepare:
    """Fetch it, load it, check it; then `swapped`, or `refused`, or `abandoned`."""

    release: Release


@dataclass(frozen=True, slots=True)
class Restore:
    """It is loaded: let the name mean it, then `swapped`."""

    release: Release


Decision = Stay | Prepare | Restore
Outcome = Literal["loaded", "swapped", "rolled_back", "promoted", "refused", "failed", "unloaded"]
"""`failed`: not for reasons of the release itself; it is tried again."""
OUTCOMES: Final[tuple[Outcome, ...]] = (
    "loaded", "swapped", "rolled_back", "promoted", "refused", "failed", "unloaded",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Happened:
    """A line of a model's history; the field names are part of the interface."""

    at: float
    """Seconds since 1970."""
    outcome: Outcome
    by: str
    """What asked for it, in words: `poll`, `api`, `SIGHUP` …"""
    from_version: str
    from_digest: str
    to_version: str
    to_digest: str
    to_uri: str
    why: str
    """The reason of a refusal or failure; else empty."""
    took_s: float


class ModelReleases:
    """The releases of one model. Of the shell's calls for one model none may overlap."""

    def __init__(self, keep: int) -> None:
        """`keep`: how many that were live stay loaded."""
        self.keep = keep
        self.live: Release | None = None
        self.trial: Release | None = None
        self.previous: tuple[Release, ...] = ()
        """The newest first."""
        self.refusal: tuple[str, str, float] | None = None
        """Identity, reason and time of what was refused last, while the source means it."""
        self.withheld = ""
        """Identity of what the source meant when an operator chose something else, while it means that."""
        self.meant = ""
        """Identity of what the source meant when it was asked last."""
        self.history: deque[Happened] = deque(maxlen=HISTORY)
        self._trial_since = 0.0

    # -- what the source means -----------------------------------------------------------------------------------

    def noticed(self, identity: str, version: str, uri: str, now: float, *, insist: bool = False) -> Decision:
        """The source means this now. `insist`: an operator asks, who knows what was refused or rolled back from."""
        self.meant = identity
        if self.refusal is not None and (insist or self.refusal[0] != identity):
            self.refusal = None
        if insist or self.withheld != identity:
            self.withheld = ""
        if self.live is not None and self.live.identity == identity:
            return Stay("serves", f"version {self.live.version} serves, and the source means no other")
        if self.withheld:
            text = f"version {version} was rolled back from, or another was chosen, and the source still means it"
            return Stay("withheld", text)
        if self.refusal is not None:
            return Stay("refused", self.refusal[1])
        kept = next((release for release in self.previous if release.identity == identity), None)
        if kept is not None:
            return Restore(kept)
        self.trial = Release(identity, version, uri, now)
        self._trial_since = now
        return Prepare(self.trial)

    def tried(self, event: ReleaseEvent, now: float, digest: str = "", version: str = "") -> None:
        """The release on trial is one step further."""
        trial = self._on_trial()
        trial.go(event, now)
        trial.digest = digest or trial.digest
        trial.version = version or trial.version

    def refused(self, why: str, by: str, now: float) -> Happened:
        """The release on trial must not serve."""
        trial = self._on_trial()
        trial.go(ReleaseEvent.REFUSED, now)
        self.trial = None
        self.refusal = (trial.identity, why, now)
        return self._record("refused", by, self.live, trial, now, why)

    def abandoned(self, why: str, by: str, now: float) -> Happened:
        """The release on trial could not be tried; its source may be asked again."""
        trial = self._on_trial()
        trial.go(ReleaseEvent.DROPPED, now)
        self.trial = None
        return self._record("failed", by, self.live, trial, now, why)

    def _on_trial(self) -> Release:
        if self.trial is None:
            raise RuntimeError("no release is on trial")
        return self.trial

    # -- which one serves ----------------------------------------------------------------------------------------

    def swapped(self, release: Release, by: str, now: float, outcome: Outcome = "swapped") -> tuple[Release, ...]:
        """The name means `release`: the one on trial, one that was kept, or one that was promoted. Returns those that
        are not kept any more.

        Where an operator chose (`rolled_back`, `promoted`), what the source means is withheld from now on, if it is not
        the very release: be it what is displaced, or what was to come.
        """
        before = self.live
        release.go(ReleaseEvent.SWAPPED, now)
        if self.trial is release:
            self.trial = None
        elif outcome != "loaded":
            self._trial_since = now
        others = [one for one in self.previous if one is not release]
        if before is not None:
            before.go(ReleaseEvent.DISPLACED, now)
            others.insert(0, before)
        kept = [one for one in others if one.identity != release.identity][: self.keep]
        self.live, self.previous = release, tuple(kept)
        dropped = tuple(one for one in others if one not in kept)
        for one in dropped:
            one.go(ReleaseEvent.DROPPED, now)
        chosen = outcome in ("rolled_back", "promoted") and release.identity != self.meant
        self.withheld = self.meant if chosen else ""
        self._record(outcome, by, before, release, now)
        return dropped

    def back(self) -> Restore | None:
        """What a rollback would bring back; None: nothing is kept."""
        return Restore(self.previous[0]) if self.previous else None

    def lost(self, release: Release, now: float) -> None:
        """A release that was kept is not loaded any more."""
        release.go(ReleaseEvent.DROPPED, now)
        self.previous = tuple(one for one in self.previous if one is not release)

    # -- what others do ------------------------------------------------------------------------------------------

    def installed(self, release: Release, by: str, now: float) -> tuple[Release, ...]:
        """Somebody else loaded this one: at start, or because a client or a new configuration asked for it. Returns
        what is not kept any more: not the one that it displaces either, if that was the same."""
        before = self.live
        for event in (ReleaseEvent.VERIFIED, ReleaseEvent.LOADED, ReleaseEvent.CHECKED):
            release.go(event, now)
        self.refusal = None
        again = tuple(one for one in (before, *self.previous) if one is not None and one.identity == release.identity)
        self.previous = tuple(one for one in self.previous if one not in again)
        if before in again:
            self.live = None
        for one in again:
            one.go(ReleaseEvent.DROPPED, now)
        self._trial_since = now
        self.meant = release.identity
        return (*again, *self.swapped(release, by, now, "loaded"))

    def unloaded(self, by: str, now: float) -> None:
        """Somebody took the model out of service."""
        if self.live is not None:
            self._trial_since = now
            self._record("unloaded", by, self.live, None, now)
        self._drop_all(now)

    def hold(self, identity: str) -> None:
        """What serves was chosen by an operator, before a restart, instead of this, which the source means."""
        self.meant = self.withheld = identity

    def forgive(self) -> None:
        """What was refused may be tried again: the configuration has changed."""
        self.refusal = None

    def _drop_all(self, now: float) -> None:
        for release in (self.live, self.trial, *self.previous):
            if release is not None:
                release.go(ReleaseEvent.DROPPED, now)
        self.live = self.trial = None
        self.previous = ()

    def _record(
        self, outcome: Outcome, by: str, before: Release | None, after: Release | None, now: float, why: str = ""
    ) -> Happened:
        happened = Happened(
            at=now,
            outcome=outcome,
            by=by,
            from_version=before.version if before is not None else "",
            from_digest=before.digest if before is not None else "",
            to_version=after.version if after is not None else "",
            to_digest=after.digest if after is not None else "",
            to_uri=after.uri if after is not None else "",
            why=why,
            took_s=round(now - self._trial_since, 3),
        )
        self.history.append(happened)
        return happened

    def __repr__(self) -> str:
        return f"<ModelReleases live={self.live} trial={self.trial} previous={len(self.previous)}>"
