"""What the pool hosts and what it tells about it: plain values shared by pool, keepers and channels.

A *model* here is one loaded model version; it has *instances*, each of which lives in one worker process at a time
and may move when that process is replaced. An instance is available exactly while it is attached to a channel.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from gateway.core.assembly import part_nbytes
from gateway.core.batchability import SignatureTensor
from gateway.core.model import Held
from gateway.core.request import BatchInput, InputTensor
from gateway.protocol.ipc import Signature
from gateway.workers.channel import Channel

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How one model is to be hosted."""

    instances: int = 2
    """Copies, on as many different workers as there are."""
    dedicated: bool = False
    """Worker processes of its own, one per instance."""
    intra_op_threads: int | None = None
    """Threads onnxruntime uses inside one instance; None: the pool's default."""
    niceness: int = 0
    """How far dedicated worker processes give way to others, 0 to 19; shared ones do not."""


EventKind = Literal["worker_started", "worker_ready", "worker_died", "model_failed", "model_recovered"]


@dataclass(frozen=True, slots=True)
class PoolEvent:
    """Something an operator may want to know. Fields that do not apply are empty."""

    kind: EventKind
    worker: str = ""
    pid: int = 0
    generation: int = 0
    model: str = ""
    version: str = ""
    text: str = ""
    """Why, in words: the exit code or signal, or the reason of a failed model."""
    subject: object = None
    """The `LoadedModel` that failed or recovered: a model that is loaded again is for a while there twice."""


@dataclass(frozen=True, slots=True)
class WorkerStatistics:
    name: str
    pid: int
    """0 while there is no process."""
    state: str
    generation: int
    """Processes started under this name so far."""
    restarts: int
    """Times a process died and was replaced; replacing a healthy one does not count."""
    models: tuple[str, ...]
    """`name/version` of every instance hosted."""
    in_flight: int
    rss_bytes: int


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    workers: tuple[WorkerStatistics, ...]
    models: int
    failed_models: int

    @property
    def restarts(self) -> int:
        return sum(worker.restarts for worker in self.workers)


class Home(Protocol):
    """The worker an instance belongs to, whichever process that is at the moment; `keeper.Keeper` fits."""

    @property
    def name(self) -> str: ...
    @property
    def restarts(self) -> int: ...


class Instance:
    """One loaded copy of a model. `number` is unique in the pool and names it in frames."""

    __slots__ = ("changed", "channel", "home", "model", "number")

    def __init__(self, model: Model, number: int, home: Home) -> None:
        self.model = model
        self.number = number
        self.home = home
        self.channel: Channel | None = None
        self.changed: Callable[[], None] = _nothing
        """Called whenever availability flips."""

    def __repr__(self) -> str:
        state = "available" if self.channel is not None else "unavailable"
        return f"<Instance {self.number} of {self.model.label} on {self.home.name} {state}>"

    def attach(self, channel: Channel) -> None:
        """The instance is loaded and warm in this process: batches go there from now on."""
        before = self.detach()
        self.channel = channel
        channel.instances[self.number] = self
        if before is None:
            self.changed()

    def detach(self) -> Channel | None:
        """Take no more batches; returns the channel it was on. Silent: whoever detaches for good calls `changed`."""
        channel = self.channel
        if channel is not None:
            channel.instances.pop(self.number, None)
            self.channel = None
        return channel


class LoadedModel(Generic[R]):
    """A model version on its workers. Built by the pool only."""

    def __init__(
        self,
        name: str,
        version: str,
        fd: int,
        options: LoadOptions,
        release: Callable[[Any], Awaitable[None]],
        external: Held | None = None,
    ) -> None:
        self.name = name
        self.version = version
        self.fd = fd
        """Sealed memory with the model's bytes: what was hashed is what every restart loads again."""
        self.external = external
        """The same for its external data; None: it has none."""
        self.options = options
        self.dedicated = options.dedicated
        """Whether it has worker processes of its own, by wish or because it is suspected of crashing."""
        self.signature = Signature((), ())
        self.instances: list[Instance] = []
        self.replicas: list[R] = []
        """One per instance, in the same order."""
        self.reason = ""
        """Why it has failed; empty while it has not."""
        self.closed = False
        self.answered = False
        """Whether it has answered a batch, on any of its workers, since it last crashed one."""
        self.unwanted = False
        """Whether whoever wanted it loaded has given up meanwhile."""
        self.warm_up: list[list[BatchInput]] = []
        self._release = release

    @property
    def fds(self) -> tuple[int, ...]:
        """What a worker is given to load it from."""
        return (self.fd,) if self.external is None else (self.fd, self.external.fileno())

    def __repr__(self) -> str:
        return f"<LoadedModel {self.label} instances={len(self.instances)}{' failed' if self.failed else ''}>"

    @property
    def label(self) -> str:
        return f"{self.name}/{self.version}"

    @property
    def failed(self) -> bool:
        """Whether its crashes (or refusals to load again) took it out of service for now."""
        return bool(self.reason)

    @property
    def inputs(self) -> Sequence[SignatureTensor]:
        return self.signature.inputs

    @property
    def outputs(self) -> Sequence[SignatureTensor]:
        return self.signature.outputs

    def set_warm_up(self, batches: Sequence[Sequence[InputTensor | None]], /) -> None:
        """Inputs (one per model input, in its order; None: left out) that every instance runs after a restart, before
        it is available again."""
        self.warm_up = [
            [
                BatchInput(index, tensor.datatype, tensor.shape, part_nbytes(tensor), [tensor])
                for index, tensor in enumerate(batch)
                if tensor is not None
            ]
            for batch in batches
        ]

    async def unload(self) -> None:
        """Wait for batches in flight, then free the model everywhere. Harmless when repeated."""
        await self._release(self)


Model = LoadedModel[Any]


def _nothing() -> None:
    pass
