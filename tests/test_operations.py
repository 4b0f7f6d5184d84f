from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from gateway.core.agreement import AgreementStatistics, OutputAgreement
from gateway.core.batch_queue import QueueStatistics
from gateway.errors import BindError
from gateway.observe.exposition import OPENMETRICS, TEXT
from gateway.observe.metrics import Metrics, Scrape, Sources, build_labels
from gateway.observe.metrics_views import HttpView, ModelView
from gateway.observe.record import ModelStatistics
from gateway.operations import MODELS_PER_TURN, BackendStatus, ModelStatus, Operations, host_name, is_loopback
from gateway.operations_backends import Backends

DIGITS = ModelStatus(
    "digits",
    "3",
    "READY",
    "sha256:ab",
    [BackendStatus("onnx-1", True, 2, "open", "much slower than the others", 1.5)],
    64,
    "row-independent",
    "",
    AgreementStatistics({"agreed": 2, "differed": 1}, (OutputAgreement("y", 0.5, 0.25, 0.0),)),
)


class Gateway:
    """What the operations port shows, as far as a test sets it."""

    def __init__(self) -> None:
        self.views: list[ModelView] = []
        self.models: list[ModelStatus] = [DIGITS]
        self.workers: list[object] = [{"name": "onnx-1", "pid": 4711}]
        self.views_read = 0

    def read_views(self) -> Iterator[ModelView]:
        for view in self.views:
            self.views_read += 1
            yield view

    def operations(self) -> Operations:
        sources = Sources(self.read_views, lambda: HttpView(0, 0, {}), {}, build_labels())
        return Operations(
            Metrics(sources, lambda: 0.0), lambda: self.models, lambda: self.workers, Backends(lambda: ())
        )


def view(name: str) -> ModelView:
    return ModelView(name, "1", ModelStatistics(), QueueStatistics(0, 0, 0, 0, None), ())


@pytest.fixture
def shown() -> Gateway:
    return Gateway()


@pytest.fixture
async def operations(shown: Gateway) -> AsyncIterator[Operations]:
    server = shown.operations()
    await server.start("127.0.0.1", 0)
    yield server
    await server.close()


@pytest.fixture
async def client(operations: Operations) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(f"http://127.0.0.1:{operations.port}") as session:
        yield session


async def test_health(client: aiohttp.ClientSession) -> None:
    async with client.get("/healthz") as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "application/json"
        assert await response.json() == {"status": "alive"}


async def test_models_are_listed_as_the_contract_says(client: aiohttp.ClientSession) -> None:
    async with client.get("/api/models") as response:
        assert await response.json() == [
            {
                "name": "digits",
                "version": "3",
                "state": "READY",
                "digest": "sha256:ab",
                "backends": [
                    {
                        "name": "onnx-1",
                        "available": True,
                        "in_flight": 2,
                        "state": "open",
                        "cause": "much slower than the others",
                        "seconds_left": 1.5,
                    }
                ],
                "max_batch_size": 64,
                "batching": "row-independent",
                "reason": "",
                "agreement": {
                    "batches": {"agreed": 2, "differed": 1},
                    "outputs": [{"output": "y", "max_absolute": 0.5, "max_relative": 0.25, "min_equal_rows": 0.0}],
                },
                "role": "champion",
                "source": "",
                "reference": "",
                "notes": [],
            }
        ]


async def test_workers_are_listed(client: aiohttp.ClientSession) -> None:
    async with client.get("/api/workers") as response:
        assert await response.json() == [{"name": "onnx-1", "pid": 4711}]


async def test_the_index_names_every_page(client: aiohttp.ClientSession) -> None:
    async with client.get("/") as response:
        page = await response.text()
    for path in ("/metrics", "/healthz", "/api/models", "/api/backends", "/api/workers"):
        assert f'href="{path}"' in page
        async with client.get(path) as response:
            assert response.status == 200


async def test_metrics_as_text_and_as_openmetrics(shown: Gateway, client: aiohttp.ClientSession) -> None:
    shown.views = [view("digits")]
    async with client.get("/metrics") as response:
        assert response.headers["Content-Type"] == TEXT
        names = {family.name for family in parse_text(await response.text())}
        assert {"nv_inference_count", "gateway_batch_rows"} <= names
    async with client.get("/metrics", headers={"Accept": "application/openmetrics-text"}) as response:
        assert response.headers["Content-Type"] == OPENMETRICS
        families = list(parse_openmetrics(await response.text()))  # type: ignore[no-untyped-call]
        assert "nv_inference_count" in {family.name for family in families}


async def test_metrics_are_compressed_for_those_who_ask(shown: Gateway, client: aiohttp.ClientSession) -> None:
    shown.views = [view(f"model-{n}") for n in range(20)]
    async with client.get("/metrics", headers={"Accept-Encoding": "gzip"}) as response:
        assert response.headers["Content-Encoding"] == "gzip"
        assert 'model="model-19"' in await response.text()
    async with client.get("/metrics", headers={"Accept-Encoding": "identity"}) as response:
        assert "Content-Encoding" not in response.headers


async def test_a_scrape_gives_way_between_models(
    shown: Gateway, client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other work runs while 200 models are being read; otherwise a long list would hold up every request."""
    shown.views = [view(f"model-{n}") for n in range(200)]
    turn = 0
    models_by_turn: Counter[int] = Counter()
    add = Scrape.add

    def counted(scrape: Scrape, model: ModelView) -> None:
        models_by_turn[turn] += 1
        add(scrape, model)

    async def count_turns() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(Scrape, "add", counted)
    counting = asyncio.create_task(count_turns())
    async with client.get("/metrics") as response:
        text = await response.text()
    counting.cancel()
    assert text.count("nv_inference_count{") == models_by_turn.total() == 200
    assert max(models_by_turn.values()) <= MODELS_PER_TURN


async def test_models_that_change_during_a_scrape_do_no_harm(shown: Gateway, client: aiohttp.ClientSession) -> None:
    shown.views = [view(f"model-{n}") for n in range(100)]
    request = asyncio.ensure_future(client.get("/metrics"))
    while not shown.views_read:
        await asyncio.sleep(0)
    shown.views.clear()
    async with await request as response:
        assert response.status == 200
        assert (await response.text()).count("nv_inference_count{") == 100


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
@pytest.mark.parametrize("path", ["/metrics", "/nowhere"])
async def test_only_reading_is_allowed(client: aiohttp.ClientSession, method: str, path: str) -> None:
    async with client.request(method, path, data=b"{}") as response:
        assert response.status == 405
        assert response.headers["Allow"] == "GET, HEAD"
        assert method in (await response.json())["error"]


async def test_head_answers_without_a_body(client: aiohttp.ClientSession) -> None:
    async with client.head("/healthz") as response:
        assert response.status == 200
        assert await response.read() == b""


async def test_unknown_paths_say_what_is_here(client: aiohttp.ClientSession) -> None:
    async with client.get("/v2/models/digits/infer") as response:
        assert response.status == 404
        assert response.headers["Content-Type"] == "application/json"
        assert "/metrics" in (await response.json())["error"]


async def test_a_defect_is_logged_and_not_shown(
    shown: Gateway, client: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    shown.workers = [object()]
    with caplog.at_level(logging.ERROR):
        async with client.get("/api/workers") as response:
            assert response.status == 500
            text = await response.text()
    assert "Traceback" not in text
    assert "not JSON serializable" not in text
    assert "not JSON serializable" in (caplog.text + str(caplog.records[0].exc_info))
    async with client.get("/healthz") as response:
        assert response.status == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8002", 200),
        ("127.0.0.1:9", 200),
        ("[::1]:8002", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example:8002", 403),
        ("localhost.evil.example", 403),
        ("[::2]", 403),
        ("", 403),
    ],
)
async def test_a_foreign_host_is_refused_on_loopback(client: aiohttp.ClientSession, host: str, status: int) -> None:
    for path in ("/metrics", "/api/models", "/nowhere"):
        async with client.get(path, headers={"Host": host}) as response:
            assert response.status == (404 if status == 200 and path == "/nowhere" else status)
            if status == 403:
                assert "Host" in (await response.json())["error"]


async def test_any_host_is_served_where_others_may_connect(shown: Gateway) -> None:
    server = shown.operations()
    await server.start("0.0.0.0", 0)
    url = f"http://127.0.0.1:{server.port}/healthz"
    async with (
        aiohttp.ClientSession() as session,
        session.get(url, headers={"Host": "gateway.internal"}) as response,
    ):
        assert response.status == 200
    await server.close()


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),
     ("::", False), ("192.168.0.1", False), ("gateway.internal", False)],
)  # fmt: skip
def test_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_host_name() -> None:
    assert host_name("Example.ORG:80") == "example.org"
    assert host_name("[::1]:80") == "::1"
    assert host_name("::1") == ""


async def test_a_taken_port_is_a_bind_error(shown: Gateway) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = shown.operations()
        with pytest.raises(BindError) as caught:
            await server.start("127.0.0.1", port)
    assert (caught.value.host, caught.value.port) == ("127.0.0.1", port)
    assert str(caught.value) == (
        f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another port with --metrics-port"
    )
    await server.close()


@pytest.mark.parametrize(("host", "port"), [("192.0.2.1", 0), ("no-such-host.invalid", 0), ("127.0.0.1", 99999)])
async def test_an_address_that_cannot_be_is_a_bind_error(shown: Gateway, host: str, port: int) -> None:
    with pytest.raises(BindError, match="cannot listen on"):
        await shown.operations().start(host, port)


async def test_after_close_the_port_is_free_and_start_works_again(shown: Gateway) -> None:
    server = shown.operations()
    await server.start("127.0.0.1", 0)
    port = server.port
    await server.close()
    await server.close()
    await server.start("127.0.0.1", port)
    assert server.port == port
    await server.close()
