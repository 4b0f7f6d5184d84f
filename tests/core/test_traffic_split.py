"""Who goes to the canary: by header, by what sticks, by chance."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.traffic_split import SplitRule, Why, point, to_canary

names = st.sampled_from(["X-Variant", "X-User", "x-other", "Accept"])
values = st.text("abcdefgh0123456789", min_size=1, max_size=8)
headers = st.lists(st.tuples(names.map(lambda n: n.lower().encode()), values.map(str.encode)), max_size=6)


def never() -> float:
    raise AssertionError("nothing was to be drawn")


def rule(percent: float = 0.0, header: dict[str, str] | None = None, sticky: str | None = None) -> SplitRule:
    return SplitRule.of("digits", percent, header or {}, sticky)


def test_a_header_outranks_the_share() -> None:
    demanded = rule(0.0, {"X-Variant": "canary"})
    assert to_canary(demanded, [(b"x-variant", b"canary")], never) == (True, Why.HEADER)
    assert to_canary(demanded, [(b"x-variant", b"champion")], lambda: 0.0) == (False, Why.SHARE)


def test_all_headers_of_a_rule_are_needed() -> None:
    both = rule(0.0, {"X-Variant": "canary", "X-Team": "ml"})
    assert not to_canary(both, [(b"x-variant", b"canary")], lambda: 0.5)[0]
    assert to_canary(both, [(b"x-team", b"ml"), (b"x-variant", b"canary")], never)[0]


def test_the_first_of_a_repeated_field_counts() -> None:
    demanded = rule(0.0, {"X-Variant": "canary"})
    assert not to_canary(demanded, [(b"x-variant", b"other"), (b"x-variant", b"canary")], lambda: 0.5)[0]


def test_nobody_is_drawn_at_0_and_everybody_at_100() -> None:
    assert not to_canary(rule(0.0), [], lambda: 0.0)[0]
    assert to_canary(rule(100.0), [], lambda: 1.0 - 2**-53)[0]


@given(st.floats(0, 100), headers, st.integers(0, 2**32))
def test_what_sticks_does_so_whatever_is_drawn(percent: float, sent: list[tuple[bytes, bytes]], seed: int) -> None:
    sticky = rule(percent, sticky="X-User")
    chance = random.Random(seed)
    met = {to_canary(sticky, sent, chance.random) for _ in range(5)}
    if any(name == b"x-user" for name, _ in sent):
        assert len(met) == 1
        assert met.pop()[1] is Why.STICKY
    else:
        assert {why for _, why in met} == {Why.SHARE}


@given(values)
def test_a_value_goes_to_the_canary_from_the_share_on_that_lies_above_its_point(value: str) -> None:
    at = point(b"digits", value.encode())
    for share, wanted in ((0.0, False), (at, False), (math.nextafter(at, 1.0), True), (1.0, True)):
        met = to_canary(SplitRule(share, sticky=b"x-user", key=b"digits"), [(b"x-user", value.encode())], never)
        assert met == (wanted, Why.STICKY)


@given(st.floats(0, 100), st.floats(0, 100), values)
def test_a_growing_share_only_adds_callers(one: float, other: float, user: str) -> None:
    less, more = sorted((one, other))
    sent = [(b"x-user", user.encode())]
    if to_canary(rule(less, sticky="X-User"), sent, never)[0]:
        assert to_canary(rule(more, sticky="X-User"), sent, never)[0]


@given(st.integers(0, 2**64 - 1), st.integers(1, 99))
def test_the_share_is_met_within_what_chance_allows(seed: int, percent: int) -> None:
    """Six standard deviations of a binomial draw: false alarms are rarer than one in 10^8."""
    chance, n = random.Random(seed), 2000
    share = percent / 100
    met = sum(to_canary(rule(percent), [], chance.random)[0] for _ in range(n))
    assert abs(met - n * share) <= 6 * (n * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("percent", [1, 5, 50, 95])
def test_callers_spread_as_the_share_says(percent: int) -> None:
    n, share = 20_000, percent / 100
    met = sum(to_canary(rule(percent, sticky="X-User"), [(b"x-user", b"user-%d" % i)], never)[0] for i in range(n))
    assert abs(met - n * share) <= 6 * (n * share * (1 - share)) ** 0.5


def test_models_have_different_callers_on_trial() -> None:
    users = [b"user-%d" % i for i in range(2000)]
    one = {user for user in users if point(b"digits", user) < 0.1}
    other = {user for user in users if point(b"salary", user) < 0.1}
    assert len(one & other) < 60  # 20 are expected of two independent tenths


@given(st.binary(max_size=64), st.binary(max_size=300))
def test_a_point_lies_from_0_to_1(key: bytes, value: bytes) -> None:
    assert 0.0 <= point(key, value) < 1.0


def test_a_long_model_name_is_no_trouble() -> None:
    long = SplitRule.of("m" * 256, 50.0, {}, "X-User")
    assert to_canary(long, [(b"x-user", b"anna")], never)[1] is Why.STICKY
