"""What travels through a channel, and the ways in which it does not: shared by channels and by those who use them.

An attempt is one batch in one process. It ends in exactly one `settle`, except when handing it over raised `NotSent`.

When the process ends first, `fate` says what that means for each attempt it had. What the process was executing is a
suspect; what it had not begun was never sent, whatever the gateway had handed over; what it had executed without
getting the answer out, or executed beside the batch that is to blame, is innocent.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

from gateway.core.outcome import Failure, FailureKind, Sign, Success
from gateway.protocol import ipc
from gateway.workers.board import Progress
from gateway.workers.shm import Buffer

if TYPE_CHECKING:
    from gateway.workers.channel import Channel

TEXT_LIMIT: Final = 500
"""Characters kept of an exception's text."""


class WorkerLost(Exception):
    """The process ended, or never answered, before it did what was asked; the text says which."""


class LoadRefused(Exception):
    """The worker is well, the model is not; the text says why."""


class NotSent(Exception):
    """The batch never left the gateway; the text says why."""


class Hosted(Protocol):
    """What a channel must know of an instance; `hosting.Instance` fits."""

    channel: Channel | None
    changed: Callable[[], None]
    """Called when it became unavailable."""

    @property
    def number(self) -> int:
        """Names it in frames."""

    @property
    def model(self) -> Any:
        """Whom to blame; hashable."""


class Attempt:
    """One batch on its way through one worker. Subclasses say what becomes of the outcome."""

    __slots__ = ("buffer", "deadline", "identity", "instance", "overdue", "timeout_s")

    instance: Hosted
    identity: int
    """Names it in frames."""
    timeout_s: float
    deadline: float
    """When to act on it next."""
    overdue: bool
    """Its time is up: it was told to end, and the process is killed if it does not."""
    buffer: Buffer

    def sent(self, identity: int, buffer: Buffer, timeout_s: float, deadline: float) -> None:
        """It is in flight from here on. Called by the channel."""
        self.identity = identity
        self.buffer = buffer
        self.timeout_s = timeout_s
        self.deadline = deadline
        self.overdue = False

    def result(self, result: ipc.Result, memory: memoryview) -> Success | Failure:
        """Judge and copy the answer; `memory` is the output area, valid only during this call."""
        raise NotImplementedError

    def settle(self, outcome: Success | Failure) -> None:
        """The end of the attempt; called exactly once, and the channel is done with it by then."""
        raise NotImplementedError


class WarmUp(Attempt):
    """A batch whose outcome is awaited and whose answer nobody reads."""

    __slots__ = ("outcome",)

    def __init__(self, instance: Hosted) -> None:
        self.instance = instance
        self.outcome: asyncio.Future[Success | Failure] = asyncio.get_running_loop().create_future()

    def result(self, result: ipc.Result, memory: memoryview) -> Success | Failure:
        return Success([], result.input_ns, result.infer_ns, result.output_ns)

    def settle(self, outcome: Success | Failure) -> None:
        if not self.outcome.done():
            self.outcome.set_result(outcome)


class End(enum.Enum):
    """Why a process is no more."""

    DIED = "died"
    CRASHED = "crashed"
    """It ended itself, by a fault in the code it ran, while it executed one batch and did nothing else."""
    NO_MEMORY = "no_memory"
    """The kernel ended it."""
    HUNG = "hung"
    """We killed it because something in it did not end in time."""
    NONSENSE = "nonsense"
    """We killed it because what it said cannot be used: nothing is known of what it did."""
    WISH = "wish"
    """We had it stopped."""


_SIGNS: Final = {End.DIED: Sign.EXIT, End.CRASHED: Sign.CRASH, End.NO_MEMORY: Sign.MEMORY}


def fate(end: End, progress: Progress, text: str, *, overdue: bool) -> Failure:
    """What becomes of an attempt whose process ended. `overdue`: of this very attempt."""
    if end is End.NONSENSE:
        return Failure(FailureKind.BROKEN, text)
    if progress is Progress.NOT_BEGUN:
        return Failure(FailureKind.NOT_SENT, text, Sign.BYSTANDER)
    if progress is Progress.EXECUTING:
        if end in _SIGNS:
            return Failure(FailureKind.BROKEN, text, _SIGNS[end])
        if end is End.HUNG and overdue:
            return Failure(FailureKind.TIMEOUT, text)
    return Failure(FailureKind.BROKEN, text, Sign.BYSTANDER)


def one_line(error: Exception) -> str:
    """For people; some exceptions (MemoryError) have no text."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:TEXT_LIMIT] or type(error).__name__
