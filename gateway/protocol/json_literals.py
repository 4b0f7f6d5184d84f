"""NaN and Infinity in large JSON bodies, which the fast parser does not read.

Each literal is replaced by a number that is read in its stead and turned back where it comes out. The stand-ins are
finite doubles that a body hardly holds by itself; the caller counts what comes out, and a body in which it is not
exactly what was put in is not read this way. Blanks around a stand-in keep it from growing together with its
neighbours: what was no JSON stays none.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

_STAND_INS: Final = (
    (b"-Infinity", b" -1.7976931348623123e+308 ", -np.inf),
    (b"Infinity", b" 1.7976931348623123e+308 ", np.inf),
    (b"NaN", b" 1.7976931348623119e+308 ", np.nan),
)
_VALUES: Final = tuple((float(text), value) for _, text, value in _STAND_INS)
_LEAST: Final = min(abs(number) for number, _ in _VALUES)
MAX_LITERALS: Final = 262_144
MAX_QUOTES: Final = 65_536
"""More of either makes a body unfit: each costs memory many times its size."""


class Literals:
    """One body on its way; `text` is None where it cannot be read like this."""

    __slots__ = ("_found", "_put", "text")

    def __init__(self, body: bytes) -> None:
        self._put = self._found = 0
        self.text: bytes | None = None
        # With an escaped quote in it, where strings end would have to be read.
        if b'\\"' not in body and body.count(b'"') <= MAX_QUOTES:
            self.text = self._replaced(body)

    def _replaced(self, body: bytes) -> bytes | None:
        pieces = body.split(b'"')
        for place in range(0, len(pieces), 2):  # every other piece stands outside of strings
            piece = pieces[place]
            for literal, stand_in, _ in _STAND_INS:
                count = piece.count(literal)
                self._put += count
                if self._put > MAX_LITERALS:
                    return None
                if count:
                    piece = piece.replace(literal, stand_in)
            pieces[place] = piece
        return b'"'.join(pieces) if self._put else None

    def restored(self, numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """An array of doubles as it was meant."""
        if not (np.abs(numbers) >= _LEAST).any():
            return numbers
        numbers = numbers.copy()
        for number, value in _VALUES:
            places = numbers == number
            self._found += int(np.count_nonzero(places))
            numbers[places] = value
        return numbers

    @property
    def all_restored(self) -> bool:
        return self._found == self._put
