"""Against moto's S3 API server, which checks neither signatures nor permissions; faults of a store are made by hand."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.errors import SourceError, SourceUnavailable
from gateway.registry.objects import BY_ETAG, BY_VERSION, ObjectResolver, ObjectSettings
from gateway.registry.resolver import Bounds, Resolved
from tests.live.s3_server import ACCESS_KEY, SECRET_KEY, S3Server, s3_server

FILES = {"model.onnx": b"an ONNX model" * 1000, "data/weights.bin": bytes(range(256)) * 10_000}


@pytest.fixture(scope="module")
def store() -> Iterator[S3Server]:
    with s3_server() as running:
        running.bucket("versioned", versioned=True)
        running.bucket("plain-bucket", versioned=False)
        yield running


def settings(store: S3Server) -> ObjectSettings:
    return ObjectSettings(store.endpoint, "us-east-1", lambda: ACCESS_KEY, lambda: SECRET_KEY)


def resolver(store: S3Server, bounds: Bounds | None = None) -> ObjectResolver:
    return ObjectResolver(settings(store), bounds or Bounds())


def fetched(of: ObjectResolver, resolved: Resolved, into: Path) -> dict[str, bytes]:
    into.mkdir()
    of.fetch(resolved, into)
    return {path.relative_to(into).as_posix(): path.read_bytes() for path in into.rglob("*") if path.is_file()}


def from_lock(resolved: Resolved) -> Resolved:
    """What is left of it after a restart."""
    return replace(resolved, private=None)


def upload(store: S3Server, bucket: str, prefix: str, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        store.put(bucket, f"{prefix}/{name}", content)


def test_a_prefix_of_a_versioned_bucket_means_the_same_for_ever(store: S3Server, tmp_path: Path) -> None:
    upload(store, "versioned", "digits/3", FILES)
    store.put("versioned", "digits/3/", b"")  # the marker of a console
    store.put("versioned", "digits/30/model.onnx", b"another model")
    mine = resolver(store)
    first = mine.resolve("s3://versioned/digits/3")
    assert (first.version, first.mutable, first.registry) == ("3", True, store.endpoint)
    assert first.immutable_id.startswith(BY_VERSION)
    assert mine.resolve("s3://versioned/digits/3").immutable_id == first.immutable_id
    store.put("versioned", "digits/3/model.onnx", b"overwritten")
    store.put("versioned", "digits/3/added", b"later")
    second = mine.resolve("s3://versioned/digits/3/")
    assert second.immutable_id != first.immutable_id
    told: list[tuple[int, int | None]] = []
    (tmp_path / "told").mkdir()
    mine.fetch(first, tmp_path / "told", lambda done, total: told.append((done, total)))
    assert told[-1] == (sum(map(len, FILES.values())),) * 2
    assert fetched(mine, from_lock(first), tmp_path / "1") == FILES
    assert fetched(mine, second, tmp_path / "2") == FILES | {"model.onnx": b"overwritten", "added": b"later"}


def test_one_object_and_one_version_of_it(store: S3Server, tmp_path: Path) -> None:
    one, two = (store.put("versioned", "alone/net.onnx", content) for content in (b"one", b"two!"))
    mine = resolver(store)
    latest = mine.resolve("s3://versioned/alone/net.onnx")
    assert latest.uri == f"s3://versioned/alone/net.onnx?versionId={two}"
    assert fetched(mine, from_lock(latest), tmp_path / "2") == {"net.onnx": b"two!"}
    former = mine.resolve(f"s3://versioned/alone/net.onnx?versionId={one}")
    assert (former.mutable, former.uri) == (False, f"s3://versioned/alone/net.onnx?versionId={one}")
    assert fetched(mine, from_lock(former), tmp_path / "1") == {"net.onnx": b"one"}


def test_a_bucket_without_versions_says_so_and_refuses_what_changed(store: S3Server, tmp_path: Path) -> None:
    upload(store, "plain-bucket", "m/1", FILES)
    mine = resolver(store)
    resolved = mine.resolve("s3://plain-bucket/m/1")
    assert resolved.immutable_id.startswith(BY_ETAG)
    assert resolved.uri == "s3://plain-bucket/m/1"
    assert fetched(mine, from_lock(resolved), tmp_path / "1") == FILES
    store.put("plain-bucket", "m/1/model.onnx", FILES["model.onnx"][::-1])
    with pytest.raises(SourceUnavailable, match="changed while it was fetched"):
        fetched(mine, resolved, tmp_path / "2")
    with pytest.raises(SourceError, match="is not what it was"):
        fetched(mine, from_lock(resolved), tmp_path / "3")


def test_many_files_do_not_fit_into_a_uri_and_are_pinned_all_the_same(store: S3Server, tmp_path: Path) -> None:
    files = {f"part-{n:03}.bin": bytes([n]) for n in range(60)}
    upload(store, "versioned", "many", files)
    mine = resolver(store)
    resolved = mine.resolve("s3://versioned/many")
    assert resolved.uri == "s3://versioned/many"
    assert fetched(mine, from_lock(resolved), tmp_path / "1") == files
    store.put("versioned", "many/part-007.bin", b"x")
    assert fetched(mine, resolved, tmp_path / "2") == files
    with pytest.raises(SourceError, match="is not what it was"):
        fetched(mine, from_lock(resolved), tmp_path / "3")


def test_a_stated_digest_is_checked(store: S3Server, tmp_path: Path) -> None:
    right = hashlib.sha256(b"model").hexdigest()
    store.put("versioned", "stated/model.onnx", b"model", sha256=right)
    mine = resolver(store)
    assert fetched(mine, mine.resolve("s3://versioned/stated"), tmp_path / "1") == {"model.onnx": b"model"}
    store.put("versioned", "stated/model.onnx", b"other", sha256=right)
    with pytest.raises(SourceError, match=f"but its metadata state {right}"):
        fetched(mine, mine.resolve("s3://versioned/stated"), tmp_path / "2")


def test_bounds_hold(store: S3Server, tmp_path: Path) -> None:
    upload(store, "versioned", "big", {str(n): bytes(1000) for n in range(4)})
    with pytest.raises(SourceError, match="max_model_mb"):
        resolver(store, Bounds(max_bytes=3999)).resolve("s3://versioned/big")
    with pytest.raises(SourceError, match="more than 3 objects"):
        resolver(store, Bounds(max_files=3)).resolve("s3://versioned/big")


def test_what_is_not_there_is_final(store: S3Server) -> None:
    for reference, why in {
        "s3://versioned/none": "nothing lies at",
        "s3://no-such-bucket/digits": "no such bucket",
    }.items():
        with pytest.raises(SourceError, match=why) as caught:
            resolver(store).resolve(reference)
        assert not isinstance(caught.value, SourceUnavailable)
        assert SECRET_KEY not in str(caught.value)


def test_a_store_that_is_down_may_come_back() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        down = ObjectResolver(ObjectSettings(endpoint, "us-east-1", lambda: "a", lambda: SECRET_KEY), Bounds())
        with pytest.raises(SourceUnavailable, match="cannot be read") as caught:
            down.resolve("s3://bucket/digits")
    assert SECRET_KEY not in str(caught.value)


def test_only_buckets_that_are_named_are_asked(store: S3Server, tmp_path: Path) -> None:
    upload(store, "versioned", "runs/artifacts", FILES)
    open_to_all = resolver(store)
    with pytest.raises(SourceError, match=r"registries\.s3\.buckets"):
        open_to_all.fetch_uri("s3://versioned/runs/artifacts", tmp_path)  # not on a registry's word
    limited = ObjectResolver(replace(settings(store), buckets=("versioned",)), Bounds())
    limited.fetch_uri("s3://versioned/runs/artifacts", tmp_path)
    assert (tmp_path / "data/weights.bin").read_bytes() == FILES["data/weights.bin"]
    with pytest.raises(SourceError, match="not among"):
        limited.resolve("s3://plain-bucket/m/1")
    with pytest.raises(SourceError, match="points to"):
        limited.fetch_uri("s3://versioned/../x", tmp_path)


@pytest.mark.parametrize("pins", ["AAAA", "W10=", "eyJhIjpbMV19", "eyIuLi94IjpbInYiLDFdfQ=="])
def test_pins_that_somebody_changed_are_refused(store: S3Server, tmp_path: Path, pins: str) -> None:
    uri = f"s3://versioned/digits?versions={pins}"
    with pytest.raises(SourceError):
        resolver(store).fetch(Resolved("s3://versioned/digits", uri, "x", "1", mutable=True), tmp_path)
