"""gRPC's codec of a version whose requests are logged; the counterpart of `logged_http.py`."""

from __future__ import annotations

from gateway.catalog import ServedVersion
from gateway.core.request import InferRequest
from gateway.errors import Cancelled, DeadlineExceeded, GatewayError
from gateway.inference_log.handover import VersionLog
from gateway.ingress.grpc_call import GrpcCall
from gateway.ingress.oip_grpc import GrpcCodec
from gateway.ingress.oip_http import new_request_id
from gateway.ingress.request_notes import served
from gateway.protocol.oip_grpc_answer import Parts
from gateway.protocol.oip_grpc_cut import Cut
from gateway.protocol.options import DEFAULT_OPTIONS, ProtocolOptions


class LoggedGrpcCodec(GrpcCodec):
    """As `GrpcCodec`, and notes every request that ends."""

    def __init__(self, version: ServedVersion, options: ProtocolOptions = DEFAULT_OPTIONS) -> None:
        super().__init__(version, options)
        self._log: VersionLog = version.log.named(version.variant)

    def read(self, cut: Cut, call: GrpcCall, timeout_s: float) -> InferRequest:
        self._log.check()
        return super().read(cut, call, timeout_s)

    def answer(self, request: InferRequest, call: GrpcCall, before: bytes = b"") -> tuple[Parts, int, bytes]:
        memo = request.batch.grpc_memo or self._memo(request.batch)
        request_id = memo.ids[-1]
        made = super().answer(request, call, before)
        method = call.head.route
        endpoint = method.endpoint
        if endpoint == "infer" and not request.form.typed:
            endpoint = "raw"
        form = request.form.response
        try:
            tensors = None if form.plain else served(self._spec, form, request)
            total_s = self._now() - request.received
            self._log.answered(request, request_id, total_s, "grpc", endpoint, 0, method.caller, tensors)
        except Exception:  # whatever it is, the caller gets the answer
            self._log.failed()
        request.answer_id = request_id
        return made

    def count(
        self, call: GrpcCall, error: GatewayError, request_id: bytes = b"", request: InferRequest | None = None
    ) -> None:
        super().count(call, error, request_id, request)
        if isinstance(error, Cancelled) and self.late(call):
            error = DeadlineExceeded("Deadline Exceeded")
        method = call.head.route
        received = request.received if request is not None else call.received
        self._log.refused(
            error,
            request,
            request_id or new_request_id(),
            received,
            self._now() - received,
            "grpc",
            method.endpoint,
            error.grpc_code,
            method.caller,
        )
