"""Against a small server with the Hub's API, which huggingface_hub itself can read too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.errors import SourceError, SourceUnavailable
from gateway.registry.huggingface import HUB, HuggingFaceResolver, HuggingFaceSettings
from gateway.registry.resolver import Bounds, Resolved
from gateway.registry.web import Answer, Web
from tests.registry.hub_server import Hub, HubServer

FILES = {
    "README.md": b"a model",
    "onnx/model.onnx": b"graph" * 10,
    "onnx/model.onnx_data": bytes(range(256)) * 20,
    "onnx/model_fp16.onnx": b"half" * 10,
    "onnx/nested dir/größe.json": b"{}",
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub()
    with HubServer(made):
        yield made


def resolver(hub: Hub, bounds: Bounds | None = None, token: str = "", **more: object) -> HuggingFaceResolver:
    settings = HuggingFaceSettings(hub.url, lambda: token, **more)  # type: ignore[arg-type]
    return HuggingFaceResolver(settings, bounds or Bounds())


def fetched(of: HuggingFaceResolver, resolved: Resolved, into: Path) -> dict[str, bytes]:
    into.mkdir()
    of.fetch(resolved, into)
    return {path.relative_to(into).as_posix(): path.read_bytes() for path in into.rglob("*") if path.is_file()}


def test_the_server_is_one_that_huggingface_hub_can_read(hub: Hub, tmp_path: Path) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="needs pip install huggingface_hub")
    commit = hub.commit(FILES)
    api = huggingface_hub.HfApi(endpoint=hub.url, token=False)
    assert api.model_info("acme/digits").sha == commit
    listed = api.list_repo_tree("acme/digits", recursive=True)
    assert sorted(f.path for f in listed if hasattr(f, "size") and hasattr(f, "lfs")) == sorted(FILES)
    with HubServer(Hub(commits=hub.commits)) as store:
        hub.store = store.host
        path = api.hf_hub_download("acme/digits", "onnx/model.onnx_data", cache_dir=tmp_path)
    assert Path(path).read_bytes() == FILES["onnx/model.onnx_data"]


def test_a_branch_moves_and_a_commit_does_not(hub: Hub, tmp_path: Path) -> None:
    first = hub.commit(FILES)
    mine = resolver(hub)
    resolved = mine.resolve("hf://acme/digits@main/onnx")
    assert resolved.uri == f"hf://acme/digits@{first}/onnx"
    assert (resolved.mutable, resolved.version, resolved.registry) == (True, "1", hub.url)
    assert resolved.lineage.git_commit == first
    assert ("onnx", "") in resolved.lineage.tags
    second = hub.commit({"onnx/model.onnx": b"newer"})
    assert mine.resolve("hf://acme/digits/onnx").uri == f"hf://acme/digits@{second}/onnx"
    pinned = mine.resolve(f"hf://acme/digits@{first}/onnx")
    assert not pinned.mutable
    wanted = {name.removeprefix("onnx/"): content for name, content in FILES.items() if name.startswith("onnx/")}
    assert fetched(mine, pinned, tmp_path / "1") == wanted
    assert fetched(mine, mine.resolve(f"hf://acme/digits@{first}"), tmp_path / "all") == FILES


def test_one_file_brings_its_external_data(hub: Hub, tmp_path: Path) -> None:
    hub.commit(FILES)
    mine = resolver(hub)
    told: list[tuple[int, int | None]] = []
    (tmp_path / "a").mkdir()
    mine.fetch(mine.resolve("hf://acme/digits/onnx/model.onnx"), tmp_path / "a", lambda *now: told.append(now))
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"model.onnx", "model.onnx_data"}
    assert told[-1] == (5170, 5170)


def test_the_token_goes_to_the_hub_and_not_to_the_store(hub: Hub, tmp_path: Path) -> None:
    hub.commit(FILES)
    hub.token = "hf_secret"
    store = Hub(commits=hub.commits)
    with HubServer(store) as elsewhere:
        hub.store = elsewhere.host
        mine = resolver(hub, token="hf_secret")
        resolved = mine.resolve("hf://acme/digits")
        with pytest.raises(SourceError, match="does not allow"):
            fetched(mine, resolved, tmp_path / "1")
        allowing = resolver(hub, token="hf_secret", redirects=(elsewhere.host,))
        assert fetched(allowing, resolved, tmp_path / "2") == FILES
    assert [authorization for _, authorization in store.asked] == [""]
    with pytest.raises(SourceUnavailable, match="401") as refused:
        resolver(hub, token="hf_other").resolve("hf://acme/digits")
    assert "hf_other" not in str(refused.value)


@pytest.mark.parametrize("path", ["README.md", "onnx/model.onnx_data"])
def test_bytes_that_are_not_the_commits_are_refused(hub: Hub, tmp_path: Path, path: str) -> None:
    hub.commit({path: FILES[path], "model.onnx": FILES[path]})
    hub.corrupt = FILES[path][:-1] + b"?"
    mine = resolver(hub)
    with pytest.raises(SourceError, match="other bytes"):
        fetched(mine, mine.resolve("hf://acme/digits"), tmp_path / "1")


def test_another_commit_than_was_asked_for_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit(FILES)
    mine = resolver(hub)
    asked = "0" * 40
    said = Answer(200, {}, b'{"sha": "%s"}' % (b"1" * 40), hub.url)
    monkeypatch.setattr(Web, "ask", lambda *_, **__: said)
    with pytest.raises(SourceError, match=f"answered the commit {'1' * 40} when asked for {asked}"):
        mine.resolve(f"hf://acme/digits@{asked}")


@pytest.mark.parametrize(
    ("server", "target", "allowed"),
    [
        (HUB, "https://cdn-lfs.huggingface.co/x", True),
        (HUB, "https://cas-bridge.xethub.hf.co/x", True),
        (HUB, "http://cdn-lfs.huggingface.co/x", False),
        (HUB, "https://nothuggingface.co/x", False),
        (HUB, "https://huggingface.co.evil.net/x", False),
        (HUB, "https://evil.net/.hf.co", False),
        (HUB, "https://cdn.hf.co@evil.net/x", False),
        ("http://mirror:8080", "https://cdn-lfs.huggingface.co/x", False),
        ("http://mirror:8080", "http://mirror:8080/x", True),
        ("http://mirror:8080", "http://mirror/x", False),
        ("http://mirror:8080", "http://store:9000/x", True),
    ],
)
def test_where_files_may_come_from(server: str, target: str, allowed: bool) -> None:
    mine = HuggingFaceResolver(HuggingFaceSettings(server, redirects=("store:9000",)), Bounds())
    assert mine._allowed(target) is allowed


def test_a_repository_without_onnx_is_refused_with_a_hint(hub: Hub, tmp_path: Path) -> None:
    hub.commit({"pytorch_model.pt": b"x", "config.json": b"{}"})
    mine = resolver(hub)
    with pytest.raises(SourceError, match=r"no ONNX model; it holds pytorch_model\.pt.*torch\.onnx\.export"):
        fetched(mine, mine.resolve("hf://acme/digits"), tmp_path / "1")


def test_what_is_not_there(hub: Hub, tmp_path: Path) -> None:
    commit = hub.commit(FILES)
    mine = resolver(hub)
    with pytest.raises(SourceError, match="no 'v9' of a model acme/digits"):
        mine.resolve("hf://acme/digits@v9")
    with pytest.raises(SourceError, match="of a model acme/none"):
        mine.resolve("hf://acme/none")
    with pytest.raises(SourceError, match="no folder 'nowhere'"):
        fetched(mine, mine.resolve(f"hf://acme/digits@{commit}/nowhere"), tmp_path / "1")


def test_bounds_hold_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.commit(FILES)
    for bounds, why in ((Bounds(max_bytes=5000), "max_model_mb"), (Bounds(max_files=4), "more than 4 files")):
        mine = resolver(hub, bounds)
        with pytest.raises(SourceError, match=why):
            mine.fetch(mine.resolve("hf://acme/digits"), tmp_path)
    assert not any("/resolve/" in path for path, _ in hub.asked)


def test_a_path_that_leaves_the_directory_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.commit({"../evil.onnx": b"x"})
    mine = resolver(hub)
    with pytest.raises(SourceError, match="does not name a file below it"):
        mine.fetch(mine.resolve("hf://acme/digits"), tmp_path)
