"""How far a shadow's answers lie from those that callers got, over all requests that were mirrored. Pure.

What "agree" means is `core/agreement.py`'s rule, with tolerances that the owner may state. Requests come in lots: their
outputs are laid one behind the other and compared at once, which costs a few microseconds each instead of a hundred.
Most requests of a shadow that is the same model cost one comparison of bytes.

Invariants: memory is a few numbers per output of the champion, however much is compared; everything shown is finite; an
output of which one side has other rows, another datatype or another shape differs, and is never compared by value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np

from gateway.core.agreement import ATOL, LARGEST, RTOL, distances, numbers, same_numbers
from gateway.core.request import OutputTensor
from gateway.core.tensor import element_count, unpack_bytes

Answer = Sequence[OutputTensor]
"""Outputs of one request, in the champion's order; shapes with the batch dimension."""
BOUNDS: Final = (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
"""Of the histogram of differences, inclusive; the last bucket is open."""
_Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """|a - b| <= atol + rtol * max(|a|, |b|) agrees, for floating point. `rtol` None: by datatype."""

    rtol: float | None = None
    atol: float = ATOL

    def relative(self, datatype: str) -> float:
        return RTOL[datatype] if self.rtol is None else self.rtol


@dataclass(frozen=True, slots=True)
class OutputComparison:
    """All that was seen of one output."""

    output: str
    requests: int
    differing: int
    """Requests of which it was not within the tolerance."""
    rows: int
    equal_rows: int
    """Rows equal in every element: for whole numbers and strings, the share of labels on which both agree."""
    max_absolute: float | None
    """Largest |a - b|; None where the elements are no numbers, or nothing was compared."""
    max_relative: float | None
    buckets: tuple[int, ...] = ()
    """Requests by their largest |a - b|, one more than `BOUNDS`, not cumulative; empty where it is no number."""
    sum_absolute: float = 0.0
    """Of the largest |a - b| of each request, without those that no number expresses."""


@dataclass(frozen=True, slots=True)
class ComparisonStatistics:
    agreed: int
    differed: int
    """Requests of which an output differed."""
    outputs: tuple[OutputComparison, ...]


class ShadowComparison:
    """What came of all comparisons of one champion with one shadow."""

    def __init__(self, tolerance: Tolerance) -> None:
        self._tolerance = tolerance
        self._agreed = 0
        self._differed = 0
        self._outputs: dict[str, _Seen] = {}

    def compare(self, lot: Sequence[tuple[Answer, Answer]]) -> list[bool]:
        """Pairs of answers to the same requests, the champion's first; whether those of each request agree."""
        agreed = [True] * len(lot)
        together: dict[tuple[int, str], list[int]] = {}
        for at, (left, right) in enumerate(lot):
            for place, (a, b) in enumerate(zip(left, right, strict=True)):
                seen = self._of(a)
                if a.datatype is not b.datatype or a.shape != b.shape:
                    seen.apart(a)
                    agreed[at] = False
                elif a.data == b.data:
                    seen.alike(a)
                else:
                    together.setdefault((place, a.name), []).append(at)
        for (place, _), those in together.items():
            pairs = [(lot[at][0][place], lot[at][1][place]) for at in those]
            for at, within in zip(those, self._of(pairs[0][0]).compared(pairs, self._tolerance), strict=True):
                agreed[at] = agreed[at] and within
        self._agreed += sum(agreed)
        self._differed += len(agreed) - sum(agreed)
        return agreed

    def _of(self, output: OutputTensor) -> _Seen:
        found = self._outputs.get(output.name)
        if found is None:
            found = self._outputs[output.name] = _Seen(output)
        return found

    def statistics(self) -> ComparisonStatistics:
        return ComparisonStatistics(
            self._agreed, self._differed, tuple(seen.statistics() for seen in self._outputs.values())
        )

    def __repr__(self) -> str:
        return f"<ShadowComparison agreed={self._agreed} differed={self._differed}>"


class _Seen:
    """Of one output."""

    __slots__ = ("_buckets", "_differing", "_equal", "_largest", "_name", "_numeric", "_relative", "_requests", "_rows",
                 "_sum")  # fmt: skip

    def __init__(self, output: OutputTensor) -> None:
        self._name = output.name
        self._numeric = output.datatype.kind not in ("bytes", "bool")
        self._requests = self._differing = self._rows = self._equal = 0
        self._largest: float | None = None
        self._relative: float | None = None
        self._sum = 0.0
        self._buckets = [0] * (len(BOUNDS) + 1)

    def statistics(self) -> OutputComparison:
        return OutputComparison(
            self._name,
            self._requests,
            self._differing,
            self._rows,
            self._equal,
            self._largest,
            self._relative,
            tuple(self._buckets) if self._numeric else (),
            self._sum,
        )

    def alike(self, a: OutputTensor) -> None:
        """Equal, byte for byte."""
        rows = _rows(a)
        self._requests += 1
        self._rows += rows
        self._equal += rows
        if self._numeric:
            self._largest, self._relative = self._largest or 0.0, self._relative or 0.0
            self._buckets[0] += 1

    def apart(self, a: OutputTensor) -> None:
        """Not the same kind of thing at all."""
        self._requests += 1
        self._differing += 1
        self._rows += _rows(a)
        if self._numeric:
            self._note(np.full(1, LARGEST), np.full(1, LARGEST))

    def compared(self, pairs: Sequence[tuple[OutputTensor, OutputTensor]], tolerance: Tolerance) -> list[bool]:
        """Pairs of equal datatype and, pair by pair, equal shape; whether each is within the tolerance."""
        datatype = pairs[0][0].datatype
        rows = np.array([_rows(a) for a, _ in pairs])
        self._requests += len(pairs)
        self._rows += int(rows.sum())
        texts = datatype.kind == "bytes"
        within = self._compare_texts(pairs) if texts else self._compare_numbers(pairs, tolerance)
        self._differing += len(within) - sum(within)
        return within

    def _compare_texts(self, pairs: Sequence[tuple[OutputTensor, OutputTensor]]) -> list[bool]:
        within = []
        for a, b in pairs:
            left, right = unpack_bytes(a.data), unpack_bytes(b.data)
            same = np.array([x == y for x, y in zip(left, right, strict=False)], bool)
            whole = len(left) == len(right) and bool(same.all())
            self._equal += _equal_rows(same, a) if len(left) == len(right) else 0
            within.append(whole)
        return within

    def _compare_numbers(self, pairs: Sequence[tuple[OutputTensor, OutputTensor]], tolerance: Tolerance) -> list[bool]:
        datatype = pairs[0][0].datatype
        left = numbers(datatype, b"".join([a.data for a, _ in pairs]))
        right = numbers(datatype, b"".join([b.data for _, b in pairs]))
        same = same_numbers(datatype, left, right)
        sizes = [element_count(a.shape) for a, _ in pairs]
        starts = np.concatenate(([0], np.cumsum(sizes)))
        for (a, _), start, end in zip(pairs, starts[:-1], starts[1:], strict=True):
            self._equal += _equal_rows(same[start:end], a)
        absolute, relative = distances(left, right, same)
        good = same
        if datatype.name in RTOL:
            larger = np.maximum(np.abs(left), np.abs(right))
            with np.errstate(all="ignore"):
                bound = tolerance.atol + tolerance.relative(datatype.name) * larger
            good = same | (np.isfinite(larger) & (absolute <= bound))
        if self._numeric:
            self._note(_largest(absolute, starts), _largest(relative, starts))
        bad = np.concatenate(([0], np.cumsum(~good)))
        return [bool(bad[end] == bad[start]) for start, end in pairwise(starts)]

    def _note(self, absolute: _Array, relative: _Array) -> None:
        """The largest differences of some requests."""
        self._largest = max(self._largest or 0.0, float(absolute.max()))
        self._relative = max(self._relative or 0.0, float(relative.max()))
        places = np.searchsorted(BOUNDS, absolute, side="left")
        for index, n in enumerate(np.bincount(places, minlength=len(self._buckets)).tolist()):
            self._buckets[index] += n
        self._sum += float(absolute[absolute < LARGEST].sum())


def _rows(tensor: OutputTensor) -> int:
    return tensor.shape[0] if tensor.shape else 1


def _equal_rows(same: _Array, tensor: OutputTensor) -> int:
    rows = _rows(tensor)
    if not rows or not same.size:
        return rows
    return int(same.reshape(rows, -1).all(axis=1).sum())


def _largest(values: _Array, starts: _Array) -> _Array:
    """The largest of each stretch; 0 of an empty one."""
    return np.array([values[a:b].max() if b > a else 0.0 for a, b in pairwise(starts)])
