"""Finding models on disk: layouts, versions, and that one broken model never hides another."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import ConfigError
from gateway.protocol.model_config import VersionPolicy
from gateway.registry.digest import read_artifact
from gateway.registry.directory import read_side_file, scan, select_versions


def model(folder: Path, *versions: str, config: str | None = None, file: str = "model.onnx") -> Path:
    for version in versions:
        (folder / version).mkdir(parents=True)
        (folder / version / file).write_bytes(b"x")
    folder.mkdir(exist_ok=True)
    if config is not None:
        (folder / "config.pbtxt").write_text(config)
    return folder


def test_a_repository(tmp_path: Path) -> None:
    model(tmp_path / "b", "1", "2", "10")
    model(tmp_path / "a", "3", config='max_batch_size: 4 default_model_filename: "n.onnx"', file="n.onnx")
    (tmp_path / ".git").mkdir()
    (tmp_path / "README.md").write_text("x")
    found = scan(tmp_path)
    assert found.faults == ()
    a, b = found.models
    assert (a.name, a.model_file, a.source) == ("a", "n.onnx", str(tmp_path / "a"))
    assert a.config is not None
    assert a.config.max_batch_size == 4
    assert (b.name, b.versions, b.config) == ("b", {"10": tmp_path / "b" / "10"}, None)


def test_one_models_directory_and_its_other_name(tmp_path: Path) -> None:
    folder = model(tmp_path / "digits", "1")
    assert [m.name for m in scan(folder).models] == ["digits"]
    assert [m.name for m in scan(folder, "renamed").models] == ["renamed"]


def test_a_relative_directory_has_the_name_of_the_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model(tmp_path / "digits", "1", config='name: "digits"'))
    assert [m.name for m in scan(Path()).models] == ["digits"]


def test_one_file(tmp_path: Path) -> None:
    file = tmp_path / "digits.onnx"
    file.write_bytes(b"x")
    (found,) = scan(file).models
    assert (found.name, found.versions, found.model_file) == ("digits", {"1": file}, "model.onnx")
    assert [m.name for m in scan(file, "other").models] == ["other"]
    odd = tmp_path / "my model.onnx"
    odd.write_bytes(b"x")
    assert "cannot be a model name" in str(scan(odd).faults[0])
    assert [m.name for m in scan(odd, "mine").models] == ["mine"]


def test_a_name_picks_one_model_of_a_repository(tmp_path: Path) -> None:
    model(tmp_path / "a", "1")
    model(tmp_path / "b", "1", config="broken {")
    found = scan(tmp_path, "a")
    assert ([m.name for m in found.models], found.faults) == (["a"], ())
    assert "holds no model 'c'" in str(scan(tmp_path, "c").faults[0])


def test_a_repository_may_hold_models_with_numbers_as_names(tmp_path: Path) -> None:
    model(tmp_path / "2024", "1")
    assert [m.name for m in scan(tmp_path).models] == ["2024"]
    assert scan(tmp_path / "2024").models[0].versions == {"1": tmp_path / "2024" / "1"}


def test_broken_models_are_reported_and_the_others_found(tmp_path: Path) -> None:
    model(tmp_path / "good", "1")
    model(tmp_path / "syntax", "1", config="name: 'x")
    model(tmp_path / "unknown", "1", config="nam: 'x'\nmax_batch_size: -1")
    model(tmp_path / "renamed", "1", config='name: "other"')
    model(tmp_path / "empty", config="")
    model(tmp_path / "no_file", "1", file="other.onnx")
    model(tmp_path / "gone", "1", config="version_policy { specific { versions: 7 } }")
    model(tmp_path / "bad name", "1")
    (tmp_path / "external" / "1" / "model.onnx").mkdir(parents=True)
    found = scan(tmp_path)
    assert [m.name for m in found.models] == ["good"]
    text = "\n".join(str(fault).removeprefix(f"{tmp_path}/") for fault in found.faults)
    for expected in (
        "syntax/config.pbtxt:1: column 7: this string is not closed",
        "unknown/config.pbtxt:1: nam: unknown key 'nam'; did you mean 'name'?",
        "unknown/config.pbtxt:2: max_batch_size: expected a whole number",
        "renamed/config.pbtxt: name: is 'other' but its directory is 'renamed'",
        "empty: has no version directory; move the model to empty/1/model.onnx",
        "no_file/1/model.onnx: this file is missing; rename other.onnx, or name it in default_model_filename",
        "gone/config.pbtxt: version_policy: version 7 does not exist; there are 1",
        "bad name: 'bad name' cannot be a model name",
        "external/1/model.onnx/model.onnx: this file is missing",
    ):
        assert expected in text
    assert len(found.faults) == 9


@pytest.mark.parametrize("name", ["0", "01", "v1", "1a", ".1", "-1", "99999999999999999999"])
def test_directories_that_are_not_versions_are_left_out(tmp_path: Path, name: str) -> None:
    model(tmp_path / "m", "1", name, config="version_policy { all {} }")
    assert list(scan(tmp_path).models[0].versions) == ["1"]


def test_only_versions_to_serve_need_their_file(tmp_path: Path) -> None:
    model(tmp_path / "m", "2")
    (tmp_path / "m" / "1").mkdir()
    assert list(scan(tmp_path).models[0].versions) == ["2"]
    (tmp_path / "m" / "config.pbtxt").write_text("version_policy { all {} }")
    assert "1/model.onnx: this file is missing; put the ONNX file there" in str(scan(tmp_path).faults[0])


def test_a_directory_without_anything_of_a_model_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model(tmp_path / "m", "1")
    (tmp_path / "docs" / "images").mkdir(parents=True)
    (tmp_path / "docs" / "index.md").write_text("x")
    with caplog.at_level("INFO", "gateway.registry"):
        found = scan(tmp_path)
    assert ([m.name for m in found.models], found.faults) == (["m"], ())
    assert f"{tmp_path / 'docs'} holds no model" in caplog.text
    (tmp_path / "docs" / "images" / "net.onnx").write_bytes(b"x")
    assert "docs: has no version directory" in str(scan(tmp_path).faults[0])
    assert "docs: has no version directory" in str(scan(tmp_path, "docs").faults[0])


def test_one_level_too_high_names_the_repository_to_give(tmp_path: Path) -> None:
    model(tmp_path / "my models" / "m", "1")
    (tmp_path / "docs").mkdir()
    (fault,) = scan(tmp_path).faults
    inner = tmp_path / "my models"
    assert str(fault) == f"{inner}: is a repository of models, not a model; give {inner} instead"


def test_what_is_no_source(tmp_path: Path) -> None:
    assert "there is no such file or directory" in str(scan(tmp_path / "none").faults[0])
    (tmp_path / "x.txt").write_text("x")
    assert "only ONNX models are served" in str(scan(tmp_path / "x.txt").faults[0])
    assert "holds no model directories (<model>/1/model.onnx)" in str(scan(tmp_path).faults[0])
    (tmp_path / "net.onnx").write_text("x")
    assert "to serve net.onnx, give that file" in str(scan(tmp_path).faults[0])


def test_a_config_that_is_not_utf8(tmp_path: Path) -> None:
    model(tmp_path / "m", "1")
    (tmp_path / "m" / "config.pbtxt").write_bytes(b"\n# \xff")
    assert "config.pbtxt:2: this line is not UTF-8" in str(scan(tmp_path).faults[0])


@given(st.sets(st.integers(1, 50)), st.integers(1, 60), st.sets(st.integers(1, 50)))
def test_version_policies(existing: set[int], count: int, wanted: set[int]) -> None:
    every = tuple(sorted(existing))
    assert select_versions(existing, VersionPolicy("all")) == every
    assert select_versions(existing, VersionPolicy("latest", count)) == every[-count:]
    specific = select_versions(existing, VersionPolicy("specific", versions=tuple(wanted)))
    assert specific == tuple(sorted(existing & wanted))


# -- files that a configuration names ------------------------------------------------------------------------------

LABELLED = 'output { name: "y" data_type: TYPE_FP32 dims: 3 label_filename: "labels.txt" }'
STATEFUL = (
    'sequence_batching { state { input_name: "i" output_name: "o" data_type: TYPE_FP32 dims: 1 initial_state '
    '{ name: "s" data_type: TYPE_FP32 dims: 1 data_file: "first" } } }'
)


def test_labels_are_read_line_by_line(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", "1", config=LABELLED)
    (folder / "labels.txt").write_bytes("a b\r\né\n\nlast\u2028one\n".encode())
    (found,) = scan(folder).models
    assert found.config is not None
    assert found.config.scheduling.labels == (("y", ("a b", "é", "", "last\u2028one")),)
    assert found.directory == folder


def test_first_states_are_read(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", "1", config=STATEFUL)
    (folder / "initial_state").mkdir()
    (folder / "initial_state" / "first").write_bytes(b"\0\1\2\3")
    (found,) = scan(folder).models
    assert found.config is not None
    assert found.config.scheduling.sequence is not None
    assert found.config.scheduling.sequence.states[0].initial == b"\0\1\2\3"


@pytest.mark.parametrize(("config", "file"), [(LABELLED, "labels.txt"), (STATEFUL, "initial_state/first")])
def test_a_file_that_is_named_and_missing_is_a_fault(tmp_path: Path, config: str, file: str) -> None:
    folder = model(tmp_path / "m", "1", config=config)
    (fault,) = scan(folder).faults
    assert str(fault).startswith(f"{folder / file}: ")
    assert "this file is missing, and the model's configuration names it" in str(fault)


def test_a_file_that_is_named_is_no_way_out_of_the_directory(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", "1", config=LABELLED)
    (tmp_path / "secret").write_text("x")
    (folder / "labels.txt").symlink_to(tmp_path / "secret")
    assert "this link leaves the model's directory" in str(scan(folder).faults[0])
    with pytest.raises(ConfigError, match="larger than 2 bytes"):
        read_side_file(model(tmp_path / "n", "1", config="# long"), "config.pbtxt", 2)


def test_labels_that_are_not_text_are_a_fault(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", "1", config=LABELLED)
    (folder / "labels.txt").write_bytes(b"\xff")
    assert "output 'y'.label_filename: labels.txt is not UTF-8" in str(scan(folder).faults[0])


ENSEMBLE = """platform: "ensemble" max_batch_size: 4
input { name: "x" data_type: TYPE_FP32 dims: 3 }
output { name: "y" data_type: TYPE_FP32 dims: 3 }
ensemble_scheduling { step { model_name: "a" input_map { key: "x" value: "x" } output_map { key: "y" value: "y" } } }
"""


@pytest.mark.parametrize("versions", [(), ("1",), ("1", "4")])
def test_an_ensemble_needs_no_file_and_no_version_directory(tmp_path: Path, versions: tuple[str, ...]) -> None:
    folder = model(tmp_path / "e", config=ENSEMBLE)
    for version in versions:
        (folder / version).mkdir()
    (found,) = scan(tmp_path).models
    assert found.config is not None
    assert found.config.ensemble
    assert found.model_file == ""
    number = versions[-1] if versions else "1"
    assert found.versions == {number: folder / number if versions else folder}
    artifact = read_artifact(found.versions[number], "e", number, found.model_file)
    assert artifact.model == b""
    assert [file.path for file in artifact.files] == ([] if versions else ["config.pbtxt"])
