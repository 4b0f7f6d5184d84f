"""What the operations port of a whole process shows: every part's families, and every part's pages."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp

from gateway.app_models import Models
from gateway.app_operations import operations_port
from gateway.app_ports import DataPorts
from gateway.config import Config
from gateway.observe.loop_lag import LoopLag

POSTED = ("/api/models/m/refresh", "/api/models/m/promote", "/api/webhooks/mlflow", "/api/feedback")


async def test_every_part_is_shown_and_asked(tmp_path: Path) -> None:
    config = Config(base=tmp_path)
    models = Models(config, asyncio.ensure_future)
    ports = DataPorts(config, models, lambda: "", max_connections=7)
    lag = LoopLag(ports.requests)
    subject = operations_port(config, models, ports, lag, lambda: {"ready": False, "reason": "it is a test"})
    await subject.start("127.0.0.1", 0)
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{subject.port}") as session:
            async with session.get("/healthz") as answer:
                assert (await answer.json())["reason"] == "it is a test"
            async with session.get("/metrics") as answer:
                scrape = await answer.text()
            found = {}
            for path in (*POSTED, "/api/nothing"):
                async with session.get(path) as answer:
                    found[path] = answer.status
    finally:
        await subject.close()
    for family in ("gateway_http_open_connections", "gateway_grpc_open_connections", "gateway_event_loop_lag_seconds"):
        assert f"# TYPE {family} " in scrape
    assert found == dict.fromkeys(POSTED, 405) | {"/api/nothing": 404}  # 405: there, and not to be read
