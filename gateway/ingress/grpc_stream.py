"""ModelStreamInfer: many requests and their answers on one call.

Rules (wire notes §2.4): answers come in the order of the requests, even across models. A request that fails is answered
with `error_message` and its `id`, and the stream lives on; with the metadata `triton_grpc_error: true` a request that
fails after it was taken ends the stream with its status instead. Every model here answers once, so every answer is the
last of its request and says so. When the client has sent its last request, the stream ends behind the last answer.

Invariants: at most MAX_IN_WORK requests of one stream are in work or wait for their turn to be answered, and of
requests and answers no more than MAX_IN_WORK_BYTES beyond the last; further ones are not read. Provenance of single
answers has no place in metadata, which is sent once, at the beginning.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Final, Protocol

from gateway.core.request import InferRequest
from gateway.errors import GatewayError, NotReady
from gateway.ingress.grpc_call import GrpcCall
from gateway.ingress.grpc_inference import Inference
from gateway.ingress.oip_grpc import GrpcCodec, known_error, metadata
from gateway.ingress.oip_http import new_request_id, request_id_header
from gateway.protocol.grpc_wire import UNAVAILABLE, CallHead
from gateway.protocol.oip_grpc_answer import Parts
from gateway.protocol.protobuf_wire import field, prefix, text

log = logging.getLogger("gateway.grpc")

MAX_IN_WORK: Final = 256
MAX_IN_WORK_BYTES: Final = 64 * 1024 * 1024
STOPPING: Final = "GRPC server is shutting down and has stopped accepting new requests."
_LAST: Final = field(4, text(1, "triton_final_response") + field(2, b"\x08\x01"))
"""ModelInferResponse.parameters with that one, true."""


class _Answer:
    """One request's place in the order of answers."""

    __slots__ = ("codec", "done", "length", "model", "nbytes", "parts", "request", "request_id", "status", "stream")

    def __init__(self, stream: InferStream, nbytes: int) -> None:
        self.nbytes = nbytes
        """Of the request, then of its answer."""
        self.stream = stream
        self.codec: GrpcCodec | None = None
        self.request: InferRequest | None = None
        """Set while the pipeline has it."""
        self.request_id = ""
        self.model = ""
        self.done = False
        self.parts: Parts = []
        self.length = 0
        self.status: GatewayError | None = None
        """Ends the stream."""

    def settle(self, request: InferRequest) -> None:
        """The scheduler's callback."""
        self.request = None  # it knows this answer, and a cycle would wait for the garbage collector
        request.context = None
        stream, codec = self.stream, self.codec
        try:
            if request.error is not None:
                raise request.error
            assert codec is not None  # noqa: S101  # set before the request was handed over
            parts, length, _ = codec.answer(request, stream.call, _LAST)
            self.put([prefix(2, length), *parts])
        except Exception as error:
            self.fail(error, request, taken=True)
        stream.flush()

    def fail(self, error: Exception, request: InferRequest | None = None, *, taken: bool = False) -> None:
        """`request`: where it was decoded; `taken`: the pipeline had it."""
        known = known_error(error, self.model)
        if self.codec is not None:
            self.codec.count(self.stream.call, known, request=request)
        else:
            self.stream.note_unresolved(known, self.model)
        if taken and self.stream.errors_end:
            self.status = known
        said = text(3, self.request_id)
        if taken:
            said = text(1, self.model) + said + _LAST
        self.put([text(1, str(known)), field(2, said)])

    def put(self, parts: Parts) -> None:
        self.parts = parts
        self.length = sum(map(len, parts))
        self.stream.in_work_bytes += self.length - self.nbytes
        self.nbytes = self.length
        self.done = True


class Drainable(Protocol):
    """A stream that stays open until its client ends it, or the server stops."""

    def drain(self) -> None:
        """The server stops."""


class InferStream:
    """One call; fits `grpc_call.StreamHandler`."""

    def __init__(
        self,
        inference: Inference,
        call: GrpcCall,
        head: CallHead,
        timeout_s: float,
        errors_end: bool,
        streams: set[Drainable],
    ) -> None:
        """`streams`: where it is to be found while it is open."""
        self.call = call
        self._head = head
        self.errors_end = errors_end
        self.in_work_bytes = 0
        self._streams = streams
        streams.add(self)
        self._inference = inference
        self._timeout_s = timeout_s
        self._answers: deque[_Answer] = deque()
        self._half_closed = False
        self._stopping = False
        self._over = False
        self._paused = False
        call.start(metadata(request_id_header()))

    # -- what the transport tells ----------------------------------------------------------------------------------

    def message(self, message: bytes | memoryview) -> None:
        if self._over or self._stopping:
            return
        answer = _Answer(self, len(message))
        self.in_work_bytes += len(message)
        self._answers.append(answer)
        try:
            self._take(message, answer)
        except Exception as error:
            request, answer.request = answer.request, None
            answer.fail(error, request)
        self.flush()
        if not self._over and (len(self._answers) >= MAX_IN_WORK or self.in_work_bytes > MAX_IN_WORK_BYTES):
            self._paused = True
            self.call.pause()

    def half_closed(self) -> None:
        self._half_closed = True
        self.flush()

    def writable(self) -> None:
        """The transport itself holds messages back while the client does not read."""

    def aborted(self) -> None:
        """Nobody is there to be answered any more."""
        self._end()

    def drain(self) -> None:
        """The server stops: no more requests are taken, and the stream ends behind what it has taken."""
        self._stopping = True
        self.flush()

    def note_unresolved(self, error: GatewayError, model: str) -> None:
        """A request of this stream reached no model version."""
        self._inference.note(self.call, error, new_request_id(), (model, ""))

    # -- in between ------------------------------------------------------------------------------------------------

    def _take(self, message: bytes | memoryview, answer: _Answer) -> None:
        inference, call = self._inference, self.call
        cut = inference.openings.cut(message)
        answer.request_id = cut.request_id
        answer.model = cut.opening.model
        try:
            version = inference.version(cut.opening)
        except NotReady as error:
            answer.codec = inference.unready(cut.opening, error)
            raise
        answer.codec = codec = inference.codec(version)
        if version.split is not None:
            version = inference.chosen(version, cut, call, self._head)
            answer.codec = codec = inference.codec(version)
        request = inference.read(codec, cut, call, self._timeout_s)
        answer.request_id = request.request_id or ""
        request.settle = answer.settle
        answer.request = request
        inference.pipeline.infer(version, request)

    def flush(self) -> None:
        """Send what is next in order."""
        answers, call = self._answers, self.call
        while answers and answers[0].done and not self._over:
            answer = answers.popleft()
            self.in_work_bytes -= answer.nbytes
            if answer.status is not None:
                call.fail(answer.status.grpc_code, str(answer.status))
                self._end()
            else:
                call.send(answer.parts, answer.length)
        if self._over:
            return
        if not answers and (self._half_closed or self._stopping):
            self._end()
            call.finish(*((0, "") if self._half_closed else (UNAVAILABLE, STOPPING)))
        elif self._paused and len(answers) <= MAX_IN_WORK // 2 and self.in_work_bytes <= MAX_IN_WORK_BYTES // 2:
            self._paused = False
            call.resume()

    def _end(self) -> None:
        """Let go of everybody who is still in work."""
        self._over = True
        self._streams.discard(self)
        answers = list(self._answers)
        self._answers.clear()
        for answer in answers:
            if answer.request is not None:
                answer.request.abort()
