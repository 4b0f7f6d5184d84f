"""JSON text → Python objects, by the parser that suits its size; both refuse what strict JSON refuses.

`parse_small` makes Python objects of everything (orjson); where orjson would read something without a word (keys given
twice, the sign of −0) or cannot read NaN and Infinity, the strict parser of the standard library reads it or words what
is wrong. `parse_large` leaves the `data` arrays of tensors in simdjson's hands, which turns them into numbers in C. It
hands anything odd back to its caller instead of wording it.
"""

from __future__ import annotations

import re
from typing import Any, Final

import orjson
import simdjson

from gateway.protocol.json_strict import given_twice, parse_strict
from gateway.protocol.oip_plan import MAX_INPUTS

MINUS_ZERO: Final = re.compile(rb"-0[\s,\]}]")
_MAX_BESIDE_DATA: Final = 4096
"""Bytes of a value that is not tensor data, where simdjson has read the body."""
_MAX_LOOKED_UP: Final = 64
"""Members of one object; simdjson finds each by reading through all."""


def parse_large(body: bytes, tensors: str) -> Any:
    """JSON text → Python objects, but for the `data` arrays of the list under the key `tensors`, which stay simdjson's.
    Nesting and a byte order mark are the caller's to look for. None: not an object.

    Raises:
        ValueError, RuntimeError: another road reads it better, or none at all.
    """
    return _shallow(simdjson.Parser().parse(body), tensors)


def parse_small(body: bytes) -> Any:
    """JSON text → Python objects, strictly: no duplicate keys, no BOM, UTF-8 only; NaN literals allowed."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return parse_strict(body)  # reads NaN and Infinity, or says where the text is broken
    if body.count(b":") != _count_keys(document) or MINUS_ZERO.search(body):
        return parse_strict(body)
    return document


def _count_keys(value: Any) -> int:
    if type(value) is dict:
        return len(value) + sum(map(_count_keys, value.values()))
    if type(value) is list and value and type(value[0]) in (dict, list):
        return sum(map(_count_keys, value))
    return 0


def _shallow(document: Any, tensors: str) -> Any:
    """A simdjson document → dict; the `data` arrays of tensors stay simdjson arrays.

    Raises:
        ValueError: much is written beside the data, which the general road reads faster.
    """
    if not isinstance(document, simdjson.Object):
        return None
    result = _members(document)
    for name, value in result.items():
        if name == tensors and isinstance(value, simdjson.Array):
            if len(value) > MAX_INPUTS:
                raise ValueError("too many tensors")
            result[name] = [_shallow_input(item) for item in value]
        else:
            result[name] = _plain(value)
    return result


def _shallow_input(item: Any) -> Any:
    if not isinstance(item, simdjson.Object):
        return _plain(item)
    return {
        name: value if name == "data" and isinstance(value, simdjson.Array) else _plain(value)
        for name, value in _members(item).items()
    }


def _members(item: Any) -> dict[str, Any]:
    """One level of an object. Its values are looked up one by one: `items()` would turn all of them into Python
    objects, whole, and lose keys given twice further down.

    Raises:
        ValueError: keys that simdjson looks up slowly (many) or wrongly (holding NUL).
    """
    names = list(item)
    if len(names) > _MAX_LOOKED_UP or any("\0" in name for name in names):
        raise ValueError("not an object for simdjson")
    if len(set(names)) != len(names):
        raise given_twice(names)
    return {name: item[name] for name in names}


def _plain(value: Any) -> Any:
    if not isinstance(value, (simdjson.Object, simdjson.Array)):
        return value
    text: Any = value.mini  # bytes; its stub says otherwise
    if len(text) > _MAX_BESIDE_DATA:
        raise ValueError("not data, but large")
    return parse_small(text)
