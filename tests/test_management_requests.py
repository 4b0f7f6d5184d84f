"""What clients who list, load and unload models are told before anything is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.backends.interface import Batch
from gateway.core.model import ModelState
from gateway.errors import (
    ControlOff,
    GatewayError,
    InvalidRequest,
    LoadFailed,
    Malformed,
    NotReady,
    Unsupported,
)
from tests.test_management_repository import refusal, rig


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("", InvalidRequest), ("  \t", InvalidRequest), ("../a", InvalidRequest), ("a/b", InvalidRequest),
        ("a/..", InvalidRequest), ("..", InvalidRequest), (".hidden", LoadFailed), ("a\0", LoadFailed),
        ("x" * 5000, LoadFailed), ("\ud800", LoadFailed),
    ],
)  # fmt: skip
async def test_names_that_are_none(tmp_path: Path, name: str, kind: type[GatewayError]) -> None:
    async with rig(tmp_path) as r:
        (r.root / ".hidden" / "1").mkdir(parents=True)
        (r.root / ".hidden" / "1" / "model.onnx").write_bytes(b"fine")
        await r.start()
        assert type(await refusal(r.repository.load(name, {}))) is kind
        upload = {"config": "{}", "file:1/model.onnx": b"fine"}
        with pytest.raises(GatewayError):
            await r.repository.load(name, upload)
        assert r.states() == {}


async def test_other_refusals(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        assert isinstance(await refusal(r.repository.load("a", {})), NotReady)
        await r.start()
        for work in (r.repository.load("a", {}, "r"), r.repository.unload("a", repository="r")):
            error = await refusal(work)
            assert isinstance(error, Unsupported)
            assert "'repository_name' specification is not supported" in str(error)
        assert isinstance(await refusal(r.repository.load("a", {"x": "y"})), Malformed)
        assert r.states() == {}


@pytest.mark.parametrize("mode", ["none", "poll"])
async def test_in_other_modes_nobody_loads_or_unloads(tmp_path: Path, mode: str) -> None:
    async with rig(tmp_path, f"model_control: {mode}") as r:
        await r.start()
        for work in (r.repository.load("a", {}), r.repository.unload("a")):
            error = await refusal(work)
            assert isinstance(error, ControlOff)
            assert (error.status, error.retryable) == (503, False)
            assert "explicit model load / unload is not allowed if polling is enabled" in str(error)
        assert r.states() == {"a/1": "READY", "b/1": "READY"}


async def test_the_state_of_a_version_that_is_just_being_unloaded(tmp_path: Path) -> None:
    async with rig(tmp_path) as r:
        await r.start()
        await r.repository.load("a", {})
        version = r.catalog.resolve("a", None)
        held: list[Batch] = []
        version.replicas[0].held = held  # type: ignore[attr-defined]
        version.state = ModelState.UNLOADING
        (entry,) = [e for e in await r.repository.index() if e["name"] == "a"]
        assert entry["state"] == "UNLOADING"
        version.state = ModelState.READY
