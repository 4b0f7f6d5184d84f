"""What SIGHUP changes, and that no more is claimed than was done. In real processes: tests/live."""

from __future__ import annotations

import asyncio
import logging

import pytest

from gateway.app_models import Models
from gateway.app_reload import Reloading
from gateway.config import Config, Server
from gateway.errors import ConfigError


@pytest.mark.parametrize(
    ("control", "failed", "told"),
    [
        ("none", [], "the models of the configuration are served"),
        ("poll", ["m"], "the models of the configuration are served, but for m: see above"),
        ("explicit", [], "what is loaded stays as it is"),
    ],
)
async def test_sighup_claims_no_more_than_was_done(
    control: str, failed: list[str], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Reloaded:
        async def reload(self, config: Config) -> list[str]:
            return failed

    before = Config(Server.model_validate({"model_control": control}))
    now = Config(Server.model_validate({"model_control": control, "http_port": 1, "log_level": "debug"}))
    models = Models(before, asyncio.ensure_future)
    models.repository = Reloaded()  # type: ignore[assignment]
    with caplog.at_level(logging.INFO, "gateway"):
        await Reloading(before, lambda: now, models).reload()
    restart, said = caplog.messages
    assert restart == "SIGHUP: changed too, but takes a restart: server.http_port, server.log_level"
    assert said.endswith(told)


async def test_a_reload_whose_variants_fail_at_the_last_moment_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Reloaded:
        async def reload(self, config: Config) -> list[str]:
            return []

    settled: list[str] = []

    class Undecided:
        async def configure(self, config: Config) -> None:
            raise ConfigError("belongs to one model, and models holds 2")

        async def settle(self) -> None:
            settled.append("settled")

    models = Models(Config(), asyncio.ensure_future)
    models.repository, models.variants = Reloaded(), Undecided()  # type: ignore[assignment]
    with caplog.at_level(logging.INFO, "gateway"):
        await Reloading(Config(), Config, models).reload()
    assert caplog.messages == [
        "SIGHUP: canaries and shadows stay as they were: belongs to one model, and models holds 2",
        "SIGHUP: the models of the configuration are served",
    ]
    assert settled == ["settled"]
