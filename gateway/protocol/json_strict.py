"""Strict JSON through the standard library, for texts that hold NaN or Infinity, and to word what is wrong.

Stricter than its default: UTF-8 without BOM only, no duplicate keys, no number that overflows to infinity, nesting
bounded. −0 stays −0.0 (an integer cannot hold it). Slow: never the first road for a body.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final

from gateway.errors import InvalidRequest

MAX_INTEGER_DIGITS: Final = 400
"""An integer this long is over every datatype's range, and 10^400 is not a finite float either."""


def parse_strict(body: bytes) -> Any:
    """JSON text → Python objects.

    Raises:
        InvalidRequest: not UTF-8, not JSON, a key given twice, a number out of range, or nested too deeply.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"request body is not valid UTF-8 at byte {error.start}") from error
    if text.startswith("\ufeff"):
        raise InvalidRequest("request body starts with a byte order mark; send plain UTF-8")
    try:
        return _DECODER.decode(text)
    except RecursionError as error:
        raise InvalidRequest("request body is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"failed to parse the request JSON buffer: {error.msg} at line {error.lineno} column {error.colno}"
        ) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"the key '{twice[:64]}' is given twice in one JSON object; give each key once")
    return members


def _float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise InvalidRequest(f"the number {text[:32]} is too large for a 64-bit float")
    return number


def _integer(text: str) -> int | float:
    if text == "-0":
        return -0.0
    if len(text) > MAX_INTEGER_DIGITS:
        raise InvalidRequest(f"the integer {text[:32]}… has {len(text)} digits, more than any datatype holds")
    return int(text)


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_int=_integer)


class MinusZero(int):
    """The integer literal −0: zero wherever an integer is wanted; floating-point data keeps its sign."""
