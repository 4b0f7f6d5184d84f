"""No duration is told as nothing."""

from __future__ import annotations

import pytest

from gateway.core.duration import in_words


@pytest.mark.parametrize(
    ("duration_s", "words"),
    [(1.25, "1.250 s"), (0.001, "0.001 s"), (0.000012, "12 µs"), (0.00095, "950 µs"), (0.0, "0 µs"), (-1.0, "0 µs")],
)
def test_in_words(duration_s: float, words: str) -> None:
    assert in_words(duration_s) == words
