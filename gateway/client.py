"""The command line's small HTTP client: one request, one answer, errors in plain words.

Rules: blocking, standard library only, no redirects and no proxies (the gateway is near); answers are bounded. A
refusal by the server is `ServerError` with the server's own text; no server at all is `Unreachable`.
"""

from __future__ import annotations

import http.client
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import orjson

from gateway.errors import GatewayError

MAX_ANSWER_BYTES: Final = 2**31
_WRONG_ADDRESS: Final = (62, 64)
"""OpenSSL's verify codes: the certificate is for another host name, for another IP address."""


class ClientError(GatewayError):
    """The request could not be made or its answer not be used."""


class Unreachable(ClientError):
    """Nobody answers at the address."""


class ServerError(ClientError):
    """The server answered with an error; `http_status` is its status, the text is the server's."""

    def __init__(self, http_status: int, text: str) -> None:
        super().__init__(text)
        self.http_status = http_status


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful answer. `elapsed_s` is wall time from connect to last byte."""

    headers: list[tuple[str, str]]
    body: bytes
    elapsed_s: float

    def header(self, name: str) -> str | None:
        """The first value of a header, name in any case."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    def json(self) -> Any:
        """The body as JSON; ClientError if it is something else."""
        return _json(self.body)


@dataclass(frozen=True, slots=True)
class Access:
    """How a person reaches a server: patience in seconds, headers of every request, and the PEM file of the
    authorities that may have signed the server's certificate (None: the system's, or SSL_CERT_FILE's)."""

    timeout_s: float = 60.0
    headers: Mapping[str, str] = field(default_factory=dict)
    ca: str | None = None


DEFAULT_ACCESS: Final = Access()


def fetch(
    url: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    access: Access = DEFAULT_ACCESS,
    option: str = "--url",
) -> Answer:
    """GET `url` + `path`, or POST if there is a body. `option` is what sets `url`, for advice.

    Of `access.headers` and `headers`, the latter win.

    Raises:
        ClientError: the URL is not one, or the authorities cannot be read.
        Unreachable: no connection, or it broke.
        ServerError: any status but 200 and 202.
    """
    connection, prefix = _connect(url, access)
    sent = {**access.headers, **(headers or {})}
    started = time.perf_counter()
    try:
        connection.request("GET" if body is None else "POST", prefix + path, body, sent)
        response = connection.getresponse()
        content = response.read(MAX_ANSWER_BYTES)
    except TimeoutError:
        raise Unreachable(
            f"{url} gave no answer within {access.timeout_s:g} s; raise --timeout or look at its log"
        ) from None
    except ssl.SSLError as error:
        raise Unreachable(f"cannot reach {url}: {_tls_fault(error, option)}") from None
    except (OSError, http.client.HTTPException) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        hint = f"is the gateway running there? (`gateway serve`, or name its address with {option})"
        raise Unreachable(f"cannot reach {url}: {what}; {hint}") from None
    finally:
        connection.close()
    if response.status not in (http.client.OK, http.client.ACCEPTED):
        raise ServerError(response.status, _error_text(response.status, content))
    return Answer(response.getheaders(), content, time.perf_counter() - started)


def _tls_fault(error: ssl.SSLError, option: str) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        why = error.verify_message.rstrip(".")
        if error.verify_code in _WRONG_ADDRESS:
            return f"the server's certificate is not for this address ({why}); write one that it names in {option}"
        return f"the server's certificate is not trusted ({why}): name its authority with --ca FILE"
    if error.reason == "WRONG_VERSION_NUMBER":
        return f"there is no TLS there; write http:// in {option}"
    return f"no TLS connection: {(error.reason or str(error)).replace('_', ' ').lower()}"


def _connect(url: str, access: Access) -> tuple[http.client.HTTPConnection, str]:
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if parts.scheme not in ("http", "https") or not host:
        raise ClientError(f"'{url}' is not the address of a server; write for example http://127.0.0.1:8000")
    prefix = parts.path.rstrip("/")
    if parts.scheme == "http":
        return http.client.HTTPConnection(host, port, timeout=access.timeout_s), prefix
    try:
        context = ssl.create_default_context(cafile=access.ca)
    except OSError as error:
        what = "it holds no certificate in PEM form" if isinstance(error, ssl.SSLError) else error.strerror
        raise ClientError(f"cannot use --ca {access.ca}: {what}") from None
    return http.client.HTTPSConnection(host, port, timeout=access.timeout_s, context=context), prefix


def _json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        hint = "is the address that of an Open Inference Protocol server?"
        raise ClientError(f"the answer is not JSON: {_excerpt(body)}; {hint}") from None


def _error_text(status: int, content: bytes) -> str:
    """The server's text, whatever its dialect: `error` (OIP), `detail` (MLServer, KServe) or plain text."""
    try:
        document = orjson.loads(content)
    except orjson.JSONDecodeError:
        document = None
    if isinstance(document, dict):
        for key in ("error", "detail"):
            if isinstance(document.get(key), str):
                return f"{document[key]} (status {status})"
    return f"status {status}: {_excerpt(content)}"


def _excerpt(content: bytes) -> str:
    text = " ".join(content[:200].decode(errors="replace").split())
    return repr(text) if text else "empty"
