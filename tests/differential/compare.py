"""Two answers to one request, compared: a list of differences, each with a path into the answer.

Compared are the status, the headers of `exchange.HEADERS`, the body down to every value, the order of the keys of an
infer answer, the binary parts, and the words that the corpus asks for in errors. Not compared: the rest of an error's
text, times (`ns`, `last_inference`: only that they are unsigned integers), the order of lists whose members have names
(the repository index, statistics), and the digits of a float in JSON (the value it parses to is, as its datatype).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tests.differential.exchange import Reply, Step

ABSENT: Final = "(absent)"
TIMES: Final = frozenset({"ns", "last_inference"})


@dataclass(frozen=True)
class Difference:
    case: str
    path: str
    theirs: Any
    ours: Any

    def __str__(self) -> str:
        return f"{self.case}: {self.path}: Triton {short(self.theirs)}, we {short(self.ours)}"


def short(found: Any) -> str:
    text = repr(found)
    return text if len(text) <= 300 else f"{text[:300]}…"


def differences(case: str, step: Step, theirs: Reply, ours: Reply, prefix: str = "") -> list[Difference]:
    return [Difference(case, f"{prefix}{path}", a, b) for path, a, b in _all(step, theirs, ours)]


Found = Iterator[tuple[str, Any, Any]]


def _all(step: Step, theirs: Reply, ours: Reply) -> Found:
    if theirs.status != ours.status:
        yield "status", (theirs.status, theirs.text[:200]), (ours.status, ours.text[:200])
    for name in sorted({*theirs.headers, *ours.headers}):
        a, b = theirs.headers.get(name, ABSENT), ours.headers.get(name, ABSENT)
        if name == "inference-header-content-length" and ABSENT not in (a, b):
            continue  # digits of floats differ
        if a != b and theirs.ok == ours.ok:
            yield f"{'' if ours.ok else 'error.'}header.{name}", a, b
    if not ours.ok:
        yield from _error(step, ours)
    if not theirs.ok:
        for word in step.says:
            if word not in theirs.text:
                yield "corpus", theirs.text, f"Triton does not say {word!r}: correct the corpus"
    if theirs.ok and ours.ok:
        yield from _bodies("body", theirs.body, ours.body)
        if theirs.keys != ours.keys:
            yield "keys", theirs.keys, ours.keys
        if theirs.blobs != ours.blobs:
            yield "blobs", theirs.blobs, ours.blobs


def _error(step: Step, ours: Reply) -> Found:
    """An error of ours must be one by its form, and say what the corpus asks for."""
    http = isinstance(ours.status, int)
    form = not http or (isinstance(ours.body, dict) and list(ours.body) == ["error"])
    if http and getattr(step, "method", "") != "HEAD" and not form:
        yield "error form", '{"error": …}', ours.body
    for word in (*step.says, *step.names):
        if word not in ours.text:
            yield "words", word, ours.text


def _bodies(path: str, a: Any, b: Any) -> Found:
    if isinstance(a, dict) and isinstance(b, dict):
        yield from _objects(path, a, b)
    elif isinstance(a, list) and isinstance(b, list):
        a, b = _ordered(a), _ordered(b)
        if len(a) != len(b) or not any(isinstance(item, dict) for item in a):
            if not _equal(a, b):
                yield path, _names(a), _names(b)
        else:
            for place, (x, y) in enumerate(zip(a, b, strict=True)):
                yield from _bodies(f"{path}.{place}", x, y)
    elif path.rpartition(".")[2] in TIMES and _unsigned(a) and _unsigned(b):
        return
    elif path.endswith(".error_message"):
        return  # the words of an error within a stream
    elif not _equal(a, b):
        yield path, a, b


def _objects(path: str, a: dict[str, Any], b: dict[str, Any]) -> Found:
    if "datatype" in a and "data" in a and a.get("datatype") == b.get("datatype") and "data" in b:
        if not _same_values(a["datatype"], a["data"], b["data"]):
            yield f"{path}.data", a["data"], b["data"]
        a, b = ({key: item for key, item in side.items() if key != "data"} for side in (a, b))
    for key in sorted({*a, *b}):
        if key in a and key in b:
            yield from _bodies(f"{path}.{key}", a[key], b[key])
        elif key not in TIMES:
            yield f"{path}.{key}", a.get(key, ABSENT), b.get(key, ABSENT)


def _ordered(items: list[Any]) -> list[Any]:
    """Sorted by name and version where every member has a name and no place of its own (inputs and outputs do)."""
    if items and all(
        isinstance(item, dict) and "name" in item and not {"datatype", "data_type"} & item.keys() for item in items
    ):
        return sorted(items, key=lambda item: (item["name"], str(item.get("version", ""))))
    return items


def _names(items: list[Any]) -> list[Any]:
    return [item["name"] if isinstance(item, dict) and "name" in item else item for item in items]


def _unsigned(found: Any) -> bool:
    return (isinstance(found, int) and not isinstance(found, bool) and found >= 0) or (
        isinstance(found, str) and found.isdigit()
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    return type(a) is type(b) and bool(a == b)


def _same_values(datatype: str, a: list[Any], b: list[Any]) -> bool:
    if datatype not in ("FP32", "FP64") or not all(type(element) in (int, float) for element in (*a, *b)):
        return _equal(a, b)
    kind = np.float32 if datatype == "FP32" else np.float64
    with np.errstate(over="ignore"):
        return len(a) == len(b) and np.array_equal(np.array(a, kind), np.array(b, kind), equal_nan=True)
