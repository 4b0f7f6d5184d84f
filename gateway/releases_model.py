"""One model whose releases are followed: what is known of them, and how it is told.

`Result`, `ReleaseStatus` and `ModelReleasesStatus` are what operators see; their field names are part of the interface.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from gateway.catalog import ServedVersion, confirm
from gateway.core.release import OUTCOMES, Happened, ModelReleases, Release
from gateway.core.signature_compatibility import incompatibilities
from gateway.errors import LoadFailed
from gateway.releases_sources import Following

log = logging.getLogger("gateway.releases")
audit = logging.getLogger("gateway.audit")

ResultOutcome = Literal["serves", "withheld", "refused", "swapped", "rolled_back", "promoted"]
SWAPS: Final = ("swapped", "rolled_back", "promoted")


@dataclass(frozen=True, slots=True)
class Result:
    """What came of asking."""

    model: str
    outcome: ResultOutcome
    version: str
    """That serves now."""
    digest: str
    text: str


@dataclass(frozen=True, slots=True)
class ReleaseStatus:
    """One release of a model that is here."""

    role: str
    version: str
    digest: str
    identity: str
    uri: str
    since: float
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True)
class ModelReleasesStatus:
    """What `/api/models/M/releases` shows."""

    model: str
    followed: bool
    interval_s: float
    reference: str
    asked_at: float | None
    """When its source was asked last, seconds since 1970."""
    trouble: str
    """Why the source could not be asked; empty: it could."""
    refused: str
    """Why what the source means now does not serve; empty where nothing was refused."""
    withheld: str
    """What was rolled back from and is not followed until the source means something else."""
    remembers: bool
    """Whether a restart knows what is withheld."""
    releases: Sequence[ReleaseStatus]
    history: Sequence[Happened]
    """The newest last."""
    swaps: dict[str, int] = field(default_factory=dict)
    """How often, by outcome."""
    last_swap: float = 0.0
    """Seconds since 1970; 0.0: never."""


class FollowedModel:
    """One model that was loaded: its releases, and who serves each."""

    __slots__ = (
        "asked_at",
        "following",
        "last_swap",
        "name",
        "noting",
        "said",
        "served",
        "swaps",
        "task",
        "track",
        "trial",
        "trouble",
    )

    def __init__(self, name: str, following: Following) -> None:
        self.name = name
        self.following = following
        self.track = ModelReleases(following.keep)
        self.served: dict[Release, list[ServedVersion]] = {}
        self.trial: asyncio.Task[Result] | None = None
        """A release is being tried."""
        self.noting = asyncio.Lock()
        """Held while it is written down what serves."""
        self.task: asyncio.Task[None] | None = None
        self.asked_at: float | None = None
        self.trouble = self.said = ""
        self.swaps: dict[str, int] = dict.fromkeys(OUTCOMES, 0)
        self.last_swap = 0.0

    def end_trial(self) -> None:
        """Whoever waits for the trial is told; what it has loaded is freed in its own time."""
        if self.trial is not None and not self.trial.cancelling():
            self.trial.cancel()

    async def note(self, release: Release) -> None:
        """Have it written down that `release` serves, if it still does when others have written."""
        async with self.noting:
            if self.track.live is release:
                chosen = (self.following.reference, self.track.withheld) if self.following.remembers else ("", "")
                await confirm(self.served[release], *chosen)

    def tell(self) -> Happened:
        """Log and count the newest line of the history."""
        happened = self.track.history[-1]
        self.swaps[happened.outcome] = self.swaps.get(happened.outcome, 0) + 1
        if happened.outcome in SWAPS:
            self.last_swap = happened.at
        about = {"digest": happened.to_digest} if happened.to_digest else {}
        old, new = happened.from_version or "-", happened.to_version or "-"
        what = happened.outcome.replace("_", " ")
        versions = f"version {old} -> {new}" if happened.from_version else f"version {new}"
        if happened.outcome in ("refused", "failed"):
            again = "" if happened.outcome == "refused" else "; it is tried again"
            log.error(
                "model %s: version %s does not take the place of %s: %s%s", self.name, new, old, happened.why, again,
                extra=about,
            )  # fmt: skip
        else:
            took = f" in {happened.took_s:.3f} s" if happened.took_s else ""  # nobody timed what was there at the start
            log.info(
                "model %s: %s by %s: %s%s", self.name, what, happened.by, versions, took, extra=about
            )  # fmt: skip
        audit.info("model %s: %s by %s, %s", self.name, what, happened.by, versions)
        return happened

    def result(self, outcome: ResultOutcome, text: str) -> Result:
        live = self.track.live
        version, digest = (live.version, live.digest) if live is not None else ("", "")
        return Result(self.name, outcome, version, digest, text)

    def status(self, *, followed: bool) -> ModelReleasesStatus:
        track = self.track
        here = [("live", track.live), ("trial", track.trial), *[("previous", one) for one in track.previous]]
        return ModelReleasesStatus(
            model=self.name,
            followed=followed,
            interval_s=self.following.interval_s,
            reference=self.following.reference,
            asked_at=self.asked_at,
            trouble=self.trouble,
            refused=track.refusal[1] if track.refusal is not None else "",
            withheld=self._withheld(),
            remembers=self.following.remembers,
            releases=[
                ReleaseStatus(role, one.version, one.digest, one.identity, one.uri, one.since)
                for role, one in here
                if one is not None
            ],
            history=list(track.history),
            swaps=dict(self.swaps),
            last_swap=self.last_swap,
        )

    def _withheld(self) -> str:
        """By the name that people know it by, where it is here or was on its way."""
        track = self.track
        known = (one for one in (track.trial, *track.previous) if one is not None and one.identity == track.withheld)
        found = next(known, None)
        return track.withheld if found is None else f"version {found.version} ({found.uri})"

    def __repr__(self) -> str:
        return f"<FollowedModel {self.name} {self.track}>"


def versions_of(served: Sequence[ServedVersion]) -> str:
    return ", ".join(version.version for version in served)


def digest_of(served: Sequence[ServedVersion]) -> str:
    """Of the highest version."""
    artifact = served[-1].artifact if served else None
    return artifact.digest if artifact is not None else ""


def uri_of(served: Sequence[ServedVersion]) -> str:
    artifact = served[-1].artifact
    return served[-1].wanted.uri or (artifact.source if artifact is not None else "")


def named(release: Release, *, full: bool) -> str:
    """In one sentence with another; `full`: with its digest too."""
    return f"version {release.version} ({release.digest})" if full else f"version {release.version}"


def obstacle_of(kept: Sequence[ServedVersion]) -> str:
    """Why what is kept cannot answer now; empty: it can."""
    bad = next((version for version in kept if not version.ready), None)
    return "" if bad is None else f"version {bad.version} is kept, but cannot answer: {bad.obstacle}"


def check_fit(champions: Sequence[ServedVersion], staged: Sequence[ServedVersion]) -> None:
    """Whether the staged release may answer the callers of the one that serves. Raises LoadFailed."""
    live = {version.version: version for version in champions if version.loaded}
    newest = max(staged, key=lambda version: int(version.version))
    for version in staged:
        if not version.ready:
            raise LoadFailed(f"version {version.version} was lost again: {version.obstacle}")
    if not live:
        return
    serving = max(live.values(), key=lambda version: int(version.version))
    pairs = [(serving, newest)]
    pairs += [(live[v.version], v) for v in staged if v.version in live and v is not newest]
    for now, then in pairs:
        if faults := incompatibilities(now.spec, then.spec):
            raise LoadFailed(
                f"version {then.version} does not fit the clients of version {now.version}: {'; '.join(faults)}"
            )
