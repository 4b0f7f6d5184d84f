"""The backends of one model: what their keys must say together, and where their secrets come from.

Rules: looks at what the file says before types are checked, so that it also speaks when another key is wrong; looks at
files and variables, never at the network. A credential is text in the file, `env:VARIABLE` or `file:PATH`; no message
repeats a header's value, and none is kept where the configuration is shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gateway.config_schema import Backend, BackendTls
from gateway.errors import ConfigError
from gateway.registry.reference import OipServerSource, parse_server

MAX_SECRET_BYTES: Final = 8192
"""Longest header value: more than servers take."""
_HEADER: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_VALUE: Final = re.compile(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WORKER: Final = re.compile(r"onnx-[0-9]+")
_OURS: Final = frozenset(
    (
        *("accept", "accept-encoding", "connection", "content-encoding", "content-length", "content-type", "expect"),
        *("host", "inference-header-content-length", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"),
        *("user-agent", "x-request-timeout-ms"),
    )
)
"""Headers that say how a request is framed."""


@dataclass(frozen=True, slots=True)
class EntryFault:
    """`place`: keys and indexes below the entry."""

    place: tuple[str | int, ...]
    message: str


def entry_faults(item: object, base: Path, environ: Mapping[str, str], servers: dict[str, str]) -> Iterator[EntryFault]:
    """What is wrong with an entry's `backends`, and with the keys beside it.

    Args:
        item: the entry as it was read; of any type.
        base: where relative paths start.
        servers: backend name → URL of the entries so far; this one's are added.
    """
    if not isinstance(item, dict):
        return
    backends = item.get("backends")
    yield from _origin_faults(item)
    if not isinstance(backends, list):
        return
    if not backends:
        yield EntryFault(("backends",), "is empty; write for example backends: [{url: 'http://triton-a:8000'}]")
    seen: dict[str, int] = {}
    for index, backend in enumerate(backends):
        if not isinstance(backend, dict):
            continue
        place = ("backends", index)
        for fault in _backend_faults(backend, base, environ, servers):
            yield EntryFault((*place, *fault.place), fault.message)
        if (url := _url(backend)) is not None and (first := seen.setdefault(url.url, index)) != index:
            yield EntryFault((*place, "url"), f"is the same as that of backends[{first}]; keep one of them")


def _origin_faults(item: Mapping[str, Any]) -> Iterator[EntryFault]:
    """A model comes from a source, from backends, or from a source on disk and backends."""
    remote = "backends" in item
    if remote and "name" not in item:
        yield EntryFault(("name",), "is missing: a model with backends needs one; write for example name: digits")
    if "source" in item:
        if remote and _is_server(item["source"]):
            text = "stands beside a source that is a server too; write that one as the first of the backends"
            yield EntryFault(("backends",), text)
        return
    if not remote:
        yield EntryFault(("source",), "is missing; write for example source: ./models/digits")
        return
    if "digest" in item:
        yield EntryFault(("digest",), "cannot be checked: the files of remote backends are not here; remove it")


def read_headers(backend: Backend, base: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The backend's headers with the values that their sources hold now; blocks on the disk.

    Raises:
        ConfigError: a variable that is not set, or a file that cannot be read or holds more than one line.
    """
    values: dict[str, str] = {}
    for name, text in backend.headers.items():
        value = _resolved(text, base, environ)
        if isinstance(value, EntryFault):
            raise ConfigError(f"backend {backend.url}: header {name}: {value.message}")
        values[name] = value
    return values


def _resolved(text: str, base: Path, environ: Mapping[str, str]) -> str | EntryFault:
    """A header's value; a fault (without a place) that names its source, never its content."""
    origin, value = "its value", text
    if text.startswith("env:"):
        variable = text.removeprefix("env:")
        if not _VARIABLE.fullmatch(variable):
            return EntryFault((), "env: must be followed by the name of a variable, such as env:TRITON_TOKEN")
        origin, value = f"the variable {variable}", environ.get(variable, "")
        if not value:
            return EntryFault((), f"the variable {variable} is not set; set it where the gateway is started")
    elif text.startswith("file:"):
        path = base / text.removeprefix("file:")
        origin = f"the file {path}"
        try:
            with path.open("rb") as stream:
                value = stream.read(MAX_SECRET_BYTES + 2).decode("ascii", "replace").rstrip("\r\n")
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "no usable path"
            return EntryFault((), f"{origin} cannot be read: {why}; check the path and its permissions")
    if len(value) > MAX_SECRET_BYTES or not _VALUE.fullmatch(value):
        return EntryFault((), f"{origin} must be one line of printable ASCII, at most {MAX_SECRET_BYTES} bytes")
    return value


def _backend_faults(
    backend: Mapping[str, Any], base: Path, environ: Mapping[str, str], servers: dict[str, str]
) -> Iterator[EntryFault]:
    url = None
    if isinstance(text := backend.get("url"), str) and text:
        try:
            url = parse_server(text)
        except ValueError as error:
            yield EntryFault(("url",), str(error))
    if url is not None:
        yield from _scheme_faults(backend, url)
        name = backend.get("name") or url.authority
        if isinstance(name, str) and _WORKER.fullmatch(name):
            yield EntryFault(("name",), "is what the gateway calls its own workers; choose another, such as triton-a")
        if isinstance(name, str) and servers.setdefault(name, url.url) != url.url:
            yield EntryFault(("name",), f"the name '{name[:64]}' is taken by {servers[name]}; choose another")
    yield from _tls_faults(backend.get("tls"), base)
    headers = backend.get("headers")
    lower: set[str] = set()
    for name, value in headers.items() if isinstance(headers, dict) else ():
        place = ("headers", name)
        if not _HEADER.fullmatch(name) or name.lower().startswith("grpc-") or name.lower().endswith("-bin"):
            yield EntryFault(place, "cannot be a header's name; use A-Z a-z 0-9 - _ . and neither grpc-… nor …-bin")
        elif name.lower() in _OURS:
            yield EntryFault(place, "is set by the gateway itself; remove it")
        elif name.lower() in lower:
            yield EntryFault(place, "stands twice, in capitals and small letters; keep one of them")
        elif isinstance(value, str) and isinstance(fault := _resolved(value, base, environ), EntryFault):
            yield EntryFault(place, fault.message)
        lower.add(name.lower())


def _scheme_faults(backend: Mapping[str, Any], url: OipServerSource) -> Iterator[EntryFault]:
    if backend.get("tls") is not None and not url.encrypted:
        yield EntryFault(("tls",), f"has no effect on {url.scheme}://; write {url.scheme}s:// in url, or remove tls")
    if backend.get("json") is not None and url.scheme not in ("http", "https"):
        yield EntryFault(("json",), f"has no effect on {url.scheme}://; remove it")


def _tls_faults(tls: object, base: Path) -> Iterator[EntryFault]:
    if not isinstance(tls, dict):
        return
    for key in ("ca", "cert", "key"):
        text = tls.get(key)
        if isinstance(text, str) and text and not (base / text).is_file():
            yield EntryFault(("tls", key), f"there is no file {base / text}; write the path of a PEM file")
    for key, other in (("cert", "key"), ("key", "cert")):
        if key in tls and other not in tls:
            yield EntryFault(("tls", other), f"is missing beside {key}; write for example {_example(other)}")


def _example(key: str) -> str:
    examples = BackendTls.model_fields[key].examples or [""]
    return f"{key}: {examples[0]}"


def _is_server(source: object) -> bool:
    return isinstance(source, str) and re.match(r"(?i)(https?|grpcs?)://", source) is not None


def _url(backend: Mapping[str, Any]) -> OipServerSource | None:
    text = backend.get("url")
    try:
        return parse_server(text) if isinstance(text, str) else None
    except ValueError:
        return None
