"""The test plays the backend: replicas that do what they are told, and a loop whose time is simulated.

Every row of every request carries a number of its own, and the model's answer is a function of that number, so a row
that reached the wrong caller shows. Time moves only when nothing else can happen; a test that waits for something that
can never come fails at once instead of hanging.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import random
import selectors
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Literal

import numpy as np

from gateway.backends.interface import Batch, Failure, FailureKind, Sign, Success
from gateway.core.assembly import slice_rows, write_parts
from gateway.core.model import BatchPolicy, ModelSpec, TensorSpec
from gateway.core.request import InferRequest, InputTensor, OutputTensor, SequenceStep
from gateway.core.resilience import RESILIENCE, Resilience
from gateway.core.scheduling import PLAIN, Scheduling
from gateway.core.tensor import DATATYPE, pack_bytes, unpack_bytes
from gateway.core.traits import WORKER, Traits
from gateway.dispatcher import RunningBatch
from gateway.errors import GatewayError
from gateway.observe.record import ModelStatistics
from gateway.scheduler import Scheduler
from tests.fakes import PlainReplica

INT64, BYTES = DATATYPE["INT64"], DATATYPE["BYTES"]

Kind = Literal["onnx", "oip"]


MANY_TURNS = 100_000


class NothingLeft(Exception):
    """The test waits for something that cannot happen any more."""


class BusyLoop(Exception):
    """The loop turns and turns: something ticks that should wait."""


class _Selector(selectors.SelectSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self._turns = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise NothingLeft
        self._turns += 1
        if self._turns > MANY_TURNS:
            raise BusyLoop
        self.now += max(0.0, timeout)
        return super().select(0)


class SimulatedLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._simulated = _Selector()
        super().__init__(self._simulated)
        self.mishaps: list[dict[str, Any]] = []
        self.set_exception_handler(lambda _, context: self.mishaps.append(context))

    def time(self) -> float:
        return self._simulated.now


def simulated(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on a simulated loop; an exception that reached the loop's handler fails it."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        loop = SimulatedLoop()
        try:
            loop.run_until_complete(test(*args, **kwargs))
            assert loop.mishaps == []
        finally:
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.close()

    return run


async def turns(count: int = 6) -> None:
    """Let everything happen that needs no time."""
    for _ in range(count):
        await asyncio.sleep(0)


def answer_to(number: int) -> int:
    return number * 3 + 1


class ScriptedBatch:
    """A batch as the backend sees it, and the ways to end it."""

    def __init__(self, replica: ScriptedReplica, batch: Batch, timeout_s: float) -> None:
        self.replica = replica
        self.rows = batch.rows
        self.timeout_s = timeout_s
        self.numbers = _numbers(batch)
        self.ended = False
        self.isolated = isinstance(batch, RunningBatch) and batch.isolated
        self.lane = batch.lane if isinstance(batch, RunningBatch) else None
        self.deadline = batch.deadline
        self.sequence = batch.sequence
        self.parameters = batch.parameters
        self.cancelled = False
        """Whether it was asked to end early; it goes on until the test ends it."""
        self._batch = batch

    def reply(self, tamper: Callable[[list[int]], list[int]] | None = None, infer_ns: int = 10) -> None:
        """Answer every row; `tamper` changes the answers on the way. `infer_ns`: how long the run is said to be."""
        answers = [answer_to(number) for number in self.numbers]
        if tamper is not None:
            answers = tamper(answers)
        outputs = {
            0: OutputTensor("triple", INT64, (len(answers), 1), np.array(answers, "<i8").tobytes()),
            1: OutputTensor("name", BYTES, (len(answers), 1), pack_bytes([b"n%d" % a for a in answers])),
        }
        self._end(Success([outputs[index] for index in self._batch.outputs], 1, infer_ns, 1))

    def fail(
        self,
        kind: FailureKind,
        message: str = "scripted",
        sign: Sign = Sign.NONE,
        retry_after_s: float = 0.0,
        words: str = "",
    ) -> None:
        self._end(Failure(kind, message, sign, retry_after_s, words))

    def end_early(self) -> None:
        """What a backend does that was asked to, unless it is done already."""
        if not self.ended:
            self.fail(FailureKind.CANCELLED)

    def _end(self, outcome: Success | Failure) -> None:
        assert not self.ended
        self.ended = True
        self.replica.running.remove(self)
        self._batch.done(outcome)


def _numbers(batch: Batch) -> list[int]:
    if not batch.inputs:
        return []
    written = bytearray(batch.inputs[0].nbytes)
    write_parts(batch.inputs[0], memoryview(written))
    numbers: list[int] = np.frombuffer(bytes(written), "<i8").tolist()
    assert len(numbers) == batch.rows
    assert batch.inputs[0].shape == (batch.rows, 1)
    return numbers


class ScriptedReplica(PlainReplica):
    """Fits `backends.interface.Replica`; its batches end when the test says so."""

    def __init__(self, name: str, backend: Backend, slots: int, traits: Traits = WORKER) -> None:
        self._name = name
        self.traits = traits
        self._slots = slots
        self._backend = backend
        self._up = True
        self._changed: Callable[[], None] = lambda: None
        self.running: list[ScriptedBatch] = []

    @property
    def name(self) -> str:
        return self._name

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
        if self.free_slots <= 0:
            self._backend.complaints.append(AssertionError("a batch was handed over without a free slot"))
        scripted = ScriptedBatch(self, batch, timeout_s)
        self.running.append(scripted)
        self._backend.arrived(scripted)

    def cancel(self, batch: Batch, /) -> None:
        for scripted in self.running:
            if scripted._batch is batch:
                scripted.cancelled = True
                self._backend.cancelled(scripted)

    def set_listener(self, changed: Callable[[], None], /) -> None:
        self._changed = changed

    def set_available(self, up: bool) -> None:
        self._up = up
        self._changed()


class Backend:
    """The replicas of one model, and the batches they were given in order."""

    def __init__(self, replicas: int, slots: int, kinds: Sequence[Kind] = ()) -> None:
        """`kinds`: of the replicas, the first ones; workers where nothing is said."""
        self._slots = slots
        self.replicas: list[ScriptedReplica] = []
        for index in range(replicas):
            self.add(kinds[index] if index < len(kinds) else "onnx")
        self.obeys = False
        """Whether a batch that is cancelled ends so in the loop's next turn."""
        self.executed: list[ScriptedBatch] = []
        self.respond: Callable[[ScriptedBatch], None] | None = None
        """If set, decides every batch in the loop's next turn instead of the test."""
        self.inspect: Callable[[ScriptedBatch], None] = lambda _: None
        """Called with every batch the moment it is handed over; what it asserts is raised by `Bench.finish`."""
        self.complaints: list[AssertionError] = []
        """Kept, not raised: whoever hands over a batch survives what the backend raises."""
        self._unseen: asyncio.Queue[ScriptedBatch] = asyncio.Queue()

    def add(self, kind: Kind) -> ScriptedReplica:
        number = len(self.replicas) + 1
        traits = WORKER if kind == "onnx" else Traits("oip", server=f"s{number}", max_slots=self._slots)
        replica = ScriptedReplica(f"{'onnx' if kind == 'onnx' else 'host'}-{number}", self, self._slots, traits)
        self.replicas.append(replica)
        return replica

    def cancelled(self, batch: ScriptedBatch) -> None:
        if self.obeys:
            asyncio.get_running_loop().call_soon(batch.end_early)

    def arrived(self, batch: ScriptedBatch) -> None:
        self.executed.append(batch)
        try:
            self.inspect(batch)
        except AssertionError as complaint:
            self.complaints.append(complaint)
        if self.respond is not None:
            asyncio.get_running_loop().call_soon(self.respond, batch)
        else:
            self._unseen.put_nowait(batch)

    async def expect_batch(self, rows: int) -> ScriptedBatch:
        """The next batch; time may pass until it comes."""
        batch = await self._unseen.get()
        assert batch.rows == rows
        return batch

    async def expect_nothing(self) -> None:
        await turns()
        assert self._unseen.empty(), f"unexpected batch of {self._unseen.get_nowait().rows} rows"

    @property
    def running(self) -> list[ScriptedBatch]:
        return [batch for replica in self.replicas for batch in replica.running]


class Caller:
    """Who sent a request: counts how often it was settled and checks the answer against its own rows."""

    def __init__(self, numbers: list[int], request: InferRequest) -> None:
        self.numbers = numbers
        self.request = request
        self.settled = 0
        self.settled_at = 0.0
        self.on_settled: Callable[[], None] | None = None
        request.settle = self._settle

    def _settle(self, request: InferRequest, /) -> None:
        self.settled += 1
        self.settled_at = asyncio.get_running_loop().time()
        assert request is self.request
        if self.on_settled is not None:
            self.on_settled()

    @property
    def error(self) -> Exception | None:
        return self.request.error

    @property
    def answered(self) -> bool:
        return self.settled > 0 and self.request.error is None

    def check(self) -> None:
        """The answer, row by row; asserts unless it is the caller's own and whole."""
        assert self.settled == 1
        assert self.request.error is None, self.request.error
        expected = [answer_to(number) for number in self.numbers]
        batch = self.request.batch
        assert set(batch.outputs) == set(self.request.outputs)
        assert self.request.row + self.request.rows <= batch.rows
        for index, output in batch.outputs.items():
            assert output.shape == (batch.rows, 1)
            own = slice_rows(output, self.request.row, self.request.rows)
            assert own.shape == (self.request.rows, 1)
            if index == 0:
                assert np.frombuffer(own.data, "<i8").tolist() == expected
            else:
                assert unpack_bytes(own.data) == [b"n%d" % answer for answer in expected]


def request_of(
    numbers: list[int],
    *,
    key: object = "k",
    outputs: tuple[int, ...] = (0,),
    as_values: bool = True,
    timeout_s: float = 0.0,
    stated_timeout_s: float = 0.0,
    priority: int = 0,
    sequence: SequenceStep | None = None,
) -> InferRequest:
    packed = None if as_values else np.array(numbers, "<i8").tobytes()
    tensor = InputTensor(INT64, (len(numbers), 1), list(numbers) if as_values else None, packed)
    request = InferRequest((tensor,), len(numbers), 8 * len(numbers), (key, outputs), outputs, None, None, timeout_s)
    request.stated_timeout_s, request.priority = stated_timeout_s, priority
    if sequence is not None:
        request.sequence, request.key = sequence, (key, outputs, object())
    return request


def model_spec(policy: BatchPolicy, scheduling: Scheduling = PLAIN, resilience: Resilience = RESILIENCE) -> ModelSpec:
    return ModelSpec(
        "m", "1", "sha256:" + "0" * 64, "onnxruntime_onnx",
        (TensorSpec("number", INT64, (1,)),),
        (TensorSpec("triple", INT64, (1,)), TensorSpec("name", BYTES, (1,))),
        policy,
        scheduling=scheduling,
        resilience=resilience,
    )  # fmt: skip


class Bench:
    """A scheduler on scripted replicas. Must be made inside a simulated loop."""

    def __init__(
        self,
        policy: BatchPolicy | None = None,
        replicas: int = 1,
        slots: int = 1,
        scheduling: Scheduling = PLAIN,
        resilience: Resilience = RESILIENCE,
        kinds: Sequence[Kind] = (),
        seed: int = 0,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.policy = policy or BatchPolicy(max_batch_size=8)
        self.backend = Backend(replicas, slots, kinds)
        self.statistics = ModelStatistics()
        self.spec = model_spec(self.policy, scheduling, resilience)
        self.scheduler = Scheduler(
            self.spec, self.backend.replicas, self.statistics, self.loop.time, rng=random.Random(seed)
        )
        self.callers: list[Caller] = []
        self.refused = 0
        self._numbers = itertools.count(1)

    def caller(self, rows: int = 1, **kwargs: Any) -> Caller:
        """A caller whose request was not sent yet."""
        numbers = [next(self._numbers) for _ in range(rows)]
        caller = Caller(numbers, request_of(numbers, **kwargs))
        caller.request.received = self.loop.time()
        return caller

    def send(self, rows: int = 1, **kwargs: Any) -> Caller:
        """Raises what `submit` raises; such a caller must never be settled."""
        caller = self.caller(rows, **kwargs)
        try:
            self.scheduler.submit(caller.request)
        except GatewayError:
            self.refused += 1
            raise
        self.callers.append(caller)
        return caller

    async def finish(self) -> None:
        """Everyone settled exactly once, every answer right, and nothing is left of anything."""
        await self.scheduler.drained()
        await turns()
        for complaint in self.backend.complaints:
            raise complaint
        for caller in self.callers:
            assert caller.settled == 1, (caller.numbers, caller.settled)
            if caller.answered:
                caller.check()
        assert self.backend.running == []
        assert self.scheduler.pending == 0
        queue = self.scheduler.queue_statistics()
        assert (queue.requests, queue.rows, queue.nbytes, queue.groups, queue.oldest) == (0, 0, 0, 0, None)
        answered = sum(caller.answered for caller in self.callers)
        assert self.statistics.success == answered
        assert sum(self.statistics.failures.values()) == len(self.callers) - answered + self.refused
        (dispatcher,) = self.scheduler.dispatchers
        lanes = dispatcher.lanes.statistics()
        assert (lanes.requests, lanes.rows, lanes.nbytes) == (0, 0, 0)
        assert (lanes.isolated, lanes.quarantined, lanes.retried, lanes.sequences) == (0, 0, 0, 0)
        assert dispatcher.running == 0
        self.scheduler.stop()
