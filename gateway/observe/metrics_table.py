"""The families of one scrape while they are being filled, and the sums that families without a version label need.

Rules: `family` first, then its samples; what is summed over versions is written by `families`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from gateway.observe.exposition import Family, Kind
from gateway.observe.record import Histogram


class Table:
    """Families by name, in the order in which they were described."""

    def __init__(self) -> None:
        self._by_name: dict[str, Family] = {}
        self._sums: defaultdict[tuple[str, str], float] = defaultdict(int)

    def family(self, name: str, kind: Kind, text: str, *, foreign: bool = False) -> None:
        """Describe a family; see `Family`."""
        self._by_name[name] = Family(name, kind, text, foreign=foreign)

    def __getitem__(self, name: str) -> Family:
        return self._by_name[name]

    def histogram(self, name: str, label_text: str, histogram: Histogram) -> None:
        """Folds `histogram`."""
        cumulative = histogram.cumulative()
        self._by_name[name].add_histogram(label_text, histogram.bounds, cumulative, histogram.sum)

    def sum(self, name: str, label_text: str, value: float) -> None:
        """Add to one sample."""
        self._sums[name, label_text] += value

    def most(self, name: str, label_text: str, value: float) -> None:
        """Raise one sample to `value`."""
        key = (name, label_text)
        self._sums[key] = max(self._sums[key], value)

    def least(self, name: str, label_text: str, value: float) -> None:
        """Lower one sample to `value`."""
        key = (name, label_text)
        self._sums[key] = min(self._sums.get(key, value), value)

    def families(self, hidden: Callable[[str], bool]) -> list[Family]:
        """All of them, with the sums written; those that are `hidden` only if they have a sample."""
        for (name, label_text), value in self._sums.items():
            self._by_name[name].add(label_text, value)
        self._sums.clear()
        return [family for family in self._by_name.values() if family.lines or not hidden(family.name)]

    def __repr__(self) -> str:
        return f"<Table families={len(self._by_name)} sums={len(self._sums)}>"
