"""Management documents: keys, counting, refusals; over the scripted data port."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway import __version__
from gateway.catalog_version import LOG_FULL
from gateway.core.model import ModelState
from gateway.errors import GatewayError, InvalidRequest, NotFound, NotReady, Restricted, Unsupported
from gateway.management import EXTENSIONS, Management
from gateway.management_access import Restrictions
from gateway.management_repository import Repository
from gateway.shared_memory import SharedMemory
from tests.ingress.oip_bench import Bench, check, http, infer, oip_bench, replica_of

DURATIONS = {
    "success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss",
}  # fmt: skip


def counts(document: dict[str, Any]) -> dict[str, int]:
    (entry,) = document["model_stats"]
    return {name: duration["count"] for name, duration in entry["inference_stats"].items()}


def refusal(bench: Bench, name: str, version: str = "") -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        bench.management.statistics(name, version)
    return caught.value


async def test_statistics_before_any_request_have_every_key_at_zero() -> None:
    async with oip_bench() as bench:
        (entry,) = bench.management.statistics("numbers", "1")["model_stats"]
        assert entry == {
            "name": "numbers",
            "version": "1",
            "last_inference": 0,
            "inference_count": 0,
            "execution_count": 0,
            "inference_stats": {name: {"count": 0, "ns": 0} for name in DURATIONS},
            "response_stats": {},
            "batch_stats": [],
            "memory_usage": [],
        }


async def test_rows_requests_and_executions_are_counted_apart() -> None:
    async with oip_bench() as bench:
        version = bench.catalog.resolve("numbers", "2")
        for n in range(4):
            check(await bench.ask(infer([n, n + 1])), [n, n + 1])
        replica_of(version).held = []
        clients = [await bench.client() for _ in range(3)]
        for client in clients:
            client.send(infer([1]))
        while version.scheduler.pending < 3:  # type: ignore[union-attr]
            await asyncio.sleep(0)
        replica_of(version).release()
        for client in clients:
            await client.answer()
        document = bench.management.statistics("numbers", "2")
        (entry,) = document["model_stats"]
        executions = sum(size["compute_infer"]["count"] for size in entry["batch_stats"])
        assert entry["inference_count"] == 4 * 2 + 3
        assert entry["execution_count"] == executions < 7
        answered = 7
        assert counts(document) == {
            name: answered if name in ("success", "queue") or name.startswith("compute") else 0 for name in DURATIONS
        }
        stats = entry["inference_stats"]
        # Every request of a batch is charged the whole batch's time; the scripted backend says 1, 2 and 3 ns.
        assert [stats[f"compute_{phase}"]["ns"] for phase in ("input", "infer", "output")] == [7, 14, 21]
        by_size = {size["batch_size"]: size for size in entry["batch_stats"]}
        assert by_size[2]["compute_output"] == {"count": 4, "ns": 12}
        assert sum(size * by_size[size]["compute_input"]["count"] for size in by_size) == 11
        assert entry["last_inference"] > 1_600_000_000_000
        assert stats["success"]["ns"] >= stats["queue"]["ns"] > 0


async def test_requests_refused_at_once_have_not_failed_and_a_models_failure_has() -> None:
    async with oip_bench() as bench:
        assert (await bench.ask(infer([1], model="numbers/versions/1", outputs=["nope"]))).status == 400
        assert (await bench.ask(http("POST", "/v2/models/numbers/versions/1/infer", b"{"))).status == 400
        assert (await bench.ask(infer([1] * 9, model="numbers/versions/1"))).status == 400
        assert counts(bench.management.statistics("numbers", "1")) == dict.fromkeys(DURATIONS, 0)
        assert (await bench.ask(infer([-66], model="numbers/versions/1"))).status == 500
        assert counts(bench.management.statistics("numbers", "1"))["fail"] == 1


async def test_whose_statistics_there_are() -> None:
    async with oip_bench() as bench:
        await bench.serve("other")
        await bench.serve("broken", refuse=NotReady("it is broken"))

        def entries(name: str = "", version: str = "") -> list[tuple[str, str]]:
            found = bench.management.statistics(name, version)["model_stats"]
            return [(entry["name"], entry["version"]) for entry in found]

        assert entries() == [("numbers", "1"), ("numbers", "2"), ("other", "1")]
        assert entries("numbers") == [("numbers", "1"), ("numbers", "2")]
        assert entries("numbers", "2") == [("numbers", "2")]
        await bench.catalog.unload("other")
        assert entries() == [("numbers", "1"), ("numbers", "2")]
        for name in ("other", "broken", "unknown"):
            error = refusal(bench, name)
            assert isinstance(error, InvalidRequest)
            assert (error.status, error.grpc_code) == (400, 3)
            assert str(error) == f"requested model '{name}' is not available"
        assert "requested model version is not available for model 'numbers'" in str(refusal(bench, "numbers", "3"))


async def test_server_and_model_metadata() -> None:
    async with oip_bench() as bench:
        m = bench.management
        offered = [name for name in EXTENSIONS if name != "system_shared_memory"]  # it is off
        assert m.server_metadata() == {"name": "oip-gateway", "version": __version__, "extensions": offered}
        assert (m.server_live(), m.server_ready()) == (True, True)
        bench.ready = False
        assert not m.server_ready()
        assert m.model_metadata("numbers") == {
            "name": "numbers",
            "versions": ["1", "2"],
            "platform": "onnxruntime_onnx",
            "inputs": [{"name": "number", "datatype": "INT64", "shape": [-1, 1]}],
            "outputs": [
                {"name": "triple", "datatype": "INT64", "shape": [-1, 1]},
                {"name": "name", "datatype": "BYTES", "shape": [-1, 1]},
            ],
        }
        assert m.model_metadata("numbers", "1")["versions"] == ["1"]
        config = m.model_config("numbers")
        assert (config["name"], config["max_batch_size"]) == ("numbers", 8)
        assert m.models() == ["numbers"]


async def test_a_model_that_is_gone_is_in_no_list_and_has_no_documents() -> None:
    async with oip_bench() as bench:
        m = bench.management
        await bench.catalog.unload("numbers")
        assert m.models() == []
        assert m.model_ready("numbers") is False
        for document in (m.model_metadata, m.model_config):
            with pytest.raises(NotFound, match="'numbers' has no available versions"):
                document("numbers")
            with pytest.raises(NotFound, match="unknown model: 'x' is not found"):
                document("x")
        with pytest.raises(NotFound):
            m.model_ready("x")


async def test_a_version_that_nobody_can_execute_is_ready_nowhere_until_somebody_can() -> None:
    async with oip_bench() as bench:
        m, version = bench.management, bench.catalog.resolve("numbers", "2")
        (fleet,) = version.fleets
        (member,) = fleet.members

        async def shown() -> tuple[str, dict[str, str], list[str]]:
            first, second = await m.repository_index()
            assert first == {"name": "numbers", "version": "1", "state": "READY"}
            ready = [entry["version"] for entry in await m.repository_index(ready=True)]
            return m.model_obstacle("numbers", "2"), second, ready

        well = {"name": "numbers", "version": "2", "state": "READY"}
        assert await shown() == ("", well, ["1", "2"])
        member.replica.available = False  # type: ignore[misc]  # the test plays the worker
        fleet.availability_changed(member, time.monotonic())
        why = "no worker is available"
        assert await shown() == (why, well | {"state": "UNAVAILABLE", "reason": why}, ["1"])
        assert bench.catalog.obstacle() == f"model 'numbers' version 2: {why}"
        assert m.model_metadata("numbers")["versions"] == ["1", "2"], "what it is does not change"
        member.replica.available = True  # type: ignore[misc]
        fleet.availability_changed(member, time.monotonic())
        assert await shown() == ("", well, ["1", "2"])
        fleet.force(member, "open", time.monotonic())
        why = "all its backends are drained"
        assert await shown() == (why, well | {"state": "UNAVAILABLE", "reason": why}, ["1"])
        fleet.force(member, None, time.monotonic())
        assert await shown() == ("", well, ["1", "2"])
        version.log = SimpleNamespace(blocked=True)
        assert await shown() == (LOG_FULL, well | {"state": "UNAVAILABLE", "reason": LOG_FULL}, ["1"])
        version.log = None
        assert bench.catalog.ready()


async def test_a_version_that_failed_is_known_and_not_ready() -> None:
    async with oip_bench() as bench:
        version = bench.catalog.resolve("numbers", "2")
        bench.catalog.failed("numbers", "2", "its worker crashes")
        assert version.state is ModelState.FAILED
        assert bench.management.model_ready("numbers", "2") is False
        with pytest.raises(NotReady, match="is not at ready state: its worker crashes"):
            bench.management.model_metadata("numbers", "2")
        assert bench.management.model_ready("numbers") is True  # version 1 answers now
        assert counts(bench.management.statistics("numbers", "2"))["success"] == 0


async def test_trace_settings_are_of_models_that_exist() -> None:
    async with oip_bench() as bench:
        m = bench.management
        assert m.update_trace_settings("numbers", {"trace_rate": "3"})["trace_rate"] == "3"
        assert m.trace_settings("numbers")["trace_rate"] == "3"
        assert m.trace_settings()["trace_rate"] == "1000"
        with pytest.raises(NotFound, match="Request for unknown model : x"):
            m.trace_settings("x")
        with pytest.raises(NotFound, match="Request for unknown model : x"):
            m.update_trace_settings("x", {})


async def test_shared_memory_is_off() -> None:
    async with oip_bench() as bench:
        m = bench.management
        assert m.shm_status() == m.shm_status(kind="cuda") == []
        for kind in ("system", "cuda"):
            with pytest.raises(NotFound, match=f"Unable to find {kind} shared memory region: 'r'"):
                m.shm_status("r", kind)
        with pytest.raises(Unsupported, match="--allow-client-shm"):
            m.shm_register("r", "/k", 0, 8)
        for name in ("r", None):
            with pytest.raises(Unsupported, match="--allow-client-shm"):
                m.shm_unregister(name)
        with pytest.raises(InvalidRequest, match="GPUs not supported"):
            m.cuda_shm_register("r")


async def test_shared_memory_is_on_where_regions_are_kept(tmp_path: Path) -> None:
    (tmp_path / "object").write_bytes(bytes(8))
    async with oip_bench() as bench:
        repository = bench.management._repository
        m = Management(bench.catalog, repository, lambda: "", memory=SharedMemory(100, str(tmp_path)))
        assert m.server_metadata()["extensions"] == list(EXTENSIONS)
        m.shm_register("r", "/object", 2, 4)
        assert m.shm_status() == m.shm_status("r") == [{"name": "r", "key": "/object", "offset": 2, "byte_size": 4}]
        assert m.shm_status(kind="cuda") == []
        with pytest.raises(NotFound, match="Unable to find cuda shared memory region: 'r'"):
            m.shm_status("r", "cuda")
        with pytest.raises(InvalidRequest, match="already in manager"):
            m.shm_register("r", "/object", 0, 1)
        m.shm_unregister("nobody")
        m.shm_unregister()
        assert m.shm_status() == []


def test_only_the_header_and_value_that_were_agreed_open_an_api() -> None:
    restrictions = Restrictions({"trace": ("X-Admin", "secret")})
    assert restrictions.required("trace") == ("X-Admin", "secret")
    assert restrictions.required("logging") is None
    restrictions.check("logging", lambda name: None)
    restrictions.check("trace", {"X-Admin": "secret"}.get)
    restrictions.check("trace", {"X-Admin": b"secret"}.get)
    for sent in (None, "", "Secret", "secret ", b"\xff", "\udcff", "sécret"):
        with pytest.raises(Restricted) as caught:
            restrictions.check("trace", lambda name, sent=sent: sent)  # type: ignore[misc]
        assert str(caught.value) == "This API is restricted, expecting header 'X-Admin'"
        assert (caught.value.status, caught.value.grpc_code) == (403, 14)


async def test_what_is_restricted_can_be_asked() -> None:
    async with oip_bench(restrictions=Restrictions({"health": ("k", "v")})) as bench:
        assert bench.management.restricted("health") == ("k", "v")
        assert bench.management.restricted("trace") is None


def test_the_server_may_have_another_name() -> None:
    async def make() -> dict[str, Any]:
        bench = Bench()
        repository: Repository = bench.management._repository
        return Management(bench.catalog, repository, lambda: "", server_name="triton").server_metadata()

    assert asyncio.run(make())["name"] == "triton"
