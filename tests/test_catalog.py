"""The catalog on real workers with real models: states, lookups, and how each model may be batched.

One pool serves the whole module; every test has a catalog of its own.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from gateway import plan
from gateway.backends.interface import Success
from gateway.backends.one_shot import run_once
from gateway.backends.onnx import LoadedModel, LoadOptions, OnnxPool, OnnxReplica
from gateway.catalog import Catalog, ServedVersion
from gateway.config import ModelSettings
from gateway.config import load as load_config
from gateway.core.model import Artifact, ModelState
from gateway.core.request import InferRequest, InputTensor
from gateway.core.tensor import DATATYPE
from gateway.errors import NotFound, NotReady
from gateway.loading import CHOSEN_MAX_BATCH_SIZE, WantedVersion
from gateway.registry import directory
from gateway.registry.digest import read_artifact
from tests.live import models
from tests.workers.rig import PATIENCE_S, pid_of

FP32 = DATATYPE["FP32"]
LINEAR, MIXES = models.linear(), models.mixes_rows()


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def pool(runner: asyncio.Runner) -> Iterator[OnnxPool]:
    pool = OnnxPool(workers=2, intra_op_threads=1)
    runner.run(pool.start())
    try:
        yield pool
    finally:
        runner.run(pool.close())


class Rig:
    """A catalog over a directory of models, and the pool that runs them."""

    def __init__(self, runner: asyncio.Runner, pool: OnnxPool, root: Path) -> None:
        self.runner = runner
        self.pool = pool
        self.root = root
        self.catalog = Catalog()
        self.loading: Callable[[LoadedModel[OnnxReplica]], None] = lambda loaded: None
        """Called with each model as soon as the pool has loaded it."""

    def run(self, work: Awaitable[Any]) -> Any:
        async def bounded() -> Any:
            return await asyncio.wait_for(work, PATIENCE_S)

        return self.runner.run(bounded())

    def wanted(self, keys: str = "") -> list[WantedVersion]:
        """What a configuration with one entry for the directory wants; `keys`: further keys of the entry."""
        file = self.root / "gateway.yaml"
        file.write_text(f"models: [{{source: ., {keys}}}]")
        return plan.versions(load_config(file, {}, {}), self._load)

    def load(self, keys: str = "") -> list[ServedVersion]:
        """Load everything; returns what failed."""
        failed: list[ServedVersion] = self.run(self.catalog.load_all(self.wanted(keys)))
        return failed

    async def _load(self, artifact: Artifact, settings: ModelSettings) -> LoadedModel[OnnxReplica]:
        loaded = await self.pool.load(artifact, LoadOptions(settings.instances))
        self.loading(loaded)
        return loaded

    async def unload(self) -> None:
        for version in self.catalog.versions():
            if version.loaded is not None:
                await version.loaded.unload()
        self.catalog.stop()

    def one(self, content: bytes, config: str | None = None, keys: str = "") -> ServedVersion:
        """Load a single model; it has become READY."""
        failed = self._one(content, config, keys)
        assert not failed, failed[0].reason
        return self.catalog.find("m", None)

    def refused(self, content: bytes, config: str | None = None, keys: str = "") -> str:
        """The reason why a single model has FAILED; nothing of it is left in the pool."""
        before = self.pool.statistics().models
        (failed,) = self._one(content, config, keys)
        assert failed.state is ModelState.FAILED
        assert self.pool.statistics().models == before
        return failed.reason

    def _one(self, content: bytes, config: str | None, keys: str) -> list[ServedVersion]:
        models.repository(self.root, {"m": content}, None if config is None else {"m": config})
        return self.load(keys)


@pytest.fixture
def rig(runner: asyncio.Runner, pool: OnnxPool, tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(runner, pool, tmp_path)
    try:
        yield rig
    finally:
        runner.run(rig.unload())


def fp32(rows: int, width: int) -> InferRequest:
    """A request for `x` FP32; its settle does nothing."""
    data = np.ones((rows, width), np.float32).tobytes()
    request = InferRequest((InputTensor(FP32, (rows, width), None, data),), rows, len(data), "k", (0,), None)
    request.received = time.monotonic()
    request.settle = lambda settled: None
    return request


# -- states ------------------------------------------------------------------------------------------------------


def test_a_version_goes_from_loading_to_ready(rig: Rig) -> None:
    states = []
    rig.loading = lambda loaded: states.append(rig.catalog.find("m", "1").state)
    version = rig.one(LINEAR)
    assert states == [ModelState.LOADING]
    assert (version.state, version.ready, version.reason) == (ModelState.READY, True, "")
    assert rig.catalog.ready()
    assert rig.catalog.resolve("m", None) is rig.catalog.resolve("m", "1") is version
    assert [replica.name for replica in version.replicas] == ["onnx-1", "onnx-2"]
    assert repr(version) == "<ServedVersion m/1 READY>"


def test_what_is_served_is_what_was_hashed_and_not_kept(rig: Rig) -> None:
    version = rig.one(LINEAR)
    assert version.artifact is not None
    assert version.spec.digest == version.artifact.digest
    assert version.artifact.model == b""
    assert (version.spec.name, version.spec.version, version.spec.platform) == ("m", "1", "onnxruntime_onnx")


def test_while_loading_it_is_known_and_not_ready(rig: Rig) -> None:
    seen: list[str] = []

    def look(loaded: object) -> None:
        assert not rig.catalog.ready()
        assert rig.catalog.ready_versions("m") == []
        for version in (None, "1"):
            with pytest.raises(NotReady) as caught:
                rig.catalog.resolve("m", version)
            seen.append(str(caught.value))
        with pytest.raises(NotReady, match="not at ready state: loading"):
            _ = rig.catalog.find("m", None).spec

    rig.loading = look
    rig.one(LINEAR)
    assert seen == ["Request for model 'm' version 1, which is not at ready state: loading"] * 2


def test_a_model_that_cannot_be_loaded_leaves_the_others(rig: Rig) -> None:
    models.repository(rig.root, {"broken": b"this is no model", "good": LINEAR, "gone": LINEAR})
    wanted = rig.wanted()
    (rig.root / "gone" / "1" / "model.onnx").unlink()
    done: list[str] = []
    failed = rig.run(rig.catalog.load_all(wanted, on_loaded=done.append))
    assert sorted(version.name for version in failed) == ["broken", "gone"]
    assert sorted(done) == ["broken", "gone", "good"]
    assert rig.catalog.resolve("good", None).ready
    assert not rig.catalog.ready()
    broken = rig.catalog.find("broken", "1")
    assert (broken.state, broken.ready, broken.scheduler, list(broken.replicas)) == (ModelState.FAILED, False, None, [])
    for name in ("broken", "gone"):
        with pytest.raises(NotReady) as caught:
            rig.catalog.resolve(name, None)
        reason = rig.catalog.find(name, None).reason
        assert reason
        assert str(caught.value) == f"Request for model '{name}' version 1, which is not at ready state: {reason}"
        assert "Traceback" not in reason


def test_an_error_nobody_foresaw_fails_one_version_only(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    models.repository(rig.root, {"good": LINEAR, "odd": MIXES})

    def surprising(path: Path, name: str, *rest: Any) -> Artifact:
        if name == "odd":
            raise ZeroDivisionError("surprise")
        return read_artifact(path, name, *rest)

    monkeypatch.setattr(directory, "read_artifact", surprising)
    (failed,) = rig.load()
    assert failed.name == "odd"
    assert failed.reason == "the gateway failed on it: ZeroDivisionError: surprise"
    assert rig.catalog.resolve("good", None).ready


def test_an_unreadable_file_is_a_reason_without_a_path(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_: Any) -> Artifact:
        raise PermissionError(13, "Permission denied", "/secret/place")

    monkeypatch.setattr(directory, "read_artifact", unreadable)
    assert rig.refused(LINEAR) == "cannot read the model's files: Permission denied"


def test_a_digest_that_is_not_the_pinned_one(rig: Rig) -> None:
    pin = "sha256:" + "ab" * 32
    reason = rig.refused(LINEAR, keys=f"digest: '{pin}'")
    assert pin in reason
    assert "put the right files there or change the pin" in reason


def test_the_pinned_digest_is_served(rig: Rig) -> None:
    models.repository(rig.root, {"m": LINEAR})
    (wanted,) = rig.wanted()
    digest = wanted.read()[0].digest
    assert rig.one(LINEAR, keys=f"digest: '{digest}'").spec.digest == digest


def test_a_crash_loop_takes_requests_away_and_recovery_gives_them_back(rig: Rig) -> None:
    version = rig.one(LINEAR)
    assert version.scheduler is not None
    rig.catalog.failed("m", "1", "its worker process crashed 6 times in a minute")
    assert (version.state, version.ready, rig.catalog.ready()) == (ModelState.FAILED, False, False)
    with pytest.raises(NotReady, match=r"version 1, which is not at ready state: its worker process crashed 6 times"):
        rig.catalog.resolve("m", None)
    with pytest.raises(NotReady, match="model 'm' version 1 failed: its worker process crashed"):
        version.scheduler.submit(fp32(1, 16))
    assert rig.catalog.find("m", None) is version, "its metadata can still be asked for"

    rig.catalog.recovered("m", "1")
    assert (version.state, version.ready, version.reason) == (ModelState.READY, True, "")
    assert rig.catalog.resolve("m", None) is version
    answered = asyncio.Event()

    async def ask() -> InferRequest:
        request = fp32(1, 16)
        request.settle = lambda settled: answered.set()
        assert version.scheduler is not None
        version.scheduler.submit(request)
        await answered.wait()
        return request

    assert rig.run(ask()).error is None


def test_requests_that_wait_when_their_model_fails_are_told(rig: Rig) -> None:
    version = rig.one(LINEAR)

    async def ask() -> InferRequest:
        request = fp32(1, 16)
        assert version.scheduler is not None
        version.scheduler.submit(request)
        rig.catalog.failed("m", "1", "crashes")
        return request

    request = rig.run(ask())
    assert isinstance(request.error, NotReady)
    assert str(request.error) == "model 'm' version 1 failed: crashes"


@pytest.mark.parametrize("event", ["failed", "recovered"])
def test_events_of_versions_in_another_state_change_nothing(rig: Rig, event: str) -> None:
    models.repository(rig.root, {"m": LINEAR, "broken": b""})
    rig.load()
    broken, m = rig.catalog.versions()
    before = (m.state, m.reason, broken.state, broken.reason)
    if event == "failed":
        rig.catalog.failed("broken", "1", "x")
        rig.catalog.failed("nobody", "1", "x")
        rig.catalog.failed("m", "9", "x")
    else:
        for name, version in (("m", "1"), ("broken", "1"), ("nobody", "1"), ("m", "9")):
            rig.catalog.recovered(name, version)
    assert (m.state, m.reason, broken.state, broken.reason) == before


@pytest.mark.parametrize("worker", ["onnx-1", "onnx-2"])
def test_a_worker_that_dies_during_the_trial_is_no_reason_to_fail(rig: Rig, worker: str) -> None:
    killed: list[int] = []

    def kill(loaded: object) -> None:
        killed.append(pid_of(rig.pool, worker))
        os.kill(killed[0], signal.SIGKILL)

    rig.loading = kill
    version = rig.one(LINEAR)
    assert version.spec.policy.merge
    assert version.ready
    assert pid_of(rig.pool, worker) not in {0, *killed}


# -- lookups -------------------------------------------------------------------------------------------------------


def test_unknown_names_and_versions(rig: Rig) -> None:
    rig.one(LINEAR)
    for name, version, text in (
        ("x", None, "Request for unknown model: 'x' is not found"),
        ("x", "1", "Request for unknown model: 'x' is not found"),
        ("m", "2", "Request for unknown model: 'm' version 2 is not found"),
        ("m", "01", "Request for unknown model: 'm' version 01 is not found"),
        ("m", "abc", "Request for unknown model: 'm' version abc is not found"),
        ("n" * 10_000, None, f"Request for unknown model: '{'n' * 64}…' is not found"),
        ("m", "9" * 10_000, f"Request for unknown model: 'm' version {'9' * 64}… is not found"),
    ):
        for look in (rig.catalog.resolve, rig.catalog.find):
            with pytest.raises(NotFound) as caught:
                look(name, version)
            assert str(caught.value) == text
    assert rig.catalog.ready_versions("x") == []


def versions(rig: Rig, *numbers: str, broken: str = "") -> None:
    for number in numbers:
        directory = rig.root / "m" / number
        directory.mkdir(parents=True)
        (directory / "model.onnx").write_bytes(b"junk" if number == broken else models.linear(seed=int(number)))
    (rig.root / "m" / "config.pbtxt").write_text("version_policy: { all: {} }")


def test_the_highest_ready_version_is_meant_and_by_number(rig: Rig) -> None:
    versions(rig, "2", "9", "10")
    assert rig.load() == []
    assert rig.catalog.ready_versions("m") == ["2", "9", "10"]
    assert [version.version for version in rig.catalog.versions()] == ["2", "9", "10"]
    assert rig.catalog.resolve("m", None).version == "10"
    assert rig.catalog.resolve("m", "9").version == "9"


def test_a_version_that_failed_to_load_is_not_meant(rig: Rig) -> None:
    versions(rig, "1", "2", broken="2")
    (failed,) = rig.load()
    assert failed.version == "2"
    assert rig.catalog.resolve("m", None).version == rig.catalog.find("m", None).version == "1"
    with pytest.raises(NotReady, match="version 2, which is not at ready state"):
        rig.catalog.resolve("m", "2")


def test_a_version_that_crashes_hands_over_to_the_next_and_comes_back(rig: Rig) -> None:
    versions(rig, "1", "2", "3")
    rig.load()
    for number, meant in (("3", "2"), ("2", "1")):
        rig.catalog.failed("m", number, "crashes")
        assert rig.catalog.resolve("m", None).version == meant
    assert rig.catalog.ready_versions("m") == ["1"]
    rig.catalog.failed("m", "1", "crashes")
    with pytest.raises(NotReady, match="version 3, which is not at ready state: crashes"):
        rig.catalog.resolve("m", None)
    for number, meant in (("2", "2"), ("1", "2"), ("3", "3")):
        rig.catalog.recovered("m", number)
        assert rig.catalog.resolve("m", None).version == meant


def test_where_none_is_ready_the_highest_number_tells_why(rig: Rig) -> None:
    versions(rig, "9", "10")
    rig.load()
    for number in ("9", "10"):
        rig.catalog.failed("m", number, f"crash of {number}")
    assert rig.catalog.find("m", None).version == "10"
    with pytest.raises(NotReady, match="version 10, which is not at ready state: crash of 10"):
        rig.catalog.resolve("m", None)


# -- batching ------------------------------------------------------------------------------------------------------

FIXED = models.model(
    [helper.make_node("Identity", ["x"], ["y"])],
    [models.value("x", "FP32", [1, 4])],
    [models.value("y", "FP32", [1, 4])],
)
EXACTLY_SEVEN = models.model(
    [helper.make_node("Reshape", ["x", "shape"], ["y"])],
    [models.value("x", "FP32", ["batch", "n"])],
    [models.value("y", "FP32", ["groups", 7, 11])],
    {"shape": np.array([-1, 7, 11], np.int64)},
)
"""Runs only where rows times n is a multiple of 77, which no made-up input is: nothing can be proven of it."""
EMPTY_ROWS = models.model(
    [helper.make_node("Slice", ["x", "zero", "zero", "axis"], ["y"])],
    [models.value("x", "FP32", ["batch", 4])],
    [models.value("y", "FP32", ["batch", 0])],
    {"zero": np.array([0], np.int64), "axis": np.array([1], np.int64)},
)
CHOSEN = CHOSEN_MAX_BATCH_SIZE
PROVEN = f"batches up to {CHOSEN} rows: 5 random rows gave the same answers alone and together"


@pytest.mark.parametrize(
    ("content", "keys", "merge", "size", "oversize", "note"),
    [
        (LINEAR, "", True, CHOSEN, "split", PROVEN),
        (LINEAR, "max_batch_size: 8", True, 8, "split", "batches up to 8 rows: 5 random rows"),
        (LINEAR, "max_batch_size: 8, oversize: reject", True, 8, "reject", "batches up to 8 rows"),
        (LINEAR, "max_batch_size: 1", True, 1, "split", "batches up to 1 rows"),
        (LINEAR, "max_batch_size: 0", False, 0, "reject", "not batched: max_batch_size is 0"),
        (LINEAR, "batching: 'off'", False, 0, "reject", "not batched: batching is off"),
        (LINEAR, "batching: 'off', max_batch_size: 8", False, 8, "reject", "not batched: batching is off"),
        (LINEAR, "batching: 'on'", True, CHOSEN, "split", f"batches up to {CHOSEN} rows: batching is on"),
        (MIXES, "", False, 0, "reject", "not batched: row 0 of output 'y' differs when run with other rows"),
        (MIXES, "max_batch_size: 8", False, 8, "reject", "not batched: row 0 of output 'y' differs"),
        (MIXES, "max_batch_size: 8, oversize: split", False, 8, "reject", "not batched: row 0 of output 'y' differs"),
        (MIXES, "batching: 'on'", True, CHOSEN, "split", "batching is on"),
        (MIXES, "batching: 'on', max_batch_size: 8", True, 8, "split", "batches up to 8 rows: batching is on"),
        (MIXES, "batching: 'off'", False, 0, "reject", "not batched: batching is off"),
        (EXACTLY_SEVEN, "", False, 0, "reject", "not batched: it could not be run on made-up input"),
        (EXACTLY_SEVEN, "max_batch_size: 8", False, 8, "reject", "not batched: it could not be run on made-up input"),
        (EXACTLY_SEVEN, "batching: 'on'", True, CHOSEN, "split", "batching is on"),
        (FIXED, "", False, 0, "reject", "not batched: the first dimension of input 'x' is fixed to 1"),
        (FIXED, "batching: 'on'", False, 0, "reject", "not batched: the first dimension of input 'x' is fixed to 1"),
        (FIXED, "max_batch_size: 0", False, 0, "reject", "not batched: the first dimension of input 'x' is fixed to 1"),
        (models.lookup(), "", True, CHOSEN, "split", PROVEN),
        (models.identity("BYTES"), "", True, CHOSEN, "split", PROVEN),
        (models.identity("BF16"), "", True, CHOSEN, "split", PROVEN),
        (EMPTY_ROWS, "", True, CHOSEN, "split", PROVEN),
    ],
)
def test_how_a_model_is_batched(
    rig: Rig, content: bytes, keys: str, merge: bool, size: int, oversize: str, note: str
) -> None:
    spec = rig.one(content, keys=keys).spec
    assert (spec.policy.merge, spec.policy.max_batch_size, spec.policy.oversize) == (merge, size, oversize)
    assert spec.batching_note.startswith(note) or note in spec.batching_note
    full = (-1,) if not spec.batched and content is not FIXED else ()
    assert all(tensor.dims[: len(full)] == full for tensor in spec.inputs)


def test_a_stated_size_for_a_model_that_cannot_batch_is_refused(rig: Rig) -> None:
    reason = rig.refused(FIXED, "max_batch_size: 8")
    assert reason == (
        "max_batch_size is 8, but the model cannot batch: the first dimension of input 'x' is fixed to 1; set it to 0"
    )


def test_preferred_sizes_above_the_limit_are_left_out(rig: Rig) -> None:
    policy = rig.one(LINEAR, keys=f"preferred_batch_sizes: [8, {CHOSEN + 1}], max_queue_delay_ms: 5").spec.policy
    assert (policy.preferred_batch_sizes, policy.max_queue_delay_s) == ((8,), 0.005)


async def _outputs_of(version: ServedVersion) -> AsyncIterator[list[bytes]]:
    tensor = InputTensor(FP32, (3, 16), None, np.arange(48, dtype=np.float32).tobytes())
    for replica in version.replicas:
        outcome = await run_once(replica, [tensor], (0,))
        assert isinstance(outcome, Success), outcome
        yield [bytes(output.data) for output in outcome.outputs]


def test_every_instance_is_warm_and_answers_alike(rig: Rig) -> None:
    version = rig.one(LINEAR)

    async def collect() -> list[list[bytes]]:
        return [outputs async for outputs in _outputs_of(version)]

    first, second = rig.run(collect())
    assert first == second
    assert isinstance(version.loaded, LoadedModel)
    ((warm,),) = version.loaded.warm_up
    assert warm.shape == (5, 16)


# -- config.pbtxt against the file -----------------------------------------------------------------------------------

X = 'input [ { name: "x", data_type: TYPE_FP32, dims: [ %s ] } ]'


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            'max_batch_size: 8 input [ { name: "z", data_type: TYPE_FP32, dims: [ 16 ] } ]',
            "config.pbtxt names the input 'z', but the model file has ['x']",
        ),
        (
            'max_batch_size: 8 input [ { name: "x", data_type: TYPE_INT32, dims: [ 16 ] } ]',
            "config.pbtxt says input 'x' is INT32, the model file says FP32",
        ),
        (
            "max_batch_size: 8 " + X % "-1, 16",
            "config.pbtxt says input 'x' has dims [-1, 16], the model file says [16]",
        ),
        ("max_batch_size: 8 " + X % "17", "config.pbtxt says input 'x' has dims [17], the model file says [16]"),
        ("max_batch_size: 0 " + X % "16", "config.pbtxt says input 'x' has dims [16], the model file says [-1, 16]"),
        (
            'max_batch_size: 8 output [ { name: "y", data_type: TYPE_FP32, dims: [ 5 ] } ]',
            "config.pbtxt says output 'y' has dims [5], the model file says [4]",
        ),
        (
            'max_batch_size: 8 output [ { name: "q", data_type: TYPE_FP32, dims: [ 4 ] } ]',
            "config.pbtxt names the output 'q', but the model file has ['y']",
        ),
    ],
)
def test_a_config_that_contradicts_the_file_is_refused(rig: Rig, config: str, reason: str) -> None:
    assert rig.refused(LINEAR, config) == reason


def test_a_config_that_forgets_an_input_is_refused(rig: Rig) -> None:
    config = 'max_batch_size: 8 input [ { name: "b", data_type: TYPE_INT32, dims: [ -1 ] } ]'
    assert rig.refused(models.two_inputs(), config) == (
        "config.pbtxt lists no input ['a'], which the model file has; list all or none"
    )


def test_the_order_of_inputs_is_the_configs(rig: Rig) -> None:
    """As Triton shows it; the workers number inputs as the file does, which backends/binding.py sees to."""
    config = "max_batch_size: 8 " + "".join(
        f'input [ {{ name: "{name}", data_type: TYPE_INT32, dims: [ -1 ] }} ]' for name in "ba"
    )
    assert [tensor.name for tensor in rig.one(models.two_inputs(), config).spec.inputs] == ["b", "a"]


@pytest.mark.parametrize(
    ("config", "size", "dims", "oversize"),
    [
        ("max_batch_size: 8 " + X % "16", 8, (16,), "reject"),
        ("max_batch_size: 8 " + X % "-1", 8, (16,), "reject"),
        ("max_batch_size: 0 " + X % "-1, 16", 0, (-1, 16), "reject"),
        ("max_batch_size: 0 " + X % "3, 16", 0, (3, 16), "reject"),
        (X % "16", CHOSEN, (16,), "split"),
        (X % "-1, 16", 0, (-1, 16), "reject"),
        ("", CHOSEN, (16,), "split"),
    ],
)
def test_a_config_that_agrees_with_the_file(
    rig: Rig, config: str, size: int, dims: tuple[int, ...], oversize: str
) -> None:
    spec = rig.one(LINEAR, config).spec
    assert (spec.policy.max_batch_size, spec.inputs[0].dims, spec.policy.oversize) == (size, dims, oversize)
    if config.startswith("input") and not size:
        assert spec.batching_note == "not batched: config.pbtxt states whole shapes and no max_batch_size"


@pytest.mark.parametrize(("content", "keys"), [(MIXES, ""), (LINEAR, "batching: 'off'")])
def test_dims_without_a_batch_dimension_fit_a_model_that_is_not_batched(rig: Rig, content: bytes, keys: str) -> None:
    """Nobody stated a size, so the config meant one row; that the model turned out unbatchable is no contradiction."""
    width = 4 if content is MIXES else 16
    spec = rig.one(content, X % str(width), keys=keys).spec
    assert (spec.policy.max_batch_size, spec.inputs[0].dims) == (0, (-1, width))


def test_dims_without_a_fixed_first_dimension_do_contradict(rig: Rig) -> None:
    refusal = rig.refused(FIXED, X % "4")
    assert refusal.startswith("config.pbtxt says input 'x' has dims [4], the model file says [1, 4]; ")
    assert refusal.endswith("write reshape { shape: [ 1, 4 ] } beside dims: [ 4 ]")


def test_drain_waits_for_accepted_requests(rig: Rig) -> None:
    version = rig.one(LINEAR)

    async def ask() -> list[int]:
        assert version.scheduler is not None
        requests = [fp32(1, 16) for _ in range(20)]
        for request in requests:
            version.scheduler.submit(request)
        await rig.catalog.drain()
        return [request.batch.rows for request in requests]

    assert min(rig.run(ask())) >= 1
    assert version.scheduler is not None
    assert version.scheduler.pending == 0


# -- ensembles ---------------------------------------------------------------------------------------------------


def chain(*steps: str, max_batch_size: int = 4) -> str:
    """The config.pbtxt of an ensemble that runs models `x` → `y`, FP32 [16], one behind the other."""
    names = ["IN", *[f"t{place}" for place in range(1, len(steps))], "OUT"]
    blocks = [
        f'{{ model_name: "{step}" model_version: -1 input_map {{ key: "{"x" if step == "m" else "IN"}" value: '
        f'"{names[place]}" }} output_map {{ key: "{"y" if step == "m" else "OUT"}" value: "{names[place + 1]}" }} }}'
        for place, step in enumerate(steps)
    ]
    return f"""platform: "ensemble" max_batch_size: {max_batch_size}
        input [ {{ name: "IN" data_type: TYPE_FP32 dims: [ 16 ] }} ]
        output [ {{ name: "OUT" data_type: TYPE_FP32 dims: [ 16 ] }} ]
        ensemble_scheduling {{ step [ {", ".join(blocks)} ] }}"""


def ensembles(rig: Rig, configs: dict[str, str]) -> dict[str, str]:
    """Load model `m` and these ensembles; returns why those that failed did."""
    models.repository(rig.root, {"m": models.identity("FP32", 16)})
    for name, text in configs.items():
        (rig.root / name / "1").mkdir(parents=True)
        (rig.root / name / "config.pbtxt").write_text(text)
    return {version.name: version.reason for version in rig.load()}


def test_ensembles_are_loaded_behind_what_they_contain(rig: Rig) -> None:
    assert ensembles(rig, {"a": chain("b", "m"), "b": chain("c"), "c": chain("m", "m")}) == {}
    assert rig.catalog.ready()
    outer = rig.catalog.resolve("a", None)
    assert (outer.dependencies, list(outer.replicas), outer.spec.platform) == (("b", "m"), [], "ensemble")
    assert rig.catalog.resolve("c", None).dependencies == ("m",)


def test_an_ensemble_that_lacks_a_model_or_contains_itself_fails_with_its_reason(rig: Rig) -> None:
    reasons = ensembles(
        rig, {"lost": chain("m", "nobody"), "self": chain("self"), "big": chain("m", max_batch_size=999)}
    )
    assert "'nobody' is not found" in reasons["lost"]
    assert "it needs every model of its steps" in reasons["self"]
    assert "it allows maximum batch size 999, but it contains model 'm'" in reasons["big"]
    assert rig.catalog.resolve("m", None).ready


def ready(version: ServedVersion) -> bool:
    return version.ready


def test_an_ensemble_s_readiness_is_its_models(rig: Rig) -> None:
    assert ensembles(rig, {"e": chain("m")}) == {}
    version, inner = rig.catalog.resolve("e", None), rig.catalog.resolve("m", None)
    assert ready(version)
    assert version.obstacle == ""
    before = version.fingerprint()
    rig.run(rig.catalog.unload("m"))
    assert not ready(version)
    assert "'m' has no available versions" in version.obstacle
    assert inner.obstacle == "unloaded"
    assert not rig.catalog.ready()
    rig.run(rig.catalog.replace(rig.wanted("name: m")))
    assert ready(version)
    assert version.fingerprint() != before


def test_a_model_is_freed_only_when_nobody_under_way_will_come_to_it(rig: Rig) -> None:
    rig.one(LINEAR)
    version = rig.catalog.resolve("m", None)

    async def scenario() -> None:
        version.pin()
        unloading = asyncio.ensure_future(rig.catalog.unload("m"))
        done, _ = await asyncio.wait({unloading}, timeout=0.05)
        assert not done
        assert version.scheduler is not None
        version.unpin()
        await unloading
        assert version.scheduler is None

    rig.run(scenario())
    assert version.state is ModelState.UNAVAILABLE


def test_the_cache_cannot_stand_before_ordered_answers(rig: Rig) -> None:
    config = "max_batch_size: 4 dynamic_batching { preserve_ordering: true } response_cache { enable: true }"
    assert "preserve_ordering forbids" in rig.refused(LINEAR, config)
    assert rig.one(LINEAR, "max_batch_size: 4 response_cache { enable: true }").cached
