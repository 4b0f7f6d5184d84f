"""How many batches one replica may have in flight, learned (resilience notes §1.7).

One at a time leaves a remote replica idle for a round trip; too many queue up there, where nobody can take them back.
Two rules, by what is known:

  * the backend tells its compute time c: L = ⌈S / c⌉, where S is the time of the batch alone (compute and overhead),
    smoothed; an idle share below `IDLE_TOLERATED` is not worth a second slot;
  * otherwise Gradient2 (Netflix concurrency-limits) on r = observed / S, once per window of ≥ 1 s and ≥ 10 batches:
    grad = clamp(1.5 / mean r, 0.5, 1), L ← 0.8 L + 0.2 (limit·grad + 1). Its long-term mean is S itself, which learns
    only from what concurrency cannot explain (core/batch_time.py). Raw times would not do: bigger batches are no
    congestion. The gradient belongs to the whole number that was in effect while r was seen, not to L.

An overload or a timeout costs one slot at once. Nothing grows while less than half of it is used.
Invariants: 1 ≤ limit ≤ maximum; with maximum 1 it is constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Final

WINDOW_S: Final = 1.0
WINDOW_BATCHES: Final = 10
TOLERANCE: Final = 1.5
"""How much longer than alone a batch may take before fewer are sent (Gradient2's default)."""
SMOOTHING: Final = 0.2
HEADROOM: Final = 1.0
"""What every window tries beyond what is known to work (Gradient2 adds 4: made for requests, not for batches)."""
ROUNDING: Final = 0.34
"""From two thirds on the next whole number is tried. Cutting off would never get there (the mean only approaches its
aim), halves would settle one too high where a round trip costs nothing."""
IDLE_TOLERATED: Final = 0.1
COMPUTE_WEIGHT: Final = 0.1
"""Share of the newest batch in the smoothed S / c."""


@dataclass(frozen=True, slots=True)
class SlotsStatistics:
    limit: int
    maximum: int
    exact: float
    """The limit before it is made a whole number."""


class AdaptiveSlots:
    """The limit of one replica; see the module's docstring."""

    __slots__ = ("_busiest", "_exact", "_held_until", "_ratio", "_samples", "_since", "_sum", "limit", "maximum")

    def __init__(self, maximum: int) -> None:
        """`maximum` ≥ 1: most batches in flight that may be learned."""
        self.maximum = max(maximum, 1)
        self.limit = 1
        """Batches that may be in flight now."""
        self._exact = 1.0
        self._ratio = 0.0
        self._held_until = float("-inf")
        self._since: float | None = None
        self._samples = self._busiest = 0
        self._sum = 0.0

    def observe(self, now: float, in_flight: int, took_s: float, predicted_s: float, compute_s: float) -> None:
        """A batch was answered `took_s` seconds after it was sent.

        `in_flight`: batches there together with it, itself included. `predicted_s`: S of its size, 0.0: unknown.
        `compute_s`: what the backend says it computed, 0.0: it does not say.
        """
        if self.maximum == 1 or predicted_s <= 0.0:
            return
        if compute_s > 0.0:
            self._by_compute_time(max(min(predicted_s / compute_s, self.maximum), 1.0), in_flight, now)
            return
        if self._since is None:
            self._since = now
        self._samples += 1
        self._sum += took_s / predicted_s
        self._busiest = max(self._busiest, in_flight)
        if self._samples >= WINDOW_BATCHES and now - self._since >= WINDOW_S:
            self._by_gradient(self._sum / self._samples)
            self._open_window(now)

    def overloaded(self, now: float) -> None:
        """It said that it has too much to do, or did not answer in time: one less, and no growth for the length of a
        window."""
        self._held_until = now + WINDOW_S
        self._set(self.limit - 1.0)
        self._open_window(now)

    def _by_compute_time(self, ratio: float, in_flight: int, now: float) -> None:
        self._ratio += (ratio - self._ratio) * (COMPUTE_WEIGHT if self._ratio else 1.0)
        wanted = float(ceil(self._ratio - IDLE_TOLERATED))
        if wanted < self._exact or (2 * in_flight >= self._exact and now >= self._held_until):
            self._set(wanted)

    def _by_gradient(self, load: float) -> None:
        gradient = min(max(TOLERANCE / load, 0.5), 1.0) if load > 0.0 else 1.0
        exact = (1.0 - SMOOTHING) * self._exact + SMOOTHING * (self.limit * gradient + HEADROOM)
        if exact < self._exact or 2 * self._busiest >= self._exact:
            self._set(exact)

    def _set(self, exact: float) -> None:
        self._exact = min(max(exact, 1.0), float(self.maximum))
        self.limit = int(self._exact + ROUNDING)

    def _open_window(self, now: float) -> None:
        self._since = now
        self._samples = self._busiest = 0
        self._sum = 0.0

    def statistics(self) -> SlotsStatistics:
        return SlotsStatistics(self.limit, self.maximum, self._exact)

    def __repr__(self) -> str:
        return f"<AdaptiveSlots {self.limit} of {self.maximum}>"
