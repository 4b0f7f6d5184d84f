"""What operators see of releases and do with them, over a real socket; the test plays source and workers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

from gateway.core.model import Artifact
from gateway.errors import SourceUnavailable
from gateway.observe.metrics import Metrics, Sources, build_labels
from gateway.observe.metrics_views import HttpView
from gateway.operations import Operations
from gateway.operations_backends import Backends
from gateway.operations_releases import ReleasePages
from tests.ingress.oip_bench import NumberModel
from tests.test_releases import Case, broken, followed, moved

JSON = {"Content-Type": "application/json"}


@dataclass
class Served:
    case: Case
    session: aiohttp.ClientSession

    async def get(self, model: str = "numbers") -> tuple[int, Any]:
        async with self.session.get(f"/api/models/{model}/releases") as answer:
            return answer.status, await answer.json()

    async def post(self, action: str, query: str = "", body: bytes = b"{}", **headers: str) -> tuple[int, Any]:
        url = f"/api/models/numbers/{action}{query}"
        async with self.session.post(url, data=body, headers=JSON | headers) as answer:
            return answer.status, await answer.json()


@contextlib.asynccontextmanager
async def served(keep: int = 1) -> AsyncIterator[Served]:
    async with followed(keep) as case:
        sources = Sources(lambda: (), lambda: HttpView(0, 0, {}), {}, build_labels())
        metrics = Metrics(sources, lambda: 0.0)
        pages = ReleasePages(case.releases).pages()
        operations = Operations(metrics, lambda: (), lambda: (), Backends(lambda: ()), pages=pages)
        await operations.start("127.0.0.1", 0)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{operations.port}") as session:
            yield Served(case, session)
        await operations.close()


async def test_what_serves_what_is_kept_and_what_happened_is_shown() -> None:
    async with served() as s:
        await moved(s.case, "4")
        status, found = await s.get()
        assert status == 200
        assert [(one["role"], one["version"], one["digest"]) for one in found["releases"]] == [
            ("live", "4", f"sha256:{'4' * 64}"),
            ("previous", "3", f"sha256:{'3' * 64}"),
        ]
        assert (found["followed"], found["reference"]) == (True, "models:/numbers@champion")
        assert [(one["outcome"], one["by"], one["to_version"]) for one in found["history"]] == [
            ("loaded", "start", "3"),
            ("swapped", "poll", "4"),
        ]
        assert found["asked_at"] == 1000.0
        status, found = await s.get("nobody")
        assert (status, found) == (404, {"error": "model 'nobody' is not loaded here"})


async def test_refresh_and_rollback_say_what_they_did() -> None:
    async with served() as s:
        status, found = await s.post("rollback")
        assert status == 409
        assert "nothing to go back to" in found["error"]
        s.case.source.version = "4"
        status, found = await s.post("refresh")
        assert (status, found["outcome"], found["version"]) == (200, "swapped", "4")
        assert found["text"] == "version 4 serves now, version 3 before"
        assert (await s.post("rollback"))[1]["outcome"] == "rolled_back"
        assert (await s.post("refresh"))[1]["outcome"] == "withheld"
        assert (await s.post("refresh", "?force=true"))[1]["outcome"] == "swapped"
        _, found = await s.get()
        assert {one["by"] for one in found["history"][1:]} == {"operator"}


async def test_what_goes_wrong_has_a_status_and_a_text() -> None:
    async with served() as s:
        s.case.source.trouble = SourceUnavailable("connection refused")
        assert await s.post("refresh") == (502, {"error": "connection refused"})
        s.case.source.trouble = None
        s.case.source.loads["4"] = broken
        s.case.source.version = "4"
        status, found = await s.post("refresh")
        assert status == 422
        assert "this file is broken" in found["error"]
        assert s.case.version() == "3"


async def test_what_takes_long_goes_on() -> None:
    async with served() as s:
        go = asyncio.Event()

        async def slow(artifact: Artifact) -> NumberModel:
            await go.wait()
            return NumberModel()

        s.case.source.loads["4"] = slow
        s.case.source.version = "4"
        status, found = await s.post("refresh", "?wait_s=0")
        assert (status, found["outcome"]) == (200, "under_way")
        assert s.case.version() == "3"
        go.set()
        while s.case.version() != "4":
            await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("action", "query", "body", "text"),
    [
        ("refresh", "?force=1", b"{}", "force is true or false"),
        ("refresh", "?wait_s=-1", b"{}", "wait_s is a number of seconds"),
        ("refresh", "?wait_s=601", b"{}", "wait_s is a number of seconds"),
        ("refresh", "?now=true", b"{}", "'now' is no option; there are force and wait_s"),
        ("rollback", "?force=true", b"{}", "'force' is no option; there are wait_s"),
        ("rollback", "", b'{"to": 3}', "the body must be empty"),
    ],
)
async def test_odd_requests_are_refused_and_nothing_changes(action: str, query: str, body: bytes, text: str) -> None:
    async with served() as s:
        await moved(s.case, "4")
        status, found = await s.post(action, query, body)
        assert status == 400
        assert text in found["error"]
        assert s.case.version() == "4"


async def test_a_page_of_another_origin_changes_nothing() -> None:
    async with served() as s:
        await moved(s.case, "4")
        status, _ = await s.post("rollback", Origin="http://elsewhere")
        assert status == 403
        async with s.session.get("/api/models/numbers/rollback") as answer:
            assert answer.status == 405
        assert s.case.version() == "4"
