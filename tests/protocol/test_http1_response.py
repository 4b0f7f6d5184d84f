"""Responses as bytes."""

from __future__ import annotations

import json

import pytest

from gateway.errors import InvalidRequest, NotFound, Overloaded
from gateway.protocol.http1_response import adapt, error_response, response_head


def test_head() -> None:
    assert response_head(200, b"application/json", 12) == (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 12\r\n\r\n"
    )


def test_head_with_everything() -> None:
    assert response_head(503, b"a/b", 0, b"X: y\r\n", keep_alive=False) == (
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: a/b\r\nContent-Length: 0\r\n"
        b"X: y\r\nConnection: close\r\n\r\n"
    )


def test_error() -> None:
    response = error_response(NotFound("no “m”"), b"X: y\r\n")
    head, _, body = response.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 404 Not Found"
    assert lines[1:] == [b"Content-Type: application/json", b"Content-Length: %d" % len(body), b"X: y"]
    assert json.loads(body) == {"error": "no “m”"}


@pytest.mark.parametrize(
    ("retry_after_s", "shown"), [(0.0, b"1"), (0.2, b"1"), (1.0, b"1"), (1.1, b"2"), (30.0, b"30")]
)
def test_retry_after_is_whole_seconds(retry_after_s: float, shown: bytes) -> None:
    error = Overloaded("full")
    error.retry_after_s = retry_after_s
    assert b"\r\nRetry-After: " + shown + b"\r\n" in error_response(error)


def test_only_what_may_be_retried_says_so() -> None:
    assert b"Retry-After" not in error_response(InvalidRequest("no"))


def test_an_error_text_with_a_lone_surrogate_is_still_answered() -> None:
    body = error_response(InvalidRequest("\ud800\r\n")).partition(b"\r\n\r\n")[2]
    assert json.loads(body) == {"error": "?\r\n"}


def test_adapted_for_head_requests_and_http_1_0() -> None:
    whole = response_head(200, b"a/b", 3) + b"a\r\n\r\nb"
    head = whole.partition(b"\r\n\r\n")[0]
    assert adapt(whole, bodiless=True, say_keep_alive=False) == head + b"\r\n\r\n"
    assert adapt(whole, bodiless=False, say_keep_alive=True) == (head + b"\r\nConnection: keep-alive\r\n\r\na\r\n\r\nb")
