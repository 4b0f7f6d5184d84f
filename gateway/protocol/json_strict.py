"""Strict JSON through the standard library, for texts that hold NaN or Infinity, and to word what is wrong.

Stricter than its default: UTF-8 without BOM only, no lone surrogates, no duplicate keys, no number that overflows a
64-bit float, nesting bounded. The integer −0 keeps its sign (`MinusZero`). Slow: never the first road for a body.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any, Final

from gateway.errors import Malformed

MAX_INTEGER_DIGITS: Final = 308
"""Every integer of so few digits is a finite float; a longer one is tried, as a float, before it is made."""
_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")


class MinusZero(int):
    """The integer literal −0: zero wherever an integer is wanted; floating-point data keeps its sign."""


def parse_strict(body: bytes) -> Any:
    """JSON text → Python objects.

    Raises:
        Malformed: not UTF-8, not JSON, a lone surrogate, a key given twice, a number out of range, or nested too
            deeply.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise Malformed(f"request body is not valid UTF-8 at byte {error.start}") from error
    if text.startswith("\ufeff"):
        raise Malformed("request body starts with a byte order mark; send plain UTF-8")
    try:
        document = _DECODER.decode(text)
        if _SURROGATE.search(text):
            _refuse_lone_surrogates(document)
    except RecursionError as error:
        raise Malformed("request body is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise Malformed(
            f"failed to parse the request JSON buffer: {error.msg} at line {error.lineno} column {error.colno}"
        ) from error
    return document


def given_twice(names: Iterable[str]) -> Malformed:
    """The refusal of an object with these keys, one of which is there twice."""
    seen: set[str] = set()
    twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
    return Malformed(f"the key '{twice[:64]}' is given twice in one JSON object; give each key once")


def _refuse_lone_surrogates(document: Any) -> None:
    if type(document) is str:
        try:
            document.encode()
        except UnicodeEncodeError as error:
            raise Malformed(
                "request body holds a lone surrogate (\\ud800 to \\udfff without its other half) in a string"
            ) from error
    elif type(document) is dict:
        for name, value in document.items():
            _refuse_lone_surrogates(name)
            _refuse_lone_surrogates(value)
    elif type(document) is list:
        for value in document:
            _refuse_lone_surrogates(value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise given_twice(name for name, _ in pairs)
    return members


def _float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise Malformed(f"the number {text[:32]} is too large for a 64-bit float")
    return number


def _integer(text: str) -> int:
    if text == "-0":
        return MinusZero(0)
    if len(text) > MAX_INTEGER_DIGITS and math.isinf(float(text)):
        raise Malformed(f"the integer {text[:32]}… has {len(text)} digits, more than any datatype holds")
    return int(text)


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_int=_integer)
