"""What the source of a variant means, where it lies on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway import plan
from gateway.config import Config, ModelEntry
from gateway.config_release import Canary, Golden
from gateway.errors import SourceUnavailable
from gateway.variants_sources import Target, find, looks


def nobody(*arguments: Any) -> Any:
    raise AssertionError("no registry is meant, and nothing is loaded")


def asked(root: Path) -> Target:
    return find(Config(base=root), "m", ModelEntry(source="m"), Canary(source="./next"), nobody, nobody)


def test_a_variant_s_files_that_cannot_be_read_now_may_be_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = tmp_path / "next" / "4"
    version.mkdir(parents=True)
    (version / "model.onnx").write_bytes(b"fine")
    assert asked(tmp_path).wanted.version == "4"

    def unreadable(*arguments: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(plan, "read_version", unreadable)
    with pytest.raises(SourceUnavailable, match="cannot be read: Permission denied"):
        asked(tmp_path)


def test_files_look_different_once_one_of_them_is_another(tmp_path: Path) -> None:
    version = tmp_path / "next" / "4"
    config, entry = Config(base=tmp_path), ModelEntry(source="m", golden=Golden(file="golden.json"))

    def look(source: str = "./next") -> object:
        return looks(config, entry, Canary(source=source))

    seen = [look()]
    version.mkdir(parents=True)
    (version / "model.onnx").write_bytes(b"one")
    seen.append(look())
    assert look() == seen[-1]
    (version / "model.onnx").write_bytes(b"other")
    seen.append(look())
    (tmp_path / "golden.json").write_text("[]")
    seen.append(look())
    assert all(seen.count(one) == 1 for one in seen)
    assert look("models:/digits@next") is None, "a registry has no files here"
