"""`POST …/generate` and `…/generate_stream`: the generate extension on the data port.

A request enters the same pipeline as any other and carries the same provenance. Every model here gives one answer to
a request, so a stream is one event, and whatever fails fails before it: then the status and the JSON body of the error
are sent instead. Compressed bodies are refused, as Triton does (wire notes §1.10).
"""

from __future__ import annotations

from functools import partial

from gateway.core.request import InferRequest
from gateway.errors import InvalidRequest
from gateway.ingress.body_coding import request_coding
from gateway.ingress.http_exchange import Exchange
from gateway.ingress.oip_http import JSON, HttpCodec
from gateway.protocol.generate import EVENT_STREAM, Generate, as_event
from gateway.protocol.http1 import Head


def decode(codec: HttpCodec, head: Head, body: bytes, exchange: Exchange, streaming: bool) -> InferRequest:
    """A request ready for the pipeline.

    Raises:
        InvalidRequest: malformed, compressed, or does not fit the model.
    """
    if request_coding(head) is not None:
        raise InvalidRequest("Unsupported content-encoding, only 'identity' is supported.")
    if head.inference_header_length is not None and head.inference_header_length != b"%d" % len(body):
        raise InvalidRequest("generate takes JSON only; leave out Inference-Header-Content-Length, or use infer")
    if codec.generate is None:
        codec.generate = Generate(codec.decoder)
    generate: Generate = codec.generate
    return codec.prepared(generate.decode(body), head, exchange, partial(_settle, codec, generate, streaming))


def _settle(codec: HttpCodec, generate: Generate, streaming: bool, request: InferRequest) -> None:
    if request.error is not None:
        codec.settle(request)
        return
    request.context.on_abort = None
    try:
        memo = codec.memo_of(request.batch)
        body = generate.encode(request, memo.encoded)
        if streaming:
            codec.write(request, memo, [as_event(body)], None, content_type=EVENT_STREAM)
        else:
            codec.write(request, memo, [body], None, content_type=JSON)
    except Exception as error:
        codec.failed(request, error)
