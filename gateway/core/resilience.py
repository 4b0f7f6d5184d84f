"""How hard the gateway tries on behalf of one model: what it was told, none of what it learned.

Rules: made once from the configuration, never changed; shares are fractions of rows (0.1 is a tenth), times are
seconds. Defaults are those of the resilience notes §1.10: whatever costs extra executions is off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Balancing = Literal["pull", "p2c_ewma", "least_rows", "round_robin", "hash"]
"""How a replica is chosen for a batch; `core/balancing.py` says what each of them does."""


@dataclass(frozen=True, slots=True)
class Resilience:
    """Retries, hedges and comparisons of one model."""

    idempotent: bool = True
    """Whether the same rows may be executed twice. False: only what never reached a backend is sent elsewhere."""
    balancing: Balancing = "pull"
    attempt_timeout_s: float | None = None
    """Seconds that one attempt may take; None: learned from how long batches take."""
    max_attempts: int = 3
    """Executions of a row, first one included; at least 1."""
    retry_budget: float = 0.1
    """Rows that may be executed again, per row executed for the first time; 0 to 1."""
    hedging: float = 0.0
    """Most rows that are also sent to a second replica because the first is late, as a share of all; 0.0: off."""
    agreement: float = 0.0
    """Batches also sent to a second replica to compare the two answers, as a share of all; 0.0: off."""
    poison_denylist: bool = True
    """Whether a request that was found to break replicas by itself is refused unexecuted for a while."""


RESILIENCE: Final = Resilience()
"""What holds where nothing is configured."""
