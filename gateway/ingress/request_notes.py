"""What the inference log is told by both protocols: who called, and requests that reached no model version.

Looked up once per remembered head, and only where there is a log.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from gateway.catalog import Catalog
from gateway.core.batch import FinishedBatch
from gateway.core.model import ModelSpec
from gateway.core.request import InferRequest, OutputTensor
from gateway.errors import DeadlineExceeded, GatewayError, InvalidRequest, Overloaded, TooLarge, Unsupported
from gateway.inference_log.handover import Caller, InferenceLog
from gateway.protocol import grpc_wire
from gateway.protocol.oip_outputs import answer_tensors
from gateway.protocol.oip_plan import ResponseForm

_VISIBLE: Final = re.compile(rb"[\x21-\x7e]{1,128}")
_TRACE_PARENT: Final = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
_NO_TRACE: Final = b"0" * 32


def caller_of(fields: Iterable[tuple[bytes, bytes]]) -> Caller:
    """What headers, or metadata, say: names in lower case. What is malformed, or too long, is as if it were not there
    (W3C Trace Context §3.2.2: a vendor must ignore it)."""
    request_id = trace_id = None
    for name, value in fields:
        if name == b"x-request-id" and _VISIBLE.fullmatch(value):
            request_id = value.decode("ascii")
        elif name == b"traceparent" and (found := _TRACE_PARENT.fullmatch(value)) and not value.startswith(b"ff"):
            trace_id = None if found[1] == _NO_TRACE else found[1].decode("ascii")
    return Caller(request_id, trace_id)


class Unreadable(InvalidRequest):
    """400 / INTERNAL: a message whose bytes cannot be what gRPC says they are."""

    grpc_code = grpc_wire.INTERNAL


_BY_CODE: Final[dict[int, type[GatewayError]]] = {
    kind.grpc_code: kind for kind in (InvalidRequest, DeadlineExceeded, TooLarge, Unsupported, Overloaded, Unreadable)
}


def refusal(code: int, text: str) -> GatewayError:
    """The error that a call was refused with before its message was read, by the status that its client got."""
    return _BY_CODE.get(code, GatewayError)(text)


class Unresolved:
    """Notes requests that were refused before a model version was found for them. Raises nothing."""

    def __init__(self, log: InferenceLog, catalog: Catalog) -> None:
        self._note = log.unresolved
        self._catalog = catalog

    def refused(
        self,
        protocol: str,
        endpoint: str,
        caller: Caller,
        request_id: bytes,
        received: float,
        error: GatewayError,
        asked: tuple[str, str],
    ) -> None:
        """`asked`: model and version as the client wrote them, as far as they could be read. `received`: monotonic
        seconds; 0.0: its message was not even waited for."""
        if not self._wanted(*asked):
            return
        now = time.monotonic()
        code = error.grpc_code if protocol == "grpc" else None
        total_s = now - received if received else 0.0
        try:
            self._note.refused(
                error, None, request_id, received or now, total_s, protocol, endpoint, code, caller, asked
            )
        except Exception:  # whatever it is, the caller gets the refusal
            self._note.failed()

    def _wanted(self, model: str, version: str) -> bool:
        """Whether the owner of what the client asked for wants its requests logged; of what is not there, always."""
        try:
            return self._catalog.find(model, version or None).wanted.logged.enabled
        except GatewayError:
            return True


def served(spec: ModelSpec, form: ResponseForm, request: InferRequest) -> list[OutputTensor] | None:
    """The tensors of an answer that holds classes; None: it holds the request's rows as they are.

    What went into shared memory is the same tensors, so that makes no difference here.
    """
    if form.plain or not any(form.classes):
        return None
    batch: FinishedBatch = request.batch
    return answer_tensors(spec, replace(form, areas=(), targets=()), batch, request.row, request.rows)
