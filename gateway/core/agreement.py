"""How far two answers to the same rows lie apart, and what is remembered of all such comparisons.

Two backends that serve one model should give one answer. How equal it must be depends on the datatype:
  * whole numbers, booleans and strings are equal or they are not;
  * floating point: |a − b| ≤ atol + rtol·max(|a|, |b|), for other hardware and other kernels round otherwise. NaN
    agrees with NaN, an infinity with itself, and neither with anything else.
Invariants: everything shown is finite; memory is a few numbers per output of the model, however much is compared.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from gateway.core.request import OutputTensor
from gateway.core.tensor import Datatype, unpack_bytes

ATOL: Final = 1e-5
RTOL: Final[Mapping[str, float]] = {"FP64": 1e-3, "FP32": 1e-3, "FP16": 4e-3, "BF16": 3e-2}
"""By datatype. The halves round at 1e-3 and 8e-3 already: theirs is four units in the last place."""
LARGEST: Final = sys.float_info.max
"""Stands for a difference that no number expresses: NaN or an infinity on one side only."""

Array = np.ndarray[Any, np.dtype[Any]]

Outcome = Literal["agreed", "differed", "failed", "skipped"]
OUTCOMES: Final[tuple[Outcome, ...]] = ("agreed", "differed", "failed", "skipped")
"""`failed`: the second execution gave no answer. `skipped`: no other backend was idle, or the batch was too large."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One output of one batch, answered twice."""

    output: str
    absolute: float | None
    """Largest |a - b|; None where the elements are no numbers."""
    relative: float | None
    """Largest |a - b| / max(|a|, |b|); None where the elements are no numbers."""
    equal_rows: float
    """Share of the rows that are equal in every element; 1.0 of none."""
    agreed: bool
    """Whether every element is within the tolerance of its datatype."""


@dataclass(frozen=True, slots=True)
class OutputAgreement:
    """The worst that was seen of one output."""

    output: str
    max_absolute: float | None
    max_relative: float | None
    min_equal_rows: float


@dataclass(frozen=True, slots=True)
class AgreementStatistics:
    batches: Mapping[Outcome, int]
    outputs: tuple[OutputAgreement, ...]


def compare(first: Sequence[OutputTensor], second: Sequence[OutputTensor]) -> tuple[Difference, ...]:
    """The differences of two answers with the same outputs in the same order, output by output."""
    return tuple([_difference(a, b) for a, b in zip(first, second, strict=True)])


def _difference(a: OutputTensor, b: OutputTensor) -> Difference:
    if a.name != b.name or a.datatype is not b.datatype or a.shape != b.shape:
        numeric = a.datatype.kind not in ("bytes", "bool")
        worst = LARGEST if numeric else None
        return Difference(a.name, worst, worst, 0.0, agreed=False)
    if a.datatype.kind == "bytes":
        rows = _equal_rows(np.array(_same(unpack_bytes(a.data), unpack_bytes(b.data)), bool), a.shape)
        return Difference(a.name, None, None, rows, agreed=rows == 1.0)
    left, right = numbers(a.datatype, a.data), numbers(b.datatype, b.data)
    same = same_numbers(a.datatype, left, right)
    floating = a.datatype.name in RTOL
    rows = _equal_rows(same, a.shape)
    if a.datatype.kind == "bool":
        return Difference(a.name, None, None, rows, agreed=rows == 1.0)
    absolute, relative = distances(left, right, same)
    if not floating:
        return Difference(a.name, _top(absolute), _top(relative), rows, agreed=rows == 1.0)
    larger = np.maximum(np.abs(left), np.abs(right))
    within = bool(np.all(same | (np.isfinite(larger) & (absolute <= ATOL + RTOL[a.datatype.name] * larger))))
    return Difference(a.name, _top(absolute), _top(relative), rows, agreed=within)


def _same(a: Sequence[bytes], b: Sequence[bytes]) -> list[bool]:
    return [x == y for x, y in zip(a, b, strict=True)] if len(a) == len(b) else [False] * len(a)


def numbers(datatype: Datatype, data: bytes | memoryview) -> Array:
    """The elements, floating point as FP64; whole numbers stay what they are, for FP64 cannot tell large ones apart."""
    array = np.frombuffer(data, datatype.numpy)
    if datatype.name == "BF16":
        return (array.astype("<u4") << 16).view("<f4").astype(np.float64)
    return array.astype(np.float64) if datatype.name in RTOL else array


def same_numbers(datatype: Datatype, left: Array, right: Array) -> Array:
    """Element by element, whether two arrays that `numbers` gave are equal."""
    same: Array = left == right
    return same | (np.isnan(left) & np.isnan(right)) if datatype.name in RTOL else same


def distances(left: Array, right: Array, same: Array) -> tuple[Array, Array]:
    """|a − b|, and the same by the larger of the two; both FP64 and finite."""
    with np.errstate(all="ignore"):
        a, b = left.astype(np.float64), right.astype(np.float64)
        absolute = np.where(same, 0.0, np.nan_to_num(np.abs(a - b), nan=LARGEST, posinf=LARGEST))
        larger = np.maximum(np.abs(a), np.abs(b))
        ratio = np.nan_to_num(absolute / larger, nan=LARGEST, posinf=LARGEST)
        relative = np.where(same, 0.0, np.where(np.isfinite(larger) & (larger > 0), ratio, LARGEST))
    return absolute, relative


def _equal_rows(same: np.ndarray[Any, np.dtype[Any]], shape: tuple[int, ...]) -> float:
    rows = shape[0] if shape else 1
    if not rows or not same.size:
        return 1.0
    return float(same.reshape(rows, -1).all(axis=1).mean())


def _top(values: np.ndarray[Any, np.dtype[Any]]) -> float:
    return float(values.max()) if values.size else 0.0


class Agreement:
    """What came of all comparisons of one model version."""

    def __init__(self) -> None:
        self._batches: dict[Outcome, int] = dict.fromkeys(OUTCOMES, 0)
        self._outputs: dict[str, OutputAgreement] = {}

    def count(self, outcome: Outcome) -> None:
        """A batch that was drawn, but not compared."""
        self._batches[outcome] += 1

    def compared(self, differences: Sequence[Difference]) -> bool:
        """A batch was answered twice; returns whether the answers agree."""
        agreed = all(difference.agreed for difference in differences)
        self._batches["agreed" if agreed else "differed"] += 1
        for new in differences:
            old = self._outputs.get(new.output)
            self._outputs[new.output] = OutputAgreement(
                new.output,
                _worse(new.absolute, old.max_absolute if old is not None else None),
                _worse(new.relative, old.max_relative if old is not None else None),
                min(new.equal_rows, old.min_equal_rows if old is not None else 1.0),
            )
        return agreed

    def statistics(self) -> AgreementStatistics:
        return AgreementStatistics(dict(self._batches), tuple(self._outputs.values()))

    def __repr__(self) -> str:
        return f"<Agreement {self._batches}>"


def _worse(a: float | None, b: float | None) -> float | None:
    return a if b is None else b if a is None else max(a, b)
