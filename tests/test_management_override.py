"""What a load request may bring along: parameters, paths, files, and where they end up."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import ConfigError, GatewayError, InvalidRequest, Malformed
from gateway.management_override import MAX_FILES, UPLOADED, overridden, read_override
from tests.live import models

CONFIG = '{"max_batch_size": "16"}'
LINEAR = models.linear()
ENCODED = base64.b64encode(LINEAR).decode()


def test_nothing_asked_for_is_no_override() -> None:
    assert read_override({}) is None


def test_a_configuration_and_files_as_text_or_bytes() -> None:
    override = read_override({"config": CONFIG, "file:1/model.onnx": ENCODED, "file:labels.txt": b"a\nb"})
    assert override is not None
    assert override.config.max_batch_size == 16
    assert override.files == {"1/model.onnx": LINEAR, "labels.txt": b"a\nb"}


@pytest.mark.parametrize(
    ("parameters", "kind", "text"),
    [
        ({"confg": CONFIG}, Malformed, "unrecognized load parameter 'confg'"),
        ({"config": {"max_batch_size": 1}}, Malformed, "expected string_param"),
        ({"config": "{"}, ConfigError, "not valid JSON"),
        ({"config": '{"max_batch_sze": 1}'}, ConfigError, "max_batch_sze"),
        ({"file:1/model.onnx": ENCODED}, InvalidRequest, "override model config ('config') must be provided"),
        ({"config": CONFIG, "file:1/model.onnx": 5}, Malformed, "must be a string"),
        ({"config": CONFIG, "file:1/model.onnx": "%%%"}, InvalidRequest, "is not base64"),
        ({"config": CONFIG, "file:config.pbtxt": b""}, InvalidRequest, "as parameter 'config'"),
        ({"config": CONFIG, **{f"file:1/{n}": b"" for n in range(MAX_FILES + 1)}}, InvalidRequest, "at most"),
    ],
)
def test_what_cannot_be_used_is_named(parameters: dict[str, Any], kind: type[GatewayError], text: str) -> None:
    with pytest.raises(kind) as caught:
        read_override(parameters)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "path",
    [
        "", "/", "/etc/passwd", "../x", "1/../../x", "1/..", "./1/model.onnx", "1//model.onnx", "1/.hidden", "~/x",
        "1/a/b/c/d", "01/model.onnx", "0/model.onnx", "1/mod\0el", "1/a b", "C:\\x", "1\\..\\x", "1/é",
    ],
)  # fmt: skip
def test_a_path_cannot_leave_the_models_directory(path: str) -> None:
    with pytest.raises(InvalidRequest):
        read_override({"config": CONFIG, f"file:{path}": b"x"})


@given(path=st.text(alphabet="./\\1ax\0é-_~", max_size=12))
def test_no_accepted_path_climbs(path: str) -> None:
    try:
        override = read_override({"config": CONFIG, f"file:{path}": b"x"})
    except InvalidRequest:
        return
    assert override is not None
    (accepted,) = override.files
    root = Path("/somewhere/model")
    assert (root / accepted).resolve().is_relative_to(root)
    assert not any(part.startswith(".") for part in Path(accepted).parts)


def test_uploaded_files_are_private_and_gone_afterwards(tmp_path: Path) -> None:
    override = read_override({"config": CONFIG, "file:3/model.onnx": ENCODED})
    assert override is not None
    with overridden("new", None, override) as found:
        assert (found.name, found.source, list(found.versions)) == ("new", UPLOADED, ["3"])
        place = found.versions["3"]
        assert (place / "model.onnx").read_bytes() == LINEAR
        top = place.parent.parent
        assert top.stat().st_mode & 0o077 == 0
    assert not top.exists()


def test_with_files_nothing_of_the_repository_is_mixed_in(tmp_path: Path) -> None:
    models.repository(tmp_path, {"m": LINEAR})
    (tmp_path / "m" / "2").mkdir()
    (tmp_path / "m" / "2" / "model.onnx").write_bytes(LINEAR)
    files = read_override({"config": CONFIG, "file:1/model.onnx": ENCODED})
    config_only = read_override({"config": '{"version_policy": {"all": {}}}'})
    assert files is not None
    assert config_only is not None
    with overridden("m", tmp_path / "m", files) as found:
        assert list(found.versions) == ["1"]
        assert not found.versions["1"].is_relative_to(tmp_path)
    with overridden("m", tmp_path / "m", config_only) as found:
        assert list(found.versions.values()) == [tmp_path / "m" / "1", tmp_path / "m" / "2"]


def test_names_that_disagree_and_models_that_are_nowhere() -> None:
    other = read_override({"config": '{"name": "other"}', "file:1/model.onnx": ENCODED})
    nowhere = read_override({"config": CONFIG})
    assert other is not None
    assert nowhere is not None
    with pytest.raises(ConfigError, match="name is 'other', but the model is 'm'"), overridden("m", None, other):
        pass
    with pytest.raises(ConfigError, match="no source has a model 'm'"), overridden("m", None, nowhere):
        pass
