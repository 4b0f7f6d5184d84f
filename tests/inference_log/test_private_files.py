"""Files that are made for nobody else, and are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from gateway.inference_log import private_files
from gateway.inference_log.segments import Commit


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "log"
    private_files.make_directory(made)
    return made


def test_everything_is_private_even_under_a_umask_that_takes_our_own_rights(directory: Path) -> None:
    earlier = directory / "earlier"
    earlier.write_bytes(b"long content of before")
    earlier.chmod(0o644)
    before = os.umask(0o777)
    try:
        private_files.make_directory(directory / "a" / "b")
        for name in ("new", "earlier"):
            with private_files.open_new(directory / name) as stream:
                stream.write(b"x")
    finally:
        os.umask(before)
    modes = [(directory / name).stat().st_mode & 0o777 for name in ("a", "a/b", "new", "earlier")]
    assert modes == [0o700, 0o700, 0o600, 0o600]
    assert earlier.read_bytes() == b"x"


def test_a_lock_is_not_taken_through_a_link(directory: Path, tmp_path: Path) -> None:
    (directory / "sealer.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        private_files.take_lock(directory / "sealer.lock")
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_is_there_whole_or_not_at_all(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = directory / "x.json"
    private_files.write_json(path, {"a": 1})

    def dies(_: int) -> None:
        raise OSError("no power")

    monkeypatch.setattr(os, "fsync", dies)
    with pytest.raises(OSError, match="no power"):
        private_files.write_json(path, {"a": 2})
    assert msgspec.json.decode(path.read_bytes()) == {"a": 1}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"epoch": 5}', b"\xff"])
def test_a_record_that_cannot_be_read_is_none(directory: Path, content: bytes) -> None:
    path = directory / "broken.json"
    path.write_bytes(content)
    assert private_files.read_json(path, Commit) is None
    assert private_files.read_json(directory / "missing.json", Commit) is None


def test_links_are_not_followed(directory: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    link = directory / "link"
    link.symlink_to(secret)
    with pytest.raises(OSError, match="symbolic link"):
        private_files.read_file(link)
    with pytest.raises(OSError, match="symbolic link"), private_files.open_new(link):
        pass
    assert secret.read_bytes() == b"secret"
