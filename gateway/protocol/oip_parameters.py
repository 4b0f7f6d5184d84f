"""The `parameters` of a request, its inputs and its outputs → checked options; the one reader for REST and gRPC.

A protocol hands in a mapping from name to Python value: str, int, bool or float, `Uint64` for a gRPC `uint64_param`,
None for a value that is there but empty, and whatever else JSON holds (refused here).

Rules (wire notes §1.8, §1.9, §1.11):
- own names have fixed types; numbers among them are not negative; a wrong one is refused by name;
- a caller's own parameters are strings, integers, booleans or doubles; they are taken, logged where they are few and
  short, and never echoed, or go to the backend as they are where the model is a remote server's (`forwarded`): few and
  short ones only, and requests share a batch only with those that say the same;
- names that start with `triton_` are reserved and refused;
- an input or output lies in shared memory where `shared_memory_region` says so; then `shared_memory_byte_size` must be
  there too, `shared_memory_offset` may be, and nothing may say another form of the same tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from gateway.core.client_memory import Area
from gateway.core.request import NO_PARAMETERS, InferRequest, SequenceStep
from gateway.errors import InvalidRequest, Malformed
from gateway.protocol.oip_plan import shown

MAX_UINT64: Final = 2**64 - 1
MIN_INT64: Final = -(2**63)
MAX_INT64: Final = 2**63 - 1
MAX_SEQUENCE_ID_BYTES: Final = 128
"""Longest textual sequence id."""
MAX_CLASSES: Final = 2**31 - 1
MAX_FORWARDED: Final = 64
MAX_FORWARDED_BYTES: Final = 8192
"""Of the names and texts of one request's own parameters together, where they are forwarded or logged."""
_CUSTOM: Final = frozenset({str, int, bool, float})
_NOTHING_RESERVED: Final[frozenset[str]] = frozenset()
_STEPS: Final = "steps of sequences"
"""Keeps them in a group of their own in the queue; who hands them out takes one at a time."""


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
    own: Mapping[str, object] = field(default_factory=lambda: NO_PARAMETERS)
    """What goes to the backend as the caller wrote it."""
    unused: Mapping[str, object] = field(default_factory=lambda: NO_PARAMETERS)
    """What nobody reads, as far as it is few and short: it is told to the inference log."""
    apart: bool = False
    """Whether the request is a step of a sequence that the backend keeps: it waits apart from those that may share a
    batch, and runs alone."""

    def apply(self, request: InferRequest) -> None:
        """Write what the scheduler needs to know into the request, once."""
        request.stated_timeout_s = self.stated_timeout_s
        request.priority = self.priority
        request.sequence = self.sequence
        request.parameters = self.own
        request.unused = self.unused
        if self.apart:
            request.key = (request.key, _STEPS)
        elif self.own:
            # 1, 1.0 and True are equal, and not the same.
            told = frozenset([(name, type(value), value) for name, value in self.own.items()])
            request.key = (request.key, told)

    def plain_key(self, request: InferRequest) -> object:
        """The key that the request had before `apply`."""
        return request.key[0] if self.apart or self.own else request.key  # type: ignore[index]  # made by `apply`


NO_OPTIONS: Final = RequestOptions()


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What the parameters of one requested output say."""

    binary_data: bool = False
    """REST: this output in binary form."""
    classes: int = 0
    """`classification`: how many of the highest values, with their indexes and labels; 0: the tensor itself."""
    area: Area | None = None
    """Where in shared memory it is wanted, instead of in the answer."""


_PLAIN_OUTPUT: Final = OutputOptions()
_OF_REQUEST: Final = frozenset(
    {"sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "binary_data_output"}
)
_REGION: Final = "shared_memory_region"
_OFFSET: Final = "shared_memory_offset"
_BYTE_SIZE: Final = "shared_memory_byte_size"
_OF_MEMORY: Final = frozenset({_REGION, _OFFSET, _BYTE_SIZE})
_OF_OUTPUT: Final = frozenset({"binary_data", "classification"}) | _OF_MEMORY
_OF_INPUT: Final = frozenset({"binary_data_size"}) | _OF_MEMORY


def request_options(
    parameters: Mapping[str, object],
    allowed_reserved: frozenset[str] = _NOTHING_RESERVED,
    *,
    forwarded: bool = False,
) -> RequestOptions:
    """A request's parameters.

    Args:
        allowed_reserved: names that this protocol takes in spite of their prefix; they are never forwarded.
        forwarded: the caller's own parameters and sequences are the backend's affair.

    Raises:
        InvalidRequest: a parameter is reserved, not of its type, or cannot be forwarded.
    """
    if not parameters:
        return NO_OPTIONS
    _check_custom(parameters, "request", _OF_REQUEST, allowed_reserved)
    own = _own(parameters, allowed_reserved)
    if forwarded:
        _check_forwarded(own)
    if not own and _OF_REQUEST.isdisjoint(parameters):
        return NO_OPTIONS
    sequence = _sequence(parameters)
    return RequestOptions(
        _count(parameters, "timeout", "request", MAX_UINT64) / 1e6,
        _count(parameters, "priority", "request", MAX_UINT64),
        sequence,
        _flag(parameters, "binary_data_output", "request"),
        own if forwarded else NO_PARAMETERS,
        NO_PARAMETERS if forwarded else _told(own),
        forwarded and sequence is not None,
    )


def _own(parameters: Mapping[str, object], allowed_reserved: frozenset[str]) -> Mapping[str, object]:
    own = {
        name: value for name, value in parameters.items() if name not in _OF_REQUEST and name not in allowed_reserved
    }
    return own or NO_PARAMETERS


def _is_much(own: Mapping[str, object]) -> bool:
    texts = [*own, *[value for value in own.values() if isinstance(value, str)]]
    return len(own) > MAX_FORWARDED or sum(len(text.encode("utf-8", "replace")) for text in texts) > MAX_FORWARDED_BYTES


def _told(own: Mapping[str, object]) -> Mapping[str, object]:
    if _is_much(own) or any(isinstance(value, int) and not MIN_INT64 <= value <= MAX_INT64 for value in own.values()):
        return NO_PARAMETERS
    return own


def _check_forwarded(own: Mapping[str, object]) -> None:
    if _is_much(own):
        raise InvalidRequest(
            f"request: at most {MAX_FORWARDED} parameters, of {MAX_FORWARDED_BYTES} bytes together, can be forwarded "
            "to the model's server"
        )
    for name, value in own.items():
        if isinstance(value, int) and not MIN_INT64 <= value <= MAX_INT64:
            raise InvalidRequest(f"request: parameter '{shown(name)}' must fit in 64 bits")


def input_options(parameters: Mapping[str, object], where: str) -> int | None:
    """`binary_data_size` of one input in bytes, None if there is none. `where`: the input as errors name it. Whether it
    lies in shared memory says `memory_area`.

    Raises:
        InvalidRequest: a parameter is reserved, or not of its type.
    """
    if not parameters:
        return None
    _check_custom(parameters, where, _OF_INPUT, _NOTHING_RESERVED)
    if "binary_data_size" not in parameters:
        return None
    return _count(parameters, "binary_data_size", where, MAX_UINT64)


def output_options(parameters: Mapping[str, object], where: str) -> OutputOptions:
    """The parameters of one requested output. `where`: the output as errors name it.

    Raises:
        InvalidRequest: a parameter is reserved, not of its type, or contradicts another.
    """
    if not parameters:
        return _PLAIN_OUTPUT
    _check_custom(parameters, where, _OF_OUTPUT, _NOTHING_RESERVED)
    options = OutputOptions(
        _flag(parameters, "binary_data", where),
        min(_count(parameters, "classification", where, MAX_UINT64), MAX_CLASSES),
        memory_area(parameters, where),
    )
    if options.area is not None and (options.binary_data or options.classes):
        other = "binary_data" if options.binary_data else "classification"
        raise InvalidRequest(f"{where}: '{other}' cannot be asked for together with '{_REGION}'; leave out one of them")
    return options


def memory_area(parameters: Mapping[str, object], where: str) -> Area | None:
    """Where in shared memory an input or output is; None: it is in the request or the answer.

    Raises:
        InvalidRequest: the three parameters are not of their types, or one is missing.
    """
    if _REGION not in parameters:
        for name in (_OFFSET, _BYTE_SIZE):
            if name in parameters:
                raise InvalidRequest(f"{where}: '{name}' can not be specified without '{_REGION}' parameter")
        return None
    region = parameters[_REGION]
    if not isinstance(region, str):
        raise Malformed(f"{where}: parameter '{_REGION}' must be a string")
    if _BYTE_SIZE not in parameters:
        raise InvalidRequest(f"{where}: '{_BYTE_SIZE}' must be specified along with '{_REGION}' parameter")
    return Area(
        region,
        _count(parameters, _OFFSET, where, MAX_UINT64),
        _count(parameters, _BYTE_SIZE, where, MAX_UINT64),
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


def _is_integer(value: object) -> bool:
    """−0 is an integer of its own class; a `Uint64` is not one that callers' own parameters may be."""
    return isinstance(value, int) and not isinstance(value, Uint64)
