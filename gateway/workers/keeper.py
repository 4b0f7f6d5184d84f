"""Keeps one worker alive: starts its process, loads its instances, and starts over when the process dies.

A keeper is the lasting thing behind a name such as `onnx-1`; processes (channels) come and go. Its life follows
`supervision.TRANSITIONS`. One task per keeper does the waiting; `lock` keeps loading, bringing up and replacing
apart, so that an instance is never loaded twice or forgotten.

Replacing (after many unloads) never fails anything: the fresh process loads and warms every instance first, then all
of them switch over at once, then the old process finishes what it has and goes.

A fault in the keeper itself costs the process it looked after, never the looking after: it is logged and life starts
over, after the same backoff as a crash.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final, Protocol

from gateway.core.outcome import Failure
from gateway.protocol import ipc
from gateway.workers import supervision
from gateway.workers.attempt import LoadRefused, NotSent, WarmUp, WorkerLost
from gateway.workers.channel import Channel
from gateway.workers.deadlines import Sweep
from gateway.workers.hosting import Instance, Model, PoolEvent, WorkerStatistics
from gateway.workers.spawn import out_of_memory_kills
from gateway.workers.supervision import Backoff, Death, WorkerEvent, WorkerState, describe_exit, is_crash, next_state

HELLO_TIMEOUT_S: Final = 60.0
"""From starting a process to its first word. Usually 0.2 s; a machine may be very busy."""
UNLOAD_TIMEOUT_S: Final = 60.0

_log = logging.getLogger("gateway.workers")


class Overseer(Protocol):
    """What a keeper needs of the pool."""

    @property
    def sweep(self) -> Sweep: ...
    @property
    def rng(self) -> random.Random: ...
    @property
    def load_timeout_s(self) -> float: ...
    @property
    def intra_op_threads(self) -> int: ...
    @property
    def slots(self) -> int: ...

    def emit(self, event: PoolEvent) -> None: ...

    def greeted(self, hello: ipc.Hello) -> None:
        """A process is up and said what it runs."""

    def crashed(self, suspects: list[Model], warm: Collection[Model], text: str) -> Death:
        """A process crashed while these models executed or loaded in it; returns whose doing it was. `warm`: models
        that answered their warm-up batches in it."""

    def unloadable(self, instance: Instance, text: str) -> None:
        """An instance that had been loaded before was refused by a fresh process."""

    def came_up(self, keeper: Keeper) -> None:
        """All instances that can be loaded are loaded and warm."""


class Keeper:
    """See the head of this file. `dedicated`: hosts the instances of one model only."""

    def __init__(self, overseer: Overseer, name: str, *, dedicated: bool, niceness: int = 0) -> None:
        """`niceness`: 0 to 19, how far its processes give way to others."""
        self.name = name
        self.dedicated = dedicated
        self.niceness = niceness
        self.state = WorkerState.STARTING
        self.generation = 0
        self.restarts = 0
        self.instances: list[Instance] = []
        """What has to be loaded in every process started here."""
        self.channel: Channel | None = None
        self.up = asyncio.Event()
        """Set while the worker takes batches."""
        self.retired = False
        self.stopped = asyncio.Event()
        """Set for good by `stop`: it will never be up again."""
        self._overseer = overseer
        self._lock = asyncio.Lock()
        self._backoff = Backoff()
        self._unloads = 0
        self._recycle = asyncio.Event()
        self._channels: set[Channel] = set()
        self._farewells: set[asyncio.Task[None]] = set()
        self._first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Keeper {self.name} {self.state.value} instances={len(self.instances)}>"

    # --- Life -----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start the process and keep it running; does not wait for it."""
        self._task = asyncio.get_running_loop().create_task(self._keep())

    async def started(self) -> None:
        """Wait for the first process to be up. Raises WorkerLost: it never was."""
        await asyncio.shield(self._first)

    async def up_or_stopped(self) -> None:
        """Returns once the worker takes batches, or never will again."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self.up, self.stopped)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _keep(self) -> None:
        while True:
            try:
                death = await self._live()
            except Exception:
                _log.exception("the supervision of worker %s failed and starts over", self.name)
                await self._abandon()
                death = Death.CRASH
            self.channel = None
            if self.retired:
                return
            self._to(WorkerEvent.DIED)
            self.restarts += 1
            await asyncio.sleep(self._backoff.died(self._now(), self._overseer.rng, death))
            self._to(WorkerEvent.RETRY)

    async def _live(self) -> Death:
        """One process from start to end (and the ones that replaced it in peace)."""
        try:
            channel = self._spawn()
        except OSError as error:
            self._never_up(f"worker {self.name} could not be started: {error.strerror}")
            return Death.CRASH
        try:
            await self._greet(channel)
            async with self._lock:
                self.channel = channel
                await self._bring_up(channel)
            self._came_up(channel)
            channel = await self._serve(channel)
        except WorkerLost as error:
            self._never_up(str(error))
        return await self._bury(channel)

    async def _abandon(self) -> None:
        """End every process of this worker, whatever state it is in, so that the next life starts from nothing."""
        self.up.clear()
        self._recycle.clear()
        self._never_up(f"worker {self.name} could not be started: internal error")
        for channel in list(self._channels):
            channel.kill("was given up after an internal error", [])
            channel.make_sure()
            await asyncio.shield(channel.ended)
            self._channels.discard(channel)

    def _never_up(self, text: str) -> None:
        if not self._first.done():
            self._first.set_exception(WorkerLost(text))
            self._first.exception()  # nobody need be waiting

    def _spawn(self) -> Channel:
        self.generation += 1
        channel = Channel.start(self._overseer.sweep, self.name, self.generation)
        channel.on_lost = self._lost
        self._channels.add(channel)
        self._emit("worker_started", channel)
        return channel

    def _lost(self, channel: Channel) -> None:
        if channel is self.channel:
            self.up.clear()

    async def _greet(self, channel: Channel) -> None:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                self._overseer.greeted(await asyncio.shield(channel.hello))
        except TimeoutError:
            channel.kill(f"did not start within {HELLO_TIMEOUT_S:g} s", [])
            raise WorkerLost(f"worker {self.name} {channel.cause}") from None
        if self.niceness:  # not earlier: on a busy machine it would not come this far in time
            self._give_way(channel.pid)

    def _give_way(self, pid: int) -> None:
        with contextlib.suppress(OSError):  # it died; whoever waits for it hears of that
            for thread in Path(f"/proc/{pid}/task").iterdir():  # those to come, onnxruntime's, inherit it
                os.setpriority(os.PRIO_PROCESS, int(thread.name), self.niceness)

    async def _bring_up(self, channel: Channel) -> None:
        for instance in list(self.instances):
            if instance not in self.instances:
                continue  # unloaded or moved while others were loading
            try:
                await self._place(channel, instance)
            except LoadRefused as error:
                self._overseer.unloadable(instance, str(error))
            else:
                instance.attach(channel)

    def _came_up(self, channel: Channel) -> None:
        self._to(WorkerEvent.UP)
        self._backoff.up(self._now())
        self._set_up(channel)
        if not self._first.done():
            self._first.set_result(None)
        self._emit("worker_ready", channel)
        self._overseer.came_up(self)

    def _set_up(self, channel: Channel) -> None:
        if not channel.lost:
            self.up.set()

    async def _serve(self, channel: Channel) -> Channel:
        """Returns the current channel, once it has ended."""
        while True:
            recycle = asyncio.ensure_future(self._recycle.wait())
            try:
                ends: list[asyncio.Future[Any]] = [channel.ended, recycle]
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            finally:
                recycle.cancel()
            if channel.ended.done():
                return channel
            self._recycle.clear()
            channel = await self._replace(channel)

    async def _bury(self, channel: Channel) -> Death:
        """Wait until the process is gone and say what it died of."""
        exit_code = await asyncio.shield(channel.ended)
        self._channels.discard(channel)
        if channel.closing:
            return Death.OUTSIDE
        text = describe_exit(exit_code)
        text = channel.cause if channel.killed else text  # how it ended then is our own doing
        self._emit("worker_died", channel, text)
        out_of_memory = out_of_memory_kills() > channel.out_of_memory_kills
        if not is_crash(exit_code, killed_by_us=channel.killed, out_of_memory=out_of_memory):
            return Death.OUTSIDE
        return self._overseer.crashed(channel.suspects, channel.warm, f"worker {self.name} died: {text}")

    async def stop(self, timeout_s: float) -> None:
        """End the processes: in peace, after `timeout_s` by force. Attempts in flight are broken."""
        self.retired = True
        self.stopped.set()
        self.up.clear()
        self._never_up(f"worker {self.name} was stopped")
        tasks = [task for task in (self._task, *self._farewells) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        channels = list(self._channels)
        for channel in channels:
            channel.close()
        endings: list[asyncio.Future[int]] = [channel.ended for channel in channels]
        if endings:
            await asyncio.wait(endings, timeout=timeout_s)
            for channel in channels:
                channel.make_sure()
            await asyncio.wait(endings)
        self._channels.clear()
        self.channel = None
        if self.state is not WorkerState.STOPPED:
            self._to(WorkerEvent.STOP)

    def _to(self, event: WorkerEvent) -> None:
        self.state = next_state(self.state, event)

    def _now(self) -> float:
        return self._overseer.sweep.loop.time()

    def _emit(self, kind: Any, channel: Channel, text: str = "") -> None:
        self._overseer.emit(
            PoolEvent(kind, worker=self.name, pid=channel.pid, generation=channel.generation, text=text)
        )

    # --- Replacing ------------------------------------------------------------------------------------------------

    async def _replace(self, old: Channel) -> Channel:
        """Put a fresh process in the place of `old`; returns the one that serves now."""
        self._to(WorkerEvent.RECYCLE)
        fresh: Channel | None = None
        try:
            fresh = self._spawn()
            await self._greet(fresh)
            async with self._lock:
                moving = list(self.instances)
                for instance in moving:
                    await self._place(fresh, instance)
                if fresh.lost:
                    raise WorkerLost(f"worker {self.name} {fresh.cause}")
                for instance in moving:
                    if instance in self.instances:
                        instance.attach(fresh)
                self.channel = fresh
        except Exception as error:
            if not isinstance(error, (OSError, WorkerLost, LoadRefused)):
                _log.exception("worker %s could not be replaced", self.name)
            # The old process still serves: nothing is lost but the attempt, and the next unloads start another.
            if fresh is not None:
                self._say_farewell(fresh)
            serving = old
        else:
            self._say_farewell(old)
            serving = fresh
        self._unloads = 0
        self._recycle.clear()
        self._to(WorkerEvent.UP)
        self._set_up(serving)
        return serving

    def _say_farewell(self, channel: Channel) -> None:
        async def farewell() -> None:
            await channel.drained()
            channel.close()
            await self._bury(channel)

        task = asyncio.get_running_loop().create_task(farewell())
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)

    # --- Instances ------------------------------------------------------------------------------------------------

    async def load(self, instance: Instance) -> ipc.Signature:
        """Load a new instance here, now and in every later process.

        Raises:
            WorkerLost: the process died before the instance was loaded; it is not registered.
            LoadRefused: the model cannot be loaded.
        """
        async with self._lock:
            channel = self.channel
            if channel is None:
                raise WorkerLost(f"worker {self.name} is not running")
            signature = await self._place(channel, instance)
            self.instances.append(instance)
            instance.attach(channel)
        return signature

    async def _place(self, channel: Channel, instance: Instance) -> ipc.Signature:
        """Load and warm up, without sending batches there yet. Raises WorkerLost, LoadRefused."""
        model = instance.model
        threads = model.options.intra_op_threads or self._overseer.intra_op_threads
        payload = ipc.encode_load(ipc.Load(instance.number, threads, self._overseer.slots))
        timeout_s = self._overseer.load_timeout_s
        answer = await channel.ask(ipc.LOAD, payload, model.fds, model, timeout_s=timeout_s)
        try:
            signature = ipc.decode_signature(memoryview(answer))
        except ipc.FrameError as error:
            channel.kill(f"sent an answer that cannot be used ({error})", [model])
            raise WorkerLost(f"worker {self.name} {channel.cause}") from None
        failure = await self._warm_up(channel, instance)
        if channel.lost:
            raise WorkerLost(f"worker {self.name} {channel.cause}")
        if failure:
            await self.free(channel, instance)
            raise LoadRefused(f"warm-up failed: {failure}")
        return signature

    async def _warm_up(self, channel: Channel, instance: Instance) -> str:
        """Returns why it failed; empty: it did not."""
        for batch in instance.model.warm_up:
            attempt = WarmUp(instance)
            try:
                channel.run(attempt, instance.number, batch, (0,), self._overseer.load_timeout_s)
            except NotSent as error:
                return str(error)
            outcome = await attempt.outcome
            if isinstance(outcome, Failure):
                return outcome.in_full
            channel.warm.add(instance.model)
        return ""

    async def unload(self, instance: Instance) -> None:
        """Forget the instance here; returns when its batches are done and its memory is freed.

        An instance that still runs on the worker it is moving from is freed there by the move, not here.
        """
        async with self._lock:
            self.forget(instance)
            channel = instance.detach()
        if channel is not None:
            instance.changed()
            if channel in self._channels:
                await self.free(channel, instance)

    def forget(self, instance: Instance) -> None:
        """Do not load the instance in later processes."""
        with contextlib.suppress(ValueError):
            self.instances.remove(instance)

    async def free(self, channel: Channel, instance: Instance) -> None:
        """Free an instance that takes no more batches in the process behind `channel`."""
        with contextlib.suppress(WorkerLost, LoadRefused):
            await channel.drained(instance.number)
            payload = ipc.encode_number(instance.number)
            await channel.ask(ipc.UNLOAD, payload, timeout_s=UNLOAD_TIMEOUT_S)
        if not any(other.model is instance.model for other in channel.instances.values()):
            channel.warm.discard(instance.model)
        self._unloads += 1
        if self._unloads >= supervision.RECYCLE_AFTER_UNLOADS and not self.dedicated:
            self._recycle.set()

    def statistics(self) -> WorkerStatistics:
        channel = self.channel
        return WorkerStatistics(
            name=self.name,
            pid=channel.pid if channel is not None else 0,
            state=self.state.value,
            generation=self.generation,
            restarts=self.restarts,
            models=tuple(instance.model.label for instance in self.instances),
            in_flight=len(channel.in_flight) if channel is not None else 0,
            rss_bytes=_rss_bytes(channel.pid) if channel is not None else 0,
        )


def _rss_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, IndexError, ValueError):
        return 0
