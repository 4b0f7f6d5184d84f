"""Models of remote servers, from the configuration to answers, against scripted servers on real sockets."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gateway import plan, remote_models, remote_sites
from gateway.backends.remote_addresses import Addresses
from gateway.catalog import ServedVersion
from gateway.config import Backend, Config, ModelEntry, Server
from gateway.core.model import ModelState
from gateway.errors import ConfigError
from gateway.operations_backends import Backends
from gateway.remote_loaded import MixedLoaded
from gateway.remote_models import NONE_HAS_IT
from tests.backends.oip_server import refused_port, serving
from tests.remote_bench import double, rig, until, url

SECRET = "Bearer very-secret"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_models, "REDISCOVERY_S", 0.02)


# -- discovery --------------------------------------------------------------------------------------------------------


async def test_the_same_model_from_two_urls_is_one_model_with_two_backends() -> None:
    async with (
        serving() as a,
        serving("grpc") as b,
        rig(ModelEntry(source=url(a)), ModelEntry(source=url(b, "grpc"))) as subject,
    ):
        assert await subject.start() == []
        assert subject.catalog.names() == ["double"]
        await subject.all_available(2)
        answers = await asyncio.gather(*[subject.ask(float(n)) for n in range(20)])
        assert [values for _, values in answers] == [[2.0 * n, 1.0] for n in range(20)]
        assert all(batch.remote for batch, _ in answers)
        spec = subject.version().spec
        assert (spec.digest, spec.platform, spec.policy.max_batch_size) == ("", "test", 8)
        assert spec.batching_note == "batches up to 8 rows: its server batches it too (max_batch_size 8)"
        document = subject.version().config_document
        assert (document["name"], document["platform"], document["max_batch_size"]) == ("double", "test", 8)
        assert "instance_group" not in document or document["instance_group"] == []


async def test_provenance_says_what_is_known_and_invents_no_digest() -> None:
    async with serving() as a, rig(double(Backend(url=url(a), headers={"Authorization": SECRET}))) as subject:
        await subject.start()
        manifest = plan.manifest_of(subject.version())
        assert (manifest["digest"], manifest["files"], manifest["source"]) == (None, None, url(a))
        (backend,) = manifest["backends"]
        assert (backend["name"], backend["url"], backend["model"]) == (f"127.0.0.1:{a.port}", url(a), "double")
        assert backend["metadata"]["platform"] == "test"
        assert SECRET not in json.dumps(manifest)


async def test_a_server_that_is_down_at_start_joins_when_it_comes(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as a, serving() as b:
        await b.stop()
        async with rig(ModelEntry(source=url(a)), ModelEntry(source=url(b))) as subject:
            await subject.start()
            assert list(subject.backends()) == [f"127.0.0.1:{a.port}"]
            assert f"backend {url(b)} does not answer" in caplog.text
            before = subject.version()
            await b.start()
            await until(lambda: len(subject.backends()) == 2)
            await subject.all_available(2)
            assert subject.version() is before


async def test_a_model_that_only_a_late_server_has_is_served_once_it_is_there() -> None:
    async with serving() as a, serving() as b:
        b.metadata["name"] = "double"
        a.missing = True
        await b.stop()
        number = ModelEntry(source=url(b))
        async with rig(number, ModelEntry(source=url(a), name="other")) as subject:
            assert await subject.start() == []
            assert subject.catalog.names() == []
            assert "no server answers" in subject.remotes.obstacle()
            await b.start()
            await until(lambda: subject.catalog.ready_versions("double") == ["1"])
            assert (await subject.ask(4.0))[1] == [8.0, 1.0]
            assert subject.remotes.obstacle() == ""


async def test_a_configured_model_whose_backends_are_all_down_says_why() -> None:
    port = refused_port()
    async with rig(double(Backend(url=f"http://127.0.0.1:{port}"))) as subject:
        (failed,) = await subject.start()
        assert failed.state is ModelState.FAILED
        assert failed.reason.startswith(f"{NONE_HAS_IT}: http://127.0.0.1:{port}: ")


async def test_a_name_is_served_from_one_place_unless_the_entry_says_both(tmp_path: Path) -> None:
    (tmp_path / "double" / "1").mkdir(parents=True)
    (tmp_path / "double" / "1" / "model.onnx").write_bytes(b"x")
    async with serving() as a:
        async with rig(ModelEntry(source=str(tmp_path)), ModelEntry(source=url(a))) as subject:
            with pytest.raises(ConfigError, match=r"models\[1\]: model 'double' of .* is already served from another"):
                await subject.start()
        async with rig(double(Backend(url=url(a))), ModelEntry(source=url(a))) as subject:
            with pytest.raises(ConfigError, match=r"models\[1\]: model 'double'"):
                await subject.start()


# -- versions and signatures ------------------------------------------------------------------------------------------


async def test_versions_are_matched_by_their_numbers_and_a_server_that_lists_none_has_the_newest() -> None:
    async with serving() as a, serving() as b, serving() as c:
        a.metadata["versions"] = ["1", "2"]
        b.metadata["versions"] = ["1"]
        c.metadata["versions"] = []
        async with rig(double(*[Backend(url=url(server)) for server in (a, b, c)])) as subject:
            await subject.start()
            names = [f"127.0.0.1:{server.port}" for server in (a, b, c)]
            assert subject.catalog.ready_versions("double") == ["1", "2"]
            assert set(subject.backends(version="1")) == {names[0], names[1]}
            assert set(subject.backends(version="2")) == {names[0], names[2]}


async def test_a_pinned_version_and_another_name_there() -> None:
    async with (
        serving() as a,
        rig(
            ModelEntry(name="mine", backends=(Backend(url=url(a), model="double", version="1", name="first"),))
        ) as subject,
    ):
        await subject.start()
        batch, values = await subject.ask(1.0, "mine")
        assert (values, batch.backend) == ([2.0, 1.0], "first")
        assert a.infers[-1].path == "/v2/models/double/versions/1/infer"


async def test_a_server_with_another_signature_stays_out_until_it_matches() -> None:
    async with serving() as a, serving() as b:
        b.metadata["outputs"] = [{"name": "y", "datatype": "INT64", "shape": [-1, 2]}]
        async with rig(double(Backend(url=url(a)), Backend(url=url(b)))) as subject:
            await subject.start()
            other = f"127.0.0.1:{b.port}"
            replica = next(r for r in subject.version().replicas if r.name == other)
            await until(lambda: "INT64" in replica.cause)  # type: ignore[attr-defined]  # a RemoteReplica
            assert not replica.available
            assert [(await subject.ask(1.0))[0].backend for _ in range(5)] == [f"127.0.0.1:{a.port}"] * 5
            b.metadata["outputs"] = [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}]
            await subject.all_available(2)


async def test_what_may_not_run_twice_is_never_run_on_made_up_input() -> None:
    async with serving() as a, rig(double(Backend(url=url(a)), idempotent=False)) as subject:
        await subject.start()
        assert a.infers == []
        assert subject.version().probe is None
        assert subject.version().spec.policy.merge  # its server batches it


async def test_the_made_up_row_on_which_it_ran_is_kept() -> None:
    async with serving() as a, rig(double(Backend(url=url(a)))) as subject:
        await subject.start()
        (tensor,) = subject.version().probe or ()
        assert tensor is not None
        assert (tensor.shape, len(bytes(tensor.buffer or b""))) == ((1, 2), 8)


async def test_without_a_stated_size_rows_are_merged_only_with_proof() -> None:
    async with serving() as a:
        a.extensions = ["binary_tensor_data"]
        async with rig(double(Backend(url=url(a)))) as subject:
            await subject.start()
            assert subject.version().spec.policy.merge
            assert len(a.infers) == 1 + 5  # the rows together, and each of them alone


async def test_a_model_that_keeps_sequences_is_neither_merged_nor_tried() -> None:
    async with serving() as a:
        a.config["sequence_batching"] = {"max_sequence_idle_microseconds": 5}
        async with rig(double(Backend(url=url(a)))) as subject:
            await subject.start()
            assert a.infers == []
            assert not subject.version().spec.policy.merge
            assert "keeps the state of sequences" in subject.version().spec.batching_note


async def test_a_second_queue_is_advised_against_once(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as a:
        a.config["dynamic_batching"] = {"max_queue_delay_microseconds": 700}
        async with rig(double(Backend(url=url(a)))) as subject:
            await subject.start()
            await subject.remotes.refresh()
            assert caplog.text.count("holds requests of model 'double' back for up to 700") == 1


# -- parameters and secrets -------------------------------------------------------------------------------------------


async def test_a_callers_own_parameters_reach_the_server() -> None:
    async with serving() as a, rig(double(Backend(url=url(a), json="always"))) as subject:
        await subject.start()
        await subject.ask(1.0, temperature=0.5, note="x")
        sent = json.loads(a.infers[-1].body)
        assert {key: sent["parameters"][key] for key in ("temperature", "note")} == {"temperature": 0.5, "note": "x"}


async def test_headers_are_sent_and_shown_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving() as a, rig(double(Backend(url=url(a), headers={"Authorization": SECRET}))) as subject:
        await subject.start()
        await subject.ask()
        assert all(request.headers.get("authorization") == SECRET for request in a.requests)
        assert SECRET not in caplog.text
        assert SECRET not in repr(subject.remotes)
        assert not any(SECRET in repr(replica) for replica in subject.version().replicas)


# -- reload -----------------------------------------------------------------------------------------------------------


async def test_backends_come_and_go_at_a_reload_without_a_failed_request_or_a_load() -> None:
    async with serving() as a, serving() as b, serving("grpc") as c:
        first = double(Backend(url=url(a)), Backend(url=url(b)))
        async with rig(first) as subject:
            await subject.start()
            await subject.all_available(2)
            before, stop = subject.version(), asyncio.Event()
            answered = 0

            async def caller() -> None:
                nonlocal answered
                while not stop.is_set():
                    assert (await subject.ask(2.0))[1] == [4.0, 1.0]
                    answered += 1

            callers = [asyncio.ensure_future(caller()) for _ in range(4)]
            for entry in (
                double(Backend(url=url(b)), Backend(url=url(c, "grpc"))),
                double(Backend(url=url(c, "grpc"), weight=3.0, zone="z")),
                first,
            ):
                seen = answered
                assert await subject.repository.reload(Config(models=(entry,))) == []
                names = [f"127.0.0.1:{backend.url.rpartition(':')[2]}" for backend in entry.backends]
                assert sorted(subject.backends()) == sorted(names)
                await subject.all_available(len(names))
                await until(lambda seen=seen: answered > seen + 20)  # type: ignore[misc]  # mypy and defaults of lambdas
            stop.set()
            await asyncio.gather(*callers)
            assert subject.version() is before
            (member,) = [m for m in before.replicas if m.name == f"127.0.0.1:{a.port}"]
            assert member.traits.weight == 1.0


async def test_a_changed_weight_is_another_replica_of_the_same_server() -> None:
    async with serving() as a, serving() as b, rig(double(Backend(url=url(a)), Backend(url=url(b)))) as subject:
        await subject.start()
        heavy = double(Backend(url=url(a)), Backend(url=url(b), weight=5.0, zone="east"))
        await subject.repository.reload(Config(models=(heavy,)))
        found = {replica.name: replica.traits for replica in subject.version().replicas}
        traits = found[f"127.0.0.1:{b.port}"]
        assert (traits.weight, traits.zone, traits.kind) == (5.0, "east", "oip")


async def test_a_drained_backend_stays_drained_through_reloads_that_make_it_anew() -> None:
    async with serving() as a, serving() as b, rig(double(Backend(url=url(a)), Backend(url=url(b)))) as subject:
        backends = Backends(subject.catalog.versions)

        def attach(version: ServedVersion) -> None:
            subject.remotes.attach(version)
            backends.attach(version)

        def states() -> dict[str, str]:
            return {view.backend: view.state for view in backends.views()}

        async def reload(entry: ModelEntry) -> None:
            assert await subject.repository.reload(Config(models=(entry,))) == []
            backends.reloaded(subject.remotes.server_names())
            await subject.all_available(len(entry.backends))

        subject.catalog.on_ready, subject.remotes.drained = attach, backends.drained
        await subject.start()
        await subject.all_available(2)
        drained = f"127.0.0.1:{a.port}"
        await backends.act("drain", drained, None, force=False, wait_s=0.0)
        first = subject.version()
        await reload(double(Backend(url=url(a), weight=5.0, zone="z"), Backend(url=url(b))))
        assert subject.version() is first
        assert states()[drained] == "drained"
        await reload(double(Backend(url=url(a)), Backend(url=url(b)), max_queue_delay_ms=1.0))
        assert subject.version() is not first
        names = [replica.name for replica in subject.version().replicas]
        assert names == [f"127.0.0.1:{b.port}", drained], "it began with one that takes batches"
        assert states()[drained] == "drained"
        for number in range(20):
            batch, _ = await subject.ask(float(number))
            assert batch.backend == f"127.0.0.1:{b.port}"
        await backends.act("undrain", drained, None, force=False, wait_s=0.0)
        await reload(double(Backend(url=url(a), weight=2.0), Backend(url=url(b))))
        assert states()[drained] != "drained"
        await backends.act("drain", drained, None, force=False, wait_s=0.0)
        await reload(double(Backend(url=url(b))))
        await reload(double(Backend(url=url(a)), Backend(url=url(b))))
        assert states()[drained] != "drained"


async def test_a_model_that_leaves_the_configuration_is_unloaded_and_a_new_one_loaded() -> None:
    async with serving() as a, serving() as b, rig(double(Backend(url=url(a)))) as subject:
        await subject.start()
        other = ModelEntry(name="other", backends=(Backend(url=url(b), model="double"),))
        await subject.repository.reload(Config(models=(other,)))
        assert subject.version().state is ModelState.UNAVAILABLE
        assert (await subject.ask(5.0, "other"))[1] == [10.0, 1.0]
        await until(lambda: subject.remotes.names() == ["other"])


async def test_a_reload_with_a_fault_changes_nothing() -> None:
    async with serving() as a, rig(double(Backend(url=url(a)))) as subject:
        await subject.start()
        bad = double(Backend(url=url(a), headers={"x": "env:NOT_THERE"}))
        with pytest.raises(ConfigError, match="NOT_THERE is not set"):
            await subject.repository.reload(Config(models=(bad,)))
        assert (await subject.ask(5.0))[1] == [10.0, 1.0]


async def test_a_name_with_several_addresses_is_several_backends_and_follows_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    addresses = ["127.0.0.1", "127.0.0.2"]

    async def lookup(host: str, port: int) -> tuple[str, ...]:
        assert host == "triton.test"
        return tuple(addresses)

    async with serving() as a:
        monkeypatch.setattr(remote_sites, "Addresses", partial(Addresses, lookup=lookup, every_s=0.02, soon_s=0.01))
        async with rig(double(Backend(url=f"http://triton.test:{a.port}"))) as subject:
            await subject.start()
            name = f"triton.test:{a.port}"
            assert set(subject.backends()) == {f"{name}/127.0.0.1", f"{name}/127.0.0.2"}
            before = subject.version()
            addresses.remove("127.0.0.2")
            await until(lambda: list(subject.backends()) == [f"{name}/127.0.0.1"])
            assert (await subject.ask(2.0))[1] == [4.0, 1.0]
            addresses.append("127.0.0.3")
            await until(lambda: set(subject.backends()) == {f"{name}/127.0.0.1", f"{name}/127.0.0.3"})
            assert subject.version() is before


async def test_clients_load_and_unload_models_of_servers_where_they_may() -> None:
    explicit = Server(model_control="explicit")
    async with serving() as a, rig(double(Backend(url=url(a))), server=explicit) as subject:
        assert await subject.start() == []
        assert await subject.repository.index() == [{"name": "double"}]
        assert subject.repository.loadable() == ["double"]
        await subject.repository.load("double", {})
        assert (await subject.ask(2.0))[1] == [4.0, 1.0]
        before = subject.version()
        await subject.repository.load("double", {})
        assert subject.version() is not before
        assert (await subject.ask(2.0))[1] == [4.0, 1.0]
        await subject.repository.unload("double")
        assert subject.version().state is ModelState.UNAVAILABLE


async def test_load_models_may_name_models_of_servers_and_nothing_else() -> None:
    async with serving() as a:
        named = Server(model_control="explicit", load_models=("double",))
        async with rig(ModelEntry(source=url(a)), server=named) as subject:
            assert await subject.start() == []
            assert subject.catalog.ready_versions("double") == ["1"]
        wrong = Server(model_control="explicit", load_models=("duoble",))
        async with rig(ModelEntry(source=url(a)), server=wrong) as subject:
            with pytest.raises(ConfigError, match="no source has a model 'duoble'; there are: double"):
                await subject.start()


async def test_polling_follows_what_the_servers_have() -> None:
    async with serving() as a, rig(ModelEntry(source=url(a)), server=Server(model_control="poll")) as subject:
        await subject.start()
        a.metadata["versions"] = ["1", "2"]
        await subject.remotes.refresh()
        assert await subject.repository.poll() == []
        assert subject.catalog.ready_versions("double") == ["1", "2"]


async def test_a_model_in_trouble_on_its_server_is_kept_and_one_that_was_unloaded_there_is_not() -> None:
    async with serving() as a, rig(ModelEntry(source=url(a)), server=Server(model_control="poll")) as subject:
        trouble = {"version": "1", "state": "UNAVAILABLE", "reason": "no backend is available"}
        a.index.append({"name": "other", **trouble})  # never ready: not served
        await subject.start()
        before = subject.version()
        for state, reason, expected in (
            ("UNAVAILABLE", "no backend is available", ["double"]),
            ("READY", "", ["double"]),
            ("UNAVAILABLE", "unloaded", []),
            ("UNAVAILABLE", "no backend is available", []),
        ):
            a.index[0] |= {"state": state, "reason": reason}
            await subject.remotes.refresh()
            assert await subject.repository.poll() == []
            assert subject.remotes.names() == expected
            assert (subject.version() is before and before.state is ModelState.READY) is bool(expected)


async def test_what_is_known_of_servers_that_left_is_dropped() -> None:
    async with serving() as a, serving() as b, rig(double(Backend(url=url(a)), Backend(url=url(b)))) as subject:
        await subject.start()
        assert repr(subject.remotes) == "<RemoteModels models=1 sites=2>"
        await subject.repository.reload(Config(models=(double(Backend(url=url(a))),)))
        assert repr(subject.remotes) == "<RemoteModels models=1 sites=1>"
        # The model and its one version, of the one server that stayed.
        assert repr(subject.remotes.census) == "<Census servers=1 models=2>"


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback; enable it (net.ipv6.conf.lo)")
async def test_a_server_that_listens_on_one_of_its_names_addresses_is_found_there_also_when_it_comes_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def lookup(host: str, port: int) -> tuple[str, ...]:
        assert host == "localhost"
        return ("127.0.0.1", "::1")

    monkeypatch.setattr(remote_sites, "Addresses", partial(Addresses, lookup=lookup, every_s=0.02, soon_s=0.01))

    def on_ipv6(server: Any) -> None:
        server.host = "::1"

    async with serving(setup=on_ipv6) as a, serving() as b:
        entry = double(Backend(url=f"http://localhost:{a.port}"), Backend(url=url(b)))
        async with rig(entry) as subject:
            await subject.start()
            await subject.all_available(2)
        await a.stop()
        async with rig(entry) as subject:
            await subject.start()
            assert subject.backends()[f"localhost:{a.port}"] is False
            await a.start()
            await subject.all_available(2)
            assert set(subject.backends()) == {f"localhost:{a.port}", f"127.0.0.1:{b.port}"}


# -- beside workers ---------------------------------------------------------------------------------------------------


async def test_a_server_stands_beside_the_workers_where_the_entry_says_so(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "model.onnx").write_bytes(b"x")
    async with serving() as a:
        a.metadata["name"] = "numbers"
        async with rig(
            ModelEntry(source=str(tmp_path), name="numbers", backends=(Backend(url=url(a), model="double"),))
        ) as subject:
            assert await subject.start() == []
            version = subject.version("numbers")
            assert isinstance(version.loaded, MixedLoaded)
            replica = version.loaded.side.replicas
            assert [r.name for r in replica.values()] == [f"127.0.0.1:{a.port}"]
            (only,) = replica.values()
            await until(lambda: only.cause not in ("", "not verified yet"))  # it has other tensors
            assert version.ready
            assert version.spec.digest.startswith("sha256:")
            assert not version.spec.forwards_parameters
            assert plan.manifest_of(version)["backends"][0]["url"] == url(a)
