"""What is known of a replica besides how busy it is: who it is, and which fate it shares with others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Traits:
    """Does not change while the replica lives."""

    kind: Literal["onnx", "oip"]
    """`onnx`: an instance on one of the gateway's own workers, and slots are the worker's affair. `oip`: a remote
    server that speaks the Open Inference Protocol."""
    weight: float = 1.0
    """Share of the work relative to its peers, where all else is equal; above 0."""
    zone: str = ""
    """Failure domain: a retry prefers another one. Empty: unknown."""
    host: str = ""
    """Failure domain inside the zone. Empty: unknown."""
    server: str = ""
    """Name of the server that hosts it, which may host replicas of other models too; the unit that people drain.
    Empty for workers, which are named by the replica."""
    max_slots: int = 1
    """Most batches in flight that the gateway may learn to have there; for a worker `free_slots` says it all."""


WORKER = Traits("onnx")
"""An instance on a worker of this machine."""
