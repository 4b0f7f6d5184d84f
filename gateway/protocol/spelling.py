"""What a mistyped word was probably meant to be; used in the text of configuration faults."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final

SHORTEST_PART: Final = 3
"""Letters from which on a part of a word says which word is meant."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word closest to `word` (of which 64 characters are compared), or None if none is close.

    One that contains `word` is meant rather than one that only looks like it: `cache` is no misspelt `trace`."""
    word, words = word[:64].lower(), list(known)
    around = [name for name in words if word in name] if len(word) >= SHORTEST_PART else []
    close = difflib.get_close_matches(word, around or words, n=1, cutoff=0.0 if around else 0.6)
    return close[0] if close else None


def unknown_key(word: str, known: Iterable[str]) -> str:
    """Fault text for a key that does not exist: names the nearest known key, or else all of them."""
    names = sorted(known)
    meant = nearest(word, names)
    shown = word[:64]
    if meant is not None:
        return f"unknown key '{shown}'; did you mean '{meant}'?"
    return f"unknown key '{shown}'; the keys here are: {', '.join(names)}"
