"""An output tensor → its highest values per row, with index and label (OIP's classification extension).

Rules (wire notes §1.11): the result is BYTES of shape [rows, min(n, elements of a row)], without the batch dimension
where the model does not batch; each element is `value:index` or `value:index:label`; floats are written with six
decimals, integers plainly; the highest value comes first, and of equal values the one with the lower index. NaN ranks
as −Infinity. An index without a label, or with an empty one, has no third part.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from gateway.core.request import OutputTensor
from gateway.core.tensor import DATATYPE, Datatype, pack_bytes
from gateway.errors import InvalidRequest

MAX_STRINGS: Final = 262_144
"""Of one output of one request: making more would hold up everybody else for longer than a few tenths of a second."""
_RANKED: Final = frozenset({"float", "int", "uint"})
_BYTES: Final = DATATYPE["BYTES"]
_SELECT_FACTOR: Final = 8
"""Where fewer than one in so many values of a long row are wanted, the others are left out before sorting."""
_LONG_ROW: Final = 256
"""Shorter rows are ranked together: one by one, numpy's calls would cost more than the sorting."""
_AT_ONCE: Final = 65_536
"""Elements ranked together."""


def check_classifiable(name: str, datatype: Datatype) -> None:
    """Raises InvalidRequest unless the values of an output of this datatype can be ranked."""
    if datatype.kind not in _RANKED:
        raise InvalidRequest(
            f"output '{name}': class result not available for output due to unsupported type '{datatype}'; ask for it "
            "without the parameter 'classification'"
        )


def classify(output: OutputTensor, classes: int, labels: tuple[str, ...], batched: bool) -> OutputTensor:
    """The `classes` highest values of each row of `output`.

    Args:
        output: of a datatype that `check_classifiable` lets pass; with `batched` its first dimension is rows.
        classes: at least 1; capped at the number of elements of a row.
        labels: by index; may be shorter than a row.

    Raises:
        InvalidRequest: more strings than one answer may hold.
    """
    rows = output.shape[0] if batched else 1
    numbers: np.ndarray[Any, Any] = np.frombuffer(output.data, output.datatype.numpy)
    table = numbers.reshape(rows, -1) if numbers.size else numbers.reshape(rows, 0)
    count = min(classes, table.shape[1])
    if rows * count > MAX_STRINGS:
        raise InvalidRequest(
            f"output '{output.name}': classification of {rows} rows with {count} classes each makes more than "
            f"{MAX_STRINGS} strings; ask for fewer classes, or send fewer rows"
        )
    form = b"%f:%d" if output.datatype.kind == "float" else b"%d:%d"
    endings = _endings(labels, table.shape[1])
    elements: list[bytes] = []
    some = max(1, _AT_ONCE // max(1, table.shape[1]))
    for first in range(0, rows if count else 0, some):
        part = table[first : first + some]
        places = _highest(part, count)
        values = np.take_along_axis(part, places, 1)
        for value, index in zip(values.ravel().tolist(), places.ravel().tolist(), strict=True):
            text = form % (value, index)
            elements.append(text + endings[index] if index < len(endings) else text)
    shape = (rows, count) if batched else (count,)
    return OutputTensor(output.name, _BYTES, shape, pack_bytes(elements))


def _endings(labels: tuple[str, ...], length: int) -> list[bytes]:
    return [b":" + label.encode() if label else b"" for label in labels[:length]]


def _highest(table: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
    """Indexes of the `count` highest values of each row, the highest first; of equal ones the lowest index first."""
    ranks = np.where(np.isnan(table), -np.inf, table) if table.dtype.kind == "f" else table
    if ranks.shape[1] >= _LONG_ROW and count * _SELECT_FACTOR < ranks.shape[1]:
        return np.stack([_highest_of_long(rank, count) for rank in ranks])
    return _descending(ranks)[:, :count]


def _highest_of_long(rank: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
    size = len(rank)
    least = np.partition(rank, size - count)[size - count]
    places = np.flatnonzero(rank >= least)
    found: np.ndarray[Any, Any] = places[_descending(rank[places])[:count]]
    return found


def _descending(ranks: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A stable sort is ascending only, and unsigned numbers cannot be negated: so everything runs backwards."""
    order: np.ndarray[Any, Any] = ranks.shape[-1] - 1 - np.argsort(ranks[..., ::-1], axis=-1, kind="stable")
    return order[..., ::-1]
