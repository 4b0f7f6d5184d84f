"""What one process serves: the catalog, the places its models come from, the workers, and what they ask of each other.

These parts know each other only by what they are given here: functions to call, and functions that are called when
something happens to a version. Rules:
  * nothing starts when this is made: no worker, no question to a registry or a server;
  * workers are started by the first model that needs them (`load`), once: nobody pays for them while every model is on
    remote servers;
  * before a version serves, everything that watches versions has seen it (`_ready`), the inference log first: no
    request goes unnoted;
  * stopping has two steps: `freeze`, and everything that serves goes on; `stop`, once the last answer is given.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from gateway import app_registries, app_variants, plan
from gateway.agreement_sampling import AgreementSamplers
from gateway.app_log import ServingLog
from gateway.app_variants import VariantLoader
from gateway.backends.onnx import LoadOptions, OnnxPool, PoolEvent
from gateway.catalog import Catalog, ServedVersion
from gateway.config import Config, ModelEntry, ModelSettings
from gateway.config_sources import secret
from gateway.core.model import Artifact
from gateway.core.release import Happened
from gateway.core.remembered import Store
from gateway.errors import ModelError
from gateway.inference_log.handover import InferenceLog
from gateway.inference_log.segments import Layout
from gateway.loading import LoadedModel, WantedVersion
from gateway.management_repository import Repository
from gateway.management_settings import TraceSettings
from gateway.management_tracing import Tracing
from gateway.observe.record import Recent
from gateway.observe.request_trace import TraceFile
from gateway.operations_backends import Backends
from gateway.pipeline import Pipeline
from gateway.plan_registry import RegisteredModels
from gateway.prober import Probers
from gateway.releases import Releases
from gateway.releases_sources import Following, following
from gateway.remote_models import RemoteModels
from gateway.variants import Variants
from gateway.variants_sources import Target

log = logging.getLogger("gateway")

Spawn = Callable[[Any], None]
"""Runs a coroutine or a future beside everything else, for as long as the process serves."""


class Models:
    """The models of one process, and all that has to do with them."""

    def __init__(self, config: Config, spawn: Spawn) -> None:
        server, cache = config.server, config.server.response_cache
        self._config = config
        """As it was at the start; `repository.config` is what it is now."""
        self._spawn = spawn
        self.serving_log: ServingLog | None = None
        """Where requests and events are logged; None: nowhere. Set before anything is loaded."""
        self._starting = asyncio.Lock()
        self._started = False
        """Whether there are workers."""
        self.pipeline = Pipeline(None if cache is None else Store(cache.max_bytes, cache.ttl_s))
        self.catalog = Catalog(self.pipeline.infer)
        self.pool = OnnxPool(
            workers=server.worker_count,
            intra_op_threads=server.intra_op_threads,
            on_event=self._pool_event,
        )
        self.backends = Backends(self.catalog.versions)
        self.remotes = RemoteModels(config, self.catalog)
        self.releases = Releases(self.catalog, self._following)
        self.registered = RegisteredModels(config, self.load)
        self.repository = Repository(config, self.catalog, self.load, self.remotes, self.releases, self.registered)
        loader = VariantLoader(self._load_apart, self._target)
        infer = partial(self.pipeline.infer, past_cache=True)
        self.variants = Variants(self.catalog, loader.find, infer, self.releases.turn, looks=loader.looks)
        self.probers = Probers(server.probe_interval_s, random.Random())  # noqa: S311  # jitter
        self.agreement = AgreementSamplers(random.Random())  # noqa: S311  # a sample
        self.trace_settings = TraceSettings(server.trace.file or "")
        file = TraceFile(Path(server.trace.file), server.trace.max_bytes) if server.trace.file else None
        self.tracing = Tracing(self.catalog, self.trace_settings, file)
        self._connect()

    def _connect(self) -> None:
        """Tell each part whom to call."""
        self.remotes.drained = self.backends.drained
        self.remotes.on_discovered = lambda name: self._spawn(self.repository.discovered(name))
        self.repository.forgotten = self.trace_settings.forget
        self.releases.on_happened = self._release_happened
        self.catalog.on_ready = self._ready
        self.catalog.on_retired = self._retired

    def __repr__(self) -> str:
        return f"<Models versions={len(list(self.catalog.versions()))} pending={self.pending()}>"

    @property
    def inference_log(self) -> InferenceLog | None:
        return self.serving_log.log if self.serving_log is not None else None

    def pending(self) -> int:
        """Requests that were accepted and have no answer yet."""
        return sum(v.scheduler.pending for v in self.catalog.versions() if v.scheduler is not None)

    # -- life ----------------------------------------------------------------------------------------------------

    async def start_workers(self) -> None:
        """Once, however often it is called. Raises NotReady: one of them could not start."""
        async with self._starting:
            if not self._started:
                await self.pool.start()
                self._started = True

    async def complete(self, wanted: Sequence[WantedVersion]) -> list[WantedVersion]:
        """`wanted`, and what is served from registries and remote servers.

        Raises:
            ConfigError: a model is served from two places, or from nowhere.
            LoadFailed: nobody knows what a registry reference means.
            ModelError: there is nothing at all.
        """
        found = [*wanted, *await self.repository.initial_registered()]
        if not self.remotes.configured:
            return found
        await self.remotes.open()
        found += await self.repository.initial_remote()
        if not found and self._config.server.model_control != "explicit":
            raise ModelError(f"there is nothing to serve: {self.remotes.obstacle()}")
        return found

    async def go_on(self, stopping: asyncio.Event, *, rereads: bool) -> None:
        """Everything is loaded: from here on follow what changes. Returns when canaries and shadows are there, or take
        longer. `rereads`: the configuration may name servers later."""
        self._spawn(self.repository.poll_for_ever())
        self._spawn(app_registries.keep_cache_small(self.registered, self.catalog, self._logged_digests))
        if self.remotes.configured or rereads:
            self._spawn(self.remotes.follow())
        await self.remotes.reconcile()
        await app_variants.start(self.variants, self._config, stopping, self._spawn)

    async def freeze(self) -> None:
        """Nothing is loaded, unloaded, released or tried any more; what serves goes on."""
        self.repository.open = False
        await self.releases.close()
        self.variants.close()

    async def stop(self) -> None:
        """Every request has its answer: end what watches versions, and their schedulers. `remotes` and `pool` are
        closed by whoever stops the process, which may never have come to serve."""
        await self.probers.close()
        self.catalog.stop()
        await self.tracing.close()

    # -- what happens to versions ----------------------------------------------------------------------------------

    def _ready(self, version: ServedVersion) -> None:
        """A version is loaded and about to serve."""
        if self.serving_log is not None:
            self.serving_log.attach(version)
        self.tracing.attach(version)
        self.remotes.attach(version)
        self.backends.attach(version)
        self.probers.attach(version)
        self.agreement.attach(version)
        if self._config.server.metrics.nv_summaries and version.statistics.recent is None:
            version.statistics.recent = Recent()

    def _retired(self, version: ServedVersion) -> None:
        """A version takes no new callers."""
        self.probers.detach(version)
        self.agreement.detach(version)

    def _release_happened(self, name: str, happened: Happened) -> None:
        """A model's releases changed, or were not allowed to: the inference log keeps that with the predictions."""
        if self.inference_log is not None:
            details = asdict(happened)
            kind, version = details.pop("outcome"), happened.to_version or happened.from_version
            self.inference_log.event("lifecycle", kind, name, version, details)

    def _pool_event(self, event: PoolEvent) -> None:
        if event.kind == "model_failed":
            log.error("model %s version %s failed: %s", event.model, event.version, event.text)
            self.catalog.failed(event.model, event.version, event.text, event.subject)
        elif event.kind == "model_recovered":
            log.info("model %s version %s is back", event.model, event.version)
            self.catalog.recovered(event.model, event.version, event.subject)
        elif event.kind == "worker_died":
            log.warning("worker %s (pid %d) died: %s; it is started again", event.worker, event.pid, event.text)
        elif event.kind == "worker_ready" and event.generation > 1:
            log.info("worker %s is back (pid %d)", event.worker, event.pid)

    # -- what the parts ask ------------------------------------------------------------------------------------------

    async def load(self, artifact: Artifact, settings: ModelSettings) -> LoadedModel:
        """On the workers, and on the servers that stand beside the model. Raises LoadFailed and the like."""
        await self.start_workers()
        options = LoadOptions(settings.instances, settings.dedicated, settings.intra_op_threads)
        return self.remotes.mixed(artifact.name, await self.pool.load(artifact, options))

    async def _load_apart(self, artifact: Artifact, options: LoadOptions) -> LoadedModel:
        await self.start_workers()
        return await self.pool.load(artifact, options)

    async def promote(self, name: str, version: ServedVersion) -> object:
        """The canary takes over; a browser or the command line asked."""
        async with self.releases.turn(name):
            return await self.releases.promote(name, [version], by="operator")

    def _following(self, name: str) -> Following:
        """How a model is followed; runs in a thread."""
        return following(self.repository.config, self.load, name, self.registered)

    def _target(self, config: Config, entry: ModelEntry, name: str, load: plan.Load) -> Target:
        """What a variant's reference means, from its registry; runs in a thread."""
        settled = self.registered.registries.settle(entry.source)
        wanted = self.registered.release(config, entry, settled, load, name)
        return Target(settled.resolved.immutable_id, wanted, settled.resolved.mutable or bool(settled.stale))

    def webhook_secret(self) -> str | None:
        """What MLflow signs its events with; may block. None: none are taken."""
        config = self.repository.config
        place = config.registries.mlflow.webhook_secret if config.registries.mlflow is not None else None
        return None if place is None else secret(place, config.base, config.environ)()

    def _logged_digests(self) -> set[str]:
        """Digests of the models that sealed parts of the inference log refer to. Runs in a thread."""
        section = self._config.inference_log
        if section is None:
            return set()
        commits = Layout(self._config.base / section.directory).commits()
        return {digest for commit in commits.values() for digest in commit.digests}
