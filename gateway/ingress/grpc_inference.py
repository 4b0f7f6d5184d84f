"""From a ModelInferRequest's bytes to the pipeline: which model version it is for, and the unary call.

A message names its model itself, so it is cut before anybody knows whom it concerns. The version is looked up for every
request: what is remembered of an opening never outlives the version it was checked against.
"""

from __future__ import annotations

import uuid

from gateway.catalog import Catalog, ServedVersion
from gateway.core.request import InferRequest
from gateway.errors import GatewayError, NotReady
from gateway.inference_log.handover import NOBODY, Caller, InferenceLog
from gateway.ingress.grpc_call import GrpcCall, StreamHandler
from gateway.ingress.grpc_management import version_of
from gateway.ingress.logged_grpc import LoggedGrpcCodec
from gateway.ingress.oip_grpc import GrpcCodec, metadata
from gateway.ingress.oip_http import new_request_id
from gateway.ingress.request_notes import Unresolved
from gateway.pipeline import Pipeline
from gateway.protocol.grpc_wire import CallHead
from gateway.protocol.oip_grpc_cut import Cut, Opening, Openings
from gateway.protocol.options import DEFAULT_OPTIONS, ProtocolOptions
from gateway.provenance import headers


class Inference:
    """What all inference calls share."""

    def __init__(
        self,
        catalog: Catalog,
        pipeline: Pipeline,
        options: ProtocolOptions = DEFAULT_OPTIONS,
        log: InferenceLog | None = None,
    ) -> None:
        """`log`: None: requests are not logged."""
        self.unresolved = Unresolved(log, catalog) if log is not None else None
        self.openings = Openings()
        self.pipeline = pipeline
        self.catalog = catalog
        self._options = options
        self.invents_ids = options.invent_ids

    def version(self, opening: Opening) -> ServedVersion:
        """Whom a request is for.

        Raises:
            InvalidRequest: its version is no number.
            NotFound: no such model or version.
            NotReady: it exists but cannot answer now.
        """
        named = opening.version
        return self.catalog.resolve(opening.model, version_of(named) if named else None)

    def chosen(self, version: ServedVersion, cut: Cut, call: GrpcCall, head: CallHead) -> ServedVersion:
        """Who answers a request that names no version, where the model has a split (traffic.py).

        Raises:
            InvalidRequest: it had to be read for that, and cannot be.
        """
        if version.split is None or cut.opening.version:
            return version

        def read(version: ServedVersion) -> InferRequest:
            return self.codec(version).read(cut, call, 0.0)

        chosen: ServedVersion = version.split.choose(version, head.metadata, read)
        return chosen

    def codec(self, version: ServedVersion) -> GrpcCodec:
        codec: GrpcCodec | None = version.grpc_codec
        if codec is None:
            made = GrpcCodec if version.log is None else LoggedGrpcCodec
            codec = version.grpc_codec = made(version, self._options)
        return codec

    def note(self, call: GrpcCall, error: GatewayError, request_id: bytes, asked: tuple[str, str] = ("", "")) -> None:
        """A request was refused before a version was found for it; `asked`: model and version as the client wrote
        them."""
        if self.unresolved is not None:
            method = call.head.route
            self.unresolved.refused("grpc", method.endpoint, method.caller, request_id, call.received, error, asked)

    def note_unread(self, endpoint: str, caller: Caller, request_id: bytes, error: GatewayError) -> None:
        """A request was refused before its message was there, and with it its model's name."""
        if self.unresolved is not None:
            self.unresolved.refused("grpc", endpoint, caller, request_id, 0.0, error, ("", ""))

    def refuse(self, call: GrpcCall, error: GatewayError, opening: Opening | None = None) -> None:
        """End a call that concerns no model version that is known."""
        request_id = new_request_id()
        call.fail(error.grpc_code, str(error), metadata(headers.request_id_header(request_id)))
        self.note(call, error, request_id, (opening.model, opening.version) if opening is not None else ("", ""))

    def unready(self, opening: Opening, error: NotReady) -> GrpcCodec | None:
        """A version that once served and has failed is known: its refusals are counted, and say which it is."""
        version = self.catalog.find(opening.model, version_of(opening.version))
        if version.scheduler is None:
            return None
        version.statistics.reject(error.reason)
        return self.codec(version)

    def read(self, codec: GrpcCodec, cut: Cut, call: GrpcCall, timeout_s: float) -> InferRequest:
        """See `GrpcCodec.read`."""
        request = codec.read(cut, call, timeout_s)
        if self.invents_ids and request.request_id is None:
            request.request_id = str(uuid.uuid4())
        return request


class ModelInfer:
    """The unary RPC, as calls with one head have it. `timeout_s`: from the head's metadata, 0.0 if it names none."""

    streaming = False

    endpoint = "infer"
    """What the inference log calls this way of asking."""

    def __init__(self, inference: Inference, timeout_s: float, caller: Caller = NOBODY) -> None:
        """`caller`: what the head says of who asks, where requests are logged."""
        self.caller = caller
        self._inference = inference
        self._timeout_s = timeout_s

    def handle(self, head: CallHead, message: bytes | memoryview, call: GrpcCall) -> None:
        inference = self._inference
        try:
            cut = inference.openings.cut(message)
        except GatewayError as error:
            inference.refuse(call, error)
            return
        try:
            named = cut.opening.version
            version = inference.catalog.resolve(cut.opening.model, version_of(named) if named else None)
        except NotReady as error:
            known = inference.unready(cut.opening, error)
            if known is None:
                inference.refuse(call, error, cut.opening)
            else:
                known.refuse(call, error)
            return
        except GatewayError as error:
            inference.refuse(call, error, cut.opening)
            return
        codec: GrpcCodec = version.grpc_codec or inference.codec(version)
        request = None
        try:
            if version.split is not None:
                version = inference.chosen(version, cut, call, head)
                codec = inference.codec(version)
            request = codec.read(cut, call, self._timeout_s)
            if inference.invents_ids and request.request_id is None:
                request.request_id = str(uuid.uuid4())
            request.context = call
            request.settle = codec.settle
            call.on_abort = request.abort
            inference.pipeline.infer(version, request)
        except Exception as error:
            call.on_abort = None
            codec.refuse(call, error, request=request)

    def open(self, head: CallHead, call: GrpcCall) -> StreamHandler:
        raise AssertionError("a unary RPC is not opened")
