"""External data: in the digest, copied while it is hashed, and only ever from beneath the version directory."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from gateway.errors import ConfigError
from gateway.registry import digest
from gateway.registry.digest import read_artifact
from gateway.registry.directory import scan
from gateway.workers.bundle import read_bundle
from tests.registry.onnx_models import relocated, save, scaled

LISTING = "find . -type f -printf '%P\\n' | LC_ALL=C sort | xargs -d '\\n' sha256sum | sha256sum"


def coreutils(directory: Path) -> str:
    text = subprocess.run(["bash", "-c", LISTING], cwd=directory, capture_output=True, check=True, text=True).stdout
    return "sha256:" + text.split()[0]


def test_the_files_are_in_the_digest_and_their_hashed_bytes_are_kept(tmp_path: Path) -> None:
    directory = save(tmp_path / "1", scaled(), "data/weights.bin")
    artifact = read_artifact(directory, "m", "1")
    assert [file.path for file in artifact.files] == ["data/weights.bin", "model.onnx"]
    assert artifact.digest == coreutils(directory)
    assert artifact.external is not None
    content = (directory / "data/weights.bin").read_bytes()
    (directory / "data/weights.bin").write_bytes(bytes(len(content)))  # too late: it was hashed and copied at once
    (files,) = [read_bundle(artifact.external.fileno())]
    assert {name: bytes(view) for name, view in files.items()} == {"data/weights.bin": content}
    with pytest.raises(PermissionError):
        os.pwrite(artifact.external.fileno(), b"x", 0)


def test_a_model_of_one_file_has_none(tmp_path: Path) -> None:
    directory = save(tmp_path / "1", scaled())
    (directory / "weights.bin").write_bytes(b"not used")
    assert read_artifact(directory, "m", "1").external is None


def test_a_file_served_alone_takes_its_data_along_and_has_the_digest_of_the_directory(tmp_path: Path) -> None:
    directory = save(tmp_path / "1", scaled(), "digits.onnx.data")
    alone = tmp_path / "elsewhere"
    shutil.copytree(directory, alone)
    (alone / "model.onnx").rename(alone / "digits.onnx")
    (alone / "unrelated").write_bytes(b"x")
    artifact = read_artifact(alone / "digits.onnx", "digits", "1")
    assert artifact.digest == coreutils(directory)
    assert artifact.external is not None


def test_tritons_form_with_a_directory_named_model_onnx(tmp_path: Path) -> None:
    save(tmp_path / "m" / "1" / "model.onnx", scaled(), "weights.bin")
    found = scan(tmp_path / "m")
    assert not found.faults
    artifact = read_artifact(tmp_path / "m" / "1", "m", "1", found.models[0].model_file)
    assert [file.path for file in artifact.files] == ["model.onnx/model.onnx", "model.onnx/weights.bin"]
    assert artifact.external is not None
    assert set(read_bundle(artifact.external.fileno())) == {"weights.bin"}


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "a/../../secret.bin"])
def test_a_location_outside_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(48))
    directory = save(tmp_path / "1", scaled(), "weights.bin")
    relocated(directory / "model.onnx", location)
    with pytest.raises(ConfigError, match="not below the model's own directory"):
        read_artifact(directory, "m", "1")


def test_a_link_is_refused_where_it_points_outside_and_where_it_stands_for_the_file(tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(48))
    directory = save(tmp_path / "1", scaled(), "weights.bin")
    (directory / "weights.bin").unlink()
    (directory / "weights.bin").symlink_to(tmp_path / "secret.bin")
    with pytest.raises(ConfigError, match="leaves the version directory"):
        read_artifact(directory, "m", "1")
    with pytest.raises(ConfigError, match="a link is not followed"):
        read_artifact(directory / "model.onnx", "m", "1")
    (directory / "weights.bin").unlink()
    (directory / "real.bin").write_bytes(bytes(48))
    (directory / "weights.bin").symlink_to("real.bin")
    with pytest.raises(ConfigError, match="a link is not followed"):
        read_artifact(directory, "m", "1")


def test_a_directory_that_becomes_a_link_while_it_is_read_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save(tmp_path / "1", scaled(), "data/weights.bin")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "weights.bin").write_bytes(bytes(48))
    listed = digest._regular_files

    def swapping(path: Path) -> list[str]:
        names = listed(path)
        shutil.rmtree(path / "data")
        (path / "data").symlink_to(tmp_path / "outside")
        return names

    monkeypatch.setattr(digest, "_regular_files", swapping)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_artifact(directory, "m", "1")


def test_missing_data_is_named(tmp_path: Path) -> None:
    directory = save(tmp_path / "1", scaled(), "weights.bin")
    (directory / "weights.bin").unlink()
    for path in (directory, directory / "model.onnx"):
        with pytest.raises(ConfigError, match=r"weights\.bin: the model keeps tensors in this file"):
            read_artifact(path, "m", "1")


def test_a_model_that_is_its_own_data_is_refused(tmp_path: Path) -> None:
    directory = save(tmp_path / "1", scaled(), "weights.bin")
    relocated(directory / "model.onnx", "model.onnx")
    with pytest.raises(ConfigError, match="names itself"):
        read_artifact(directory, "m", "1")


def test_more_than_memory_holds_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save(tmp_path / "1", scaled(), "weights.bin")
    monkeypatch.setattr("gateway.workers.bundle.available_memory", lambda: 47)
    with pytest.raises(ConfigError, match="does not fit"):
        read_artifact(directory, "m", "1")


def test_a_sparse_file_larger_than_any_bundle_is_refused(tmp_path: Path) -> None:
    directory = save(tmp_path / "1", scaled(), "weights.bin")
    os.truncate(directory / "weights.bin", 2**39)
    with pytest.raises(ConfigError, match="at most"):
        read_artifact(directory, "m", "1")
