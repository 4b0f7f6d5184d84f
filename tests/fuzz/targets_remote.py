"""Targets: what a remote server sends, from the bytes of its connection to what is said of its models.

A server is as little to be trusted as a client. Whatever it sends ends in one outcome, a success whose tensors are what
the signature says or a failure in a few printable words; nothing is raised but `RemoteError`, where a question was
asked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import hpack
import orjson

from gateway.backends import remote_queries
from gateway.backends.remote import RemoteError
from gateway.backends.remote_codec import Garbled
from gateway.backends.remote_connections import Exchange
from gateway.backends.remote_endpoint import said
from gateway.backends.remote_grpc_codec import GrpcCodec, parted
from gateway.backends.remote_http1 import Http1Connection, HttpAnswer
from gateway.backends.remote_http2 import GrpcAnswer, GrpcRequest, Http2Connection
from gateway.backends.remote_http_codec import HttpCodec
from gateway.backends.remote_outcome import milliseconds, of_status, retry_after_s
from gateway.backends.remote_wire import grpc_refusal, http_words
from gateway.core.batchability import SignatureTensor
from gateway.core.outcome import Failure, FailureKind, Success
from gateway.core.tensor import DATATYPE, element_count, unpack_bytes
from gateway.protocol import oip_data
from gateway.protocol.oip_json import parse_large
from gateway.protocol.schema import DecodeError, message
from tests.backends.oip_server import METADATA, binary_answer, frame, grpc_frames, http, http_json, infer_response
from tests.backends.wire_feed import open_connection
from tests.fuzz.target import Target, cut_up, require

MAX_WORDS = 1000
MAX_BYTES = 400
SECRETS = ("Bearer s3cret",)


def words(text: str) -> None:
    """They get into messages and logs."""
    require(text.isprintable() and len(text) < MAX_WORDS, "words that cannot be shown", text)
    require(SECRETS[0] not in text, "a credential is shown", text)


def failed(failure: Failure) -> Failure:
    words(failure.message)
    require(0.0 <= failure.retry_after_s <= 300.0, "an impossible pause", failure)
    return failure


# -- connections -----------------------------------------------------------------------------------------------------


def _exchanges(kind: Any, asks: Sequence[Any], pieces: Sequence[bytes]) -> list[list[Any]]:
    """What each question was answered with; the next is asked as soon as the last is answered and the connection is
    free."""
    with open_connection(kind, MAX_BYTES) as (connection, channel):
        settled: list[list[Any]] = []

        def ask() -> None:
            mine: list[Any] = []
            settled.append(mine)

            def done(result: Any) -> None:
                mine.append(result)
                if channel.released and not connection.dropped and len(settled) < len(asks):
                    channel.released.clear()
                    ask()

            connection.send(Exchange(asks[len(settled) - 1], done, MAX_BYTES))

        ask()
        for piece in pieces:
            if connection.dropped:
                break
            connection.data_received(piece)
        require(not (channel.released and connection.dropped), "a closed connection was given back")
        require(
            len(connection.transport.sent) < 200_000, "it says more than it was told", len(connection.transport.sent)
        )
        if not connection.dropped:
            connection.connection_lost(None)
        for one in settled:
            require(len(one) == 1, "not one outcome", settled)
        return settled


def run_http1(given: bytes) -> None:
    """The first answer does not depend on the cuts; the next question's answer is never older than the question."""
    if not given:
        return
    first: list[object] = []
    for pieces in ([given[1:]], cut_up(given[1:], 1 + given[0] % 16)):
        (answer,), *later = _exchanges(Http1Connection, [b"ASK\r\n"] * 3, pieces)
        require(len(pieces) > 1 or len(given) <= 2 or not _answered(later), "an answer before its question", given)
        first.append(_http1_seen(answer))
    require(first[0] == first[1], "cut, it means something else", *first, given)


def _answered(exchanges: Sequence[list[Any]]) -> bool:
    return any(not isinstance(each[0], Failure) for each in exchanges)


def _http1_seen(answer: Any) -> object:
    if isinstance(answer, Failure):
        return failed(answer).kind
    require(100 < answer.status <= 999 and len(answer.body) <= MAX_BYTES, "an impossible answer", answer)
    failed(of_status(answer.status, http_words(answer, SECRETS), "peer", retry_after_s(answer.header(b"retry-after"))))
    return answer.status, answer.headers, bytes(answer.body)


_ASK = GrpcRequest(b"\x83", b"\0\0\0\0\3abc")


def run_http2(given: bytes) -> None:
    """As for HTTP/1; answers of gRPC are read to their end."""
    if not given:
        return
    first: list[object] = []
    for pieces in ([given[1:]], cut_up(given[1:], 1 + given[0] % 32)):
        (answer,), *later = _exchanges(Http2Connection, [_ASK] * 3, pieces)
        require(len(pieces) > 1 or len(given) <= 2 or not _answered(later), "an answer before its question", given)
        first.append(_http2_seen(answer))
    require(first[0] == first[1], "cut, it means something else", *first, given)


def _http2_seen(answer: Any) -> object:
    if isinstance(answer, Failure):
        return failed(answer).kind
    require(isinstance(answer, GrpcAnswer) and len(answer.message) <= MAX_BYTES, "an impossible answer", answer)
    if (answer.status, answer.code) != (200, 0):
        failed(grpc_refusal(answer, "peer", SECRETS))
    return answer.status, answer.code, answer.text, bytes(answer.message)


_HEAD = b"HTTP/1.1 200 OK\r\n"
_HTTP1_SEEDS = (
    http(b"0123456789", headers=[("Keep-Alive", "timeout=5"), ("Connection", "keep-alive")]),
    http_json({"error": "Bearer s3cret"}, 503, [("Retry-After", "2")]) * 2,
    _HEAD + b"Transfer-Encoding: chunked\r\n\r\n4;x=y\r\n0123\r\n6\r\n456789\r\n0\r\nX-Trailer: t\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + http(b"x"),
    b"HTTP/1.0 500 Oh\r\nContent-Length: 2\r\n\r\nno",
    b"HTTP/1.1 204 None\r\n\r\n",
    b"HTTP/1.1 101 Switch\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: http://a/\r\nContent-Length: 0\r\n\r\n",
    http(b"\x1f\x8b", headers=[("Content-Encoding", "gzip")]),
    _HEAD + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    _HEAD + b"\r\nuntil the end",
    binary_answer([("y", "FP32", [1, 2], bytes(8))]),
)
_HTTP1_WORDS = (
    b"\r\n", b"\n", b"\r", b": ", b"\0", b"Content-Length: ", b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 C\r\n\r\n", b"HTTP/1.0 ", b"Connection: close\r\n", b"\r\n\r\n", b"5\r\n",
    b"Connection: keep-alive\r\n", b"Upgrade: x\r\n", b"Content-Encoding: gzip\r\n", b";", b"ffffffffffffffff\r\n",
    b"Retry-After: 9\r\n", b"Keep-Alive: timeout=", b"204", b"304", b"Transfer-Encoding: gzip, chunked\r\n",
)  # fmt: skip

_encoder = hpack.Encoder()
_encoder.header_table_size = 0
_H2_HEAD = _encoder.encode([(":status", "200"), ("content-type", "application/grpc")])
_H2_TAIL = _encoder.encode([("grpc-status", "0")])
_TABLED = hpack.Encoder().encode([(":status", "200"), ("x-kept", "a value"), ("x-more", "b")])
_HTTP2_SEEDS = (
    frame(4, 0, 0) + grpc_frames(1, b"answer") + grpc_frames(3, b"second") + grpc_frames(5, b"third"),
    frame(4, 0, 0, b"\0\4\0\0\0\1\0\1\0\0\0\0") + frame(6, 0, 0, b"12345678") + grpc_frames(1, None, 14, "no%20no"),
    frame(1, 0x20, 1, bytes(5) + _H2_HEAD[:3]) + frame(9, 4, 1, _H2_HEAD[3:]) + frame(0, 8, 1, b"\2\0\0\0\0\1a..")
    + frame(1, 5, 1, _H2_TAIL),
    frame(7, 0, 0, bytes(8)), frame(7, 0, 0, b"\0\0\0\1" + bytes(4)) + grpc_frames(1, b"last"),
    frame(3, 0, 1, b"\0\0\0\7"), frame(3, 0, 1, b"\0\0\0\x0b"), frame(8, 0, 0, b"\x7f\xff\xff\xff") + frame(8, 0, 1, b"\0\0\0\1"),
    frame(1, 4, 1, _TABLED) + frame(0, 0, 1, b"\0\0\0\0\0") + frame(1, 5, 1, b"\xbe\xbf"),
    frame(1, 4, 1, _encoder.encode([(":status", "103")])) + grpc_frames(1, b"", 0, "", [("grpc-retry-pushback-ms", "5")]),
    frame(1, 5, 1, _encoder.encode([(":status", "503"), ("retry-after", "3")])),
    b"HTTP/1.1 400 Bad Request\r\n\r\n",
)  # fmt: skip
_HTTP2_WORDS = (
    *(bytes([0, 0, length, kind]) for length in (0, 1, 4, 5, 6, 8) for kind in range(10)), _H2_HEAD, _H2_TAIL,
    b"\0\0\0\1", b"\0\0\0\3", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80\0\0\1", b"\0\4", b"\0\5", b"\0\1", b"\x88",
    b"\x3f\xe1\x1f", b"\x20", frame(4, 0, 0), frame(6, 0, 0, bytes(8)), b"\xbe",
)  # fmt: skip

# -- codecs ----------------------------------------------------------------------------------------------------------

_TYPES = ("FP32", "INT8", "UINT64", "BOOL", "BYTES", "FP16", "BF16", "FP64")
_OUTPUTS = [
    [SignatureTensor("y", DATATYPE[name], (None, 2)), SignatureTensor("z", DATATYPE[name], (None,))] for name in _TYPES
]
_HTTP = [HttpCodec("peer", b"", outputs, outputs, binary=True) for outputs in _OUTPUTS]
_GRPC = [GrpcCodec("peer", "m", "", outputs, outputs) for outputs in _OUTPUTS]


def tensors(outcome: Success | Failure, wanted: Sequence[SignatureTensor]) -> object:
    """Check the books of an outcome; what it holds."""
    if isinstance(outcome, Failure):
        require(failed(outcome).kind is FailureKind.BROKEN, "an answer that is none is not broken", outcome)
        return None
    require([each.name for each in outcome.outputs] == [each.name for each in wanted], "other outputs", outcome)
    for place, tensor in zip(wanted, outcome.outputs, strict=True):
        fits = len(tensor.shape) == len(place.shape) and all(
            want in (None, got) for want, got in zip(place.shape, tensor.shape, strict=True)
        )
        require(fits and tensor.datatype is place.datatype, "not what was asked for", tensor)
        count, data = element_count(tensor.shape), bytes(tensor.data)
        if place.datatype.kind == "bytes":
            require(len(unpack_bytes(data)) == count, "another number of strings", tensor)
        else:
            require(len(data) == count * place.datatype.itemsize, "another size", tensor)
        if place.datatype.kind == "bool":
            require(set(data) <= {0, 1}, "a BOOL that is neither 0 nor 1", data)
    require(0 <= outcome.compute_infer_ns < 2**63, "an impossible time", outcome.compute_infer_ns)
    return [(each.name, each.shape, bytes(each.data)) for each in outcome.outputs]


def run_http_codec(given: bytes) -> None:
    """First byte: the datatype, and whether one output was asked for; second: how much is JSON, 255: all of it. Large
    JSON, read on its own road, means what small JSON means."""
    if len(given) < 2:
        return
    codec, signature = _HTTP[given[0] % 8], _OUTPUTS[given[0] % 8]
    outputs = (0,) if given[0] & 8 else (0, 1)
    body = given[2:]
    headers = {b"server-timing": b"infer;dur=" + body[:8]}
    if given[1] != 255:
        headers[b"inference-header-content-length"] = b"%d" % min(given[1] * 4, len(body) - given[1] % 4)
    wanted = [signature[place] for place in outputs]
    small = tensors(codec.success(HttpAnswer(200, headers, body), outputs), wanted)
    if given[1] == 255 and small is not None and b"-0" not in body and not oip_data.may_nest_deeply(body):
        try:
            document = parse_large(body, "outputs")
        except (ValueError, RuntimeError):
            return
        items = document["outputs"]
        large = codec._tensors(items, {each.name: each for each in wanted}, memoryview(b""), None)
        require([(n, t.shape, bytes(t.data)) for n, t in sorted(large.items())] == small, "two roads", body)


def run_grpc_codec(given: bytes) -> None:
    """First byte as above. A message in parts is the message."""
    if not given:
        return
    codec, signature = _GRPC[given[0] % 8], _OUTPUTS[given[0] % 8]
    outputs = (0,) if given[0] & 8 else (0, 1)
    tensors(codec.success(memoryview(given[1:]), outputs), [signature[place] for place in outputs])
    response = message("inference.ModelInferResponse")
    try:
        described, raw = parted(memoryview(given[1:]))
        rest = response.FromString(described)
    except (Garbled, DecodeError):
        return
    whole = response.FromString(given[1:])
    require([bytes(each) for each in raw] == [*whole.raw_output_contents], "other raw tensors", given)
    del whole.raw_output_contents[:]
    require(rest == whole or rest.SerializeToString() == whole.SerializeToString(), "another rest", given)


def _item(name: str, datatype: str, shape: list[int], **more: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape} | more


def _json_seeds() -> list[bytes]:
    seeds = []
    for place, (name, element) in enumerate(zip(_TYPES, (1.5, -3, 2**63, True, "hé", 0.5, 1.0, 1e300), strict=True)):
        both = [_item("y", name, [1, 2], data=[[element] * 2]), _item("z", name, [1], data=[element])]
        seeds.append(bytes([place, 255]) + json.dumps({"id": "1", "model_name": "m", "outputs": both}).encode())
        size = 8 * (DATATYPE[name].itemsize or 5) // 4
        data = b"\1\0\0\0a" * 2 if name == "BYTES" else bytes(size)
        head = json.dumps({"outputs": [_item("y", name, [1, 2], parameters={"binary_data_size": len(data)})]}).encode()
        head += b" " * (-len(head) % 4)
        seeds.append(bytes([place | 8, len(head) // 4]) + head + data)
    return [*seeds, b"\0\xff" + b'{"outputs":[{"name":"y","datatype":"FP32","shape":[1,2],"data":[NaN,-Infinity]}]}']


def _grpc_seeds() -> list[bytes]:
    seeds = []
    for place, name in enumerate(_TYPES):
        data = b"\1\0\0\0a" * 2 if name == "BYTES" else bytes(2 * DATATYPE[name].itemsize)
        seeds.append(bytes([place | 8]) + infer_response([("y", name, [1, 2], data)]))
    typed = message("inference.ModelInferResponse")(model_name="m", id="1")
    typed.outputs.add(name="y", datatype="FP32", shape=[1, 2]).contents.fp32_contents.extend([1, 2])
    typed.outputs.add(name="z", datatype="FP32", shape=[1]).contents.fp32_contents.extend([3])
    typed.parameters["a"].int64_param = 5
    texts = message("inference.ModelInferResponse")()
    texts.outputs.add(name="y", datatype="BYTES", shape=[1, 2]).contents.bytes_contents.extend([b"a", b""])
    return [*seeds, b"\0" + typed.SerializeToString(), bytes([12]) + texts.SerializeToString()]


_JSON_WORDS = (
    b'"outputs":', b'"name":', b'"datatype":', b'"shape":', b'"data":', b'"parameters":{"binary_data_size":', b"[", b"]",
    b"{", b"}", b",", b"NaN", b"-Infinity", b"1e999", b"18446744073709551616", b"-1", b"-0", b'"y"', b'"z"', b"null",
    b"true", b'"\\ud800"', b"[[[[[[[[", b"9223372036854775807", b'"id":"1",', b"0.5", b'"', b"\xff",
)  # fmt: skip
_GRPC_WORDS = (
    b"\x2a", b"\x32", b"\x0a\1y", b"\x12\4FP32", b"\x1a\2\1\2", b"\x2a\0", b"\x32\0", b"\xff\xff\xff\xff\x0f", b"\x0b", b"\x0c",
    b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\1", b"\x35", b"\x31", b"\x30", b"\x22\x05\x0a\1a\x12\0", b"\xb2\x00", b"\xaa\0",
)  # fmt: skip

# -- what is said of models ------------------------------------------------------------------------------------------


def run_queries(given: bytes) -> None:
    """First byte: which question. What is understood is bounded and can be shown."""
    if not given:
        return
    try:
        _QUESTIONS[given[0] % len(_QUESTIONS)](given[1:])
    except RemoteError as error:
        words(str(error))
    except (orjson.JSONDecodeError, DecodeError):
        return


def _asked_info(body: bytes) -> None:
    _check_info(remote_queries._info(remote_queries._object(orjson.loads(body))))


def _check_info(info: Any) -> None:
    words(info.name)
    words(info.version)
    require(isinstance(info.binary, bool) and len(info.extensions) <= remote_queries.MAX_LISTED, "too much", info)


def _asked_index(body: bytes) -> None:
    items = orjson.loads(body)
    for entry in remote_queries._index(items if isinstance(items, list) else []):
        _check_name(entry.name)
        words(entry.version)
        words(entry.reason)


def _check_name(name: str) -> None:
    require(0 < len(name) <= remote_queries.MAX_NAME and name.isprintable(), "a name that cannot be shown", name)


def _asked_model(body: bytes) -> None:
    first, split, second = body.partition(b"\0")
    metadata = remote_queries._object(orjson.loads(first))
    _check_model(metadata, remote_queries._object(orjson.loads(second)) if split else None)


def _check_model(metadata: Any, config: Any) -> None:
    found = remote_queries.described(metadata, config, "m", "")
    for text in (found.platform, *found.versions):
        words(text)
    for tensor in (*found.inputs, *found.outputs):
        _check_name(tensor.name)
        require(all(dim is None or 0 <= dim < 2**63 for dim in tensor.shape), "impossible dims", tensor)
    require(found.max_batch_size is None or 0 <= found.max_batch_size < 2**31, "impossible rows", found.max_batch_size)
    require(0 <= found.max_queue_delay_us < 2**31, "an impossible delay", found.max_queue_delay_us)
    for signature in _OUTPUTS:
        said_of_it = remote_queries.signature_fault(tuple(signature), tuple(signature), found)
        require(said_of_it.isprintable() and len(said_of_it) < 5000, "words that cannot be shown", said_of_it)


def _asked_metadata_message(body: bytes) -> None:
    found = message("inference.ModelMetadataResponse").FromString(body)
    document = {
        "name": found.name, "versions": [*found.versions], "platform": found.platform,
        "inputs": [remote_queries._tensor_document(tensor) for tensor in found.inputs],
        "outputs": [remote_queries._tensor_document(tensor) for tensor in found.outputs],
    }  # fmt: skip
    _check_model(document, None)


def _asked_config_message(body: bytes) -> None:
    found = message("inference.ModelConfigResponse").FromString(body)
    _check_model(METADATA, remote_queries._config_document(found.config))


def _asked_words(body: bytes) -> None:
    text = body.decode("latin-1")
    for one in text.split("|"):
        require(0.0 <= retry_after_s(one, text[-29:]) < 1e12, "an impossible pause", one)
        require(0.0 <= milliseconds(one) < 1e9, "an impossible pause", one)
    words(said(body, SECRETS))
    words(http_words(HttpAnswer(500, {}, body), SECRETS))


_QUESTIONS: tuple[Callable[[bytes], None], ...] = (
    _asked_info, _asked_index, _asked_model, _asked_metadata_message, _asked_config_message, _asked_words,
)  # fmt: skip
_CONFIG = {
    "max_batch_size": 8, "input": [{"name": "x", "optional": True}], "sequence_batching": {},
    "dynamic_batching": {"max_queue_delay_microseconds": "5"}, "model_transaction_policy": {"decoupled": False},
}  # fmt: skip
_QUERY_SEEDS = (
    b"\0"
    + json.dumps({"name": "triton", "version": "2", "extensions": ["binary_tensor_data", "classification"]}).encode(),
    b"\1" + json.dumps([{"name": "a", "version": "1", "state": "READY", "reason": ""}, {"name": "b"}]).encode(),
    b"\2" + json.dumps(METADATA).encode() + b"\0" + json.dumps(_CONFIG).encode(),
    b"\2" + json.dumps(METADATA | {"inputs": [{"name": "x", "datatype": "INT64", "shape": ["-1", 7]}]}).encode(),
    b"\3" + message("inference.ModelMetadataResponse")(**METADATA).SerializeToString(),
    b"\4" + message("inference.ModelConfigResponse")(config={"name": "m", "max_batch_size": 8}).SerializeToString(),
    b"\5Fri, 31 Dec 1999 23:59:59 GMT|1.5|Fri, 31 Dec 1999 23:59:29 GMT",
    b'\5{"error": "Bearer s3cret\\n"}',
)
_QUERY_WORDS = (
    b'"name":', b'"versions":["1"],', b'"platform":', b'"inputs":[', b'"outputs":[', b'"shape":[-1,', b'"datatype":"FP32"',
    b'"state":"READY"', b'"--1"', b'"\xc2\xb2"', b"[[[[", b"null", b"true", b"1e9", b"18446744073709551615", b'"optional":true',
    b'"\\n"', b"Mon, 01 Jan 2024 00:00:00 GMT", b"99999999999999999999", b'{"error":', b"Bearer s3cret", b"\0",
)  # fmt: skip

TARGETS = (
    Target("remote-http1", run_http1, tuple(bytes([n]) + s for s in _HTTP1_SEEDS for n in (0, 6)), _HTTP1_WORDS, 700),
    Target("remote-http2", run_http2, tuple(b"\6" + seed for seed in _HTTP2_SEEDS), _HTTP2_WORDS),
    Target("remote-http-codec", run_http_codec, tuple(_json_seeds()), _JSON_WORDS),
    Target("remote-grpc-codec", run_grpc_codec, tuple(_grpc_seeds()), _GRPC_WORDS, 700),
    Target("remote-queries", run_queries, _QUERY_SEEDS, _QUERY_WORDS),
)
