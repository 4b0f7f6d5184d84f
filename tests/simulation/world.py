"""The world of a history: replicas that fail as scripted, callers that come and go, and a note of all that happened.

Every row carries a nonce, and the model's answer is a function of it. What a replica may do is what the interface
(gateway/backends/interface.py) allows: it never raises, never calls back from inside `execute`, and ends every batch
exactly once. Workers execute one batch after the other and know whose batch broke them; remote servers execute at the
same time and just hang up.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from random import Random
from typing import Final, Protocol

from gateway.backends.interface import Batch, Failure, FailureKind, Sign, Success
from gateway.core.model import BatchPolicy, ModelSpec, TensorSpec
from gateway.core.request import InferRequest, InputTensor, OutputTensor, SequenceStep
from gateway.core.resilience import Resilience
from gateway.core.scheduling import Scheduling
from gateway.core.tensor import DATATYPE
from gateway.core.traits import Traits
from tests.simulation.histories import Arrival, ReplicaPlan
from tests.simulation.loop import Call, SimulatedLoop

INT64: Final = DATATYPE["INT64"]
NONCES: Final = 16
"""Rows of one request at most; a nonce is the request's number times this, plus the row."""
PROBE: Final = -1
"""Nonce of a probe: nobody's."""
ERROR_S: Final = 0.0005
"""A replica that says no says so at once."""
INPUTS: Final = (TensorSpec("number", INT64, (1,)),)
OUTPUTS: Final = (TensorSpec("triple", INT64, (1,)),)

BROKEN, SUSPECT, NOT_SENT = FailureKind.BROKEN, FailureKind.SUSPECT, FailureKind.NOT_SENT


def answer_to(nonce: int) -> int:
    return nonce * 3 + 1


class Item:
    """One request, from its caller's point of view."""

    __slots__ = (
        "arrival", "attempts", "deadline", "error", "left", "nonces", "number", "place", "poison", "refused", "repeats",
        "request", "running", "settled", "settled_at", "world",
    )  # fmt: skip

    def __init__(self, world: World, number: int, arrival: Arrival, place: int, repeats: Item | None) -> None:
        self.world = world
        self.number = number
        self.arrival = arrival
        self.place = place
        """Of the arrival in its history."""
        self.repeats = repeats
        """Whose bytes it sends once more."""
        self.nonces: list[int] = [number * NONCES + row for row in range(arrival.rows)]
        self.poison = arrival.poison
        if repeats is not None:
            self.nonces, self.poison = repeats.nonces, repeats.poison
        self.attempts: list[Run] = []
        self.running = 0
        """Runs under way that contain it."""
        self.left = False
        self.refused: Exception | None = None
        self.settled = 0
        self.settled_at = 0.0
        self.error: Exception | None = None
        self.deadline = 0.0
        rows = len(self.nonces)
        tensor = InputTensor(INT64, (rows, 1), self.nonces, None)
        self.request = request = InferRequest(
            (tensor,), rows, 8 * rows, arrival.key, (0,), None, None, arrival.timeout_s
        )
        request.priority = arrival.priority
        if arrival.sequence:
            request.sequence = SequenceStep(arrival.sequence)
            request.key = (arrival.key, arrival.sequence)
        request.settle = self._settle

    def _settle(self, request: InferRequest, /) -> None:
        self.settled += 1
        self.settled_at = self.world.loop.now
        self.error = request.error
        try:
            self.world.watch.settled(self)
            self.world.told(self)
        except Exception as error:  # the scheduler would keep it to itself
            self.world.watch.violated("mishap", f"{self}: {error!r}")

    def answer(self) -> list[int]:
        """What it was told, row by row; whatever is wrong with it shows as other numbers."""
        request = self.request
        batch = request.batch
        output: OutputTensor = batch.outputs[0]
        if output.shape != (batch.rows, 1) or request.row + request.rows > batch.rows:
            return []
        return [*struct.unpack_from(f"<{request.rows}q", output.data, 8 * request.row)]

    def __repr__(self) -> str:
        return f"#{self.number}"


class Run:
    """One batch on one replica."""

    __slots__ = (
        "abandoned_at", "batch", "begins", "begun", "cancelled", "ended", "hung", "items", "kind", "lane", "nonces",
        "number", "replica", "sign", "timer",
    )  # fmt: skip

    def __init__(self, number: int, replica: ScriptedReplica, batch: Batch, begun: float) -> None:
        self.number = number
        self.replica = replica
        self.batch = batch
        self.begun = begun
        self.begins = begun
        """When the replica starts to execute it; later than `begun` where it stands in line."""
        self.lane = getattr(getattr(batch, "lane", None), "value", "")
        """Where its members waited; empty: in the queue."""
        self.nonces: list[int] = []
        for part in batch.inputs[0].parts:
            self.nonces += part.values or ()
        self.items: list[Item] = []
        self.ended = -1.0
        self.kind: FailureKind | None = None
        self.sign = Sign.NONE
        self.cancelled = False
        self.abandoned_at = -1.0
        """When its last member was settled while it ran."""
        self.timer: Call | None = None
        self.hung = False
        """Whether it waits for its replica to go on, rather than being why the replica hangs."""

    @property
    def executed(self) -> bool:
        """Whether the rows may have reached the model. OVERLOAD counts: a gateway in between may have said it."""
        if self.kind is NOT_SENT:
            return False
        return not (self.ended >= 0 and self.ended <= self.begins and self.sign is Sign.BYSTANDER)

    def __repr__(self) -> str:
        return f"run {self.number} of {self.items} on {self.replica.name}"


class Watch(Protocol):
    """Who is told what happens, in the moment it happens."""

    def handed_over(self, run: Run, /) -> None: ...
    def ended(self, run: Run, /) -> None: ...
    def cancelled(self, run: Run, /) -> None: ...
    def settled(self, item: Item, /) -> None: ...
    def violated(self, invariant: str, text: str, /) -> None: ...


class ScriptedReplica:
    """Fits `backends.interface.Replica`."""

    def __init__(self, world: World, plan: ReplicaPlan, place: int) -> None:
        self.world = world
        self.plan = plan
        self.place = place
        self.name = plan.name
        remote = plan.kind == "oip"
        self.remote = remote
        self.traits = Traits(
            plan.kind, plan.weight, plan.zone, f"host-{place}", plan.name if remote else "", plan.slots if remote else 1
        )
        self.mode = "ok"
        self.faulty = False
        """Whether anything but "ok" was ever scripted for it."""
        self.up = True
        self.removed = False
        self.absent = False
        """Not there yet."""
        self.drained = False
        self.forced = False
        """Whether an operator's order stands."""
        self.running: list[Run] = []
        self.busy_until = 0.0
        self.restarts: Call | None = None
        self._changed: Callable[[], None] = lambda: None

    # -- Replica -------------------------------------------------------------------------------------------------

    @property
    def available(self) -> bool:
        return self.up

    @property
    def free_slots(self) -> int:
        return self.plan.slots - len(self.running) if self.up else 0

    @property
    def in_flight(self) -> int:
        return len(self.running)

    def set_listener(self, changed: Callable[[], None], /) -> None:
        self._changed = changed

    def execute(self, batch: Batch, timeout_s: float, /) -> None:
        world = self.world
        run = world.run_of(self, batch)
        world.watch.handed_over(run)
        self.running.append(run)
        fate, takes_s = self._fate(run)
        now = world.loop.now
        if not self.remote:
            run.begins = max(now, self.busy_until)
            takes_s += run.begins - now
            self.busy_until = now + takes_s
        run.hung = fate == "stuck"
        if takes_s >= timeout_s:
            fate, takes_s = "timeout", timeout_s
        if world.trace is not None:
            world.note(f"{run!r}: {len(run.nonces)} rows, {run.lane or 'queue'}, will {fate} in {takes_s:.6f} s")
        run.timer = world.loop.call_later(takes_s, self._over, run, fate)

    def cancel(self, batch: Batch, /) -> None:
        for run in self.running:
            if run.batch is batch:
                run.cancelled = True
                self.world.watch.cancelled(run)
                if self.remote and not self.plan.stubborn and run.timer is not None:
                    run.timer.cancel()
                    run.timer = self.world.loop.call_later(0.0, self._over, run, "cancelled")
                return

    # -- what happens --------------------------------------------------------------------------------------------

    def _fate(self, run: Run) -> tuple[str, float]:
        """How the run will end if nothing comes between, and after how many seconds."""
        plan, mode, chance = self.plan, self.mode, self.world.rng.random
        takes_s = (plan.base_s + plan.row_s * len(run.nonces)) * (0.9 + 0.2 * chance())
        poison = {item.poison for item in run.items}
        if mode == "flaky":
            mode = "error" if chance() < 0.5 else "ok"
        if not self.up:
            fate, takes_s = "refuse", ERROR_S  # which is a violation, and was noted
        elif mode in {"refuse", "missing", "overload"}:
            fate, takes_s = mode, ERROR_S
        elif "crash" in poison:
            fate = "crash"
        elif "hang" in poison:
            fate, takes_s = "timeout", math.inf
        elif mode == "hang":
            fate, takes_s = "stuck", math.inf
        elif mode in {"ok", "slow"}:
            fate = ("reject" if self.world.polite else "error") if "error" in poison else "ok"
            takes_s *= 10 if mode == "slow" else 1
        else:
            fate, takes_s = mode, takes_s if mode in {"mismatch", "reset"} else ERROR_S
        return fate, takes_s

    def _over(self, run: Run, fate: str) -> None:
        if fate == "crash":
            self.crash(run)
        elif fate == "timeout" and not self.remote:
            self._end(run, Failure(FailureKind.TIMEOUT, "the worker did not answer in time"))
            self.crash(None)  # a worker that hangs is killed, whoever waits in line there
        else:
            self._end(run, self._outcome(run, fate))
            if fate == "refuse" and self.plan.shy and self.up:
                self.set_up(False)
                if self.mode == "ok":  # it tries to connect again, and can
                    self.restarts = self.world.loop.call_later(self.plan.restart_s, self._restarted)

    def _outcome(self, run: Run, fate: str) -> Success | Failure:
        if fate == "ok":
            return self._answer(run, len(run.nonces))
        if fate == "mismatch":  # what the gateway has to find out by itself
            run.kind, run.sign = BROKEN, Sign.MISMATCH
            return self._answer(run, len(run.nonces) - 1)
        if fate == "error" and not self.remote:
            return Failure(SUSPECT, "the model failed on this input", Sign.ANSWERED)
        kind, message, sign = FATES[fate]
        retry_after_s = 2.0 * self.world.rng.random() if kind is FailureKind.OVERLOAD else 0.0
        return Failure(kind, message, sign, retry_after_s)

    def _answer(self, run: Run, rows: int) -> Success:
        answers = [nonce * 3 + 1 for nonce in run.nonces[:rows]]
        data = struct.pack(f"<{rows}q", *answers)
        compute_ns = int((self.plan.base_s + self.plan.row_s * rows) * 1e9) if self.place % 2 else 0
        return Success([OutputTensor("triple", INT64, (rows, 1), data)], 0, compute_ns, 0)

    def _end(self, run: Run, outcome: Success | Failure) -> None:
        if run.timer is not None:
            run.timer.cancel()
            run.timer = None
        self.running.remove(run)
        run.ended = self.world.loop.now
        if isinstance(outcome, Failure):
            run.kind, run.sign = outcome.kind, outcome.sign
        self.world.watch.ended(run)
        run.batch.done(outcome)

    def crash(self, culprit: Run | None) -> None:
        """The process ends. `culprit`: whose batch it executed; None: whoever's it was, by a kill from outside."""
        now = self.world.loop.now
        lost = [*self.running]
        sign = Sign.CRASH
        if not self.remote and culprit is None and lost and lost[0].begins <= now:
            culprit, sign = lost[0], Sign.EXIT
        up, self.up = self.up, False
        self.noticed()
        told_first = self.world.rng.random() < 0.5
        if up and told_first:
            self._changed()
        for run in lost:
            if self.remote:
                failure = Failure(BROKEN, "connection reset")
            elif run is culprit:
                failure = Failure(BROKEN, "the worker died", sign)
            else:
                failure = Failure(BROKEN, "the worker died of another batch", Sign.BYSTANDER)
            self._end(run, failure)
        self.busy_until = 0.0
        if up and not told_first:
            self._changed()
        if self.restarts is not None:
            self.restarts.cancel()
        self.restarts = self.world.loop.call_later(self.plan.restart_s, self._restarted)

    def _restarted(self) -> None:
        self.restarts = None
        if self.mode not in {"down", "refuse"} or (self.mode == "refuse" and not self.plan.shy):
            self.set_up(True)

    def set_up(self, up: bool) -> None:
        if self.up is not up:
            self.up = up
            self.noticed()
            if self.world.trace is not None:
                self.world.note(f"{self.name} is {'available' if up else 'unavailable'}")
            self._changed()

    def noticed(self) -> None:
        """Whether anybody is left may have changed."""
        world = self.world
        nobody = all(not replica.up or replica.removed or replica.absent for replica in world.replicas)
        if not nobody:
            world.nobody_since = math.inf
        elif math.isinf(world.nobody_since):
            world.nobody_since = world.loop.now

    def set_mode(self, mode: str) -> None:
        """A fault begins or ends; those under way keep the fate they have, but for what ends a process."""
        self.faulty = self.faulty or mode != "ok"
        self.world.note(f"{self.name} turns {mode}")
        if mode == "crash":
            self.crash(None)
            return
        self.mode = mode
        if mode == "down":
            self.crash(None)
        elif mode == "ok":
            if math.isinf(self.busy_until):
                self.busy_until = self.world.loop.now + self.plan.base_s
            for run in [*self.running]:
                if run.hung and run.timer is not None and not run.cancelled:
                    run.timer.cancel()
                    run.timer = self.world.loop.call_later(self.plan.base_s, self._over, run, "ok")
            if not self.up and self.restarts is None:
                self.restarts = self.world.loop.call_later(self.plan.restart_s, self._restarted)


FATES: Final[dict[str, tuple[FailureKind, str, Sign]]] = {
    "refuse": (NOT_SENT, "connection refused", Sign.CONNECT),
    "missing": (NOT_SENT, "no such model", Sign.MISSING),
    "overload": (FailureKind.OVERLOAD, "too busy", Sign.ANSWERED),
    "reset": (BROKEN, "connection reset", Sign.NONE),
    "error": (BROKEN, "internal error", Sign.ANSWERED),
    "reject": (SUSPECT, "bad input", Sign.ANSWERED),
    "timeout": (FailureKind.TIMEOUT, "no answer in time", Sign.NONE),
    "cancelled": (FailureKind.CANCELLED, "cancelled", Sign.NONE),
}


class World:
    """Everything outside the scheduler."""

    def __init__(self, loop: SimulatedLoop, rng: Random, trace: list[str] | None) -> None:
        self.loop = loop
        self.rng = rng
        self.trace = trace
        self.watch: Watch
        self.items: list[Item] = []
        self.senders: list[Item] = []
        """Who sent, by a nonce's number; of bytes that were sent twice, the last."""
        self.told: Callable[[Item], None] = lambda _: None
        self.runs: list[Run] = []
        self.replicas: list[ScriptedReplica] = []
        self.nobody_since = math.inf
        """When the last replica that could be reached went; infinite: there is one."""
        self.polite = rng.random() < 0.5
        """Whether a server that refuses input says 4xx rather than 500."""

    def note(self, text: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.loop.now - 1000.0:10.6f}  {text}")

    def item(self, arrival: Arrival, place: int = -1, repeats: Item | None = None) -> Item:
        number = len(self.items)
        made = Item(self, number, arrival, place, repeats)
        self.items.append(made)
        self.senders.append(made)
        if repeats is not None:
            self.senders[made.nonces[0] // NONCES] = made
        return made

    def sender(self, item: Item) -> Item:
        """Who sent the bytes of `item` last."""
        return self.senders[item.nonces[0] // NONCES]

    def run_of(self, replica: ScriptedReplica, batch: Batch) -> Run:
        run = Run(len(self.runs), replica, batch, self.loop.now)
        self.runs.append(run)
        items, last = self.senders, -1
        for nonce in run.nonces:
            number = nonce // NONCES
            if number != last and nonce != PROBE:
                run.items.append(items[number])
                last = number
        return run


def spec_of(policy: BatchPolicy, resilience: Resilience, scheduling: Scheduling) -> ModelSpec:
    return ModelSpec(
        "m", "1", "sha256:" + "0" * 64, "onnxruntime_onnx", INPUTS, OUTPUTS, policy,
        scheduling=scheduling, resilience=resilience,
    )  # fmt: skip
