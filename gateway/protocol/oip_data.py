"""The `data` of one JSON tensor → checked elements, on the cheapest road that still checks each of them.

Rules (wire notes §1.8): data may be flat, nested or irregularly nested; it is flattened in order and only the
count is compared with the shape. BOOL takes only true and false, integers only integer literals within range,
floats any number (1e39 becomes Infinity in FP32), BYTES only strings. FP16 and BF16 are taken as numbers only where
the server's owner says so (`InputPlan.in_json`), and rounded to the nearest value, ties to even.
Small arrays stay Python lists and become bytes once per batch; large ones (simdjson) become bytes here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from gateway.core.request import InputTensor
from gateway.core.tensor import Datatype, pack_bytes
from gateway.errors import InvalidRequest, Malformed
from gateway.protocol.json_literals import Literals
from gateway.protocol.json_strict import MinusZero
from gateway.protocol.oip_plan import MAX_STRINGS, InputPlan, shown

MAX_DEPTH: Final = 100
WIDEST: Final = 8
"""Bytes of the widest integers."""
_BF16_NAN: Final = np.uint32(0x7FC0)
_BLOCK: Final = 32_768
"""Bytes looked at in one step: what it makes on the way stays in the processor's cache."""
_RANGE: Final = {
    (kind, size): (0, 2 ** (8 * size) - 1) if kind == "uint" else (-(2 ** (8 * size - 1)), 2 ** (8 * size - 1) - 1)
    for kind in ("int", "uint")
    for size in (1, 2, 4, 8)
}
_TYPES: Final[dict[str, frozenset[type]]] = {
    "float": frozenset({float, int}),
    "half": frozenset({float, int}),
    "int": frozenset({int}),
    "uint": frozenset({int}),
    "bool": frozenset({bool}),
    "bytes": frozenset({str}),
}
_WANTED: Final = {
    "float": "numbers",
    "half": "numbers",
    "int": "integers",
    "uint": "integers that are not negative",
    "bool": "true or false",
    "bytes": "strings",
}


def check_count(plan: InputPlan, got: int) -> None:
    """Raises Malformed unless `got` elements fill the shape exactly."""
    if got != plan.elements:
        raise Malformed(
            f"input '{plan.name}': shape {list(plan.shape)} needs {plan.elements} elements, 'data' holds {got}. "
            "Shape does not match true shape of 'data' field"
        )


def from_checked(plan: InputPlan, values: list[Any]) -> InputTensor:
    """Elements whose Python types a typed decoder has proven; count and range are still checked here."""
    if len(values) != plan.elements:
        check_count(plan, len(values))
    kind = plan.datatype.kind
    if kind in {"int", "uint"}:
        _check_range(plan, values)
    elif kind == "bytes":
        packed = pack_bytes([value.encode() for value in values])
        return InputTensor(plan.datatype, plan.shape, None, packed)
    elif kind == "half":
        return InputTensor(plan.datatype, plan.shape, None, pack_half(plan.datatype, values))
    return InputTensor(plan.datatype, plan.shape, values, None)


def pack_half(datatype: Datatype, values: Sequence[float]) -> bytes:
    """Numbers → FP16 or BF16 in OIP binary form, each to the nearest value; what is too large becomes an infinity."""
    numbers = np.array(values, np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        if datatype.name == "FP16":
            return numbers.astype("<f2").tobytes()
        # BF16 is the upper half of a float32. Rounded twice, by way of float32, a number could miss the nearest value;
        # so the first step rounds towards zero and marks in the last bit that something was cut off.
        single = numbers.astype(np.float32)
        back = single.astype(np.float64)
        inexact = np.isfinite(back) & (back != numbers)
        bits = single.view(np.uint32)
        bits = np.where(inexact & (np.abs(back) > np.abs(numbers)), bits - np.uint32(1), bits) | inexact
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.where(np.isnan(numbers), _BF16_NAN, rounded).astype("<u2").tobytes()


def from_json(plan: InputPlan, data: Any) -> InputTensor:
    """Elements as orjson or the standard library made them: flat or nested lists of any JSON types."""
    kind = plan.datatype.kind
    if not plan.in_json:
        raise InvalidRequest(
            f"receiving {plan.datatype} data via JSON is not supported. Please use the binary data format for "
            f"input '{plan.name}'"
        )
    if not isinstance(data, list):
        raise Malformed(f"input '{plan.name}': 'data' must be an array, got {_json_type(data)}")
    allowed = _TYPES[kind]
    if not allowed.issuperset(map(type, data)):
        flat: list[Any] = []
        _flatten(plan, data, flat, 1)
        zero = -0.0 if kind in {"float", "half"} else 0
        data = [zero if type(item) is MinusZero else item for item in flat]
        if not allowed.issuperset(map(type, data)):
            _refuse_element(plan, data)
    try:
        return from_checked(plan, data)
    except UnicodeEncodeError as error:
        raise Malformed(f"input '{plan.name}': a string holds a lone surrogate, which is not valid Unicode") from error


def from_array(plan: InputPlan, array: Any, literals: Literals | None = None) -> InputTensor:
    """A simdjson array of any nesting. Numbers are checked and flattened in C; other kinds go through lists.

    `literals`: NaN and Infinity that stand in it in disguise.
    """
    kind = plan.datatype.kind
    if kind not in {"float", "int", "uint"}:
        if kind == "bytes" and len(array) > MAX_STRINGS:  # looked at before each of them becomes a Python object
            raise InvalidRequest(
                f"input '{plan.name}': 'data' holds {len(array)} elements, at most {MAX_STRINGS} strings are allowed; "
                "send several requests"
            )
        return from_json(plan, array.as_list())
    letter, wire = {"float": ("d", "<f8"), "int": ("i", "<i8"), "uint": ("u", "<u8")}[kind]
    try:
        numbers: np.ndarray[Any, Any] = np.frombuffer(array.as_buffer(of_type=letter), wire)
    except (TypeError, ValueError):
        if literals is not None:
            raise Malformed(
                f"input '{plan.name}': {plan.datatype} takes {_WANTED[kind]} only; one element is something else"
            ) from None
        # The slow road finds out which element is at fault, and why.
        return from_json(plan, array.as_list())
    check_count(plan, numbers.size)
    if literals is not None and kind == "float":
        numbers = literals.restored(numbers)
    return from_numbers(plan, numbers)


def from_numbers(plan: InputPlan, numbers: np.ndarray[Any, Any]) -> InputTensor:
    """Numbers of the datatype's kind in its widest type, as many as the shape needs; the range is checked here."""
    if plan.datatype.kind != "float" and numbers.size:
        _check_range(plan, [int(numbers.min()), int(numbers.max())])
    with np.errstate(over="ignore"):
        return InputTensor(plan.datatype, plan.shape, None, memoryview(numbers.astype(plan.datatype.numpy).tobytes()))


def holds_zero(tensor: InputTensor) -> bool:
    """Whether a decoded tensor is of floats and one of them is zero, of either sign."""
    if tensor.datatype.kind != "float":
        return False
    if tensor.buffer is None:
        return 0.0 in (tensor.values or ())
    return not np.frombuffer(tensor.buffer, tensor.datatype.numpy).all()


def may_nest_deeply(text: bytes) -> bool:
    """False: no array of numbers in this JSON text is nested deeper than MAX_DEPTH. True: it has to be looked at.

    Counts brackets without reading the text. Brackets in strings only shift the level at which an array of numbers
    starts, never the levels inside it, so the whole range of levels is an upper bound.
    """
    if len(text) < _BLOCK and text.count(b"[") <= MAX_DEPTH:
        return False
    codes = np.frombuffer(text, np.uint8)
    blocks = [codes[start : start + _BLOCK] for start in range(0, len(codes), _BLOCK)]
    brackets = np.concatenate([block[(block & 0xF9) == 0x59] for block in blocks])  # Y [ ] _
    if brackets.size <= MAX_DEPTH:
        return False
    levels = np.cumsum((brackets == ord("[")).astype(np.int64) - (brackets == ord("]")))
    return int(levels.max()) - min(int(levels.min()), 0) > MAX_DEPTH


def _check_range(plan: InputPlan, values: list[int]) -> None:
    if not values:
        return
    low, high = _RANGE[plan.datatype.kind, plan.datatype.itemsize]
    least, most = min(values), max(values)
    if least < low or most > high:
        wrong = least if least < low else most
        kind = Malformed if plan.datatype.itemsize == WIDEST else InvalidRequest  # no JSON number of 64 bits
        raise kind(
            f"input '{plan.name}': {shown(str(wrong))} is out of range for {plan.datatype}, which holds {low} to {high}"
        )


def _flatten(plan: InputPlan, data: list[Any], into: list[Any], depth: int) -> None:
    if depth > MAX_DEPTH:
        raise Malformed(f"input '{plan.name}': 'data' is nested deeper than {MAX_DEPTH} levels")
    for item in data:
        if type(item) is list:
            _flatten(plan, item, into, depth + 1)
        else:
            into.append(item)


def _refuse_element(plan: InputPlan, data: list[Any]) -> None:
    allowed = _TYPES[plan.datatype.kind]
    index, item = next((i, item) for i, item in enumerate(data) if type(item) not in allowed)
    raise Malformed(
        f"input '{plan.name}': element {index} is {_json_type(item)}, but {plan.datatype} takes "
        f"{_WANTED[plan.datatype.kind]} only"
    )


def _json_type(item: Any) -> str:
    if item is None:
        return "null"
    if isinstance(item, bool):
        return "true" if item else "false"
    if isinstance(item, (int, float)):
        return "a number" if not isinstance(item, float) else f"the number {item!r}"
    return {"str": "a string", "list": "an array", "dict": "an object"}.get(type(item).__name__, "another value")
