"""models.lock: what each reference meant when it served last, so that it can be served again.

    [[model]]
    reference = "models:/digits@champion"  as in the configuration
    uri = "models:/digits/3"               names the same files for ever
    immutable_id = "m-…"                   the registry's identity of them
    version = "3"
    registry = "http://mlflow:5000"
    digest = "sha256:…"                    what the files were
    resolved_at = "2026-11-23T11:20:00Z"
    instead_of = "m-…"                     only if an operator chose it: identity of what the reference meant then

TOML, sorted by reference, one entry each: made to be read, diffed and kept in version control. Written by
`gateway lock` and by a gateway that serves (unless it is locked).

Rules: a reader never sees half a file: it is replaced by renaming. Two writers take turns (a lock on the directory);
each changes only its own entry. A file that is not understood is never overwritten.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final

from gateway.errors import ConfigError, Fault

MAX_BYTES: Final = 4 * 1024 * 1024
RESTORE: Final = "restore it, or remove it and run gateway lock"
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_VERSION: Final = re.compile(r"[1-9][0-9]{0,18}")
_HEADER: Final = """\
# What each model reference meant when it was last served. `gateway lock` asks the registries again.
# With registries.locked: true (--locked) only what stands here is served.
"""


@dataclass(frozen=True, slots=True)
class Locked:
    """One entry. All fields are texts that say something; `registry` may be empty."""

    reference: str
    uri: str
    immutable_id: str
    version: str
    registry: str
    digest: str
    resolved_at: str
    """RFC 3339, UTC."""
    instead_of: str = ""
    """Served until the reference means something else than this identity; empty: it is what the reference meant."""

    def same(self, other: Locked | None) -> bool:
        """Whether both mean the same files, for the same reason; `resolved_at` does not count."""
        return other is not None and (self.uri, self.immutable_id, self.digest, self.instead_of) == (
            other.uri, other.immutable_id, other.digest, other.instead_of,
        )  # fmt: skip


class LockFile:
    """One models.lock; nothing is kept between calls, which block on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Locked]:
        """The entries by reference; none if there is no file.

        Raises:
            ConfigError: it cannot be read, or not understood, with the line where there is one.
        """
        try:
            with self.path.open("rb") as stream:
                data = stream.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise self._refused(f"cannot be read: {error.strerror}; check its permissions") from None
        if len(data) > MAX_BYTES:
            raise self._refused(f"is larger than {MAX_BYTES // 2**20} MiB; it is not one of ours")
        return {entry.reference: entry for entry in self._parse(data)}

    def record(self, entry: Locked) -> bool:
        """Put `entry` in the place of the one for its reference; False if nothing had to be changed.

        Raises:
            ConfigError: the file that is there is not understood.
            OSError: it cannot be written.
        """
        return bool(self.update({entry.reference: entry}))

    def update(self, entries: Mapping[str, Locked], gone: Iterable[str] = ()) -> list[str]:
        """Change several entries at once, and drop those of `gone`; returns the references whose meaning changed."""
        with self._turn():
            before = self.read()
            changed = [reference for reference, entry in entries.items() if not entry.same(before.get(reference))]
            dropped = [reference for reference in gone if reference in before]
            if changed or dropped:
                after = before | {reference: entries[reference] for reference in changed}
                self._write({key: after[key] for key in sorted(after) if key not in dropped})
            return changed + dropped

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _write(self, entries: Mapping[str, Locked]) -> None:
        made = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with made.open("w", encoding="utf-8") as stream:
                stream.write(text_of(entries.values()))
                stream.flush()
                os.fsync(stream.fileno())
            made.replace(self.path)
        finally:
            made.unlink(missing_ok=True)

    def _parse(self, data: bytes) -> Iterator[Locked]:
        try:
            document = tomllib.loads(data.decode())
        except (ValueError, RecursionError) as error:
            said = " ".join(str(error).split())[:200]
            raise self._refused(f"is not TOML: {said}; {RESTORE}") from None
        listed = document.pop("model", [])
        if document or not isinstance(listed, list):
            raise self._refused(f"holds something else than [[model]] entries; {RESTORE}")
        for item in listed:
            yield self._entry(item)

    def _entry(self, item: object) -> Locked:
        names = [known.name for known in fields(Locked) if known.name != "instead_of"]
        if not isinstance(item, dict) or set(item) - {"instead_of"} != set(names):
            raise self._refused(f"has an entry that does not have exactly the keys {', '.join(names)}; {RESTORE}")
        if not all(isinstance(value, str) and (value or key == "registry") for key, value in item.items()):
            raise self._refused(f"has an entry with a value that is no text, or empty; {RESTORE}")
        if not _DIGEST.fullmatch(item["digest"]) or not _VERSION.fullmatch(item["version"]):
            raise self._refused(
                f"has an entry for {item['reference'][:200]} whose digest or version is not one; {RESTORE}"
            )
        return Locked(**item)

    def _refused(self, message: str) -> ConfigError:
        return ConfigError([Fault(str(self.path), 0, "", message)])

    def __repr__(self) -> str:
        return f"<LockFile {self.path}>"


def text_of(entries: Iterable[Locked]) -> str:
    """The file's text. `entries`: in the order in which they are to stand."""
    blocks = [_HEADER]
    for entry in entries:
        lines = [f"{key} = {_quoted(value)}\n" for key, value in asdict(entry).items() if value or key != "instead_of"]
        blocks.append("[[model]]\n" + "".join(lines))
    return "\n".join(blocks)


def _quoted(text: str) -> str:
    """A TOML basic string: JSON's, but for DEL, which must be escaped in it."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
