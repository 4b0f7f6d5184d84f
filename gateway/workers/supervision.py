"""What to do when workers die: pure decisions. Time and chance are arguments; nothing here acts.

- The life of one worker is a table.
- Backoff: the first restart is immediate, then 0.5·2^k seconds, at most 30, full jitter; forgotten after a worker
  has been healthy for 60 seconds. A serving worker that somebody killed is started again at once, however often, and
  one that its input killed after half a second at most: with what it answered before, the series begins anew.
- Blame: a crash is charged to the models that were executing or loading in the process. A model seen at two
  crashes within a minute gets processes of its own, so that the next crash names the culprit and spares its
  neighbours. A model that crashes alone more than five times within a minute, and answers nothing between, has failed;
  it is tried again every minute, and while on probation its first crash fails it again unless it has answered before.
- A crash of a model that has answered since the last one, be it the warm-up of the process that died, is its input's
  doing, and the dispatcher finds out whose: callers who send what crashes it, however many at once, must not take it
  away from everybody else.
- A death that the process did not bring about itself blames nobody: SIGKILL sent by neither us nor the kernel's
  out-of-memory killer is somebody's decision, not a fault of the model.
"""

from __future__ import annotations

import enum
import random
import signal
from collections import deque
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

FIRST_DELAY_S: Final = 0.5
MAX_DELAY_S: Final = 30.0
HEALTHY_AFTER_S: Final = 60.0
WINDOW_S: Final = 60.0
SUSPECT_CRASHES: Final = 2
"""Crashes within the window after which a suspect is isolated."""
FAIL_CRASHES: Final = 5
"""More crashes alone than this within the window, and no answer between: the model has failed."""
RETRY_AFTER_S: Final = 60.0
"""How long a failed model rests before it is tried again."""
FAULTS: Final = frozenset({signal.SIGSEGV, signal.SIGFPE, signal.SIGILL})
"""Signals by which code ends itself. Not SIGABRT and SIGBUS: those also come of a lack of memory or of threads."""
RECYCLE_AFTER_UNLOADS: Final = 64
"""What onnxruntime does not give back on unload is bounded by replacing the process now and then."""


class Death(enum.Enum):
    """What a process died of."""

    OUTSIDE = "outside"
    """Somebody's decision."""
    INPUT = "input"
    """A crash while a model executed that had answered since its last crash."""
    CRASH = "crash"


class WorkerState(enum.Enum):
    STARTING = "starting"
    READY = "ready"
    RECYCLING = "recycling"
    """Serving, while a fresh process is being prepared to take over."""
    BACKOFF = "backoff"
    STOPPED = "stopped"


class WorkerEvent(enum.Enum):
    UP = "up"
    DIED = "died"
    RETRY = "retry"
    RECYCLE = "recycle"
    STOP = "stop"


TRANSITIONS: Final[dict[tuple[WorkerState, WorkerEvent], WorkerState]] = {
    (WorkerState.STARTING, WorkerEvent.UP): WorkerState.READY,
    (WorkerState.STARTING, WorkerEvent.DIED): WorkerState.BACKOFF,
    (WorkerState.STARTING, WorkerEvent.STOP): WorkerState.STOPPED,
    (WorkerState.READY, WorkerEvent.DIED): WorkerState.BACKOFF,
    (WorkerState.READY, WorkerEvent.RECYCLE): WorkerState.RECYCLING,
    (WorkerState.READY, WorkerEvent.STOP): WorkerState.STOPPED,
    (WorkerState.RECYCLING, WorkerEvent.UP): WorkerState.READY,
    (WorkerState.RECYCLING, WorkerEvent.DIED): WorkerState.BACKOFF,
    (WorkerState.RECYCLING, WorkerEvent.STOP): WorkerState.STOPPED,
    (WorkerState.BACKOFF, WorkerEvent.RETRY): WorkerState.STARTING,
    (WorkerState.BACKOFF, WorkerEvent.STOP): WorkerState.STOPPED,
}


def next_state(state: WorkerState, event: WorkerEvent) -> WorkerState:
    """Raises KeyError on a transition that the table does not list; nothing changes then."""
    return TRANSITIONS[state, event]


class Backoff:
    """When one worker may be started again."""

    def __init__(self) -> None:
        self._deaths = 0
        self._up_since: float | None = None

    def up(self, now: float) -> None:
        """The worker serves since `now`."""
        self._up_since = now

    def died(self, now: float, rng: random.Random, death: Death = Death.CRASH) -> float:
        """Seconds to wait before the next start."""
        if death is Death.OUTSIDE and self._up_since is not None:
            self._up_since = None
            return 0.0
        if self._up_since is not None and now - self._up_since >= HEALTHY_AFTER_S:
            self._deaths = 0
        if death is Death.INPUT and self._up_since is not None:
            self._deaths = min(self._deaths, 1)
        self._up_since = None
        self._deaths += 1
        if self._deaths == 1:
            return 0.0
        return rng.uniform(0.0, min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** min(self._deaths - 2, 16)))


class Sentence(enum.Enum):
    ISOLATE = "isolate"
    """Give the model worker processes of its own."""
    FAIL = "fail"
    """Stop loading the model until it is tried again."""


Model = TypeVar("Model", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Verdict(Generic[Model]):
    model: Model
    sentence: Sentence
    crashes: int
    """Crashes within the window that led to this."""


class Blame(Generic[Model]):
    """Who was there when workers crashed. Bounded: at most FAIL_CRASHES + 1 entries a model."""

    def __init__(self) -> None:
        self._present: dict[Model, deque[float]] = {}
        self._alone: dict[Model, deque[float]] = {}
        self._probation: dict[Model, float] = {}
        self._isolated: set[Model] = set()

    def crash(self, now: float, suspects: Iterable[Model], answered: Collection[Model] = ()) -> list[Verdict[Model]]:
        """A process crashed while these models executed or loaded in it. `answered`: those of them that have answered
        since the crash before."""
        unique = list(dict.fromkeys(suspects))
        verdicts = []
        for model in unique:
            if model in answered:
                self._alone.pop(model, None)
                self._probation.pop(model, None)
            present = _count(self._present, model, now)
            alone = _count(self._alone, model, now) if len(unique) == 1 else 0
            if (len(unique) == 1 and self._probation.get(model, now) > now) or alone > FAIL_CRASHES:
                verdicts.append(self._fail(model, alone))
            elif present >= SUSPECT_CRASHES and model not in self._isolated:
                self._isolated.add(model)
                verdicts.append(Verdict(model, Sentence.ISOLATE, present))
        return verdicts

    def _fail(self, model: Model, crashes: int) -> Verdict[Model]:
        self._present.pop(model, None)
        self._alone.pop(model, None)
        return Verdict(model, Sentence.FAIL, crashes)

    def isolated(self, model: Model) -> None:
        """The model has processes of its own already; it need not be isolated again."""
        self._isolated.add(model)

    def on_probation(self, model: Model, now: float) -> None:
        """A failed model is tried again: its first crash within the window fails it at once."""
        self._probation[model] = now + WINDOW_S

    def forget(self, model: Model) -> None:
        """The model is unloaded."""
        self._present.pop(model, None)
        self._alone.pop(model, None)
        self._probation.pop(model, None)
        self._isolated.discard(model)


def _count(ledger: dict[Model, deque[float]], model: Model, now: float) -> int:
    """Record a crash at `now`; returns how many lie within the window."""
    crashes = ledger.setdefault(model, deque(maxlen=FAIL_CRASHES + 1))
    crashes.append(now)
    while crashes[0] <= now - WINDOW_S:
        crashes.popleft()
    return len(crashes)


def is_crash(exit_code: int, *, killed_by_us: bool, out_of_memory: bool) -> bool:
    """Whether a death is the doing of what ran in the process. `exit_code`: negative for a signal (subprocess)."""
    if killed_by_us or out_of_memory:
        return True
    return exit_code not in {0, -signal.SIGKILL}


def describe_exit(exit_code: int) -> str:
    """For people: "signal SIGSEGV", "exit code 70"."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return f"signal {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"signal {-exit_code}"
