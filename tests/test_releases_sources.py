"""Directories that are followed, together with everything else that changes what a model serves; the test plays the
worker pool (tests/test_management_repository.py)."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.config import load as load_config
from gateway.core.model import ModelState
from gateway.errors import LoadFailed, SourceUnavailable
from gateway.registry import directory
from gateway.releases import NothingToDo, Releases
from gateway.releases_sources import DirectorySource, files_identity, following, identity_of
from tests.test_management_repository import Rig, rig

FOLLOWED = "poll_interval_s: 3600"


class Following(Rig):
    releases: Releases


@asynccontextmanager
async def followed(
    tmp_path: Path, keys: str = "model_control: none", entry: str = FOLLOWED
) -> AsyncIterator[Following]:
    """Models `a` and `b` serve."""
    async with rig(tmp_path, keys, entry=entry) as r:
        releases = Releases(r.catalog, lambda name: following(r.repository.config, r._load, name))
        r.repository = type(r.repository)(r.config, r.catalog, r._load, None, releases)
        r.__class__ = Following
        assert isinstance(r, Following)
        r.releases = releases
        await r.start()
        await releases.adopt(r.catalog.names(), "start")
        try:
            yield r
        finally:
            await releases.close()


def serving(r: Rig, name: str = "a") -> bytes:
    """Content of the file that was loaded for what the name means now."""
    artifact = r.catalog.resolve(name, None).artifact
    assert artifact is not None
    return next(content for content in (b"fine", b"changed", b"other") if artifact.digest == digest(content))


def digest(content: bytes) -> str:
    line = f"{hashlib.sha256(content).hexdigest()}  model.onnx\n"
    return f"sha256:{hashlib.sha256(line.encode()).hexdigest()}"


async def test_changed_files_are_a_release_and_unchanged_ones_are_not(tmp_path: Path) -> None:
    async with followed(tmp_path) as r:
        assert (await r.releases.refresh("a", "poll")).outcome == "serves"
        assert len(r.loaded) == 2
        r.write("a", b"changed")
        assert (await r.releases.refresh("a", "poll")).outcome == "swapped"
        assert (serving(r), len(r.loaded)) == (b"changed", 3)
        assert [v.role for v in r.catalog.of("a")] == ["champion", "previous"]
        r.write("a", b"fine")
        assert (await r.releases.refresh("a", "poll")).outcome == "swapped"
        assert (serving(r), len(r.loaded)) == (b"fine", 3), "what is kept is not loaded again"


async def test_files_are_hashed_only_where_they_look_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with followed(tmp_path) as r:
        source = DirectorySource(r.config, r._load, "a")
        reads = []
        real = directory.read_version

        def counted(*given: Any) -> Any:
            reads.append(given)
            return real(*given)

        monkeypatch.setattr("gateway.releases_sources.read_version", counted)
        first = source.look()
        assert source.look().identity == first.identity == identity_of(r.catalog.champions("a"))
        assert len(reads) == 1
        r.write("a", b"fine")  # another time, the same content
        assert source.look().identity == first.identity
        (r.root / "a" / "config.pbtxt").write_text("max_batch_size: 4")
        assert source.look().identity != first.identity


def test_an_identity_is_of_versions_and_digests_and_configuration() -> None:
    texts = {
        files_identity({"1": "a", "2": "b"}, ""),
        files_identity({"1": "b", "2": "a"}, ""),
        files_identity({"1": "a"}, ""),
        files_identity({"1": "a", "2": "b"}, "max_batch_size: 4"),
    }
    assert len(texts) == 4
    assert files_identity({"2": "b", "1": "a"}, "") == files_identity({"1": "a", "2": "b"}, "")


async def test_a_new_version_directory_is_a_release(tmp_path: Path) -> None:
    async with followed(tmp_path) as r:
        r.write("a", b"other", version="2")
        assert (await r.releases.refresh("a", "poll")).version == "2"
        assert r.catalog.ready_versions("a") == ["1", "2"]


async def test_files_that_are_gone_change_nothing(tmp_path: Path) -> None:
    async with followed(tmp_path) as r:
        (r.root / "a").rename(tmp_path / "elsewhere")
        with pytest.raises(SourceUnavailable, match="are gone"):
            await r.releases.refresh("a", "poll")
        assert serving(r) == b"fine"


async def test_what_is_not_followed_is_not_asked_and_keeps_nothing(tmp_path: Path) -> None:
    async with followed(tmp_path, "model_control: explicit, load_models: ['*']", "instances: 2") as r:
        with pytest.raises(NothingToDo, match="is not followed"):
            await r.releases.refresh("a", "operator")
        r.write("a", b"changed")
        await r.repository.load("a", {})
        assert serving(r) == b"changed"
        with pytest.raises(NothingToDo, match="no former version"):
            await r.releases.rollback("a", "operator")


async def test_what_a_canary_took_the_place_of_can_be_had_back(tmp_path: Path) -> None:
    async with followed(tmp_path, "model_control: none", "instances: 2, name: a") as r:
        text = f"models: [{{source: {r.root}, name: a, canary: {{source: {r.root / 'b'}}}}}]"
        (tmp_path / "canary.yaml").write_text(text)
        assert await r.repository.reload(load_config(tmp_path / "canary.yaml", {}, {})) == []
        async with r.releases.turn("a"):
            wanted = replace(r.catalog.resolve("a", None).wanted, version="2")
            await r.releases.promote("a", await r.catalog.stage([wanted], "canary"), "operator")
        assert r.catalog.resolve("a", None).version == "2"
        await r.releases.rollback("a", "operator")
        assert r.catalog.resolve("a", None).version == "1"


async def test_what_clients_load_can_be_rolled_back_where_that_was_asked_for(tmp_path: Path) -> None:
    async with followed(tmp_path, "model_control: explicit, load_models: ['*']", "keep_previous: 1") as r:
        r.write("a", b"changed")
        await r.repository.load("a", {})
        await r.releases.rollback("a", "operator")
        assert serving(r) == b"fine"


async def test_an_override_is_not_undone_by_following(tmp_path: Path) -> None:
    async with followed(tmp_path, "model_control: explicit, load_models: ['*']") as r:
        await r.repository.load("a", {"config": '{"max_batch_size": 4}'})
        assert (r.limit("a"), r.releases.follows("a")) == (4, False)
        await r.repository.load("a", {})
        assert r.releases.follows("a")


async def test_an_unload_ends_the_following_and_a_load_begins_it_again(tmp_path: Path) -> None:
    async with followed(tmp_path, "model_control: explicit, load_models: ['*']") as r:
        r.write("a", b"changed")
        await r.releases.refresh("a", "poll")
        await r.repository.unload("a")
        assert all(v.state is ModelState.UNAVAILABLE for v in r.catalog.of("a"))
        assert r.catalog.beside("a") == []
        assert not r.releases.follows("a")
        await r.repository.load("a", {})
        assert r.releases.follows("a")
        assert serving(r) == b"changed"


async def test_polling_the_repository_leaves_files_of_followed_models_to_the_following(tmp_path: Path) -> None:
    async with followed(tmp_path, "model_control: poll") as r:
        await r.repository.poll()
        loads = len(r.loaded)
        r.write("a", b"broken")
        assert await r.repository.poll() == []
        assert len(r.loaded) == loads
        with pytest.raises(LoadFailed, match="refuses it"):
            await r.releases.refresh("a", "poll")
        r.write("c")
        await r.repository.poll()
        assert r.releases.follows("c")
        (r.root / "c").rename(tmp_path / "elsewhere")
        await r.repository.poll()
        assert not r.releases.follows("c")


async def test_a_changed_entry_is_loaded_by_a_reload_although_it_is_followed(tmp_path: Path) -> None:
    async with followed(tmp_path, "model_control: none") as r:
        text = (tmp_path / "gateway.yaml").read_text().replace("3600", "3600, max_batch_size: 8")
        (tmp_path / "gateway.yaml").write_text(text)
        config = type(r)(r.root, "model_control: none", FOLLOWED + ", max_batch_size: 8").config
        assert await r.repository.reload(config) == []
        assert r.limit("a") == 8
        status = r.releases.status("a")
        assert status is not None
        assert [one.by for one in status.history] == ["start", "SIGHUP"]


async def test_changes_of_one_model_come_one_after_the_other(tmp_path: Path) -> None:
    async with followed(tmp_path, "model_control: explicit, load_models: ['*']") as r:
        r.write("a", b"changed")
        r.go = asyncio.Event()
        refreshing = asyncio.create_task(r.releases.refresh("a", "poll"))
        while not r.now:
            await asyncio.sleep(0)
        loading = asyncio.create_task(r.repository.load("a", {}))
        back = asyncio.create_task(r.repository.load("a", {}))
        for _ in range(20):
            await asyncio.sleep(0)
        assert r.now == 1
        r.most_at_once = 0
        r.go.set()
        assert (await refreshing).outcome == "swapped"
        await asyncio.gather(loading, back)
        await r.catalog.freed("a")
        assert r.most_at_once == 1
        assert serving(r) == b"changed"
        assert [v.role for v in r.catalog.of("a")] == ["champion", "previous"]
