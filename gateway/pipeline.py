"""READ THIS FIRST: the path of one inference request.

    bytes ─▶ ingress/http_server.py + protocol/http1.py     one request, framed and within limits
          ─▶ ingress/oip_http.py + protocol/oip_json.py     decoded and checked against the model's signature
          ─▶ Pipeline.infer (here)                          resolved, split if oversized, admitted
             ├─ traffic.py, traffic_shadow.py               only for models with a canary or a shadow: who answers
             │                                              (asked before decoding), what is copied for comparison
             ├─ response_cache.py + core/remembered.py      only where the model asks for it: answered before, or by
             │                                              an equal request that is under way
             └─ ensemble.py, ensemble_run.py                an ensemble has no queue: each step comes in here again, as
                                                            a request to its own model
             ├─ sequence_scheduler.py + core/sequencing.py  only for models with sequences: one step of each goes on at
             │                                              a time, with the sequence's state
          ─▶ scheduler.py + core/batching.py                waits with others of its kind, becomes part of a batch
          ─▶ dispatcher.py + core/fleet.py                  sent to a replica; after a failure, to another
             ├─ core/ragged.py, loading_ragged.py           only for models whose rows differ in shape: laid flat and
             │                                              described on the way in, cut by shape on the way back
          ─▶ backends/onnx.py ⇢ workers/process.py          executed in a worker process, tensors in shared memory
          ─▶ dispatcher.py → scheduler.py                   answer checked, members settled, each exactly once
          ─▶ ingress/oip_http.py + protocol/oip_answer.py   its rows encoded, provenance headers, bytes
          ─▶ observe/record.py                              counted, once per batch where possible

Nothing here knows a wire format: HTTP and gRPC enter through the same method, and so do requests of the gateway's own.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Final

from gateway.catalog import ServedVersion
from gateway.core import assembly
from gateway.core.batch import FinishedBatch, executions
from gateway.core.remembered import Store
from gateway.core.request import SETTLED, InferRequest
from gateway.errors import BackendError, Cancelled, Draining, GatewayError, NotReady
from gateway.response_cache import ResponseCache

log = logging.getLogger("gateway.cache")

CACHE_BYTES: Final = 64 * 1024 * 1024
"""Of remembered answers, where the configuration says nothing."""


class Pipeline:
    """Entry of every inference request, whatever protocol it came in by."""

    def __init__(self, store: Store | None = None) -> None:
        """`store`: where the answers of all cached models are kept; None: one of a default size, once it is needed."""
        self._store = store

    def infer(self, version: ServedVersion, request: InferRequest, *, past_cache: bool = False) -> None:
        """Take a decoded request; `received`, `context` and `settle` are set. `settle` is called once, later.
        `past_cache`: the response cache has seen it.

        Raises:
            GatewayError: the request was not taken (draining, not ready, queue full); `settle` will not be called.
        """
        if version.mirror is not None and not past_cache:
            version.mirror.consider(request)
        if version.cached and not past_cache:
            (version.cache or self._cache(version)).infer(request)
            return
        # Resolved before it was decoded, so the version may have left since; what it still holds is answered.
        scheduler = version.scheduler
        if scheduler is None:
            raise NotReady(f"Request for unavailable model: '{version.spec.name}' version {version.spec.version}")
        # More rows than one batch holds, and the model's owner lets the gateway cut: several requests, one answer.
        if request.rows > version.split_rows > 0:
            SplitRequest(version, request, version.split_rows).submit()
            return
        # Admission and queueing; from here on the scheduler owns the request until it settles it.
        scheduler.submit(request)

    def _cache(self, version: ServedVersion) -> ResponseCache:
        if self._store is None:
            log.info(
                "model %s asks for the response cache, and server.response_cache does not state its size: it may hold "
                "%d MiB", version.spec.name, CACHE_BYTES >> 20,
            )  # fmt: skip
            self._store = Store(CACHE_BYTES, None)
        cache = ResponseCache(version, self._store, partial(self.infer, version, past_cache=True))
        version.cache = cache
        return cache


class SplitRequest:
    """An oversized request on its way as several; settles the original once, when the last part is settled.

    The parts refer to it from admission on, so it lets go of them when it settles: a cycle would hold the tensors
    until the garbage collector comes by.
    """

    __slots__ = ("_open", "_original", "_parts", "_version")

    def __init__(self, version: ServedVersion, original: InferRequest, max_rows: int) -> None:
        self._version = version
        self._original = original
        self._parts = assembly.split_request(original, max_rows)
        self._open = len(self._parts)

    def submit(self) -> None:
        """All parts are let in, or none is and the scheduler's refusal is raised."""
        scheduler = self._version.scheduler
        if scheduler is None:
            raise Draining(f"model '{self._version.spec.name}' is unloading")
        for part in self._parts:
            part.settle = self._part_settled
        try:
            scheduler.submit_parts(self._original, self._parts)
        except GatewayError:
            self._parts = []  # they refer to this object, and a cycle would wait for the garbage collector
            raise
        self._original.owner = self

    def abort(self, request: InferRequest) -> None:
        """The caller of the whole left."""
        if self._original.state != SETTLED:
            if self._version.scheduler is not None:
                self._version.scheduler.statistics.fail("CANCELED")
            self._give_up(Cancelled("the caller left"))

    def _give_up(self, error: Exception) -> None:
        parts, scheduler = self._parts, self._version.scheduler
        self._settle(error=error)
        if scheduler is not None:
            for part in parts:
                scheduler.abort(part)

    def _part_settled(self, part: InferRequest) -> None:
        if self._original.state == SETTLED:
            return
        self._open -= 1
        if part.error is not None:
            self._give_up(part.error)
        elif self._open == 0:
            try:
                batches = {part.batch for part in self._parts}
                joined = self._join(batches)
            except Exception as error:  # whatever it was, the caller gets an answer
                self._settle(error=BackendError(f"model '{self._version.spec.name}': {error}"))
                return
            if self._version.scheduler is not None:
                self._version.scheduler.statistics.record_whole(
                    (joined.input_ns, joined.infer_ns, joined.output_ns),
                    sum(batch.finished - batch.dispatched for batch in batches),
                )
            self._settle(batch=joined)

    def _join(self, batches: set[FinishedBatch]) -> FinishedBatch:
        """The answer to the whole. `batches`: those that the parts were in; one that two shared is charged once."""
        pieces = [(part.batch, part.row) for part in self._parts]
        first: FinishedBatch = pieces[0][0]
        joined = FinishedBatch(
            first.batch_id,
            self._original.rows,
            assembly.join_outputs([(part.batch.outputs, part.row, part.rows) for part in self._parts]),
            first.backend,
            max(batch.attempt for batch, _ in pieces),
            min(batch.dispatched for batch, _ in pieces),
            max(batch.finished for batch, _ in pieces),
            first.reason,
            (
                sum(batch.input_ns for batch in batches),
                sum(batch.infer_ns for batch in batches),
                sum(batch.output_ns for batch in batches),
            ),
        )
        joined.remote = any(batch.remote for batch in batches)
        joined.parts = [execution for batch, row in pieces for execution in executions(batch, row)]
        return joined

    def _settle(self, batch: FinishedBatch | None = None, error: Exception | None = None) -> None:
        self._parts = []
        original = self._original
        original.owner = None
        original.state = SETTLED
        original.batch, original.error, original.row = batch, error, 0
        original.settle(original)
