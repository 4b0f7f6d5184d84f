"""Messages of the protocol ↔ documents: dicts whose keys are the messages' fields, as REST's JSON has them.

Everything but inference goes this way (inference is read and written by hand, see `oip_grpc_cut` and
`oip_grpc_answer`). Rules: what is no message of the kind asked for is refused; keys of a document that its message does
not have are left out, as JSON may say more than the .proto files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import DecodeError

from gateway.errors import InvalidRequest
from gateway.protocol import schema


def read(name: str, data: bytes | memoryview) -> Any:
    """The message `name` (in full) of these bytes.

    Raises:
        InvalidRequest: they are none.
    """
    try:
        return schema.message(name).FromString(bytes(data))
    except DecodeError as error:
        raise InvalidRequest(
            f"the request is not a valid {name}: its bytes cannot be parsed; check the client's .proto file, and that "
            "strings are UTF-8"
        ) from error


def write(name: str, document: dict[str, Any]) -> bytes:
    """The bytes of a message `name` (in full) that says what the document says."""
    kind = schema.message(name)
    try:
        message = kind(**document)  # a tenth of the other road's time: statistics of many models are long
    except (TypeError, ValueError):  # not the message's fields to the letter
        message = kind()
        json_format.ParseDict(document, message, ignore_unknown_fields=True)
    written: bytes = message.SerializeToString()
    return written


def one_of(value: Any, oneof: str) -> Any:
    """What a value that is one of several kinds holds; None: nothing."""
    kind = value.WhichOneof(oneof)
    return None if kind is None else getattr(value, kind)


def trace_document(settings: Mapping[str, str | Sequence[str]]) -> dict[str, Any]:
    """Trace settings as REST has them → a TraceSettingResponse."""
    return {"settings": {name: {"value": [v] if isinstance(v, str) else list(v)} for name, v in settings.items()}}


def log_document(settings: Mapping[str, bool | int | str]) -> dict[str, Any]:
    """Log settings as REST has them → a LogSettingsResponse."""
    kinds = {bool: "boolParam", int: "uint32Param", str: "stringParam"}
    return {"settings": {name: {kinds[type(value)]: value} for name, value in settings.items()}}
