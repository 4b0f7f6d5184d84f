"""The `parameters` of a request, its inputs and its outputs → checked options; the one reader for REST and gRPC.

A protocol hands in a mapping from name to Python value: str, int, bool or float, `Uint64` for a gRPC `uint64_param`,
None for a value that is there but empty, and whatever else JSON holds (refused here).

Rules (wire notes §1.8, §1.9, §1.11):
- own names have fixed types; numbers among them are not negative; a wrong one is refused by name;
- a caller's own parameters are strings, integers, booleans or doubles; they are taken, ignored and never echoed;
- names that start with `triton_` are reserved and refused;
- shared memory regions are refused by name until a server offers them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from gateway.core.request import InferRequest, SequenceStep
from gateway.errors import InvalidRequest, Malformed, Unsupported
from gateway.protocol.oip_plan import shown

MAX_UINT64: Final = 2**64 - 1
MAX_SEQUENCE_ID_BYTES: Final = 128
"""Longest textual sequence id."""
MAX_CLASSES: Final = 2**31 - 1
_CUSTOM: Final = frozenset({str, int, bool, float})
_NOTHING_RESERVED: Final[frozenset[str]] = frozenset()


class Uint64(int):
    """A gRPC `uint64_param`: numbers of the protocol may come as one, a caller's own parameters may not."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What a request's own parameters say."""

    stated_timeout_s: float = 0.0
    """0: not stated."""
    priority: int = 0
    sequence: SequenceStep | None = None
    binary_data_output: bool = False
    """REST: all outputs in binary form, where none is listed."""

    def apply(self, request: InferRequest) -> None:
        """Write what the scheduler needs to know into the request."""
        request.stated_timeout_s = self.stated_timeout_s
        request.priority = self.priority
        request.sequence = self.sequence


NO_OPTIONS: Final = RequestOptions()


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What the parameters of one requested output say."""

    binary_data: bool = False
    """REST: this output in binary form."""
    classes: int = 0
    """`classification`: how many of the highest values, with their indexes and labels; 0: the tensor itself."""


_PLAIN_OUTPUT: Final = OutputOptions()
_OF_REQUEST: Final = frozenset(
    {"sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "binary_data_output"}
)
_OF_OUTPUT: Final = frozenset({"binary_data", "classification"})
_OF_INPUT: Final = frozenset({"binary_data_size"})


def request_options(
    parameters: Mapping[str, object], allowed_reserved: frozenset[str] = _NOTHING_RESERVED
) -> RequestOptions:
    """A request's parameters. `allowed_reserved`: names that this protocol takes in spite of their prefix.

    Raises:
        InvalidRequest: a parameter is reserved, or not of its type.
    """
    if not parameters:
        return NO_OPTIONS
    _check_custom(parameters, "request", _OF_REQUEST, allowed_reserved)
    if _OF_REQUEST.isdisjoint(parameters):
        return NO_OPTIONS
    return RequestOptions(
        _count(parameters, "timeout", "request", MAX_UINT64) / 1e6,
        _count(parameters, "priority", "request", MAX_UINT64),
        _sequence(parameters),
        _flag(parameters, "binary_data_output", "request"),
    )


def input_options(parameters: Mapping[str, object], where: str) -> int | None:
    """`binary_data_size` of one input in bytes, None if there is none. `where`: the input as errors name it.

    Raises:
        InvalidRequest: a parameter is reserved, or not of its type.
        Unsupported: the input stands in a shared memory region.
    """
    if not parameters:
        return None
    _check_custom(parameters, where, _OF_INPUT, _NOTHING_RESERVED)
    _refuse_shared_memory(parameters, where)
    if "binary_data_size" not in parameters:
        return None
    return _count(parameters, "binary_data_size", where, MAX_UINT64)


def output_options(parameters: Mapping[str, object], where: str) -> OutputOptions:
    """The parameters of one requested output. `where`: the output as errors name it.

    Raises:
        InvalidRequest: a parameter is reserved, or not of its type.
        Unsupported: the output is wanted in a shared memory region.
    """
    if not parameters:
        return _PLAIN_OUTPUT
    _check_custom(parameters, where, _OF_OUTPUT, _NOTHING_RESERVED)
    _refuse_shared_memory(parameters, where)
    return OutputOptions(
        _flag(parameters, "binary_data", where),
        min(_count(parameters, "classification", where, MAX_UINT64), MAX_CLASSES),
    )


def _check_custom(
    parameters: Mapping[str, object], where: str, own: frozenset[str], allowed_reserved: frozenset[str]
) -> None:
    for name, value in parameters.items():
        if name in own:
            continue
        if name.startswith("triton_") and name not in allowed_reserved:
            raise InvalidRequest(
                f"{where}: parameter '{shown(name)}': parameter keys starting with 'triton_' are reserved for Triton "
                "usage and should not be specified"
            )
        if type(value) not in _CUSTOM and not _is_integer(value):
            raise InvalidRequest(
                f"{where}: parameter '{shown(name)}' has invalid type; it must be a string, integer, boolean or double"
            )


def _count(parameters: Mapping[str, object], name: str, where: str, most: int) -> int:
    value = parameters.get(name, 0)
    if not isinstance(value, int) or type(value) is bool:
        raise Malformed(f"{where}: parameter '{name}' must be an integer that is not negative")
    if not 0 <= value <= most:
        raise Malformed(
            f"{where}: parameter '{name}' must be an integer that is not negative and at most {most} (expected >= 0), "
            f"got {shown(str(value))}"
        )
    return int(value)


def _flag(parameters: Mapping[str, object], name: str, where: str) -> bool:
    value = parameters.get(name, False)
    if type(value) is not bool:
        raise Malformed(f"{where}: parameter '{name}' must be true or false")
    return value


def _sequence(parameters: Mapping[str, object]) -> SequenceStep | None:
    if "sequence_id" not in parameters and "sequence_start" not in parameters and "sequence_end" not in parameters:
        return None
    given = parameters.get("sequence_id", 0)
    identity: int | str
    if isinstance(given, str):
        if len(given.encode("utf-8", "replace")) > MAX_SEQUENCE_ID_BYTES:
            raise InvalidRequest(
                f"request: parameter 'sequence_id' is longer than {MAX_SEQUENCE_ID_BYTES} bytes; use a shorter text"
            )
        identity = given
    elif isinstance(given, int) and type(given) is not bool and 0 <= given <= MAX_UINT64:
        identity = int(given)
    else:
        raise Malformed("request: parameter 'sequence_id' must be a string, or an integer that is not negative")
    start = _flag(parameters, "sequence_start", "request")
    return SequenceStep(identity, start, _flag(parameters, "sequence_end", "request"))


def _refuse_shared_memory(parameters: Mapping[str, object], where: str) -> None:
    if "shared_memory_region" in parameters:
        raise Unsupported(f"{where}: shared memory regions of clients are not offered by this gateway")


def _is_integer(value: object) -> bool:
    """−0 is an integer of its own class; a `Uint64` is not one that callers' own parameters may be."""
    return isinstance(value, int) and not isinstance(value, Uint64)
