"""MLflow's webhooks: what is signed is followed at once, what is not changes nothing."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.operations_page import Asked, PageFault
from gateway.operations_webhooks import MAX_AGE_S, MlflowWebhook, model_of, signature_fault
from gateway.releases_sources import Meant
from tests.test_releases import Case, followed

SECRET = "between us"
NOW = 1_800_000_000.0
MOVED = {
    "entity": "model_version_alias",
    "action": "created",
    "data": {"name": "numbers", "alias": "a", "version": "4"},
}


def signed(body: bytes, at: float = NOW, secret: str = SECRET) -> dict[str, str]:
    """As mlflow/webhooks/delivery.py does it."""
    content = f"id-1.{int(at)}.{body.decode()}".encode()
    mac = hmac.new(secret.encode(), content, hashlib.sha256).digest()
    return {
        "X-MLflow-Delivery-Id": "id-1",
        "X-MLflow-Timestamp": str(int(at)),
        "X-MLflow-Signature": "v1," + base64.b64encode(mac).decode(),
    }


def asked(event: Any, **changed: str) -> Asked:
    body = json.dumps(event).encode()
    return Asked({}, {}, body, signed(body) | changed)


def webhook(case: Case, secret: str | None = SECRET) -> MlflowWebhook:
    return MlflowWebhook(case.releases, lambda: secret, lambda: NOW)


def test_what_mlflow_signed_is_mlflows() -> None:
    assert signature_fault(SECRET, signed(b"{}"), b"{}", NOW) == ""
    assert signature_fault(SECRET, signed(b"{}"), b"{}", NOW + MAX_AGE_S) == ""


@pytest.mark.parametrize(
    ("headers", "body", "fault"),
    [
        ({}, b"{}", "not signed"),
        (signed(b"{}"), b"[]", "signature does not fit"),
        (signed(b"{}", secret="another"), b"{}", "signature does not fit"),
        (signed(b"{}", NOW - MAX_AGE_S - 1), b"{}", "not from the last"),
        (signed(b"{}", NOW + MAX_AGE_S + 1), b"{}", "not from the last"),
        (signed(b"{}") | {"X-MLflow-Delivery-Id": "id-2"}, b"{}", "signature does not fit"),
        (signed(b"{}") | {"X-MLflow-Timestamp": "1e9"}, b"{}", "not from the last"),
        (signed(b"{}") | {"X-MLflow-Signature": "v1,\udce4"}, b"{}", "signature does not fit"),
    ],
)
def test_what_it_did_not_is_not(headers: dict[str, str], body: bytes, fault: str) -> None:
    assert fault in signature_fault(SECRET, headers, body, NOW)


@given(
    st.binary(max_size=60)
    | st.recursive(st.none() | st.text(), lambda s: st.dictionaries(st.text(), s)).map(
        lambda value: json.dumps(value).encode()
    )
)
def test_no_body_breaks_the_reader(body: bytes) -> None:
    with contextlib.suppress(PageFault):
        assert model_of(body) is None


async def test_an_event_makes_the_alias_be_followed_at_once() -> None:
    async with followed() as case:
        case.source.version = "4"
        page = webhook(case).page()
        assert (page.method, page.path, page.open) == ("POST", "/api/webhooks/mlflow", True)
        assert await page.answer(asked(MOVED)) == {"models": ["numbers"]}
        while case.version() != "4":
            await asyncio.sleep(0)
        assert case.told[-1].by == "webhook"


async def test_an_event_about_something_else_asks_nobody() -> None:
    async with followed() as case:
        case.source.version = "4"
        page = webhook(case).page()
        for event in (
            MOVED | {"data": {"name": "other"}},
            MOVED | {"data": {"name": "number"}},
            MOVED | {"entity": "prompt_alias"},
        ):
            assert await page.answer(asked(event)) == {"models": []}
        assert case.version() == "3"


@pytest.mark.parametrize(("secret", "status"), [(None, 403), ("", 503), ("another", 401)])
async def test_without_the_right_secret_nothing_is_asked(secret: str | None, status: int) -> None:
    async with followed() as case:
        case.source.version = "4"
        with pytest.raises(PageFault) as caught:
            await webhook(case, secret).page().answer(asked(MOVED))
        assert caught.value.status == status
        assert SECRET not in str(caught.value)
        assert case.version() == "3"


async def test_a_storm_of_events_while_one_is_followed_is_one_more_question() -> None:
    async with followed() as case:
        looks: list[int] = []
        go, real = threading.Event(), case.source.look

        def look() -> Meant:
            looks.append(1)
            assert go.wait(30)
            return real()

        case.source.look = look  # type: ignore[method-assign]
        page = webhook(case).page()
        for _ in range(50):
            await page.answer(asked(MOVED))
        go.set()
        while case.releases.status("numbers").asked_at is None or len(looks) < 2:  # type: ignore[union-attr]
            await asyncio.sleep(0)
        async with case.releases.turn("numbers"):
            assert len(looks) == 2
