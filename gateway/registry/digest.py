r"""Reading one model version from disk, once: what is hashed is what is loaded.

The digest of a version directory is SHA-256 over the text that `sha256sum` prints for all its regular files, paths
relative to the directory, sorted bytewise. Anyone can check it with coreutils:

    cd digits/3 && find . -type f -printf '%P\n' | LC_ALL=C sort | xargs -d '\n' sha256sum -- | sha256sum

One `.onnx` file served alone is treated as a version directory that holds it as `model.onnx`, so its digest does
not change when it moves into a repository. To check it:

    printf '%s  model.onnx\n' "$(sha256sum < digits.onnx | cut -d' ' -f1)" | sha256sum

Where the model keeps tensors in other files (external data), those files go with it: below the version directory, or
beside the file that is served alone, and then they are listed as well. `model.onnx` may be a directory that holds the
model as `model.onnx` and its data (Triton's form).

Rules: each file is opened once, beneath the directory, without following a link on the way, and must be a regular file;
a link may stand only where it points inside the directory (it is not listed then, as `find -type f` does not list it),
anything else is refused. Only what is loaded is kept, the model's bytes and a sealed copy of its external data that is
made while they are hashed; other files are hashed in chunks. Hidden files count.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Final

from gateway.core.model import Artifact, ArtifactFile
from gateway.errors import ConfigError, Fault
from gateway.registry import external_data
from gateway.workers.bundle import Bundle, BundleError, BundleWriter

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
        return _read_alone(path, name, version, source or str(path))
    wanted = _model_path(path, model_file) if model_file else None
    names = _regular_files(path)
    model, files = b"", []
    if wanted is not None:
        if wanted not in names:
            raise _refused(path / model_file, "this file is missing; it must be a regular file")
        model, entry = _read_whole(path, wanted, wanted)
        files.append(entry)
    root = str(PurePosixPath(wanted or "").parent)
    locations = {text: str(PurePosixPath(root, plain)) for text, plain in _locations(path / model_file, model).items()}
    _check_present(path, locations, names, wanted)
    kept = set(locations.values())
    writer = _writer(path, kept) if locations else None
    files += [_hash(path, name, writer if name in kept else None) for name in names if name != wanted]
    return Artifact(
        name,
        version,
        source or str(path),
        tuple(sorted(files, key=lambda file: os.fsencode(file.path))),
        digest_of(files),
        model,
        model_file,
        _finished(path, writer, locations),
    )


def _read_alone(path: Path, name: str, version: str, source: str) -> Artifact:
    """One file that stands for a directory of its own; its external data lie beside it."""
    model, entry = _read_whole(path.parent, path.name, MODEL_FILE, follow=True)
    files, directory = [entry], path.parent
    locations = _locations(path, model)
    there = [data for data in locations.values() if stat.S_ISREG(_kind(directory / data))]
    _check_present(directory, locations, there, MODEL_FILE)
    writer = _writer(directory, set(locations.values())) if locations else None
    files += [_hash(directory, data, writer) for data in sorted(set(locations.values()))]
    files.sort(key=lambda file: os.fsencode(file.path))
    external = _finished(directory, writer, locations)
    return Artifact(name, version, source, tuple(files), digest_of(files), model, MODEL_FILE, external)


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
    """The model file's path relative to `directory`, after links inside the directory are followed; a directory of that
    name holds the model as `model.onnx`."""
    path = directory / model_file
    if path.is_dir():
        path /= MODEL_FILE
    if not path.resolve().is_relative_to(directory.resolve()):
        raise _refused(path, "this link leaves the version directory; put the file itself there")
    if path.is_symlink() or path.parent != directory:
        return path.resolve().relative_to(directory.resolve()).as_posix()
    return path.name


def _locations(path: Path, model: bytes) -> dict[str, str]:
    """External data files as the model names them → relative to the model's directory."""
    try:
        return external_data.locations(model)
    except external_data.ExternalDataError as error:
        raise _refused(path, str(error)) from None


def _kind(path: Path) -> int:
    """Mode bits of what is there, not of what it points to; 0: nothing."""
    try:
        return os.lstat(path).st_mode
    except OSError:
        return 0


def _check_present(
    directory: Path, locations: Mapping[str, str], names: Collection[str], model_file: str | None
) -> None:
    if model_file in locations.values():
        raise _refused(directory / str(model_file), "names itself as its external data file; save the model again")
    lacking = sorted(set(locations.values()) - set(names))
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        message = f"the model keeps tensors in this file{more}; put the file itself there, a link is not followed"
        raise _refused(directory / lacking[0], message)


def _writer(directory: Path, paths: Iterable[str]) -> BundleWriter:
    """Room for copies of these files."""
    expected = 0
    for path in paths:
        with contextlib.suppress(OSError):  # said when it is opened
            expected += os.lstat(directory / path).st_size
    try:
        return BundleWriter(expected)
    except BundleError as error:
        raise _refused(directory, str(error)) from None


def _finished(directory: Path, writer: BundleWriter | None, locations: Mapping[str, str]) -> Bundle | None:
    if writer is None:
        return None
    try:
        return writer.finish(locations)
    except BundleError as error:
        raise _refused(directory, str(error)) from None


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


def _open(directory: Path, relative: str, *, follow: bool = False) -> int:
    """A descriptor of the regular file `directory / relative`. Opening never blocks, and follows no link below
    `directory` unless told to."""
    own = os.O_RDONLY | os.O_CLOEXEC
    at = None
    try:
        *folders, last = relative.split("/")
        at = os.open(directory, own | os.O_DIRECTORY)
        for folder in folders:
            inner = os.open(folder, own | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = inner
        descriptor = os.open(last, own | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW), dir_fd=at)
    except OSError as error:
        why = "it is a link" if error.errno in (errno.ELOOP, errno.EMLINK) else error.strerror
        raise _refused(directory / relative, f"cannot be read: {why}; check its permissions") from None
    finally:
        if at is not None:
            os.close(at)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _refused(directory / relative, "is not a regular file")
    return descriptor


def _hash(directory: Path, relative: str, writer: BundleWriter | None = None) -> ArtifactFile:
    """Hash one file; `writer` gets the very bytes that are hashed."""
    digest = hashlib.sha256()
    size = 0
    if writer is not None:
        writer.begin(relative)
    with open(_open(directory, relative), "rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            if writer is not None:
                try:
                    writer.write(chunk)
                except BundleError as error:
                    raise _refused(directory / relative, str(error)) from None
    return ArtifactFile(relative, size, digest.hexdigest())


def _read_whole(directory: Path, name: str, listed: str, *, follow: bool = False) -> tuple[bytes, ArtifactFile]:
    """The file `directory / name`, which the digest lists as `listed`."""
    with open(_open(directory, name, follow=follow), "rb") as stream:
        if os.fstat(stream.fileno()).st_size > MAX_MODEL_BYTES:
            raise _refused(directory / name, "is larger than 2 GiB, which no ONNX file can be")
        content = stream.read(MAX_MODEL_BYTES + 1)
    if len(content) > MAX_MODEL_BYTES:
        raise _refused(directory / name, "is larger than 2 GiB, which no ONNX file can be")
    return content, ArtifactFile(listed, len(content), hashlib.sha256(content).hexdigest())
