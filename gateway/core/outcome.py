"""How an attempt to execute a batch ended. Everything that reacts to failure reads these values, never exceptions."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.core.request import OutputTensor


class FailureKind(enum.Enum):
    """Outcome classes of a failed attempt (resilience notes §1.1)."""

    NOT_SENT = "not_sent"
    """The batch never reached the backend; always safe to send elsewhere."""
    OVERLOAD = "overload"
    BROKEN = "broken"
    """Died, hung up, or answered with something that fails the checks."""
    TIMEOUT = "timeout"
    SUSPECT = "suspect"
    """The backend or model refused input that we had validated."""
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed attempt. `message` is fit for a user; it never holds a path or another caller's data."""

    kind: FailureKind
    message: str


@dataclass(frozen=True, slots=True)
class Success:
    """A successful attempt. Durations are nanoseconds as the backend measured them."""

    outputs: Sequence[OutputTensor]
    """In the order of `Batch.outputs`; shapes with the batch dimension. The data stays valid for ever."""
    compute_input_ns: int
    compute_infer_ns: int
    compute_output_ns: int
