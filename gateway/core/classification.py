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
"""Of one output of one request: making more would hold up everybody else for longer than a tenth of a second or so."""
_RANKED: Final = frozenset({"float", "int", "uint"})
_BYTES: Final = DATATYPE["BYTES"]
_SELECT_FACTOR: Final = 8
"""Where fewer than one in so many values are wanted, the others are left out before sorting."""


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
    for row in table:
        for index in _highest(row, count):
            text = form % (row[index].item(), index)
            elements.append(text + endings[index] if index < len(endings) else text)
    shape = (rows, count) if batched else (count,)
    return OutputTensor(output.name, _BYTES, shape, pack_bytes(elements))


def _endings(labels: tuple[str, ...], length: int) -> list[bytes]:
    return [b":" + label.encode() if label else b"" for label in labels[:length]]


def _highest(row: np.ndarray[Any, Any], count: int) -> list[int]:
    """Indexes of the `count` highest values, the highest first; of equal ones the lowest index first."""
    if count == 0:
        return []
    rank = np.where(np.isnan(row), -np.inf, row) if row.dtype.kind == "f" else row
    size = len(rank)
    if count * _SELECT_FACTOR < size:
        least = np.partition(rank, size - count)[size - count]
        places = np.flatnonzero(rank >= least)
        rank = rank[places]
        order = _descending(rank)[:count]
        return [int(place) for place in places[order]]
    return [int(place) for place in _descending(rank)[:count]]


def _descending(rank: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A stable sort is ascending only, and unsigned numbers cannot be negated: so everything runs backwards."""
    order: np.ndarray[Any, Any] = (len(rank) - 1 - np.argsort(rank[::-1], kind="stable"))[::-1]
    return order
