"""What the source of a variant means, where it lies on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway import plan
from gateway.config import Config, ModelEntry
from gateway.config_release import Canary
from gateway.errors import SourceUnavailable
from gateway.variants_sources import Target, find


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
