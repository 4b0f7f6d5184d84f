"""Ensembles over scripted models in virtual time: steps share batches, callers never mix, everyone is settled once.

The models are functions of their rows, executed by replicas that take as long as the test says; a direct evaluation of
the same graph says what each caller must get.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.backends.interface import Batch, Failure, FailureKind, Success
from gateway.catalog import ServedVersion
from gateway.core.assembly import slice_rows, write_parts
from gateway.core.model import BatchPolicy, ModelSpec, TensorSpec
from gateway.core.request import SETTLED, InferRequest, InputTensor, OutputTensor, SequenceStep
from gateway.core.scheduling import EnsembleStep, Scheduling
from gateway.core.tensor import DATATYPE
from gateway.ensemble import Ensemble, check_cacheable
from gateway.errors import (
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    Draining,
    GatewayError,
    InvalidRequest,
    ModelError,
    NotFound,
    NotReady,
    Overloaded,
    TooLarge,
)
from gateway.intake import Intake
from gateway.observe.record import ModelStatistics
from gateway.pipeline import Pipeline
from gateway.scheduler import Scheduler
from tests.fakes import PlainReplica
from tests.scripted import simulated, turns

INT64 = DATATYPE["INT64"]
Function = Callable[[list[np.ndarray[Any, Any]]], list[np.ndarray[Any, Any]]]


class FunctionReplica(PlainReplica):
    """Fits `backends.interface.Replica`: answers with a function of the batch's rows after `takes_s` seconds."""

    available = True

    def __init__(self, name: str, spec: ModelSpec, function: Function) -> None:
        self.name = name
        self.takes_s = 0.01
        self.failing: FailureKind | None = None
        self.executed: list[int] = []
        self.in_flight = 0
        self._spec = spec
        self._function = function

    @property
    def free_slots(self) -> int:
        return 1 - self.in_flight

    def set_listener(self, changed: Callable[[], None], /) -> None:
        pass

    def execute(self, batch: Batch, timeout_s: float, /) -> None:
        self.in_flight += 1
        self.executed.append(batch.rows)
        arrays = []
        for tensor in batch.inputs:
            written = bytearray(tensor.nbytes)
            write_parts(tensor, memoryview(written))
            arrays.append(np.frombuffer(bytes(written), "<i8").reshape(tensor.shape))
        asyncio.get_running_loop().call_later(self.takes_s, self._end, batch, arrays)

    def _end(self, batch: Batch, arrays: list[np.ndarray[Any, Any]]) -> None:
        self.in_flight -= 1
        if self.failing is not None:
            batch.done(Failure(self.failing, "scripted"))
            return
        made = self._function(arrays)
        outputs = [
            OutputTensor(self._spec.outputs[index].name, INT64, made[index].shape, made[index].astype("<i8").tobytes())
            for index in batch.outputs
        ]
        batch.done(Success(outputs, 1, 10, 100))


class Version:
    """As much of a served version as an ensemble and a pipeline meet."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.scheduler: Intake | None = None
        self.statistics = ModelStatistics()
        self.split_rows = spec.policy.max_batch_size
        self.cached = spec.scheduling.response_cache
        self.cache: Any = None
        self.ready = True
        self.dependencies: tuple[str, ...] = ()
        self.pins = 0
        self.mirror: Any = None

    def pin(self) -> None:
        self.pins += 1

    def unpin(self) -> None:
        self.pins -= 1
        assert self.pins >= 0

    def fingerprint(self) -> bytes:
        own = b"%d" % id(self)
        return own + self.scheduler.fingerprint() if isinstance(self.scheduler, Ensemble) else own


class World:
    """Models and ensembles by name, and callers."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.pipeline = Pipeline()
        self.versions: dict[str, Version] = {}
        self.replicas: dict[str, FunctionReplica] = {}
        self.callers: list[Caller] = []

    def resolve(self, name: str, version: str | None) -> Version:
        found = self.versions.get(name)
        if found is None or version not in (None, found.spec.version):
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        return found

    def infer(self, version: Version, request: InferRequest) -> None:
        self.pipeline.infer(cast("ServedVersion", version), request)

    def model(
        self, name: str, inputs: list[str], outputs: list[str], function: Function, *,
        limit: int = 8, dims: tuple[int, ...] = (1,), version: str = "1", cached: bool = False,
    ) -> Version:  # fmt: skip
        spec = ModelSpec(
            name, version, f"sha256:{name}{version}", "onnxruntime_onnx",
            tuple(TensorSpec(label, INT64, dims) for label in inputs),
            tuple(TensorSpec(label, INT64, dims) for label in outputs),
            BatchPolicy(limit), "", Scheduling(response_cache=cached),
        )  # fmt: skip
        served = self.versions[name] = Version(spec)
        replica = self.replicas[name] = FunctionReplica("onnx-1", spec, function)
        served.scheduler = Scheduler(spec, [replica], served.statistics, self.loop.time)
        return served

    def ensemble(
        self, steps: list[EnsembleStep], inputs: list[str], outputs: list[str], *, name: str = "e", limit: int = 8,
        dims: tuple[int, ...] = (1,), policy: BatchPolicy | None = None, optional: tuple[str, ...] = (),
        cached: bool = False,
    ) -> Version:  # fmt: skip
        spec = ModelSpec(
            name, "1", f"sha256:{name}", "ensemble",
            tuple(TensorSpec(label, INT64, dims, label in optional) for label in inputs),
            tuple(TensorSpec(label, INT64, dims) for label in outputs),
            policy or BatchPolicy(limit), "", Scheduling(ensemble=tuple(steps), response_cache=cached),
        )  # fmt: skip
        served = Version(spec)
        ensemble = Ensemble(spec, served.statistics, self.resolve, self.infer, self.loop.time)
        served.scheduler, served.dependencies = ensemble, ensemble.dependencies
        self.versions[name] = served
        return served

    def send(self, inputs: dict[str, list[int]], *, name: str = "e", **kwargs: Any) -> Caller:
        caller = Caller(self, self.versions[name], inputs, **kwargs)
        self.infer(self.versions[name], caller.request)
        self.callers.append(caller)
        return caller

    async def finish(self) -> None:
        """Everyone settled once; nothing is left anywhere."""
        for version in self.versions.values():
            assert version.scheduler is not None
            await version.scheduler.drained()
        await turns()
        for caller in self.callers:
            assert caller.settled == 1
        for version in self.versions.values():
            assert version.scheduler is not None
            assert version.pins == 0
            queue = version.scheduler.queue_statistics()
            assert (version.scheduler.pending, queue.requests, queue.rows, queue.nbytes) == (0, 0, 0, 0), version
            version.scheduler.stop()


class Caller:
    """Who sent a request; `made` gives its answer by output."""

    def __init__(
        self, world: World, version: Version, inputs: dict[str, list[int]], *,
        timeout_s: float = 0.0, outputs: tuple[int, ...] | None = None, as_values: bool = False,
        shape: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        spec = version.spec
        self._loop = world.loop
        self._spec = spec
        self.settled = 0
        self.settled_at = 0.0
        tensors: list[InputTensor | None] = []
        for tensor in spec.inputs:
            if (numbers := inputs.get(tensor.name)) is None:
                tensors.append(None)
                continue
            whole = shape or ((len(numbers), 1) if spec.batched else (len(numbers),))
            packed = None if as_values else np.array(numbers, "<i8").tobytes()
            tensors.append(InputTensor(INT64, whole, list(numbers) if as_values else None, packed))
        rows = len(next(iter(inputs.values()))) if spec.batched else 1
        wanted = outputs or tuple(range(len(spec.outputs)))
        trailing = tuple([tensor and tensor.shape[1 if spec.batched else 0 :] for tensor in tensors])
        key = (trailing, wanted)
        self.request = InferRequest(tuple(tensors), rows, 8 * rows * len(inputs), key, wanted, None, None, timeout_s)
        self.request.received = world.loop.time()
        self.request.settle = self._settle

    def _settle(self, request: InferRequest, /) -> None:
        assert request is self.request
        self.settled += 1
        self.settled_at = self._loop.time()

    @property
    def error(self) -> Exception | None:
        return self.request.error

    def made(self) -> dict[str, list[int]]:
        assert self.settled == 1
        assert self.error is None, self.error
        batch = self.request.batch
        found = {}
        for index in self.request.outputs:
            output = batch.outputs[index]
            own = slice_rows(output, self.request.row, self.request.rows) if self._spec.batched else output
            found[output.name] = np.frombuffer(bytes(own.data), "<i8").tolist()
        return found


def step(model: str, inputs: dict[str, str], outputs: dict[str, str], version: str | None = None) -> EnsembleStep:
    return EnsembleStep(model, version, tuple(inputs.items()), tuple(outputs.items()))


def double(arrays: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    return [arrays[0] * 2]


def add_one(arrays: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    return [arrays[0] + 1]


def add(arrays: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    return [arrays[0] + arrays[1]]


DIAMOND = [
    step("double", {"x": "IN"}, {"y": "left"}),
    step("add_one", {"x": "IN"}, {"y": "right"}),
    step("add", {"a": "left", "b": "right"}, {"sum": "OUT"}),
]


def diamond(**kwargs: Any) -> World:
    """`OUT` = 2·IN + IN + 1."""
    world = World()
    world.model("double", ["x"], ["y"], double)
    world.model("add_one", ["x"], ["y"], add_one)
    world.model("add", ["a", "b"], ["sum"], add)
    world.ensemble(DIAMOND, ["IN"], ["OUT"], **kwargs)
    return world


@simulated
@pytest.mark.parametrize("as_values", [True, False])
async def test_the_answer_is_that_of_its_steps(as_values: bool) -> None:
    world = diamond()
    caller = world.send({"IN": [1, 2, 30]}, as_values=as_values)
    await world.finish()
    assert caller.made() == {"OUT": [4, 7, 91]}


@simulated
async def test_steps_that_do_not_depend_on_each_other_run_at_the_same_time() -> None:
    world = diamond()
    world.replicas["double"].takes_s = world.replicas["add_one"].takes_s = 1.0
    begun = world.loop.time()
    caller = world.send({"IN": [1]})
    await world.finish()
    assert caller.settled_at - begun == pytest.approx(1.01, abs=0.05)


@simulated
async def test_steps_of_many_callers_and_direct_requests_share_batches() -> None:
    world = diamond()
    callers = [world.send({"IN": [number]}) for number in range(3)]
    direct = world.send({"x": [50]}, name="double")
    await world.finish()
    assert [caller.made()["OUT"] for caller in callers] == [[1], [4], [7]]
    assert direct.made() == {"y": [100]}
    assert world.replicas["double"].executed == [4]
    assert world.replicas["add"].executed == [3]


@simulated
async def test_provenance_lists_every_step_in_order() -> None:
    world = diamond()
    mate = world.send({"IN": [9]})
    caller = world.send({"IN": [1, 2]})
    await world.finish()
    batch = caller.request.batch
    said = [(execution.backend, execution.attempt, execution.rows, row) for execution, row in batch.parts]
    assert said == [("double/1/onnx-1", 1, 3, 1), ("add_one/1/onnx-1", 1, 3, 1), ("add/1/onnx-1", 1, 3, 1)]
    assert len({execution.batch_id for execution, _ in batch.parts}) == 3
    assert mate.request.batch is not batch


@simulated
async def test_an_ensemble_counts_its_requests_and_the_sum_of_its_steps() -> None:
    world = diamond()
    world.send({"IN": [1, 2]})
    world.send({"IN": [3]})
    await world.finish()
    counted = world.versions["e"].statistics
    assert (counted.success, counted.inference_count, counted.execution_count) == (2, 3, 2)
    assert (counted.compute_input_ns, counted.compute_infer_ns, counted.compute_output_ns) == (6, 60, 600)
    assert world.versions["add"].statistics.success == 2


@simulated
async def test_only_the_outputs_that_were_asked_for_are_answered() -> None:
    world = diamond()
    world.ensemble(DIAMOND, ["IN"], ["OUT", "left"], name="two")
    caller = world.send({"IN": [4]}, name="two", outputs=(1,))
    await world.finish()
    assert caller.made() == {"left": [8]}


@simulated
async def test_a_version_may_be_pinned() -> None:
    world = World()
    world.model("double", ["x"], ["y"], double, version="3")
    with pytest.raises(ConfigError, match="'double' is not found"):
        world.ensemble([step("double", {"x": "IN"}, {"y": "OUT"}, "2")], ["IN"], ["OUT"])
    world.ensemble([step("double", {"x": "IN"}, {"y": "OUT"}, "3")], ["IN"], ["OUT"])
    caller = world.send({"IN": [4]})
    await world.finish()
    assert caller.made() == {"OUT": [8]}


# -- failures --------------------------------------------------------------------------------------------------------


@simulated
async def test_a_failing_step_fails_the_request_once_and_drops_the_others() -> None:
    world = diamond()
    world.replicas["double"].failing = FailureKind.SUSPECT
    world.replicas["add_one"].takes_s = 5.0
    caller = world.send({"IN": [1]})
    await asyncio.sleep(1.0)
    assert isinstance(caller.error, ModelError)
    assert "in ensemble 'e', model 'double' failed: scripted" in str(caller.error)
    assert (caller.request.avoid, caller.request.attempt) == ("double/1/onnx-1", 1)
    assert world.versions["add_one"].scheduler is not None
    assert world.versions["add_one"].scheduler.pending == 0
    await world.finish()
    assert world.versions["e"].statistics.failures == {"REJECTED": 0, "CANCELED": 0, "BACKEND": 0, "OTHER": 1}
    assert world.versions["add_one"].statistics.failures["CANCELED"] == 1


@simulated
async def test_a_caller_that_leaves_takes_its_steps_along_and_nobody_else_s() -> None:
    world = diamond()
    caller, mate = world.send({"IN": [1]}), world.send({"IN": [2]})
    await asyncio.sleep(0.001)
    caller.request.abort()
    caller.request.abort()
    await world.finish()
    assert isinstance(caller.error, Cancelled)
    assert mate.made() == {"OUT": [7]}
    assert world.replicas["add"].executed == [1]
    assert world.versions["e"].statistics.failures["CANCELED"] == 1


@simulated
async def test_the_deadline_is_the_callers_over_all_steps() -> None:
    world = diamond()
    for replica in world.replicas.values():
        replica.takes_s = 0.3
    begun = world.loop.time()
    caller = world.send({"IN": [1]}, timeout_s=0.5)
    await world.finish()
    assert isinstance(caller.error, DeadlineExceeded)
    assert caller.settled_at - begun == pytest.approx(0.5, abs=0.005)
    assert world.versions["e"].statistics.failures["OTHER"] == 1


@simulated
async def test_a_step_that_is_refused_at_once_refuses_the_request() -> None:
    world = diamond()
    scheduler = world.versions["add_one"].scheduler
    assert scheduler is not None
    scheduler.close(Overloaded("Exceeds maximum queue size: scripted"))
    caller = Caller(world, world.versions["e"], {"IN": [1]})
    with pytest.raises(Overloaded, match="in ensemble 'e', Exceeds maximum queue size"):
        world.infer(world.versions["e"], caller.request)
    await world.finish()
    assert caller.settled == 0
    assert world.versions["double"].statistics.failures["CANCELED"] == 1  # it had been taken already


@simulated
async def test_a_step_that_is_refused_later_fails_the_request() -> None:
    world = diamond()
    caller = world.send({"IN": [1]})
    scheduler = world.versions["add"].scheduler
    assert scheduler is not None
    scheduler.close(Overloaded("full"))
    await world.finish()
    assert isinstance(caller.error, Overloaded)


@simulated
async def test_what_is_on_its_way_is_bounded() -> None:
    world = diamond(policy=BatchPolicy(8, max_queue_rows=8))
    world.send({"IN": [1] * 5})
    with pytest.raises(Overloaded, match="Exceeds maximum queue size"):
        world.send({"IN": [1] * 4})
    world.send({"IN": [1] * 3})
    await world.finish()


@simulated
async def test_intermediate_tensors_count_while_they_are_held() -> None:
    world = diamond()
    world.replicas["add_one"].takes_s = 1.0
    world.send({"IN": [1, 2]})
    scheduler = world.versions["e"].scheduler
    assert scheduler is not None
    assert scheduler.queue_statistics().nbytes == 0  # both steps have what they read
    await asyncio.sleep(0.5)
    assert scheduler.queue_statistics().nbytes == 16  # `left` waits for `right`
    await world.finish()


@simulated
async def test_closing_failing_and_opening() -> None:
    world = diamond()
    ensemble = world.versions["e"].scheduler
    assert ensemble is not None
    inside = world.send({"IN": [1]})
    ensemble.close(Draining("model 'e' is unloading"))
    with pytest.raises(Draining):
        world.send({"IN": [1]})
    ensemble.fail_waiting(NotReady("gone"))
    assert isinstance(inside.error, NotReady)
    ensemble.reopen()
    world.send({"IN": [1]})
    await world.finish()


# -- models come and go ------------------------------------------------------------------------------------------------


@simulated
async def test_a_newer_version_is_used_by_requests_that_come_later() -> None:
    world = diamond()
    early = world.send({"IN": [10]})
    world.model("add", ["b", "a"], ["sum"], lambda arrays: [arrays[0] - arrays[1]], version="2")  # other order too
    late = world.send({"IN": [10]})
    await asyncio.sleep(1.0)
    await world.finish()
    assert early.made() == {"OUT": [31]}
    assert late.made() == {"OUT": [11 - 20]}
    assert late.request.batch.parts[-1][0].backend == "add/2/onnx-1"


@simulated
async def test_a_version_is_pinned_while_somebody_will_come_to_it() -> None:
    world = diamond()
    last = world.versions["add"]
    one, other = world.send({"IN": [1]}), world.send({"IN": [2]})
    assert last.pins == 2
    one.request.abort()
    assert last.pins == 1
    await world.finish()
    assert last.pins == 0
    assert other.made() == {"OUT": [7]}


@simulated
async def test_a_reload_under_a_running_request_does_not_fail_it() -> None:
    world = diamond()
    caller = world.send({"IN": [10]})
    old = world.versions["add"]
    world.model("add", ["b", "a"], ["sum"], add, version="2")
    old.scheduler = None  # drained and freed before the step was reached
    await world.finish()
    assert caller.made() == {"OUT": [31]}
    assert caller.request.batch.parts[-1][0].backend == "add/2/onnx-1"


@simulated
async def test_an_ensemble_without_one_of_its_models_is_not_ready_and_says_which() -> None:
    world = diamond()
    ensemble = world.versions["e"].scheduler
    assert isinstance(ensemble, Ensemble)
    assert ensemble.obstacle == ""
    removed = world.versions.pop("add")
    assert "'add' is not found" in ensemble.obstacle
    with pytest.raises(NotReady, match=r"ensemble 'e' is not ready: .*'add' is not found"):
        world.send({"IN": [1]})
    world.versions["add"] = removed
    removed.ready = False
    assert "'add' of one of its steps is not ready" in ensemble.obstacle
    removed.ready = True
    world.send({"IN": [1]})
    await world.finish()


@simulated
async def test_a_request_whose_next_model_is_gone_fails_with_its_name() -> None:
    world = diamond()
    caller = world.send({"IN": [1]})
    removed = world.versions.pop("add")
    assert removed.scheduler is not None
    removed.scheduler.close(NotReady("model 'add' version 1 was unloaded"))
    await world.finish()
    assert isinstance(caller.error, NotReady)
    assert "'add'" in str(caller.error)


@simulated
async def test_a_model_that_came_back_with_another_signature_makes_it_not_ready() -> None:
    world = diamond()
    world.model("add", ["a", "c"], ["sum"], add, version="2")
    with pytest.raises(NotReady, match="maps the input 'b', but the model has"):
        world.send({"IN": [1]})
    await world.finish()


@simulated
async def test_ensembles_within_ensembles() -> None:
    world = diamond()
    outer = world.ensemble([step("e", {"IN": "A"}, {"OUT": "t"}), step("double", {"x": "t"}, {"y": "B"})], ["A"], ["B"],
                           name="outer")  # fmt: skip
    caller = world.send({"A": [1, 2]}, name="outer")
    await world.finish()
    assert caller.made() == {"B": [8, 14]}
    said = [execution.backend for execution, _ in caller.request.batch.parts]
    assert said[0] == "e/1/double/1/onnx-1"
    assert len(said) == 4
    assert outer.dependencies == ("e", "double")


@simulated
async def test_an_ensemble_cannot_contain_itself() -> None:
    world = diamond()
    world.ensemble([step("e", {"IN": "A"}, {"OUT": "B"})], ["A"], ["B"], name="outer")
    with pytest.raises(ConfigError, match="contains itself"):
        world.ensemble([step("outer", {"A": "IN"}, {"B": "OUT"})], ["IN"], ["OUT"], name="e")
    await world.finish()


# -- shapes ----------------------------------------------------------------------------------------------------------


@simulated
@pytest.mark.parametrize(("dims", "shape"), [((-1, 1), (3, 1)), ((1,), (1,))])
async def test_an_ensemble_that_does_not_batch_over_models_that_do(
    dims: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    world = World()
    world.model("double", ["x"], ["y"], double)
    world.ensemble([step("double", {"x": "IN"}, {"y": "OUT"})], ["IN"], ["OUT"], limit=0, dims=dims)
    numbers = list(range(1, shape[0] + 1))
    caller = world.send({"IN": numbers}, shape=shape)
    await world.finish()
    assert caller.made() == {"OUT": [2 * number for number in numbers]}
    assert caller.request.batch.outputs[0].shape == shape


@simulated
async def test_rows_a_step_s_model_cannot_take_are_the_callers_fault() -> None:
    world = World()
    world.model("double", ["x"], ["y"], double, limit=2)
    world.ensemble([step("double", {"x": "IN"}, {"y": "OUT"})], ["IN"], ["OUT"], limit=0, dims=(-1, 1))
    with pytest.raises(InvalidRequest, match="batch-size must be >= 1 and <= 2 for 'double'"):
        world.send({"IN": [1, 2, 3]}, shape=(3, 1))
    await world.finish()
    assert world.versions["e"].statistics.failures["OTHER"] == 1


@simulated
async def test_a_tensor_whose_shape_does_not_fit_the_next_step_is_named() -> None:
    world = World()
    world.model("grow", ["x"], ["y"], lambda arrays: [np.repeat(arrays[0], 2, axis=1)], dims=(-1,))
    world.model("double", ["x"], ["y"], double)
    steps = [step("grow", {"x": "IN"}, {"y": "mid"}), step("double", {"x": "mid"}, {"y": "OUT"})]
    world.ensemble(steps, ["IN"], ["OUT"])
    caller = world.send({"IN": [1]})
    await world.finish()
    assert isinstance(caller.error, InvalidRequest)
    assert "in ensemble 'e', unexpected shape for input 'x' for model 'double'. Expected [-1, 1], got [1, 2]" in str(
        caller.error
    )


@simulated
async def test_an_optional_input_may_be_left_out() -> None:
    world = World()
    served = world.model("sum", ["a", "b"], ["y"], lambda arrays: [sum(arrays[1:], arrays[0])])
    spec = served.spec
    served.spec = ModelSpec(
        spec.name, spec.version, spec.digest, spec.platform,
        (spec.inputs[0], TensorSpec("b", INT64, (1,), optional=True)), spec.outputs, spec.policy,
    )  # fmt: skip
    world.ensemble([step("sum", {"a": "A", "b": "B"}, {"y": "OUT"})], ["A", "B"], ["OUT"], optional=("B",))
    alone, both = world.send({"A": [1]}), world.send({"A": [1], "B": [5]})
    await world.finish()
    assert (alone.made(), both.made()) == ({"OUT": [1]}, {"OUT": [6]})


@simulated
async def test_an_optional_input_that_a_step_requires_is_asked_for() -> None:
    world = diamond(optional=("IN",))
    request = Caller(world, world.versions["e"], {"IN": [1]}).request
    request.inputs = (None,)
    with pytest.raises(InvalidRequest, match=r"expected 1 inputs but got 0 .* missing required input\(s\) \['x'\]"):
        world.infer(world.versions["e"], request)
    caller = world.send({"IN": [1]})
    await world.finish()
    assert caller.made() == {"OUT": [4]}


@simulated
async def test_an_oversized_request_runs_in_parts() -> None:
    world = diamond(policy=BatchPolicy(4, oversize="split"))
    caller = world.send({"IN": list(range(10))})
    await world.finish()
    assert caller.made() == {"OUT": [3 * number + 1 for number in range(10)]}
    assert len(caller.request.batch.parts) == 9
    assert world.versions["e"].statistics.success == 1


# -- the cache -------------------------------------------------------------------------------------------------------


@simulated
async def test_steps_and_ensembles_may_be_cached() -> None:
    world = World()
    world.model("double", ["x"], ["y"], double, cached=True)
    world.model("add_one", ["x"], ["y"], add_one)
    steps = [step("double", {"x": "IN"}, {"y": "mid"}), step("add_one", {"x": "mid"}, {"y": "OUT"})]
    world.ensemble(steps, ["IN"], ["OUT"])
    world.ensemble(steps, ["IN"], ["OUT"], name="whole", cached=True)
    for name, expected in (("e", [1, 1]), ("e", [1, 2]), ("whole", [1, 3]), ("whole", [1, 3])):
        caller = world.send({"IN": [5]}, name=name)
        await asyncio.sleep(1.0)
        assert caller.made() == {"OUT": [11]}
        assert [len(world.replicas[model].executed) for model in ("double", "add_one")] == expected
    world.model("add_one", ["x"], ["y"], lambda arrays: [arrays[0] + 100], version="2")
    caller = world.send({"IN": [5]}, name="whole")  # another model by now, so the kept answer is not given
    await asyncio.sleep(1.0)
    assert caller.made() == {"OUT": [110]}
    await world.finish()


def test_what_cannot_be_cached() -> None:
    check_cacheable(Scheduling(preserve_ordering=True))
    check_cacheable(Scheduling(response_cache=True))
    with pytest.raises(ConfigError, match="preserve_ordering"):
        check_cacheable(Scheduling(response_cache=True, preserve_ordering=True))


# -- any graph, any history --------------------------------------------------------------------------------------------

FUNCTIONS: dict[str, tuple[int, Function]] = {
    "same": (1, lambda arrays: [arrays[0], arrays[0] * 3]),
    "sum2": (2, lambda arrays: [arrays[0] + arrays[1], arrays[0] - arrays[1]]),
    "sum3": (3, lambda arrays: [arrays[0] + 2 * arrays[1] + arrays[2], arrays[2]]),
}


def graph(rng: random.Random, world: World, count: int) -> tuple[list[EnsembleStep], list[str]]:
    """A random graph over models of `FUNCTIONS`; some of them are used several times."""
    for name, (arity, function) in FUNCTIONS.items():
        world.model(name, [f"i{place}" for place in range(arity)], ["y", "z"], function, limit=6)
    tensors = ["A", "B"]
    steps = []
    for index in range(count):
        name = rng.choice(sorted(FUNCTIONS)) if index else "sum2"
        reads = {f"i{place}": rng.choice(tensors) if index else tensors[place] for place in range(FUNCTIONS[name][0])}
        writes = dict(rng.sample([("y", f"y{index}"), ("z", f"z{index}")], rng.randint(1, 2)))
        steps.append(step(name, reads, writes))
        tensors += writes.values()
    read = {tensor for one in steps for _, tensor in one.input_map}
    outputs = [tensor for tensor in tensors if tensor not in read or rng.random() < 0.2]
    rng.shuffle(steps)
    return steps, outputs


def evaluate(steps: list[EnsembleStep], inputs: dict[str, list[int]]) -> dict[str, list[int]]:
    """What the graph gives, worked out directly."""
    known = {name: np.array(numbers) for name, numbers in inputs.items()}
    waiting = list(steps)
    while waiting:
        for one in waiting:
            if all(tensor in known for _, tensor in one.input_map):
                made = FUNCTIONS[one.model][1]([known[tensor] for _, tensor in sorted(one.input_map)])
                known |= {tensor: made["yz".index(own)] for own, tensor in one.output_map}
                waiting.remove(one)
                break
    return {name: numbers.tolist() for name, numbers in known.items()}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), count=st.integers(1, 8), callers=st.integers(1, 6))
@simulated
async def test_any_graph_gives_what_a_direct_evaluation_gives(seed: int, count: int, callers: int) -> None:
    rng = random.Random(seed)
    world = World()
    steps, outputs = graph(rng, world, count)
    world.ensemble(steps, ["A", "B"], outputs, limit=6)
    sent = []
    for _ in range(callers):
        rows = rng.randint(1, 6)
        inputs = {name: [rng.randint(-99, 99) for _ in range(rows)] for name in ("A", "B")}
        sent.append((world.send(inputs), evaluate(steps, inputs)))
        for replica in world.replicas.values():
            replica.takes_s = rng.choice([0.0, 0.001, 0.05])
        await asyncio.sleep(rng.choice([0.0, 0.01]))
    await world.finish()
    for caller, expected in sent:
        assert caller.made() == {name: expected[name] for name in outputs}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), count=st.integers(1, 6), history=st.integers(5, 40))
@simulated
async def test_any_history_settles_everyone_once(seed: int, count: int, history: int) -> None:
    rng = random.Random(seed)
    world = World()
    steps, outputs = graph(rng, world, count)
    world.ensemble(steps, ["A", "B"], outputs, policy=BatchPolicy(6, max_queue_rows=30))
    sent: list[tuple[Caller, dict[str, list[int]]]] = []
    refused = 0
    for _ in range(history):
        match rng.choice(["send", "send", "send", "abort", "fail", "speed", "wait", "reload"]):
            case "send":
                inputs = {name: [rng.randint(-99, 99) for _ in range(rng.choice([1, 4]))] for name in ("A",)}
                inputs["B"] = [rng.randint(-99, 99) for _ in inputs["A"]]
                try:
                    sent.append((world.send(inputs, timeout_s=rng.choice([0.0, 0.02])), evaluate(steps, inputs)))
                except GatewayError:
                    refused += 1
            case "abort" if sent:
                rng.choice(sent)[0].request.abort()
            case "fail":
                rng.choice(list(world.replicas.values())).failing = rng.choice([None, None, *FailureKind])
            case "speed":
                rng.choice(list(world.replicas.values())).takes_s = rng.choice([0.0, 0.01, 0.1])
            case "reload":
                name = rng.choice(sorted(FUNCTIONS))
                arity, function = FUNCTIONS[name]
                old = world.versions[name]
                world.model(name, [f"i{place}" for place in range(arity)], ["y", "z"], function)
                assert old.scheduler is not None
                old.scheduler.close(NotReady("unloaded"))
            case _:
                await asyncio.sleep(rng.choice([0.0, 0.005, 0.05]))
    for replica in world.replicas.values():
        replica.failing = None
    await world.finish()
    for caller, expected in sent:
        if caller.error is None:
            assert caller.made() == {name: expected[name] for name in outputs}
    counted = world.versions["e"].statistics
    assert counted.success == sum(caller.error is None for caller, _ in sent)
    assert sum(counted.failures.values()) == len(sent) - counted.success + refused


@simulated
async def test_steps_of_a_sequence_are_never_taken_from_the_cache() -> None:
    world = diamond(cached=True)
    for _ in range(2):
        caller = Caller(world, world.versions["e"], {"IN": [1]})
        caller.request.sequence = SequenceStep(7)
        world.infer(world.versions["e"], caller.request)
        world.callers.append(caller)
        await turns(20)
        await asyncio.sleep(1.0)
        assert caller.made() == {"OUT": [4]}
    await world.finish()
    assert world.replicas["add"].executed == [1, 1]
    assert world.versions["e"].statistics.cache_hits == 0


@simulated
async def test_a_caller_whose_request_ended_while_a_step_was_refused_is_told_once() -> None:
    world = diamond()
    served = world.versions["e"]
    first: list[InferRequest] = []

    def infer(version: Version, request: InferRequest) -> None:
        if not first:
            first.append(request)
            return
        request_of_first = first[0]  # a queue that is asked finds that the time of the other step is up
        request_of_first.error, request_of_first.state = DeadlineExceeded("too late"), SETTLED
        request_of_first.settle(request_of_first)
        raise Overloaded("full")

    ensemble = Ensemble(served.spec, served.statistics, world.resolve, infer, world.loop.time)
    caller = Caller(world, served, {"IN": [1]})
    ensemble.submit(caller.request)
    assert caller.settled == 1
    assert isinstance(caller.error, DeadlineExceeded)
    assert caller.request.state == SETTLED
    assert (ensemble.pending, ensemble.nbytes) == (0, 0)
    assert all(version.pins == 0 for version in world.versions.values())
    await world.finish()


@simulated
async def test_what_can_never_fit_is_not_to_be_sent_again() -> None:
    world = diamond(policy=BatchPolicy(8, max_queue_bytes=32))
    with pytest.raises(TooLarge, match="40 bytes, but only 16384 rows and 32 bytes may wait"):
        world.send({"IN": [1, 2, 3, 4, 5]})
    assert world.versions["e"].statistics.rejected == {"too_large": 1}
    await world.finish()
