"""HTTP towards registries: one exchange at a time, synchronous, bounded in time and in bytes, for threads.

Not for the data path (backends/remote_http1.py is). A general client library does not bound a whole exchange: its
timeouts are per read, so a server that sends a byte a minute holds a thread for ever.

Rules:
- A whole exchange ends by its deadline, whatever the server does: a timer closes the socket.
- Never more bytes than the caller allows, counted as they arrive; no content codings, so that none can inflate.
- A redirect is followed only where the caller's `allowed` says so, at most `MAX_REDIRECTS` times, never from https to
  http; credentials go to the first origin only.
- Texts of errors hold the address without query and user information: both may be secrets.
- HTTPS_PROXY, HTTP_PROXY and NO_PROXY of the environment hold, as for curl.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import os
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

import orjson

from gateway.errors import SourceError, SourceUnavailable
from gateway.registry.resolver import Told, untold

MAX_REDIRECTS: Final = 5
MAX_DOCUMENT: Final = 16 * 1024 * 1024
"""Bytes of an answer that is read as a whole."""
CONNECT_S: Final = 10.0
STALL_S: Final = 30.0
"""Longest silence of a server in the middle of an exchange."""
_CHUNK: Final = 256 * 1024
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_TRANSIENT: Final = (408, 425, 429)


def nowhere(url: str) -> bool:
    """Redirects are not followed."""
    return False


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. `headers` by names in lower case; of several with one name the last."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str
    """Who answered, after redirects; without query."""

    def json(self) -> Any:
        """Raises SourceUnavailable: it is no JSON, as from a proxy's error page."""
        try:
            if b"\\u" in self.body:
                orjson.loads(self.body)  # refuses halves of surrogate pairs, which no text can be written with later
            return json.loads(self.body)
        except (ValueError, RecursionError):
            raise SourceUnavailable(f"{self.url} answered something that is not JSON; check the address") from None


@dataclass(frozen=True, slots=True)
class Received:
    """A file that was written: its size and SHA-256 in hex."""

    size: int
    sha256: str
    headers: Mapping[str, str] = field(default_factory=dict)


class Web:
    """One origin, and what is sent with every request to it. Has no state between exchanges; any thread."""

    def __init__(
        self,
        origin: str,
        headers: Callable[[], Mapping[str, str]] = dict,
        *,
        ca: Path | None = None,
        allowed: Callable[[str], bool] = nowhere,
    ) -> None:
        """
        Args:
            origin: `http://host:port` or `https://…`, perhaps with a path; paths of requests are put behind it.
            headers: credentials, asked for with every request; sent to `origin`'s host only.
            ca: file with the authorities that are trusted; None: those of the system.
            allowed: whether a redirect to this URL may be followed.
        """
        self.origin = origin.rstrip("/")
        self._headers = headers
        self._ca = ca
        self._allowed = allowed

    def ask(
        self,
        path: str,
        *,
        method: str = "GET",
        query: Mapping[str, str] | None = None,
        document: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 30.0,
        limit: int = MAX_DOCUMENT,
    ) -> Answer:
        """One exchange with an answer of at most `limit` bytes, of any status.

        Raises:
            SourceUnavailable: no answer in time, none that is HTTP.
            SourceError: more bytes than `limit`, or a redirect that is not allowed.
        """
        deadline = time.monotonic() + timeout_s
        body = None if document is None else json.dumps(document).encode()
        with self._exchange(method, self._url(path, query), body, headers or {}, deadline) as (response, url):
            data = b"" if method == "HEAD" else b"".join(_chunks(response, url, deadline, limit))
            return Answer(response.status, _lower(response), data, url)

    def save(
        self,
        path: str,
        into: BinaryIO,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float,
        limit: int,
        told: Told = untold,
    ) -> Received:
        """Write the content at `path` to `into`, hashing what is written.

        Raises:
            SourceUnavailable, SourceError: as `ask`; also for every status but 200, and for an answer that was cut.
        """
        deadline = time.monotonic() + timeout_s
        digest, size = hashlib.sha256(), 0
        with self._exchange("GET", self._url(path, query), None, headers or {}, deadline) as (response, url):
            if response.status != 200:
                body = b"".join(_chunks(response, url, deadline, MAX_DOCUMENT))
                raise refusal(Answer(response.status, _lower(response), body, url))
            total = response.length
            for chunk in _chunks(response, url, deadline, limit):
                _write(into, chunk)
                digest.update(chunk)
                size += len(chunk)
                told(size, total)
            return Received(size, digest.hexdigest(), _lower(response))

    def _url(self, path: str, query: Mapping[str, str] | None) -> str:
        url = path if path.startswith(("http://", "https://")) else f"{self.origin}/{path.lstrip('/')}"
        return f"{url}?{urllib.parse.urlencode(query)}" if query else url

    @contextlib.contextmanager
    def _exchange(
        self, method: str, url: str, body: bytes | None, headers: Mapping[str, str], deadline: float
    ) -> Iterator[tuple[http.client.HTTPResponse, str]]:
        home = _host_of(self.origin)
        for _ in range(MAX_REDIRECTS + 1):
            sent = {"User-Agent": "oip-gateway", "Accept-Encoding": "identity", "Accept": "*/*"}
            if body is not None:
                sent["Content-Type"] = "application/json"
            sent.update(headers)
            if _host_of(url) == home:
                sent.update(self._headers())
            else:
                sent = {name: value for name, value in sent.items() if name.lower() != "authorization"}
            with _once(method, url, body, sent, self._ca, deadline) as response:
                target = response.headers.get("Location")
                if response.status not in _REDIRECTS or not target:
                    yield response, shown(url)
                    return
            try:
                target = urllib.parse.urljoin(url, target)
                _ = urllib.parse.urlsplit(target).port
            except ValueError:
                raise SourceError(f"{shown(url)} redirects to something that is no address") from None
            if not self._allowed(target) or (url.startswith("https:") and not target.startswith("https:")):
                raise SourceError(
                    f"{shown(url)} redirects to {shown(target)}, which the configuration does not allow; "
                    "write the address that is meant, or allow that host"
                )
            url = target
        raise SourceError(f"{shown(url)} redirects more than {MAX_REDIRECTS} times")


def _write(into: BinaryIO, chunk: bytes) -> None:
    try:
        into.write(chunk)
    except OSError as error:
        raise SourceUnavailable(
            f"cannot write the model's files: {error.strerror}; make room there", soon=False
        ) from None


def refusal(answer: Answer) -> SourceError:
    """The error that an answer of another status than was hoped for is."""
    said = _words(answer)
    text = f"{answer.url} answered {answer.status}{said}"
    if answer.status in (401, 403):
        return SourceUnavailable(f"{text}; check the credentials in `registries`", soon=False)
    if answer.status >= 500 or answer.status in _TRANSIENT:
        return SourceUnavailable(text)
    return SourceError(text)


def basic(username: str, password: str) -> str:
    """Value of an `Authorization` header (RFC 7617)."""
    return "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()


def shown(url: str) -> str:
    """`url` without what may be secret: user information, query, fragment; for people, printable."""
    parts = urllib.parse.urlsplit(url)
    text = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"[:300]
    return "".join(character if character.isprintable() else "?" for character in text)


def _words(answer: Answer) -> str:
    """What the server says of a refusal, in at most 200 printable characters."""
    try:
        document = json.loads(answer.body)
        said = document.get("message") or document.get("error") or document.get("error_code") or ""
    except (ValueError, AttributeError, RecursionError):
        return ""
    text = "".join(character if character.isprintable() else " " for character in str(said))
    return f": {' '.join(text.split())[:200]}" if text.strip() else ""


def _host_of(url: str) -> tuple[str, str]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.netloc


def _lower(response: http.client.HTTPResponse) -> dict[str, str]:
    return {name.lower(): value for name, value in response.headers.items()}


@contextlib.contextmanager
def _once(
    method: str, url: str, body: bytes | None, headers: Mapping[str, str], ca: Path | None, deadline: float
) -> Iterator[http.client.HTTPResponse]:
    """One request and the beginning of its answer; everything that goes wrong on the way is SourceUnavailable."""
    connection, target, more = _connection(url, ca)
    expired = threading.Event()
    opened: list[socket.socket] = []
    """The socket, also once http.client has handed it over to the answer."""

    def expire() -> None:
        expired.set()
        for sock in opened:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    left = deadline - time.monotonic()
    timer = threading.Timer(max(left, 0.001), expire)
    timer.daemon = True
    timer.start()
    try:
        connection.timeout = max(0.001, min(CONNECT_S, left))
        connection.connect()
        opened.append(connection.sock)
        if expired.is_set():
            raise TimeoutError
        connection.sock.settimeout(STALL_S)
        connection.request(method, target, body, {**headers, **more})
        with contextlib.closing(connection.getresponse()) as response:
            yield response
    except (OSError, http.client.HTTPException, ValueError) as error:
        if expired.is_set():
            raise SourceUnavailable(f"{shown(url)} did not answer in time") from None
        raise SourceUnavailable(f"{shown(url)}: {_cause(error)}") from None
    finally:
        timer.cancel()
        connection.close()


def _connection(url: str, ca: Path | None) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
    """A connection that is not open yet, through the environment's proxy if there is one; the request's target, and
    what has to be sent with it."""
    parts = urllib.parse.urlsplit(url)
    target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    host, port = parts.hostname or "", parts.port
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        via = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        own = {}
        if via.username:
            secret = urllib.parse.unquote(via.username), urllib.parse.unquote(via.password or "")
            own = {"Proxy-Authorization": basic(*secret)}
        at = via.hostname or "", via.port or 80
        if parts.scheme == "http":
            return http.client.HTTPConnection(*at), urllib.parse.urlunsplit(parts._replace(fragment="")), own
        tunnel = http.client.HTTPSConnection(*at, context=_context(ca))
        tunnel.set_tunnel(host, port or 443, own)
        return tunnel, target, {}
    if parts.scheme == "https":
        return http.client.HTTPSConnection(host, port or 443, context=_context(ca)), target, {}
    return http.client.HTTPConnection(host, port or 80), target, {}


def _context(ca: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=os.fspath(ca) if ca is not None else None)
    except OSError as error:
        raise SourceUnavailable(
            f"the file {ca} cannot be used as authorities: {error.strerror or error}", soon=False
        ) from None


def _chunks(response: http.client.HTTPResponse, url: str, deadline: float, limit: int) -> Iterator[bytes]:
    """The body, piece by piece. An answer that ends before its stated length is an error."""
    size, stated = 0, response.length
    if stated is not None and stated > limit:
        raise SourceError(f"{url} has {stated} bytes, more than the {limit} that are allowed")
    while chunk := response.read1(_CHUNK):
        size += len(chunk)
        if size > limit:
            raise SourceError(f"{url} sends more than the {limit} bytes that are allowed")
        yield chunk
        if time.monotonic() > deadline:
            raise SourceUnavailable(f"{url} did not send everything in time")
    if time.monotonic() > deadline:  # the timer closed the socket, which may look like an end
        raise SourceUnavailable(f"{url} did not send everything in time")
    if stated is not None and size != stated:
        raise SourceUnavailable(f"{url} sent {size} bytes of {stated}")


_CAUSES: Final[tuple[tuple[type[Exception], str], ...]] = (
    (socket.gaierror, "the host is not known; check the address"),
    (TimeoutError, "did not answer in time"),
    (ConnectionRefusedError, "refuses connections; check the address and whether it runs"),
    (http.client.IncompleteRead, "the answer was cut short"),
    (http.client.RemoteDisconnected, "closed the connection without an answer"),
)


def _cause(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}; give its authority as `ca`"
    known = next((text for kind, text in _CAUSES if isinstance(error, kind)), None)
    if known is not None:
        return known
    if isinstance(error, OSError):
        return (error.strerror or str(error) or type(error).__name__)[:200]
    return "does not answer as an HTTP server; check the address"
