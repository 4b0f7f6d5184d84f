"""What a scenario came to: claims that hold or do not, and figures."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Claim:
    """A bound and what was measured. `hard`: a count, which holds on any machine; else a figure of time or load, which
    is only as good as the machine is quiet."""

    text: str
    value: float
    most: float
    hard: bool = True
    at_least: bool = False
    """The bound is a lower one."""

    @property
    def met(self) -> bool:
        return self.value >= self.most if self.at_least else self.value <= self.most

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"{self.text}: {self.value:.4g} (wanted {sign} {self.most:g}){'' if self.met else ' MISSED'}"


@dataclass(slots=True)
class Result:
    """One scenario's line in the table. Times in seconds; None where there is nothing to measure."""

    name: str
    fault: str
    expected: str
    requests: int = 0
    rows: int = 0
    injected: int = 0
    errors: int = 0
    lost: int = 0
    wrong: int = 0
    duplicated: int = 0
    amplification: float | None = None
    p99_before_s: float | None = None
    p99_during_s: float | None = None
    detect_s: float | None = None
    recover_s: float | None = None
    outcomes: dict[str, int] = field(default_factory=dict)
    texts: dict[str, int] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: str = ""
    """Why it could not be run here."""

    @property
    def error_percent(self) -> float:
        return 100.0 * self.errors / self.requests if self.requests else 0.0

    @property
    def p99_ratio(self) -> float | None:
        if not self.p99_before_s or self.p99_during_s is None:
            return None
        return self.p99_during_s / self.p99_before_s

    def at_most(self, text: str, value: float | None, most: float, *, hard: bool = True) -> None:
        self.claims.append(Claim(text, float("inf") if value is None else value, most, hard))

    def at_least(self, text: str, value: float | None, least: float, *, hard: bool = True) -> None:
        self.claims.append(Claim(text, float("-inf") if value is None else value, least, hard, at_least=True))

    @property
    def broken(self) -> list[str]:
        """Hard claims that do not hold."""
        return [str(claim) for claim in self.claims if claim.hard and not claim.met]

    @property
    def missed(self) -> list[str]:
        """Figures that were not reached."""
        return [str(claim) for claim in self.claims if not claim.hard and not claim.met]
