"""The content-addressed cache: what it gives is what its name says, whatever happened to the disk or to a process."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.errors import SourceError, SourceUnavailable
from gateway.registry import cache as module
from gateway.registry import cache_incoming
from gateway.registry.cache import Cache, Cached
from gateway.registry.digest import read_artifact
from gateway.registry.resolver import Dataset, Lineage, Resolved
from tests.live.gateway_process import until

LINEAGE = Lineage(
    run_id="r1", git_commit="c1", datasets=(Dataset("train", "abcd", "weak", "s", "training"),), tags=(("a", "b"),)
)
R1 = Resolved("models:/digits@champion", "models:/digits/1", "m-1", "1", True, "http://h", LINEAGE)
R2 = Resolved("models:/digits@champion", "models:/digits/2", "m-2", "2", True, "http://h")


def writes(**files: bytes) -> Callable[[Path], None]:
    def fetch(into: Path) -> None:
        for name, content in files.items():
            path = into / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)

    return fetch


def never(into: Path) -> None:
    raise AssertionError("nothing had to be fetched")


def anything(digest: str) -> None:
    """Every digest will do."""


def put(cache: Cache, resolved: Resolved = R1, **files: bytes) -> Cached:
    return cache.obtain(resolved, None, writes(**(files or {"model": b"one"})), anything)


def left_overs(cache: Cache) -> list[str]:
    return [path.name for path in (cache.directory / "incoming").iterdir() if path.suffix != ".turn"]


def make_writable(path: Path) -> None:
    path.parent.chmod(0o755)
    path.chmod(0o644)


def test_what_was_fetched_lies_under_its_digest_read_only_and_is_found_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    got = put(cache, model=b"one", sub__data=b"two")
    assert got.digest == read_artifact(got.path, "", "", "").digest
    assert got.path == tmp_path / "sha256" / got.digest.removeprefix("sha256:")
    assert not got.hit
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in [got.path, *got.path.rglob("*")]}
    assert modes == {got.path.name: 0o555, "model": 0o444, "sub": 0o555, "data": 0o444}
    again = Cache(tmp_path).obtain(R1, None, never, anything)
    assert (again.digest, again.path, again.hit, again.fetched_at) == (got.digest, got.path, True, got.fetched_at)
    assert left_overs(cache) == []
    assert cache.statistics().fetched_bytes == 6


def test_where_it_came_from_is_remembered_in_full(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    digest = put(cache).digest
    (origin,) = cache.origins(digest)
    assert origin.resolved(R1.reference, mutable=True) == R1
    put(cache, R2)  # the same files under another version
    assert [o.uri for o in cache.origins(digest)] == ["models:/digits/2", "models:/digits/1"]
    assert cache.known(R1) == cache.known(R2) == digest


def test_the_same_id_in_another_registry_is_another_thing(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    put(cache)
    elsewhere = Resolved(R1.reference, R1.uri, R1.immutable_id, "1", True, "http://other")
    assert cache.known(elsewhere) is None
    assert cache.obtain(elsewhere, None, writes(model=b"different"), anything).digest != cache.known(R1)


def test_files_that_were_changed_are_never_given_but_fetched_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(tmp_path)
    got = put(cache)
    make_writable(got.path / "model")
    (got.path / "model").write_bytes(b"evil")
    assert Cache(tmp_path).obtain(R1, None, writes(model=b"one"), anything).digest == got.digest
    assert (got.path / "model").read_bytes() == b"one"
    assert "are not what they were" in caplog.text


@pytest.mark.parametrize("damage", ["added", "removed", "linked", "emptied"])
def test_every_kind_of_change_is_seen(tmp_path: Path, damage: str) -> None:
    cache = Cache(tmp_path)
    got = put(cache, model=b"one", other=b"two")
    got.path.chmod(0o755)
    if damage == "added":
        (got.path / "more").write_bytes(b"x")
    else:
        (got.path / "other").unlink()
    if damage == "linked":
        (got.path / "other").symlink_to("/etc/hostname")
    if damage == "emptied":
        (got.path / "model").unlink()
    assert cache.open(got.digest) is None
    assert not got.path.exists()
    assert cache.statistics().damaged == 1


def test_changed_files_are_not_served_even_if_nobody_can_be_asked(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    got = put(cache)
    make_writable(got.path / "model")
    (got.path / "model").write_bytes(b"evil")

    def down(into: Path) -> None:
        raise SourceUnavailable("down")

    with pytest.raises(SourceUnavailable, match="down"):
        cache.obtain(R1, got.digest, down, anything)


def test_what_must_not_be_served_is_not_taken_in(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def refuse(digest: str) -> None:
        raise SourceError(f"{digest} is not the one")

    with pytest.raises(SourceError, match="is not the one"):
        cache.obtain(R1, None, writes(model=b"one"), refuse)
    assert cache.digests() == []
    assert left_overs(cache) == []


def test_what_must_not_be_served_is_not_given_out_of_the_cache_either(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    digest = put(cache).digest

    def refuse(found: str) -> None:
        assert found == digest
        raise SourceError("it is pinned to another digest")

    for known in (None, digest):
        with pytest.raises(SourceError, match="pinned to another"):
            cache.obtain(R1, known, never, refuse)
    assert cache.statistics().hits == 0


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    sync, move = os.fsync, cache_incoming.move

    def noted(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    def moved(directory: Path, target: Path) -> None:
        assert {"model", "data", "sub", directory.name} <= set(synced)
        synced.clear()
        move(directory, target)
        assert synced == ["sha256"], "the name itself is on the disk too"

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(module, "move", moved)
    put(Cache(tmp_path), model=b"one", sub__data=b"two")


@pytest.mark.parametrize("name", ["model", "other"])
def test_files_are_what_their_registry_states(tmp_path: Path, name: str) -> None:
    right = replace(R1, expected_sha256={"model": hashlib.sha256(b"one").hexdigest()})
    wrong = replace(R2, expected_sha256={name: "0" * 64})
    assert put(Cache(tmp_path / "a"), right).digest
    with pytest.raises(SourceError, match=f"{name} has SHA-256 .*, its registry states 0000"):
        put(Cache(tmp_path / "b"), wrong)
    assert Cache(tmp_path / "b").digests() == []


@pytest.mark.parametrize(
    ("fetch", "said"),
    [
        (lambda into: None, "has no files"),
        (lambda into: (into / "link").symlink_to("/etc/passwd"), "leaves the version directory"),
        (lambda into: os.mkfifo(into / "pipe"), "neither a file nor a directory"),
    ],
)
def test_what_is_no_version_is_refused(tmp_path: Path, fetch: Callable[[Path], None], said: str) -> None:
    with pytest.raises(SourceError, match=said):
        Cache(tmp_path).obtain(R1, None, fetch, anything)
    assert Cache(tmp_path).digests() == []


def test_a_link_inside_is_refused_too(tmp_path: Path) -> None:
    def fetch(into: Path) -> None:
        (into / "model").write_bytes(b"one")
        (into / "link").symlink_to("model")

    with pytest.raises(SourceError, match="only files are taken"):
        Cache(tmp_path).obtain(R1, None, fetch, anything)
    assert Cache(tmp_path).digests() == []


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    def full(into: Path) -> None:
        (into / "model").write_bytes(b"half")
        raise OSError(28, "No space left on device", str(into / "model"))

    with pytest.raises(SourceUnavailable, match=r"No space left on device; make room") as refused:
        Cache(tmp_path).obtain(R1, None, full, anything)
    assert not refused.value.soon
    assert Cache(tmp_path).digests() == []
    assert left_overs(Cache(tmp_path)) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    def full(into: Path) -> None:
        with Path("/dev/full").open("wb", buffering=0) as stream:
            stream.write(b"x")

    with pytest.raises(SourceUnavailable, match="No space left"):
        Cache(tmp_path).obtain(R1, None, full, anything)


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SourceUnavailable, match=r"registries\.cache"):
        Cache(tmp_path / "file").obtain(R1, None, writes(model=b"x"), anything)


FETCHES_FOR_EVER = """
import sys, time
from pathlib import Path
from gateway.registry.cache import Cache
from gateway.registry.resolver import Resolved

def fetch(into):
    (into / "model").write_bytes(b"half of a mod")
    print("half", flush=True)
    time.sleep(600)

resolved = Resolved("r", "models:/digits/1", "m-1", "1", True, "http://h")
Cache(Path(sys.argv[1])).obtain(resolved, None, fetch, lambda digest: None)
"""


@contextlib.contextmanager
def fetching_process(directory: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", FETCHES_FOR_EVER, str(directory)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "half\n"
            yield process
        finally:
            process.kill()


def test_a_process_killed_in_the_middle_leaves_nothing_that_is_served(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with fetching_process(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert len(left_overs(cache)) == 2, "its half and its lock"
    assert cache.digests() == []
    got = put(cache)
    assert (got.path / "model").read_bytes() == b"one"
    assert left_overs(cache) == [], "the next fetch has cleaned up"


def test_what_another_process_is_writing_is_not_swept_away(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with fetching_process(tmp_path):
        put(cache, R2)
        assert len(left_overs(cache)) == 2


def test_only_one_process_fetches_a_version_and_the_other_waits(tmp_path: Path) -> None:
    with fetching_process(tmp_path), pytest.raises(SourceUnavailable, match="another process is still fetching"):
        Cache(tmp_path, turn_s=0.0).obtain(R1, None, never, anything)
    assert put(Cache(tmp_path)).digest, "its death gives the turn back"


def test_many_processes_that_want_the_same_fetch_it_once(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from gateway.registry.cache import Cache
from gateway.registry.resolver import Resolved

def fetch(into):
    with open(sys.argv[2], "a") as counter:
        counter.write("fetched\\n")
    (into / "model").write_bytes(b"one" * 100_000)

got = Cache(Path(sys.argv[1])).obtain(Resolved("r", "u", "m-1", "1", True, "h"), None, fetch, lambda d: None)
print(got.digest)
"""
    counter = tmp_path / "counter"
    command = [sys.executable, "-c", script, str(tmp_path / "cache"), str(counter)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = {process.communicate(timeout=60)[0] for process in processes}
    assert len(outputs) == 1
    assert counter.read_text() == "fetched\n"


def test_the_same_files_from_two_places_are_kept_once(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert put(cache, R1).digest == put(cache, R2).digest
    assert len(cache.digests()) == 1


def test_a_record_that_is_broken_is_as_if_it_was_not_there(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    got = put(cache)
    for text in (b"{", b"[]", b'{"origins": [{"reference": 1}]}', b'{"origins": 3}', b"\xff"):
        got.path.with_suffix(".json").write_bytes(text)
        assert cache.origins(got.digest) == []
        assert cache.known(R1) is None
    assert put(cache).digest == got.digest
    assert cache.known(R1) == got.digest


def test_the_newest_of_each_reference_stay_and_what_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path)
    times = iter(range(100))
    monkeypatch.setattr(module, "_now", lambda: f"2026-01-01T00:00:{next(times):02d}.000Z")
    digests = []
    for number in range(5):
        resolved = Resolved("models:/digits@champion", f"models:/digits/{number}", f"m-{number}", "1", True, "h")
        digests.append(put(cache, resolved, model=b"%d" % number).digest)
    other = put(cache, Resolved("models:/other@x", "models:/other/1", "o-1", "1", True, "h"), model=b"other").digest
    gone = cache.collect({digests[0]}, versions=2)
    assert sorted(gone) == sorted([digests[1], digests[2]])
    assert set(cache.digests()) == {digests[0], digests[3], digests[4], other}
    assert not cache.path(digests[1]).with_suffix(".json").exists()
    assert left_overs(cache) == []


def test_what_another_process_collects_while_it_is_read_was_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path)
    digest = put(cache).digest

    def collected_meanwhile(path: Path, *arguments: object, **more: object) -> object:
        assert Cache(tmp_path).collect((), 0) == [digest]
        return read_artifact(path, "", "", model_file="")

    monkeypatch.setattr(module, "read_artifact", collected_meanwhile)
    assert cache.open(digest) is None
    assert cache.statistics().damaged == 0


def test_two_that_collect_at_the_same_time_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path)
    digest = put(cache).digest
    seen = cache.digests()
    monkeypatch.setattr(cache, "digests", lambda: seen)  # both have looked before either removes
    assert Cache(tmp_path).collect((), 0) == [digest]
    cache.collect((), 0)
    assert left_overs(cache) == []


def test_collecting_is_harmless_where_there_is_no_cache(tmp_path: Path) -> None:
    assert Cache(tmp_path / "none").collect((), 1) == []
    assert repr(Cache(tmp_path)) == f"<Cache {tmp_path}>"


def test_waiting_is_over_when_the_other_one_is_done(tmp_path: Path) -> None:
    with fetching_process(tmp_path) as process:
        waiting = subprocess.Popen(
            [sys.executable, "-c", FETCHES_FOR_EVER.replace("time.sleep(600)", "pass"), str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
        )
        process.kill()
        process.wait(30)
        assert waiting.communicate(timeout=60)[0] == "half\n"
    until(lambda: len(Cache(tmp_path).digests()) == 1, 30, "it did not take its turn")
