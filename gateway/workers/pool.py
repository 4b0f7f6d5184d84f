"""The worker pool: which processes exist, which model instances sit where, and what follows from crashes.

Shared workers (`onnx-1`, `onnx-2`, …) host instances of many models; a model's instances go to different workers,
the least loaded first, so that one death never takes a model away. Dedicated workers (`onnx-<model>-1`, …) host one
instance of one model: by wish, or because the model is suspected of crashing its neighbours.

Rules:
- Loading is all or nothing: on failure nothing of the model stays anywhere.
- The model's bytes are kept in sealed memory; a restart loads the bytes that were verified, not what a disk says by
  then.
- Decisions about crashes are `supervision.Blame`'s; this file carries them out.
- asyncio only; everything on one loop's thread. Works with uvloop and plain asyncio.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections.abc import Callable, Collection, Coroutine
from typing import Any, Final, Generic

from gateway.core.model import Artifact
from gateway.errors import ModelError, NotReady
from gateway.protocol import ipc
from gateway.workers import supervision
from gateway.workers.attempt import LoadRefused, WorkerLost
from gateway.workers.channel import Channel
from gateway.workers.deadlines import Sweep
from gateway.workers.hosting import (
    Instance,
    LoadedModel,
    LoadOptions,
    Model,
    PoolEvent,
    PoolStatistics,
    R,
)
from gateway.workers.keeper import Keeper
from gateway.workers.shm import sealed_file
from gateway.workers.supervision import Blame, Death, Sentence

__all__ = ["LoadOptions", "LoadedModel", "PoolEvent", "PoolStatistics", "WorkerPool"]

LOAD_TRIES: Final = 2
"""A worker may die during a load through no fault of the model; twice is no coincidence."""
WORKER_WAIT_S: Final = 60.0
"""How long a load waits for any worker to be up."""


class WorkerPool(Generic[R]):
    """Worker processes and the models in them. `R` is what `replica` makes of an instance.

    Args:
        replica: builds the adapter through which batches reach an instance.
        workers: number of shared worker processes, at least 1.
        intra_op_threads: threads onnxruntime uses inside one instance; None: the cores divided by the workers.
        slots: batches that may be in flight per instance.
        on_event: called for everything an operator may want to know; must not raise.
        load_timeout_s: a worker that takes longer over one model is killed.
    """

    def __init__(
        self,
        replica: Callable[[Instance], R],
        *,
        workers: int,
        intra_op_threads: int | None = None,
        slots: int = 1,
        on_event: Callable[[PoolEvent], None] | None = None,
        load_timeout_s: float = 300.0,
    ) -> None:
        cores = len(os.sched_getaffinity(0))
        self.intra_op_threads = intra_op_threads or max(1, cores // workers)
        self.slots = slots
        self.load_timeout_s = load_timeout_s
        self.rng = random.Random()  # noqa: S311  # jitter, not secrets
        self.sweep: Sweep
        self.onnxruntime = ""
        """Version the workers run; known once started."""
        self._replica = replica
        self._workers = workers
        self._on_event = on_event
        self._keepers: list[Keeper] = []
        self._models: list[LoadedModel[R]] = []
        self._blame: Blame[Model] = Blame()
        self._retries: dict[Model, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._unfinished: set[asyncio.Task[None]] = set()
        """Loads and unloads under way."""
        self._homes: dict[Instance, Keeper] = {}
        self._moves: dict[Instance, asyncio.Task[None]] = {}
        """Instances on their way to another worker, until they are freed on the former one."""
        self._numbers = itertools.count(1)
        self._closed = True

    def __repr__(self) -> str:
        return f"<WorkerPool workers={len(self._keepers)} models={len(self._models)}>"

    # --- Start and end --------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the shared workers and wait until all are up. Raises NotReady: one of them could not start."""
        self.sweep = Sweep(asyncio.get_running_loop())
        self._closed = False
        keepers = [self._new_keeper(f"onnx-{n}", dedicated=False) for n in range(1, self._workers + 1)]
        for keeper in keepers:
            keeper.begin()
        try:
            for keeper in keepers:
                await keeper.started()
        except WorkerLost as error:
            await self.close()
            raise NotReady(f"{error}: see its output above") from None

    async def close(self, timeout_s: float = 5.0) -> None:
        """End all workers and reap them; after `timeout_s` by force. Batches in flight are broken."""
        self._closed = True
        for handle in self._retries.values():
            handle.cancel()
        self._retries.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*[keeper.stop(timeout_s) for keeper in self._keepers])
        await asyncio.gather(*self._unfinished, return_exceptions=True)
        self._keepers.clear()
        self._moves.clear()
        for model in self._models:
            _close(model)
        self._models.clear()
        if hasattr(self, "sweep"):
            self.sweep.stop()

    def _new_keeper(self, name: str, *, dedicated: bool, niceness: int = 0) -> Keeper:
        keeper = Keeper(self, name, dedicated=dedicated, niceness=niceness)
        self._keepers.append(keeper)
        return keeper

    def _dedicated_keeper(self, model: Model) -> Keeper:
        taken = {keeper.name for keeper in self._keepers}
        names = (f"onnx-{model.name}-{n}" for n in itertools.count(1))
        free = next(name for name in names if name not in taken)
        return self._new_keeper(free, dedicated=True, niceness=model.options.niceness)

    async def _retire(self, keeper: Keeper) -> None:
        keeper.retired = True
        await keeper.stop(5.0)
        if keeper in self._keepers:
            self._keepers.remove(keeper)

    def _background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _uncancelled(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Work on workers that goes on to its end, which comes at the latest with theirs."""
        task = asyncio.get_running_loop().create_task(work)
        self._unfinished.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._unfinished.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited for it was told

    # --- Loading --------------------------------------------------------------------------------------------------

    async def load(self, artifact: Artifact, options: LoadOptions) -> LoadedModel[R]:
        """Load every instance of a model. The artifact's bytes are copied and need not be kept.

        A worker that loads cannot be stopped without harm to others: who is cancelled does not wait for it, but what is
        under way is finished, and then freed.

        Raises:
            ModelError: onnxruntime refuses the model, or it kills its worker.
            NotReady: no worker is up, or the pool is closed.
        """
        if self._closed:
            raise NotReady("the worker pool is closed")
        try:
            fd = sealed_file("gateway-model", artifact.model)
        except OSError as error:
            raise ModelError(f"no memory for the model's {len(artifact.model)} bytes: {error.strerror}") from None
        model: LoadedModel[R] = LoadedModel(
            artifact.name, artifact.version, fd, options, self.unload, artifact.external
        )
        self._models.append(model)
        if model.dedicated:
            self._blame.isolated(model)
        adding = self._uncancelled(self._add_instances(model))
        try:
            await asyncio.wait({adding})
            adding.result()
        except asyncio.CancelledError:
            model.unwanted = True
            self._uncancelled(self._take_back(model, adding))
            raise
        finally:
            del adding  # else its error and this frame keep each other, and the model's bytes
        return model

    async def _add_instances(self, model: LoadedModel[R]) -> None:
        try:
            while len(model.instances) < model.options.instances and not model.unwanted:
                await self._add_instance(model)
        except BaseException:
            await self.unload(model)
            raise

    async def _take_back(self, model: LoadedModel[R], adding: asyncio.Task[None]) -> None:
        await asyncio.wait({adding})
        await self.unload(model)

    async def _add_instance(self, model: LoadedModel[R]) -> None:
        why = ""
        for _ in range(LOAD_TRIES):
            keeper = await self._choose(model)
            instance = Instance(model, next(self._numbers), keeper)
            try:
                model.signature = await keeper.load(instance)
            except LoadRefused as error:
                await self._give_up(keeper)
                raise ModelError(f"model '{model.name}' version {model.version}: {error}") from None
            except WorkerLost as error:
                why = str(error)
                await self._give_up(keeper)
                continue
            self._homes[instance] = keeper
            model.instances.append(instance)
            model.replicas.append(self._replica(instance))
            return
        raise ModelError(f"model '{model.name}' version {model.version} breaks its worker process on loading: {why}")

    async def _give_up(self, keeper: Keeper) -> None:
        """A load failed: a worker made for it alone has no purpose left."""
        if keeper.dedicated:
            await self._retire(keeper)

    async def _choose(self, model: Model) -> Keeper:
        """The worker for one more instance of a model. Raises NotReady."""
        if model.dedicated:
            keeper = self._dedicated_keeper(model)
            keeper.begin()
            try:
                await keeper.started()
            except WorkerLost as error:
                await self._retire(keeper)
                raise NotReady(str(error)) from None
            return keeper
        shared = [keeper for keeper in self._keepers if not keeper.dedicated]
        up = [keeper for keeper in shared if keeper.up.is_set()]
        if not up:
            up = await _first_up(shared)

        def load(keeper: Keeper) -> tuple[int, int]:
            mine = sum(instance.model is model for instance in keeper.instances)
            return mine, len(keeper.instances)

        return min(up, key=load)

    async def unload(self, model: LoadedModel[Any]) -> None:
        """Wait for the model's batches in flight, then free it everywhere. Harmless when repeated, and done to its end
        also if nobody waits for that any more."""
        if model.closed:
            return
        model.closed = True
        await asyncio.shield(self._uncancelled(self._free(model)))

    async def _free(self, model: LoadedModel[Any]) -> None:
        self._blame.forget(model)
        retry = self._retries.pop(model, None)
        if retry is not None:
            retry.cancel()
        homes = {instance: self._homes.pop(instance) for instance in model.instances}
        await asyncio.gather(*[keeper.unload(instance) for instance, keeper in homes.items()])
        await asyncio.gather(*[self._retire(keeper) for keeper in set(homes.values()) if keeper.dedicated])
        moves = [self._moves[instance] for instance in homes if instance in self._moves]
        await asyncio.gather(*moves, return_exceptions=True)
        _close(model)
        if model in self._models:
            self._models.remove(model)

    # --- Crashes (keeper.Overseer) --------------------------------------------------------------------------------

    def emit(self, event: PoolEvent) -> None:
        if self._on_event is not None:
            self._on_event(event)

    def greeted(self, hello: ipc.Hello) -> None:
        self.onnxruntime = hello.onnxruntime

    def crashed(self, suspects: list[Model], warm: Collection[Model], text: str) -> Death:
        now = self.sweep.loop.time()
        answered = [model for model in suspects if model.answered or model in warm]
        for model in answered:
            model.answered = False
        for verdict in self._blame.crash(now, [model for model in suspects if not model.closed], answered):
            if verdict.sentence is Sentence.ISOLATE:
                self._isolate(verdict.model)
            else:
                self._fail(verdict.model, f"its worker process crashed {verdict.crashes} times in a minute: {text}")
        return Death.INPUT if answered else Death.CRASH

    def unloadable(self, instance: Instance, text: str) -> None:
        if not instance.model.closed:
            self._fail(instance.model, f"it could not be loaded again: {text}")

    def came_up(self, keeper: Keeper) -> None:
        for instance in keeper.instances:
            model = instance.model
            if model.failed and instance.channel is not None:
                model.reason = ""
                self.emit(
                    PoolEvent(
                        "model_recovered", worker=keeper.name, model=model.name, version=model.version, subject=model
                    )
                )

    def _isolate(self, model: Model) -> None:
        """Move every instance to a worker of its own. Where one still serves elsewhere it does so until then."""
        model.dedicated = True
        for instance in model.instances:
            former = self._homes[instance]
            if not former.dedicated:
                old = instance.channel
                self._moves[instance] = self._background(self._moved(instance, former, old, self._rehouse(instance)))

    def _rehouse(self, instance: Instance) -> Keeper:
        """A dedicated worker that will load this instance, instead of the one it was on."""
        self._homes[instance].forget(instance)
        keeper = self._dedicated_keeper(instance.model)
        self._homes[instance] = instance.home = keeper
        keeper.instances.append(instance)
        keeper.begin()
        return keeper

    async def _moved(self, instance: Instance, former: Keeper, old: Channel | None, keeper: Keeper) -> None:
        """Free the instance's former place, once it has a new one or is not to have any."""
        try:
            await keeper.up_or_stopped()
            if old is not None and not old.lost and instance.channel is not old:
                await former.free(old, instance)
        finally:
            self._moves.pop(instance, None)

    def _fail(self, model: Model, reason: str) -> None:
        """Take a model out of service everywhere, and try it again later."""
        was_failed = model.failed
        model.reason = reason
        for instance in model.instances:
            keeper = self._homes[instance]
            keeper.forget(instance)
            channel = instance.detach()
            if channel is not None:
                self.sweep.loop.call_soon(instance.changed)
            if keeper.dedicated:
                keeper.retired = True
                self._background(self._retire(keeper))
            elif channel is not None:
                self._background(keeper.free(channel, instance))
        if not was_failed:
            self.emit(PoolEvent("model_failed", model=model.name, version=model.version, text=reason, subject=model))
        handle = self._retries.pop(model, None)
        if handle is not None:
            handle.cancel()
        if not self._closed:
            self._retries[model] = self.sweep.loop.call_later(supervision.RETRY_AFTER_S, self._retry, model)

    def _retry(self, model: Model) -> None:
        del self._retries[model]
        self._blame.on_probation(model, self.sweep.loop.time())
        self._blame.isolated(model)
        model.dedicated = True
        for instance in model.instances:
            self._rehouse(instance)

    # --- What it looks like ---------------------------------------------------------------------------------------

    def statistics(self) -> PoolStatistics:
        return PoolStatistics(
            workers=tuple(keeper.statistics() for keeper in self._keepers),
            models=len(self._models),
            failed_models=sum(model.failed for model in self._models),
        )


async def _first_up(keepers: list[Keeper]) -> list[Keeper]:
    waits = [asyncio.ensure_future(keeper.up.wait()) for keeper in keepers]
    try:
        await asyncio.wait(waits, timeout=WORKER_WAIT_S, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    up = [keeper for keeper in keepers if keeper.up.is_set()]
    if not up:
        raise NotReady(f"no worker process came up within {WORKER_WAIT_S:g} s")
    return up


def _close(model: LoadedModel[Any]) -> None:
    model.closed = True
    if model.fd >= 0:
        os.close(model.fd)
        model.fd = -1
        model.external = None
