"""What is remembered of input that breaks replicas, and how much may be spent on finding it out.

  * `fingerprint`: 128 bits that name an input of a model version. Its key is secret and made afresh in every process,
    so that nobody outside can make two inputs meet. Only computed for a request that was found guilty, and for all
    requests while the denylist holds something;
  * `Denylist`: fingerprints that are refused unexecuted, 10 minutes, at most 10 000: a second hit costs no backend
    work. What is denied again meanwhile starts anew;
  * `QuarantineAllowance`: runs of suspects per second, apart from the retry budget, so that poison cannot use that up;
  * `CrashWatch`: a model that crashes more than four workers a minute has its rows run alone for a while;
  * `OutageWatch`: many failures and not one success in between is no poison, and looking for it would only add load.

Rules: resilience notes §1.4. Time is an argument (monotonic seconds); everything here is bounded.
"""

from __future__ import annotations

import hashlib
import struct
from collections import deque
from dataclasses import dataclass
from typing import Final

from gateway.core.assembly import encode_values
from gateway.core.request import InferRequest

DENIED_S: Final = 600.0
MAX_DENIED: Final = 10_000
QUARANTINE_PER_S: Final = 64.0
CRASHES: Final = 4
"""Crashes within `CRASH_WINDOW_S` that a model may have before its rows run alone for `ALONE_S`."""
CRASH_WINDOW_S: Final = 60.0
ALONE_S: Final = 60.0
OUTAGE_FAILURES: Final = 64
"""Failed attempts in a row that mean an outage: more than the 63 runs in which a batch of 32 guilty rows is halved."""

_HEAD: Final = struct.Struct("<BBQ")
_ABSENT: Final = b"\xff"


def fingerprint(key: bytes, model: str, version: str, request: InferRequest) -> bytes:
    """16 bytes for what `request` asks of `version` of `model`: outputs, parameters that a backend sees, and inputs
    with datatype, shape and content. `key`: up to 64 secret bytes.

    Equal for equal tensors, whether they came as JSON or as bytes. BYTES values are in binary form either way.
    """
    digest = hashlib.blake2b(digest_size=16, key=key)
    parameters = repr(sorted(request.parameters.items())) if request.parameters else ""
    for text in (model.encode(), version.encode(), parameters.encode()):
        digest.update(struct.pack("<Q", len(text)))
        digest.update(text)
    digest.update(struct.pack(f"<Q{len(request.outputs)}Q", len(request.outputs), *request.outputs))
    for tensor in request.inputs:
        if tensor is None:
            digest.update(_ABSENT)
            continue
        data = tensor.buffer if tensor.values is None else encode_values(tensor.datatype, tensor.values)
        shape = tensor.shape
        digest.update(_HEAD.pack(tensor.datatype.code, len(shape), len(data or b"")))
        digest.update(struct.pack(f"<{len(shape)}Q", *shape))
        if data is not None:
            digest.update(data)
    return digest.digest()


@dataclass(frozen=True, slots=True)
class DenylistStatistics:
    """`denied`: verdicts ever; `hits`: requests refused because of them."""

    entries: int
    denied: int
    hits: int


class Denylist:
    """Fingerprints and until when they are refused, in the order in which they expire.

    Invariants: never more than `most` entries (the oldest goes first); an entry older than `ttl_s` refuses nobody.
    """

    __slots__ = ("_entries", "_hits", "_total", "_ttl_s", "most")

    def __init__(self, ttl_s: float = DENIED_S, most: int = MAX_DENIED) -> None:
        self.most = most
        self._ttl_s = ttl_s
        self._entries: dict[bytes, float] = {}
        self._total = self._hits = 0

    def __len__(self) -> int:
        """Entries kept; only while there are some does a request need its fingerprint. See `expire`."""
        return len(self._entries)

    def deny(self, mark: bytes, now: float) -> None:
        """`mark` was found guilty at `now`."""
        self.expire(now)
        self._entries.pop(mark, None)
        while len(self._entries) >= self.most:
            del self._entries[next(iter(self._entries))]
        self._entries[mark] = now + self._ttl_s
        self._total += 1

    def denied(self, mark: bytes, now: float) -> bool:
        """Whether a request with this fingerprint is refused."""
        self.expire(now)
        hit = mark in self._entries
        self._hits += hit
        return hit

    def expire(self, now: float) -> None:
        """Forget what has expired; constant time while nothing has."""
        while self._entries:
            oldest = next(iter(self._entries))
            if self._entries[oldest] > now:
                return
            del self._entries[oldest]

    def clear(self) -> None:
        self._entries.clear()

    def statistics(self) -> DenylistStatistics:
        return DenylistStatistics(len(self._entries), self._total, self._hits)

    def __repr__(self) -> str:
        return f"<Denylist {len(self._entries)} of {self.most}>"


class QuarantineAllowance:
    """A token bucket: `per_s` runs of suspects per second, one second's worth at most saved up."""

    __slots__ = ("_then", "_tokens", "per_s", "spent")

    def __init__(self, per_s: float = QUARANTINE_PER_S) -> None:
        self.per_s = per_s
        self.spent = 0
        """Runs allowed, ever."""
        self._tokens = per_s
        self._then: float | None = None

    def take(self, now: float) -> bool:
        """Whether a run of suspects may start now; if so it is paid for."""
        self._refill(now)
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        self.spent += 1
        return True

    def next_at(self, now: float) -> float:
        """When the next run may start; `now` if it may already."""
        self._refill(now)
        return now if self._tokens >= 1.0 else now + (1.0 - self._tokens) / self.per_s + 1e-6

    def _refill(self, now: float) -> None:
        if self._then is not None and now > self._then:
            self._tokens = min(self._tokens + (now - self._then) * self.per_s, self.per_s)
        self._then = now if self._then is None else max(now, self._then)

    def __repr__(self) -> str:
        return f"<QuarantineAllowance {self._tokens:.1f} of {self.per_s:.0f}>"


class CrashWatch:
    """Crashes of the workers of one model (resilience notes §1.4: more than four a minute)."""

    __slots__ = ("_crashes", "alone_until")

    def __init__(self) -> None:
        self._crashes: deque[float] = deque(maxlen=CRASHES + 1)
        self.alone_until = float("-inf")
        """Until when every request of the model is to run by itself; in the past if not now."""

    def crashed(self, now: float) -> None:
        """A worker died, or had to be killed, while it executed a batch of the model."""
        self._crashes.append(now)
        if len(self._crashes) > CRASHES and now - self._crashes[0] <= CRASH_WINDOW_S:
            self.alone_until = now + ALONE_S

    def alone(self, now: float) -> bool:
        """Whether every request of the model is to run by itself now."""
        return now < self.alone_until

    def __repr__(self) -> str:
        return f"<CrashWatch {len(self._crashes)} crashes, alone until {self.alone_until:.1f}>"


class OutageWatch:
    """Failed attempts of one model since its last success, whatever the lane."""

    __slots__ = ("failures", "limit")

    def __init__(self, limit: int = OUTAGE_FAILURES) -> None:
        self.limit = limit
        self.failures = 0

    def failed(self) -> None:
        """An attempt ran and failed."""
        self.failures += 1

    def succeeded(self) -> None:
        self.failures = 0

    @property
    def outage(self) -> bool:
        return self.failures >= self.limit

    def __repr__(self) -> str:
        return f"<OutageWatch {self.failures} of {self.limit}>"
