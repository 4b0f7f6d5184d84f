"""The one shape of all rate limits."""

from __future__ import annotations

from gateway.protocol.http2_limits import Allowance


def taken(allowance: Allowance, now: float) -> int:
    count = 0
    while allowance.take(now):
        count += 1
    return count


def test_a_burst_then_a_rate() -> None:
    allowance = Allowance(10, 2.0, 100.0)
    assert taken(allowance, 100.0) == 10
    assert taken(allowance, 100.4) == 0
    assert taken(allowance, 103.0) == 6
    assert taken(allowance, 1000.0) == 10, "it saves up no more than a burst"


def test_a_steady_rate_is_let_pass_for_ever() -> None:
    allowance = Allowance(10, 2.0, 0.0)
    assert all(allowance.take(second / 2) for second in range(1000))
    slightly_more = Allowance(10, 2.0, 0.0)
    assert not all(slightly_more.take(second / 2.2) for second in range(1000))


def test_honest_work_pays() -> None:
    allowance = Allowance(10, 0.0, 0.0)
    taken(allowance, 0.0)
    allowance.give(3)
    assert taken(allowance, 0.0) == 3
