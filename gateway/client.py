"""The command line's small HTTP client: one request, one answer, errors in plain words.

Rules: blocking, standard library only, no redirects and no proxies (the gateway is near); answers are bounded. A
refusal by the server is `ServerError` with the server's own text; no server at all is `Unreachable`.
"""

from __future__ import annotations

import http.client
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import orjson

from gateway.errors import GatewayError

MAX_ANSWER_BYTES: Final = 2**31


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


def fetch(
    url: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 60.0,
    option: str = "--url",
) -> Answer:
    """GET `url` + `path`, or POST if there is a body. `option` is what sets `url`, for advice.

    Raises:
        ClientError: the URL is not one.
        Unreachable: no connection, or it broke.
        ServerError: any status but 200.
    """
    connection, prefix = _connect(url, timeout_s)
    started = time.perf_counter()
    try:
        connection.request("GET" if body is None else "POST", prefix + path, body, dict(headers or {}))
        response = connection.getresponse()
        content = response.read(MAX_ANSWER_BYTES)
    except TimeoutError:
        raise Unreachable(f"{url} gave no answer within {timeout_s:g} s; raise --timeout or look at its log") from None
    except (OSError, http.client.HTTPException) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        hint = f"is the gateway running there? (`gateway serve`, or name its address with {option})"
        raise Unreachable(f"cannot reach {url}: {what}; {hint}") from None
    finally:
        connection.close()
    if response.status != http.client.OK:
        raise ServerError(response.status, _error_text(response.status, content))
    return Answer(response.getheaders(), content, time.perf_counter() - started)


def _connect(url: str, timeout_s: float) -> tuple[http.client.HTTPConnection, str]:
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    if parts.scheme not in kinds or not host:
        raise ClientError(f"'{url}' is not the address of a server; write for example http://127.0.0.1:8000")
    return kinds[parts.scheme](host, port, timeout=timeout_s), parts.path.rstrip("/")


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
