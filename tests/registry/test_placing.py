from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import SourceError
from gateway.registry.placing import Placing, checked_name
from gateway.registry.resolver import Bounds


def archive(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as made:
        for info, content in members:
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def plain(name: str, content: bytes = b"x") -> tuple[tarfile.TarInfo, bytes]:
    return tarfile.TarInfo(name), content


def special(kind: bytes, name: str = "evil", link: str = "/etc/passwd") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, b""


def unpacked(content: bytes, into: Path, bounds: Bounds | None = None) -> dict[str, bytes]:
    Placing(into, bounds or Bounds(), "it").unpack(io.BytesIO(content))
    return {path.relative_to(into).as_posix(): path.read_bytes() for path in into.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_archive_gives_its_files(tmp_path: Path, form: int) -> None:
    long = "/".join(["d" * 60] * 3) + "/model.onnx"
    files = {"model.onnx": b"a" * 513, "./dotted": b"", long: b"long", "a/b": bytes(5000)}
    content = archive(special(tarfile.DIRTYPE, "a"), *(plain(n, c) for n, c in files.items()), form=form)
    assert unpacked(content, tmp_path) == {name.removeprefix("./"): text for name, text in files.items()}


def test_names_that_are_not_ascii(tmp_path: Path) -> None:
    assert unpacked(archive(plain("Größe.txt")), tmp_path) == {"Größe.txt": b"x"}


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, b"S", b"Q"]
)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with pytest.raises(SourceError, match="pack plain files only"):
        unpacked(archive(plain("fine"), special(kind)), tmp_path)


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "a//b", "a\\..\\b", "bell\a", "x" * 300])
def test_names_that_leave_the_directory_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(SourceError, match="does not name a file below it"):
        unpacked(archive(plain(name)), tmp_path / "in")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_file_where_a_folder_is_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="two files"):
        unpacked(archive(plain("a"), plain("a/b")), tmp_path)
    (tmp_path / "2").mkdir()
    with pytest.raises(SourceError, match="two files"):
        unpacked(archive(plain("a"), plain("./a")), tmp_path / "2")


def test_bounds_on_bytes_and_files(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="larger than 3000 bytes"):
        unpacked(archive(plain("big", bytes(100_000))), tmp_path, Bounds(max_bytes=3000))
    with pytest.raises(SourceError, match="more than 2 files"):
        unpacked(archive(*(plain(str(n)) for n in range(3))), tmp_path, Bounds(max_files=2))


def test_a_bomb_of_zeros_ends_at_the_bound(tmp_path: Path) -> None:
    bomb = gzip.compress(archive(plain("big", bytes(5_000_000))))
    placing = Placing(tmp_path, Bounds(max_bytes=1_000_000), "it")
    with pytest.raises(SourceError, match="larger than"):
        placing.unpack(io.BytesIO(bomb), gzipped=True)
    with pytest.raises(SourceError, match="cannot be unpacked"):
        Placing(tmp_path / "cut", Bounds(), "it").unpack(io.BytesIO(bomb[:100]), gzipped=True)


def test_an_endless_name_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**30
    with pytest.raises(SourceError, match="damaged"):
        unpacked(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024), tmp_path)


def test_no_more_is_read_for_a_name_than_a_name_can_need(tmp_path: Path) -> None:
    class Endless(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            assert size is not None
            assert 0 <= size <= 2 * 1024 * 1024
            return super().read(size) or bytes(size)

    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE):
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, 2**30
        with pytest.raises(SourceError, match="damaged"):
            Placing(tmp_path, Bounds(), "it").unpack(Endless(info.tobuf(tarfile.GNU_FORMAT)))


def test_an_archive_of_nothing_but_headers_ends_at_the_bound(tmp_path: Path) -> None:
    content = archive(*(special(tarfile.DIRTYPE, f"d{n}") for n in range(20)))
    with pytest.raises(SourceError, match="larger than 3000 bytes"):
        unpacked(content, tmp_path, Bounds(max_bytes=3000))


def test_a_header_that_is_not_what_its_checksum_says_is_refused(tmp_path: Path) -> None:
    content = archive(plain("model.onnx"), form=tarfile.USTAR_FORMAT)
    with pytest.raises(SourceError, match="damaged"):
        unpacked(b"n" + content[1:], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cut_archive_is_refused(tmp_path: Path) -> None:
    content = archive(plain("model.onnx", bytes(2000)))
    for end in range(0, 2000, 97):
        into = tmp_path / str(end)
        into.mkdir()
        with pytest.raises(SourceError, match="damaged"):
            unpacked(content[:end], into)


SAMPLE = archive(plain("a/model.onnx", b"0123456789" * 60), plain("x" * 120, b"y"), special(tarfile.DIRTYPE, "d"))


@settings(deadline=None)
@given(st.integers(0, 5 * 512), st.integers(0, 255))
def test_a_damaged_archive_writes_nothing_outside(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int
) -> None:
    outer = tmp_path_factory.mktemp("outer")
    (outer / "in").mkdir()
    changed = SAMPLE[:at] + bytes([value]) + SAMPLE[at + 1 :]
    try:
        written = unpacked(changed, outer / "in")
    except SourceError:
        written = {}
    for name in written:
        assert checked_name(name, "it") == name
    assert [path.name for path in outer.iterdir()] == ["in"]
    assert not any(path.is_symlink() for path in (outer / "in").rglob("*"))
