"""One gateway per kind of configuration, shared by all traps that need it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.differential.zoo import NOT_LOADED, TWINS, write_repository
from tests.live.gateway_process import gateway
from tests.traps.client import Client

SETTINGS = {"workers": 2, "drain_delay_s": 0, "compression": {"min_bytes": 1}}


@pytest.fixture(scope="package")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_repository(tmp_path_factory.mktemp("traps") / "models", TWINS, triton=False)


@contextlib.contextmanager
def client(folder: Path, repository: Path, models: list[str], **server: object) -> Iterator[Client]:
    """A gateway under explicit model control with these models loaded, and one client of it."""
    file = folder / "gateway.yaml"
    settings = {**SETTINGS, "model_control": "explicit", "load_models": models, **server}
    sources = [{"source": str(repository)}]
    file.write_text(yaml.safe_dump({"server": settings, "defaults": {"instances": 1}, "models": sources}))
    with gateway("serve", "-c", str(file)) as process, contextlib.closing(Client(process)) as one:
        yield one


@pytest.fixture(scope="package")
def plain(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Client]:
    """All defaults, apart from model control."""
    models = [twin.name for twin in TWINS if twin.name not in NOT_LOADED]
    with client(tmp_path_factory.mktemp("plain"), repository, models) as one:
        yield one


@pytest.fixture(scope="package")
def flagged(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Client]:
    """Every flag that restores what Triton or others do."""
    protocol = {"triton_status_codes": True, "json_half": True, "invent_ids": True, "typed_responses": "mirror"}
    models = ["m", "id_fp16", "id_bool", "id_int8", "id_int64", "id_bytes", "labelled"]
    with client(tmp_path_factory.mktemp("flagged"), repository, models, protocol=protocol) as one:
        yield one


@pytest.fixture(scope="package")
def bounded(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Client]:
    """Bodies of at most 100 kB."""
    with client(tmp_path_factory.mktemp("bounded"), repository, ["m"], limits={"max_body_bytes": 100_000}) as one:
        yield one


@pytest.fixture(scope="package")
def sharing(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Client]:
    """Clients may register shared memory."""
    models = ["m", "add_sub"]
    with client(tmp_path_factory.mktemp("sharing"), repository, models, client_shared_memory=True) as one:
        yield one
