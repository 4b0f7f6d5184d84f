"""Traps 44–54: statistics, repository, settings, shared memory, generate. Trap 46 is with the batcher's."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from multiprocessing import shared_memory
from typing import Any

import pytest

from tests.differential.build import SIMPLE, ask, infer, tensor
from tests.differential.exchange import Http
from tests.traps.client import Client, output, refused

DURATIONS = {
    "success",
    "fail",
    "queue",
    "compute_input",
    "compute_infer",
    "compute_output",
    "cache_hit",
    "cache_miss",
}
LOAD, UNLOAD = "/v2/repository/models/managed/load", "/v2/repository/models/managed/unload"


def test_trap_44_unknown_model(plain: Client) -> None:
    refused(plain.get("/v2/models/none"), 404, "Request for unknown model: 'none' is not found")
    refused(plain.get("/v2/models/none/stats"), 400, "requested model 'none' is not available")
    refused(plain.get("/v2/models/none/ready"), 404, "none")


def test_trap_45_statistics(plain: Client) -> None:
    zero = plain.statistics("counted")
    assert set(zero["inference_stats"]) == DURATIONS
    assert all(duration == {"count": 0, "ns": 0} for duration in zero["inference_stats"].values())
    assert (zero["inference_count"], zero["execution_count"], zero["batch_stats"]) == (0, 0, [])
    for _ in range(4):
        output(plain.infer(ask(tensor(shape=(2, 3), data=[1, 2, 3, 4, 5, 6])), "counted"))
    after = plain.statistics("counted")
    assert (after["inference_count"], after["execution_count"]) == (8, 4)
    counts = {name: duration["count"] for name, duration in after["inference_stats"].items()}
    assert counts == {name: 4 if name in DURATIONS - {"fail", "cache_hit", "cache_miss"} else 0 for name in DURATIONS}
    assert all(after["inference_stats"][name]["ns"] > 0 for name in ("success", "queue", "compute_infer"))
    (batch,) = after["batch_stats"]
    assert (batch["batch_size"], batch["compute_infer"]["count"]) == (2, 4)
    assert after["last_inference"] > 1_600_000_000_000


def test_trap_47_repository_index(plain: Client) -> None:
    every = plain.post("/v2/repository/index", None)
    assert every.status == 200
    names = [entry["name"] for entry in every.body]
    assert {"m", "sleeper", "broken"} <= set(names)
    assert next(entry for entry in every.body if entry["name"] == "m") == {
        "name": "m",
        "version": "1",
        "state": "READY",
    }
    assert next(entry for entry in every.body if entry["name"] == "broken") == {"name": "broken"}
    ready = plain.post("/v2/repository/index", {"ready": True}).body
    assert {entry["state"] for entry in ready} == {"READY"}
    assert "broken" not in [entry["name"] for entry in ready]


@pytest.fixture
def managed(plain: Client) -> Iterator[Client]:
    """The gateway whose model `managed` is loaded as on disk, before and after."""
    assert plain.post(LOAD).status == 200
    yield plain
    assert plain.post(LOAD).status == 200


def override(**keys: Any) -> dict[str, Any]:
    document = {
        "name": "managed",
        "backend": "onnxruntime",
        "max_batch_size": "16",
        "input": [{"name": "INPUT0", "data_type": "TYPE_FP32", "dims": [-1]}],
        "output": [{"name": "OUTPUT0", "data_type": "TYPE_FP32", "dims": ["-1"]}],
        **keys,
    }
    return {"parameters": {"config": json.dumps(document)}}


def test_trap_48_load_with_another_configuration(managed: Client) -> None:
    assert managed.config("managed")["max_batch_size"] == 8
    assert managed.post(LOAD, override()).text == ""
    assert managed.config("managed")["max_batch_size"] == 16
    sixteen = ask(tensor(shape=(16, 1), data=[1] * 16))
    assert output(managed.infer(sixteen, "managed"))["shape"] == [16, 1]
    assert managed.post(LOAD).status == 200
    assert managed.config("managed")["max_batch_size"] == 8
    refused(managed.infer(sixteen, "managed"), 400, "<= 8")


def test_trap_49_load_and_unload_of_unknown_models(managed: Client) -> None:
    refused(managed.post("/v2/repository/models/nobody/load"), 500, "failed to load", "nobody")
    assert managed.post("/v2/repository/models/nobody/unload").status == 200
    assert managed.post(UNLOAD).status == 200
    refused(managed.infer(ask(SIMPLE), "managed"), 404, "has no available versions")
    (entry,) = [entry for entry in managed.post("/v2/repository/index").body if entry["name"] == "managed"]
    assert entry == {"name": "managed", "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"}
    assert managed.get("/v2/health/ready").status == 200  # an unloaded model does not count


def test_trap_50_broken_override_leaves_the_old_serving(managed: Client) -> None:
    wrong = [{"name": "INPUT0", "data_type": "TYPE_INT32", "dims": [-1]}]
    for broken in (override(input=wrong), override(max_batch_size=-5), {"parameters": {"config": "{"}}):
        assert managed.post(LOAD, broken).status in (400, 500)
        assert output(managed.infer(ask(SIMPLE), "managed"))["data"][0] == 1
        assert managed.get("/v2/models/managed/ready").status == 200
    refused(managed.post(LOAD, override(input=wrong)), 500, "managed")
    assert managed.config("managed")["max_batch_size"] == 8


def test_trap_51_trace_and_logging_settings(plain: Client) -> None:
    every, one = "/v2/trace/setting", "/v2/models/traced/trace/setting"
    refused(plain.post(every, {"trace_rate": "x"}), 400, "Unable to parse 'trace_rate', got: x")
    refused(plain.post(every, {"trace_file": "y"}), 501, "trace file")
    assert plain.post(one, {"trace_rate": "7"}).body["trace_rate"] == "7"
    assert plain.get(every).body["trace_rate"] == "1000"
    assert plain.post(every, {"trace_rate": "9"}).body["trace_rate"] == "9"
    assert plain.get(one).body["trace_rate"] == "7"
    assert plain.post(one, {"trace_rate": None}).body["trace_rate"] == "9"  # inherited again
    assert plain.post(every, {"trace_rate": None}).body["trace_rate"] == "1000"
    defaults = {
        "log_file": "",
        "log_info": True,
        "log_warning": True,
        "log_error": True,
        "log_verbose_level": 0,
        "log_format": "default",
    }
    assert plain.post("/v2/logging", {"log_verbose_level": 1}).body == {**defaults, "log_verbose_level": 1}
    assert plain.post("/v2/logging", {"log_verbose_level": 0}).body == defaults


def view(memory: shared_memory.SharedMemory) -> memoryview:
    assert memory.buf is not None
    return memory.buf


def region(name: str, verb: str) -> str:
    return f"/v2/systemsharedmemory/region/{name}/{verb}"


@pytest.fixture
def block() -> Iterator[shared_memory.SharedMemory]:
    """256 bytes of POSIX shared memory."""
    memory = shared_memory.SharedMemory(create=True, size=256)
    yield memory
    memory.close()
    memory.unlink()


def test_trap_52_shared_memory_registration(plain: Client, sharing: Client, block: shared_memory.SharedMemory) -> None:
    body = {"key": f"/{block.name}", "byte_size": 256}
    refused(plain.post(region("r", "register"), body), 501)
    status = plain.get("/v2/systemsharedmemory/status")
    assert (status.status, status.body) == (200, [])
    assert sharing.post(region("r52", "register"), body).status == 200
    refused(sharing.post(region("r52", "register"), body), 400, "shared memory region 'r52' already in manager")
    entry = {"name": "r52", "key": body["key"], "offset": 0, "byte_size": 256}
    assert sharing.get("/v2/systemsharedmemory/status").body == [entry]
    assert sharing.post(region("nobody", "unregister")).status == 200
    unknown = tensor(parameters={"shared_memory_region": "nobody", "shared_memory_byte_size": 12})
    refused(sharing.infer(ask(unknown)), 404, "Unable to find shared memory region: 'nobody'")
    assert sharing.post(region("r52", "unregister")).status == 200
    assert sharing.get("/v2/systemsharedmemory/status").body == []


def test_trap_53_shared_memory_tensors(sharing: Client, block: shared_memory.SharedMemory) -> None:
    body = {"key": f"/{block.name}", "byte_size": 256}
    assert sharing.post(region("r53", "register"), body).status == 200
    view(block)[:12] = struct.pack("<3f", 1, 2.5, -3)

    def area(size: int, offset: int = 0) -> dict[str, Any]:
        place = {"shared_memory_region": "r53", "shared_memory_byte_size": size}
        return {**place, "shared_memory_offset": offset} if offset else place

    def answer(size: int) -> Any:
        wanted = [{"name": "OUTPUT0", "parameters": area(size, 64)}]
        return sharing.infer(ask(tensor(parameters=area(12)), outputs=wanted))

    assert output(answer(12)) == {"name": "OUTPUT0", "datatype": "FP32", "shape": [1, 3]}
    assert struct.unpack("<3f", view(block)[64:76]) == (1, 2.5, -3)
    refused(answer(8), 500, "at least")
    assert sharing.post(region("r53", "unregister")).status == 200


def test_trap_54_generate(plain: Client) -> None:
    once = plain.post("/v2/models/text/generate", {"INPUT0": "hello", "id": "7", "temperature": 0.5})
    assert once.body == {"id": "7", "model_name": "text", "model_version": "1", "OUTPUT0": "hello"}
    body = json.dumps({"INPUT0": "hello"}).encode()
    path = "/v2/models/text/generate_stream"
    reply = plain.ask(Http("POST", path, body, {"Accept": "text/event-stream"}))
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.text.startswith("data: ")
    assert reply.text.endswith("\n\n")
    assert reply.text.count("data: ") == 1
    event = {"model_name": "text", "model_version": "1", "OUTPUT0": "hello"}
    assert json.loads(reply.text.removeprefix("data: ")) == event
    decoupled = plain.post(LOAD, override(model_transaction_policy={"decoupled": True}))
    refused(decoupled, 500, "decoupled")  # so no model here answers generate twice
    assert plain.ask(infer(ask(SIMPLE), "managed")).status == 200
