"""Loading and unloading at run time, from directories on disk; the test plays the worker pool.

A model file is a word: `broken` cannot be loaded, anything else is the model of `oip_bench`.
"""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway import catalog_load, management_repository
from gateway.catalog import Catalog
from gateway.config import Config, ModelSettings
from gateway.config import load as load_config
from gateway.core.model import Artifact
from gateway.errors import (
    ConfigError,
    GatewayError,
    LoadFailed,
    ModelError,
    NotReady,
)
from gateway.management_repository import MAX_SHOWN, Repository
from tests.ingress.oip_bench import NumberModel

PATIENCE_S = 30.0
ENSEMBLE = """
platform: "ensemble" max_batch_size: 4
input { name: "number" data_type: TYPE_INT64 dims: [ 1 ] }
output { name: "thrice" data_type: TYPE_INT64 dims: [ 1 ] }
ensemble_scheduling { step {
  model_name: "STEP" model_version: -1
  input_map { key: "number" value: "number" } output_map { key: "triple" value: "thrice" }
} }
"""


class Rig:
    def __init__(self, root: Path, keys: str, entry: str) -> None:
        self.root = root
        self.loaded: list[tuple[str, bytes]] = []
        self.most_at_once = 0
        self.now = 0
        self.go: asyncio.Event | None = None
        """Loads wait for it."""
        file = root.parent / "gateway.yaml"
        file.write_text(f"server: {{{keys}}}\nmodels: [{{source: {root}, {entry}}}]\n")
        self.config: Config = load_config(file, {}, {})
        self.catalog = Catalog()
        self.repository = Repository(self.config, self.catalog, self._load)

    async def _load(self, artifact: Artifact, settings: ModelSettings) -> NumberModel:
        self.loaded.append((f"{artifact.name}/{artifact.version}", artifact.model))
        self.now += 1
        self.most_at_once = max(self.most_at_once, self.now)
        try:
            await (self.go.wait() if self.go is not None else asyncio.sleep(0))
            if artifact.model == b"broken":
                raise ModelError("onnxruntime refuses it")
            return NumberModel()
        finally:
            self.now -= 1

    def write(self, name: str, content: bytes = b"fine", version: str = "1", config: str | None = None) -> None:
        place = self.root / name / version
        place.mkdir(parents=True, exist_ok=True)
        (place / "model.onnx").write_bytes(content)
        if config is not None:
            (self.root / name / "config.pbtxt").write_text(config)

    def ensemble(self, name: str, step: str) -> None:
        (self.root / name / "1").mkdir(parents=True)
        (self.root / name / "config.pbtxt").write_text(ENSEMBLE.replace("STEP", step))

    def states(self) -> dict[str, str]:
        return {f"{v.name}/{v.version}": v.state.value for v in self.catalog.versions()}

    async def start(self) -> None:
        wanted = await asyncio.to_thread(self.repository.initial)
        assert await self.catalog.load_all(wanted) == []
        self.repository.open = True

    def limit(self, name: str) -> int:
        return self.catalog.resolve(name, None).spec.policy.max_batch_size


@asynccontextmanager
async def rig(
    tmp_path: Path, keys: str = "model_control: explicit", models: str = "a b", entry: str = "instances: 2"
) -> AsyncIterator[Rig]:
    root = tmp_path / "repository"
    root.mkdir()
    rig = Rig(root, keys, entry)
    for name in models.split():
        rig.write(name)
    async with asyncio.timeout(PATIENCE_S):
        yield rig
    await rig.catalog.drain()
    rig.catalog.stop()


async def refusal(work: Any) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        await work
    return caught.value


async def test_only_what_was_named_is_loaded_at_start_and_the_rest_is_a_name(tmp_path: Path) -> None:
    async with rig(tmp_path, "model_control: explicit, load_models: [b]") as r:
        r.write("broken", b"broken")
        (r.root / "empty").mkdir()
        await r.start()
        assert r.states() == {"b/1": "READY"}
        names = [{"name": "a"}, {"name": "b", "version": "1", "state": "READY"}, {"name": "broken"}, {"name": "empty"}]
        assert await r.repository.index() == names
        assert await r.repository.index(repository="any") == names
        assert await r.repository.index(ready=True) == [names[1]]


@pytest.mark.parametrize(("keys", "expected"), [("[]", []), ("['*']", ["a/1", "b/1"])])
async def test_nothing_or_everything_at_start(tmp_path: Path, keys: str, expected: list[str]) -> None:
    async with rig(tmp_path, f"model_control: explicit, load_models: {keys}") as r:
        await r.start()
        assert sorted(r.states()) == expected


async def test_a_model_to_load_at_start_that_does_not_exist_is_a_fault(tmp_path: Path) -> None:
    async with rig(tmp_path, "model_control: explicit, load_models: [a, nobody, b, nothing]") as r:
        with pytest.raises(ConfigError) as caught:
            r.repository.initial()
        assert [f.message.split(";")[0] for f in caught.value.faults] == [
            "no source has a model 'nobody'", "no source has a model 'nothing'",
        ]  # fmt: skip
        assert "there are: a, b" in str(caught.value)


async def test_an_ensemble_named_at_start_brings_its_steps(tmp_path: Path) -> None:
    async with rig(tmp_path, "model_control: explicit, load_models: [e]") as r:
        r.ensemble("e", "a")
        await r.start()
        assert r.states() == {"a/1": "READY", "e/1": "READY"}
        await r.repository.unload("e", unload_dependents=True)
        assert set(r.states().values()) == {"UNAVAILABLE"}


async def test_loading_unloading_and_loading_again(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        await r.start()
        await r.repository.load("a", {})
        assert r.states() == {"a/1": "READY"}
        await r.repository.unload("a")
        entry = {"name": "a", "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"}
        assert await r.repository.index() == [entry, {"name": "b"}]
        assert await r.repository.index(ready=True) == []
        await r.repository.unload("a")
        await r.repository.unload("never heard of")
        await r.repository.load("a", {})
        assert r.states() == {"a/1": "READY"}


async def test_an_override_holds_until_the_next_load_which_reads_the_source_anew(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        r.write("a", config="max_batch_size: 4")
        await r.start()
        await r.repository.load("a", {})
        assert r.limit("a") == 4
        await r.repository.load("a", {"config": '{"max_batch_size": "16"}'})
        assert r.limit("a") == 16
        assert r.catalog.resolve("a", None).config_document["max_batch_size"] == 16
        r.write("a", b"newer", config="max_batch_size: 5")
        await r.repository.load("a", {})
        assert r.limit("a") == 5
        assert r.loaded[-1] == ("a/1", b"newer")


async def test_an_override_outranks_the_models_entry_too_but_only_in_what_it_states(tmp_path: Path) -> None:
    async with rig(tmp_path, entry="max_batch_size: 8, max_queue_delay_ms: 3, preferred_batch_sizes: [6]") as r:
        r.write("a", config="max_batch_size: 4")
        await r.start()
        await r.repository.load("a", {})
        assert r.limit("a") == 8
        await r.repository.load("a", {"config": '{"max_batch_size": 16}'})
        policy = r.catalog.resolve("a", None).spec.policy
        assert (policy.max_batch_size, policy.max_queue_delay_s, policy.preferred_batch_sizes) == (16, 0.003, (6,))
        error = await refusal(r.repository.load("a", {"config": '{"max_batch_size": 2}'}))
        assert "models[0].preferred_batch_sizes: 6 is more than max_batch_size of model 'a', which is 2" in str(error)
        assert r.limit("a") == 16
        await r.repository.load("a", {})
        assert r.limit("a") == 8


async def test_files_of_the_request_instead_of_the_repositorys(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        await r.start()
        uploaded = {"config": "{}", "file:7/model.onnx": base64.b64encode(b"uploaded").decode()}
        await r.repository.load("a", uploaded)
        await r.repository.load("brand-new", {"config": "{}", "file:1/model.onnx": b"raw"})
        assert r.loaded == [("a/7", b"uploaded"), ("brand-new/1", b"raw")]
        assert r.states() == {"a/7": "READY", "brand-new/1": "READY"}
        version = r.catalog.resolve("a", None)
        assert version.artifact is not None
        assert version.artifact.source == "uploaded with the load request"
        await r.repository.load("a", {})
        assert r.states() == {"a/1": "READY", "brand-new/1": "READY"}


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ({"config": "{"}, "failed to load 'a', failed to poll from model repository: config"),
        ({"config": '{"input": [{"name": "zz", "data_type": "TYPE_FP32", "dims": [1]}]}'}, "failed to load 'a'"),
        ({"config": "{}", "file:1/model.onnx": b"broken"}, "failed to load 'a': version 1 is at UNAVAILABLE state"),
        ({"config": '{"version_policy": {"specific": {"versions": [9]}}}'}, "version 9 does not exist"),
        ({"config": "{}", "file:readme.txt": b"x"}, "failed to load 'a', failed to poll"),
    ],
)
async def test_a_failed_load_leaves_the_old_one_serving(tmp_path: Path, override: dict[str, Any], text: str) -> None:
    async with rig(tmp_path) as r:
        await r.start()
        await r.repository.load("a", {})
        before = r.catalog.resolve("a", None)
        error = await refusal(r.repository.load("a", override))
        assert (type(error), error.status, error.grpc_code) == (LoadFailed, 500, 13)
        assert "failed to load" in str(error)
        assert text in str(error)
        assert r.catalog.resolve("a", None) is before
        assert r.catalog.ready()


async def test_unknown_and_broken_models(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        r.write("broken", b"broken")
        (r.root / "empty").mkdir()
        await r.start()
        error = await refusal(r.repository.load("nobody", {}))
        assert str(error) == (
            "failed to load 'nobody', failed to poll from model repository: no source has this model; there are: a, b, "
            "broken, empty"
        )
        for number in range(MAX_SHOWN):
            r.write(f"more{number}")
        assert str(await refusal(r.repository.load("nobody", {}))).endswith(", more5 and 4 more")
        assert error.status == 500
        assert "onnxruntime refuses it" in str(await refusal(r.repository.load("broken", {})))
        assert "has no version directory" in str(await refusal(r.repository.load("empty", {})))
        (entry,) = [e for e in await r.repository.index() if e["name"] == "broken"]
        assert (entry["state"], entry["reason"]) == ("UNAVAILABLE", "onnxruntime refuses it")
        assert r.catalog.ready()


async def test_reading_a_large_configuration_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_by: list[threading.Thread] = []

    def noted(real: Any) -> Any:
        def read(*arguments: Any) -> Any:
            read_by.append(threading.current_thread())
            return real(*arguments)

        return read

    for where, name in ((management_repository, "read_override"), (catalog_load, "document")):
        monkeypatch.setattr(where, name, noted(getattr(where, name)))
    async with rig(tmp_path) as r:
        await r.start()
        await r.repository.load("a", {"config": '{"max_batch_size": 4}'})
    assert len(read_by) == 2
    assert threading.main_thread() not in read_by


async def test_loads_of_one_model_come_one_after_the_other_and_of_many_a_few_at_a_time(tmp_path: Path) -> None:
    async with rig(tmp_path, models="a b c d e f") as r:
        await r.start()
        sizes = range(1, 9)
        await asyncio.gather(*[r.repository.load("a", {"config": f'{{"max_batch_size": {n}}}'}) for n in sizes])
        assert r.most_at_once == 1
        assert r.limit("a") in sizes
        await r.catalog.drain()
        r.go = asyncio.Event()
        loads = asyncio.gather(*[r.repository.load(name, {}) for name in "abcdef"])
        while r.now < 2:
            await asyncio.sleep(0)
        r.go.set()
        await loads
        assert r.most_at_once == 2
        assert sorted(r.catalog.ready_versions(name) for name in "abcdef") == [["1"]] * 6


async def test_what_an_ensemble_is_made_of_is_loaded_with_it_and_leaves_with_it_if_asked(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        r.ensemble("e", "a")
        r.ensemble("f", "a")
        await r.start()
        await r.repository.load("e", {})
        await r.repository.load("f", {})
        assert r.states() == {"a/1": "READY", "e/1": "READY", "f/1": "READY"}
        assert [name for name, _ in r.loaded] == ["a/1"]
        await r.repository.unload("e", unload_dependents=True)
        assert r.states()["a/1"] == "READY"  # f needs it
        await r.repository.unload("f", unload_dependents=True)
        assert set(r.states().values()) == {"UNAVAILABLE"}
        await r.repository.load("a", {})
        await r.repository.load("e", {})
        await r.repository.unload("e", unload_dependents=True)
        assert r.states()["a/1"] == "READY"  # somebody had asked for it by name


async def test_names_that_clients_invent_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.management_repository.MAX_GONE", 2)
    async with rig(tmp_path) as r:
        forgotten: list[str] = []
        r.repository.forgotten = forgotten.append
        await r.start()
        await r.repository.load("a", {})
        for n in range(4):
            assert isinstance(
                await refusal(r.repository.load(f"x{n}", {"config": "{}", "file:1/model.onnx": b"broken"})), LoadFailed
            )
        await r.repository.load("y", {"config": "{}", "file:1/model.onnx": b"fine"})
        await r.repository.unload("y")
        assert r.catalog.names() == ["a", "x3", "y"]
        assert forgotten == ["x0", "x1", "x2"]
        assert r.states()["a/1"] == "READY"


async def test_a_step_that_two_ensembles_want_at_once_is_loaded_once(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        r.ensemble("e", "a")
        r.ensemble("f", "a")
        await r.start()
        await asyncio.gather(r.repository.load("e", {}), r.repository.load("f", {}))
        assert [name for name, _ in r.loaded] == ["a/1"]
        assert set(r.states().values()) == {"READY"}


async def test_ensembles_that_contain_each_other_are_refused(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        r.ensemble("e", "f")
        r.ensemble("f", "e")
        await r.start()
        errors = await asyncio.gather(refusal(r.repository.load("e", {})), refusal(r.repository.load("f", {})))
        assert all("failed to load" in str(error) and "contain each other" in str(error) for error in errors)
        assert r.catalog.names() == []


async def test_a_missing_step_fails_the_ensemble(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        r.ensemble("e", "nobody")
        await r.start()
        assert "failed to load 'nobody'" in str(await refusal(r.repository.load("e", {})))


async def test_polling_follows_the_source(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with rig(tmp_path, "model_control: poll") as r:
        await r.start()
        old = r.catalog.resolve("a", None)
        await r.repository.poll()
        assert len(r.loaded) == 2  # nothing has changed
        r.write("c")
        r.write("a", b"changed")
        (r.root / "b").rename(tmp_path / "elsewhere")
        await r.repository.poll()
        assert r.states() == {"a/1": "READY", "b/1": "UNAVAILABLE", "c/1": "READY"}
        assert r.catalog.resolve("a", None) is not old
        r.write("a", b"broken")
        caplog.clear()
        assert await r.repository.poll() == ["a"]
        (told,) = [text for text in caplog.messages if "refuses it" in text]
        assert told.startswith(
            "model a has changed but stays as it was: failed to load 'a': version 1 is at UNAVAILABLE"
        )
        assert r.states()["a/1"] == "READY"
        tried = len(r.loaded)
        await r.repository.poll()
        assert len(r.loaded) == tried  # not again before the files change
        r.write("a", b"fine", version="2")
        await r.repository.poll()
        assert r.catalog.ready_versions("a") == ["2"]


@pytest.mark.parametrize("mode", ["none", "poll"])
async def test_another_configuration_takes_over_and_a_bad_one_changes_nothing(tmp_path: Path, mode: str) -> None:
    async with rig(tmp_path, f"model_control: {mode}") as r:
        await r.start()
        steady = r.catalog.resolve("b", None)
        file = tmp_path / "other.yaml"
        (tmp_path / "more" / "c" / "1").mkdir(parents=True)
        (tmp_path / "more" / "c" / "1" / "model.onnx").write_bytes(b"fine")
        (tmp_path / "bad" / "x").mkdir(parents=True)
        (tmp_path / "bad" / "x" / "config.pbtxt").write_text("max_batch_size: 4")
        file.write_text(f"models: [{{source: {r.root}/b}}, {{source: {tmp_path}/bad}}]")
        with pytest.raises(ConfigError, match="has no version directory"):
            await r.repository.reload(load_config(file, {}, {}))
        await r.repository.poll()
        assert r.states() == {"a/1": "READY", "b/1": "READY"}
        assert len(r.loaded) == 2
        file.write_text(f"models: [{{source: {r.root}, name: a, max_batch_size: 5}}, {{source: {tmp_path}/more}}]")
        await r.repository.reload(load_config(file, {}, {}))
        assert r.states() == {"a/1": "READY", "b/1": "UNAVAILABLE", "c/1": "READY"}
        assert r.limit("a") == 5
        file.write_text(f"models: [{{source: {r.root}}}, {{source: {tmp_path}/more}}]")
        await r.repository.reload(load_config(file, {}, {}))
        assert set(r.states().values()) == {"READY"}
        assert r.catalog.resolve("b", None) is not steady
        loads = len(r.loaded)
        await r.repository.reload(load_config(file, {}, {}))
        assert len(r.loaded) == loads


async def test_with_explicit_control_another_configuration_only_says_where_to_look(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        file = tmp_path / "other.yaml"
        file.write_text(f"models: [{{source: {r.root}/b}}]")
        with pytest.raises(NotReady):
            await r.repository.reload(load_config(file, {}, {}))
        await r.start()
        await r.repository.load("a", {})
        await r.repository.reload(load_config(file, {}, {}))
        assert r.states() == {"a/1": "READY"}
        assert "failed to poll" in str(await refusal(r.repository.load("a", {})))
        await r.repository.load("b", {})
        assert r.states() == {"a/1": "READY", "b/1": "READY"}


async def test_an_ensemble_and_its_step_may_arrive_together(tmp_path: Path) -> None:
    async with rig(tmp_path, "model_control: poll", "b") as r:
        await r.start()
        r.write("z")
        r.ensemble("e", "z")
        await r.repository.poll()
        assert r.states() == {"b/1": "READY", "e/1": "READY", "z/1": "READY"}


async def test_a_signal_tries_again_what_could_not_be_loaded_and_says_so_as_long_as_it_cannot(tmp_path: Path) -> None:
    async with rig(tmp_path, "model_control: none") as r:
        await r.start()
        r.write("a", b"broken")
        assert await r.repository.reload(r.config) == ["a"]
        assert await r.repository.reload(r.config) == ["a"], "nothing changed, and it still does not serve"
        assert await r.repository.poll() == [], "only a signal tries again what did not change"
        loads = len(r.loaded)
        r.write("a", b"fine, and new")
        assert await r.repository.reload(r.config) == []
        assert await r.repository.reload(r.config) == []
        assert len(r.loaded) == loads + 1
