"""The Hugging Face Hub as a source of models: `hf://owner/repository@commit[/path]`.

A branch or tag is resolved to the commit it points to now. Spoken as plain HTTP with the registries' own client
(web.py), against the Hub or any server with its API: huggingface_hub bounds its downloads neither in time nor in bytes,
keeps a cache of links of its own, and takes its token from the process's environment and home.

API: https://huggingface.co/docs/hub/api (`/api/models/{repo}/revision/{revision}`, `/api/models/{repo}/tree/…`, and
`/{repo}/resolve/{commit}/{path}`).

Rules: everything below `path` is the version directory; a `path` that is one file brings along the external data that
exporters put beside it (`model.onnx_data`, `model.onnx.data`). Every file is compared with what its commit says of it:
SHA-256 where it lies in large-file storage, else git's SHA-1 of the blob. The token goes to the Hub's own host only.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from time import monotonic
from typing import Any, BinaryIO, Final
from urllib.parse import parse_qs, quote, urlsplit

from gateway.errors import SourceError, SourceUnavailable
from gateway.registry.formats import hint
from gateway.registry.locator import HubReference, locate_hub
from gateway.registry.placing import Placing, checked_name
from gateway.registry.resolver import Bounds, Lineage, Resolved, Told, untold
from gateway.registry.web import Web, refusal

HUB: Final = "https://huggingface.co"
HUB_STORES: Final = (".huggingface.co", ".hf.co")
"""Where the Hub itself sends downloads of large files: hosts that end so."""
MAX_TAGS: Final = 100
MAX_PAGES: Final = 1000
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_NEXT: Final = re.compile(r'<([^<>]{1,4096})>\s*;\s*rel="?next"?')


def _nothing() -> str:
    return ""


@dataclass(frozen=True, slots=True)
class HuggingFaceSettings:
    """Which server, and who we are. The token is asked for with every request."""

    url: str = HUB
    token: Callable[[], str] = _nothing
    ca: Path | None = None
    redirects: tuple[str, ...] = ()
    """Hosts, with their ports, that files may be fetched from besides."""


@dataclass(frozen=True, slots=True)
class _Entry:
    path: str
    size: int
    sha256: str | None
    git: str | None


class HuggingFaceResolver:
    """One server with the Hub's API. Keeps nothing between calls."""

    scheme = "hf"

    def __init__(self, settings: HuggingFaceSettings, bounds: Bounds) -> None:
        self._settings = settings
        self._bounds = bounds
        self._web = Web(settings.url, self._credentials, ca=settings.ca, allowed=self._allowed)

    def __repr__(self) -> str:
        return f"<HuggingFaceResolver {self._settings.url}>"

    def registry_of(self, reference: str) -> str:
        """See `Resolver`."""
        return self._settings.url

    def resolve(self, reference: str) -> Resolved:
        """See `Resolver`."""
        located = locate_hub(reference)
        revision = located.revision or "main"
        path = f"api/models/{located.repository}/revision/{quote(revision, safe='')}"
        answer = self._web.ask(path, timeout_s=self._bounds.resolve_s)
        if answer.status == 404:
            raise SourceError(f"{self._settings.url} has no '{revision}' of a model {located.repository}")
        if answer.status != 200:
            raise refusal(answer)
        info = answer.json()
        commit = info.get("sha") if isinstance(info, dict) else None
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise SourceUnavailable(f"{answer.url} answered without a commit; does this server have the Hub's API?")
        if _COMMIT.fullmatch(revision) and commit != revision:
            raise SourceError(f"{answer.url} answered the commit {commit} when asked for {revision}; it is refused")
        within = f"/{located.path}" if located.path else ""
        tags = [tag for tag in info.get("tags") or () if isinstance(tag, str)][:MAX_TAGS]
        lineage = Lineage(
            git_commit=commit,
            created_by=_text(info.get("author")),
            created_at=_text(info.get("lastModified")),
            tags=tuple((tag[:256], "") for tag in tags),
            notes=("the commit is that of the repository on the Hub, not of the code that trained the model",),
        )
        uri = f"hf://{located.repository}@{commit}{within}"
        return Resolved(
            reference, uri, f"{located.repository}@{commit}{within}", "1", located.mutable, self._settings.url, lineage
        )

    def fetch(self, resolved: Resolved, into: Path, told: Told = untold) -> None:
        """See `Resolver`."""
        located = locate_hub(resolved.uri)
        deadline = monotonic() + self._bounds.fetch_s
        entries = list(self._wanted(located, deadline))
        total, done = sum(entry.size for entry in entries), 0
        if total > self._bounds.max_bytes:
            raise SourceError(f"{resolved.uri} has {total} bytes; raise registries.max_model_mb, or name a path in it")
        placing = Placing(into, self._bounds, resolved.uri)
        folder = self._folder(located, entries)
        for entry in entries:
            name = entry.path.removeprefix(folder)
            with placing.create(name) as stream:
                self._download(located, entry, stream, deadline, _further(told, done, total))
            placing.took(entry.size)
            done += entry.size

    def _folder(self, located: HubReference, entries: list[_Entry]) -> str:
        """What is left out of the files' names, with its slash."""
        if any(entry.path == located.path for entry in entries):
            parent = str(PurePosixPath(located.path).parent)
            return "" if parent == "." else f"{parent}/"
        return f"{located.path}/" if located.path else ""

    def _wanted(self, located: HubReference, deadline: float) -> Iterator[_Entry]:
        """The files below the path, or the file there and what belongs to it."""
        where = located.path
        listed = self._tree(located, str(PurePosixPath(where).parent) if where.endswith(".onnx") else where, deadline)
        entries = list(listed)
        if where.endswith(".onnx"):
            entries = [e for e in entries if e.path == where or e.path.startswith((f"{where}_data", f"{where}.data"))]
        if not any(entry.path.endswith(".onnx") for entry in entries):
            advice = hint(entry.path for entry in entries)
            raise SourceError(
                f"hf://{located.repository} has no ONNX model{f' under {where}' if where else ''}"
                + (f"; {advice}" if advice else "")
            )
        yield from entries

    def _tree(self, located: HubReference, where: str, deadline: float) -> Iterator[_Entry]:
        """Every file below a folder of the commit; bounded in number."""
        folder = "" if where in ("", ".") else f"/{quote(where)}"
        path = f"api/models/{located.repository}/tree/{located.revision}{folder}"
        query: dict[str, str] = {"recursive": "true"}
        count = 0
        for _ in range(MAX_PAGES):
            answer = self._web.ask(path, query=query, timeout_s=_left(deadline))
            if answer.status == 404:
                raise SourceError(f"hf://{located.repository} has no folder '{where}' in {located.revision}")
            if answer.status != 200:
                raise refusal(answer)
            listed = answer.json()
            for item in listed if isinstance(listed, list) else ():
                if isinstance(item, dict) and item.get("type") == "file":
                    count += 1
                    if count > self._bounds.max_files:
                        raise SourceError(f"hf://{located.repository} has more than {self._bounds.max_files} files")
                    yield _entry(item, located)
            following = _NEXT.search(answer.headers.get("link", ""))
            cursor = parse_qs(urlsplit(following[1]).query).get("cursor") if following else None
            if not cursor:
                return
            query["cursor"] = cursor[0]
        raise SourceError(f"hf://{located.repository} lists its files on more than {MAX_PAGES} pages")

    def _download(self, located: HubReference, entry: _Entry, into: BinaryIO, deadline: float, told: Told) -> None:
        path = f"{located.repository}/resolve/{located.revision}/{quote(entry.path)}"
        blob = _GitBlob(into, entry.size)
        received = self._web.save(path, blob, timeout_s=_left(deadline), limit=entry.size, told=told)  # type: ignore[arg-type]
        right = received.size == entry.size and (
            entry.sha256 == received.sha256 if entry.sha256 is not None else entry.git in (None, blob.hexdigest())
        )
        if not right:
            raise SourceError(
                f"{self._settings.url} sent other bytes for {entry.path} than the commit {located.revision} holds; "
                "they are refused"
            )

    def _credentials(self) -> dict[str, str]:
        token = self._settings.token()
        return {"Authorization": f"Bearer {token}"} if token else {}

    def _allowed(self, url: str) -> bool:
        host = urlsplit(url).netloc
        home = urlsplit(self._settings.url).netloc
        of_the_hub = self._settings.url == HUB and url.startswith("https://") and host.endswith(HUB_STORES)
        return host == home or host in self._settings.redirects or of_the_hub


class _GitBlob:
    """Passes bytes on and hashes them as git does: SHA-1 over `blob <size>` and the content."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream = stream
        self._digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)

    def write(self, chunk: bytes) -> int:
        self._digest.update(chunk)
        return self._stream.write(chunk)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _entry(item: Mapping[str, Any], located: HubReference) -> _Entry:
    lfs = item.get("lfs")
    stated = lfs if isinstance(lfs, dict) else {}
    path, size = item.get("path"), stated.get("size", item.get("size"))
    if not isinstance(path, str) or type(size) is not int or size < 0:
        raise SourceUnavailable(f"the list of files of hf://{located.repository} cannot be read")
    sha256, git = stated.get("oid"), item.get("oid")
    if stated and not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
        raise SourceError(f"hf://{located.repository} has a large file without a SHA-256: {path[:100]!a}")
    known = git if isinstance(git, str) and _COMMIT.fullmatch(git) and not stated else None
    return _Entry(checked_name(path, f"hf://{located.repository}"), size, sha256 if stated else None, known)


def _further(told: Told, before: int, total: int) -> Told:
    return lambda count, _: told(before + count, total)


def _left(deadline: float) -> float:
    return max(0.001, deadline - monotonic())


def _text(value: object) -> str | None:
    return value[:256] if isinstance(value, str) and value else None
