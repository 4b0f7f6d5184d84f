"""One model version as gRPC clients see it: read a request, and write its answer with provenance.

The counterpart of `oip_http.py`, with the same division of labour: per version the reader and the writer; per batch
what all its answers share, with the initial metadata but for four values; per request a few formatting operations.

Provenance is initial metadata, with HTTP's names in lower case and HTTP's values (contracts): the metadata are made
from the lines that `provenance/headers.py` makes.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Final

from gateway.catalog import ServedVersion
from gateway.core.batch import FinishedBatch
from gateway.core.request import InferRequest
from gateway.errors import Cancelled, GatewayError
from gateway.ingress.grpc_call import GrpcCall
from gateway.ingress.oip_http import new_request_id
from gateway.protocol.hpack_blocks import metadata_literal
from gateway.protocol.oip_grpc_answer import AnswerWriter, BatchAnswers, Parts
from gateway.protocol.oip_grpc_cut import Cut
from gateway.protocol.oip_grpc_request import RequestReader
from gateway.protocol.options import DEFAULT_OPTIONS, ProtocolOptions
from gateway.provenance import headers

log = logging.getLogger("gateway.grpc")

DEADLINE_EXCEEDED: Final = 4
_UUID_CHARACTERS: Final = 36
_LEAST_S: Final = 1e-6
"""0.0 would mean "as long as you like"."""


class BatchMemo:
    """What the answers of one batch share."""

    __slots__ = ("answers", "head", "ids", "lines", "place", "timing")

    def __init__(self, answers: BatchAnswers, lines: bytes, ids: list[bytes]) -> None:
        self.answers = answers
        self.lines = lines
        """HTTP's template for row, queue ms, total ms, request id."""
        values = dict(fields(lines))
        self.place = values[b"inference-batch"]
        """Template for the row."""
        self.timing = values[b"server-timing"]
        """Template for queue ms, total ms."""
        fixed = b"".join([metadata_literal(name, values[name] % ()) for name in _FIXED])
        self.head = fixed.replace(b"%", b"%%") + _CHANGING
        """Template for length and value of the place, length and value of the timing, request id. Both are far shorter
        than the 127 bytes from which on HPACK writes a length in more than one byte."""
        self.ids = ids
        """Unused request ids, the smallest last."""


_FIXED: Final = (b"inference-model", b"inference-backend")
_CHANGING: Final = (
    metadata_literal(b"inference-batch", b"")[:-1]
    + b"%c%b"
    + metadata_literal(b"server-timing", b"")[:-1]
    + b"%c%b"
    + metadata_literal(b"x-request-id", b"?" * _UUID_CHARACTERS)[:-_UUID_CHARACTERS]
    + b"%b"
)


class GrpcCodec:
    """Reads requests for one model version and writes their answers."""

    def __init__(self, version: ServedVersion, options: ProtocolOptions = DEFAULT_OPTIONS) -> None:
        spec = version.spec
        self.model_line = headers.model_header(spec.name, spec.version, spec.digest, version.variant)
        self._remote_line = headers.model_header(spec.name, spec.version, "", version.variant)
        """... of an answer that a remote backend made, perhaps from other files."""
        self.statistics = version.statistics.protocol("grpc")
        self._spec = spec
        self._reader = RequestReader(spec, options.memory)
        self._writer = AnswerWriter(spec, mirror=options.typed_responses == "mirror")
        self._now = time.monotonic

    def read(self, cut: Cut, call: GrpcCall, timeout_s: float) -> InferRequest:
        """A request ready for the pipeline but for `context` and `settle`. `timeout_s`: from the call's metadata, 0.0
        if they name none.

        Raises:
            InvalidRequest: malformed, or does not fit the model.
            Unsupported: it asks for something this gateway does not offer.
        """
        request = self._reader.read(cut)
        request.received = received = call.received
        deadline = call.deadline
        if deadline is not None:
            # The transport answers a passed deadline itself; the queue must not work for it in vain.
            left = max(deadline - received, _LEAST_S)
            request.timeout_s = min(left, timeout_s or left)
        elif timeout_s:
            request.timeout_s = timeout_s
        return request

    def settle(self, request: InferRequest) -> None:
        """Write the answer of a unary call; the scheduler's callback."""
        call: GrpcCall = request.context
        call.on_abort = None  # it held the request, and a cycle would wait for the garbage collector
        if request.error is not None:
            self.refuse(call, request.error, executed_line(request), request)
            return
        try:
            parts, length, head = self.answer(request, call)
        except Exception as error:
            # Whatever went wrong, the caller gets an answer: nobody else will settle this request.
            self.refuse(call, error, request=request)
            return
        try:
            call.reply(parts, length, head)
        except Exception as error:  # it is counted, and noted, as answered: it must not be a second time
            known = known_error(error, self._spec.name)
            call.fail(known.grpc_code, str(known))

    def answer(self, request: InferRequest, call: GrpcCall, before: bytes = b"") -> tuple[Parts, int, bytes]:
        """(the message's parts, its bytes, initial metadata) of a settled request, which is counted as answered.

        Raises:
            InvalidRequest: an answer of the wanted form cannot be made.
        """
        batch: FinishedBatch = request.batch
        memo: BatchMemo = batch.grpc_memo or self._memo(batch)
        parts, length = self._writer.write(request, memo.answers, before)
        received = request.received
        queue_s, total_s = batch.dispatched - received, self._now() - received
        if batch.parts is None and request.attempt == batch.attempt:
            place, timing = memo.place % request.row, memo.timing % (queue_s * 1e3, total_s * 1e3)
            head = memo.head % (len(place), place, len(timing), timing, memo.ids.pop())
        else:
            head = self._long_head(request, memo, queue_s * 1e3, total_s * 1e3)
        if request.told:
            head += metadata(request.told)
        self.statistics.answered(total_s, queue_s, batch.finished - batch.dispatched, 0)
        return parts, length, head

    def refuse(
        self, call: GrpcCall, error: Exception, executed: bytes = b"", request: InferRequest | None = None
    ) -> None:
        """End a unary call with an error, with what is known of its provenance. `executed`: HTTP's header line of the
        last attempt; `request`: where it was decoded."""
        known = known_error(error, self._spec.name)
        request_id = new_request_id()
        self.count(call, known, request_id, request)
        if not isinstance(known, Cancelled):  # nobody is there to read it
            lines = self.model_line + executed + headers.request_id_header(request_id)
            call.fail(known.grpc_code, str(known), metadata(lines))

    def count(
        self, call: GrpcCall, error: GatewayError, request_id: bytes = b"", request: InferRequest | None = None
    ) -> None:
        """A request ended without an answer. A caller whose deadline passed left for that reason. The rest is for
        codecs that keep a log: the id its answer carries (empty: none does), and the request, if it was decoded."""
        late = isinstance(error, Cancelled) and self.late(call)
        self.statistics.count(DEADLINE_EXCEEDED if late else error.grpc_code)

    def late(self, call: GrpcCall) -> bool:
        """Whether the call's deadline has passed."""
        return call.deadline is not None and self._now() >= call.deadline

    def _memo(self, batch: FinishedBatch) -> BatchMemo:
        lines = headers.batch_template(
            self._model_line(batch),
            batch.backend,
            batch.attempt,
            batch.batch_id,
            batch.rows,
            (batch.finished - batch.dispatched) * 1e3,
        )
        ids = headers.uuid7_block(time.time_ns() // 1_000_000, os.urandom(headers.UUID7_RANDOM_BYTES), batch.rows)
        ids.reverse()
        memo = batch.grpc_memo = BatchMemo(BatchAnswers(self._spec, batch.outputs, batch.rows), lines, ids)
        return memo

    def _model_line(self, batch: FinishedBatch) -> bytes:
        return self._remote_line if batch.remote else self.model_line

    def _long_head(self, request: InferRequest, memo: BatchMemo, queue_ms: float, total_ms: float) -> bytes:
        batch: FinishedBatch = request.batch
        if batch.parts is None:  # shares a rerun with others, but for itself it is another attempt
            members = [headers.Member(batch.backend, request.attempt, batch.batch_id, batch.rows, request.row)]
        else:
            members = [headers.Member(b.backend, b.attempt, b.batch_id, b.rows, row) for b, row in batch.parts]
        infer_ms = (batch.finished - batch.dispatched) * 1e3
        return metadata(
            headers.split_headers(self._model_line(batch), members, queue_ms, infer_ms, total_ms, memo.ids.pop())
        )


def fields(lines: bytes) -> list[tuple[bytes, bytes]]:
    """Header lines as HTTP/1.1 has them → (name in lower case, value)."""
    pairs = [line.partition(b": ") for line in lines.split(b"\r\n") if line]
    return [(name.lower(), value) for name, _, value in pairs]


def metadata(lines: bytes) -> bytes:
    """Header lines as HTTP/1.1 has them → initial metadata, encoded."""
    return b"".join([metadata_literal(name, value) for name, value in fields(lines)])


def executed_line(request: InferRequest) -> bytes:
    """`Inference-Backend` of a request that failed, where a backend had it."""
    return headers.backend_header(request.avoid, request.attempt) if request.avoid is not None else b""


def known_error(error: Exception, model: str) -> GatewayError:
    """What a caller may see of any exception; what nobody foresaw goes to the log."""
    if isinstance(error, GatewayError):
        return error
    log.error("a request to model %s failed in a way nobody foresaw", model, exc_info=error)
    return GatewayError("the gateway failed on this request")
