"""Metric families as text: Prometheus 0.0.4 and OpenMetrics 1.0, and which of the two a scraper asked for.

Rules: a family is written once, its samples together. Labels arrive as finished text (`labels`), so that a
label set used by twenty families is escaped once. In a histogram `le` comes first: it sorts before every
other label used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Literal

Kind = Literal["counter", "gauge", "histogram", "summary"]

TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"


def labels(**pairs: str) -> str:
    """`a="x",b="y"`, names in alphabetical order, values escaped; empty for no labels."""
    return ",".join([f'{name}="{escape(value)}"' for name, value in sorted(pairs.items())])


def escape(value: str) -> str:
    """A label value with backslash, quote and line feed escaped; lone surrogates (no UTF-8) replaced."""
    safe = value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
    return safe.encode("utf-8", "replace").decode("utf-8")


class Family:
    """One metric family. `name` is its samples' exact name; a counter's ends in `_total` unless `foreign`.

    A foreign counter keeps a name that OpenMetrics forbids for counters; there it is of type `unknown`.
    """

    __slots__ = ("foreign", "help", "kind", "lines", "name")

    def __init__(self, name: str, kind: Kind, text: str, *, foreign: bool = False) -> None:
        self.name = name
        self.kind = kind
        self.help = text
        self.foreign = foreign
        self.lines: list[str] = []

    def add(self, label_text: str, value: float) -> None:
        """One sample of a counter or gauge; integers are written as integers."""
        self.lines.append(f"{self.name}{{{label_text}}} {value}\n" if label_text else f"{self.name} {value}\n")

    def add_histogram(self, label_text: str, bounds: Sequence[float], cumulative: Sequence[int], total: float) -> None:
        """`cumulative` counts values up to each bound and, last, all of them; `total` is their sum."""
        bucket = f"{self.name}_bucket{{le="
        rest = f",{label_text}}} " if label_text else "} "
        self.lines += [f'{bucket}"{float(bound)}"{rest}{n}\n' for bound, n in zip(bounds, cumulative[:-1], strict=True)]
        braces = f"{{{label_text}}}" if label_text else ""
        self.lines.append(f'{bucket}"+Inf"{rest}{cumulative[-1]}\n')
        self.lines.append(f"{self.name}_count{braces} {cumulative[-1]}\n")
        self.lines.append(f"{self.name}_sum{braces} {float(total)}\n")

    def add_summary(self, label_text: str, quantiles: Sequence[tuple[float, float]], count: int, total: float) -> None:
        """`quantiles`: (quantile, value), as Triton writes them: behind the other labels."""
        braces = f"{{{label_text}}}" if label_text else ""
        lead = f"{label_text}," if label_text else ""
        self.lines.append(f"{self.name}_count{braces} {count}\n")
        self.lines.append(f"{self.name}_sum{braces} {float(total)}\n")
        for quantile, value in quantiles:
            shown = "NaN" if value != value else value  # noqa: PLR0124  # NaN, as both formats write it
            self.lines.append(f'{self.name}{{{lead}quantile="{quantile}"}} {shown}\n')

    def head(self, openmetrics: bool) -> str:
        name, kind = self.name, str(self.kind)
        if openmetrics and kind == "counter":
            name, kind = (name, "unknown") if self.foreign else (name.removesuffix("_total"), kind)
        return f"# HELP {name} {self.help}\n# TYPE {name} {kind}\n"

    def __repr__(self) -> str:
        return f"<Family {self.name} {self.kind} lines={len(self.lines)}>"


def render(families: Iterable[Family], openmetrics: bool) -> bytes:
    """The families as text, without OpenMetrics' final `# EOF`."""
    return "".join([text for family in families for text in (family.head(openmetrics), *family.lines)]).encode("utf-8")


def prefers_openmetrics(accept: str) -> bool:
    """Whether an `Accept` header ranks OpenMetrics 1.0 (or 0.0.1, the same to readers) over plain text."""
    best = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for choice in accept.split(",")[:32]:
        media, *parameters = [part.strip().lower() for part in choice.split(";")]
        given = dict(p.split("=", 1) for p in parameters if "=" in p)
        if media == "application/openmetrics-text" and given.get("version", "1.0.0") not in {
            "1.0.0",
            "0.0.1",
        }:
            continue
        if media in best:
            best[media] = max(best[media], _quality(given.get("q", "1")))
    wanted = best["application/openmetrics-text"]
    return wanted > 0.0 and wanted >= best["text/plain"]


def _quality(text: str) -> float:
    try:
        return min(1.0, max(0.0, float(text)))
    except ValueError:
        return 0.0
