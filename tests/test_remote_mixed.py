"""Models that our own workers and remote servers have together."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from gateway import remote_models
from gateway.config import Backend, Config, ModelEntry
from gateway.core.model import ModelState
from gateway.errors import ConfigError
from gateway.loading import LoadedModel
from tests.backends.oip_server import serving
from tests.remote_bench import LocalModel, Rig, double, rig, until, url

RESHAPED = """
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: [ 2 ] reshape: { shape: [ 1, 2 ] } }
output { name: "y" data_type: TYPE_FP32 dims: [ 2 ] reshape: { shape: [ 1, 2 ] } }
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_models, "REDISCOVERY_S", 0.02)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "model.onnx").write_bytes(b"x")
    return tmp_path


class Loads(list[LoadedModel]):
    """Every model that the workers loaded."""

    def __init__(self, subject: Rig, between: int = 0) -> None:
        super().__init__()
        self._between = between
        subject.local = self.load

    def load(self) -> LoadedModel:
        self.append(LocalModel(self._between))
        return self[-1]


def mixed(folder: Path, *backends: Backend) -> ModelEntry:
    return double(*backends, source=str(folder), balancing="round_robin")


async def both_answer(subject: Rig, remote: str) -> None:
    seen: dict[str, bool] = {}
    for number in range(50):
        batch, values = await subject.ask(float(number))
        assert values == [2.0 * number, 1.0]
        seen[batch.backend] = batch.remote
    assert seen == {"onnx-1": False, remote: True}


async def test_a_reload_that_changes_only_backends_loads_nothing(folder: Path) -> None:
    async with serving() as a, serving() as b, rig(mixed(folder, Backend(url=url(a)))) as subject:
        loads = Loads(subject)
        assert await subject.start() == []
        await subject.all_available(2)
        before = subject.version()
        await both_answer(subject, f"127.0.0.1:{a.port}")
        for server in (b, a):
            assert await subject.repository.reload(Config(models=(mixed(folder, Backend(url=url(server))),))) == []
            await subject.all_available(2)
            await both_answer(subject, f"127.0.0.1:{server.port}")
        assert (subject.version() is before, len(loads)) == (True, 1)
        # The control: what is not only about backends is another load.
        other = double(Backend(url=url(a)), source=str(folder), max_batch_size=4)
        assert await subject.repository.reload(Config(models=(other,))) == []
        assert (subject.version() is before, len(loads)) == (False, 2)


async def test_a_server_shows_the_tensors_that_clients_see(folder: Path) -> None:
    (folder / "config.pbtxt").write_text(RESHAPED)
    async with serving() as a, rig(mixed(folder, Backend(url=url(a)))) as subject:
        Loads(subject, between=1)
        assert await subject.start() == []
        await subject.all_available(2)
        await both_answer(subject, f"127.0.0.1:{a.port}")


async def test_workers_that_crash_for_good_leave_the_servers_serving(folder: Path) -> None:
    async with serving() as a, rig(mixed(folder, Backend(url=url(a)))) as subject:
        loads = Loads(subject)
        assert await subject.start() == []
        await subject.all_available(2)
        local = loads[0].replicas[0]
        local.available = False  # type: ignore[misc]  # a fake one
        subject.catalog.failed("double", "1", "it crashes at every start", loads[0])
        subject.version().kick()
        assert subject.version().state is ModelState.READY
        assert [(await subject.ask(2.0))[0].remote for _ in range(3)] == [True] * 3
        subject.catalog.recovered("double", "1", loads[0])
        assert subject.version().state is ModelState.READY


async def test_a_size_that_nobody_states_is_one_that_the_servers_take(folder: Path) -> None:
    async with serving() as a, rig(mixed(folder, Backend(url=url(a)))) as subject:
        Loads(subject)
        a.config["max_batch_size"] = 4
        assert await subject.start() == []
        assert subject.version().spec.policy.max_batch_size == 4
        await subject.all_available(2)


async def test_a_server_that_takes_fewer_rows_than_stated_stays_out(folder: Path) -> None:
    entry = double(Backend(url="http://127.0.0.1:1"), source=str(folder), max_batch_size=9)
    async with serving() as a, rig(entry.model_copy(update={"backends": (Backend(url=url(a)),)})) as subject:
        Loads(subject)
        assert await subject.start() == []
        await until(lambda: "it takes at most 8 rows, and batches have up to 9" in subject.replica(a).cause)
        assert (await subject.ask(2.0))[0].backend == "onnx-1"


async def test_a_config_that_becomes_no_plain_model_is_refused_when_it_is_loaded_again(folder: Path) -> None:
    async with serving() as a, rig(mixed(folder, Backend(url=url(a)))) as subject:
        Loads(subject)
        assert await subject.start() == []
        before = subject.version()
        (folder / "config.pbtxt").write_text(
            RESHAPED.replace("reshape: { shape: [ 1, 2 ] }", "") + "sequence_batching {}"
        )
        load = partial(subject.repository.reload, Config(models=(mixed(folder, Backend(url=url(a))),)))
        with pytest.raises(ConfigError, match="cannot stand beside a source with sequence_batching"):
            await load()
        assert await subject.repository.poll() == ["double"]
        assert subject.version() is before
