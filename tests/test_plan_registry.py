"""From a reference to a version that is loaded: real onnxruntime workers are not needed, a registry is scripted."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway import app_registries, plan, plan_registry
from gateway.catalog import Catalog
from gateway.config import Config, ModelEntry, Server, load
from gateway.core.batchability import SignatureTensor
from gateway.core.model import Artifact
from gateway.core.tensor import DATATYPE
from gateway.errors import LoadFailed, SourceError, SourceUnavailable
from gateway.loading import LoadedModel
from gateway.management_repository import Repository
from gateway.plan_registry import RegisteredModels
from gateway.provenance.manifest import manifest
from gateway.registry.cache import Cache
from gateway.registry.lock import LockFile
from gateway.registry.resolver import Resolved, Told, untold
from gateway.registry.sources import Registries
from gateway.releases_sources import following
from tests.registry.test_sources import CHAMPION, Registry

MLMODEL = """\
flavors: {onnx: {data: model.onnx}}
signature:
  inputs: '[{"type": "tensor", "name": "x", "tensor-spec": {"dtype": "float64", "shape": [-1, 4]}}]'
"""
X = SignatureTensor("x", DATATYPE["FP32"], (None, 4))


class Described(Registry):
    """Versions with an MLmodel file beside the model."""

    def fetch(self, resolved: Resolved, into: Path, told: Told = untold) -> None:
        super().fetch(resolved, into, told)
        (into / "MLmodel").write_text(MLMODEL)


async def loads(artifact: Artifact, settings: object) -> LoadedModel:
    return cast("LoadedModel", SimpleNamespace(inputs=[X], outputs=[X]))


@pytest.fixture
def registry() -> Described:
    return Described()


@pytest.fixture
def registered(registry: Described, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RegisteredModels:
    made = Registries(
        {"models": registry}, Cache(tmp_path / "cache"), LockFile(tmp_path / "models.lock"), sleep=lambda s: None
    )
    monkeypatch.setattr(plan_registry, "registries_of", lambda config: made)
    return RegisteredModels(configured(), loads)


def configured(**entry: Any) -> Config:
    config = load(None, {}, {"MLFLOW_TRACKING_URI": "http://h"}).with_sources([CHAMPION])
    (made,) = config.models
    return Config(
        registries=config.registries, models=(made.model_copy(update=entry),), environ=config.environ, base=Path()
    )


async def served(registered: RegisteredModels) -> Any:
    (wanted,) = registered.wanted("digits")
    artifact, _ = wanted.read()
    await wanted.load(artifact)
    assert wanted.confirm is not None
    wanted.confirm("", "")
    return wanted, artifact


async def test_a_reference_becomes_a_version_with_its_facts(registered: RegisteredModels) -> None:
    wanted, artifact = await served(registered)
    assert (wanted.name, wanted.version, wanted.identity, wanted.uri) == ("digits", "1", "m-1", "models:/digits/1")
    assert (artifact.model, artifact.model_file, artifact.source) == (b"one", "model.onnx", "models:/digits/1")
    facts = wanted.facts()
    assert (facts["reference"], facts["run_id"], facts["git_commit"]) == (CHAMPION, "run-1", None)
    assert facts["warnings"] == ["the signature in MLflow says the input 'x' is FP64, the file says FP32"]
    assert registered.registries.lock.read()[CHAMPION].digest == artifact.digest


async def test_its_manifest_says_what_is_unknown_and_lets_nobody_override_the_registry(
    registered: RegisteredModels,
) -> None:
    wanted, artifact = await served(registered)
    document = manifest(artifact, {}, None, wanted.facts())
    assert (document["run_id"], document["immutable_id"], document["source"]) == ("run-1", "m-1", "models:/digits/1")
    assert set(document["unknown"]) == {"created_at", "created_by", "datasets", "experiment", "git_commit"}


async def test_a_pin_is_the_failed_load_of_the_version(
    registry: Described, tmp_path: Path, registered: RegisteredModels
) -> None:
    registered.reload(configured(digest="sha256:" + "0" * 64))
    (wanted,) = registered.wanted("digits")
    with pytest.raises(SourceError, match="but the configuration pins sha256:0000"):
        wanted.read()
    assert registered.registries.cache.digests() == []


async def test_what_was_refused_is_fetched_again_when_an_operator_insists_or_reloads(
    registry: Described, registered: RegisteredModels
) -> None:
    pinned = configured(digest="sha256:" + "0" * 64)
    registered.reload(pinned)
    followed = following(pinned, loads, "digits", registered)

    def refused() -> int:
        (wanted,) = registered.wanted("digits")
        with pytest.raises(SourceError, match="but the configuration pins"):
            wanted.read()
        return registry.fetched

    assert [refused(), refused()] == [1, 1]
    followed.forget()
    assert [refused(), refused()] == [2, 2]
    registered.reload(pinned)
    assert refused() == 3


async def test_nothing_is_fetched_before_it_is_read_and_progress_is_told(
    registry: Described, registered: RegisteredModels
) -> None:
    seen: list[tuple[object, ...]] = []
    registered.told = lambda *at: seen.append(at)
    (wanted,) = registered.wanted("digits")
    assert registry.fetched == 0
    wanted.read()
    assert seen == [("digits", 3, 3)]
    wanted.read()
    assert registry.fetched == 1


async def test_a_registry_that_is_down_and_one_that_never_answered(
    registry: Described, registered: RegisteredModels
) -> None:
    registry.down()
    with pytest.raises(SourceUnavailable):
        registered.wanted("digits")
    registry.trouble = None
    await served(registered)
    registry.down()
    (wanted,) = registered.wanted("digits")
    assert "as it did last: refuses connections" in wanted.stale
    assert wanted.read()[0].model == b"one"
    assert wanted.facts is not None
    assert any("did not answer" in note for note in wanted.facts()["notes"])


async def test_files_that_change_while_they_are_read_are_not_served(
    registered: RegisteredModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = plan.read_model

    def changed(path: Path, *rest: Any) -> Any:
        (path / "model.onnx").chmod(0o644)
        (path / "model.onnx").write_bytes(b"evil")
        return real(path, *rest)

    monkeypatch.setattr(plan, "read_model", changed)
    (wanted,) = registered.wanted("digits")
    with pytest.raises(SourceUnavailable, match="changed in the cache while they were read"):
        wanted.read()
    assert registered.registries.cache.digests() == []


async def test_what_is_loaded_at_start_and_what_on_request(registry: Described, registered: RegisteredModels) -> None:
    config = replace(configured(), server=Server(model_control="explicit", load_models=("digits",)))
    repository = Repository(config, Catalog(), loads, registered=registered)
    assert repository.initial() == []
    (wanted,) = await repository.initial_registered()
    assert (wanted.name, wanted.version) == ("digits", "1")
    assert await repository.initial_registered() == [], "once"
    idle = Repository(replace(config, server=Server(model_control="explicit")), Catalog(), loads, registered=registered)
    assert idle.initial() == []
    assert await idle.initial_registered() == []
    assert idle.loadable() == ["digits"]


async def test_every_reference_that_cannot_be_resolved_is_told(
    registry: Described, registered: RegisteredModels
) -> None:
    registered.reload(replace(configured(), models=(*configured().models, ModelEntry(source="models:/b/9"))))
    repository = Repository(configured(), Catalog(), loads, registered=registered)
    repository.initial()
    registry.versions.clear()
    with pytest.raises(LoadFailed, match=r"model 'digits': there is no version 1\nmodel 'b': there is no version 9"):
        await repository.initial_registered()


def test_what_makes_it_another_model(registered: RegisteredModels) -> None:
    before = registered.settings()
    assert set(before) == {"digits"}
    registered.reload(configured())
    assert registered.settings() == before
    registered.reload(configured(instances=1))
    assert registered.settings() != before
    assert registered.wanted("unknown") == []


async def test_metrics(registry: Described, registered: RegisteredModels) -> None:
    await served(registered)
    lines = "".join(line for family in app_registries.families(registered) for line in family.lines)
    assert 'gateway_registry_requests_total{outcome="ok",registry="mlflow"} 2\n' in lines
    assert 'gateway_registry_stale{model="digits"} 0\n' in lines
    assert f"gateway_model_cache_fetched_bytes_total {3 + len(MLMODEL)}\n" in lines
    registry.down()
    registered.wanted("digits")
    lines = "".join(line for family in app_registries.families(registered) for line in family.lines)
    assert 'gateway_registry_requests_total{outcome="unavailable",registry="mlflow"} 1\n' in lines
    assert 'gateway_registry_stale{model="digits"} 1\n' in lines


async def test_the_cache_is_kept_small_but_for_what_is_needed(
    registry: Described, registered: RegisteredModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first = await served(registered)
    registry.champion = "2"
    _, second = await served(registered)
    registered.registries._keep_versions = 1
    looked = asyncio.Event()
    logged: list[set[str]] = [{first.digest}]
    monkeypatch.setattr(app_registries, "COLLECT_S", 0.0)
    monkeypatch.setattr(registered.registries, "collect", _told(registered.registries.collect, looked))
    keeping = asyncio.ensure_future(app_registries.keep_cache_small(registered, Catalog(), lambda: logged[0]))
    await looked.wait()
    assert set(registered.registries.cache.digests()) == {first.digest, second.digest}, "the log refers to it"
    logged[0] = set()
    async with asyncio.timeout(30):
        while registered.registries.cache.digests() != [second.digest]:
            looked.clear()
            await looked.wait()
    keeping.cancel()


def _told(collect: Any, looked: asyncio.Event) -> Any:
    loop = asyncio.get_running_loop()

    def wrapped(keep: Sequence[str]) -> Any:
        gone = collect(keep)
        loop.call_soon_threadsafe(looked.set)
        return gone

    return wrapped
