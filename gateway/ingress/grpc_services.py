"""The OIP gRPC surface: which RPC means what, and what each answers. The counterpart of `endpoints.py`.

Rules: a path is matched whole; matching, restrictions and metadata are looked at once per remembered header block, not
per call. `ModelInfer` and `ModelStreamInfer` go the same way as REST's infer: catalog, codec, pipeline. Everything else
is a document of `management.py` in the shape of a message. Health answers for the whole server, whatever service is
named. What waits (loading, unloading, reading directories) runs as a task and goes on when its client leaves. An
unknown method is UNIMPLEMENTED.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from inspect import isawaitable
from typing import Any, Final

from gateway.catalog import Catalog
from gateway.core.api import Api
from gateway.errors import GatewayError, Restricted, Unsupported
from gateway.inference_log.handover import NOBODY, Caller, InferenceLog
from gateway.ingress.grpc_call import GrpcCall, Method, StreamHandler
from gateway.ingress.grpc_inference import Inference, ModelInfer
from gateway.ingress.grpc_management import RPCS, Rpc
from gateway.ingress.grpc_reflection import ReflectionStream
from gateway.ingress.grpc_stream import Drainable, InferStream
from gateway.ingress.grpc_watch import HealthWatch
from gateway.ingress.oip_grpc import known_error, metadata
from gateway.ingress.oip_http import new_request_id, request_id_header, timeout_of
from gateway.ingress.request_notes import caller_of, refusal
from gateway.management import Management
from gateway.management_access import GRPC_PREFIX
from gateway.pipeline import Pipeline
from gateway.protocol import oip_grpc_documents, reflection
from gateway.protocol.grpc_wire import CallHead
from gateway.protocol.options import DEFAULT_OPTIONS, ProtocolOptions
from gateway.provenance import headers

MODEL_INFER: Final = "/inference.GRPCInferenceService/ModelInfer"
MODEL_STREAM_INFER: Final = "/inference.GRPCInferenceService/ModelStreamInfer"
HEALTH_WATCH: Final = "/grpc.health.v1.Health/Watch"

_INFERENCE: Final = {MODEL_INFER.encode(): "infer", MODEL_STREAM_INFER.encode(): "stream"}
"""What the inference log calls these ways of asking."""

Open = Callable[[GrpcCall], StreamHandler]
Note = Callable[[GrpcCall, GatewayError, bytes], None]


class GrpcServices:
    """Answers every call on the gRPC port; fits `grpc_call.GrpcApplication`."""

    def __init__(
        self,
        catalog: Catalog,
        pipeline: Pipeline,
        management: Management,
        options: ProtocolOptions = DEFAULT_OPTIONS,
        *,
        reflected: bool = False,
        log: InferenceLog | None = None,
    ) -> None:
        """`reflected`: whether clients may ask which services there are; `log`: None: requests are not logged."""
        self._inference = Inference(catalog, pipeline, options, log)
        self._logged = log is not None
        self._management = management
        self._streams: set[Drainable] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._methods: dict[str, tuple[Api, Callable[[CallHead], Method]]] = {
            MODEL_INFER: ("inference", self._model_infer),
            MODEL_STREAM_INFER: ("inference", self._model_stream_infer),
            HEALTH_WATCH: ("health", self._health_watch),
        }
        for path, rpc in RPCS.items():
            self._methods[path] = (rpc.api, partial(self._unary, rpc))
        if reflected:
            for service, package in reflection.SERVICES.items():
                path = f"/{service}/ServerReflectionInfo"
                self._methods[path] = ("metadata", partial(self._reflection, package))

    def resolve(self, head: CallHead) -> Method:
        """What a call with this head is. Never raises; what cannot be is a method that refuses."""
        found = self._methods.get(head.path.decode("ascii", "replace"))
        if found is None:
            return Refusing(Unsupported("unknown method; see GRPCInferenceService and grpc.health.v1.Health"))
        api, make = found
        try:
            self._management.restrictions.check(api, partial(_metadata, head))
            return make(head)
        except Restricted:
            name, _ = self._management.restrictions.required(api) or ("", "")
            return self._refusing(
                api, head, Restricted(f"This protocol is restricted, expecting header '{_restricting(name)}'")
            )
        except GatewayError as error:
            return self._refusing(api, head, error)

    def _refusing(self, api: Api, head: CallHead, error: GatewayError) -> Method:
        return Refusing(error, self._inference.note if api == "inference" else None, self._caller(head))

    def _caller(self, head: CallHead) -> Caller:
        return caller_of(head.metadata) if self._logged else NOBODY

    def refused(self, call: GrpcCall, code: int, text: str) -> bytes:
        """Fits `grpc_application.Refused`: a call, or a message of a stream, was refused before it was handed over."""
        request_id = new_request_id()
        found = _INFERENCE.get(call.head.path)
        if found is not None:
            self._inference.note_unread(found, self._caller(call.head), request_id, refusal(code, text))
        return metadata(headers.request_id_header(request_id))

    def drain(self) -> None:
        """The server stops: open streams take no more requests and end behind what they have taken."""
        for stream in list(self._streams):
            stream.drain()

    # -- methods ---------------------------------------------------------------------------------------------------

    def _model_infer(self, head: CallHead) -> Method:
        return ModelInfer(self._inference, _timeout_s(head), self._caller(head))

    def _model_stream_infer(self, head: CallHead) -> Method:
        timeout_s = _timeout_s(head)
        errors_end = _raw_metadata(head, b"triton_grpc_error") == b"true"
        return Streaming(
            lambda call: InferStream(self._inference, call, head, timeout_s, errors_end, self._streams),
            self._caller(head),
        )

    def _health_watch(self, head: CallHead) -> Method:
        return Streaming(lambda call: HealthWatch(call, self._management.server_ready, self._streams))

    def _reflection(self, package: str, head: CallHead) -> Method:
        return Streaming(lambda call: ReflectionStream(package, call, self._streams))

    def _unary(self, rpc: Rpc, head: CallHead) -> Method:
        return Unary(partial(self._answer, rpc))

    def _answer(self, rpc: Rpc, message: bytes | memoryview, call: GrpcCall) -> None:
        try:
            document = rpc.answer(self._management, oip_grpc_documents.read(rpc.request, message))
            if isawaitable(document):
                task = asyncio.ensure_future(self._answer_later(rpc, document, call))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            else:
                _reply(rpc, document, call)
        except Exception as error:
            _refuse(call, error, rpc)

    async def _answer_later(self, rpc: Rpc, document: Awaitable[dict[str, Any]], call: GrpcCall) -> None:
        try:
            _reply(rpc, await document, call)
        except Exception as error:
            _refuse(call, error, rpc)


class Unary:
    """An RPC with one message each way."""

    streaming = False

    def __init__(self, answer: Callable[[bytes | memoryview, GrpcCall], None]) -> None:
        self._answer = answer

    def handle(self, head: CallHead, message: bytes | memoryview, call: GrpcCall) -> None:
        self._answer(message, call)

    def open(self, head: CallHead, call: GrpcCall) -> StreamHandler:
        raise AssertionError("a unary RPC is not opened")


class Streaming:
    """An RPC with many messages either way."""

    streaming = True
    endpoint = "stream"
    """What the inference log calls this way of asking."""

    def __init__(self, begin: Open, caller: Caller = NOBODY) -> None:
        """`caller`: what the head says of who asks, where requests are logged."""
        self.caller = caller
        self._begin = begin

    def handle(self, head: CallHead, message: bytes | memoryview, call: GrpcCall) -> None:
        raise AssertionError("a streaming RPC is opened")

    def open(self, head: CallHead, call: GrpcCall) -> StreamHandler:
        return self._begin(call)


class Refusing:
    """What is not there, or not for this caller. It is the same for both kinds of RPC: the call ends."""

    streaming = True
    endpoint = "infer"

    def __init__(self, error: GatewayError, note: Note | None = None, caller: Caller = NOBODY) -> None:
        """`note`: where calls are logged that are refused so; None: nowhere."""
        self.caller = caller
        self._error = error
        self._note = note

    def handle(self, head: CallHead, message: bytes | memoryview, call: GrpcCall) -> None:
        self._refuse(call)

    def open(self, head: CallHead, call: GrpcCall) -> StreamHandler:
        self._refuse(call)
        return _Nobody()

    def _refuse(self, call: GrpcCall) -> None:
        request_id = new_request_id()
        known = self._error
        call.fail(known.grpc_code, str(known), metadata(headers.request_id_header(request_id)))
        if self._note is not None:
            self._note(call, known, request_id)


class _Nobody:
    """Handler of a call that is over."""

    def message(self, message: bytes | memoryview) -> None:
        pass

    def half_closed(self) -> None:
        pass

    def writable(self) -> None:
        pass

    def aborted(self) -> None:
        pass


def _reply(rpc: Rpc, document: dict[str, Any], call: GrpcCall) -> None:
    data = oip_grpc_documents.write(rpc.response, document)
    call.reply([data], len(data), metadata(request_id_header()))


def _refuse(call: GrpcCall, error: Exception, rpc: Rpc | None = None) -> None:
    known = known_error(error, rpc.request if rpc is not None else "")
    call.fail(known.grpc_code, str(known), metadata(request_id_header()))


def _raw_metadata(head: CallHead, name: bytes) -> bytes | None:
    return next((value for key, value in head.metadata if key == name), None)


def _metadata(head: CallHead, name: str) -> bytes | None:
    return _raw_metadata(head, _restricting(name).encode())


def _restricting(name: str) -> str:
    """What a restricted API's header travels as."""
    return GRPC_PREFIX + name.lower()


def _timeout_s(head: CallHead) -> float:
    value = _raw_metadata(head, b"x-request-timeout-ms")
    return 0.0 if value is None else timeout_of(value)
