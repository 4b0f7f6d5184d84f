"""Targets: what a remote server's answers mean, once they are whole: tensors,
and what it says of itself and its models.

The rules of `targets_remote` hold here as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from gateway.backends import remote_queries
from gateway.backends.remote import RemoteError
from gateway.backends.remote_codec import Garbled
from gateway.backends.remote_endpoint import said
from gateway.backends.remote_grpc_codec import GrpcCodec, parted
from gateway.backends.remote_http1 import HttpAnswer
from gateway.backends.remote_http_codec import HttpCodec
from gateway.backends.remote_outcome import milliseconds, retry_after_s
from gateway.backends.remote_wire import http_words
from gateway.core.batchability import SignatureTensor
from gateway.core.outcome import Failure, FailureKind, Success
from gateway.core.tensor import DATATYPE, element_count, unpack_bytes
from gateway.protocol import oip_data
from gateway.protocol.oip_json_text import parse_large
from gateway.protocol.schema import DecodeError, message
from tests.backends.oip_server import METADATA, infer_response
from tests.fuzz.target import Target, require
from tests.fuzz.targets_remote import SECRETS, failed, shown, words

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
    b'"outputs":', b'"name":', b'"datatype":', b'"shape":', b'"data":', b'"parameters":{"binary_data_size":', b"[",
    b"]",
    b"{", b"}", b",", b"NaN", b"-Infinity", b"1e999", b"18446744073709551616", b"-1", b"-0", b'"y"', b'"z"', b"null",
    b"true", b'"\\ud800"', b"[[[[[[[[", b"9223372036854775807", b'"id":"1",', b"0.5", b'"', b"\xff",
)  # fmt: skip
_GRPC_WORDS = (
    b"\x2a", b"\x32", b"\x0a\1y", b"\x12\4FP32", b"\x1a\2\1\2", b"\x2a\0", b"\x32\0", b"\xff\xff\xff\xff\x0f",
    b"\x0b", b"\x0c",
    b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\1", b"\x35", b"\x31", b"\x30", b"\x22\x05\x0a\1a\x12\0", b"\xb2\x00",
    b"\xaa\0",
)  # fmt: skip

# -- what is said of models ------------------------------------------------------------------------------------------


def run_queries(given: bytes) -> None:
    """First byte: which question. What is understood is bounded and can be shown."""
    if not given:
        return
    try:
        _QUESTIONS[given[0] % len(_QUESTIONS)](given[1:])
    except RemoteError as error:
        shown(str(error))
    except (orjson.JSONDecodeError, DecodeError):
        return


def _asked_info(body: bytes) -> None:
    _check_info(remote_queries._info(remote_queries._object(orjson.loads(body))))


def _check_info(info: Any) -> None:
    shown(info.name)
    shown(info.version)
    require(isinstance(info.binary, bool) and len(info.extensions) <= remote_queries.MAX_LISTED, "too much", info)


def _asked_index(body: bytes) -> None:
    items = orjson.loads(body)
    for entry in remote_queries._index(items if isinstance(items, list) else []):
        _check_name(entry.name)
        shown(entry.version)
        shown(entry.reason)


def _check_name(name: str) -> None:
    require(0 < len(name) <= remote_queries.MAX_NAME and name.isprintable(), "a name that cannot be shown", name)


def _asked_model(body: bytes) -> None:
    first, split, second = body.partition(b"\0")
    metadata = remote_queries._object(orjson.loads(first))
    _check_model(metadata, remote_queries._object(orjson.loads(second)) if split else None)


def _check_model(metadata: Any, config: Any) -> None:
    found = remote_queries.described(metadata, config, "m", "")
    for text in (found.platform, *found.versions):
        shown(text)
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
    b'"name":', b'"versions":["1"],', b'"platform":', b'"inputs":[', b'"outputs":[', b'"shape":[-1,',
    b'"datatype":"FP32"',
    b'"state":"READY"', b'"--1"', b'"\xc2\xb2"', b"[[[[", b"null", b"true", b"1e9", b"18446744073709551615",
    b'"optional":true',
    b'"\\n"', b"Mon, 01 Jan 2024 00:00:00 GMT", b"99999999999999999999", b'{"error":', b"Bearer s3cret", b"\0",
)  # fmt: skip

TARGETS = (
    Target("remote-http-codec", run_http_codec, tuple(_json_seeds()), _JSON_WORDS),
    Target("remote-grpc-codec", run_grpc_codec, tuple(_grpc_seeds()), _GRPC_WORDS, 700),
    Target("remote-queries", run_queries, _QUERY_SEEDS, _QUERY_WORDS),
)
