"""What is fetched for the tests: a failure is told, and never taken for a success later."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.live import venvs


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that looks nowhere but in `tmp_path / "wheels"`."""
    monkeypatch.setattr(venvs, "HOME", tmp_path / "cache")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()
    return tmp_path


def wheel(folder: Path, content: str) -> None:
    with zipfile.ZipFile(folder / "thing-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("thing.txt", content)
        archive.writestr("thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
        archive.writestr("thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")


def fetch() -> str:
    return (venvs._unpacked("thing", "thing==1.0", "any") / "thing.txt").read_text()


def test_what_cannot_be_had_is_told_and_tried_again(home: Path) -> None:
    for _ in range(2):
        with pytest.raises(venvs.NotToBeHad, match="No matching distribution found for thing"):
            fetch()
    with pytest.raises(pytest.skip.Exception, match="thing"):
        venvs.need(fetch)
    wheel(home / "wheels", "here")
    assert venvs.need(fetch) == "here"


def test_what_is_there_is_not_fetched_again(home: Path) -> None:
    wheel(home / "wheels", "first")
    assert fetch() == "first"
    wheel(home / "wheels", "second")
    assert fetch() == "first"
    (home / "cache" / "thing" / ".complete").unlink()  # as if it had been interrupted
    assert fetch() == "second"
