"""Remote models while something goes wrong: secrets that change, servers that leave under load, hostile servers."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway import (
    loading_trial,
    management_repository,
    plan,
    remote_census,
    remote_models,
    remote_sites,
    remote_versions,
)
from gateway.backends.remote_addresses import Addresses
from gateway.backends.remote_server import RemoteServer
from gateway.config import Backend, Config, ModelEntry, ModelKeys
from gateway.protocol.schema import message
from tests.backends.oip_server import Reply, binary_answer, http_json, serving
from tests.remote_bench import double, rig, until, url


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_models, "REDISCOVERY_S", 0.02)
    monkeypatch.setattr(management_repository, "AGAIN_S", 0.02)


def on_path(server: Any, end: str, answer: Reply) -> None:
    """`server` says `answer` to what ends with `end`."""
    before = server._reply
    server._reply = lambda request: answer if request.path.endswith(end) else before(request)


@asynccontextmanager
async def held(server: Any) -> AsyncIterator[asyncio.Event]:
    """Its answers to inference wait for the event; so do those at the end of the block."""
    free, send = asyncio.Event(), server.send

    async def later(writer: Any, reply: Reply) -> bool:
        if reply.data.find(b"model_name") >= 0:
            await free.wait()
        return bool(await send(writer, reply))

    server.send = later
    try:
        yield free
    finally:
        free.set()


def first_doubled(request: Any) -> Reply:
    """As `doubled`, whatever comes behind the first input."""
    length = int(request.headers["inference-header-content-length"])
    (given, *_) = json.loads(request.body[:length])["inputs"]
    size = given["parameters"]["binary_data_size"]
    values = np.frombuffer(request.body[length : length + size], "<f4") * np.float32(2)
    return Reply(binary_answer([("y", "FP32", given["shape"], values.tobytes())]))


# -- start ------------------------------------------------------------------------------------------------------------


def lost_on_trial(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its first inference on it is away, until it is started again."""
    monkeypatch.setattr(loading_trial, "SERVER_S", 0.2)

    def dies(request: Any) -> Reply:
        server.script = first_doubled
        stopping.append(asyncio.ensure_future(server.stop()))
        return Reply(b"")

    stopping: list[asyncio.Future[None]] = []
    server.script = dies


async def test_a_server_lost_on_the_first_trial_joins_later_where_another_has_the_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as a, serving() as b:
        lost_on_trial(a, monkeypatch)
        async with rig(double(Backend(url=url(a)), Backend(url=url(b)))) as subject:
            assert await subject.start() == []
            assert "127.0.0.1:" + str(a.port) + " was lost on a trial run" in caplog.text
            for number in range(5):
                batch, values = await subject.ask(float(number))
                assert (batch.backend, values) == (f"127.0.0.1:{b.port}", [2.0 * number, 1.0])
            before = subject.version()
            await a.start()
            await subject.all_available(2)
            assert subject.version() is before


async def test_a_model_that_took_two_servers_along_is_not_tried_on_a_third(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as a, serving() as b, serving() as c:
        for server in (a, b):
            lost_on_trial(server, monkeypatch)
        async with rig(double(*[Backend(url=url(server)) for server in (a, b, c)])) as subject:
            (failed,) = await subject.start()
            for server in (a, b):
                assert f"the model's server 127.0.0.1:{server.port} was lost on a trial run" in failed.reason
            assert not [request for request in c.requests if request.path.endswith("/infer")]


async def test_a_load_that_lost_its_server_goes_on_another_even_if_the_first_is_back() -> None:
    async with serving() as a, serving() as b, rig(double(Backend(url=url(a)), Backend(url=url(b)))) as subject:
        await subject.start()
        for _ in range(2):  # every load begins anew
            (wanted,) = await subject.remotes.wanted("double")
            artifact, _ = wanted.read()
            names = []
            for _ in range(3):
                loaded = await wanted.load(artifact)
                names += [replica.name for replica in loaded.replicas]
                await loaded.unload()
            assert names == [f"127.0.0.1:{server.port}" for server in (a, b, a)]


async def test_the_only_server_that_is_lost_on_trial_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as a:
        lost_on_trial(a, monkeypatch)
        async with rig(double(Backend(url=url(a)))) as subject:
            (failed,) = await subject.start()
            assert f"the model's server 127.0.0.1:{a.port} was lost on a trial run" in failed.reason
            assert "no backend of double can be used" in failed.reason


# -- changes ----------------------------------------------------------------------------------------------------------


async def test_a_secret_that_changes_on_the_disk_takes_no_backend_away(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("one")
    async with serving() as a:
        entry = double(Backend(url=url(a), headers={"Authorization": f"file:{secret}"}))
        async with rig(entry) as subject:
            await subject.start()
            for change in (partial(secret.write_text, "two"), secret.unlink):
                change()
                await subject.remotes.refresh()
                await subject.remotes.reconcile()
                assert list(subject.backends()) == [f"127.0.0.1:{a.port}"]
            assert a.infers[-1].headers["authorization"] == "one"
            secret.write_text("two")
            assert await subject.repository.reload(Config(models=(entry,))) == []
            await subject.all_available(1)
            assert (await subject.ask(2.0))[1] == [4.0, 1.0]
            assert a.infers[-1].headers["authorization"] == "two"


async def test_a_model_that_is_replaced_answers_on_the_servers_that_it_had() -> None:
    async with serving() as a, serving() as b, rig(double(Backend(url=url(a)))) as subject:
        await subject.start()
        async with held(a) as free:
            asked = asyncio.ensure_future(subject.ask(2.0))
            await until(lambda: subject.replica(a).in_flight == 1)
            replica = subject.replica(a)
            before = subject.version()
            assert (
                await subject.repository.reload(Config(models=(double(Backend(url=url(b)), max_batch_size=4),))) == []
            )
            assert subject.version() is not before
            assert (await subject.ask(3.0))[0].backend == f"127.0.0.1:{b.port}"
            assert replica.in_flight == 1
            free.set()
            batch, values = await asked
            assert (batch.backend, batch.attempt, values) == (f"127.0.0.1:{a.port}", 1, [4.0, 1.0])
        await until(lambda: replica.server.channel.closed)  # it went with its last replica
        assert repr(subject.remotes) == "<RemoteModels models=1 sites=1>"


async def test_a_reload_with_other_defaults_loads_the_model_again() -> None:
    async with serving() as a, rig(double(Backend(url=url(a)))) as subject:
        await subject.start()
        before = subject.version()
        assert await subject.repository.reload(Config(models=(double(Backend(url=url(a))),))) == []
        assert subject.version() is before
        smaller = Config(models=(double(Backend(url=url(a))),), defaults=ModelKeys(max_batch_size=2))
        assert await subject.repository.reload(smaller) == []
        assert subject.version().spec.policy.max_batch_size == 2


async def test_two_entries_may_name_models_of_one_server() -> None:
    async with serving() as a:
        listed = [{"name": name, "version": "1", "state": "READY"} for name in ("double", "double-b", "double-c")]
        on_path(a, "/v2/repository/index", Reply(http_json(listed)))
        entries = [ModelEntry(source=url(a), name=name) for name in ("double", "double-b")]
        async with rig(*entries) as subject:
            assert await subject.start() == []
            assert subject.catalog.names() == ["double", "double-b"]


async def test_a_model_that_failed_when_it_was_found_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as a, serving() as b:
        b.metadata["inputs"] = []
        on_path(a, "/v2/repository/index", Reply(http_json([])))
        await b.stop()
        async with rig(ModelEntry(source=url(a)), ModelEntry(source=url(b))) as subject:
            assert await subject.start() == []
            await b.start()
            await until(lambda: "names no inputs" in caplog.text)
            b.metadata["inputs"] = [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]
            await until(lambda: subject.catalog.ready_versions("double") == ["1"])
            assert (await subject.ask(2.0))[1] == [4.0, 1.0]
            assert caplog.text.count("names no inputs") == 1


async def test_a_lost_server_has_its_name_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = ["127.0.0.1"]

    async def lookup(host: str, port: int) -> tuple[str, ...]:
        return tuple(addresses)

    monkeypatch.setattr(remote_sites, "Addresses", partial(Addresses, lookup=lookup, every_s=3600.0, soon_s=0.01))
    async with serving() as a, rig(double(Backend(url=f"http://triton.test:{a.port}"))) as subject:
        await subject.start()
        await until(lambda: list(subject.backends().values()) == [True])
        addresses[:] = ["127.0.0.9"]
        await a.stop()
        await until(lambda: [r.server.address for r in subject.version().replicas] == ["127.0.0.9"])  # type: ignore[attr-defined]


# -- hostile servers --------------------------------------------------------------------------------------------------


HOSTILE: list[Any] = [
    {"versions": ["1\r\nX-Evil: 1"]},
    {"versions": ["../../etc"]},
    {"versions": ["9" * 5000]},
    {"versions": [""]},
    {"versions": ["1" * 200]},
    {"versions": [["1"]]},
    {"inputs": [{"name": "x", "datatype": "FP32", "shape": ["--5", 2]}]},
    {"inputs": [{"name": "x", "datatype": "FP32", "shape": ["\u00b2", 2]}]},
    {"inputs": [{"name": "x", "datatype": "FP32", "shape": ["9" * 5000, 2]}]},
    {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 10**15]}]},
    {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, -5]}]},
    {"inputs": [{"name": "x\r\ny", "datatype": "FP32", "shape": [-1, 2]}]},
    {"platform": "x\r\nX-Evil: 1" * 100},
    {"platform": ["x"]},
]


@pytest.mark.parametrize("metadata", HOSTILE, ids=range(len(HOSTILE)))
async def test_metadata_that_nobody_should_send_harms_nobody(metadata: Any) -> None:
    """Served without what is wrong with it, or refused with a reason; another model serves either way."""
    async with serving() as a, serving() as b:
        a.metadata |= metadata
        other = ModelEntry(name="other", backends=(Backend(url=url(b), model="double"),))
        async with rig(double(Backend(url=url(a))), other) as subject:
            failed = await subject.start()
            assert all(version.name == "double" and version.reason for version in failed)
            for version in subject.catalog.of("double"):
                texts = [
                    version.version,
                    version.reason,
                    *[tensor.name for tensor in (version.spec.inputs if not failed else ())],
                ]
                assert all(len(text) < 1500 and text.isprintable() for text in texts), texts
                assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}", version.version)
            assert (await subject.ask(2.0, "other"))[1] == [4.0, 1.0]


async def test_what_cannot_be_read_is_a_reason_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    async def deep(*_: object, **__: object) -> Any:
        raise RecursionError

    async with serving() as a:
        with monkeypatch.context() as patch:
            patch.setattr(RemoteServer, "model", deep)
            async with rig(double(Backend(url=url(a)))) as subject:
                (failed,) = await subject.start()
                assert "could not be read: RecursionError" in failed.reason
        with monkeypatch.context() as patch:
            patch.setattr(RemoteServer, "index", deep)
            async with rig(ModelEntry(source=url(a))) as subject:
                assert await subject.start() == []
                assert "could not be read: RecursionError" in subject.remotes.obstacle()


async def test_metadata_too_long_to_be_shown_is_not_kept() -> None:
    async with serving() as a:
        a.metadata["more"] = "x" * 100_000
        async with rig(double(Backend(url=url(a)))) as subject:
            assert await subject.start() == []
            assert plan.manifest_of(subject.version())["backends"][0]["metadata"] == {}


async def test_of_countless_versions_the_newest_are_served() -> None:
    async with serving() as a:
        a.metadata["versions"] = [str(number) for number in range(1, 500)]
        async with rig(double(Backend(url=url(a)))) as subject:
            assert await subject.start() == []
            ready = subject.catalog.ready_versions("double")
            assert (len(ready), ready[-1]) == (remote_versions.MAX_VERSIONS, "499")


async def test_names_that_cannot_be_served_are_said_once_on_one_line(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as a:
        names = ["double", "../up", "a/b", "line\r\nERROR forged", "n" * 1000, ".."]
        listed = [{"name": name, "version": "1", "state": "READY"} for name in names]
        on_path(a, "/v2/repository/index", Reply(http_json(listed)))
        async with rig(ModelEntry(source=url(a))) as subject:
            assert await subject.start() == []
            await subject.remotes.refresh()
            assert subject.catalog.names() == ["double"]
            said = [record.getMessage() for record in caplog.records if "cannot be served" in record.getMessage()]
            assert len(said) == 1
            assert all(len(text) < 1000 and text.isprintable() for text in said)


async def test_thousands_of_models_are_asked_for_a_few_at_a_time() -> None:
    async with serving() as a:
        listed = [{"name": f"m{number}", "version": "1", "state": "READY"} for number in range(300)]
        on_path(a, "/v2/repository/index", Reply(http_json(listed)))
        async with rig(ModelEntry(source=url(a))) as subject:
            await subject.remotes.open()
            assert len(subject.remotes.names()) == 300
            assert a.connections <= remote_census.PARALLEL


async def test_a_server_that_falls_silent_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_census, "START_S", 0.1)
    async with serving() as a, serving() as b:
        listed = [{"name": f"m{number}", "version": "1", "state": "READY"} for number in range(50)]
        on_path(a, "/v2/repository/index", Reply(http_json([*listed])))
        for number in range(50):
            on_path(a, f"/v2/models/m{number}", Reply(b"", "hang"))
        async with rig(ModelEntry(source=url(a)), ModelEntry(source=url(b))) as subject:
            asked = sum(["/v2/models/m" in request.path for request in a.requests])
            failed = await subject.start()
            assert {version.name for version in failed} == {f"m{number}" for number in range(50)}
            assert all("no answer within 0.1 s" in version.reason for version in failed)
            asked = sum(["/v2/models/m" in request.path for request in a.requests])
            assert asked <= 3 * remote_census.PARALLEL
            assert (await subject.ask(2.0))[1] == [4.0, 1.0]


# -- who fits ---------------------------------------------------------------------------------------------------------


async def test_a_server_that_takes_fewer_rows_than_batches_have_stays_out_until_it_takes_more() -> None:
    async with serving() as a, serving() as b:
        await b.stop()
        b.config["max_batch_size"] = 2
        async with rig(double(Backend(url=url(a)), Backend(url=url(b)))) as subject:
            assert await subject.start() == []
            await b.start()
            await until(lambda: len(subject.backends()) == 2 and "2 rows" in subject.replica(b).cause)
            assert not subject.replica(b).available
            b.config["max_batch_size"] = 8
            await subject.all_available(2)


async def test_an_input_that_callers_may_leave_out_must_be_optional_everywhere() -> None:
    optional = [{"name": "x", "optional": False}, {"name": "z", "optional": True}]
    inputs = [{"name": name, "datatype": "FP32", "shape": [-1, 2]} for name in ("x", "z")]
    async with serving() as a, serving() as b:
        a.metadata["inputs"] = b.metadata["inputs"] = inputs
        a.config["input"] = optional
        a.script = b.script = first_doubled
        async with rig(double(Backend(url=url(a)), Backend(url=url(b)))) as subject:
            assert await subject.start() == []
            await until(lambda: "'z'" in subject.replica(b).cause)
            b.config["input"] = optional
            await subject.all_available(2)


async def test_a_server_may_have_more_optional_inputs() -> None:
    async with serving() as a, serving() as b:
        b.metadata["inputs"] = [{"name": name, "datatype": "FP32", "shape": [-1, 2]} for name in ("x", "z")]
        b.config["input"] = [{"name": "z", "optional": True}]
        async with rig(double(Backend(url=url(a)), Backend(url=url(b)))) as subject:
            assert await subject.start() == []
            await subject.all_available(2)


async def test_an_answer_of_another_version_is_no_answer() -> None:
    async with serving() as a, serving() as b:

        def other(request: Any) -> Reply:
            y = {"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [666.0, 666.0]}
            return Reply(http_json({"model_name": "double", "model_version": "2", "outputs": [y]}))

        async with rig(double(Backend(url=url(a)), Backend(url=url(b)))) as subject:
            assert await subject.start() == []
            await subject.all_available(2)
            b.script = other
            for number in range(10):
                assert (await subject.ask(float(number)))[1] == [2.0 * number, 1.0]


async def test_a_model_of_streams_is_refused_with_its_reason() -> None:
    async with serving() as a:
        a.config["model_transaction_policy"] = {"decoupled": True}
        async with rig(double(Backend(url=url(a)))) as subject:
            (failed,) = await subject.start()
            assert "decoupled" in failed.reason


# -- what callers send along ------------------------------------------------------------------------------------------


async def test_a_callers_own_parameters_reach_a_grpc_server() -> None:
    async with serving("grpc") as a, rig(double(Backend(url=url(a, "grpc")))) as subject:
        await subject.start()
        await subject.ask(1.0, temperature=0.5, note="x", count=-3, flag=True)
        sent = message("inference.ModelInferRequest").FromString(a.infers[-1].body).parameters
        assert sent["temperature"].double_param == 0.5
        assert sent["note"].string_param == "x"
        assert sent["count"].int64_param == -3
        assert sent["flag"].bool_param is True


async def test_requests_with_other_parameters_share_no_batch() -> None:
    async with serving() as a, rig(double(Backend(url=url(a), json="always"))) as subject:
        await subject.start()
        answers = await asyncio.gather(*[subject.ask(float(n), temperature=n % 2 / 2) for n in range(12)])
        assert [values for _, values in answers] == [[2.0 * n, 1.0] for n in range(12)]
        for request in a.infers[-len(a.infers) + 1 :]:
            document = json.loads(request.body)
            numbers = document["inputs"][0]["data"][::2]
            if "temperature" in document.get("parameters", {}):
                assert {n % 2 / 2 for n in numbers} == {document["parameters"]["temperature"]}


async def test_countless_steps_of_sequences_leave_room_for_others() -> None:
    async with serving() as a:
        a.config["sequence_batching"] = {"direct": {}}
        async with rig(double(Backend(url=url(a), max_slots=1))) as subject:
            await subject.start()
            async with held(a) as free:
                steps = [
                    asyncio.ensure_future(subject.ask(float(n), sequence_id=n + 1, sequence_start=True))
                    for n in range(700)
                ]
                await until(lambda: subject.replica(a).in_flight == 1)
                plain = asyncio.ensure_future(subject.ask(2.0))
                free.set()
                assert (await plain)[1] == [4.0, 1.0]
                assert [values[0] for _, values in await asyncio.gather(*steps)] == [2.0 * n for n in range(700)]


# -- ends -------------------------------------------------------------------------------------------------------------


async def test_a_server_that_hangs_at_start_is_named_with_its_cause(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as a, serving() as b:
        on_path(b, "/v2", Reply(b"", "hang"))
        async with rig(double(Backend(url=url(a)), Backend(url=url(b)))) as subject:
            assert await subject.start() == []
            assert f"backend {url(b)} does not answer: 127.0.0.1:{b.port} gave no answer within 2 s" in caplog.text
            assert (await subject.ask(2.0))[1] == [4.0, 1.0]


async def test_closing_waits_for_no_server(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as a, serving() as b, rig(double(Backend(url=url(a)), Backend(url=url(b)))) as subject:
        await b.stop()
        assert await subject.start() == []
        on_path(b, "/v2", Reply(b"", "hang"))
        await b.start()
        await until(lambda: any(request.path == "/v2" for request in b.requests))
        async with asyncio.timeout(1.0):  # far less than the question may take
            await subject.remotes.close()
        assert "leaves" not in caplog.text
        assert not subject.replica(a).server.reachable or subject.replica(a).server.channel.closed


async def test_a_backend_that_hangs_while_it_leaves_holds_up_nobody() -> None:
    async with serving() as a, serving() as b, rig(double(Backend(url=url(a)))) as subject:
        await subject.start()
        async with held(a):
            asked = asyncio.ensure_future(subject.ask(2.0))
            await until(lambda: subject.replica(a).in_flight == 1)
            leaving = subject.replica(a)
            for entry in (double(Backend(url=url(b))), double(Backend(url=url(b), zone="z"))):
                assert await subject.repository.reload(Config(models=(entry,))) == []
                assert (await subject.ask(3.0))[0].backend == f"127.0.0.1:{b.port}"
            assert (leaving.in_flight, asked.done()) == (1, False)
        assert (await asked)[1] == [4.0, 1.0]
        await until(lambda: leaving.server.channel.closed)


async def test_a_server_that_answers_everything_but_inference_holds_up_no_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loading_trial, "SERVER_S", 0.05)
    async with serving() as a, rig(double(Backend(url=url(a)))) as subject:
        a.script = lambda request: Reply(b"", "hang")
        assert await subject.start() == []
        assert len(a.infers) == 1
        assert subject.version().probe is None
        assert subject.version().spec.policy.merge  # its server states a size
