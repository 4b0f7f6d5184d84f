"""Files of the inference log: made for nobody else, whole, and there after a power cut.

Rules:
* Everything is made with 0700 and 0600 whatever the umask is. Links are not followed.
* Files become visible complete and synced: written under a name that begins with a dot, synced, renamed, and the
  directory synced.
* A lock is held by an open descriptor and ends with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")


def make_directory(path: Path) -> None:
    """As `mkdir -p`, each new one 0700 whatever the umask is, and synced into its parent."""
    if path.is_dir() or path.is_symlink():
        return
    make_directory(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
        path.chmod(0o700)
        sync_directory(path.parent)


@contextlib.contextmanager
def open_new(path: Path) -> Iterator[Any]:
    """A binary file of ours to be written from its start, 0600; an earlier one of that name is emptied."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        os.fchmod(descriptor, 0o600)
        yield stream


def write_whole(path: Path, data: bytes) -> None:
    """Puts `data` at `path` so that it is there complete and synced, or not at all. The name may be reused."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open_new(temporary) as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def write_json(path: Path, value: object) -> None:
    write_whole(path, msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")


def read_json(path: Path, kind: type[T]) -> T | None:
    """None where the file is gone or is not what it should be."""
    try:
        return msgspec.json.decode(read_file(path), type=kind)
    except (OSError, msgspec.MsgspecError):
        return None


def read_file(path: Path, start: int = 0) -> bytes:
    """A file's bytes from `start` on; links are not followed."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as stream:
        stream.seek(start)
        return stream.read()


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_lock(path: Path) -> int | None:
    """A descriptor that holds the lock until it is closed or the process ends; None if another process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
