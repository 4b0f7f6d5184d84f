"""Which files may serve: pins, the lock, the cache, and what happens when a registry is down or lies."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.errors import ConfigError, SourceError, SourceUnavailable
from gateway.registry.cache import Cache
from gateway.registry.lock import LockFile
from gateway.registry.resolver import Lineage, Resolved, Told, untold
from gateway.registry.sources import ATTEMPTS, MAX_REFUSED, Registries

CHAMPION = "models:/digits@champion"
OTHER = "sha256:" + "0" * 64


class Registry:
    """A registry whose alias moves and whose files change as the test says; fits `Resolver`."""

    scheme = "models"

    def __init__(self) -> None:
        self.versions = {"1": b"one", "2": b"two"}
        self.champion = "1"
        self.trouble: SourceError | None = None
        self.failures = 0
        self.asked = self.fetched = 0
        self.url = "http://h"

    def registry_of(self, reference: str) -> str:
        return self.url

    def resolve(self, reference: str) -> Resolved:
        self.asked += 1
        self._fail()
        version = self.champion if "@" in reference else reference.rpartition("/")[2]
        if version not in self.versions:
            raise SourceError(f"there is no version {version}")
        lineage = Lineage(run_id=f"run-{version}")
        return Resolved(
            reference, f"models:/digits/{version}", f"m-{version}", version, "@" in reference, self.url, lineage
        )

    def fetch(self, resolved: Resolved, into: Path, told: Told = untold) -> None:
        self.fetched += 1
        assert list(into.iterdir()) == []
        (into / "model.onnx").write_bytes(self.versions[resolved.uri.rpartition("/")[2]])
        self._fail()
        told(3, 3)

    def _fail(self) -> None:
        if self.trouble is not None and self.failures:
            self.failures -= 1
            raise self.trouble

    def down(self, times: int = 10**9, text: str = "refuses connections") -> None:
        self.trouble, self.failures = SourceUnavailable(text), times


@pytest.fixture
def registry() -> Registry:
    return Registry()


@pytest.fixture
def registries(registry: Registry, tmp_path: Path) -> Registries:
    return made(registry, tmp_path)


def made(registry: Registry, tmp_path: Path, *, locked: bool = False) -> Registries:
    cache, lock = Cache(tmp_path / "cache"), LockFile(tmp_path / "models.lock")
    return Registries(
        {"models": registry}, cache, lock, locked=locked, wall_clock=lambda: 1_800_000_000.0, sleep=lambda s: None
    )


def serve(registries: Registries, reference: str = CHAMPION, pin: str | None = None) -> str:
    """As a gateway does; the digest that served."""
    resolved = registries.settle(reference).resolved
    cached = registries.obtain(resolved, pin)
    registries.confirm(resolved, cached.digest)
    return cached.digest


def test_what_serves_is_locked_and_comes_from_the_cache_next_time(registry: Registry, registries: Registries) -> None:
    digest = serve(registries)
    entry = registries.lock.read()[CHAMPION]
    assert (entry.uri, entry.immutable_id, entry.version, entry.digest) == ("models:/digits/1", "m-1", "1", digest)
    assert entry.resolved_at == "2027-01-15T08:00:00Z"
    assert serve(registries) == digest
    assert registry.fetched == 1


def test_a_pin_refuses_with_both_digests_before_anything_is_taken_in(registries: Registries) -> None:
    resolved = registries.resolve(CHAMPION)
    with pytest.raises(SourceError, match=rf"have digest sha256:[0-9a-f]{{64}}, but the configuration pins {OTHER}"):
        registries.obtain(resolved, OTHER)
    assert registries.cache.digests() == []
    assert registries.lock.read() == {}


def test_a_pin_also_holds_for_what_is_in_the_cache(registries: Registries) -> None:
    digest = serve(registries)
    with pytest.raises(SourceError, match=f"{digest}, but the configuration pins {OTHER}"):
        registries.obtain(registries.resolve(CHAMPION), OTHER)


def test_a_pin_is_not_met_by_the_files_of_another_version(registry: Registry, registries: Registries) -> None:
    digest = serve(registries, pin=None)
    registry.champion = "2"
    moved = registries.resolve(CHAMPION)
    with pytest.raises(SourceError, match=rf"models:/digits/2 have digest .*, but the configuration pins {digest}"):
        registries.obtain(moved, digest)
    assert [origin.version for origin in registries.cache.origins(digest)] == ["1"]
    assert serve(registries, "models:/digits/1", digest) == digest


def test_what_a_pin_refused_is_not_fetched_again_until_something_changes(
    registry: Registry, registries: Registries
) -> None:
    said = set()
    for _ in range(3):
        with pytest.raises(SourceError, match="but the configuration pins") as caught:
            serve(registries, pin=OTHER)
        said.add(str(caught.value))
    assert (registry.fetched, len(said)) == (1, 1)
    registry.champion = "2"
    with pytest.raises(SourceError, match="models:/digits/2"):
        serve(registries, pin=OTHER)
    assert registry.fetched == 2
    registry.champion = "1"
    digest = said.pop().partition("have digest ")[2].partition(",")[0]
    assert serve(registries, pin=digest) == digest
    assert registry.fetched == 3


def test_files_that_were_mended_in_their_place_serve_when_somebody_says_so(
    registry: Registry, registries: Registries
) -> None:
    digest = serve(registries)
    registries.cache.discard(digest, "a test wants it fetched")
    registry.versions["1"] = b"overwritten"
    for _ in range(2):
        with pytest.raises(SourceError, match="Somebody changed what should not change"):
            serve(registries)
    assert registry.fetched == 2
    registry.versions["1"] = b"one"
    registries.forget_refused()
    assert serve(registries) == digest


def test_right_files_that_come_into_the_cache_serve_whatever_was_refused(
    registry: Registry, registries: Registries, tmp_path: Path
) -> None:
    digest = serve(registries)
    registries.cache.discard(digest, "a test wants it fetched")
    registry.versions["1"] = b"overwritten"
    with pytest.raises(SourceError, match="Somebody changed"):
        serve(registries)
    registry.versions["1"] = b"one"
    assert serve(made(registry, tmp_path)) == digest
    assert serve(registries) == digest


def test_what_is_remembered_of_refusals_is_bounded(registry: Registry, registries: Registries) -> None:
    for number in range(MAX_REFUSED + 5):
        registry.versions[str(number)] = b"files"
        with pytest.raises(SourceError):
            serve(registries, f"models:/digits/{number}", pin=OTHER)
    assert len(registries._refused) == MAX_REFUSED
    before = registry.fetched
    with pytest.raises(SourceError):
        serve(registries, "models:/digits/0", pin=OTHER)
    assert registry.fetched == before + 1


def test_a_pin_does_not_overrule_the_lock(registries: Registries) -> None:
    digest = serve(registries)
    resolved = registries.resolve(CHAMPION)
    registries.confirm(resolved, OTHER)
    with pytest.raises(SourceError, match=rf"have digest {digest}, but models\.lock says of m-1 {OTHER}"):
        registries.obtain(resolved, digest)


def test_a_version_that_was_overwritten_in_the_registry_is_refused(registry: Registry, registries: Registries) -> None:
    digest = serve(registries)
    registries.cache.discard(digest, "the disk was cleaned")
    registry.versions["1"] = b"something else under the same name"
    with pytest.raises(SourceError, match=rf"have digest sha256:.*, but models\.lock says of m-1 {digest}"):
        serve(registries)
    assert registries.lock.read()[CHAMPION].digest == digest
    assert registries.cache.digests() == []


def test_also_under_another_alias(registry: Registry, registries: Registries) -> None:
    digest = serve(registries)
    registries.cache.discard(digest, "the disk was cleaned")
    registry.versions["1"] = b"something else"
    with pytest.raises(SourceError, match=digest):
        serve(registries, "models:/digits/1")


def test_an_alias_that_moved_is_no_contradiction(registry: Registry, registries: Registries) -> None:
    first = serve(registries)
    registry.champion = "2"
    second = serve(registries)
    assert first != second
    assert registries.lock.read()[CHAMPION].version == "2"


def test_locking_anew_accepts_a_change(registry: Registry, registries: Registries) -> None:
    digest = serve(registries)
    registries.cache.discard(digest, "the disk was cleaned")
    registry.versions["1"] = b"changed on purpose"
    resolved = registries.resolve(CHAMPION)
    assert registries.obtain(resolved, None, lock_holds=False).digest != digest


def test_a_registry_that_is_down_at_the_start_is_told_and_what_served_last_serves(
    registry: Registry, registries: Registries
) -> None:
    digest = serve(registries)
    registry.champion = "2"
    registry.down()
    settled = registries.settle(CHAMPION)
    assert settled.resolved.uri == "models:/digits/1"
    assert settled.resolved.lineage.run_id == "run-1"
    assert "refuses connections" in settled.stale
    assert registries.obtain(settled.resolved).digest == digest
    assert "refuses connections" in registries.unanswered()[CHAMPION]
    registry.trouble = None
    assert registries.settle(CHAMPION).stale == ""
    assert registries.unanswered() == {}


def test_what_an_operator_chose_serves_until_the_reference_means_something_else(
    registry: Registry, registries: Registries
) -> None:
    first = registries.resolve(CHAMPION)
    digest = registries.obtain(first).digest
    registry.champion = "2"
    registries.confirm(first, digest, CHAMPION, "m-2")
    settled = registries.settle(CHAMPION)
    assert (settled.resolved.version, settled.instead_of, settled.stale) == ("1", "m-2", "")
    assert registries.obtain(settled.resolved).digest == digest
    registry.down()
    silent = registries.settle(CHAMPION)
    assert (silent.resolved.version, silent.instead_of) == ("1", "m-2")
    assert "cannot be asked" in silent.stale
    registry.failures = 0
    registry.versions["3"], registry.champion = b"three", "3"
    moved = registries.settle(CHAMPION)
    assert (moved.resolved.version, moved.instead_of) == ("3", "")


def test_a_choice_in_another_registry_or_for_a_fixed_reference_is_none(
    registry: Registry, registries: Registries
) -> None:
    first = registries.resolve(CHAMPION)
    digest = registries.obtain(first).digest
    registry.champion = "2"
    registries.confirm(first, digest, CHAMPION, "m-2")
    registry.url = "http://other"
    assert registries.settle(CHAMPION).resolved.version == "2"
    registries.confirm(first, digest, CHAMPION, "m-9")
    assert registries.lock.read()[CHAMPION].instead_of == "m-2", "nobody could fetch it there"
    registry.url = "http://h"
    registries.confirm(first, digest, "models:/digits/2", "m-2")
    assert registries.settle("models:/digits/2").resolved.version == "2"


def test_a_promoted_canary_serves_for_the_reference_of_the_model(registry: Registry, registries: Registries) -> None:
    canary = registries.resolve("models:/digits/2")
    digest = registries.obtain(canary).digest
    registries.confirm(canary, digest, CHAMPION, "m-1")
    settled = registries.settle(CHAMPION)
    assert (settled.resolved.reference, settled.resolved.version) == (CHAMPION, "2")
    assert registries.obtain(settled.resolved).digest == digest


def test_without_a_lock_the_cache_remembers(registry: Registry, registries: Registries) -> None:
    digest = serve(registries)
    registries.lock.path.unlink()
    registry.down()
    settled = registries.settle(CHAMPION)
    assert settled.resolved.uri == "models:/digits/1"
    assert registries.obtain(settled.resolved).digest == digest


@pytest.mark.parametrize("forgotten", ["nothing", "the lock"])
def test_what_another_registry_meant_by_the_name_does_not_serve(
    registry: Registry, registries: Registries, forgotten: str
) -> None:
    digest = serve(registries)
    if forgotten == "the lock":
        registries.lock.path.unlink()
    registry.down()
    registry.url = "http://other"
    with pytest.raises(SourceUnavailable, match=r"came from http://h, not from http://other"):
        registries.settle(CHAMPION)
    registry.url = "http://h"
    assert registries.obtain(registries.settle(CHAMPION).resolved).digest == digest


def test_the_lock_is_known_although_the_cache_is_empty(registry: Registry, registries: Registries) -> None:
    digest = serve(registries)
    registries.cache.discard(digest, "cleaned")
    registry.down()
    settled = registries.settle(CHAMPION)
    assert (settled.resolved.uri, settled.resolved.immutable_id) == ("models:/digits/1", "m-1")
    assert settled.resolved.lineage == Lineage(), "what nobody remembers is unknown"
    with pytest.raises(SourceUnavailable, match="refuses connections"):
        registries.obtain(settled.resolved)


def test_what_never_served_cannot_be_remembered(registry: Registry, registries: Registries) -> None:
    registry.down()
    with pytest.raises(SourceUnavailable, match="refuses connections"):
        registries.settle(CHAMPION)


def test_a_registry_that_says_no_is_believed(registry: Registry, registries: Registries) -> None:
    serve(registries)
    registry.trouble, registry.failures = SourceError("the alias is gone"), 1
    with pytest.raises(SourceError, match="the alias is gone"):
        registries.settle(CHAMPION)


def test_a_hiccup_is_tried_again_and_a_refused_credential_is_not(registry: Registry, registries: Registries) -> None:
    registry.down(times=ATTEMPTS - 1)
    assert registries.resolve(CHAMPION).version == "1"
    assert registry.asked == ATTEMPTS
    registry.trouble, registry.failures, registry.asked = SourceUnavailable("401", soon=False), 9, 0
    with pytest.raises(SourceUnavailable):
        registries.resolve(CHAMPION)
    assert registry.asked == 1


@pytest.mark.parametrize("trouble", [ValueError("4300 digits"), TypeError("'int'"), KeyError("x"), RecursionError()])
def test_an_answer_that_nobody_thought_of_is_trouble_with_the_registry(
    registry: Registry, registries: Registries, trouble: Exception
) -> None:
    resolved = registries.resolve(CHAMPION)
    registry.trouble, registry.failures = trouble, 2  # type: ignore[assignment]
    with pytest.raises(SourceUnavailable, match="cannot be read"):
        registries.resolve(CHAMPION)
    with pytest.raises(SourceUnavailable, match="cannot be read"):
        registries.obtain(resolved)
    assert registries.statistics().schemes["models"].outcomes["unavailable"] == 2


def test_a_fetch_that_broke_begins_anew_in_an_empty_directory(registry: Registry, registries: Registries) -> None:
    resolved = registries.resolve(CHAMPION)
    registry.down(times=1, text="cut")
    assert registries.obtain(resolved).digest
    assert registry.fetched == 2


def test_locked_asks_nobody_and_serves_what_the_lock_names(
    registry: Registry, registries: Registries, tmp_path: Path
) -> None:
    digest = serve(registries)
    registry.champion = "2"
    before = registry.asked
    locked = made(registry, tmp_path, locked=True)
    assert serve(locked) == digest
    assert registry.asked == before
    assert locked.resolve(CHAMPION).uri == "models:/digits/1"
    with pytest.raises(SourceError, match=r"does not name models:/other@x, and only what it names is served"):
        locked.settle("models:/other@x")


def test_locked_does_not_serve_what_only_the_cache_remembers(registry: Registry, tmp_path: Path) -> None:
    unlocked = made(registry, tmp_path)
    serve(unlocked)
    unlocked.lock.update({}, gone=[CHAMPION])
    locked = made(registry, tmp_path, locked=True)
    for ask in (locked.settle, locked.resolve):
        with pytest.raises(SourceError, match=f"does not name {CHAMPION}"):
            ask(CHAMPION)


def test_locked_refuses_another_version_of_a_reference_whoever_resolved_it(registry: Registry, tmp_path: Path) -> None:
    unlocked = made(registry, tmp_path)
    serve(unlocked)
    registry.champion = "2"
    moved = unlocked.resolve(CHAMPION)
    with pytest.raises(SourceError, match=r"models\.lock says models:/digits/1 of .*, not models:/digits/2"):
        made(registry, tmp_path, locked=True).obtain(moved)
    assert registry.fetched == 1


def test_locked_does_not_write_the_lock(registry: Registry, tmp_path: Path) -> None:
    serve(made(registry, tmp_path))
    locked = made(registry, tmp_path, locked=True)
    before = locked.lock.path.read_bytes()
    locked.confirm(replace(locked.resolve(CHAMPION), reference="models:/other@x", immutable_id="m-9"), OTHER)
    assert locked.lock.path.read_bytes() == before


def test_locked_does_not_open_a_registry_that_is_not_configured_any_more(registry: Registry, tmp_path: Path) -> None:
    serve(made(registry, tmp_path))
    cache, lock = Cache(tmp_path / "cache"), LockFile(tmp_path / "models.lock")
    for ask in (Registries({}, cache, lock, locked=True).settle, Registries({}, cache, lock, locked=True).resolve):
        with pytest.raises(SourceError, match=r"does not say where to find it"):
            ask(CHAMPION)


def test_locked_fetches_what_is_not_cached_and_checks_it(
    registry: Registry, registries: Registries, tmp_path: Path
) -> None:
    digest = serve(registries)
    registries.cache.discard(digest, "cleaned")
    locked = made(registry, tmp_path, locked=True)
    assert serve(locked) == digest
    locked.cache.discard(digest, "cleaned")
    registry.versions["1"] = b"tampered"
    with pytest.raises(SourceError, match=rf"but models\.lock says of m-1 {digest}"):
        serve(locked)


@pytest.mark.parametrize("reference", ["s3://bucket/key", "oci://h/r:t", "hf://a/b"])
def test_a_scheme_that_is_not_configured_is_refused_unasked(registries: Registries, reference: str) -> None:
    with pytest.raises(SourceError, match=r"does not say where to find it; add registries\."):
        registries.resolve(reference)
    with pytest.raises(SourceError, match="does not say where"):
        registries.settle(reference)


def test_a_lock_that_cannot_be_written_is_told_once_and_harms_nobody(
    registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    registries = Registries(
        {"models": registry}, Cache(tmp_path / "cache"), LockFile(tmp_path / "file" / "models.lock")
    )
    registries.lock.read = dict  # type: ignore[method-assign]  # there is none
    with caplog.at_level(logging.WARNING):
        serve(registries)
        serve(registries)
    assert caplog.text.count("cannot be written") == 1


def test_a_lock_that_is_broken_stops_the_start(registries: Registries) -> None:
    registries.lock.path.write_text("[[")
    with pytest.raises(ConfigError, match="is not TOML"):
        serve(registries)


def test_what_is_counted(registry: Registry, registries: Registries) -> None:
    serve(registries)
    registry.down(times=ATTEMPTS)
    with pytest.raises(SourceUnavailable):
        registries.resolve(CHAMPION)
    registry.trouble, registry.failures = SourceError("no"), 1
    with pytest.raises(SourceError):
        registries.resolve(CHAMPION)
    seen = registries.statistics().schemes["models"]
    assert seen.outcomes == {"ok": 2, "unavailable": 1, "refused": 1}
    assert seen.last_success == 1_800_000_000.0
    assert registries.statistics().cache.fetched_bytes == 3


def test_what_the_lock_names_is_not_collected(registry: Registry, registries: Registries) -> None:
    first = serve(registries)
    registry.champion = "2"
    registries.obtain(registries.resolve(CHAMPION))  # fetched, and refused later: the lock still names the first
    registries._keep_versions = 1
    assert registries.collect(()) == []
    registries.confirm(replace(registries.resolve(CHAMPION)), "sha256:" + "2" * 64)
    assert registries.collect(()) == [first]
    assert repr(registries) == "<Registries models>"
