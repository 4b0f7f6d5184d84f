"""Frames read back row by row, written without a look at how they are made: what tests compare with what was sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from gateway.inference_log import frame
from gateway.inference_log.frame import NO_BATCH, Batch, Column, Detail, Event, Requests, Row


@dataclass
class Tensor:
    datatype: str
    shape: tuple[int, ...]
    data: bytes
    policy: str = "keep"
    length: int | None = None


@dataclass
class Logged:
    """One row, with its frame's values and its own tensors."""

    model: str
    version: str
    digest: str
    variant: str
    row: Row
    batch: Batch | None
    executions: list[tuple[Batch, int]]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return self.row.request_id.decode()

    @property
    def detail(self) -> Detail:
        return self.row.detail or Detail()


def rows_of(found: Requests) -> list[Logged]:
    """Its rows, in order."""
    rows = []
    for row in found.rows:
        batch = None if row.batch == NO_BATCH else found.batches[row.batch]
        parts = row.detail.executions if row.detail is not None else ()
        executions = [(found.batches[place], first) for place, first in parts]
        rows.append(Logged(found.model, found.version, found.digest, found.variant, row, batch, executions))
    for columns, side in ((found.inputs, "inputs"), (found.outputs, "outputs")):
        for column in columns:
            for place, tensor in _cut(column, len(rows)):
                tensors: dict[str, Tensor] = getattr(rows[place], side)
                assert column.name not in tensors
                tensors[column.name] = tensor
    return rows


def _cut(column: Column, count: int) -> Iterable[tuple[int, Tensor]]:
    places = column.rows if column.rows is not None else list(range(count))
    assert places == sorted(set(places))
    even = len(column.data) // len(places)
    sizes = column.sizes if column.sizes is not None else [even] * len(places)
    assert sum(sizes) == len(column.data)
    shapes = column.shapes * len(places) if len(column.shapes) == 1 else column.shapes
    at = 0
    for n, place in enumerate(places):
        length = None if column.lengths is None else column.lengths[n]
        data = column.data[at : at + sizes[n]]
        at += sizes[n]
        yield place, Tensor(column.datatype, tuple(shapes[n]), data, column.policy, length)


class Frames:
    """Fits `outlet.Writer`: takes what there is room for, and decodes it."""

    def __init__(self, room: float = float("inf"), reserve: float = 0.0) -> None:
        self.room = room
        self.reserve = reserve
        self.taken: list[Requests | Event] = []
        self.pending_bytes = 0

    def offer(self, data: bytes, rows: int, *, reserve: bool = False) -> bool:
        if self.pending_bytes + len(data) > self.room + (self.reserve if reserve else 0.0):
            return False
        self.pending_bytes += len(data)
        decoded = frame.decode(data)
        assert frame.rows_in(decoded) == rows
        self.taken.append(decoded)
        return True

    def synced(self) -> None:
        """All of it is on the disk."""
        self.pending_bytes = 0

    @property
    def rows(self) -> list[Logged]:
        return [row for found in self.taken if isinstance(found, Requests) for row in rows_of(found)]

    @property
    def events(self) -> list[Event]:
        return [found for found in self.taken if isinstance(found, Event)]


class Later:
    """Fits `outlet.Later` and a loop's `call_soon`; the test says when."""

    def __init__(self) -> None:
        self.due: list[Callable[[], Any]] = []

    def __call__(self, *arguments: Any) -> None:
        self.due.append(arguments[-1])

    def run(self) -> None:
        due, self.due = self.due, []
        for callback in due:
            callback()
