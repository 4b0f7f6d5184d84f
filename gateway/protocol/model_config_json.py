"""A model's configuration as JSON (`config` of a load request, and what GET …/config prints) → `ModelConfig`.

The JSON is protobuf's: names in snake_case or camelCase, 64-bit numbers with or without quotes, enums as words. Rule:
one validator. The JSON becomes a message, the message config.pbtxt's text, and the text goes through
`model_config.parse`; nothing about a key is decided here. Where JSON states what a message cannot hold apart from
"not stated" (`max_batch_size` 0, empty `dims`), the text states it too.
"""

from __future__ import annotations

import json
from collections.abc import MutableSequence
from typing import Any, Final

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.text_encoding import CEscape

from gateway.errors import ConfigError, Fault
from gateway.protocol.model_config import ModelConfig, parse
from gateway.protocol.schema import message
from gateway.protocol.spelling import unknown_key
from gateway.protocol.text_format import MAX_CHARACTERS

MAX_DEPTH: Final = 32


def parse_json(text: str, file: str = "config") -> tuple[ModelConfig, str]:
    """Read a configuration in JSON: what it says, and the config.pbtxt that says the same. `file` names it in faults.

    Raises:
        ConfigError: not JSON, not a ModelConfig, or refused by `model_config.parse`; lines are those of the text form.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError([Fault(file, 0, "", f"is longer than {MAX_CHARACTERS} characters")])
    try:
        stated = json.loads(text)
        if not isinstance(stated, dict):
            raise ConfigError([Fault(file, 0, "", 'must be a JSON object, for example {"max_batch_size": 16}')])
        json.dumps(stated, ensure_ascii=False).encode()  # protobuf's library breaks on lone surrogates in names
        config = message("inference.ModelConfig")()
        json_format.ParseDict(stated, config, max_recursion_depth=MAX_DEPTH)
    except json_format.ParseError as error:
        fault = _unknown_key(stated, config.DESCRIPTOR, file)
        fault = fault or Fault(file, 0, "", f"is not a model configuration: {_one_line(str(error))}")
        raise ConfigError([fault]) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError([Fault(file, 0, "", f"is not valid JSON: {_one_line(str(error))}")]) from None
    lines: list[str] = []
    if not config.max_batch_size and ("max_batch_size" in stated or "maxBatchSize" in stated):
        lines.append("max_batch_size: 0")
    _write(config, "", lines)
    canonical = "".join(f"{line}\n" for line in lines)
    return parse(canonical, file), canonical


def _unknown_key(stated: Any, kind: Any, file: str, path: str = "", depth: int = 0) -> Fault | None:
    """The first key, in the order of the text, that a message of this kind does not have."""
    if not isinstance(stated, dict) or depth > MAX_DEPTH:
        return None
    known = {name: field for field in kind.fields for name in (field.name, field.json_name)}
    for key, value in stated.items():
        where = f"{path}{_one_line(key)[:64]}"
        field = known.get(key)
        if field is None:
            why = unknown_key(_one_line(key), [field.name for field in kind.fields])
            return Fault(file, 0, where, why)
        for place, inner, below in _messages(field, value):
            if (fault := _unknown_key(inner, below, file, f"{where}{place}.", depth + 1)) is not None:
                return fault
    return None


def _messages(field: Any, value: Any) -> list[tuple[str, Any, Any]]:
    """(place below the field, JSON, kind) of each message in a field's JSON."""
    if field.message_type is None:
        return []
    if _is_map(field):
        kind = field.message_type.fields_by_name["value"].message_type
        entries = value.items() if isinstance(value, dict) and kind is not None else ()
        return [(f"[{_one_line(key)[:64]}]", inner, kind) for key, inner in entries]
    if isinstance(value, list):
        return [(f"[{at}]", inner, field.message_type) for at, inner in enumerate(value)]
    return [("", value, field.message_type)]


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]


def _write(found: Any, indent: str, lines: list[str]) -> None:
    """A message as text format, a field a line."""
    for field in found.DESCRIPTOR.fields:
        value = getattr(found, field.name)
        if _is_map(field):
            of_value = field.message_type.fields_by_name["value"]
            for key in sorted(value):
                lines.append(f"{indent}{field.name} {{")
                _write_field("key", field.message_type.fields_by_name["key"], key, indent + "  ", lines)
                _write_field("value", of_value, value[key], indent + "  ", lines)
                lines.append(f"{indent}}}")
        elif isinstance(value, MutableSequence):
            if not value and field.name == "dims":
                lines.append(f"{indent}dims: [ ]")
            for element in value:
                _write_field(field.name, field, element, indent, lines)
        elif found.HasField(field.name) if field.has_presence else value != field.default_value:
            _write_field(field.name, field, value, indent, lines)


def _write_field(name: str, field: Any, value: Any, indent: str, lines: list[str]) -> None:
    if field.message_type is not None:
        lines.append(f"{indent}{name} {{")
        _write(value, indent + "  ", lines)
        lines.append(f"{indent}}}")
    elif field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        lines.append(f"{indent}{name}: {value if known is None else known.name}")
    elif field.type == FieldDescriptor.TYPE_STRING:
        lines.append(f'{indent}{name}: "{CEscape(value, True)}"')
    elif field.type == FieldDescriptor.TYPE_BOOL:
        lines.append(f"{indent}{name}: {str(value).lower()}")
    else:
        lines.append(f"{indent}{name}: {value}")


def _is_map(field: Any) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)
