"""What a validation error of a section says to whoever wrote the file: what was expected, what was found, an example.

Rules: in the file's own terms (keys, true, a list), never Python's or pydantic's; an example comes from the key's own
description; a value that may be a secret is not repeated, and a long text is cut.
"""

from __future__ import annotations

import re
from typing import Any, Final, get_args

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from gateway.config_schema import BACKEND_NAME, HEADER_NAME
from gateway.config_section import Section
from gateway.protocol.spelling import nearest, unknown_key

_EXPECTED: Final = {
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "finite_number": "expected a finite number",
    "string_type": "expected text",
    "bool_type": "expected true or false",
    "tuple_type": "expected a list",
    "dict_type": "expected keys and values",
    "model_type": "expected keys and values",
    "model_attributes_type": "expected keys and values",
}
_BOUNDS: Final = {
    "ge": "at least",
    "gt": "more than",
    "le": "at most",
    "lt": "less than",
    "min_length": "of length at least",
    "max_length": "of length at most",
}
_PATTERNS: Final = {
    BACKEND_NAME: "up to 128 of A-Z a-z 0-9 . _ : -",
    HEADER_NAME: "up to 64 of A-Z a-z 0-9 -",
}
"""What the texts of keys may consist of, in words."""


def shown(value: object) -> str:
    """What stands in the place of what was expected, in a few words; long texts are cut."""
    if isinstance(value, dict):
        return "keys and values"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return f'the text "{value[:60]}"'
    return (
        "nothing" if value is None else ("true" if value is True else "false" if value is False else repr(value)[:60])
    )


def explain(kind: type[Section], details: ErrorDetails) -> str:
    """The fault's text in the file's own terms, with an example of what to write."""
    error, context, value = details["type"], details.get("ctx", {}), details["input"]
    holder, key = _locate(kind, details["loc"])
    example = _example(holder, key)
    if error in ("extra_forbidden", "missing"):
        return f"is missing; {example}" if error == "missing" else unknown_key(key, _fields(holder))
    known = _fields(holder).get(key)
    if known is not None and known.repr is False:  # what stands there may be the secret itself
        return f"expected env:VARIABLE or file:PATH, the place where it is; {example}"
    if error in _EXPECTED:
        hint = f'write {key}: "{value}" (in quotes)' if error == "string_type" and _names(value, known) else example
        return f"{_EXPECTED[error]}, found {shown(value)}; {hint}"
    if error == "literal_error":
        return _explain_choice(value, str(context["expected"]))
    if error == "string_pattern_mismatch":
        return _explain_pattern(value, key, str(context["pattern"]), example)
    return f"{_explain_bound(details, context)}; {example}"


def _names(value: object, known: FieldInfo | None) -> bool:
    """Whether the number only lacks its quotes: the key holds a name. An address or a path is never a number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return known is None or not known.examples or re.fullmatch(r"[\w-]+", str(known.examples[0])) is not None


def _explain_pattern(value: object, key: str, pattern: str, example: str) -> str:
    if key == "digest":
        return "expected sha256: and 64 hexadecimal digits in lower case, as `gateway models` shows"
    return f"expected {_PATTERNS.get(pattern, f'text that matches {pattern}')}, found {shown(value)}; {example}"


def _explain_bound(details: ErrorDetails, context: dict[str, Any]) -> str:
    limit = next((name for name in _BOUNDS if name in context), None)
    if limit is None:
        return details["msg"][:1].lower() + details["msg"][1:]
    number, value = context[limit], details["input"]
    found = f"length {len(value)}" if "length" in limit else shown(value)
    return f"must be {_BOUNDS[limit]} {int(number) if number == int(number) else number}, found {found}"


def _explain_choice(value: object, expected: str) -> str:
    meant = nearest(str(value), re.findall(r"'([^']*)'", expected))
    return f"{shown(value)} is not possible; " + (f"did you mean '{meant}'?" if meant else f"write {expected}")


def is_ghost(details: ErrorDetails) -> bool:
    """A list is called too short only because its faulty elements, each with a fault of its own, are not counted."""
    value = details["input"]
    return (
        details["type"] == "too_short"
        and isinstance(value, list | tuple)
        and len(value) >= details.get("ctx", {})["min_length"]
    )


def _locate(kind: type[Section], location: tuple[int | str, ...]) -> tuple[type[Section], str]:
    """The section class that holds the key at `location`, and the key."""
    keys = [part for part in location if isinstance(part, str)]
    for key in keys[:-1]:
        known = _fields(kind).get(key)  # None: the key of a mapping, such as a host, which is the user's own
        kind = (known and _section_in(known.annotation)) or kind
    return kind, keys[-1] if keys else ""


def _fields(kind: type[Section]) -> dict[str, FieldInfo]:
    """The section's keys as the file writes them."""
    return {known.alias or name: known for name, known in kind.model_fields.items()}


def _section_in(annotation: object) -> type[Section] | None:
    """The section class of a field: its type, one of its alternatives, or what it is a list of; None: a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)


def _example(kind: type[Section], key: str) -> str:
    known = _fields(kind).get(key)
    if known is None or not known.examples:
        return "see `gateway schema`"
    value = known.examples[0]
    text = str(value).lower() if isinstance(value, bool) else str(value).replace("'", "")
    return f"write for example {key}: {text}"
