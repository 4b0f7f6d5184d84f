"""`gateway lock`: all or nothing, and every change is shown."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from gateway import cli_registry
from gateway.config import Config, load
from gateway.errors import ConfigError, SourceError
from gateway.registry.cache import Cache
from gateway.registry.lock import LockFile
from gateway.registry.sources import Registries
from tests.registry.test_sources import CHAMPION, Registry


class Rig:
    """`lock` against a scripted registry."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.registry = Registry()
        self.lock_file = LockFile(folder / "models.lock")
        made = Registries({"models": self.registry}, Cache(folder / "cache"), self.lock_file, sleep=lambda s: None)
        monkeypatch.setattr(cli_registry, "registries_of", lambda config: made)

    def config(self, *sources: str, more: str = "") -> Config:
        listed = "".join(f"  - {{source: '{source}', name: m{i}{more}}}\n" for i, source in enumerate(sources))
        path = self.folder / "gateway.yaml"
        path.write_text(f"registries: {{mlflow: {{url: 'http://h'}}}}\nmodels:\n{listed or '  []'}")
        return load(path, {}, {})

    def lock(self, *sources: str, more: str = "") -> list[str]:
        text = io.StringIO()
        cli_registry.lock(Console(file=text, width=500, highlight=False), self.config(*sources, more=more))
        return text.getvalue().splitlines()


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(tmp_path, monkeypatch)


def test_what_changed_is_shown(rig: Rig) -> None:
    first = rig.lock(CHAMPION, "models:/digits/1")
    digest = rig.lock_file.read()[CHAMPION].digest
    assert first == [
        f"models:/digits/1: models:/digits/1, {digest}",
        f"{CHAMPION}: models:/digits/1, {digest}",
        f"{rig.lock_file.path}: 2 locked",
    ]
    rig.registry.champion = "2"
    again = rig.lock(CHAMPION)
    new = rig.lock_file.read()[CHAMPION].digest
    assert again[0] == "models:/digits/1: removed: no model comes from it any more"
    assert again[1] == f"{CHAMPION}: models:/digits/1, {digest} -> models:/digits/2, {new}"
    assert rig.lock(CHAMPION)[0] == f"{CHAMPION}: as before: models:/digits/2, {new}"
    assert list(rig.lock_file.read()) == [CHAMPION]


def test_files_that_changed_under_their_name_are_accepted_here(rig: Rig) -> None:
    rig.lock(CHAMPION)
    before = rig.lock_file.read()[CHAMPION].digest
    Cache(rig.folder / "cache").discard(before, "cleaned")
    rig.registry.versions["1"] = b"changed on purpose"
    assert f"{before} -> models:/digits/1, " in rig.lock(CHAMPION)[0]


def test_if_one_cannot_be_locked_none_is(rig: Rig) -> None:
    rig.lock(CHAMPION)
    before = rig.lock_file.path.read_bytes()
    rig.registry.champion = "2"
    with pytest.raises(SourceError, match=r"nothing was locked:\nmodels:/digits/9: there is no version 9"):
        rig.lock(CHAMPION, "models:/digits/9")
    with pytest.raises(SourceError, match="but the configuration pins"):
        rig.lock(CHAMPION, more=f", digest: 'sha256:{'0' * 64}'")
    assert rig.lock_file.path.read_bytes() == before


@pytest.mark.parametrize("other", ["sha256:" + "0" * 64, "sha256:" + "f" * 64])
def test_every_pin_of_a_reference_is_compared(rig: Rig, other: str) -> None:
    rig.lock(CHAMPION)
    before, digest = rig.lock_file.path.read_bytes(), rig.lock_file.read()[CHAMPION].digest
    rows = [f"{{source: '{CHAMPION}', name: m{n}, digest: '{pin}'}}" for n, pin in enumerate([digest, other])]
    for listed in (rows, rows[::-1]):
        path = rig.folder / "gateway.yaml"
        path.write_text(f"registries: {{mlflow: {{url: 'http://h'}}}}\nmodels: [{', '.join(listed)}]")
        with pytest.raises(SourceError, match=rf"digest {digest}, but the configuration pins {other}"):
            cli_registry.lock(Console(file=io.StringIO()), load(path, {}, {}))
    assert rig.lock_file.path.read_bytes() == before


def test_there_must_be_something_to_lock(rig: Rig) -> None:
    with pytest.raises(ConfigError, match="no model comes from a registry"):
        rig.lock()
