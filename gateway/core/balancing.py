"""Which of the replicas that could take a batch now gets it: five strategies behind one interface.

All of them are asked late, when there is a batch and a free slot, and choose among replicas with a free slot only;
most of the gain is in that (resilience notes §2). None ever says "wait for a better one": predictions go stale, and
work that waits for a busy replica while another idles is lost.

  * `pull`, the default: least expected time until the answer, S(b) × load × (batches in flight ÷ weight + 1). Those
    within `NEAR` of the best count as equal, and one of them is drawn with chances like their weights: at low load,
    where all idle, weights would otherwise turn into "always the heaviest", and noise into "always the luckiest".
    `load` is a mean that jumps to 5 s at a failure: without it, whoever fails fastest attracts the most work;
  * `p2c_ewma`: the better of two drawn at random, by the same expected time ÷ weight;
  * `least_rows`: fewest rows in flight ÷ weight;
  * `round_robin`: smooth weighted turns (nginx's algorithm: everyone gains its weight, the richest pays the total);
  * `hash`: `rendezvous` for whatever carries an affinity; what carries none is pulled.

The last three know nothing of failures; a fleet's breaker has to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from math import inf, log
from typing import Any, Final, Protocol, TypeVar

from gateway.core.batch_time import BatchTime
from gateway.core.breaker import Rng
from gateway.core.resilience import Balancing

NEAR: Final = 1.25
"""Expected times up to this many times the best are a tie: they are not known any better."""


class Contender(Protocol):
    """What strategies look at; `gateway.core.member.Member` fits."""

    time: BatchTime
    weight: float
    batches: int
    """In flight there."""
    rows_in_flight: int
    turn: float
    """Credit of `round_robin`."""

    @property
    def name(self) -> str: ...


M = TypeVar("M", bound=Contender)
Pick = Callable[[Sequence[Any], int, float, Rng], Any]
"""One of the same type of at least two contenders, for a batch of so many rows, now."""


def pull(ready: Sequence[M], rows: int, now: float, rng: Rng) -> M:
    """See the module's docstring."""
    scores = []
    best = inf
    for member in ready:
        score = member.time.score(rows, member.batches / member.weight, now)
        scores.append(score)
        if score < best:  # noqa: PLR1730 - min() costs a call each; this runs for every batch
            best = score
    bound = best * NEAR
    near: list[M] = []
    weight = 0.0
    for member, score in zip(ready, scores, strict=True):
        if score <= bound:
            near.append(member)
            weight += member.weight
    return near[0] if len(near) == 1 else _drawn(near, weight, rng)


def p2c_ewma(ready: Sequence[M], rows: int, now: float, rng: Rng) -> M:
    first, second = two_of(ready, rng)
    expected = [m.time.score(rows, m.batches, now) / m.weight for m in (first, second)]
    return first if expected[0] <= expected[1] else second


def least_rows(ready: Sequence[M], rows: int, now: float, rng: Rng) -> M:
    loads = [member.rows_in_flight / member.weight for member in ready]
    least = min(loads)
    equals = [member for member, load in zip(ready, loads, strict=True) if load <= least]
    return _drawn(equals, sum([member.weight for member in equals]), rng)


def round_robin(ready: Sequence[M], rows: int, now: float, rng: Rng) -> M:
    return max(ready, key=_credit)  # the first of equals


def _credit(member: Contender) -> float:
    return member.turn + member.weight


def take_turn(ready: Iterable[Contender], chosen: Contender) -> None:
    """`chosen` of `ready` has got a batch in its turn. Not before: being asked for costs nobody a turn."""
    for member in ready:
        member.turn += member.weight
        chosen.turn -= member.weight


STRATEGIES: Final[dict[Balancing, Pick]] = {
    "pull": pull,
    "p2c_ewma": p2c_ewma,
    "least_rows": least_rows,
    "round_robin": round_robin,
    "hash": pull,
}


def two_of(members: Sequence[M], rng: Rng) -> tuple[M, M]:
    """Two different ones of at least two, each pair as likely as any other."""
    count = len(members)
    first = int(rng.random() * count)
    second = int(rng.random() * (count - 1))
    return members[first], members[second + (second >= first)]


def _drawn(members: Sequence[M], weight: float, rng: Rng) -> M:
    """`weight`: of all of them."""
    at = rng.random() * weight
    for member in members:
        at -= member.weight
        if at < 0.0:
            return member
    return members[-1]


def rendezvous(members: Iterable[M], affinity: int) -> M | None:
    """The member that `affinity` belongs to. If one goes, only its own moves; if one comes, only what it gets.

    Highest random weight (Thaler and Ravishankar 1998), weighted as by Schindler and Schomaker. None: no members.
    """
    best: M | None = None
    highest = -1.0
    salt = (affinity & (2**64 - 1)).to_bytes(8, "little")
    for member in members:
        digest = blake2b(member.name.encode(), digest_size=8, key=salt).digest()
        chance = (int.from_bytes(digest, "little") + 0.5) / 2.0**64
        score = member.weight / -log(min(chance, 1.0 - 2.0**-53))
        if score > highest:
            best, highest = member, score
    return best
