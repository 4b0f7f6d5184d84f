"""What the inference log keeps of one model's requests, and what becomes of a request when the log has no room.

Plain values, settled before a version is loaded. A payload is a request's tensors; what is kept of them is decided per
tensor, before anything is written: what is dropped here was never on a disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Overflow = Literal["block", "spill", "drop"]
"""With no room left: requests are refused until there is some; rows go to a second place; or rows are lost, counted."""

Payload = Literal["keep", "drop", "hash", "truncate"]
"""Of a tensor: all of it, nothing, its SHA-256, or its first bytes."""

MIN_RETENTION_DAYS: Final = 183
"""Six months: what Articles 19 and 26(6) of the EU AI Act ask for at least."""


@dataclass(frozen=True, slots=True)
class LogPolicy:
    enabled: bool = True
    """False: nothing is written of this model's requests."""
    overflow: Overflow = "drop"
    payload: Payload = "keep"
    """Of tensors that `tensors` does not name."""
    tensors: tuple[tuple[str, Payload], ...] = ()
    """By name of an input or output."""
    truncate_bytes: int = 256
    """How much `truncate` keeps of a tensor."""
    sampling: float = 1.0
    """Probability with which an answered request keeps its payload. Errors always do; rows are written always."""
    retention_days: int | None = None
    """None: as long as the log as a whole."""

    def of(self, tensor: str) -> Payload:
        """What is kept of the input or output of this name."""
        return dict(self.tensors).get(tensor, self.payload)


LOG_POLICY: Final = LogPolicy()
