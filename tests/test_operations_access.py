from __future__ import annotations

from pathlib import Path

import pytest
from multidict import CIMultiDict

from gateway.operations_access import MAX_TOKEN_BYTES, Access

JSON = {"Content-Type": "application/json", "Host": "127.0.0.1:8002"}


def status(access: Access, **headers: str) -> int:
    given = CIMultiDict({**JSON, **{name.replace("_", "-"): value for name, value in headers.items()}})
    refusal = access.refusal(given)
    return 200 if refusal is None else refusal.status


@pytest.fixture
def token(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    return file


def test_without_a_token_only_this_machine_may_act() -> None:
    assert status(Access(None, loopback=True)) == 200
    assert status(Access(None, loopback=False)) == 403
    assert status(Access(None, loopback=False), Authorization="Bearer anything") == 403


@pytest.mark.parametrize("loopback", [True, False])
@pytest.mark.parametrize(
    ("authorization", "expected"),
    [
        ("Bearer s3cret", 200),
        ("bearer  s3cret ", 200),
        ("Bearer s3cret2", 401),
        ("Bearer s3cre", 401),
        ("Bearer ", 401),
        ("", 401),
        ("s3cret", 401),
        ("Basic s3cret", 401),
        ("Bearer s3cret\udcff", 401),
    ],
)
def test_a_configured_token_is_needed_everywhere(
    token: Path, loopback: bool, authorization: str, expected: int
) -> None:
    assert status(Access(token, loopback=loopback), Authorization=authorization) == expected


def test_a_token_can_be_replaced_and_an_empty_file_lets_nobody_in(token: Path) -> None:
    access = Access(token, loopback=True)
    token.write_text("other")
    assert status(access, Authorization="Bearer s3cret") == 401
    assert status(access, Authorization="Bearer other") == 200
    for content in ("", " \n"):
        token.write_text(content)
        assert status(access, Authorization="Bearer ") == 503
    token.unlink()
    assert status(access, Authorization="Bearer other") == 503
    token.write_text("x" * (2 * MAX_TOKEN_BYTES))
    assert status(access, Authorization="Bearer " + "x" * 10) == 401


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("http://127.0.0.1:8002", 200),
        ("HTTP://127.0.0.1:8002", 200),
        ("http://evil.example", 403),
        ("http://127.0.0.1:8003", 403),
        ("https://127.0.0.1:8002", 403),
        ("http://127.0.0.1:8002.evil.example", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_a_page_of_another_origin_may_not_act(token: Path, origin: str, expected: int) -> None:
    assert status(Access(None, loopback=True), Origin=origin) == expected
    assert status(Access(token, loopback=True), Origin=origin, Authorization="Bearer s3cret") == expected


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=application/json", 415),
        ("", 415),
    ],
)
def test_only_json_is_taken(content_type: str, expected: int) -> None:
    assert status(Access(None, loopback=True), Content_Type=content_type) == expected


def test_no_refusal_shows_the_token(token: Path) -> None:
    refusal = Access(token, loopback=True).refusal(CIMultiDict({**JSON, "Authorization": "Bearer wrong"}))
    assert refusal is not None
    assert "s3cret" not in refusal.text
    assert "wrong" not in refusal.text
    assert "s3cret" not in repr(Access(token, loopback=True))
