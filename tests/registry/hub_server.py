"""A server with as much of the Hugging Face Hub's API as clients need to find and fetch a model.

That it is like the Hub is checked by letting huggingface_hub itself read from it (test_huggingface.py).
"""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 2
"""Entries of one page of a listing: small, so that there are several."""
LARGE = 1000
"""Bytes from which on a file lies in large-file storage."""


@dataclass
class Hub:
    """`commits`: commit → path → content. `store`: host:port that large files are fetched from; empty: here."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    repository: str = "acme/digits"
    token: str = ""
    store: str = ""
    corrupt: bytes | None = None
    """Sent instead of every file's content."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Paths and Authorization headers."""
    url: str = ""

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        name = hashlib.sha1(json.dumps({k: v.hex() for k, v in files.items()}).encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if len(content) < LARGE:
            return {"type": "file", "oid": git, "size": len(content), "path": path}
        lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return {"type": "file", "oid": "0" * 40, "size": len(content), "path": path, "lfs": lfs}

    def reply(self, target: str, authorization: str) -> tuple[int, dict[str, str], bytes]:
        url = urlsplit(target)
        path, query = unquote(url.path), {k: v[0] for k, v in parse_qs(url.query).items()}
        self.asked.append((path, authorization))
        if path.startswith("/large/"):
            _, _, commit, name = path.split("/", 3)
            return 200, {}, self.corrupt if self.corrupt is not None else self.commits[commit][name]
        if self.token and authorization != f"Bearer {self.token}":
            return 401, {}, b'{"error": "Invalid username or password."}'
        if path.startswith(start := f"/api/models/{self.repository}"):
            what, _, rest = path.removeprefix(start).removeprefix("/").partition("/")
            return self._tree(rest, query) if what == "tree" else self._revision(rest or "main")
        if path.startswith(start := f"/{self.repository}/resolve/"):
            return self._file(path.removeprefix(start))
        return 404, {"X-Error-Code": "RepoNotFound"}, b'{"error": "Repository not found"}'

    def _revision(self, revision: str) -> tuple[int, dict[str, str], bytes]:
        commit = self.branches.get(revision, revision)
        if commit not in self.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b'{"error": "Invalid rev id"}'
        document = {
            "id": self.repository,
            "modelId": self.repository,
            "sha": commit,
            "author": "acme",
            "lastModified": "2026-11-20T10:00:00.000Z",
            "private": False,
            "tags": ["onnx", "region:eu"],
            "siblings": [{"rfilename": name} for name in self.commits[commit]],
        }
        return 200, {}, json.dumps(document).encode()

    def _tree(self, rest: str, query: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        commit, _, folder = rest.partition("/")
        commit = self.branches.get(commit, commit)
        start = f"{folder}/" if folder else ""
        listed = [self.entry(n, c) for n, c in sorted(self.commits[commit].items()) if n.startswith(start)]
        folders = sorted({e["path"].rpartition("/")[0] for e in listed} - {"", folder})
        entries = [{"type": "directory", "oid": "1" * 40, "size": 0, "path": name} for name in folders] + listed
        if not entries:
            return 404, {"X-Error-Code": "EntryNotFound"}, b'{"error": "not found"}'
        at = int(query.get("cursor", "0"))
        headers = {}
        if at + PAGE < len(entries):
            following = f"{self.url}/api/models/{self.repository}/tree/{rest}?recursive=true&cursor={at + PAGE}"
            headers["Link"] = f'<{following}>; rel="next"'
        return 200, headers, json.dumps(entries[at : at + PAGE]).encode()

    def _file(self, rest: str) -> tuple[int, dict[str, str], bytes]:
        commit, _, name = rest.partition("/")
        commit = self.branches.get(commit, commit)
        content = self.commits.get(commit, {}).get(name)
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b"Entry not found"
        etag = self.entry(name, content).get("lfs", self.entry(name, content))["oid"]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        if len(content) >= LARGE:
            store = f"http://{self.store}" if self.store else self.url
            return 302, {**headers, "X-Linked-Etag": f'"{etag}"', "Location": f"{store}/large/{commit}/{name}"}, b""
        return 200, headers, content if self.corrupt is None else self.corrupt


class HubServer:
    """Serves a hub on loopback; `with` it."""

    def __init__(self, hub: Hub) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, headers, body = hub.reply(self.path, self.headers.get("Authorization", ""))
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_port}"
        hub.url = hub.url or f"http://{self.host}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
