"""A sequence scheduler on replicas that add up: what each step answers depends on every step before it.

The model has one input, `number`, and answers with the sum of its sequence so far, the sequence's id, and the flags it
was given (START 1, END 2, READY 4). The sum comes from the implicit state alone. Time is simulated (tests/scripted.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gateway.backends.interface import Batch, Failure, FailureKind, Success
from gateway.core.assembly import slice_rows, write_parts
from gateway.core.model import BatchPolicy, ModelSpec, TensorSpec
from gateway.core.request import InferRequest, InputTensor, OutputTensor, SequenceStep
from gateway.core.scheduling import ControlInput, Scheduling, SequencePolicy, StateTensor
from gateway.core.sequence_tensors import SequenceTensors
from gateway.core.tensor import DATATYPE
from gateway.errors import GatewayError
from gateway.observe.record import ModelStatistics
from gateway.sequence_scheduler import SequenceScheduler
from tests.fakes import PlainReplica
from tests.scripted import turns

INT32, INT64 = DATATYPE["INT32"], DATATYPE["INT64"]
FLAGS = (
    ControlInput("START", "CONTROL_SEQUENCE_START", INT32),
    ControlInput("END", "CONTROL_SEQUENCE_END", INT32),
)
READY = ControlInput("READY", "CONTROL_SEQUENCE_READY", INT32)
CORRID = ControlInput("CORRID", "CONTROL_SEQUENCE_CORRID", INT64)
TOTAL = StateTensor("total", "total_out", INT64, (1,))


def sequence_spec(policy: BatchPolicy, sequence: SequencePolicy) -> ModelSpec:
    outputs = (TensorSpec("sum", INT64, (1,)), TensorSpec("id", INT64, (1,)), TensorSpec("flags", INT32, (1,)))
    return ModelSpec(
        "acc", "1", "sha256:" + "0" * 64, "onnxruntime_onnx", (TensorSpec("number", INT64, (1,)),), outputs, policy,
        scheduling=Scheduling(sequence=sequence),
    )  # fmt: skip


class SequenceBatch:
    """A batch as the backend sees it: by input name, one value a row."""

    def __init__(self, replica: SequenceReplica, batch: Batch) -> None:
        self.replica = replica
        self.rows = batch.rows
        self.ended = False
        self._batch = batch
        self.inputs: dict[str, list[int]] = {}
        for given in batch.inputs:
            written = bytearray(given.nbytes)
            write_parts(given, memoryview(written))
            name = replica.spec.inputs[given.index].name
            assert given.shape == ((batch.rows, 1) if replica.spec.batched else (1,)), name
            self.inputs[name] = np.frombuffer(bytes(written), given.datatype.numpy).tolist()

    @property
    def numbers(self) -> list[int]:
        return self.inputs["number"]

    def reply(self) -> None:
        rows = range(self.rows)
        get = {name: self.inputs.get(name, [0] * self.rows) for name in ("total", "CORRID", "START", "END", "READY")}
        totals = [get["total"][row] + self.numbers[row] for row in rows]
        flags = [get["START"][row] + 2 * get["END"][row] + 4 * get["READY"][row] for row in rows]
        made = {"sum": totals, "id": get["CORRID"], "flags": flags, "total_out": totals}
        outputs = []
        for index in self._batch.outputs:
            tensor = self.replica.spec.outputs[index]
            data = np.array(made[tensor.name], tensor.datatype.numpy).tobytes()
            shape = (self.rows, 1) if self.replica.spec.batched else (1,)
            outputs.append(OutputTensor(tensor.name, tensor.datatype, shape, data))
        self._end(Success(outputs, 1, 10, 1))

    def fail(self, kind: FailureKind, message: str = "scripted") -> None:
        self._end(Failure(kind, message))

    def _end(self, outcome: Success | Failure) -> None:
        assert not self.ended
        self.ended = True
        self.replica.running.remove(self)
        self._batch.done(outcome)


class SequenceReplica(PlainReplica):
    """Fits `backends.interface.Replica`."""

    def __init__(self, name: str, spec: ModelSpec, arrived: Callable[[SequenceBatch], None], slots: int) -> None:
        self.name = name
        self.spec = spec
        self._arrived = arrived
        self._slots = slots
        self._up = True
        self._changed: Callable[[], None] = lambda: None
        self.running: list[SequenceBatch] = []

    @property
    def available(self) -> bool:
        return self._up

    @property
    def free_slots(self) -> int:
        return self._slots - len(self.running) if self._up else 0

    @property
    def in_flight(self) -> int:
        return len(self.running)

    def execute(self, batch: Batch, timeout_s: float, /) -> None:
        made = SequenceBatch(self, batch)
        self.running.append(made)
        self._arrived(made)

    def set_listener(self, changed: Callable[[], None], /) -> None:
        self._changed = changed

    def set_available(self, up: bool) -> None:
        self._up = up
        self._changed()


class Step:
    """One caller's step of a sequence, and what became of it."""

    def __init__(self, number: int, step: SequenceStep | None, received: float, timeout_s: float, rows: int) -> None:
        tensor = InputTensor(INT64, (rows, 1), [number] * rows, None)
        self.request = InferRequest((tensor,), rows, 8 * rows, ("k",), (0, 1, 2), None, None, timeout_s)
        self.request.sequence = step
        self.request.received = received
        self.request.settle = self._settle
        self.number = number
        self.settled = 0
        self.settled_at = 0.0
        self.on_settled: Callable[[], None] = lambda: None

    def _settle(self, request: InferRequest, /) -> None:
        assert request is self.request
        self.settled += 1
        self.settled_at = asyncio.get_running_loop().time()
        self.on_settled()

    @property
    def error(self) -> Exception | None:
        return self.request.error

    def output(self, index: int) -> int:
        assert self.settled == 1
        assert self.error is None, self.error
        batch = self.request.batch
        tensor = batch.outputs[index]
        own = slice_rows(tensor, self.request.row, 1) if len(tensor.shape) == 2 else tensor
        return int(np.frombuffer(own.data, tensor.datatype.numpy)[0])

    @property
    def sum(self) -> int:
        return self.output(0)

    @property
    def identity(self) -> int:
        return self.output(1)

    @property
    def flags(self) -> int:
        return self.output(2)


class SequenceBench:
    """Must be made inside a simulated loop."""

    def __init__(
        self,
        sequence: SequencePolicy | None = None,
        policy: BatchPolicy | None = None,
        replicas: int = 1,
        slots: int = 1,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.spec = sequence_spec(
            policy or BatchPolicy(max_batch_size=4), sequence or SequencePolicy(controls=FLAGS, states=(TOTAL,))
        )
        executed = SequenceTensors(self.spec).model_spec
        self.executed: list[SequenceBatch] = []
        self.respond: Callable[[SequenceBatch], None] | None = None
        """If set, decides every batch in the loop's next turn instead of the test."""
        self._unseen: asyncio.Queue[SequenceBatch] = asyncio.Queue()
        self.replicas = [SequenceReplica(f"onnx-{at + 1}", executed, self._arrived, slots) for at in range(replicas)]
        self.statistics = ModelStatistics()
        self.scheduler = SequenceScheduler(self.spec, self.replicas, self.statistics, self.loop.time)
        self.steps: list[Step] = []
        self.refused = 0
        self.invalid = 0

    def _arrived(self, batch: SequenceBatch) -> None:
        self.executed.append(batch)
        if self.respond is not None:
            self.loop.call_soon(self.respond, batch)
        else:
            self._unseen.put_nowait(batch)

    def send(
        self, number: int, identity: int | str = 7, *, start: bool = False, end: bool = False, timeout_s: float = 0.0,
        rows: int = 1, plain: bool = False,
    ) -> Step:  # fmt: skip
        """Raises what `submit` raises; such a step must never be settled."""
        sequence = None if plain else SequenceStep(identity, start, end)
        step = Step(number, sequence, self.loop.time(), timeout_s, rows)
        try:
            self.scheduler.submit(step.request)
        except GatewayError as error:
            self.refused += error.status == 503
            self.invalid += error.status != 503
            raise
        self.steps.append(step)
        return step

    async def expect_batch(self, numbers: Sequence[int]) -> SequenceBatch:
        """The next batch; time may pass until it comes."""
        batch = await self._unseen.get()
        assert batch.numbers == [*numbers]
        return batch

    async def expect_nothing(self) -> None:
        await turns()
        assert self._unseen.empty(), f"unexpected batch of {self._unseen.get_nowait().numbers}"

    async def finish(self, sequences: int | None = 0) -> None:
        """Everyone settled exactly once, and nothing is left; `sequences` live on."""
        await self.scheduler.drained()
        await turns()
        for step in self.steps:
            assert step.settled == 1, (step.number, step.settled)
        assert self.scheduler.pending == 0
        assert not any(replica.running for replica in self.replicas)
        queue = self.scheduler.queue_statistics()
        assert (queue.requests, queue.rows, queue.nbytes, queue.groups, queue.oldest) == (0, 0, 0, 0, None)
        answered = sum(step.error is None for step in self.steps)
        assert self.statistics.success == answered
        assert sum(self.statistics.failures.values()) == len(self.steps) - answered + self.refused
        if sequences is not None:
            assert self.scheduler.sequences == sequences
        self.scheduler.stop()


def replies(batch: SequenceBatch) -> None:
    batch.reply()


def sequence_policy(**more: Any) -> SequencePolicy:
    """Flags and the total, with whatever else."""
    return SequencePolicy(**{"controls": FLAGS, "states": (TOTAL,), **more})
