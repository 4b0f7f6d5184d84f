"""A frame: what the event loop hands to the log at the end of one of its turns, and the payload of one WAL record.

There are two kinds. `Requests`: everything that settled for one model version in one turn, laid out so that writing it
costs the loop little and reading it needs no loop over rows: what rows share is said once, what differs is one tuple a
row, and tensors lie in columns (`Column`): the bytes of many rows joined, with what is needed to cut them. `Event`: one
entry of a side stream.

Rules and invariants:
* The encoding is msgpack, structs as arrays: fields are only ever appended, with a default, so that older frames stay
  readable. Decoding checks types; nothing in a frame is ever executed.
* Tensors are little-endian and row-major as OIP has them on the wire; BYTES in OIP's length-prefixed form.
* Times in rows and batches are seconds of one process's monotonic clock. `wall_ns - monotonic * 1e9` leads from them to
  nanoseconds since 1970.
* A request is one row, however many executions it took. Rows are in the order in which they settled.
* Frames know nothing of disks, epochs or positions: whoever writes them numbers their rows.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

import msgspec

Policy = Literal["keep", "drop", "hash", "truncate"]
"""What was kept of a tensor: all of it, nothing, its SHA-256 (32 bytes), or its first bytes."""

Stream = Literal["lifecycle", "gap", "feedback", "access"]
"""The side streams."""

NO_BATCH: Final = -1


class Batch(NamedTuple):
    """One execution that rows of the frame were in."""

    batch_id: str
    size: int
    """Rows in the executed batch."""
    backend: str
    """As `Inference-Backend` says it; "cache" for a remembered answer."""
    attempt: int
    dispatched: float
    """Seconds, monotonic; 0.0: not known (one of several executions of a request, see `Row.dispatched`)."""
    finished: float
    remote: bool
    """Whether a remote server executed it: nobody here knows from which files."""


class Detail(msgspec.Struct, array_like=True, omit_defaults=True, frozen=True):
    """What most rows have no use for."""

    error: str | None = None
    """The text that the client was told."""
    reason: str | None = None
    """`GatewayError.reason`."""
    backend: str | None = None
    """Who failed it last, where no batch answered it."""
    asked_model: str | None = None
    """As the client wrote it, bounded, where it means no version served here; `Requests.model` is empty then."""
    asked_version: str | None = None
    parameters: str | None = None
    """The client's request parameters as JSON text, as far as the gateway keeps them."""
    executions: tuple[tuple[int, int], ...] = ()
    """Where several executions made the answer (a split request, an ensemble, the cache): (index into
    `Requests.batches`, first row in it), in order. `Row.batch` is the first of them."""
    queued_s: float | None = None
    """From arrival to dispatch, where it is not `Batch.dispatched - Row.received`; None: see there."""
    infer_s: float | None = None
    cause: str | None = None
    """Request id of the row that this one copies (a shadow's)."""


class Row(NamedTuple):
    """One request."""

    request_id: bytes
    """UUIDv7 text, 36 ASCII characters: the answer's `X-Request-Id`."""
    received: float
    """Seconds, monotonic."""
    total_s: float
    """From arrival to the answer being handed to the transport."""
    protocol: str
    """http or grpc; empty for a shadow's row."""
    endpoint: str
    """infer, raw (the same with binary tensors over HTTP, or raw contents over gRPC), generate, generate_stream, stream
    (gRPC's), shadow."""
    status: int
    """HTTP's status code; of a gRPC call, the one HTTP has for it. 499: the caller left."""
    grpc_code: int | None
    """None over HTTP."""
    rows: int
    """First dimension of the request; 0: it was refused before that was known."""
    attempt: int
    """At which attempt it ended; 0: it was never executed."""
    batch: int
    """Index into `Requests.batches`; NO_BATCH: no execution answered it."""
    batch_row: int
    """Its first row in that batch."""
    sampling: float
    """Probability with which a row like this one keeps its payload."""
    client_request_id: str | None
    """The client's own X-Request-Id, at most 128 visible ASCII characters."""
    oip_id: str | None
    """The client's own OIP `id`."""
    trace_id: str | None
    """32 hex digits, from `traceparent`."""
    detail: Detail | None


class Column(msgspec.Struct, array_like=True, frozen=True):
    """One tensor of many rows: those of `Requests.rows` that carry it, in order.

    What a row has: `data[start:start + size]`, where `size` is its entry in `sizes` and `start` the sum of those before
    it; with `sizes` None all rows have `len(data) / rows` bytes. With `lengths` None nothing was left out.
    """

    name: str
    datatype: str
    """OIP's name of it."""
    rows: list[int] | None
    """Indexes into `Requests.rows`, ascending; None: every row."""
    shapes: list[tuple[int, ...]]
    """One for each row; a single one where all are alike."""
    data: bytes
    sizes: list[int] | None
    policy: Policy
    lengths: list[int] | None
    """Bytes of each row's whole tensor, where `policy` kept less than all."""


class Requests(msgspec.Struct, array_like=True, tag="requests", frozen=True):
    """Requests to one model version that settled in one turn of the event loop."""

    wall_ns: int
    """Nanoseconds since 1970, read together with `monotonic`."""
    monotonic: float
    model: str
    """Empty where the requests named none that is served here, or could not be read so far."""
    version: str
    digest: str
    """As `Inference-Model` says it; empty: not known."""
    variant: str
    """champion, canary or shadow; empty: traffic to this model is not split."""
    batches: list[Batch]
    rows: list[Row]
    inputs: list[Column]
    """As the model got them. A row that no column names keeps no payload (not drawn, or never decoded)."""
    outputs: list[Column]
    """As the client got them: the outputs it asked for, classes where it asked for classes."""


class Event(msgspec.Struct, array_like=True, tag="event", frozen=True):
    """One entry of a side stream."""

    at_ns: int
    """Nanoseconds since 1970."""
    stream: Stream
    kind: str
    """What happened: a word of the stream's own, for instance loaded, swapped, dropped, label."""
    model: str
    """Empty: it concerns no single model."""
    version: str
    details: str
    """JSON text, an object."""


Frame = Requests | Event

_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(Frame)


class FrameError(ValueError):
    """Bytes that are no frame."""


def encode(frame: Frame) -> bytes:
    """The frame's bytes; `decode` gives an equal one back."""
    return _ENCODER.encode(frame)


def decode(data: bytes | memoryview) -> Frame:
    """Read a frame.

    Raises:
        FrameError: `data` is none.
    """
    try:
        found: Frame = _DECODER.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FrameError(f"not a frame of the inference log: {error}") from error
    return found


def rows_in(frame: Frame) -> int:
    """How many places of an epoch it takes: one for each request, one for an event."""
    return len(frame.rows) if isinstance(frame, Requests) else 1
