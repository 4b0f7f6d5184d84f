"""Replicas that run on the gateway's own ONNX workers.

A replica is one instance of a model in one worker process. What comes back is checked before anyone sees it: the
outputs that were asked for, with the model's datatypes and as many bytes as their shapes say. Each output is copied
once, out of shared memory.

Mapping of outcomes: the worker is down or takes nothing more now → NOT_SENT; the batch cannot be made ready or the
model refuses the input → SUSPECT; no answer in time → TIMEOUT, and the worker is killed if the run cannot be ended
otherwise; the worker died of it, and answers that fail a check → BROKEN. What shared its fate, see `attempt.fate`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from gateway.backends.interface import Batch, Failure, FailureKind, Success, Traits
from gateway.core.request import OutputTensor
from gateway.core.tensor import element_count, unpack_bytes
from gateway.core.traits import WORKER
from gateway.protocol.ipc import Result, ResultOutput
from gateway.workers.attempt import Attempt, NotSent
from gateway.workers.channel import Channel
from gateway.workers.hosting import Instance, LoadedModel, LoadOptions, PoolEvent
from gateway.workers.pool import WorkerPool

__all__ = ["LoadOptions", "LoadedModel", "OnnxPool", "OnnxReplica", "PoolEvent"]

_log = logging.getLogger("gateway.workers")


class _OnnxAttempt(Attempt):
    __slots__ = ("_batch", "_outputs", "_replica", "_worker")

    def __init__(self, replica: OnnxReplica, batch: Batch, instance: Instance) -> None:
        self.identity = 0
        self._replica = replica
        self._batch = batch
        self._outputs = instance.model.signature.outputs
        self._worker = replica.name
        self.instance = instance

    def is_for(self, batch: Batch) -> bool:
        return self._batch is batch

    def result(self, result: Result, memory: memoryview) -> Success | Failure:
        wanted = self._batch.outputs
        if len(result.outputs) != len(wanted):
            return self._bad(f"{len(result.outputs)} outputs where {len(wanted)} were asked for")
        outputs = []
        for index, place in zip(wanted, result.outputs, strict=True):
            tensor = self._outputs[index]
            if place.index != index or place.datatype is not tensor.datatype:
                return self._bad(f"output {place.index} as {place.datatype} where {tensor.name} was due")
            data = bytes(memory[place.offset : place.offset + place.nbytes])
            if not _fits(place, data):
                return self._bad(f"{place.nbytes} bytes do not make up shape {list(place.shape)} of {tensor.name}")
            outputs.append(OutputTensor(tensor.name, tensor.datatype, place.shape, data))
        self.instance.model.answered = True
        return Success(outputs, result.input_ns, result.infer_ns, result.output_ns)

    def _bad(self, text: str) -> Failure:
        return Failure(FailureKind.BROKEN, f"worker {self._worker} answered with {text}")

    def settle(self, outcome: Success | Failure) -> None:
        self._replica.finished(self)
        self._batch.done(outcome)


def _fits(place: ResultOutput, data: bytes) -> bool:
    count = element_count(place.shape)
    if place.datatype.itemsize:
        return count * place.datatype.itemsize == len(data)
    try:
        return len(unpack_bytes(data)) == count
    except ValueError:
        return False


class OnnxReplica:
    """Fits `backends.interface.Replica`."""

    __slots__ = ("_attempts", "_instance", "_loop", "_slots")

    def __init__(self, instance: Instance, slots: int) -> None:
        self._instance = instance
        self._slots = slots
        self._attempts: dict[_OnnxAttempt, Channel | None] = {}
        """In flight, and where."""
        self._loop = asyncio.get_running_loop()

    def __repr__(self) -> str:
        return f"<OnnxReplica {self.name} of {self._instance.model.label} in_flight={len(self._attempts)}>"

    @property
    def name(self) -> str:
        """The worker that batches go to; while there is none, the one that is to be."""
        channel = self._instance.channel
        return self._instance.home.name if channel is None else channel.name

    @property
    def traits(self) -> Traits:
        return WORKER

    @property
    def available(self) -> bool:
        return self._instance.channel is not None

    @property
    def free_slots(self) -> int:
        return max(0, self._slots - len(self._attempts)) if self._instance.channel is not None else 0

    @property
    def in_flight(self) -> int:
        return len(self._attempts)

    @property
    def restarts(self) -> int:
        """Times the worker process behind it died and was replaced."""
        return self._instance.home.restarts

    def set_listener(self, changed: Callable[[], None], /) -> None:
        self._instance.changed = changed

    def execute(self, batch: Batch, timeout_s: float, /) -> None:
        """`timeout_s` is the time after which the run counts as hung. If it cannot be ended the worker is killed and
        takes every batch in it along: a bound on the model's run, not on one caller's patience."""
        instance = self._instance
        attempt = _OnnxAttempt(self, batch, instance)
        channel = instance.channel
        self._attempts[attempt] = channel
        try:
            if channel is None:
                raise NotSent(f"worker {self.name} is not running")
            channel.run(attempt, instance.number, batch.inputs, batch.outputs, timeout_s)
        except NotSent as error:
            self._loop.call_soon(attempt.settle, Failure(FailureKind.NOT_SENT, str(error)))
        except Exception as error:
            # `run` raises nothing else: this is the batch itself, which could not say what is in it.
            _log.exception("a batch for worker %s could not be read", self.name)
            text = f"the batch could not be read: {type(error).__name__}"
            self._loop.call_soon(attempt.settle, Failure(FailureKind.SUSPECT, text))

    def cancel(self, batch: Batch, /) -> None:
        """See `Replica`. onnxruntime ends a run between two nodes of its model; inside a long one it goes on to that
        node's end, and the slot is free then."""
        for attempt, channel in self._attempts.items():
            if attempt.is_for(batch):
                if channel is not None:
                    channel.cancel(attempt)
                return

    def finished(self, attempt: _OnnxAttempt) -> None:
        """An attempt ended; its slot is free."""
        self._attempts.pop(attempt, None)


class OnnxPool(WorkerPool[OnnxReplica]):
    """The worker pool, with replicas that take batches. See `WorkerPool` for the arguments."""

    def __init__(
        self,
        *,
        workers: int,
        intra_op_threads: int | None = None,
        slots: int = 1,
        on_event: Callable[[PoolEvent], None] | None = None,
        load_timeout_s: float = 300.0,
    ) -> None:
        super().__init__(
            lambda instance: OnnxReplica(instance, slots),
            workers=workers,
            intra_op_threads=intra_op_threads,
            slots=slots,
            on_event=on_event,
            load_timeout_s=load_timeout_s,
        )
