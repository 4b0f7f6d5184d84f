"""How files come into the model cache, and out of it: whole, in one step, by one process at a time.

    <cache>/incoming/<token>/     files on their way; <token>.busy is locked while somebody writes there
    <cache>/incoming/<id>.turn    locked by whoever fetches one version, so that others wait and find it

A process that is killed leaves something in `incoming` only, which the next fetch removes: whose lock nobody holds, who
wrote there is dead. What is removed goes through here too, so that nobody finds half of it in its place.

Several processes may share a cache. Everything blocks on the disk, and raises its OSErrors.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from gateway.errors import SourceError, SourceUnavailable

_TURN_AGE_S: Final = 86_400.0
_TURN_S: Final = 0.1
"""Between two looks whether another process has finished fetching."""


class Incoming:
    """One cache's directory for what is on its way."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __repr__(self) -> str:
        return f"<Incoming {self._folder}>"

    @contextlib.contextmanager
    def turn(self, identity: str, what: str, wait_s: float) -> Iterator[None]:
        """Only one process fetches a version at a time. `identity`: which version; `what`: the same, for people.

        Raises:
            SourceUnavailable: another process still has the turn after `wait_s` seconds.
        """
        path = self._folder / f"{hashlib.sha256(identity.encode()).hexdigest()}.turn"
        path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + wait_s
        with path.open("w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise SourceUnavailable(f"another process is still fetching {what}") from None
                    time.sleep(_TURN_S)
            yield

    @contextlib.contextmanager
    def directory(self) -> Iterator[Path]:
        """An empty directory of our own; whatever is left in it goes, also after our death."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        path = self._folder / uuid.uuid4().hex
        busy = path.with_suffix(".busy")
        with _held(busy):
            path.mkdir(mode=0o700)
            try:
                yield path
            finally:
                erase(path)
                busy.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove what dead processes left."""
        for busy in self._folder.glob("*.busy"):
            with contextlib.suppress(OSError), busy.open("r") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                erase(busy.with_suffix(""))
                busy.unlink(missing_ok=True)

    def sweep_turns(self) -> None:
        """Lock files that nobody has wanted for a day."""
        for turn in self._folder.glob("*.turn"):
            with contextlib.suppress(OSError), turn.open("r") as lock:
                if time.time() - turn.stat().st_mtime > _TURN_AGE_S:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    turn.unlink(missing_ok=True)


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """A lock file of our own, locked; made again if somebody swept it before it was locked."""
    while True:
        with path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = None
            with contextlib.suppress(FileNotFoundError):
                found = path.stat().st_ino
            if found == os.fstat(lock.fileno()).st_ino:
                yield
                return


def settle(directory: Path) -> None:
    """Everything below is on the disk, and nobody writes to it any more; only regular files and directories remain."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            path = Path(folder) / name
            if path.is_symlink():
                raise SourceError(f"the version holds the link {name}; only files are taken")
            path.chmod(0o444)
            _sync(path)
        if Path(folder) != directory:
            Path(folder).chmod(0o555)
        _sync(Path(folder))


def move(directory: Path, target: Path) -> None:
    """Take a version in, in one step; whoever was faster with the same files has done it."""
    try:
        directory.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        return
    target.chmod(0o555)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def erase(path: Path) -> None:
    """Remove a tree, read-only or not."""
    for folder, _, _ in os.walk(path):
        with contextlib.suppress(OSError):
            Path(folder).chmod(stat.S_IRWXU)
    shutil.rmtree(path, ignore_errors=True)


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` at `path`, complete and synced, or not at all."""
    made = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with made.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)
