"""Provenance in response headers: which model, which backend, which batch, how long it took.

Decides the exact bytes. Pieces are paid for as rarely as possible: `model_header` once per model version,
`batch_template` once per batch; a request then costs one formatting operation (`template % (row, queue_ms,
total_ms, request_id)`, which is what `finish` does). Request ids come in blocks, one per batch.

Rules: values are Structured Fields (RFC 9651). A name of printable ASCII is an sf-string; any other name is a
Display String (`%"caf%c3%a9"`), so no name can break a line or a header. Server-Timing is in milliseconds and
X-Request-Id a UUIDv7 (RFC 9562). Every block ends with CR LF and goes into a response head as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

UUID7_RANDOM_BYTES: Final = 10
_LAST_DIGITS: Final = [b"%02x" % byte for byte in range(256)]
_PLAIN: Final = frozenset(map(chr, range(0x20, 0x7F)))
_DISPLAY_PLAIN: Final = frozenset(range(0x20, 0x7F)) - {0x22, 0x25}


def quote(text: str) -> str:
    """`text` as an RFC 9651 bare item: String where it is printable ASCII, else Display String.

    Raises:
        ValueError: the text holds lone surrogates and has no UTF-8 form.
    """
    if _PLAIN.issuperset(text):
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    octets = text.encode("utf-8")
    return '%"' + "".join([chr(b) if b in _DISPLAY_PLAIN else f"%{b:02x}" for b in octets]) + '"'


def model_header(name: str, version: str, digest: str, variant: str = "") -> bytes:
    """The `Inference-Model` line of one model version, once per load. `digest` as in `ModelSpec.digest`: empty where
    nobody here knows which files answered, and then the line has none. `variant`: champion or canary, where the model
    has others beside the one its name means."""
    return f"Inference-Model: {_model_value(name, version, digest, variant)}\r\n".encode("ascii")


def shadow_header(name: str, version: str, digest: str) -> bytes:
    """The `Inference-Shadow` line of answers whose request is also sent to this version, for comparison."""
    return f"Inference-Shadow: {_model_value(name, version, digest)}\r\n".encode("ascii")


def _model_value(name: str, version: str, digest: str, variant: str = "") -> str:
    value = f"{quote(name)};version={quote(version)}" + (f";digest={quote(digest)}" if digest else "")
    return f"{value};variant={quote(variant)}" if variant else value


@dataclass(frozen=True, slots=True)
class Member:
    """One executed batch that holds rows of a request: the whole request, or a piece of a split one."""

    backend: str
    attempt: int
    """1 for the first attempt of the batch."""
    batch_id: str
    size: int
    """Rows in the executed batch."""
    row: int
    """First row of this request (or piece) in the batch."""


def batch_template(model: bytes, backend: str, attempt: int, batch_id: str, size: int, infer_ms: float) -> bytes:
    """Everything the members of one batch share, as a bytes template for `finish`.

    Args:
        model: from `model_header`.
        size: rows in the executed batch.
        infer_ms: milliseconds from dispatch to outcome.
    """
    fixed = (
        f"Inference-Backend: {quote(backend)};attempt={attempt}\r\nInference-Batch: {quote(batch_id)};size={size};row="
    ).encode("ascii")
    return (model + fixed).replace(b"%", b"%%") + (
        b"%%d\r\nServer-Timing: queue;dur=%%.2f, infer;dur=%.2f, total;dur=%%.2f\r\nX-Request-Id: %%b\r\n" % infer_ms
    )


def finish(template: bytes, row: int, queue_ms: float, total_ms: float, request_id: bytes) -> bytes:
    """The provenance lines of one request: `row` is its first row in the batch, times are milliseconds."""
    return template % (row, queue_ms, total_ms, request_id)


def split_headers(
    model: bytes,
    members: Sequence[Member],
    queue_ms: float,
    infer_ms: float,
    total_ms: float,
    request_id: bytes,
) -> bytes:
    """The provenance lines of a request whose rows ran in several batches: one member each, in row order."""
    backends = ", ".join([f"{quote(m.backend)};attempt={m.attempt}" for m in members])
    batches = ", ".join([f"{quote(m.batch_id)};size={m.size};row={m.row}" for m in members])
    timing = f"queue;dur={queue_ms:.2f}, infer;dur={infer_ms:.2f}, total;dur={total_ms:.2f}"
    text = f"Inference-Backend: {backends}\r\nInference-Batch: {batches}\r\nServer-Timing: {timing}\r\n"
    return model + text.encode("ascii") + request_id_header(request_id)


def backend_header(backend: str, attempt: int) -> bytes:
    """The `Inference-Backend` line alone, for an error that came out of an execution."""
    return f"Inference-Backend: {quote(backend)};attempt={attempt}\r\n".encode("ascii")


def request_id_header(request_id: bytes) -> bytes:
    """The `X-Request-Id` line alone, for answers that never reached a batch."""
    return b"X-Request-Id: %b\r\n" % request_id


def uuid7_block(unix_ms: int, rand: bytes, n: int) -> list[bytes]:
    """`n` UUIDv7 texts of one instant from one random draw: unique, strictly increasing (RFC 9562 §6.2).

    Args:
        unix_ms: milliseconds since 1970; the low 48 bits are used.
        rand: exactly `UUID7_RANDOM_BYTES` bytes from a good source, fresh for every block. 73
            of the bits are used; an id's last 48 bits start at a random 47-bit number and count up.
        n: how many; at most 2^47.

    Raises:
        ValueError: `rand` has the wrong length.
    """
    if len(rand) != UUID7_RANDOM_BYTES:
        raise ValueError(f"uuid7_block needs {UUID7_RANDOM_BYTES} random bytes, got {len(rand)}")
    time = unix_ms & 0xFFFF_FFFF_FFFF
    version_a = 0x7000 | (int.from_bytes(rand[:2], "big") & 0x0FFF)
    variant_b = 0x8000 | (int.from_bytes(rand[2:4], "big") & 0x3FFF)
    start = int.from_bytes(rand[4:], "big") >> 1
    text = b"%08x-%04x-%04x-%04x-%%010x" % (time >> 16, time & 0xFFFF, version_a, variant_b)
    ids: list[bytes] = []
    while len(ids) < n:  # those that differ in their last two digits only
        head, low = text % (start >> 8), start & 0xFF
        some = [head + digits for digits in _LAST_DIGITS[low : low + n - len(ids)]]
        start += len(some)
        ids += some
    return ids


# Reading the headers back: for the command line and for tests, never on the request path.


class HeaderError(ValueError):
    """A provenance header that does not follow the format."""


@dataclass(frozen=True, slots=True)
class ModelReference:
    name: str
    version: str
    digest: str
    """Empty: a remote backend answered, whose files nobody here knows."""
    variant: str = ""
    """`champion` or `canary`; empty where the model has one version for its name."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a response says about itself. A header that is absent leaves its field None or empty."""

    request_id: str | None
    model: ModelReference | None
    members: tuple[Member, ...]
    timings_ms: dict[str, float]
    """By name: queue, infer, total."""
    shadow: ModelReference | None = None
    """The version that a copy of the request was sent to."""


Parameters = dict[str, "str | int | float | bool"]


def parse(headers: Iterable[tuple[str, str]]) -> Provenance:
    """Read the provenance out of response headers (pairs; names in any case; repeated fields are joined).

    Raises:
        HeaderError: a header is present and malformed.
    """
    fields: dict[str, str] = {}
    for name, value in headers:
        key = name.lower()
        fields[key] = f"{fields[key]}, {value}" if key in fields else value
    timings = _items(fields.get("server-timing", ""))
    return Provenance(
        request_id=fields.get("x-request-id"),
        model=_model("Inference-Model", _items(fields.get("inference-model", ""))),
        members=_members(_items(fields.get("inference-backend", "")), _items(fields.get("inference-batch", ""))),
        timings_ms={name: _number(parameters, "dur") for name, parameters in timings},
        shadow=_model("Inference-Shadow", _items(fields.get("inference-shadow", ""))),
    )


def _model(header: str, items: list[tuple[str, Parameters]]) -> ModelReference | None:
    if not items:
        return None
    if len(items) > 1:
        raise HeaderError(f"{header} names more than one model")
    name, parameters = items[0]
    version, digest, variant = parameters.get("version"), parameters.get("digest", ""), parameters.get("variant", "")
    if not isinstance(version, str) or not isinstance(digest, str) or not isinstance(variant, str):
        raise HeaderError(f"{header} lacks its version, or has a digest or a variant that is no text")
    return ModelReference(name, version, digest, variant)


def _members(backends: list[tuple[str, Parameters]], batches: list[tuple[str, Parameters]]) -> tuple[Member, ...]:
    if not batches:  # an error names who failed, and there is no batch to name
        return ()
    if len(backends) != len(batches):
        raise HeaderError("Inference-Backend and Inference-Batch list different numbers of members")
    return tuple(
        Member(
            backend,
            int(_number(executed, "attempt")),
            batch,
            int(_number(place, "size")),
            int(_number(place, "row")),
        )
        for (backend, executed), (batch, place) in zip(backends, batches, strict=True)
    )


def _number(parameters: Parameters, key: str) -> float:
    value = parameters.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise HeaderError(f"parameter {key} is not a number")
    return value


_TOKEN_START: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ*")
_TOKEN: Final = _TOKEN_START | frozenset("0123456789!#$%&'*+-.^_`|~:/")
_KEY: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_-.*")


class _Reader:
    """RFC 9651 list of items, as far as these headers use it: strings, tokens, numbers, parameters."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def skip(self, characters: str) -> None:
        while self.peek() and self.peek() in characters:
            self.at += 1

    def take(self, allowed: frozenset[str]) -> str:
        start = self.at
        while self.peek() in allowed:
            self.at += 1
        return self.text[start : self.at]

    def fault(self, what: str) -> HeaderError:
        return HeaderError(f"{what} at character {self.at} of {self.text[:200]!r}")

    def item(self) -> tuple[str, Parameters]:
        value = self.bare()
        if not isinstance(value, str):
            raise self.fault("expected a string or token")
        parameters: Parameters = {}
        while self.peek() == ";":
            self.at += 1
            self.skip(" ")
            key = self.take(_KEY)
            if not key:
                raise self.fault("expected a parameter name")
            parameters[key] = True
            if self.peek() == "=":
                self.at += 1
                parameters[key] = self.bare()
        return value, parameters

    def bare(self) -> str | int | float:
        first = self.peek()
        if first == '"':
            return self.string()
        if self.text.startswith('%"', self.at):
            return self.display_string()
        if first in _TOKEN_START:
            return self.take(_TOKEN)
        return self.number()

    def number(self) -> int | float:
        text = self.take(frozenset("-0123456789."))
        try:
            return float(text) if "." in text else int(text)
        except ValueError:
            raise self.fault("expected a value") from None

    def string(self) -> str:
        out: list[str] = []
        self.at += 1
        while (c := self.peek()) != '"':
            if c == "\\":
                self.at += 1
                c = self.peek()
                if c not in {'"', "\\"}:
                    raise self.fault("bad escape")
            if c not in _PLAIN:
                raise self.fault("unfinished string")
            out.append(c)
            self.at += 1
        self.at += 1
        return "".join(out)

    def display_string(self) -> str:
        out = bytearray()
        self.at += 2
        while (c := self.peek()) != '"':
            if c not in _PLAIN:
                raise self.fault("unfinished display string")
            if c == "%":
                digits = self.text[self.at + 1 : self.at + 3]
                if len(digits) != 2 or not frozenset("0123456789abcdef").issuperset(digits):
                    raise self.fault("bad percent escape")
                out.append(int(digits, 16))
                self.at += 3
            else:
                out.append(ord(c))
                self.at += 1
        self.at += 1
        try:
            return out.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fault("display string is not UTF-8") from None


def _items(text: str) -> list[tuple[str, Parameters]]:
    reader = _Reader(text.strip(" \t"))
    items: list[tuple[str, Parameters]] = []
    while reader.peek():
        items.append(reader.item())
        reader.skip(" \t")
        if not reader.peek():
            break
        if reader.peek() != ",":
            raise reader.fault("expected a comma")
        reader.at += 1
        reader.skip(" \t")
        if not reader.peek():
            raise reader.fault("list ends with a comma")
    return items
