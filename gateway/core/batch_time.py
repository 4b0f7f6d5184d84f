"""How long batches take on one replica: what is expected of the next one, and from when on something is wrong.

Three things are learned from the same observations (resilience notes §1.7), each in constant time and memory:

  * the **fit** S(b) = α + β·b, seconds for a batch of b rows *that is alone there*: least squares with forgetting 0.98.
    A batch that shared the replica with others says less. Alone it would have taken between took / in_flight (the
    replica works off one after the other) and took (they do not disturb each other), so the fit moves to the nearest
    point of that interval. Otherwise our own concurrency would soon be taken for the normal state of affairs, and
    nobody could see congestion any more;
  * the **load**, r = observed / S(b), as a peak-sensitive mean with a time constant of 10 s: it jumps up at once and
    comes down slowly (Finagle's and linkerd's peak EWMA). A failure counts as 5 s. In silence it goes back to what
    successes looked like, so that a replica that was punished is tried again;
  * **quantiles** of the time per size class (1, 2, 3-4, 5-8 … rows) as histograms with forgetting: p95 for hedging,
    p99.9 for attempt timeouts.

Invariants: α ≥ 0 and β ≥ 0, hence S(b) ≥ 0 and never falls with b, whatever was observed (one size only, outliers,
zeros); every answer is finite. Rows are counted, times are seconds, `now` is monotonic.
"""

# ruff: noqa: FURB136 - this runs for every batch, and min() and max() cost a call each

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Final

FORGETTING: Final = 0.98
"""Weight of the past per observation: the fit remembers about 50 batches."""
PRIOR_WEIGHT: Final = 0.5
"""How much the slope known so far weighs against the newest batches; only felt while all have nearly the same size."""
OUTLIER: Final = 3.0
"""No single batch counts as more than this many times what was expected: a pause of the machine is not a slope."""
SETTLED_FROM: Final = 5
"""Observations from which on outliers and company are told apart from the rule."""
LOAD_TAU_S: Final = 10.0
"""Time constant of the peak-sensitive mean (linkerd's decay)."""
FAILURE_S: Final = 5.0
"""What a failure counts as (linkerd's failure penalty): keeps a replica that fails fast from looking fast."""
START_S: Final = 0.03
"""What a batch is taken to need where nothing is known and the replica is already at work (linkerd's start value)."""
GOOD_WEIGHT: Final = 0.1
"""Share of the newest success in what successes look like."""
P95_SAMPLES: Final = 100
"""Observations of a size class below which its p95 is not known; and ..."""
TIMEOUT_SAMPLES: Final = 200
"""... below which no timeout is derived from it."""
EARLY_SAMPLES: Final = 5
EARLY_FACTOR: Final = 10.0
EARLY_FLOOR_S: Final = 1.0
"""Until then a generous rule, so that a server which hangs early in the life of a version is noticed in a second or so
instead of at its callers' deadlines."""
TIMEOUT_FACTOR: Final = 1.5
"""Times p99.9: AWS chooses a timeout by the share of false ones it tolerates, such as 0.1 %."""
TIMEOUT_FLOOR_S: Final = 0.05
MAX_BACKOFF: Final = 1024.0
WORKER_TIMEOUT_FLOOR_S: Final = 5.0
"""Below this no run on a worker is given up: it costs the process, and a machine that pauses is not a hung model."""
WORKER_TIMEOUT_FACTOR: Final = 10.0
"""... times the longest run seen, for its rows."""
PEAK_DECAY: Final = 0.99

SHORTEST_S: Final = 2e-5
"""Shorter times are all counted alike."""
BIN: Final = 1.1
"""Each bin of a histogram reaches 10 % further than the one before: the error of a quantile."""
BINS: Final = 180
"""Reach from 20 µs to about 560 s."""
SIZES: Final = 24
"""Size classes by powers of two; everything larger is in the last."""
REMEMBERED: Final = 2000.0
"""Observations a histogram remembers: twice what one in a thousand needs to be seen."""
_PER_BIN: Final = 1.0 / log(BIN)
_GROWTH: Final = 1.0 / (1.0 - 1.0 / REMEMBERED)
_RESCALE_AT: Final = 1e100
_FRESH: Final = 16
"""Observations during which a quantile is not computed anew."""


@dataclass(frozen=True, slots=True)
class BatchTimeStatistics:
    """Seconds, except `load` (observed / expected, peak-sensitive; 1.0 is normal) and `observations` (batches)."""

    base_s: float
    row_s: float
    load: float
    observations: int
    failures: int


class BatchTime:
    """Learns from every attempt on one replica of one model version; see the module's docstring."""

    __slots__ = (
        "_backoff", "_bb", "_bt", "_classes", "_count", "_failures", "_good", "_load", "_load_at", "_mean_b", "_mean_t",
        "_peak_row_s", "_peak_s", "_seen", "alpha", "beta",
    )  # fmt: skip

    def __init__(self, row_s: float = 0.0) -> None:
        """`row_s`: seconds a row took on trial, before there were clients; 0.0: nobody knows."""
        self.alpha = self.beta = 0.0
        """The fit: seconds per batch, and per row in it."""
        self._seen = self._failures = 0
        self._count = self._mean_b = self._mean_t = self._bb = self._bt = 0.0
        self._load = self._good = 1.0
        self._load_at = 0.0
        self._peak_s = 0.0
        self._peak_row_s = row_s
        self._classes: list[_Histogram | None] = [None] * SIZES
        self._backoff = [1.0] * SIZES
        """Factor of the timeout by size class: doubled by every timeout, 1.0 again after a success."""

    # -- learning ------------------------------------------------------------------------------------------------

    def observe(self, rows: int, took_s: float, now: float, in_flight: int = 1) -> None:
        """A batch of `rows` ≥ 1 rows was answered `took_s` seconds after it was sent.

        `in_flight`: batches that were on the replica together with it, itself included.
        """
        took_s = took_s if took_s > 0.0 else 0.0
        expected = self.alpha + self.beta * rows
        alone = took_s
        if self._seen >= SETTLED_FROM:
            if in_flight > 1:
                alone = min(max(expected, took_s / in_flight), took_s)
            if expected > 0.0:
                alone = alone if alone < OUTLIER * expected else OUTLIER * expected
        self._fit(rows, alone)
        expected = self.alpha + self.beta * rows
        ratio = took_s / expected if expected > 0.0 else 1.0
        self._good += GOOD_WEIGHT * ((ratio if ratio < OUTLIER else OUTLIER) - self._good)
        self._put_load(ratio, now)
        self._seen += 1
        peak_s, peak_row_s, row_s = self._peak_s * PEAK_DECAY, self._peak_row_s * PEAK_DECAY, took_s / rows
        self._peak_s = took_s if took_s > peak_s else peak_s
        self._peak_row_s = row_s if row_s > peak_row_s else peak_row_s
        size = (rows - 1).bit_length()
        if size >= SIZES:
            size = SIZES - 1
        histogram = self._classes[size]
        if histogram is None:
            histogram = self._classes[size] = _Histogram()
        histogram.put(took_s)
        self._backoff[size] = 1.0

    def failed(self, now: float) -> None:
        """An attempt failed, however fast: it counts as `FAILURE_S`."""
        self._failures += 1
        expected = self.alpha + self.beta * (self._mean_b or 1.0)
        self._put_load(max(1.0, FAILURE_S / (expected or START_S)), now)

    def timed_out(self, rows: int, now: float) -> None:
        """An attempt ended because its timeout passed. The next of that size gets twice the time, until one succeeds:
        otherwise a replica that became slower for good could never prove it (Karn's rule, RFC 6298 §5.5)."""
        self.failed(now)
        size = min((rows - 1).bit_length(), SIZES - 1)
        self._backoff[size] = min(self._backoff[size] * 2.0, MAX_BACKOFF)

    def forgive(self) -> None:
        """It proved itself after it had been ejected: the failures before that are forgotten, or nobody would choose it
        for a long time."""
        self._load = self._good

    def _fit(self, rows: int, took_s: float) -> None:
        """Least squares in moments about the mean, so that one size only is no division by zero.

        The slope is pulled from where it was to where the newest batches want it; with sizes that hardly differ they
        want it little. Then it is kept within 0 ≤ β ≤ mean time / mean rows, which is the same as α ≥ 0.
        """
        count = self._count * FORGETTING + 1.0
        share = 1.0 / count
        db, dt = rows - self._mean_b, took_s - self._mean_t
        mean_b = self._mean_b + db * share
        mean_t = self._mean_t + dt * share
        self._bb = bb = self._bb * FORGETTING + db * (rows - mean_b)
        self._bt = bt = self._bt * FORGETTING + db * (took_s - mean_t)
        self._count, self._mean_b, self._mean_t = count, mean_b, mean_t
        if not self._seen:
            self.beta = 0.5 * mean_t / mean_b  # nothing known: half of it is the batch, half its rows
            self._bb = self._bt = 0.0
        else:
            prior = PRIOR_WEIGHT * mean_b * mean_b
            beta, steepest = (bt + prior * self.beta) / (bb + prior), mean_t / mean_b
            self.beta = 0.0 if beta < 0.0 else steepest if beta > steepest else beta
        alpha = mean_t - self.beta * mean_b
        self.alpha = alpha if alpha > 0.0 else 0.0

    def _put_load(self, ratio: float, now: float) -> None:
        fade = exp((self._load_at - now) / LOAD_TAU_S) if now > self._load_at else 1.0
        if ratio >= self._good + (self._load - self._good) * fade:
            self._load = ratio
        else:
            self._load = ratio + (self._load - ratio) * fade
        self._load_at = now

    def _load_now(self, now: float) -> float:
        """The peak-sensitive mean at `now`: what was last known, on its way back to what successes look like."""
        if now <= self._load_at or self._load == self._good:
            return self._load
        return self._good + (self._load - self._good) * exp((self._load_at - now) / LOAD_TAU_S)

    # -- answers -------------------------------------------------------------------------------------------------

    @property
    def known(self) -> bool:
        """Whether any batch was ever answered here."""
        return self._seen > 0

    def predict_s(self, rows: int) -> float:
        """S(rows): seconds for a batch that is alone there; 0.0 while nothing was observed."""
        return self.alpha + self.beta * rows

    def load(self, now: float) -> float:
        """Observed / expected, peak-sensitive: 1.0 is normal, and much more after a failure."""
        return self._load_now(now)

    def score(self, rows: int, in_flight: float, now: float) -> float:
        """Seconds until a batch of `rows` rows sent now may be expected back; the lower, the better the replica.

        A replica that nobody has tried costs nothing while it is idle, so that it is tried, by one batch.
        """
        if not self._seen:
            return START_S * (in_flight + (0.0 if self._load == 1.0 else self._load_now(now)))
        load, good = self._load, self._good
        if now > self._load_at and load != good:  # as `_load_now`
            load = good + (load - good) * exp((self._load_at - now) / LOAD_TAU_S)
        return load * (self.alpha + self.beta * rows) * (in_flight + 1)

    def p95_s(self, rows: int) -> float | None:
        """95 of 100 batches of this size class take no longer; None below `P95_SAMPLES` observations."""
        histogram = self._classes[min((rows - 1).bit_length(), SIZES - 1)]
        return histogram.p95_s() if histogram is not None and histogram.seen >= P95_SAMPLES else None

    def attempt_timeout_s(self, rows: int) -> float | None:
        """Seconds after which a batch of `rows` rows is given up: 1.5 × p99.9, at least `TIMEOUT_FLOOR_S`.

        From its size class or, where that is hardly used, from the next larger one that is. Early on 10 × the longest
        run, at least 1 s. None: not known yet, and the members' deadlines bound the attempt, as they do anyway.
        """
        size = min((rows - 1).bit_length(), SIZES - 1)
        for histogram in self._classes[size:]:
            if histogram is not None and histogram.seen >= TIMEOUT_SAMPLES:
                return max(TIMEOUT_FACTOR * histogram.p999_s(), TIMEOUT_FLOOR_S) * self._backoff[size]
        if self._seen < EARLY_SAMPLES:
            return None
        longest, by_rows = self._peak_s, self._peak_row_s * rows
        return max(EARLY_FLOOR_S, EARLY_FACTOR * max(longest, by_rows)) * self._backoff[size]

    def worker_timeout_s(self, rows: int, latest_s: float) -> float:
        """The same for a worker of ours, where giving up kills a process: 10 × the longest run, at least 5 s.

        `latest_s`: seconds until the latest deadline among the members, which bounds it while nobody knows how long a
        row takes, not even from the trial at load.
        """
        if not self._peak_row_s:
            return max(WORKER_TIMEOUT_FLOOR_S, latest_s)
        longest, by_rows = self._peak_s, self._peak_row_s * rows
        timeout_s = WORKER_TIMEOUT_FACTOR * (by_rows if by_rows > longest else longest)
        return timeout_s if timeout_s > WORKER_TIMEOUT_FLOOR_S else WORKER_TIMEOUT_FLOOR_S

    @property
    def longest_s(self) -> float:
        """The longest recent run, seconds: peak-sensitive, slowly forgotten; 0.0 before the first."""
        return self._peak_s

    def statistics(self, now: float) -> BatchTimeStatistics:
        return BatchTimeStatistics(self.alpha, self.beta, self._load_now(now), self._seen, self._failures)

    def __repr__(self) -> str:
        return f"<BatchTime {1e3 * self.alpha:.3f} + {1e3 * self.beta:.4f} ms/row, load {self._load:.2f}, {self._seen}>"


def normalised(rows: int, took_s: float, pool: Sequence[BatchTime]) -> float | None:
    """How many times longer a batch took than the median of `pool` needs for one of that size; about 1.0 is normal.

    `pool`: the *other* replicas of the model, or a single slow one would be part of its own yardstick. Members of it
    that were never tried do not count; None with fewer than two that were: nobody to compare with.
    """
    expected = sorted([time.alpha + time.beta * rows for time in pool if time._seen])
    count = len(expected)
    if count < 2:
        return None
    half = count // 2
    middle = expected[half] if count % 2 else (expected[half - 1] + expected[half]) / 2
    return took_s / middle if middle > 0.0 else None


class _Histogram:
    """Times of one size class: bins of equal ratio, whose counts fade by 1 / `REMEMBERED` per observation.

    Instead of fading all bins, each observation weighs more than the one before; all are scaled down once in a while.
    """

    __slots__ = ("_bins", "_p95", "_p999", "_stale", "_total", "_unit", "seen")

    def __init__(self) -> None:
        self.seen = 0
        self._bins = [0.0] * BINS
        self._total = 0.0
        self._unit = 1.0
        self._stale = 0
        self._p95 = self._p999 = 0.0

    def put(self, took_s: float) -> None:
        at = int(log(took_s / SHORTEST_S) * _PER_BIN) + 1 if took_s > SHORTEST_S else 0
        self._bins[at if at < BINS else BINS - 1] += self._unit
        self._total += self._unit
        self._unit *= _GROWTH
        self.seen += 1
        self._stale -= 1
        if self._unit > _RESCALE_AT:
            scale = 1.0 / self._unit
            self._bins = [weight * scale for weight in self._bins]
            self._total = sum(self._bins)
            self._unit = 1.0

    def p95_s(self) -> float:
        if self._stale <= 0:
            self._compute()
        return self._p95

    def p999_s(self) -> float:
        if self._stale <= 0:
            self._compute()
        return self._p999

    def _compute(self) -> None:
        self._stale = _FRESH
        above, p999 = 0.0, -1
        for at in range(BINS - 1, -1, -1):
            above += self._bins[at]
            if p999 < 0 and above > 0.001 * self._total:
                p999 = at
            if above > 0.05 * self._total:
                self._p95, self._p999 = SHORTEST_S * BIN**at, SHORTEST_S * BIN**p999
                return
