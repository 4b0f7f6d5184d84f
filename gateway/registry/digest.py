r"""Reading one model version from disk, once: what is hashed is what is loaded.

The digest of a version directory is SHA-256 over the text that `sha256sum` prints for all its regular files, paths
relative to the directory, sorted bytewise. Anyone can check it with coreutils:

    cd digits/3 && find . -type f -printf '%P\n' | LC_ALL=C sort | xargs -d '\n' sha256sum -- | sha256sum

One `.onnx` file served alone is treated as a version directory that holds it as `model.onnx`, so its digest does
not change when it moves into a repository. To check it:

    printf '%s  model.onnx\n' "$(sha256sum < digits.onnx | cut -d' ' -f1)" | sha256sum

Rules: each file is opened once, without following links, and must be a regular file; a link may stand only where
it points inside the directory (it is not listed then, as `find -type f` does not list it), anything else is
refused. Only the model's bytes are kept; other files are hashed in chunks. Hidden files count.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from gateway.core.model import Artifact, ArtifactFile
from gateway.errors import ConfigError, Fault

MODEL_FILE: Final = "model.onnx"
MAX_MODEL_BYTES: Final = 2**31 - 1
"""A protobuf message cannot be larger."""
MAX_FILES: Final = 10_000
MAX_DEPTH: Final = 32
_CHUNK_BYTES: Final = 1024 * 1024


def read_artifact(path: Path, name: str, version: str, model_file: str = MODEL_FILE, source: str = "") -> Artifact:
    """Read and hash a version directory, or one `.onnx` file standing for a directory of its own.

    Args:
        path: the version directory or the file.
        name: the model's name.
        version: the version, as text.
        model_file: name of the model file in the directory; not used for a single file; empty: it has none (an
            ensemble), and `Artifact.model` is empty.
        source: where it came from, for people.

    Raises:
        ConfigError: missing or unreadable files, links that leave the directory, special files, too many or too
            large files, names that are not UTF-8.
    """
    if path.is_file():
        content, entry = _read_whole(path, MODEL_FILE, follow=True)
        return Artifact(name, version, source or str(path), (entry,), digest_of([entry]), content, MODEL_FILE)
    wanted = _model_path(path, model_file) if model_file else None
    model: bytes | None = None if model_file else b""
    files = []
    for relative in _regular_files(path):
        if relative == wanted:
            model, entry = _read_whole(path / relative, relative)
        else:
            entry = _hash(path / relative, relative)
        files.append(entry)
    if model is None:
        raise _refused(path / model_file, "this file is missing; it must be a regular file")
    return Artifact(name, version, source or str(path), tuple(files), digest_of(files), model, model_file)


def digest_of(files: Iterable[ArtifactFile]) -> str:
    """`sha256:<64 hex>` over the listing of `files`, in any order."""
    return "sha256:" + hashlib.sha256(listing(files)).hexdigest()


def listing(files: Iterable[ArtifactFile]) -> bytes:
    """What `sha256sum` prints for the files, in bytewise order of their paths.

    A line whose file name holds a backslash, a line feed or a carriage return begins with a backslash and has these
    escaped (coreutils 9).
    """
    lines = []
    for path, sha256 in sorted((os.fsencode(file.path), file.sha256) for file in files):
        escaped = path.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
        mark = b"\\" if escaped != path else b""
        lines.append(mark + sha256.encode() + b"  " + escaped + b"\n")
    return b"".join(lines)


def _refused(path: Path, message: str) -> ConfigError:
    return ConfigError([Fault(str(path), 0, "", message)])


def _model_path(directory: Path, model_file: str) -> str:
    """The model file's path relative to `directory` after links inside the directory are followed."""
    path = directory / model_file
    if not path.is_symlink():
        return model_file
    try:
        return path.resolve().relative_to(directory.resolve()).as_posix()
    except ValueError:
        raise _refused(path, "this link leaves the version directory; put the file itself there") from None


def _regular_files(directory: Path) -> list[str]:
    """Relative paths of all regular files, sorted bytewise; refuses what cannot be covered by the digest."""
    root = directory.resolve()
    found: list[str] = []
    pending = [("", 0)]
    while pending:
        prefix, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise _refused(directory / prefix, f"nested deeper than {MAX_DEPTH} directories")
        try:
            with os.scandir(directory / prefix) as entries:
                for entry in entries:
                    relative = f"{prefix}{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        pending.append((relative + "/", depth + 1))
                    elif _is_listed(entry, directory / relative, root):
                        found.append(relative)
        except OSError as error:
            raise _refused(directory / prefix, f"cannot be read: {error.strerror}; check its permissions") from None
        if len(found) + len(pending) > MAX_FILES:
            raise _refused(directory, f"holds more than {MAX_FILES} files; keep only the model's files there")
    return sorted(found, key=os.fsencode)


def _is_listed(entry: os.DirEntry[str], path: Path, root: Path) -> bool:
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        raise _refused(path.parent, f"holds a file name that is not UTF-8: {entry.name!a}; rename it") from None
    if entry.is_symlink():
        if not path.resolve().is_relative_to(root):
            raise _refused(path, "this link leaves the version directory; put the file itself there")
        return False
    if not entry.is_file(follow_symlinks=False):
        raise _refused(path, "is neither a file nor a directory; remove it")
    return True


def _open(path: Path, *, follow: bool = False) -> int:
    """A descriptor of a regular file. Opening never blocks and never follows a link unless told to."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise _refused(path, f"cannot be read: {error.strerror}; check its permissions") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _refused(path, "is not a regular file")
    return descriptor


def _hash(path: Path, relative: str) -> ArtifactFile:
    digest = hashlib.sha256()
    size = 0
    with open(_open(path), "rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return ArtifactFile(relative, size, digest.hexdigest())


def _read_whole(path: Path, relative: str, *, follow: bool = False) -> tuple[bytes, ArtifactFile]:
    with open(_open(path, follow=follow), "rb") as stream:
        if os.fstat(stream.fileno()).st_size > MAX_MODEL_BYTES:
            raise _refused(path, "is larger than 2 GiB, which no ONNX file can be")
        content = stream.read(MAX_MODEL_BYTES + 1)
    if len(content) > MAX_MODEL_BYTES:
        raise _refused(path, "is larger than 2 GiB, which no ONNX file can be")
    return content, ArtifactFile(relative, len(content), hashlib.sha256(content).hexdigest())
