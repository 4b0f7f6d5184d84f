"""What becomes of the members of a batch that failed.

Three lanes lead to a replica. *Clean*: the common queue. *Retry*: members that failed through no fault of theirs, as
far as is known; the same group once more, elsewhere. *Quarantine*: members one of whom may be the cause; never with
anybody else, and one such batch at a time, so that one replica at most is at risk (resilience notes §1.3, §1.4).

Rules, in the order in which they are looked at:
  * nothing reached a backend (NOT_SENT): elsewhere, as often as it takes; the deadline ends it;
  * a model that is not idempotent gets nothing executed twice: everything else fails its members;
  * refused for load (OVERLOAD): elsewhere, paid from the retry budget;
  * the worker died of somebody else's batch (BYSTANDER): back to where they were, free of charge;
  * an answer that says no (SUSPECT, or BROKEN and ANSWERED). From the gateway's own workers: every replica runs the
    same file and would say the same, so the offender is looked for at once, by halving. From a remote server: the same
    members on another replica first. If that succeeds the first replica is to blame, otherwise they are halved;
  * no answer (BROKEN, TIMEOUT): the same members once more elsewhere; after the second time each runs alone. A crash
    costs a restart, a run of one row milliseconds. If it was a worker of ours that died of this very batch, or had to
    be killed, the second run is in quarantine already: whoever broke one must not take two along. If it was for lack of
    memory, the second run is that of two halves. If the worker crashed of this batch beyond doubt (CRASH: nobody killed
    it, and nothing else ran there), each member runs alone at once.

Guarantees, for the defaults and while some replica works:
  * every innocent batch-mate is answered;
  * one row that a model refuses costs at most 2·⌈log2 n⌉ + 2 further runs (no remote replicas: 2·⌈log2 n⌉);
  * one row that crashes workers costs at most two further crashes (one where the crash is beyond doubt), a row alone
    one, and none in a storm of crashes;
  * a row that fails alone is judged. POISON: a worker of ours died of it alone, and not for the first time; or two
    distinct remote replicas answered with an error of theirs, or broke off, when they had it alone, and its attempts
    are used up. One death is no proof, it may be a coincidence; only in a storm, where crash follows crash, a CRASH of
    a row alone is.

Attempts that ended with an answer do not count as broken: innocents of a halved batch keep all their reruns.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final, Protocol

from gateway.core.outcome import FailureKind, Sign

MAX_ATTEMPTS: Final = 3
"""Executions of one request that may end without an answer (SRE practice; gRPC caps at 5); the default."""
SINGLES_FROM: Final = 2
"""Attempts without an answer after which members run alone."""
PROOF: Final = 2
"""Distinct replicas on which a row must fail alone before it is its own fault."""
PAUSE_BASE_S: Final = 0.025
PAUSE_CAP_S: Final = 1.0


DIED: Final = frozenset({Sign.EXIT, Sign.MEMORY, Sign.CRASH})
"""What is seen when a worker of ours ended while it executed the batch."""


class Random(Protocol):
    def random(self) -> float: ...


class Lane(enum.Enum):
    """Where the members of a batch waited for it."""

    CLEAN = "clean"
    RETRY = "retry"
    QUARANTINE = "quarantine"


class Verdict(enum.Enum):
    REQUEUE = "requeue"
    """All members to the front, free of charge and above suspicion; those in quarantine stay there."""
    RETRY = "retry"
    """All members together to the retry lane; see `needs_budget`."""
    QUARANTINE = "quarantine"
    """All members together to the quarantine lane. If exactly these succeed on another replica, the one where they
    failed is to blame."""
    HALVE = "halve"
    """Two halves to the quarantine lane."""
    SINGLES = "singles"
    """Every member by itself to the quarantine lane."""
    FAIL_MODEL = "fail_model"
    """ModelError: the model refuses this input. Only ever one member, except where nothing may run twice."""
    FAIL_BACKEND = "fail_backend"
    """BackendError: attempts used up, or not one allowed. One member, except in an outage or where nothing may run
    twice."""
    FAIL_OVERLOADED = "fail_overloaded"
    """Overloaded: the backend refused, and nobody may try again for these members."""
    POISON = "poison"
    """PoisonRequest: the only member breaks whatever executes it; its fingerprint is denied for a while."""


LANE_AFTER: Final[dict[Verdict, Lane]] = {
    Verdict.REQUEUE: Lane.CLEAN,
    Verdict.RETRY: Lane.RETRY,
    Verdict.QUARANTINE: Lane.QUARANTINE,
    Verdict.HALVE: Lane.QUARANTINE,
    Verdict.SINGLES: Lane.QUARANTINE,
}
"""Where a verdict sends the members; those that are not here end them."""


@dataclass(frozen=True, slots=True)
class FailedBatch:
    """All that a verdict depends on."""

    members: int
    """Those who still wait for an answer, at least one."""
    broken: int
    """Attempts without an answer of the member that has seen most of them, this one included if it `counts`."""
    kind: FailureKind
    sign: Sign = Sign.NONE
    same_build: bool = True
    """The replica is one of our workers (kind "onnx"): the others run the same file in the same way."""
    lane: Lane = Lane.CLEAN
    alone_failures: int = 1
    """Distinct replicas on which the only member failed when it was alone, this one included; whatever, for several."""
    others: bool = False
    """Whether there is a usable replica, busy or not, that none of the members was tried on; for a single member: on
    which it has not failed alone."""
    idempotent: bool = True
    max_attempts: int = MAX_ATTEMPTS
    storm: bool = False
    """The model's rows run alone at present because workers crash again and again (poison.CrashWatch)."""
    outage: bool = False
    """Nothing at all has succeeded for long (poison.OutageWatch): no use in looking for an offender."""
    executed: int = 0
    """Members when it was sent, those included who left since: the last of several was not alone. 0: as `members`."""

    @property
    def lone(self) -> bool:
        """Whether the only member was executed by itself: only then does a failure say something about it."""
        return self.members == 1 and self.executed <= 1


def counts(kind: FailureKind, sign: Sign = Sign.NONE) -> bool:
    """Whether an attempt that ended so used up one of the attempts: it ran, and ended without an answer."""
    return kind in (FailureKind.BROKEN, FailureKind.TIMEOUT) and sign not in (Sign.BYSTANDER, Sign.ANSWERED)


def ran(kind: FailureKind) -> bool:
    """Whether the members may have been executed."""
    return kind not in (FailureKind.NOT_SENT, FailureKind.OVERLOAD)


def needs_budget(verdict: Verdict, kind: FailureKind) -> bool:
    """Whether the retry budget must pay for the rerun. What was not sent is free (gRPC's transparent retry), and
    quarantine has an allowance of its own, so that poison cannot use up what dead replicas need."""
    return verdict is Verdict.RETRY and kind is not FailureKind.NOT_SENT


def pause_s(tries: int, rng: Random) -> float:
    """Seconds before try number `tries` + 1 of something that nobody took, with nowhere else to go: full jitter,
    25 ms doubled per try, at most 1 s. `tries` ≥ 1."""
    longest: float = PAUSE_BASE_S * 2 ** min(tries - 1, 16)
    return min(PAUSE_CAP_S, longest) * rng.random()


def after_failure(batch: FailedBatch) -> Verdict:
    """The verdict; see the module's docstring."""
    if batch.kind is FailureKind.NOT_SENT:
        return _same_lane(batch, Verdict.RETRY)
    if not batch.idempotent:
        return _final(batch)
    if batch.kind is FailureKind.OVERLOAD:
        return _same_lane(batch, Verdict.RETRY)
    if batch.sign is Sign.BYSTANDER or batch.kind is FailureKind.CANCELLED:
        return _same_lane(batch, Verdict.REQUEUE)
    if batch.kind is FailureKind.SUSPECT or batch.sign is Sign.ANSWERED:
        return _after_answer(batch)
    return _after_silence(batch)


def _same_lane(batch: FailedBatch, verdict: Verdict) -> Verdict:
    """Suspects stay suspects, whatever happens to them that is not their fault."""
    return Verdict.QUARANTINE if batch.lane is Lane.QUARANTINE else verdict


def _final(batch: FailedBatch) -> Verdict:
    if batch.kind is FailureKind.SUSPECT:
        return Verdict.FAIL_MODEL
    return Verdict.FAIL_OVERLOADED if batch.kind is FailureKind.OVERLOAD else Verdict.FAIL_BACKEND


def _after_answer(batch: FailedBatch) -> Verdict:
    refused = batch.kind is FailureKind.SUSPECT
    apart = Verdict.HALVE if batch.members > 1 else Verdict.QUARANTINE
    if batch.same_build and refused:
        return Verdict.FAIL_MODEL if batch.lone else apart
    if batch.max_attempts <= 1 or batch.outage:
        return apart if refused and not batch.lone else _final(batch)
    if not batch.lone:
        return Verdict.QUARANTINE if batch.others and batch.lane is not Lane.QUARANTINE else apart
    if batch.alone_failures < PROOF and batch.others:
        return Verdict.QUARANTINE
    if refused:
        return Verdict.FAIL_MODEL
    return Verdict.POISON if batch.alone_failures >= PROOF else Verdict.FAIL_BACKEND


def _after_silence(batch: FailedBatch) -> Verdict:
    if batch.max_attempts <= 1:
        return Verdict.FAIL_BACKEND
    again = batch.broken >= SINGLES_FROM
    if batch.sign is Sign.MEMORY and not again and batch.members > 1:
        return Verdict.HALVE
    certain = batch.sign is Sign.CRASH
    crashed = batch.sign in DIED or (batch.same_build and batch.kind is FailureKind.TIMEOUT)
    if batch.lone and crashed and (again or (certain and batch.storm)):
        return Verdict.POISON
    if again and (batch.outage or (batch.lone and batch.broken >= batch.max_attempts)):
        # Time that ran out on a remote server proves nothing: all of them may be slow at once.
        proven = batch.alone_failures >= PROOF and batch.kind is FailureKind.BROKEN and not batch.outage
        return Verdict.POISON if proven else Verdict.FAIL_BACKEND
    if again or certain or batch.lane is Lane.QUARANTINE:
        return Verdict.SINGLES if batch.members > 1 else Verdict.QUARANTINE
    return Verdict.QUARANTINE if crashed else Verdict.RETRY
