"""What a test's own batch or replica says where the test does not care."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gateway.backends.interface import Batch, Traits
from gateway.core.request import SequenceStep
from gateway.core.traits import WORKER


class PlainBatch:
    """No deadline, no sequence, no parameters."""

    deadline: float = math.inf
    sequence: SequenceStep | None = None
    parameters: Mapping[str, object] = {}


class PlainReplica:
    """A worker's instance that cannot end a run early."""

    traits: Traits = WORKER

    def cancel(self, batch: Batch, /) -> None:
        """A run goes on to its end."""
