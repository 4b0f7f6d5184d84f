"""A seed becomes a history: who serves, who asks for what and when, and what goes wrong. Plain data, no execution.

Each theme states what it promises beyond the invariants (`Promise`); the checker holds the gateway to it. Times are
seconds from the start of the history. The same seed always gives the same history.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Final, Literal, NamedTuple, TypeVar

from gateway.core.model import BatchPolicy
from gateway.core.resilience import Balancing, Resilience
from gateway.core.scheduling import PLAIN, Scheduling

T = TypeVar("T")
Poison = Literal["", "error", "crash", "hang"]
"""What a request's rows do to whoever runs them: "error" is refused by the model, wherever it runs."""

BALANCING: Final[tuple[Balancing, ...]] = ("pull", "pull", "pull", "p2c_ewma", "least_rows", "round_robin", "hash")
REMOTE_FAULTS: Final = (
    "slow", "hang", "refuse", "reset", "error", "flaky", "overload", "reject", "mismatch", "missing", "down", "crash",
)  # fmt: skip
WORKER_FAULTS: Final = ("slow", "hang", "crash", "mismatch", "down")
FAULTS: Final = {"oip": REMOTE_FAULTS, "onnx": WORKER_FAULTS}


class ReplicaPlan(NamedTuple):
    name: str
    kind: Literal["onnx", "oip"]
    zone: str
    weight: float
    slots: int
    base_s: float
    row_s: float
    """A batch of b rows takes base_s + b * row_s."""
    restart_s: float
    shy: bool
    """A remote one that says that it is unavailable as soon as it refused a connection."""
    stubborn: bool
    """Goes on after it was told to cancel, and answers late."""


class Arrival(NamedTuple):
    at: float
    rows: int
    key: int
    timeout_s: float
    """0.0: the model's."""
    priority: int
    poison: Poison
    leaves_after: float
    """Seconds until the caller leaves; 0.0: stays."""
    sequence: int
    """0: none."""
    follows: int = 0
    """It comes when the one so many places before it is told something, in that very call; 0: at its time."""
    takes_along: bool = False
    """When it is told something, the one before it leaves."""
    again: int = 0
    """It repeats the bytes of the one so many places before it, if that one is over; 0: bytes of its own."""


class Change(NamedTuple):
    """`what`: a fault by name, "ok", "remove", "add", "drain", "undrain", "force_closed", "stall", "close"."""

    at: float
    what: str
    place: int
    """Of the replica in `History.replicas`."""
    seconds: float = 0.0


@dataclass(slots=True)
class Promise:
    """What must hold in this history besides the invariants."""

    answered: bool = False
    """Every accepted request that is no poison, keeps its caller and is not in a hurry gets its answer."""
    calm: bool = False
    """No replica is ever charged with anything."""


@dataclass(slots=True)
class History:
    seed: int
    theme: str
    policy: BatchPolicy
    resilience: Resilience
    scheduling: Scheduling
    replicas: list[ReplicaPlan]
    present: int
    """The first so many are there from the start; others are added by a change."""
    arrivals: list[Arrival]
    changes: list[Change]
    promise: Promise
    turn_s: float
    late_s: float
    row_s: float
    """What the model's trial at load said, as the scheduler is told; 0.0: unknown."""
    probed: bool
    """Whether the gateway's prober runs."""
    aftermath: bool
    """Whether callers come again once everything is well."""
    span: float = 0.0
    """All arrivals and changes lie before this."""


def history(seed: int) -> History:
    rng = Random(seed)
    chance = rng.random() * TOTAL_SHARE
    place = 0
    while chance >= THEMES[place][0]:
        chance -= THEMES[place][0]
        place += 1
    made = THEMES[place][1](seed, rng)
    made.span = max([*[arrival.at for arrival in made.arrivals], *[change.at for change in made.changes]], default=0.0)
    return made


# -- parts -----------------------------------------------------------------------------------------------------------


def between(rng: Random, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def upto(rng: Random, most: int) -> int:
    """1 to `most`."""
    return 1 + int(rng.random() * most)


def one_of(rng: Random, values: tuple[T, ...]) -> T:
    return values[int(rng.random() * len(values))]


def replicas(rng: Random, least: int, most: int, kind: Literal["", "onnx", "oip"] = "") -> list[ReplicaPlan]:
    chance = rng.random()
    mix = kind or ("onnx" if chance < 0.35 else "oip" if chance < 0.75 else "")
    zones = ("a", "b") if rng.random() < 0.3 else ("",)
    base_s, row_s = between(rng, 0.0005, 0.01), between(rng, 0.0001, 0.001)
    uneven = rng.random() < 0.3
    made = []
    for number in range(least + int(rng.random() * (most - least + 1))):
        of_kind: Literal["onnx", "oip"] = mix or ("onnx" if rng.random() < 0.5 else "oip")
        remote = of_kind == "oip"
        made.append(
            ReplicaPlan(
                f"{of_kind}-{number + 1}",
                of_kind,
                one_of(rng, zones),
                one_of(rng, (1.0, 2.0, 0.5)) if uneven else 1.0,
                upto(rng, 4) if remote else upto(rng, 2),
                base_s * (between(rng, 0.5, 2.0) if uneven else 1.0),
                row_s,
                between(rng, 0.05, 0.6),
                remote and rng.random() < 0.5,
                rng.random() < 0.3,
            )
        )
    return made


def arrivals(rng: Random, count: int, span: float, most_rows: int) -> list[Arrival]:
    """Steady or in bursts; deadlines, priorities and leaving are the themes' to add."""
    burst = rng.random() < 0.5
    keys = 1 if rng.random() < 0.7 else 3
    made, at = [], 0.0
    step = span / count
    for _ in range(count):
        if not burst:
            at += step * 2 * rng.random()
        elif rng.random() < 0.15:
            at += step * 10 * rng.random()
        rows = 1 if rng.random() < 0.6 else upto(rng, most_rows)
        made.append(Arrival(at, rows, int(rng.random() * keys), 0.0, 0, "", 0.0, 0))
    return made


def policy(rng: Random, deadline_s: float, queue_rows: int = 16_384) -> BatchPolicy:
    chance = rng.random()
    delay_s = 0.0 if chance < 0.8 else between(rng, 0.001, 0.02)
    return BatchPolicy(
        one_of(rng, (8, 8, 16, 32, 4)),
        merge=rng.random() < 0.95,
        max_queue_delay_s=delay_s,
        max_queue_rows=queue_rows,
        deadline_s=deadline_s,
    )


def resilience(rng: Random, attempt_timeout_s: float | None = None, idempotent: bool = True) -> Resilience:
    return Resilience(
        idempotent=idempotent,
        balancing=one_of(rng, BALANCING),
        attempt_timeout_s=attempt_timeout_s,
        hedging=one_of(rng, (0.0, 0.0, 0.0, 0.1)),
    )


def entangled(rng: Random, made: list[Arrival], share: float) -> list[Arrival]:
    """What a caller does in the moment it is told something: send the next, or make another one leave."""
    if rng.random() >= share:
        return made
    return [
        arrival._replace(follows=upto(rng, 4) if rng.random() < 0.5 else 0, takes_along=rng.random() < 0.1)
        for arrival in made
    ]


def some_leave(rng: Random, made: list[Arrival], share: float, within: float) -> list[Arrival]:
    return [
        arrival._replace(leaves_after=within * rng.random() + 1e-6) if rng.random() < share else arrival
        for arrival in made
    ]


def some_hurry(rng: Random, made: list[Arrival], share: float, low: float, high: float) -> list[Arrival]:
    return [
        arrival._replace(timeout_s=between(rng, low, high)) if rng.random() < share else arrival for arrival in made
    ]


def priorities(rng: Random, made: list[Arrival], share: float) -> tuple[list[Arrival], Scheduling]:
    if rng.random() >= share:
        return made, PLAIN
    ranked = [arrival._replace(priority=upto(rng, 3)) for arrival in made]
    return ranked, Scheduling(priority_levels=3, default_priority_level=2)


def faults(
    rng: Random, plans: list[ReplicaPlan], place: int, count: int, span: float, without: tuple[str, ...] = ()
) -> list[Change]:
    """`count` faults of one replica, one after the other, each with its end."""
    kinds = tuple([kind for kind in FAULTS[plans[place].kind] if kind not in without])
    made, at = [], span * rng.random() * 0.5
    for _ in range(count):
        lasts = between(rng, 0.02, 3.0) if rng.random() < 0.5 else span * rng.random()
        made += [Change(at, one_of(rng, kinds), place), Change(at + lasts, "ok", place)]
        at += lasts + span * rng.random() * 0.3
    return made


def common(  # the fields that every theme draws alike
    seed: int,
    rng: Random,
    theme: str,
    plans: list[ReplicaPlan],
    made: list[Arrival],
    changes: list[Change],
    promise: Promise,
    rules: BatchPolicy,
    tries: Resilience,
    scheduling: Scheduling = PLAIN,
    present: int = 0,
) -> History:
    return History(
        seed, theme, rules, tries, scheduling, plans, present or len(plans), made, changes, promise,
        turn_s=0.0 if rng.random() < 0.5 else 20e-6,
        late_s=0.0 if rng.random() < 0.5 else 0.001,
        row_s=0.0 if rng.random() < 0.5 else 0.002,
        probed=rng.random() < 0.2,
        aftermath=rng.random() < 0.03,
    )  # fmt: skip


# -- themes ----------------------------------------------------------------------------------------------------------


def calm(seed: int, rng: Random) -> History:
    """Nothing fails; callers leave and hurry."""
    plans = replicas(rng, 1, 4)
    rules = policy(rng, 30.0)
    made = arrivals(rng, upto(rng, 30), between(rng, 0.01, 2.0), min(8, rules.max_batch_size))
    made = entangled(rng, made, 0.2)
    made = some_leave(rng, made, 1.0 if rng.random() < 0.2 else 0.2, 0.02)
    made = some_hurry(rng, made, 0.2, 0.001, 0.1)
    made, scheduling = priorities(rng, made, 0.2)
    tries = resilience(rng, idempotent=rng.random() < 0.8)
    return common(seed, rng, "calm", plans, made, [], Promise(True, True), rules, tries, scheduling)


def one_bad(seed: int, rng: Random) -> History:
    """One replica of several fails in any way; nobody may notice."""
    plans = replicas(rng, 2, 4)
    span = between(rng, 0.05, 4.0)
    rules = policy(rng, 60.0)
    made = arrivals(rng, upto(rng, 32), span, min(8, rules.max_batch_size))
    made = entangled(rng, made, 0.2)
    made = some_leave(rng, made, 0.1, 0.05)
    made, scheduling = priorities(rng, made, 0.1)
    bad = int(rng.random() * len(plans))
    # Nobody can tell a hung worker from a slow model before a run was timed; remote attempts have a stated bound.
    timed = plans[bad].kind == "oip"
    changes = faults(rng, plans, bad, upto(rng, 2), span, () if timed else ("hang",))
    tries = resilience(rng, between(rng, 0.3, 0.6) if timed else None)
    return common(seed, rng, "one_bad", plans, made, changes, Promise(True), rules, tries, scheduling)


def poison(seed: int, rng: Random) -> History:
    """Healthy replicas and a few requests that break them; everybody else is answered."""
    plans = replicas(rng, 1, 4)
    span = between(rng, 0.02, 1.0)
    rules = policy(rng, 60.0)
    made = arrivals(rng, 3 + upto(rng, 20), span, min(8, rules.max_batch_size))
    remote = all(plan.kind == "oip" for plan in plans)
    shared = any(plan.kind == "oip" and plan.slots > 1 for plan in plans)
    kinds: tuple[Poison, ...] = ("error", "crash", "hang") if remote else ("error", "crash")
    for number in range(upto(rng, 2)):
        place = int(rng.random() * len(made))
        # A remote server that dies takes along whatever else it executes, and nobody can tell who it was: innocents can
        # stand one such poison, not several at once.
        made[place] = made[place]._replace(poison="error" if number and shared else one_of(rng, kinds))
    if rng.random() < 0.4:
        made += [
            made[-1]._replace(at=span + 5.0 * rng.random(), poison="", again=upto(rng, len(made))) for _ in range(2)
        ]
    tries = resilience(rng, between(rng, 0.3, 0.6) if remote else None)
    return common(seed, rng, "poison", plans, made, [], Promise(True), rules, tries)


def storm(seed: int, rng: Random) -> History:
    """Everything at once; only the invariants hold."""
    plans = replicas(rng, 1, 5)
    span = between(rng, 0.05, 6.0)
    rules = policy(rng, one_of(rng, (0.5, 5.0, 30.0)), one_of(rng, (16_384, 16_384, 40)))
    made = arrivals(rng, upto(rng, 36), span, min(8, rules.max_batch_size))
    made = entangled(rng, made, 0.2)
    made = some_leave(rng, made, 0.2, 0.3)
    made = some_hurry(rng, made, 0.3, 0.01, 2.0)
    made, scheduling = priorities(rng, made, 0.2)
    poisons: tuple[Poison, ...] = ("error", "crash", "hang")
    share = one_of(rng, (0.0, 0.05, 0.2))
    sequences = 3 if rng.random() < 0.15 else 0
    made = [
        arrival._replace(
            poison=one_of(rng, poisons) if rng.random() < share else "",
            sequence=upto(rng, sequences) if sequences and rng.random() < 0.5 else 0,
        )
        for arrival in made
    ]
    changes = []
    for place in range(len(plans)):
        if rng.random() < 0.7:
            changes += faults(rng, plans, place, upto(rng, 3), span)
        if rng.random() < 0.2:
            changes += operator(rng, place, span)
    if rng.random() < 0.2:
        changes.append(Change(span * rng.random(), "stall", 0, between(rng, 0.05, 1.0)))
    if rng.random() < 0.05:
        changes.append(Change(span * rng.random(), "close", 0))
    timeout_s = None if rng.random() < 0.5 else between(rng, 0.05, 0.5)
    tries = resilience(rng, timeout_s, idempotent=rng.random() < 0.7)
    return common(seed, rng, "storm", plans, made, changes, Promise(), rules, tries, scheduling)


def operator(rng: Random, place: int, span: float) -> list[Change]:
    at = span * rng.random()
    what = one_of(rng, ("drain", "drain", "force_closed", "remove"))
    made = [Change(at, what, place)]
    if what != "remove":
        made.append(Change(at + between(rng, 0.05, 2.0), "undrain", place))
    return made


def overload(seed: int, rng: Random) -> History:
    """More than fits, in little time; queues are short and deadlines near."""
    plans = replicas(rng, 1, 3)
    rules = policy(rng, between(rng, 0.02, 0.5), 10 + upto(rng, 60))
    made = arrivals(rng, 15 + upto(rng, 40), between(rng, 0.005, 0.1), min(8, rules.max_batch_size))
    made = entangled(rng, made, 0.2)
    made = some_leave(rng, made, 0.1, 0.05)
    made, scheduling = priorities(rng, made, 0.3)
    changes = []
    if rng.random() < 0.5:
        changes = faults(rng, plans, 0, 1, 0.1)
    return common(seed, rng, "overload", plans, made, changes, Promise(), rules, resilience(rng), scheduling)


def dynamic(seed: int, rng: Random) -> History:
    """Replicas come and go, are drained and forced; the first stays and is well, and nobody notices."""
    plans = replicas(rng, 2, 5)
    span = between(rng, 0.1, 5.0)
    rules = policy(rng, 60.0)
    made = arrivals(rng, upto(rng, 30), span, min(8, rules.max_batch_size))
    made = entangled(rng, made, 0.2)
    made = some_leave(rng, made, 0.1, 0.05)
    present = upto(rng, len(plans))
    changes = [Change(span * rng.random(), "add", place) for place in range(present, len(plans))]
    for place in range(1, present):
        if rng.random() < 0.7:
            changes += operator(rng, place, span)
    tries = resilience(rng)
    return common(seed, rng, "dynamic", plans, made, changes, Promise(True), rules, tries, present=present)


def outage(seed: int, rng: Random) -> History:
    """Every replica fails at the same time; what is tried again is bounded, whatever is asked."""
    many = rng.random() < 0.06
    plans = replicas(rng, 1, 2 if many else 3, "oip" if many else "")
    span = between(rng, 0.5, 2.0)
    rules = policy(rng, one_of(rng, (2.0, 30.0)))
    if many:
        rules = replace(rules, max_batch_size=4)
    made = arrivals(rng, 400 if many else upto(rng, 30), span, min(4, rules.max_batch_size))
    changes = []
    for place, plan in enumerate(plans):
        remote, worker = ("reset", "error", "overload", "refuse", "down"), ("crash", "mismatch", "down")
        fault = "reset" if many else one_of(rng, remote if plan.kind == "oip" else worker)
        end = span + 20.0 if many else span * between(rng, 0.5, 1.5)
        changes += [Change(0.0, fault, place), Change(end, "ok", place)]
    return common(seed, rng, "outage", plans, made, changes, Promise(), rules, resilience(rng))


def long(seed: int, rng: Random) -> History:
    """Enough requests for times to be learned, and hedges; one replica is late, hangs or fails now and then."""
    plans = replicas(rng, 2, 3, "oip" if rng.random() < 0.7 else "")
    span = between(rng, 2.0, 20.0)
    rules = policy(rng, 60.0)
    made = arrivals(rng, 250 + upto(rng, 250), span, 1)
    bad = int(rng.random() * len(plans))
    learned = rng.random() < 0.5
    changes = faults(rng, plans, bad, upto(rng, 4), span, ("hang",) if learned else ())
    changes = [change._replace(at=change.at + span * 0.4) for change in changes]
    tries = replace(resilience(rng, None if learned else between(rng, 0.3, 0.6)), hedging=one_of(rng, (0.0, 0.1, 0.5)))
    return common(seed, rng, "long", plans, made, changes, Promise(True), rules, tries)


THEMES: Final[tuple[tuple[float, Callable[[int, Random], History]], ...]] = (
    (12, calm),
    (28, one_bad),
    (15, poison),
    (25, storm),
    (6, overload),
    (9, dynamic),
    (5, outage),
    (0.6, long),
)
TOTAL_SHARE: Final = sum(share for share, _ in THEMES)
