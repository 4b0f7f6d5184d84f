"""The offline checker: joins what the clients saw with what the backends did, row by row (in the manner of Jepsen).

It trusts neither side alone. A row counts as *lost* if its request never came to an end, *wrong* if its client got
other values than its nonce calls for, *unexplained* if it was answered right though no backend logged it, and
*duplicated* if it ran more than once although its model must not be asked twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.faults.backend_log import EXECUTED, Execution
from tests.faults.history import MALFORMED, OPEN, RIGHT, TWICE, UNSENT, WRONG, History
from tests.faults.nonce import POISON


@dataclass(frozen=True, slots=True)
class Verdict:
    """Rows, unless said."""

    requests: int
    rows: int
    answered: int
    """Answered with the right values."""
    lost: int
    wrong: int
    duplicated: int
    unexplained: int
    malformed: int
    """Requests with an answer that is none, or an error without a documented status and a text."""
    executions: int
    """Executions of these rows on all backends; 0 where backends keep no log."""
    most_executions: int
    """Of any single row."""

    @property
    def amplification(self) -> float:
        """Executions for each row that ran at all; 1.0: nothing ran twice."""
        return self.executions / max(1, self.rows)

    @property
    def clean(self) -> bool:
        return not (self.lost or self.wrong or self.duplicated or self.unexplained or self.malformed)


def check(history: History, logs: Sequence[Sequence[Execution]] | None, *, idempotent: bool = True) -> Verdict:
    """
    Args:
        history: what the clients saw; all requests of one load, in the order of their nonces.
        logs: what each backend did; None where they keep no log.
        idempotent: whether a row may run more than once.
    """
    rows, outcome = history.column("rows").astype(np.int64), history.column("outcome")
    total = int(rows.sum())
    counts = np.zeros(total, np.int64)
    first = history.nonce[0] if len(history) else 0
    for log in logs or ():
        for record in log:
            if record.kind == EXECUTED:
                places = (record.nonces & ~np.int64(POISON)) - first
                np.add.at(counts, places[(places >= 0) & (places < total)], 1)
    answered = np.repeat(outcome == RIGHT, rows)
    return Verdict(
        requests=len(history),
        rows=int(rows[outcome != UNSENT].sum()),
        answered=int(answered.sum()),
        lost=int(rows[outcome == OPEN].sum()),
        wrong=int(rows[(outcome == WRONG) | (outcome == TWICE)].sum()),
        duplicated=0 if idempotent else int((counts > 1).sum()),
        unexplained=0 if logs is None else int((answered & (counts == 0)).sum()),
        malformed=int((outcome == MALFORMED).sum()),
        executions=int(counts.sum()),
        most_executions=int(counts.max(initial=0)),
    )
