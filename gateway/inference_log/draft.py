"""A frame while it is being noted: rows, the executions they refer to, and whose tensors go with them.

Invariants: `requests` has an entry for each row, None where the row keeps no payload; `groups` says from which row on
answers came from which batch, ascending. What a row refers to is its own request and that request's place in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gateway.core.batch import FinishedBatch, executions
from gateway.core.log_policy import LogPolicy
from gateway.core.model import ModelSpec
from gateway.core.request import InferRequest, OutputTensor
from gateway.inference_log.columns import OutputColumns, input_columns
from gateway.inference_log.frame import NO_BATCH, Batch, Column, Detail

Columns = tuple[list[Column], list[Column]]
"""Inputs and outputs."""


class Draft:
    """What one model version has noted since its last frame."""

    __slots__ = ("_entered", "_places", "batch", "batches", "failed", "groups", "nbytes", "place", "requests",
                 "row_bytes", "rows", "served")  # fmt: skip

    def __init__(self) -> None:
        self.rows: list[tuple[Any, ...]] = []
        """As `frame.Row`."""
        self.requests: list[InferRequest | None] = []
        self.failed: set[int] = set()
        """Rows of requests that got no answer."""
        self.served: dict[int, Sequence[OutputTensor]] = {}
        """By row: the answer's tensors, where they are not the request's rows of the batch's outputs."""
        self.batches: list[Batch] = []
        self.groups: list[int] = []
        self.batch: FinishedBatch | None = None
        """The batch of the row noted last, and its place in `batches`."""
        self.place = NO_BATCH
        self.row_bytes = 0
        """Of one row of its outputs, roughly."""
        self.nbytes = 0
        """Of the tensors of all rows, roughly."""
        self._places: dict[object, int] = {}
        self._entered: list[FinishedBatch] = []
        """Whose identity stands in `_places`: rows that keep no payload do not keep their batch alive either, and
        another one could take its address."""

    def enter(self, batch: FinishedBatch, row: int) -> int:
        """The next row, which is `row`, is from another batch than the last one: the batch's place."""
        self._begin(batch, row)
        place = self._places.get(id(batch))
        if place is None:
            place = self._places[id(batch)] = len(self.batches)
            self._entered.append(batch)
            self.batches.append(
                Batch(
                    batch.batch_id,
                    batch.rows,
                    batch.backend,
                    batch.attempt,
                    batch.dispatched,
                    batch.finished,
                    batch.remote,
                )
            )
        self.place = place
        return place

    def enter_parts(self, batch: FinishedBatch, row: int, received: float, at: int) -> tuple[int, int, Detail]:
        """The same for an answer that several executions, or an earlier one, made: (the first one's place, the
        request's first row in it, what is said of all of them)."""
        self._begin(batch, at)
        parts: list[tuple[int, int]] = []
        for part, first in executions(batch, row):
            key = (*part, batch.remote)
            place = self._places.get(key)
            if place is None:
                place = self._places[key] = len(self.batches)
                self.batches.append(Batch(part.batch_id, part.rows, part.backend, part.attempt, 0.0, 0.0, batch.remote))
            parts.append((place, first))
        self.place = NO_BATCH
        detail = Detail(
            executions=tuple(parts) if len(parts) > 1 else (),
            queued_s=batch.dispatched - received,
            infer_s=batch.finished - batch.dispatched,
        )
        return *parts[0], detail

    def _begin(self, batch: FinishedBatch, row: int) -> None:
        self.groups.append(row)
        self.batch = batch
        self.row_bytes = sum([len(output.data) for output in batch.outputs.values()]) // max(batch.rows, 1)

    def columns(self, spec: ModelSpec, policy: LogPolicy) -> Columns:
        """The tensors of all rows that keep theirs."""
        requests, count = self.requests, len(self.rows)
        if None in requests:
            places: Sequence[int] = [place for place, request in enumerate(requests) if request is not None]
        else:
            places = range(count)
        if not places:
            return [], []
        kept: list[InferRequest] = [requests[place] for place in places]  # type: ignore[misc]  # these are not None
        inputs = input_columns(spec, policy, places, kept, count)
        outputs = OutputColumns(spec)
        if len(self.groups) == 1 and len(kept) == count and not self.failed and not self.served and _is_run(kept):
            outputs.add_run(0, kept[0].batch, kept)
        else:
            self._add_runs(outputs, places, kept)
        return inputs, outputs.columns(policy, count)

    def _add_runs(self, outputs: OutputColumns, places: Sequence[int], kept: Sequence[InferRequest]) -> None:
        """The general case: requests that lie one behind the other in a batch are still taken together."""
        run: list[InferRequest] = []
        begin = expected = -1

        def finish() -> None:
            if run:
                outputs.add_run(begin, run[0].batch, run)
                run.clear()

        for place, request in zip(places, kept, strict=True):
            if place in self.failed:
                continue
            if place in self.served:
                finish()
                outputs.add_served(place, self.served[place])
                continue
            follows = (
                bool(run)
                and request.batch is run[0].batch
                and request.row == expected
                and place == begin + len(run)
                and request.outputs == run[0].outputs
            )
            if not follows:
                finish()
                begin = place
            run.append(request)
            expected = request.row + request.rows
        finish()

    def keep_readable(self, spec: ModelSpec | None, policy: LogPolicy) -> None:
        """Drop the payload of rows whose tensors cannot be read, so that `columns` works for the others."""
        for place, request in enumerate(self.requests):
            if request is None or spec is None:
                continue
            alone = Draft()
            alone.rows = [self.rows[place]]
            alone.requests = [request]
            alone.failed = {0} if place in self.failed else set()
            alone.served = {0: self.served[place]} if place in self.served else {}
            try:
                alone.columns(spec, policy)
            except Exception:  # whatever it is, it stays with this row
                self.requests[place] = None


def _is_run(requests: Sequence[InferRequest]) -> bool:
    """Whether these requests of one batch have a row each, one behind the other, and wanted the same outputs."""
    count = len(requests)
    start = requests[0].row
    outputs = [request.outputs for request in requests]
    return (
        [request.row for request in requests] == list(range(start, start + count))
        and [request.rows for request in requests].count(1) == count
        and outputs.count(outputs[0]) == count
    )
