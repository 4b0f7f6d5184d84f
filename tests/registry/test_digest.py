"""The digest is the one coreutils computes, over exactly the bytes that are loaded."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.errors import ConfigError
from gateway.registry import digest
from gateway.registry.digest import listing, read_artifact

CONTRACT = r"find . -type f -printf '%P\n' | LC_ALL=C sort | xargs -d '\n' sha256sum | sha256sum"
ANY_NAME = r"find . -type f -printf '%P\0' | LC_ALL=C sort -z | xargs -0 sha256sum -- | sha256sum"


def coreutils(directory: Path, pipeline: str = CONTRACT) -> str:
    result = subprocess.run(["bash", "-c", pipeline], cwd=directory, capture_output=True, check=True)
    return "sha256:" + result.stdout.split()[0].decode()


def version(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in {"model.onnx": b"model", **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_the_digest_is_the_one_of_the_documented_pipeline(tmp_path: Path) -> None:
    files = {
        "a b.txt": b"1",
        "Z": b"",
        ".hidden": b"2",
        "sub/dir/x": b"3" * 3_000_000,
        "sub.txt": b"4",
        "é": b"5",
    }
    artifact = read_artifact(version(tmp_path, files), "m", "1", source="here")
    assert artifact.digest == coreutils(tmp_path)
    assert [f.path for f in artifact.files] == sorted(["model.onnx", *files], key=os.fsencode)
    assert {f.path: f.size for f in artifact.files}["sub/dir/x"] == 3_000_000
    assert (artifact.model, artifact.name, artifact.version, artifact.source) == (b"model", "m", "1", "here")


@pytest.mark.parametrize("name", ["back\\slash", "line\nfeed", "carriage\rreturn", "\\n", "two\\\n"])
def test_names_are_escaped_as_sha256sum_does(tmp_path: Path, name: str) -> None:
    assert read_artifact(version(tmp_path, {name: b"x"}), "m", "1").digest == coreutils(tmp_path, ANY_NAME)


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..", "-") and len(name.encode()) < 200 and name != "model.onnx"
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.dictionaries(NAMES, st.binary(max_size=40), max_size=6))
def test_any_directory_has_the_digest_coreutils_gives_it(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
) -> None:
    folder = version(tmp_path_factory.mktemp("version"), files)
    assert read_artifact(folder, "m", "1").digest == coreutils(folder, ANY_NAME)


def test_one_file_served_alone_has_the_digest_of_a_directory_with_it(tmp_path: Path) -> None:
    folder = version(tmp_path / "1", {})
    alone = tmp_path / "digits.onnx"
    alone.write_bytes(b"model")
    artifact = read_artifact(alone, "digits", "1")
    assert artifact.digest == read_artifact(folder, "digits", "1").digest
    documented = r"""printf '%s  model.onnx\n' "$(sha256sum < digits.onnx | cut -d' ' -f1)" | sha256sum"""
    assert artifact.digest == coreutils(tmp_path, documented)


def test_every_change_changes_the_digest(tmp_path: Path) -> None:
    seen = {read_artifact(version(tmp_path / "a", {}), "m", "1").digest}
    seen.add(read_artifact(version(tmp_path / "b", {"model.onnx": b"modem"}), "m", "1").digest)
    seen.add(read_artifact(version(tmp_path / "c", {"x": b""}), "m", "1").digest)
    seen.add(read_artifact(version(tmp_path / "d", {"y": b""}), "m", "1").digest)
    assert len(seen) == 4
    assert read_artifact(tmp_path / "a", "other", "9").digest in seen


def test_the_models_bytes_are_the_bytes_that_were_hashed(tmp_path: Path) -> None:
    artifact = read_artifact(version(tmp_path, {"net.onnx": b"other"}), "m", "1", model_file="net.onnx")
    listed = {f.path: f.sha256 for f in artifact.files}
    assert (artifact.model, artifact.model_file) == (b"other", "net.onnx")
    assert listed["net.onnx"] == hashlib.sha256(artifact.model).hexdigest()


def test_links_inside_the_directory_are_followed_and_not_listed(tmp_path: Path) -> None:
    version(tmp_path, {"data/real.onnx": b"real"})
    (tmp_path / "model.onnx").unlink()
    (tmp_path / "model.onnx").symlink_to("data/real.onnx")
    artifact = read_artifact(tmp_path, "m", "1")
    assert (artifact.model, [f.path for f in artifact.files]) == (b"real", ["data/real.onnx"])
    assert artifact.digest == coreutils(tmp_path)


@pytest.mark.parametrize("name", ["model.onnx", "extra", "sub/extra"])
def test_links_that_leave_the_directory_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    folder = version(tmp_path / "1", {"sub/x": b""})
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match=r"this link leaves the version directory; put the file itself there"):
        read_artifact(folder, "m", "1")


def test_special_files_are_refused_without_waiting(tmp_path: Path) -> None:
    folder = version(tmp_path / "1", {})
    os.mkfifo(folder / "pipe")
    with pytest.raises(ConfigError, match=r"pipe: is neither a file nor a directory"):
        read_artifact(folder, "m", "1")
    (folder / "pipe").unlink()
    (folder / "model.onnx").unlink()
    os.mkfifo(folder / "model.onnx")
    with pytest.raises(ConfigError, match=r"model\.onnx: is neither a file nor a directory"):
        read_artifact(folder, "m", "1")
    with socket.socket(socket.AF_UNIX) as server:
        (folder / "model.onnx").unlink()
        server.bind(str(folder / "model.onnx"))
        with pytest.raises(ConfigError, match="is neither a file nor a directory"):
            read_artifact(folder, "m", "1")


def test_missing_directories_and_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.onnx: this file is missing"):
        read_artifact(tmp_path, "m", "1")
    with pytest.raises(ConfigError, match="cannot be read: No such file or directory"):
        read_artifact(tmp_path / "none", "m", "1")
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(ConfigError, match="this file is missing"):
        read_artifact(tmp_path, "m", "1")


def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    version(tmp_path, {})
    (tmp_path / os.fsdecode(b"\xff")).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"not UTF-8: '\\udcff'; rename it"):
        read_artifact(tmp_path, "m", "1")


def test_the_number_of_files_and_the_depth_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version(tmp_path, {"a": b"", "b": b"", "c/d/e/f": b""})
    monkeypatch.setattr(digest, "MAX_DEPTH", 2)
    with pytest.raises(ConfigError, match="nested deeper than 2 directories"):
        read_artifact(tmp_path, "m", "1")
    monkeypatch.setattr(digest, "MAX_FILES", 2)
    with pytest.raises(ConfigError, match="holds more than 2 files"):
        read_artifact(tmp_path, "m", "1")


def test_a_model_larger_than_protobuf_allows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "MAX_MODEL_BYTES", 3)
    with pytest.raises(ConfigError, match="larger than 2 GiB"):
        read_artifact(version(tmp_path, {}), "m", "1")


def test_the_listing_is_sorted_whatever_the_order_given(tmp_path: Path) -> None:
    artifact = read_artifact(version(tmp_path, {"b": b"", "a": b"", "A/b": b""}), "m", "1")
    assert listing(reversed(artifact.files)) == listing(artifact.files)
    assert [line[66:] for line in listing(artifact.files).decode().splitlines()] == [
        "A/b",
        "a",
        "b",
        "model.onnx",
    ]


def test_what_is_put_there_after_the_look_around_is_not_opened(tmp_path: Path) -> None:
    """Between the listing of a directory and the opening of its files somebody may exchange them."""
    folder = version(tmp_path / "1", {"sub/data": b"data"})
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "inside").symlink_to("sub")
    os.mkfifo(folder / "pipe")
    for name, why in (("link", "it is a link"), ("inside/data", "cannot be read"), ("pipe", "is not a regular file")):
        before = len(list(Path("/proc/self/fd").iterdir()))
        with pytest.raises(ConfigError, match=why):
            digest._open(folder, name)
        assert len(list(Path("/proc/self/fd").iterdir())) == before, "nothing stays open"
    descriptor = digest._open(folder, "sub/data")
    assert os.read(descriptor, 10) == b"data"
    os.close(descriptor)
