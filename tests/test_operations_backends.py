"""Backends as operators see and drain them: on scripted replicas, and over a real socket."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.backends.interface import Failure, FailureKind
from gateway.core.fleet import Fleet
from gateway.core.traits import Traits
from gateway.observe.metrics import Metrics, Sources, build_labels
from gateway.observe.metrics_views import HttpView
from gateway.operations import Operations
from gateway.operations_backends import MAX_HANDED_OVER, MAX_WAIT_S, Backends, LastBackend, UnknownBackend
from tests.scripted import Bench, Kind, simulated, turns

WALL = 1_800_000_000.0


class Version:
    """A `ServedVersion`, as far as operations look at one."""

    def __init__(self, bench: Bench, name: str = "m", version: str = "1") -> None:
        self.name, self.version = name, version
        self.bench = bench
        self.scheduler = bench.scheduler
        self.statistics = bench.statistics
        self.kicked = 0

    @property
    def fleets(self) -> tuple[Fleet, ...]:
        return self.scheduler.fleets

    def kick(self) -> None:
        self.kicked += 1
        self.scheduler.kick()


def bench_of(*kinds: Kind) -> Bench:
    return Bench(replicas=len(kinds), kinds=kinds)


def backends_of(*versions: Any) -> Backends:
    return Backends(lambda: versions, asyncio.get_running_loop().time, lambda: WALL)


async def act(backends: Backends, action: Any, name: str, model: str | None = None, **options: Any) -> Any:
    return await backends.act(action, name, model, **{"force": False, "wait_s": 0.0, **options})


def states(backends: Backends) -> dict[str, str]:
    return {f"{view.model}:{view.backend}": view.state for view in backends.views()}


@simulated
async def test_a_view_says_what_state_a_backend_is_in_why_and_until_when() -> None:
    bench = bench_of("onnx", "oip")
    backends = backends_of(Version(bench, "digits", "3"))
    fleet, now = bench.scheduler.fleets[0], bench.loop.time()
    remote = fleet.members[1]
    for _ in range(5):
        fleet.began(remote, 1, now)
        fleet.failed(remote, 1, Failure(FailureKind.BROKEN, "status 500"), 0.0, now)
    worker, view = backends.views()
    assert (worker.model, worker.version, worker.backend, worker.kind, worker.server) == (
        "digits", "3", "onnx-1", "onnx", "",
    )  # fmt: skip
    assert (worker.state, worker.cause, worker.until, worker.seconds_left, worker.latency_ms) == (
        "closed", "", None, None, None,
    )  # fmt: skip
    assert (view.backend, view.server, view.kind, view.state) == ("host-2", "s2", "oip", "open")
    assert view.cause == "several attempts in a row failed; the last: status 500"
    assert view.seconds_left is not None
    assert 0.8 <= view.seconds_left <= 1.2
    assert view.until is not None
    assert view.until.startswith("2027-01-15T08:00:0")
    assert view.until.endswith("+00:00")
    assert view.share == 1.0
    await bench.finish()


@simulated
async def test_what_a_replica_knows_of_its_absence_is_shown() -> None:
    bench = bench_of("oip", "oip")
    gone: Any = bench.backend.replicas[0]
    gone.cause, gone.url = "cannot connect: refused", "http://a:8000"
    fleet, now = bench.scheduler.fleets[0], bench.loop.time()
    for member in fleet.members:
        fleet.began(member, 1, now)
        fleet.succeeded(member, 1, 0.5, 0.0, now)
    gone.set_available(False)
    first, second = backends_of(Version(bench)).views()
    assert first.latency_ms is None, "the penalty for how it left says nothing of how fast it is"
    assert second.latency_ms is not None
    assert (first.state, first.cause, first.url) == ("unavailable", "cannot connect: refused", "http://a:8000")
    assert (second.state, second.cause, second.url) == ("closed", "", "")
    await bench.finish()


@simulated
async def test_a_drained_backend_gets_no_batch_until_it_is_undrained() -> None:
    bench = bench_of("onnx", "onnx")
    version = Version(bench)
    backends = backends_of(version)
    done = await act(backends, "drain", "onnx-1")
    assert [(one.backend, one.state, one.in_flight) for one in done.backends] == [("onnx-1", "drained", 0)]
    assert done.idle
    bench.backend.respond = lambda batch: batch.reply()
    for _ in range(10):
        bench.send()
        await turns()
    assert {batch.replica.name for batch in bench.backend.executed} == {"onnx-2"}
    await asyncio.sleep(3600)
    assert states(backends) == {"m:onnx-1": "drained", "m:onnx-2": "closed"}
    done = await act(backends, "undrain", "onnx-1")
    assert done.backends[0].state == "closed"
    assert version.kicked == 2
    bench.send()
    await turns()
    await bench.finish()


@simulated
async def test_undrain_lets_those_who_wait_go_on_at_once() -> None:
    bench = bench_of("onnx")
    backends = backends_of(Version(bench))
    await act(backends, "drain", "onnx-1", force=True)
    caller = bench.send()
    await bench.backend.expect_nothing()
    await act(backends, "undrain", "onnx-1")
    (await bench.backend.expect_batch(1)).reply()
    assert caller.answered
    await bench.finish()


@simulated
async def test_a_server_is_drained_with_everything_on_it_or_one_model_alone() -> None:
    one, two = bench_of("oip", "oip"), bench_of("oip", "oip")
    backends = backends_of(Version(one, "a"), Version(two, "b"))
    done = await act(backends, "drain", "s1")
    assert [(changed.model, changed.backend) for changed in done.backends] == [("a", "host-1"), ("b", "host-1")]
    await act(backends, "undrain", "s1", "b")
    assert states(backends) == {
        "a:host-1": "drained", "a:host-2": "closed", "b:host-1": "closed", "b:host-2": "closed",
    }  # fmt: skip
    await one.finish()
    await two.finish()


@simulated
async def test_the_last_usable_backend_is_kept_unless_that_is_insisted_on() -> None:
    alone, paired = bench_of("oip"), bench_of("oip", "oip")
    backends = backends_of(Version(alone, "a"), Version(paired, "b"))
    with pytest.raises(LastBackend, match=r"'s1' is all that can serve a version 1 now.*nothing was changed.*force"):
        await act(backends, "drain", "s1")
    assert set(states(backends).values()) == {"closed"}
    await act(backends, "drain", "s1", "b")
    with pytest.raises(LastBackend, match="b version 1"):
        await act(backends, "drain", "host-2", "b")
    await act(backends, "drain", "s1", force=True)
    assert states(backends) == {"a:host-1": "drained", "b:host-1": "drained", "b:host-2": "closed"}
    await alone.finish()
    await paired.finish()


@simulated
async def test_one_that_serves_nothing_can_always_be_drained() -> None:
    bench = bench_of("oip", "oip")
    backends = backends_of(Version(bench))
    bench.backend.replicas[1].set_available(False)
    await act(backends, "drain", "host-2")
    assert states(backends) == {"m:host-1": "closed", "m:host-2": "drained"}
    bench.backend.replicas[1].set_available(True)
    assert states(backends)["m:host-2"] == "drained"
    await act(backends, "undrain", "host-2")
    assert states(backends)["m:host-2"] in ("closed", "ramp")
    await bench.finish()


@simulated
async def test_draining_waits_for_what_is_under_way_and_ends_nothing() -> None:
    bench = bench_of("onnx", "onnx")
    backends = backends_of(Version(bench))
    caller = bench.send()
    batch = await bench.backend.expect_batch(1)
    name, started = batch.replica.name, bench.loop.time()
    done = await act(backends, "drain", name, wait_s=2.0)
    assert not done.idle
    assert done.backends[0].in_flight == 1
    assert 2.0 <= bench.loop.time() - started <= 2.1
    bench.loop.call_later(3.0, batch.reply)
    done = await act(backends, "drain", name, wait_s=60.0)
    assert done.idle
    assert bench.loop.time() - started < 6.0
    assert caller.answered
    await bench.finish()


@simulated
async def test_unknown_names_are_told_what_there_is() -> None:
    bench = bench_of("onnx", "oip")
    backends = backends_of(Version(bench))
    for model, of in ((None, ""), ("m", " of model 'm'")):
        with pytest.raises(UnknownBackend, match=f"no backend{of} is named 'x'; there are: host-2, onnx-1"):
            await act(backends, "drain", "x", model)
    with pytest.raises(UnknownBackend, match="there are: none"):
        await act(backends, "drain", "onnx-1", "other")
    with pytest.raises(UnknownBackend):
        await act(backends, "drain", "")  # not "everything without a server"
    await bench.finish()


# -- what was drained stays so ----------------------------------------------------------------------------------------


@simulated
async def test_an_address_or_url_means_everything_there_and_a_name_that_backend() -> None:
    bench = bench_of("oip", "oip", "oip")
    backends = backends_of(Version(bench))
    for replica, name, url in zip(
        bench.backend.replicas, ("blue", "a:8000", "green"), ("http://a:8000", "http://a:8000", "http://a:9000"),
        strict=True,
    ):  # fmt: skip
        replica._name, replica.traits = name, Traits("oip", server=name)
        replica.url = url  # type: ignore[attr-defined]  # as `RemoteReplica` has it
    await act(backends, "drain", "a:8000")
    assert states(backends) == {"m:blue": "drained", "m:a:8000": "drained", "m:green": "closed"}
    await act(backends, "undrain", "blue")
    assert states(backends) == {"m:blue": "closed", "m:a:8000": "drained", "m:green": "closed"}
    await act(backends, "drain", "http://a:9000")
    assert states(backends) == {"m:blue": "closed", "m:a:8000": "drained", "m:green": "drained"}
    await act(backends, "undrain", "http://a:8000")
    assert states(backends) == {"m:blue": "closed", "m:a:8000": "closed", "m:green": "drained"}
    for nobody in ("a", "8000", "//a:8000", ""):
        with pytest.raises(UnknownBackend):
            await act(backends, "drain", nobody)
    await bench.finish()


@simulated
async def test_a_version_that_comes_later_has_the_backends_drained_that_were() -> None:
    first, second, other = bench_of("onnx", "oip"), bench_of("onnx", "oip"), bench_of("onnx", "oip")
    served: list[Any] = [Version(first), Version(other, "other")]
    backends = Backends(lambda: served, first.loop.time, lambda: WALL)
    await act(backends, "drain", "s2")
    await act(backends, "undrain", "host-2", "other")
    await act(backends, "drain", "onnx-1", "other")
    with pytest.raises(LastBackend):
        await act(backends, "drain", "onnx-1", "m")  # refused: nothing of it is remembered either
    served[0] = Version(second, version="2")
    backends.attach(served[0])
    assert states(backends) == {
        "m:onnx-1": "closed", "m:host-2": "drained", "other:onnx-1": "drained", "other:host-2": "closed",
    }  # fmt: skip
    await act(backends, "undrain", "s2")
    served[0] = Version(first)
    for member in first.scheduler.fleets[0].members:
        first.scheduler.fleets[0].force(member, None, first.loop.time())
    backends.attach(served[0])
    assert states(backends)["m:host-2"] in ("closed", "ramp")
    for bench in (first, second, other):
        await bench.finish()


@simulated
async def test_what_left_the_configuration_is_not_drained_when_it_comes_back() -> None:
    bench = bench_of("oip", "oip", "oip")
    served: list[Any] = [Version(bench)]
    backends = Backends(lambda: served, bench.loop.time, lambda: WALL)
    bench.backend.replicas[1]._name = "dns:8000/10.0.0.2"
    for name in ("host-1", "dns:8000/10.0.0.2"):
        await act(backends, "drain", name)
    there = served.copy()
    served.clear()
    backends.reloaded({"dns:8000"})  # one of its addresses is away for a moment, and host-1 for good
    served += there
    for member in bench.scheduler.fleets[0].members:
        bench.scheduler.fleets[0].force(member, None, bench.loop.time())
    backends.attach(served[0])
    assert [view.state for view in backends.views()] == ["closed", "drained", "closed"]
    backends.reloaded(())  # what is there is not forgotten, whatever is configured
    backends.attach(served[0])
    assert [view.state for view in backends.views()] == ["closed", "drained", "closed"]
    await bench.finish()


@simulated
async def test_a_successor_is_told_what_is_drained(caplog: pytest.LogCaptureFixture) -> None:
    first, second = bench_of("oip", "oip"), bench_of("oip", "oip")
    predecessor = backends_of(Version(first))
    assert predecessor.orders_as_text() == ""
    await act(predecessor, "drain", "s2", "m")
    version = Version(second)
    successor = backends_of(version)
    successor.adopt(predecessor.orders_as_text())
    successor.attach(version)  # type: ignore[arg-type]  # as far as operations look at one
    assert states(successor) == {"m:host-1": "closed", "m:host-2": "drained"}
    successor.adopt("")
    assert successor.orders_as_text() == ""
    for odd in ("{", "[1]", '[["a", 1, true]]', '[["a", null, "yes"]]', "7"):
        caplog.clear()
        successor.adopt(odd)
        assert "cannot be read" in caplog.text
    predecessor.adopt(json.dumps([["n" * MAX_HANDED_OVER, None, True]]))
    assert predecessor.orders_as_text() == "", "the system would not take it, nor start the successor"
    await first.finish()
    await second.finish()


# -- over HTTP ---------------------------------------------------------------------------------------------------------


class Served:
    """An operations port in front of two scripted replicas."""

    def __init__(self, operations: Operations, session: aiohttp.ClientSession, backends: Backends) -> None:
        self.operations, self.session, self.backends = operations, session, backends

    async def post(self, path: str, body: bytes = b"{}", **headers: str) -> tuple[int, Any]:
        given = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        async with self.session.post(path, data=body, headers=given) as response:
            assert response.headers["Content-Type"] == "application/json"
            return response.status, json.loads(await response.read())


def operations_of(backends: Backends, token_file: Path | None = None) -> Operations:
    sources = Sources(lambda: (), lambda: HttpView(0, 0, {}), {}, build_labels())
    return Operations(Metrics(sources, lambda: 0.0), lambda: (), lambda: (), backends, token_file)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    bench = bench_of("oip", "oip")
    bench.backend.replicas[0]._name = "dns-name:8000/10.0.0.1"
    backends = backends_of(Version(bench))
    operations = operations_of(backends)
    await operations.start("127.0.0.1", 0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{operations.port}") as session:
        yield Served(operations, session, backends)
    await operations.close()
    await bench.finish()


async def test_the_list_over_http(served: Served) -> None:
    async with served.session.get("/api/backends") as response:
        listed = await response.json()
    assert [one["backend"] for one in listed] == ["dns-name:8000/10.0.0.1", "host-2"]
    assert set(listed[0]) == {
        "model", "version", "backend", "server", "kind", "url", "zone", "weight", "state", "cause", "until",
        "seconds_left", "slots", "in_flight", "latency_ms", "share",
    }  # fmt: skip


async def test_drain_and_undrain_over_http(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "gateway.audit"):
        status, done = await served.post("/api/backends/dns-name%3A8000%2F10.0.0.1/drain?wait_s=1.5&model=m")
        assert status == 200
        assert done == {
            "action": "drain",
            "name": "dns-name:8000/10.0.0.1",
            "backends": [
                {"model": "m", "version": "1", "backend": "dns-name:8000/10.0.0.1", "state": "drained", "in_flight": 0}
            ],
            "idle": True,
        }
        assert (await served.post("/api/backends/host-2/drain"))[0] == 409
        status, _ = await served.post("/api/backends/host-2/drain?force=true", b"")
        assert status == 200
        assert (await served.post("/api/backends/s1/undrain"))[0] == 200
        assert (await served.post("/api/backends/nope/undrain"))[0] == 404
    assert states(served.backends) == {"m:dns-name:8000/10.0.0.1": "closed", "m:host-2": "drained"}
    assert [record.getMessage() for record in caplog.records] == [
        "drain of backend dns-name:8000/10.0.0.1, model m, force False",
        "drain of backend host-2, model any, force True",
        "undrain of backend s1, model any, force False",
    ]


@pytest.mark.parametrize(
    ("query", "body", "hint"),
    [
        ("?force=yes", b"{}", "force is true or false"),
        ("?wait_s=-1", b"{}", "wait_s is a number"),
        ("?wait_s=nan", b"{}", "wait_s is a number"),
        (f"?wait_s={MAX_WAIT_S + 1:.0f}", b"{}", "wait_s is a number"),
        ("?modle=m", b"{}", "'modle' is no option"),
        ("", b'{"force": true}', "options stand in the query"),
    ],
)
async def test_bad_options_change_nothing(served: Served, query: str, body: bytes, hint: str) -> None:
    status, answer = await served.post(f"/api/backends/host-2/drain{query}", body)
    assert status == 400
    assert hint in answer["error"]
    assert set(states(served.backends).values()) == {"closed"}


async def test_actions_are_posts_and_everything_else_is_read(served: Served) -> None:
    for method in ("GET", "PUT", "DELETE", "HEAD", "OPTIONS"):
        async with served.session.request(method, "/api/backends/host-2/drain") as response:
            assert response.status == 405
            assert response.headers["Allow"] == "POST"
    for path in ("/api/backends", "/api/backends/host-2/stop", "/api/backends/host-2", "/metrics"):
        async with served.session.post(path, json={}) as response:
            assert response.status == 405
            assert response.headers["Allow"] == "GET, HEAD"
    assert set(states(served.backends).values()) == {"closed"}


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Host": "evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
async def test_a_foreign_page_changes_nothing(
    served: Served, headers: dict[str, str], expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "gateway.audit"):
        status, _ = await served.post("/api/backends/host-2/drain", b"{}", **headers)
    assert status == expected
    assert set(states(served.backends).values()) == {"closed"}
    assert bool(caplog.records) is ("Host" not in headers)


async def test_a_port_that_others_reach_needs_the_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    bench = bench_of("oip", "oip")
    backends = backends_of(Version(bench))
    for token_file, authorization, expected in (
        (None, "", 403),
        (None, "Bearer s3cret", 403),
        (tmp_path / "token", "", 401),
        (tmp_path / "token", "Bearer s3cret", 200),
    ):
        operations = operations_of(backends, token_file)
        await operations.start("0.0.0.0", 0)  # what is tested
        async with aiohttp.ClientSession(f"http://127.0.0.1:{operations.port}") as session:
            headers = {"Authorization": authorization} if authorization else {}
            async with session.get("/api/backends") as response:
                assert response.status == 200
            async with session.post("/api/backends/host-2/drain", json={}, headers=headers) as response:
                assert response.status == expected
        await operations.close()
        assert (states(backends)["m:host-2"] == "drained") is (expected == 200)
    await bench.finish()
