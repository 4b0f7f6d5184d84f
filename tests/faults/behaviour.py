"""How a programmable backend behaves: one value, sent over its control socket, that holds until the next one.

`fault` names what happens to inference requests (`Fault`); `share` and `times` say to how many of them. Everything
else is the backend's ordinary pace. Rules: a behaviour is complete, not a change to the one before; each fault touches
inference only, but for those marked *server*, which touch connections and what the server says of itself.
"""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass, fields
from typing import Any, Final


class Fault(enum.Enum):
    """What goes wrong with an inference request."""

    NONE = "none"
    HANG = "hang"
    """Never answered, never executed."""
    RESET_BEFORE = "reset_before"
    """RST as soon as the request was read; not executed."""
    RESET_AFTER = "reset_after"
    """Executed, then RST before the first byte of the answer."""
    RESET_MID = "reset_mid"
    """Half of the answer, then RST."""
    CLOSE_MID = "close_mid"
    """Half of the answer, then an orderly close: shorter than its Content-Length says."""
    CHUNKED_UNENDED = "chunked_unended"
    """A chunked answer whose last chunk never comes, then an orderly close (HTTP)."""
    CLOSE_REUSED = "close_reused"
    """A connection that has served before is closed as its next request arrives; not executed (HTTP)."""
    DRIP = "drip"
    """A right answer at 10 bytes a second."""
    SLICED = "sliced"
    """A right answer in slices of 7 bytes, at once."""
    GARBAGE = "garbage"
    """Bytes that are not the protocol at all."""
    BAD_JSON = "bad_json"
    """A well-formed HTTP answer (gRPC message) whose content cannot be decoded."""
    ROW_MORE = "row_more"
    ROW_LESS = "row_less"
    NO_ROWS = "no_rows"
    WRONG_DATATYPE = "wrong_datatype"
    WRONG_SHAPE = "wrong_shape"
    """Right number of rows, one dimension too many."""
    WRONG_NAME = "wrong_name"
    MISSING_OUTPUT = "missing_output"
    STATUS = "status"
    """Answered with `status` at once; not executed. Over gRPC with the code that gateways give such a status."""
    ENDLESS = "endless"
    """An answer that never stops growing."""
    ENCODED = "encoded"
    """An answer that says `Content-Encoding: gzip`, unasked, and holds a bomb (HTTP)."""
    LIE = "lie"
    """A well-formed answer with wrong values. No gateway can see that: for the checker's negative control."""
    GOAWAY = "goaway"
    """GOAWAY below this stream, then close; not executed (gRPC)."""
    REFUSED_STREAM = "refused_stream"
    """RST_STREAM REFUSED_STREAM; not executed (gRPC)."""


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What a backend does from now on. The defaults are those of a healthy one."""

    fault: Fault = Fault.NONE
    share: float = 1.0
    """Share of the requests that the fault hits, by a seeded coin."""
    times: int = 0
    """Hits after which it stops; 0: no end."""
    status: int = 500
    """HTTP status of `Fault.STATUS`."""
    retry_after_s: float = 0.0
    """Sent with the status: a Retry-After header, or gRPC push-back. 0: none."""
    slowness: float = 1.0
    """Factor on every execution's time."""
    poison: str = "error"
    """What a poisoned row makes of its batch: `error` 500, `refused` 400, `reset` the connection, `hang`."""
    listening: bool = True
    """*Server*: False closes the listening sockets and every connection."""
    model: bool = True
    """*Server*: False: the model is unknown here."""
    ready: bool = True
    """*Server*: what the health calls answer."""
    datatype: str = "INT64"
    """*Server*: datatype that metadata and configuration state."""

    def to_document(self) -> dict[str, Any]:
        return {**asdict(self), "fault": self.fault.value}

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Behaviour:
        known = {field.name for field in fields(cls)}
        assert document.keys() <= known, document.keys() - known
        return cls(**{**document, "fault": Fault(document.get("fault", "none"))})


HEALTHY: Final = Behaviour()


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a healthy execution takes: base_s + row_s · rows, one at a time, like one accelerator."""

    base_s: float = 0.004
    row_s: float = 0.00005

    def time_s(self, rows: int) -> float:
        return self.base_s + self.row_s * rows
