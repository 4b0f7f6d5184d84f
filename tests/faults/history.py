"""What the clients saw: one line per request, in columns, so that millions fit."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

RIGHT: Final = 200
"""Answered with 200 and the right values for every row. Other HTTP statuses stand for themselves."""
OPEN: Final = 0
"""No terminal outcome: still under way, or lost at the end of the run."""
BROKEN_OFF: Final = 1
"""The connection ended before a whole answer had come."""
WRONG: Final = 2
"""Answered with 200 and values that belong to other rows, or to none."""
TWICE: Final = 3
"""More bytes than one answer has."""
LEFT: Final = 4
"""The client hung up on purpose before the answer."""
MALFORMED: Final = 5
"""An answer that is not one of the protocol, or an error without a text or with an undocumented status."""

UNSENT: Final = 6
"""Still waiting for a free client when the run ended: the gateway never saw it."""

NAMES: Final = {
    OPEN: "no answer",
    BROKEN_OFF: "broken off",
    WRONG: "wrong",
    TWICE: "twice",
    LEFT: "left",
    MALFORMED: "malformed",
    UNSENT: "never sent",
}


@dataclass(frozen=True, slots=True)
class Window:
    """Requests due within a span of time. Latencies in seconds, from the instant the request was due."""

    requests: int
    rows: int
    right: int
    left: int
    p50_s: float
    p99_s: float
    p999_s: float
    worst_s: float
    outcomes: dict[int, int]
    shares: dict[str, float]
    """Share of the rows by the backend that answered, of those that were answered right."""
    retried: int
    """Right answers that took more than one attempt."""

    @property
    def errors(self) -> int:
        return self.requests - self.right - self.left

    @property
    def error_percent(self) -> float:
        return 100.0 * self.errors / self.requests if self.requests else 0.0


class History:
    """Columns of equal length; `new` adds a request, `end` says what became of it."""

    def __init__(self) -> None:
        self.due = array("d")
        self.ended = array("d")
        self.nonce = array("q")
        self.rows = array("H")
        self.outcome = array("H")
        self.backend = array("H")
        self.attempt = array("H")
        self.backends: list[str] = [""]
        self.texts: dict[str, int] = {}
        """Error texts, without digits, and how often each came; the first hundred."""
        self._number = {"": 0}

    def __len__(self) -> int:
        return len(self.due)

    def new(self, due: float, nonce: int, rows: int) -> int:
        self.due.append(due)
        self.ended.append(0.0)
        self.nonce.append(nonce)
        self.rows.append(rows)
        self.outcome.append(OPEN)
        self.backend.append(0)
        self.attempt.append(0)
        return len(self.due) - 1

    def end(self, index: int, at: float, outcome: int, backend: str = "", attempt: int = 0) -> None:
        if self.outcome[index] != OPEN:
            outcome = TWICE
        self.ended[index] = at
        self.outcome[index] = outcome
        number = self._number.get(backend)
        if number is None:
            number = self._number[backend] = len(self.backends)
            self.backends.append(backend)
        self.backend[index] = number
        self.attempt[index] = attempt

    def said(self, text: str) -> None:
        """A refusal: its status and its text."""
        text = text[:3] + "".join("#" if letter.isdigit() else letter for letter in text[3:])
        if text in self.texts or len(self.texts) < 100:
            self.texts[text] = self.texts.get(text, 0) + 1

    @property
    def unsent(self) -> int:
        """Requests for which no client was free before the run ended: the load was more than could be borne."""
        return int((self.column("outcome") == UNSENT).sum())

    def column(self, name: str) -> NDArray[Any]:
        return np.array(getattr(self, name))

    def window(self, since: float = 0.0, until: float = float("inf")) -> Window:
        """The requests that were due within [since, until) and were sent."""
        due = self.column("due")
        chosen = (due >= since) & (due < until) & (self.column("outcome") != UNSENT)
        outcome, rows = self.column("outcome")[chosen], self.column("rows")[chosen]
        took = (self.column("ended")[chosen] - due[chosen])[outcome == RIGHT]
        backend, attempt = self.column("backend")[chosen], self.column("attempt")[chosen]
        right = outcome == RIGHT
        answered = int(rows[right].sum())
        shares = {
            name: float(rows[right & (backend == number)].sum()) / answered
            for number, name in enumerate(self.backends)
            if name and answered
        }
        p50, p99, p999, worst = np.quantile(took, [0.5, 0.99, 0.999, 1.0]) if len(took) else (0.0,) * 4
        kinds, counts = np.unique(outcome, return_counts=True)
        return Window(
            requests=int(chosen.sum()),
            rows=int(rows.sum()),
            right=int(right.sum()),
            left=int((outcome == LEFT).sum()),
            p50_s=float(p50),
            p99_s=float(p99),
            p999_s=float(p999),
            worst_s=float(worst),
            outcomes={int(kind): int(count) for kind, count in zip(kinds, counts, strict=True)},
            shares=shares,
            retried=int((right & (attempt > 1)).sum()),
        )


def outcome_name(outcome: int) -> str:
    return NAMES.get(outcome, str(outcome))
