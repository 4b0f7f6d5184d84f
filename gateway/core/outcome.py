"""How an attempt to execute a batch ended. Everything that reacts to failure reads these values, never exceptions.

`FailureKind` is the class (resilience notes §1.1): what may be done about it. `Sign` is what was seen: whose fault it
may be, and how hard it counts against the replica.
"""

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
    """The backend says it has too much to do, and did not execute it."""
    BROKEN = "broken"
    """Died, hung up, failed, or answered with something that fails the checks."""
    TIMEOUT = "timeout"
    SUSPECT = "suspect"
    """The backend or model refused input that we had validated."""
    CANCELLED = "cancelled"
    """We gave it up: nobody waits for it any more. Nobody's fault."""


class Sign(enum.Enum):
    """What was seen of a failure."""

    NONE = "none"
    CONNECT = "connect"
    """No connection could be made (with NOT_SENT)."""
    EXIT = "exit"
    """The process that executed this very batch ended (with BROKEN)."""
    CRASH = "crash"
    """It ended itself, by a fault in its code, while it executed this batch and nothing else (with BROKEN)."""
    BYSTANDER = "bystander"
    """The process ended while it executed somebody else's batch, or none; this one cannot be why (with BROKEN; with
    NOT_SENT if it had not been begun)."""
    MEMORY = "memory"
    """The process that executed this very batch was ended for lack of memory (with BROKEN): fewer rows may fit."""
    ANSWERED = "answered"
    """The backend lives and said no: an error answer of its own (with BROKEN or SUSPECT)."""
    MISMATCH = "mismatch"
    """An answer with wrong names, datatypes, shapes or rows (with BROKEN)."""
    MISSING = "missing"
    """The backend says that it does not have this model (with NOT_SENT: nothing was executed)."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed attempt. `message` is fit for a user; it never holds a path or another caller's data."""

    kind: FailureKind
    message: str
    sign: Sign = Sign.NONE
    retry_after_s: float = 0.0
    """What the backend asked for with OVERLOAD, seconds; 0.0: it did not say."""
    words: str = ""
    """What a remote server wrote about it, free text: it may quote any row of the batch, or a path of that server."""

    @property
    def in_full(self) -> str:
        """For operators, and for the only caller whose input was refused."""
        return f"{self.message}: {self.words}" if self.words else self.message


@dataclass(frozen=True, slots=True)
class Success:
    """A successful attempt. Durations are nanoseconds as the backend measured them; 0 where it says nothing."""

    outputs: Sequence[OutputTensor]
    """In the order of `Batch.outputs`; shapes with the batch dimension. The data stays valid for ever."""
    compute_input_ns: int
    compute_infer_ns: int
    compute_output_ns: int
