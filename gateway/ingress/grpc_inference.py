"""From a ModelInferRequest's bytes to the pipeline: which model version it is for, and the unary call.

A message names its model itself, so it is cut before anybody knows whom it concerns. The version is looked up for every
request: what is remembered of an opening never outlives the version it was checked against.
"""

from __future__ import annotations

import uuid

from gateway.catalog import Catalog, ServedVersion
from gateway.core.request import InferRequest
from gateway.errors import GatewayError, NotReady
from gateway.ingress.grpc_call import GrpcCall, StreamHandler
from gateway.ingress.grpc_management import version_of
from gateway.ingress.oip_grpc import GrpcCodec, known_error, metadata
from gateway.ingress.oip_http import request_id_header
from gateway.pipeline import Pipeline
from gateway.protocol.grpc_wire import CallHead
from gateway.protocol.oip_grpc_cut import Cut, Opening, Openings
from gateway.protocol.options import DEFAULT_OPTIONS, ProtocolOptions


class Inference:
    """What all inference calls share."""

    def __init__(self, catalog: Catalog, pipeline: Pipeline, options: ProtocolOptions = DEFAULT_OPTIONS) -> None:
        self.openings = Openings()
        self.pipeline = pipeline
        self._catalog = catalog
        self._options = options
        self._invent_ids = options.invent_ids

    def version(self, opening: Opening) -> ServedVersion:
        """Whom a request is for.

        Raises:
            InvalidRequest: its version is no number.
            NotFound: no such model or version.
            NotReady: it exists but cannot answer now.
        """
        named = opening.version
        return self._catalog.resolve(opening.model, version_of(named) if named else None)

    def codec(self, version: ServedVersion) -> GrpcCodec:
        codec: GrpcCodec | None = version.grpc_codec
        if codec is None:
            codec = version.grpc_codec = GrpcCodec(version, self._options)
        return codec

    def unready(self, opening: Opening, error: NotReady) -> GrpcCodec | None:
        """A version that once served and has failed is known: its refusals are counted, and say which it is."""
        version = self._catalog.find(opening.model, version_of(opening.version))
        if version.scheduler is None:
            return None
        version.statistics.reject(error.reason)
        return self.codec(version)

    def read(self, codec: GrpcCodec, cut: Cut, call: GrpcCall, timeout_s: float) -> InferRequest:
        """See `GrpcCodec.read`."""
        request = codec.read(cut, call, timeout_s)
        if self._invent_ids and request.request_id is None:
            request.request_id = str(uuid.uuid4())
        return request


class ModelInfer:
    """The unary RPC, as calls with one head have it. `timeout_s`: from the head's metadata, 0.0 if it names none."""

    streaming = False

    def __init__(self, inference: Inference, timeout_s: float) -> None:
        self._inference = inference
        self._timeout_s = timeout_s

    def handle(self, head: CallHead, message: bytes | memoryview, call: GrpcCall) -> None:
        inference = self._inference
        try:
            cut = inference.openings.cut(message)
        except GatewayError as error:
            _refuse(call, error)
            return
        try:
            version = inference.version(cut.opening)
        except NotReady as error:
            codec = inference.unready(cut.opening, error)
            if codec is None:
                _refuse(call, error)
            else:
                codec.refuse(call, error)
            return
        except GatewayError as error:
            _refuse(call, error)
            return
        codec = inference.codec(version)
        try:
            request = inference.read(codec, cut, call, self._timeout_s)
            request.context = call
            request.settle = codec.settle
            call.on_abort = request.abort
            inference.pipeline.infer(version, request)
        except Exception as error:
            call.on_abort = None
            codec.refuse(call, error)

    def open(self, head: CallHead, call: GrpcCall) -> StreamHandler:
        raise AssertionError("a unary RPC is not opened")


def _refuse(call: GrpcCall, error: Exception) -> None:
    """Of a call that concerns no model that is known."""
    known = known_error(error, "")
    call.fail(known.grpc_code, str(known), metadata(request_id_header()))
