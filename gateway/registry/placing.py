"""Files of a version on their way into its directory: names that a source gives, and how much it may send.

Rules: a name is a relative path of plain parts, printable, at most 1024 bytes; it never leaves the directory, and no
file stands where another one does. Nothing is written that the bounds do not allow, counted as it comes.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from gateway.errors import SourceError, SourceUnavailable
from gateway.registry.formats import shown
from gateway.registry.resolver import Bounds

MAX_NAME: Final = 1024
MAX_PARTS: Final = 32
_BLOCK: Final = 512
_MAX_HEADER: Final = 1024 * 1024
"""Bytes of a long name, or of a pax header: names are far shorter."""
_CHUNK: Final = 1024 * 1024
_FILES: Final = frozenset({b"0", b"\0", b"7"})
_KINDS: Final = {b"1": "a hard link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


def checked_name(name: str, what: str) -> str:
    """`name` as a relative path. `what`: who gives it, for people. Raises SourceError."""
    parts = name.split("/")
    usable = all(part not in ("", ".", "..") and len(part.encode(errors="replace")) <= 255 for part in parts)
    if not usable or len(parts) > MAX_PARTS or len(name) > MAX_NAME or not name.isprintable() or "\\" in name:
        raise SourceError(f"{what} has a file with the name '{shown(name)}', which does not name a file below it")
    return name


class Placing:
    """The files of one fetch: creates them, and counts against the bounds."""

    def __init__(self, into: Path, bounds: Bounds, what: str) -> None:
        """`into`: an empty directory. `what`: the source, for people."""
        self.into = into
        self.what = what
        self.files = 0
        self.bytes_left = bounds.max_bytes
        self._max_files = bounds.max_files
        self._max_bytes = bounds.max_bytes

    def __repr__(self) -> str:
        return f"<Placing {self.what} files={self.files} bytes_left={self.bytes_left}>"

    def create(self, name: str) -> BinaryIO:
        """A new file for writing. Raises SourceError: its name, or one file too many; SourceUnavailable: the disk."""
        target = self.into / checked_name(name, self.what)
        self.files += 1
        if self.files > self._max_files:
            raise SourceError(f"{self.what} has more than {self._max_files} files")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            return target.open("xb")
        except (FileExistsError, NotADirectoryError):
            raise SourceError(f"{self.what} has two files with the name '{shown(name)}'") from None
        except OSError as error:
            raise _unwritable(error) from None

    def took(self, count: int) -> None:
        """Bytes that came. Raises SourceError: too many."""
        self.bytes_left -= count
        if self.bytes_left < 0:
            raise SourceError(f"{self.what} is larger than {self._max_bytes} bytes; raise registries.max_model_mb")

    def write(self, stream: BinaryIO, chunk: bytes) -> None:
        """Raises SourceError: too many bytes; SourceUnavailable: the disk does not take them."""
        self.took(len(chunk))
        try:
            stream.write(chunk)
        except OSError as error:
            raise _unwritable(error) from None

    def unpack(self, archive: BinaryIO, strip: str = "", *, gzipped: bool = False) -> None:
        """Write the files of a tar archive (ustar, pax or GNU names), streamed, and nothing else of it.

        Args:
            archive: at its beginning.
            strip: folder that is left out of names which begin with it.

        Raises:
            SourceError: links, devices, names that leave the directory, an archive that is damaged or too large.
        """
        stream = gzip.GzipFile(fileobj=archive, mode="rb") if gzipped else archive
        try:
            for name, content in _members(stream, self):  # type: ignore[arg-type]  # GzipFile reads like a BinaryIO
                with self.create(name.removeprefix(f"{strip}/") if strip else name) as target:
                    for chunk in content:
                        self.write(target, chunk)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise SourceError(f"{self.what} has an archive that cannot be unpacked: {error}") from None


def _members(stream: BinaryIO, placing: Placing) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Name and content of every regular file; the content must be read before the next member is asked for."""
    long_name = ""
    long_size: int | None = None
    while True:
        header = _exactly(stream, _BLOCK, placing)
        if not header.strip(b"\0"):
            return
        kind, size = header[156:157], _number(header[124:136], placing)
        if not _checks(header):
            raise _broken(placing)
        if kind in b"xgLK" and kind:
            if size > _MAX_HEADER:
                raise _broken(placing)
            content = _exactly(stream, size + -size % _BLOCK, placing)[:size]
            if kind == b"L":
                long_name = _name(content, placing)
            elif kind == b"x":
                fields = _pax(content, placing)
                long_name = fields.get("path", long_name)
                long_size = int(fields["size"]) if fields.get("size", "").isdecimal() else long_size
            continue
        name = long_name or _ustar_name(header, placing)
        size = size if long_size is None else long_size
        long_name, long_size = "", None
        if kind == b"5":
            checked = _inside(name)
            if checked:
                checked_name(checked, placing.what)
            continue
        if kind not in _FILES:
            what = _KINDS.get(kind, "something else than files and directories")
            raise SourceError(f"{placing.what} has an archive with {what} in it ({shown(name)}); pack plain files only")
        content_left = _Left(size)
        yield _inside(name), _content(stream, content_left, placing)
        if content_left.count:
            raise RuntimeError("a member's content was not read")
        _exactly(stream, -size % _BLOCK, placing)


class _Left:
    def __init__(self, count: int) -> None:
        self.count = count


def _content(stream: BinaryIO, left: _Left, placing: Placing) -> Iterator[bytes]:
    while left.count:
        chunk = stream.read(min(_CHUNK, left.count))
        if not chunk:
            raise _broken(placing)
        left.count -= len(chunk)
        yield chunk


def _exactly(stream: BinaryIO, size: int, placing: Placing) -> bytes:
    content = stream.read(size)
    if len(content) != size:
        raise _broken(placing)
    placing.took(size)  # an archive of nothing but headers ends as well
    return content


def _inside(name: str) -> str:
    """`./a/b/` → `a/b`."""
    return name.removeprefix("./").rstrip("/") if name.rstrip("/") != "." else ""


def _ustar_name(header: bytes, placing: Placing) -> str:
    name = _name(header[:100], placing)
    prefix = _name(header[345:500], placing) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _name(field: bytes, placing: Placing) -> str:
    try:
        return field.split(b"\0", 1)[0].decode()
    except UnicodeDecodeError:
        raise SourceError(f"{placing.what} has an archive with a file name that is not UTF-8") from None


def _number(field: bytes, placing: Placing) -> int:
    """An octal number, or GNU's binary one."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.split(b"\0", 1)[0].strip()
    try:
        value = int(text or b"0", 8)
    except ValueError:
        raise _broken(placing) from None
    if value < 0:
        raise _broken(placing)
    return value


def _checks(header: bytes) -> bool:
    text = header[148:156].strip(b"\0 ")
    expected = sum(header[:148]) + 8 * 0x20 + sum(header[156:])
    return text.isdigit() and all(digit in b"01234567" for digit in text) and int(text, 8) == expected


def _pax(content: bytes, placing: Placing) -> dict[str, str]:
    """Records of a pax header: `length key=value\\n`, the length counting itself."""
    fields: dict[str, str] = {}
    at = 0
    while at < len(content):
        space = content.find(b" ", at, at + 20)
        length = int(content[at:space]) if space > at and content[at:space].isdigit() else 0
        record = content[space + 1 : at + length]
        key, equals, value = record[:-1].partition(b"=")
        if length < 5 or at + length > len(content) or not record.endswith(b"\n") or not equals:
            raise _broken(placing)
        fields[key.decode(errors="replace")] = _name(value, placing)
        at += length
    return fields


def _broken(placing: Placing) -> SourceError:
    return SourceError(f"{placing.what} has an archive that cannot be unpacked: it is damaged or no tar archive")


def _unwritable(error: OSError) -> SourceUnavailable:
    return SourceUnavailable(f"cannot write the model's files: {error.strerror}; make room there", soon=False)
