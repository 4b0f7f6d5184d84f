"""Replicas on remote servers: one outcome per batch, and availability that follows what the server says."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.backends import remote
from gateway.backends.remote import Endpoint, RemoteServer
from gateway.core.outcome import Failure, FailureKind, Sign
from tests.backends import remote_rig
from tests.backends.oip_server import Reply, Request, doubled, doubled_grpc, grpc_frames, http, http_json, refused_port
from tests.backends.remote_rig import SCHEMES, Given, execute, replica_of, rig, rows, seen, until, values

BROKEN, NOT_SENT, OVERLOAD, SUSPECT = (
    FailureKind.BROKEN,
    FailureKind.NOT_SENT,
    FailureKind.OVERLOAD,
    FailureKind.SUSPECT,
)
WELL = {"http": doubled, "grpc": doubled_grpc}


def hangs(request: Request) -> Reply:
    return Reply(b"", "hang")


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_batches_are_answered_over_connections_that_stay_open(scheme: str) -> None:
    async with rig(scheme) as r:
        before = r.peer.connections
        for n in range(5):
            assert values(await execute(r.replica, n, n + 0.5)) == [2 * n, 2 * n + 1]
        assert r.peer.connections == before
        assert r.replica.in_flight == 0


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_many_at_once_get_their_own_answers(scheme: str) -> None:
    async with rig(scheme) as r:
        batches = [Given(n) for n in range(8)]
        for batch in batches:
            r.replica.execute(batch, 10)
        assert (r.replica.in_flight, r.replica.free_slots) == (8, 0)
        for n, batch in enumerate(batches):
            assert values(await batch.result()) == [2 * n]
        assert [batch.times for batch in batches] == [1] * 8
        assert r.replica.free_slots == 8


STATUSES = [
    (400, (SUSPECT, Sign.ANSWERED)),
    (422, (SUSPECT, Sign.ANSWERED)),
    (401, (NOT_SENT, Sign.MISSING)),
    (404, (NOT_SENT, Sign.MISSING)),
    (302, (NOT_SENT, Sign.MISSING)),
    (429, (OVERLOAD, Sign.ANSWERED)),
    (503, (OVERLOAD, Sign.ANSWERED)),
    (500, (BROKEN, Sign.ANSWERED)),
    (502, (BROKEN, Sign.ANSWERED)),
    (504, (BROKEN, Sign.ANSWERED)),
    (204, (BROKEN, Sign.ANSWERED)),
]


@pytest.mark.parametrize(("status", "expected"), STATUSES)
async def test_statuses(status: int, expected: object) -> None:
    async with rig() as r:
        body = b"" if status == 204 else b'{"error": "so it is"}'
        r.peer.script = lambda _: Reply(http(body, status, [("Retry-After", "2")]))
        outcome = await execute(r.replica, 1)
        assert seen(outcome) == expected
        assert isinstance(outcome, Failure)
        assert f"status {status}" in outcome.message
        assert "so it is" not in outcome.message, "callers who shared the batch do not see what the server wrote"
        assert ("so it is" in outcome.words) == ("so it is" in outcome.in_full) == bool(body)
        assert outcome.retry_after_s == (2.0 if status in (429, 503) else 0.0)


CODES = [
    (3, (SUSPECT, Sign.ANSWERED)),
    (5, (NOT_SENT, Sign.MISSING)),
    (8, (OVERLOAD, Sign.ANSWERED)),
    (14, (OVERLOAD, Sign.ANSWERED)),
    (2, (BROKEN, Sign.ANSWERED)),
    (13, (BROKEN, Sign.ANSWERED)),
    (4, (FailureKind.TIMEOUT, Sign.ANSWERED)),
    (99, (BROKEN, Sign.NONE)),
]


@pytest.mark.parametrize(("code", "expected"), CODES)
async def test_codes_of_grpc(code: int, expected: object) -> None:
    async with rig("grpc") as r:
        push_back = [("grpc-retry-pushback-ms", "1500")]
        r.peer.script = lambda asked: Reply(grpc_frames(asked.stream, None, code, "so%20it is", push_back))
        outcome = await execute(r.replica, 1)
        assert seen(outcome) == expected
        assert isinstance(outcome, Failure)
        assert "so it is" not in outcome.message
        assert outcome.in_full.endswith(": so it is") == (code != 99)
        assert outcome.retry_after_s == (1.5 if code in (8, 14) else 0.0)


@pytest.mark.parametrize(
    "text", ["Request for unknown model: 'double' is not found", "Model 'double' is not ready", "no available versions"]
)
async def test_an_unknown_model_is_missing_whatever_the_status(text: str) -> None:
    async with rig() as r:
        r.peer.script = lambda _: Reply(http_json({"error": text}, 400))
        r.peer.missing = True
        assert seen(await execute(r.replica, 1)) == (NOT_SENT, Sign.MISSING)
        assert not r.replica.available
        assert r.server.reachable  # other models of the server are not concerned
        r.peer.missing, r.peer.script = False, doubled
        await until(lambda: r.replica.available, "the model is back")
        assert values(await execute(r.replica, 3)) == [6]


async def test_words_of_the_server_are_shown_tamed() -> None:
    async with rig(headers={"Authorization": "Bearer s3cret"}) as r:
        r.peer.script = lambda _: Reply(http_json({"error": "no\r\n\x1b[31m'Bearer s3cret' " + "x" * 9000}, 500))
        outcome = await execute(r.replica, 1)
        assert isinstance(outcome, Failure)
        assert "s3cret" not in outcome.message
        assert outcome.message.isprintable()
        assert len(outcome.message) < 500
        assert "s3cret" not in repr(r.server.endpoint)
        assert r.peer.infers[-1].headers["authorization"] == "Bearer s3cret"


# -- time and cancellation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_no_answer_in_time_closes_the_connection(scheme: str) -> None:
    async with rig(scheme) as r:
        r.peer.script = hangs
        assert seen(await execute(r.replica, 1, timeout_s=0.05)) == (FailureKind.TIMEOUT, Sign.NONE)
        r.peer.script = WELL[scheme]
        assert values(await execute(r.replica, 2)) == [4]
        first, second = r.peer.infers
        assert second.connection != first.connection
        assert r.replica.in_flight == 0


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_a_cancelled_batch_is_done_once_and_soon(scheme: str) -> None:
    async with rig(scheme) as r:
        r.peer.script = hangs
        batch = Given(1)
        r.replica.execute(batch, 10)
        await until(lambda: bool(r.peer.infers), "it arrived")
        r.replica.cancel(batch)
        assert batch.times == 0  # never from inside
        assert seen(await batch.result()) == (FailureKind.CANCELLED, Sign.NONE)
        r.replica.cancel(batch)
        await asyncio.sleep(0)
        assert (batch.times, r.replica.in_flight) == (1, 0)


async def test_a_timer_that_fires_too_late_gives_the_answer_some_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=time.monotonic)
    monkeypatch.setattr(remote, "time", clock)
    async with rig() as r:
        r.peer.script = hangs
        monkeypatch.setattr(remote, "LATE_S", 20.0)
        batch = Given(1)
        r.replica.execute(batch, 0.05)
        clock.monotonic = lambda: time.monotonic() + 100.0  # the timer will find that it is late
        await asyncio.sleep(0.1)
        assert batch.times == 0
        r.replica.cancel(batch)
        assert seen(await batch.result()) == (FailureKind.CANCELLED, Sign.NONE)


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_the_server_is_told_how_long_it_has(scheme: str) -> None:
    async with rig(scheme, lambda peer: setattr(peer, "name", "triton")) as r:
        batch = Given(1, deadline=time.monotonic() + 5)
        r.replica.execute(batch, 60)
        await batch.result()
        (asked,) = r.peer.infers
        if scheme == "http":
            assert 4000 < int(asked.headers["x-request-timeout-ms"]) <= 4995
            assert b'"timeout":49' in asked.body or b'"timeout":4' in asked.body
        else:
            assert asked.headers["grpc-timeout"].endswith("m")
            assert 4000 < int(asked.headers["grpc-timeout"][:-1]) <= 4995
            assert 4e6 < remote_rig.parameters_in(asked)["timeout"] <= 4_995_000


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_a_server_that_keeps_to_the_deadline_is_not_to_blame(scheme: str) -> None:
    def late(request: Request) -> Reply:
        data = http(b"", 504) if scheme == "http" else grpc_frames(request.stream, None, 4, "too late")
        return Reply(data)

    async with rig(scheme) as r:
        r.peer.script = late
        batch = Given(1, deadline=time.monotonic() + 0.1)
        r.replica.execute(batch, 60)
        assert seen(await batch.result()) == (FailureKind.CANCELLED, Sign.NONE)
        assert time.monotonic() >= batch.deadline - 0.005


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_sequences_and_parameters_are_sent(scheme: str) -> None:
    async with rig(scheme) as r:
        batch = remote_rig.Stateful(1)
        r.replica.execute(batch, 10)
        assert values(await batch.result()) == [2]
        (asked,) = r.peer.infers
        wanted = {"mood": "good", "n": 3, "half": 0.5, "flag": True}
        wanted |= {"sequence_id": 7, "sequence_start": True, "sequence_end": False}
        assert remote_rig.parameters_in(asked) == wanted


# -- availability ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_a_dead_server_is_unavailable_at_once_and_comes_back(scheme: str) -> None:
    async with rig(scheme) as r:
        changes: list[bool] = []
        r.replica.set_listener(lambda: changes.append(r.replica.available))
        await r.peer.stop()
        await until(lambda: not r.replica.available, "it is missed")  # nobody sent anything
        assert r.server.statistics().times_lost == 1
        assert "refused" in r.replica.cause
        assert seen(await execute(r.replica, 1)) == (NOT_SENT, Sign.NONE)
        await r.peer.start()
        await until(lambda: r.replica.available, "it is back")
        assert changes == [False, True]
        assert values(await execute(r.replica, 4)) == [8]


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_a_server_that_comes_back_as_another_is_refused_until_it_matches(scheme: str) -> None:
    async with rig(scheme) as r:
        await r.peer.stop()
        await until(lambda: not r.replica.available, "it is missed")
        good = r.peer.metadata
        r.peer.metadata = good | {"outputs": [{"name": "y", "datatype": "FP64", "shape": [-1, 2]}]}
        await r.peer.start()
        await until(lambda: "FP64, not FP32" in r.replica.cause, "the cause is said")
        assert not r.replica.available
        r.peer.metadata = good
        await until(lambda: r.replica.available, "it matches")


async def test_a_quick_restart_with_another_model_is_noticed() -> None:
    async with rig() as r:
        other = r.peer.metadata | {"inputs": [{"name": "z", "datatype": "FP32", "shape": [-1, 2]}]}
        await r.peer.stop()
        r.peer.metadata = other
        await r.peer.start()  # before anybody tried to connect
        await until(lambda: "no input 'x'" in r.replica.cause, "it is found out")


async def test_before_it_is_available_again_the_sample_has_run() -> None:
    async with rig() as r:
        r.replica.set_warm_up([rows(7)])
        await r.peer.stop()
        await until(lambda: not r.replica.available, "it is missed")
        r.peer.script = lambda _: Reply(http(b"", 500))
        await r.peer.start()
        await until(lambda: "trial run failed" in r.replica.cause, "the trial")
        assert not r.replica.available
        r.peer.script = doubled
        await until(lambda: r.replica.available, "the trial went well")


async def test_a_model_that_is_not_ready_is_not_available() -> None:
    async with rig() as r:
        r.peer.ready = False
        assert "not ready" in await r.replica.verify()
        assert not await r.replica.ping(5)
        assert not r.replica.available
        r.peer.ready = True
        await until(lambda: r.replica.available, "ready")
        assert await r.replica.ping(5)


async def test_replicas_of_one_server_share_it_and_the_last_one_closes_it() -> None:
    async with rig() as r:
        second = replica_of(r.server)
        await until(lambda: second.available, "joined by itself")
        await second.close()
        assert not second.available
        assert values(await execute(r.replica, 1)) == [2]
        await r.replica.close()
        assert r.server.statistics().connections == 0
        assert seen(await execute(r.replica, 1)) == (NOT_SENT, Sign.NONE)


async def test_closing_waits_for_what_is_in_flight() -> None:
    async with rig() as r:
        r.peer.script = lambda asked: Reply(doubled(asked).data, cuts=range(10, 200, 10))
        batch = Given(5)
        r.replica.execute(batch, 10)
        await r.replica.close()
        assert values(await batch.result()) == [10]


async def test_closing_ends_what_does_not_end() -> None:
    async with rig() as r:
        r.peer.script = hangs
        batch = Given(5)
        r.replica.execute(batch, 1000)
        await r.replica.close(0.01)
        assert seen(await batch.result()) == (FailureKind.CANCELLED, Sign.NONE)


async def test_it_may_be_made_while_nobody_is_there() -> None:
    server = RemoteServer(Endpoint("http", "127.0.0.1", refused_port()))
    replica = replica_of(server)
    await until(lambda: "refused" in replica.cause, "the cause is known")
    assert not replica.available
    assert "refused" in await replica.verify()
    await replica.close()


async def test_a_batch_that_cannot_be_read_is_suspect_and_frees_its_slot() -> None:
    async with rig() as r:
        batch: Any = Given(1)
        batch.inputs[0].nbytes = 4  # less than its part holds
        r.replica.execute(batch, 10)
        assert seen(await batch.result()) == (SUSPECT, Sign.NONE)
        assert r.replica.in_flight == 0
