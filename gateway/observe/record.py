"""What is counted about one model version: plain integers and lists, so that requests hardly notice.

Decides what an event means for the counters (Triton's semantics where Triton has the counter):
  * a batch is recorded once; every answered member is charged the whole batch's compute time;
  * `success` are requests answered, from a batch or from the response cache; `failures` those that ended otherwise, by
    Triton's reasons;
  * requests refused as invalid are in `codes` only: neither success nor failure; `failed` (Triton's `fail` statistic)
    leaves out those that were turned away at once as well (queue full, not ready) and holds what had been accepted;
  * an answer from the cache is a success that was never executed: it is in no `inference_count` and no `compute_*`.

Rules: everything here runs on the event loop's thread and takes no lock. A float per request is parked in a
list and folded into buckets by numpy when `FOLD_AT` have gathered or when somebody reads: memory is bounded.
Invariants: counters never decrease; `sum(Histogram.counts) == Histogram.count`.
Label sets stay bounded: protocols, codes, reasons and outcomes come from the gateway, never from a client.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Literal

import numpy as np

from gateway.core.batching import Reason

FailureReason = Literal["REJECTED", "CANCELED", "BACKEND", "OTHER"]

HedgeOutcome = Literal["won", "lost", "failed"]
"""Of a second attempt beside the first: it answered first, the first did, or it failed."""
HEDGE_OUTCOMES: Final[tuple[HedgeOutcome, ...]] = ("won", "lost", "failed")

FAILURE_REASONS: Final[tuple[FailureReason, ...]] = ("REJECTED", "CANCELED", "BACKEND", "OTHER")

DURATION_BOUNDS_S: Final = (
    0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
PHASE_BOUNDS_S: Final = (0.00005, 0.0001, *DURATION_BOUNDS_S)
"""Queue wait and overhead are often far below a quarter of a millisecond."""
ROW_BOUNDS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

EXPIRED: Final = frozenset(("deadline", "timeout", "sequence", "retry_budget_exhausted"))
"""Reasons of rejection that end a request which had been accepted: its time ran out in the queue, or that of an earlier
request of its sequence, or there was no credit to repeat an attempt that failed."""

RECENT_BATCHES: Final = 1024
"""Executions that quantiles are made of."""

FOLD_AT: Final = 4096
"""Parked values that trigger a fold: about 0.2 ms of work, 40 ns a value."""


class Histogram:
    """Counts per bucket with exact sum and count; upper bounds are inclusive, the last bucket is open.

    The fastest way in is `histogram.pending.append(value)`: `pending` stays the same list for ever. Whoever
    uses it calls `fold_if_full()` now and then.
    """

    __slots__ = ("_bounds", "bounds", "counts", "pending", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self._bounds = np.asarray(bounds, dtype=np.float64)
        self.counts = [0] * (len(self.bounds) + 1)
        """One more than `bounds`; not cumulative. Call `fold` before reading."""
        self.sum = 0.0
        """Of everything folded."""
        self.pending: list[float] = []

    @property
    def count(self) -> int:
        return sum(self.counts)

    def add(self, value: float) -> None:
        self.pending.append(value)
        if len(self.pending) >= FOLD_AT:
            self.fold()

    def fold_if_full(self) -> None:
        if len(self.pending) >= FOLD_AT:
            self.fold()

    def fold(self) -> None:
        """Move everything parked into the buckets."""
        if not self.pending:
            return
        values = np.array(self.pending, dtype=np.float64)
        self.pending.clear()
        places = np.searchsorted(self._bounds, values, side="left")
        for index, n in enumerate(np.bincount(places, minlength=len(self.counts)).tolist()):
            self.counts[index] += n
        self.sum += float(values.sum())

    def cumulative(self) -> list[int]:
        """Counts of values ≤ each bound and, last, of all; folds first. Length `len(bounds) + 1`."""
        self.fold()
        total = 0
        return [total := total + n for n in self.counts]

    def __repr__(self) -> str:
        return f"<Histogram count={self.count} sum={self.sum:g} parked={len(self.pending)}>"


class RowHistogram:
    """Histogram over rows of executed batches; integer arithmetic, so nothing is parked."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self) -> None:
        self.bounds = ROW_BOUNDS
        self.counts = [0] * (len(ROW_BOUNDS) + 1)
        self.sum = 0

    def add(self, rows: int) -> None:
        index = (rows - 1).bit_length() if rows > 0 else 0
        self.counts[min(index, len(ROW_BOUNDS))] += 1
        self.sum += rows

    def cumulative(self) -> list[int]:
        total = 0
        return [total := total + n for n in self.counts]

    def __repr__(self) -> str:
        return f"<RowHistogram batches={sum(self.counts)} rows={self.sum}>"


class ProtocolStatistics:
    """One model version as seen through one protocol ("http", "grpc")."""

    __slots__ = ("_parked", "_phases", "codes", "durations")

    def __init__(self, phases: tuple[Histogram, Histogram]) -> None:
        self.codes: dict[int, int] = {}
        """Requests by status code: HTTP's, or gRPC's number."""
        self.durations = Histogram(DURATION_BOUNDS_S)
        """Seconds from arrival to the answer being handed to the transport; answered requests only."""
        self._phases = phases
        self._parked = (self.durations.pending, phases[0].pending, phases[1].pending)

    def answered(self, total_s: float, queue_s: float, execute_s: float, code: int = 200) -> None:
        """One request was answered from a batch: the only call the request path makes per request."""
        codes = self.codes
        codes[code] = codes.get(code, 0) + 1
        totals, waits, rests = self._parked
        totals.append(total_s)
        waits.append(queue_s)
        rest = total_s - queue_s - execute_s
        rests.append(rest if rest > 0.0 else 0.0)  # noqa: FURB136 - max() costs a call per request
        # The shared phases hold no more than one such list for each protocol.
        if len(totals) >= FOLD_AT:
            for phase in self._phases:
                phase.fold()
            self.durations.fold()

    def count(self, code: int, n: int = 1) -> None:
        """`n` requests ended with `code` without an answer from a batch."""
        self.codes[code] = self.codes.get(code, 0) + n

    def __repr__(self) -> str:
        return f"<ProtocolStatistics codes={self.codes}>"


class BatchSizeStatistics:
    """Executions of one batch size; nanoseconds once per execution, not per request."""

    __slots__ = ("compute_infer_ns", "compute_input_ns", "compute_output_ns", "count")

    def __init__(self) -> None:
        self.count = 0
        self.compute_input_ns = 0
        self.compute_infer_ns = 0
        self.compute_output_ns = 0


class Recent:
    """Durations of the newest executions, for quantiles: nanoseconds, the mean of a batch for each of its requests."""

    __slots__ = ("_rows",)

    def __init__(self) -> None:
        self._rows: deque[tuple[int, int, int, int, int]] = deque(maxlen=RECENT_BATCHES)

    def add(self, requests: int, queue_ns: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """`queue_ns` is the sum over `requests`, at least 1."""
        self._rows.append((requests, queue_ns // requests, input_ns, infer_ns, output_ns))

    def quantiles(self, wanted: Sequence[float]) -> dict[str, list[float]]:
        """Nanoseconds at each wanted quantile, of `request`, `queue`, `compute_input`, `compute_infer` and
        `compute_output`; NaN while nothing was executed."""
        names = ("request", "queue", "compute_input", "compute_infer", "compute_output")
        if not self._rows:
            return {name: [math.nan] * len(wanted) for name in names}
        rows = np.array(self._rows, dtype=np.float64)
        weights = rows[:, 0].astype(np.int64)
        columns = [rows[:, 1:].sum(axis=1), *rows[:, 1:].T]
        found = {}
        for name, column in zip(names, columns, strict=True):
            values = np.quantile(np.repeat(column, weights), wanted, method="inverted_cdf")
            found[name] = [float(value) for value in values]
        return found


class ModelStatistics:
    """All counters of one model version. Fields are public to read; only the methods write.

    Durations are nanoseconds (`*_ns`) or seconds (`*_s`), accumulated since the version was loaded.
    """

    __slots__ = (
        "_wall_clock_ns", "attempts", "batch_sizes", "batches", "cache_hit_ns", "cache_hits", "cache_miss_ns",
        "cache_misses", "compute_infer_ns", "compute_input_ns", "compute_output_ns", "execute", "execution_count",
        "failed", "failed_ns", "failures", "hedges", "inference_count", "last_inference_ms", "overhead", "poisoned",
        "protocols", "quarantine_attempts", "queue_ns", "queue_waits", "recent", "rejected", "retries", "rows",
        "success", "success_ns",
    )  # fmt: skip

    def __init__(self, wall_clock_ns: Callable[[], int] = time.time_ns) -> None:  # noqa: PLR0915  # a line a counter
        """`wall_clock_ns`: nanoseconds since 1970, read once a batch."""
        self._wall_clock_ns = wall_clock_ns
        self.protocols: dict[str, ProtocolStatistics] = {}
        self.success = 0
        """Requests answered."""
        self.success_ns = 0
        """From arrival to the end of the execution (or of the look-up), summed over answered requests."""
        self.failed = 0
        """Accepted requests that ended without an answer; see the header."""
        self.failed_ns = 0
        """From arrival to their end, where it is known."""
        self.last_inference_ms = 0
        """When the newest batch or cached answer was done: milliseconds since 1970; 0: never."""
        self.cache_hits = 0
        self.cache_hit_ns = 0
        """Spent on look-ups that found an answer."""
        self.cache_misses = 0
        self.cache_miss_ns = 0
        """Spent on look-ups that found none, and on storing answers."""
        self.batch_sizes: dict[int, BatchSizeStatistics] = {}
        """Executions by rows; no more entries than the model's largest batch has rows."""
        self.recent: Recent | None = None
        """Kept only where somebody wants quantiles of it."""
        self.failures: dict[str, int] = dict.fromkeys(FAILURE_REASONS, 0)
        self.inference_count = 0
        """Rows executed successfully."""
        self.execution_count = 0
        """Batches executed successfully."""
        self.queue_ns = 0
        self.compute_input_ns = 0
        self.compute_infer_ns = 0
        self.compute_output_ns = 0
        self.batches: dict[str, int] = {reason.value: 0 for reason in Reason}
        """Executed batches by the reason they left the queue."""
        self.rows = RowHistogram()
        self.attempts: dict[tuple[str, str], int] = {}
        """Attempts by (backend, outcome): "ok" or the value of a `FailureKind`."""
        self.retries = 0
        """Requests sent to a backend again after a failed attempt."""
        self.hedges: dict[HedgeOutcome, int] = dict.fromkeys(HEDGE_OUTCOMES, 0)
        """Batches that were also sent to a second backend because the first was late, by what the second came to."""
        self.poisoned = 0
        """Requests found to break backends by themselves, and those refused for being equal to one."""
        self.quarantine_attempts = 0
        """Batches of suspects, who run apart from everyone else until it is known whose fault a failure was."""
        self.rejected: dict[str, int] = {}
        """Requests refused by admission, by the error's `reason`."""
        self.queue_waits = Histogram(PHASE_BOUNDS_S)
        """Seconds, one per answered request."""
        self.execute = Histogram(PHASE_BOUNDS_S)
        """Seconds from dispatch to outcome, one per batch."""
        self.overhead = Histogram(PHASE_BOUNDS_S)
        """Seconds of a request's duration that were neither queue nor execution, one per answered request."""

    def protocol(self, name: str) -> ProtocolStatistics:
        """The part of one protocol; resolve once and keep it, not once per request."""
        found = self.protocols.get(name)
        if found is None:
            found = self.protocols[name] = ProtocolStatistics((self.queue_waits, self.overhead))
        return found

    def record_batch(
        self,
        backend: str,
        rows: int,
        requests: int,
        reason: str,
        compute_input_ns: int,
        compute_infer_ns: int,
        compute_output_ns: int,
        queue_s_total: float,
        execute_s: float,
    ) -> None:
        """A batch was executed and its `requests` answers delivered (callers that left are not counted).

        `rows` is what the model ran on, `reason` the value of a `core.batching.Reason`. `queue_s_total` is
        the sum of the answered members' waits in seconds. Counts the attempt on `backend` as a success too;
        per request there is `ProtocolStatistics.answered`.
        """
        self.attempt(backend, "ok")
        self.success += requests
        self.inference_count += rows
        self.execution_count += 1
        queue_ns = round(queue_s_total * 1e9)
        self.queue_ns += queue_ns
        self.success_ns += queue_ns + requests * round(execute_s * 1e9)
        self.last_inference_ms = self._wall_clock_ns() // 1_000_000
        size = self.batch_sizes.get(rows)
        if size is None:
            size = self.batch_sizes[rows] = BatchSizeStatistics()
        size.count += 1
        size.compute_input_ns += compute_input_ns
        size.compute_infer_ns += compute_infer_ns
        size.compute_output_ns += compute_output_ns
        if self.recent is not None and requests:
            self.recent.add(requests, queue_ns, compute_input_ns, compute_infer_ns, compute_output_ns)
        self.compute_input_ns += compute_input_ns * requests
        self.compute_infer_ns += compute_infer_ns * requests
        self.compute_output_ns += compute_output_ns * requests
        self.batches[reason] += 1
        self.rows.add(rows)
        self.execute.add(execute_s)

    def record_whole(self, compute_ns: tuple[int, int, int], execute_s: float) -> None:
        """A request that was executed in parts is answered: it is one request, charged what its batches took.

        `compute_ns` (input, infer, output) and `execute_s` are sums over those batches.
        """
        self.success += 1
        self.compute_input_ns += compute_ns[0]
        self.compute_infer_ns += compute_ns[1]
        self.compute_output_ns += compute_ns[2]
        self.success_ns += round(execute_s * 1e9)  # what its parts waited was added with their batches

    def record_cache_hit(self, lookup_ns: int, n: int = 1, queue_ns: int = 0) -> None:
        """`n` requests were answered from the response cache; `lookup_ns` and `queue_ns` are their sums.

        `queue_ns` is what they waited for, for instance while the first of several equal requests was executed.
        """
        self.success += n
        self.cache_hits += n
        self.cache_hit_ns += lookup_ns
        self.queue_ns += queue_ns
        self.success_ns += lookup_ns + queue_ns
        self.last_inference_ms = self._wall_clock_ns() // 1_000_000

    def record_cache_miss(self, ns: int, n: int = 1) -> None:
        """`n` look-ups found nothing; `ns` is the time of those look-ups and of storing the answers.

        The requests themselves are counted when they are answered, like any other; with `n` 0 time is added to a
        miss that was counted before.
        """
        self.cache_misses += n
        self.cache_miss_ns += ns

    def attempt(self, backend: str, outcome: str) -> None:
        """An attempt ended; failed ones only, `record_batch` counts the successful ones."""
        key = (backend, outcome)
        self.attempts[key] = self.attempts.get(key, 0) + 1

    def retry(self, n: int = 1) -> None:
        """`n` requests are going to a backend again."""
        self.retries += n

    def hedge(self, outcome: HedgeOutcome) -> None:
        """A batch that was sent to a second backend as well is over."""
        self.hedges[outcome] += 1

    def poison(self, n: int = 1) -> None:
        """`n` requests were told that they break backends."""
        self.poisoned += n

    def quarantine(self) -> None:
        """A batch of suspects was sent."""
        self.quarantine_attempts += 1

    def count(self, protocol: str, code: int, n: int = 1) -> None:
        """`n` requests ended with `code` without an answer from a batch."""
        self.protocol(protocol).count(code, n)

    def reject(self, reason: str, n: int = 1, spent_s: float = 0.0) -> None:
        """Refused for load or state (queue full, deadline passed while queued, draining), not as invalid.

        `spent_s`: seconds from arrival to the refusal, summed; only kept for the reasons in `EXPIRED`.
        """
        self.rejected[reason] = self.rejected.get(reason, 0) + n
        self.failures["REJECTED"] += n
        if reason in EXPIRED:
            self.failed += n
            self.failed_ns += round(spent_s * 1e9)

    def fail(self, reason: FailureReason, n: int = 1, spent_s: float = 0.0) -> None:
        """`n` accepted requests ended without an answer, `spent_s` seconds (their sum) after they had arrived; for
        REJECTED use `reject`."""
        self.failures[reason] += n
        self.failed += n
        self.failed_ns += round(spent_s * 1e9)

    def __repr__(self) -> str:
        counts = f"success={self.success} rows={self.inference_count} batches={self.execution_count}"
        return f"<ModelStatistics {counts}>"
