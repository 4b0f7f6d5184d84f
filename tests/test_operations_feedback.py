"""POST /api/feedback: who may, what is answered, what reaches the log."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.observe.metrics import Metrics, Sources, build_labels
from gateway.observe.metrics_views import HttpView
from gateway.operations import Operations
from gateway.operations_backends import Backends
from gateway.operations_feedback import Feedback

ID = "01937c5e-8f3a-7c2e-b1d4-2f6f0a9c1e77"
JSON = {"Content-Type": "application/json"}


class Log:
    """Takes feedback until it has no room."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, Mapping[str, object]]] = []
        self.room = 100

    def feedback(self, kind: str, model: str, version: str, details: Mapping[str, object]) -> bool:
        assert (model, version) == ("", "")
        if len(self.taken) >= self.room:
            return False
        self.taken.append((kind, details))
        return True


class Port:
    """A running operations port with the page."""

    def __init__(self, log: Log | None, admin: Path | None = None, own: Path | None = None) -> None:
        numbers = count()
        page = Feedback(log, lambda: 10**15, lambda: f"fresh-{next(numbers)}", own).page()
        sources = Sources(lambda: (), lambda: HttpView(0, 0, {}), {}, build_labels())
        self.operations = Operations(
            Metrics(sources, lambda: 0.0), lambda: (), lambda: (), Backends(lambda: ()), admin, [page]
        )

    async def __aenter__(self) -> Port:
        await self.operations.start("127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.operations.close()

    async def post(self, body: object, **headers: str) -> tuple[int, Any]:
        data = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
        url = f"http://127.0.0.1:{self.operations.port}/api/feedback"
        async with aiohttp.ClientSession() as session, session.post(url, data=data, headers=JSON | headers) as answer:
            return answer.status, await answer.json()


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
async def port(log: Log) -> AsyncIterator[Port]:
    async with Port(log) as started:
        yield started


async def test_items_are_taken_and_faulty_ones_are_named(port: Port, log: Log) -> None:
    status, answer = await port.post(
        [{"request_id": ID, "label": 7}, {"request_id": "x"}, {"request_id": ID, "label": 1}]
    )
    assert status == 202
    assert (answer["accepted"], answer["duplicates"]) == (2, 0)
    assert [fault["index"] for fault in answer["faults"]] == [1]
    assert [(kind, details["label"], details["at_us"]) for kind, details in log.taken] == [
        ("label", 7, 10**15),
        ("label", 1, 10**15),
    ]


async def test_one_item_needs_no_list(port: Port, log: Log) -> None:
    assert await port.post({"request_id": ID, "override": {"old": 1, "new": 2}}) == (
        202,
        {"accepted": 1, "duplicates": 0, "faults": []},
    )
    assert log.taken[0][0] == "override"


async def test_a_key_that_was_used_is_not_written_again(port: Port, log: Log) -> None:
    item = {"request_id": ID, "label": 7, "idempotency_key": "k"}
    assert (await port.post([item, item]))[1]["duplicates"] == 1
    assert (await port.post(item))[1] == {"accepted": 0, "duplicates": 1, "faults": []}
    assert len(log.taken) == 1


@pytest.mark.parametrize("body", [b"", b"{", b"[]", [{}], {"request_id": ID}])
async def test_what_cannot_be_taken_is_400(port: Port, log: Log, body: object) -> None:
    status, answer = await port.post(body)
    assert (status, list(answer)) == (400, ["error"])
    assert log.taken == []


async def test_a_body_that_is_too_long_is_413(port: Port, log: Log) -> None:
    assert (await port.post(b" " * (1024 * 1024 + 1)))[0] == 413


async def test_no_log_and_a_full_log_are_503(log: Log) -> None:
    item = {"request_id": ID, "label": 1}
    async with Port(None) as port:
        status, answer = await port.post(item)
        assert (status, "inference_log: {}" in answer["error"]) == (503, True)
    log.room = 1
    async with Port(log) as port:
        status, answer = await port.post([item, item])
        assert (status, "1 items were taken" in answer["error"]) == (503, True)


async def test_what_found_no_room_is_no_duplicate_when_it_is_sent_again(log: Log) -> None:
    items = [{"request_id": ID, "label": 1, "idempotency_key": key} for key in ("a", "b")]
    log.room = 1
    async with Port(log) as port:
        assert (await port.post(items))[0] == 503
        log.room = 10
        status, answer = await port.post(items)
        assert (status, answer["accepted"], answer["duplicates"]) == (202, 1, 1)
    assert [details["idempotency_key"] for _, details in log.taken] == ["a", "b"]


async def test_who_may_say_something(log: Log, tmp_path: Path) -> None:
    admin, own = tmp_path / "admin", tmp_path / "own"
    admin.write_text("everything")
    own.write_text("feedback-only")
    item = {"request_id": ID, "label": 1}

    async def statuses(port: Port) -> list[int]:
        given = [{}, {"Authorization": "Bearer feedback-only"}, {"Authorization": "Bearer everything"}]
        return [(await port.post(item, **one))[0] for one in given]

    async with Port(log) as port:
        assert await statuses(port) == [202, 202, 202]  # this machine may, without tokens
    async with Port(log, admin=admin) as port:
        assert await statuses(port) == [401, 401, 202]
    async with Port(log, own=own) as port:
        assert await statuses(port) == [401, 202, 401]
    async with Port(log, admin, own) as port:
        assert await statuses(port) == [401, 202, 202]
        url = f"http://127.0.0.1:{port.operations.port}/api/backends/x/drain"
        headers = JSON | {"Authorization": "Bearer feedback-only"}
        async with aiohttp.ClientSession() as session, session.post(url, headers=headers) as answer:
            assert answer.status == 401, "its token allows feedback and nothing else"
    async with Port(log, own=own) as port:
        assert (await port.post(item, Authorization="Bearer feedback-only", Origin="http://evil"))[0] == 403
