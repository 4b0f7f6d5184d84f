"""One model version as the catalog serves it: its state and everything that hangs on it.

Rules: `scheduler` is there exactly while requests can be taken; `spec` is known from the first load on. What belongs to
another room (codecs of a protocol) is kept here and made there.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any, Final

from gateway.backends.interface import Replica
from gateway.core.model import Artifact, ModelSpec, ModelState
from gateway.ensemble import Ensemble
from gateway.errors import NotReady
from gateway.intake import Intake
from gateway.loading import LoadedModel, WantedVersion, bound
from gateway.observe.record import ModelStatistics
from gateway.scheduler import Scheduler
from gateway.sequence_scheduler import SequenceScheduler

_LOADS: Final = itertools.count(1)
"""One number for each load of this process."""

GONE: Final = frozenset((ModelState.UNLOADING, ModelState.UNAVAILABLE))
"""States of a version that somebody took out of service."""


class ServedVersion:
    """One model version in the catalog. `scheduler` is there exactly while requests can be taken."""

    def __init__(self, wanted: WantedVersion) -> None:
        self.name = wanted.name
        self.version = wanted.version
        self.wanted = wanted
        self.state = ModelState.LOADING
        self.reason = ""
        """Why it is not READY, in words."""
        self.statistics = ModelStatistics()
        self.artifact: Artifact | None = None
        """Files and digest; the model's bytes are not kept."""
        self.sidecar: bytes | None = None
        """Content of `provenance.json`."""
        self.loaded: LoadedModel | None = None
        self.scheduler: Intake | None = None
        self.http_codec: Any = None
        """Belongs to the ingress: decoder and encoder made for this version's signature. So does `grpc_codec`."""
        self.grpc_codec: Any = None
        self.config_document: dict[str, Any] = {}
        """The completed configuration, as clients are shown it; known once the version is loaded."""
        self.split_rows = 0
        """A request of more rows than this is cut, and its answer put together again; 0: no request is."""
        self.dependencies: tuple[str, ...] = ()
        """Names of the models that this one is composed of."""
        self.cached = False
        """Whether the response cache stands before it."""
        self.cache: Any = None
        """Belongs to the pipeline: the cache in front of this version, once it was needed."""
        self.required = True
        """Whether the gateway is not ready without it: not while somebody tries to load it at run time."""
        self.load_s = 0.0
        """Seconds that loading took; 0.0 before it is loaded."""
        self._spec: ModelSpec | None = None
        self._fingerprint = b""
        self._pins = 0
        self._unpinned = asyncio.Event()

    @property
    def spec(self) -> ModelSpec:
        """The signature; only known once the version was loaded."""
        if self._spec is None:
            raise NotReady(
                f"model '{self.name}' version {self.version} is not at ready state: {self.reason or 'loading'}"
            )
        return self._spec

    @property
    def replicas(self) -> Sequence[Replica]:
        return self.loaded.replicas if self.loaded is not None else ()

    @property
    def ready(self) -> bool:
        """Whether it can answer now: READY, and a replica is there for it, or the models of all its steps are."""
        if isinstance(self.scheduler, Ensemble):
            return self.state is ModelState.READY and not self.scheduler.obstacle
        return self.state is ModelState.READY and any(replica.available for replica in self.replicas)

    @property
    def obstacle(self) -> str:
        """Why it cannot answer now, in words; empty where it can."""
        if self.state is not ModelState.READY:
            return self.reason or self.state.value.lower()
        if isinstance(self.scheduler, Ensemble):
            return self.scheduler.obstacle
        return "" if self.ready else "no worker is available"

    def fingerprint(self) -> bytes:
        """Names what would answer now: it changes whenever the same input might be answered differently."""
        if isinstance(self.scheduler, Ensemble):
            return self._fingerprint + self.scheduler.fingerprint()
        return self._fingerprint

    def settle(self, spec: ModelSpec, loaded: LoadedModel, row_s: float = 0.0) -> None:
        """It is loaded. `row_s`: seconds a row took on trial; 0.0: unknown."""
        self._know(spec)
        self.loaded = loaded
        made = Scheduler if spec.scheduling.sequence is None else SequenceScheduler
        self.scheduler = made(spec, bound(spec, loaded), self.statistics, row_s=row_s)

    def settle_ensemble(self, ensemble: Ensemble) -> None:
        """It is an ensemble, and every model of its steps is there."""
        self._know(ensemble.spec)
        self.dependencies = ensemble.dependencies
        self.scheduler = ensemble

    def _know(self, spec: ModelSpec) -> None:
        self._spec = spec
        self.split_rows = spec.policy.max_batch_size
        self.cached = spec.scheduling.response_cache
        # The digest alone would not do: the same files may be loaded again with another configuration.
        self._fingerprint = f"{spec.name}/{spec.version}/{spec.digest}/{next(_LOADS)}".encode()

    def pin(self) -> None:
        """A request on its way through an ensemble will still come here: not to be freed before `unpin`."""
        self._pins += 1

    def unpin(self) -> None:
        self._pins -= 1
        if not self._pins:
            self._unpinned.set()

    async def unpinned(self) -> None:
        """Returns when no request under way is still to come here."""
        while self._pins:
            self._unpinned.clear()
            await self._unpinned.wait()

    def __repr__(self) -> str:
        return f"<ServedVersion {self.name}/{self.version} {self.state.value}>"
