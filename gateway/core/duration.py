"""Durations as people read them in the texts of errors. Rule: never rounded to nothing."""

from __future__ import annotations


def in_words(duration_s: float) -> str:
    """`0.250 s`; below a millisecond `12 µs`, for a limit may be as short as that."""
    return f"{duration_s:.3f} s" if duration_s >= 1e-3 else f"{max(duration_s, 0.0) * 1e6:.0f} µs"
