"""Traps 31–43: binary tensors, compression, classification, routes."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from typing import Any

import numpy as np
import pytest
import tritonclient.http.aio as aio_client
from tritonclient.utils import InferenceServerException

from tests.differential.build import LENGTH, SIMPLE, ask, blob, infer, tensor
from tests.differential.exchange import Http, Reply
from tests.traps.client import Client, output, refused

DATA = blob("FP32", [1, 2.5, 0.1])
GIVEN = tensor(parameters={"binary_data_size": 12})
ALL: dict[str, Any] = {"parameters": {"binary_data_output": True}}
ONE: dict[str, Any] = {"outputs": [{"name": "OUTPUT0", "parameters": {"binary_data": True}}]}


def is_binary(reply: Reply, data: bytes) -> None:
    assert output(reply)["parameters"] == {"binary_data_size": len(data)}
    assert "data" not in output(reply)
    assert reply.headers["content-type"] == "application/octet-stream"
    assert int(reply.headers["inference-header-content-length"]) == len(reply.text.encode())
    assert reply.blobs == (data,)


def is_json(reply: Reply) -> None:
    assert reply.headers == {"content-type": "application/json"}
    assert np.array_equal(np.array(output(reply)["data"], np.float32), np.frombuffer(DATA, np.float32))


def test_trap_31_binary_in_json_out(plain: Client) -> None:
    is_json(plain.infer(ask(GIVEN), "m", DATA))


def test_trap_32_binary_output(plain: Client) -> None:
    is_binary(plain.infer(ask(GIVEN, **ONE), "m", DATA), DATA)
    is_binary(plain.infer(ask(SIMPLE, **ONE)), DATA)


def test_trap_33_binary_data_output_covers_no_listed_output(plain: Client) -> None:
    is_binary(plain.infer(ask(GIVEN, **ALL), "m", DATA), DATA)
    is_json(plain.infer(ask(GIVEN, **ALL, outputs=[{"name": "OUTPUT0"}]), "m", DATA))


def test_trap_34_sizes_of_blobs(plain: Client) -> None:
    refused(plain.infer(ask(GIVEN), "m", DATA, b"x"), 400, "unexpected additional input data")
    refused(plain.infer(ask(GIVEN), "m", DATA[:-1]), 400, "expecting 1 additional bytes")
    eight = tensor(parameters={"binary_data_size": 8})
    refused(plain.infer(ask(eight), "m", DATA[:8]), 400, "input byte size mismatch", "Expected 12, got 8")


def test_trap_35_header_length(plain: Client) -> None:
    text = json.dumps(ask(GIVEN)).encode()
    body = text + DATA
    for wrong in ("9999", "-1"):
        reply = plain.infer(body, headers={LENGTH: wrong})
        refused(reply, 400, f"inference header size should be in range (0, {len(body)})")
    refused(plain.infer(body, headers={LENGTH: "abc"}), 400)
    whole = json.dumps(ask(SIMPLE)).encode()
    is_json(plain.infer(whole, headers={LENGTH: str(len(whole))}))


def test_trap_36_raw_request(plain: Client) -> None:
    reply = plain.infer(DATA, headers={LENGTH: "0"})
    assert output(reply)["shape"] == [1, 3]
    is_binary(reply, DATA)
    refused(plain.infer(DATA + b"x", headers={LENGTH: "0"}), 400)
    refused(plain.infer(DATA, "add_sub", headers={LENGTH: "0"}), 400)


def test_trap_37_binary_outputs_without_bytes(plain: Client) -> None:
    reply = plain.infer(ask(tensor(shape=(1, 0), data=[]), **ALL))
    assert reply.headers == {"content-type": "application/json"}
    assert output(reply)["parameters"] == {"binary_data_size": 0}


def test_trap_38_binary_strings(plain: Client) -> None:
    elements = blob("BYTES", [b"a\0b", b"", "é".encode()])

    def strings(data: bytes, count: int = 3) -> Reply:
        given = tensor(shape=(1, count), datatype="BYTES", parameters={"binary_data_size": len(data)})
        return plain.infer(ask(given, **ALL), "id_bytes", data)

    is_binary(strings(elements), elements)
    for data, count in ((elements, 2), (elements, 4), (elements[:-1], 3), (b"\x09\0\0\0abc", 1), (b"\x01\0", 1)):
        refused(strings(data, count), 400, "INPUT0")


def test_trap_39_compressed_requests(plain: Client) -> None:
    body = json.dumps(ask(SIMPLE)).encode()
    is_json(plain.infer(gzip.compress(body), headers={"Content-Encoding": "gzip"}))
    is_json(plain.infer(zlib.compress(body), headers={"Content-Encoding": "deflate"}))
    is_json(plain.infer(body, headers={"Content-Encoding": "identity"}))
    raw = zlib.compressobj(wbits=-15)
    refused(plain.infer(raw.compress(body) + raw.flush(), headers={"Content-Encoding": "deflate"}), 400)
    packed = gzip.compress(body)
    for broken in (packed[:20] + b"????" + packed[24:], packed[:-9], body):
        refused(plain.infer(broken, headers={"Content-Encoding": "gzip"}), 400)
    for unknown in ("br", "GZIP"):
        reply = plain.infer(packed, headers={"Content-Encoding": unknown})
        refused(reply, 501, "Unsupported compression type")
        assert reply.headers["accept-encoding"] == "gzip, deflate"


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        ("gzip;q=0.5, deflate;q=0.8", "deflate"),
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate, br", "gzip"),
        ("br", None),
        ("*", None),
        ("identity", None),
        ("gzip;q=0", None),
    ],
)
def test_trap_40_compressed_answers(plain: Client, accepted: str, coding: str | None) -> None:
    big = tensor(shape=(1, 20_000), data=[0.5] * 20_000)
    reply = plain.infer(ask(big), headers={"Accept-Encoding": accepted})
    assert reply.headers.get("content-encoding") == coding
    assert output(reply)["data"] == big["data"]
    binary = plain.infer(ask(big, **ALL), headers={"Accept-Encoding": accepted})
    assert binary.headers.get("content-encoding") == coding
    is_binary(binary, np.full(20_000, 0.5, np.float32).tobytes())  # the length counts uncompressed bytes


async def test_trap_41_aio_client_reads_every_answer(plain: Client) -> None:
    async with aio_client.InferenceServerClient(f"127.0.0.1:{plain.process.port}") as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("m")
        assert not await client.is_model_ready("nobody")
        assert (await client.get_server_metadata())["version"]
        assert (await client.get_model_metadata("m"))["name"] == "m"
        assert (await client.get_model_config("m"))["max_batch_size"] == 8
        assert (await client.get_inference_statistics("m"))["model_stats"][0]["name"] == "m"
        assert (await client.get_inference_statistics())["model_stats"]
        assert any(entry["name"] == "m" for entry in await client.get_model_repository_index())
        assert (await client.get_trace_settings())["trace_level"] == ["OFF"]
        assert (await client.update_trace_settings("m", {"trace_rate": "5"}))["trace_rate"] == "5"
        assert (await client.update_trace_settings("m", {"trace_rate": None}))["trace_rate"] == "1000"
        assert (await client.get_log_settings())["log_verbose_level"] == 0
        assert (await client.update_log_settings({"log_info": True}))["log_info"] is True
        assert await client.get_system_shared_memory_status() == []
        assert await client.get_cuda_shared_memory_status() == []
        await client.load_model("sleeper")
        await client.unload_model("sleeper")
        for wrong in (
            client.get_model_metadata("nobody"),
            client.get_model_config("nobody"),
            client.load_model("nobody"),
        ):
            with pytest.raises(InferenceServerException, match="nobody"):
                await wrong
        big = np.full((8, 4000), 0.5, np.float32)
        given = aio_client.InferInput("INPUT0", list(big.shape), "FP32")
        given.set_data_from_numpy(big)
        for more in ({}, {"outputs": [aio_client.InferRequestedOutput("OUTPUT0", binary_data=False)]}):
            results = await asyncio.gather(*(client.infer("m", [given], **more) for _ in range(5)))
            assert all(np.array_equal(result.as_numpy("OUTPUT0"), big) for result in results)
        for algorithm in ("gzip", "deflate"):
            result = await client.infer("m", [given], request_compression_algorithm=algorithm)
            assert np.array_equal(result.as_numpy("OUTPUT0"), big)


def test_trap_42_classification(plain: Client, flagged: Client) -> None:
    def classes(client: Client, count: int, model: str = "labelled", item: Any = None, *blobs: bytes) -> Reply:
        given = item or tensor(shape=(2, 3), data=[0.1, 0.9, 0.5, 3, 2, 1])
        wanted = [{"name": "OUTPUT0", "parameters": {"classification": count}}]
        return client.infer(ask(given, outputs=wanted), model, *blobs)

    two = output(classes(plain, 2))
    assert (two["datatype"], two["shape"]) == ("BYTES", [2, 2])
    assert two["data"] == ["0.900000:1:b", "0.500000:2:c", "3.000000:0:a", "2.000000:1:b"]
    assert output(classes(plain, 9))["shape"] == [2, 3]
    assert output(classes(plain, 0))["datatype"] == "FP32"
    refused(classes(plain, -1), 400, "classification")
    refused(classes(flagged, -1), 500, "classification")
    refused(classes(plain, 2, "id_bytes", tensor(datatype="BYTES", data=["a", "b", "c"])), 400, "BYTES")
    refused(classes(plain, 2, "id_fp16", tensor(datatype="FP16", parameters={"binary_data_size": 6}), bytes(6)), 400)
    refused(classes(plain, 2, "id_bf16", tensor(datatype="BF16", parameters={"binary_data_size": 6}), bytes(6)), 400)
    assert output(classes(plain, 2, "labelled", tensor(shape=(1, 0), data=[])))["data"] == []  # ends a Triton 2.51


def test_trap_43_methods_and_paths(plain: Client) -> None:
    refused(plain.post("/v2/health/live"), 405, "Method Not Allowed")
    refused(plain.get("/v2/models/m/infer"), 405, "Method Not Allowed")
    head = plain.ask(Http("HEAD", "/v2"))
    assert (head.status, head.headers["content-type"]) == (405, "application/json")
    refused(plain.get("/v2/nope"), 404, "Not Found")
    assert plain.ask(infer(ask(SIMPLE))).status == 200
