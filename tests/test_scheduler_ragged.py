"""Ragged batches through queue, dispatcher and binding onto a real model: everyone's answer is his own alone-run.

The model runs in the test's process, where the test decides when, and which runs fail; time is simulated. What is
expected is numpy's word on the request alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.backends.binding import Binding, BoundReplica
from gateway.backends.interface import Batch, Failure, FailureKind, Success
from gateway.core.assembly import write_parts
from gateway.core.batchability import SignatureTensor
from gateway.core.model import BatchPolicy, ModelSpec, TensorSpec
from gateway.core.ragged import Ragged
from gateway.core.request import InferRequest, InputTensor, OutputTensor
from gateway.core.scheduling import BatchInputTensor, BatchOutputTensor, Scheduling
from gateway.core.tensor import DATATYPE
from gateway.errors import ModelError
from gateway.observe.record import ModelStatistics
from gateway.scheduler import Scheduler
from tests.fakes import PlainReplica
from tests.live import models
from tests.scripted import simulated, turns

FP32, INT32 = DATATYPE["FP32"], DATATYPE["INT32"]
X = TensorSpec("x", FP32, (-1,), ragged=True)
SUM, DOUBLE = TensorSpec("sum", FP32, (1,)), TensorSpec("double", FP32, (-1,))
ENDS = BatchInputTensor("BATCH_ACCUMULATED_ELEMENT_COUNT", ("ends",), INT32, ("x",))
SCHEDULING = Scheduling(batch_inputs=(ENDS,), batch_outputs=(BatchOutputTensor(("double",), ("x",)),))
FILE_INPUTS = (SignatureTensor("x", FP32, (None,)), SignatureTensor("ends", INT32, (None,)))
FILE_OUTPUTS = (SignatureTensor("sum", FP32, (None, 1)), SignatureTensor("double", FP32, (None,)))


@cache
def session() -> Any:
    return onnxruntime.InferenceSession(models.segments(), providers=["CPUExecutionProvider"])


class Replica(PlainReplica):
    """The model, in this process; fits `backends.interface.Replica`."""

    name, available = "here", True

    def __init__(self, fails: Callable[[Batch], FailureKind | None]) -> None:
        self.in_flight = 0
        self.runs: list[dict[str, np.ndarray[Any, Any]]] = []
        self.spoil: Callable[[OutputTensor], OutputTensor] = lambda output: output
        self._fails = fails

    @property
    def free_slots(self) -> int:
        return 1 - self.in_flight

    def set_listener(self, changed: Callable[[], None], /) -> None:
        pass

    def execute(self, batch: Batch, timeout_s: float, /) -> None:
        self.in_flight += 1
        asyncio.get_running_loop().call_soon(self._run, batch)

    def _run(self, batch: Batch) -> None:
        self.in_flight -= 1
        kind = self._fails(batch)
        if kind is not None:
            batch.done(Failure(kind, "as the test wants"))
            return
        feeds = {}
        for fed in batch.inputs:
            data = bytearray(fed.nbytes)
            write_parts(fed, memoryview(data))
            feeds[FILE_INPUTS[fed.index].name] = np.frombuffer(bytes(data), fed.datatype.numpy).reshape(fed.shape)
        self.runs.append(feeds)
        names = [FILE_OUTPUTS[place].name for place in batch.outputs]
        found = session().run(names, feeds)
        outputs = [
            self.spoil(OutputTensor(name, FP32, array.shape, array.tobytes()))
            for name, array in zip(names, found, strict=True)
        ]
        batch.done(Success(outputs, 1, 1, 1))


class Desk:
    """The model behind its scheduler; made inside a simulated loop."""

    def __init__(self, max_batch_size: int = 8, fails: Callable[[Batch], FailureKind | None] = lambda _: None) -> None:
        policy = BatchPolicy(max_batch_size, one_row=True)
        spec = ModelSpec("m", "1", "", "", (X,), (SUM, DOUBLE), policy, scheduling=SCHEDULING)
        self.replica = Replica(fails)
        bound = BoundReplica(self.replica, Binding(spec, FILE_INPUTS, FILE_OUTPUTS))
        self.loop = asyncio.get_running_loop()
        self.statistics = ModelStatistics()
        self.scheduler = Scheduler(spec, [bound], self.statistics, self.loop.time)
        self.settled: list[InferRequest] = []

    def send(self, values: list[int], outputs: tuple[int, ...] = (0, 1)) -> InferRequest:
        array = np.array([values], np.float32)
        held = array.tobytes() if len(values) % 2 else None  # both forms in which tensors wait
        x = InputTensor(FP32, array.shape, None if held else array.ravel().tolist(), held)
        request = InferRequest((x,), 1, array.nbytes, (((),), outputs), outputs, None)
        request.received = self.loop.time()
        request.settle = self.settled.append
        self.scheduler.submit(request)
        return request

    def close(self) -> None:
        self.scheduler.stop()


def answer(request: InferRequest) -> dict[str, Any]:
    batch = request.batch
    assert request.row == 0 or len(batch.outputs) == 1
    found = {}
    for output in batch.outputs.values():
        rows = np.frombuffer(output.data, np.float32).reshape(output.shape)
        found[output.name] = rows[request.row : request.row + request.rows].tolist()
    return found


def alone(values: list[int], outputs: tuple[int, ...] = (0, 1)) -> dict[str, Any]:
    x = np.array([values], np.float32)
    expected = {"sum": x.sum(axis=1, keepdims=True).tolist(), "double": (2 * x).tolist()}
    return {(SUM, DOUBLE)[place].name: expected[(SUM, DOUBLE)[place].name] for place in outputs}


REQUEST = st.tuples(st.lists(st.integers(-9, 9), max_size=7), st.sampled_from([(0, 1), (1,), (0,)]), st.integers(0, 3))


@settings(max_examples=200, deadline=None)
@given(st.lists(REQUEST, min_size=1, max_size=24), st.integers(1, 8), st.integers(0, 2**12 - 1))
def test_everyone_gets_what_he_gets_alone(
    sent: list[tuple[list[int], tuple[int, ...], int]], size: int, failing: int
) -> None:
    """Any mixture of shapes, arrivals and failed runs: halves, singles and reruns answer like the first attempt."""

    @simulated
    async def run() -> None:
        turn = 0

        def fails(batch: Batch) -> FailureKind | None:
            nonlocal turn
            turn += 1
            if not failing >> turn & 1:
                return None
            # A request that is alone and refused has failed for good; what broke a worker may be tried again.
            return FailureKind.SUSPECT if batch.rows > 1 else FailureKind.NOT_SENT

        desk = Desk(size, fails)
        requests = []
        for values, outputs, pause in sent:
            requests.append(desk.send(values, outputs))
            await turns(pause)
        await desk.scheduler.drained()
        assert len(desk.settled) == len(requests)
        for request, (values, outputs, _) in zip(requests, sent, strict=True):
            assert request.error is None, request.error
            assert answer(request) == alone(values, outputs)
        assert all(len(run["ends"]) <= size for run in desk.replica.runs)
        desk.close()

    run()


@simulated
async def test_requests_of_different_shapes_share_a_run() -> None:
    desk = Desk()
    sent = [[1, 2, 3], [4], [], [5, 6, 7, 8, 9]]
    requests = [desk.send(values) for values in sent]
    await desk.scheduler.drained()
    (run,) = desk.replica.runs
    assert run["x"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert run["ends"].tolist() == [3, 4, 4, 9]
    assert [answer(request) for request in requests] == [alone(values) for values in sent]
    assert (desk.statistics.execution_count, desk.statistics.inference_count, desk.statistics.success) == (1, 4, 4)
    desk.close()


@simulated
async def test_who_left_meanwhile_takes_nothing_of_the_others_along() -> None:
    desk = Desk()
    sent = [[1, 2, 3], [4, 4], [5]]
    requests = [desk.send(values) for values in sent]
    await turns(1)
    assert desk.replica.in_flight == 1
    requests[1].abort()
    await desk.scheduler.drained()
    assert [answer(requests[place]) for place in (0, 2)] == [alone(sent[place]) for place in (0, 2)]
    assert requests[1].batch is None
    desk.close()


@simulated
async def test_an_answer_that_is_not_everyones_reaches_nobody_and_the_rest_is_tried_alone() -> None:
    """A flat output one element short cannot be cut: the members run in smaller batches, down to the offender."""
    desk = Desk()

    def spoil(output: OutputTensor) -> OutputTensor:
        if output.name == "double" and np.isin(8.0, np.frombuffer(output.data, np.float32)):
            return OutputTensor(output.name, FP32, (output.shape[0] - 1,), output.data[4:])
        return output

    desk.replica.spoil = spoil
    sent = [[1, 2], [3], [4, 1], [5, 5, 5]]
    requests = [desk.send(values) for values in sent]
    await desk.scheduler.drained()
    for place in (0, 1, 3):
        assert answer(requests[place]) == alone(sent[place])
    assert isinstance(requests[2].error, ModelError)
    assert "output 'double' has 1 elements, where the shapes of input 'x' make 2" in str(requests[2].error)
    desk.close()


@simulated
async def test_cut_by_the_wrong_shapes_the_first_test_would_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: members in another order than their elements."""
    desk = Desk()
    right = Ragged.answers
    monkeypatch.setattr(Ragged, "answers", lambda self, members, batch: right(self, members[::-1], batch))
    requests = [desk.send(values) for values in ([1, 2, 3], [4])]
    await desk.scheduler.drained()
    assert answer(requests[0]) != alone([1, 2, 3])
    desk.close()
