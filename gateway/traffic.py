"""The split of one model's requests between the version its name means, the champion, and a canary beside it.

Who gets a request is `core/traffic_split.py`'s to say; this file knows who can take it. Rules:
  * the choice stands before a request is decoded, because versions differ in how they read it; where requests may
    belong to sequences it is read once to find out;
  * a sequence stays where its first step went, whatever the share does meanwhile. Of an ensemble that may hold
    sequences, their steps stay with the champion;
  * a canary that cannot answer now gives its share back: the champion answers, and that is counted and told. One that
    is merely busy answers what it can, and refuses the rest as any model does: it shows what it is worth;
  * steps of ensembles, shadows and everything else that the gateway asks by itself meets champions only.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Final, Protocol

from gateway.catalog import ServedVersion
from gateway.core.request import InferRequest
from gateway.core.traffic_split import Headers, SplitRule, to_canary
from gateway.ensemble import Ensemble
from gateway.sequence_scheduler import SequenceScheduler

log = logging.getLogger("gateway.traffic")

TOLD_EVERY_S: Final = 60.0

Read = Callable[[ServedVersion], InferRequest]
"""Decodes the request as a version does; raises InvalidRequest."""


class Chance(Protocol):
    """`random.Random` fits."""

    def random(self) -> float: ...


class Split:
    """Of one model; hangs on its champion as `ServedVersion.split`."""

    def __init__(self, name: str, rule: SplitRule, chance: Chance, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self.rule = rule
        """May be replaced at any time."""
        self.canary: ServedVersion | None = None
        """None: there is none that could answer."""
        self.fallbacks = 0
        """Requests of the canary's share that the champion answered."""
        self._draw = chance.random
        self._now = clock
        self._told = -math.inf
        self._untold = 0

    def choose(self, champion: ServedVersion, headers: Headers, read: Read) -> ServedVersion:
        """Who answers a request that names no version; `champion`: whom the name means.

        Raises:
            InvalidRequest: it had to be read for that, and cannot be.
        """
        if isinstance(champion.scheduler, Ensemble | SequenceScheduler):
            return self._with_sequences(champion, headers, read)
        return self._drawn(champion, headers)

    def _drawn(self, champion: ServedVersion, headers: Headers) -> ServedVersion:
        if to_canary(self.rule, headers, self._draw)[0]:
            canary = self.canary
            if canary is not None and canary.ready:
                canary.chosen += 1
                return canary
            self._fell_back(canary)
        champion.chosen += 1
        return champion

    def _with_sequences(self, champion: ServedVersion, headers: Headers, read: Read) -> ServedVersion:
        step = read(champion).sequence
        if step is None:
            return self._drawn(champion, headers)
        if not isinstance(champion.scheduler, SequenceScheduler):
            champion.chosen += 1
            return champion
        for version in (champion, self.canary):
            scheduler = version.scheduler if version is not None else None
            if version is not None and isinstance(scheduler, SequenceScheduler) and scheduler.holds(step.id):
                version.chosen += 1
                return version
        if not step.start:  # nobody knows it: the champion says so
            champion.chosen += 1
            return champion
        return self._drawn(champion, headers)

    def _fell_back(self, canary: ServedVersion | None) -> None:
        self.fallbacks += 1
        self._untold += 1
        now = self._now()
        if now - self._told < TOLD_EVERY_S:
            return
        why = canary.obstacle if canary is not None else "it is not loaded"
        log.warning(
            "model %s: the canary cannot answer (%s); %d of its requests went to the champion", self.name, why,
            self._untold,
        )  # fmt: skip
        self._told, self._untold = now, 0

    def __repr__(self) -> str:
        return f"<Split {self.name} share={self.rule.share:g} canary={self.canary!r}>"
