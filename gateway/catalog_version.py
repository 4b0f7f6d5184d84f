"""One model version as the catalog serves it: its state and everything that hangs on it.

Rules: `scheduler` is there exactly while requests can be taken; `spec` is known from the first load on. What belongs to
another room (codecs of a protocol) is kept here and made there.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

from gateway.backends.interface import Replica
from gateway.core.breaker_states import State
from gateway.core.fleet import Fleet
from gateway.core.model import Artifact, ModelSpec, ModelState
from gateway.core.request import InputTensor
from gateway.ensemble import Ensemble
from gateway.errors import GatewayError, NotReady
from gateway.intake import Intake
from gateway.loading import LoadedModel, Settled, WantedVersion, bound
from gateway.observe.record import ModelStatistics
from gateway.scheduler import Scheduler
from gateway.sequence_scheduler import SequenceScheduler

log = logging.getLogger("gateway.catalog")

_LOADS: Final = itertools.count(1)
"""One number for each load of this process."""

GONE: Final = frozenset((ModelState.UNLOADING, ModelState.UNAVAILABLE))
"""States of a version that somebody took out of service."""

LOG_FULL: Final = "the inference log has no room for its requests"

Role = Literal["champion", "standby", "previous", "canary", "shadow"]
"""What a loaded version of a model is for: the model's name means it; it is on trial before it takes the name; it had
the name and can have it back; or it answers a share of the requests; or it is only compared."""


class ServedVersion:
    """One model version in the catalog. `scheduler` is there exactly while requests can be taken."""

    _fingerprint = b""
    on_joined: Callable[[ServedVersion], None] = staticmethod(lambda version: None)
    """Called when a replica has joined, before any batch can go there."""

    passing = False
    """Whether its load failed for a reason that may be over soon."""

    def __init__(self, wanted: WantedVersion) -> None:
        self.name = wanted.name
        self.version = wanted.version
        self.wanted = wanted
        self.role: Role = "champion"
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
        self.log: Any = None
        """Where its requests are noted for the inference log (`inference_log.handover.VersionLog`); None: nowhere."""
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
        self.variant = ""
        """What answers call it where the model has a canary or a shadow: champion, canary or shadow; else nothing."""
        self.split: Any = None
        """Belongs to `traffic.py`: who answers instead of it, now and then; None: nobody. So does `mirror`."""
        self.mirror: Any = None
        """Copies of its requests for a shadow; None: none are made."""
        self.chosen = 0
        """Requests without a version that a split gave to it."""
        self.load_s = 0.0
        """Seconds that loading took; 0.0 before it is loaded."""
        self.probe: tuple[InputTensor | None, ...] | None = None
        """Made-up input that the scheduler's replicas can run at any time; None: there is none (`loading.Settled`)."""
        self.origin: Callable[[], list[dict[str, Any]]] | None = None
        """What is known of the remote servers that serve it; None: none do."""
        self._bound: list[tuple[Replica, Replica]] = []
        """Loaded replicas, and those that the scheduler knows them by, where that is not the same."""
        self._spec: ModelSpec | None = None
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
    def reachable(self) -> bool:
        """Whether clients that name its number may be answered by it."""
        return self.role in ("champion", "previous", "canary")

    @property
    def fleets(self) -> tuple[Fleet, ...]:
        """What is known of its backends; none for an ensemble, whose steps are other models' affair."""
        scheduler = self.scheduler
        return scheduler.fleets if isinstance(scheduler, Scheduler | SequenceScheduler) else ()

    def kick(self) -> None:
        """Something about its backends was changed from outside: look again who may run what."""
        if isinstance(self.scheduler, Scheduler | SequenceScheduler):
            self.scheduler.kick()

    @property
    def ready(self) -> bool:
        """Whether it can answer now: READY, and a replica is usable, or the models of all its steps are ready."""
        if isinstance(self.scheduler, Ensemble):
            return self.state is ModelState.READY and not self.scheduler.obstacle
        return self.state is ModelState.READY and self._answerable()

    @property
    def log_blocked(self) -> bool:
        """Whether it refuses requests now because the inference log has no room for their rows."""
        return self.log is not None and bool(self.log.blocked)

    def _answerable(self) -> bool:
        """Whether any replica takes batches. One on trial counts where only clients' batches can prove it: whoever
        sends none to what is not ready would never see it ready again."""
        now = time.monotonic()
        return any(
            fleet.usable(member, now)
            or (not fleet.sampled and member.replica.available and member.breaker.state is State.HALF_OPEN)
            for fleet in self.fleets
            for member in fleet.members
        )

    @property
    def obstacle(self) -> str:
        """Why it cannot answer now, in words; empty where it can."""
        if self.state is not ModelState.READY:
            return self.reason or self.state.value.lower()
        if isinstance(self.scheduler, Ensemble):
            return self.scheduler.obstacle
        if self.ready:
            return ""
        members = [member for fleet in self.fleets for member in fleet.members]
        if members and all(member.breaker.state is State.DRAINED for member in members):
            return "all its backends are drained"
        return "no backend is available" if self.origin is not None else "no worker is available"

    @property
    def refusal(self) -> str:
        """Why clients are told that it is not ready, in words; empty where it takes requests."""
        return self.obstacle or (LOG_FULL if self.log_blocked else "")

    def fingerprint(self) -> bytes:
        """Names what would answer now: it changes whenever the same input might be answered differently."""
        if isinstance(self.scheduler, Ensemble):
            return self._fingerprint + self.scheduler.fingerprint()
        return self._fingerprint

    def settle(self, settled: Settled, loaded: LoadedModel) -> None:
        """It is loaded."""
        spec = settled.spec
        self._know(spec)
        self.probe = settled.probe
        self.loaded = loaded
        replicas = bound(spec, loaded)
        self._bound = [(own, seen) for own, seen in zip(loaded.replicas, replicas, strict=True) if own is not seen]
        made = Scheduler if spec.scheduling.sequence is None else SequenceScheduler
        self.scheduler = made(spec, replicas, self.statistics, row_s=settled.row_s)

    def add_replica(self, replica: Replica) -> None:
        """`replica`, whose tensors are those of `spec`, takes part from now on. Harmless where nothing is served."""
        if isinstance(self.scheduler, Scheduler):
            self.scheduler.add_replica(replica)  # which looks for work for it at the end of this turn of the loop
            self.on_joined(self)

    async def remove_replica(self, replica: Replica) -> None:
        """No batch goes to `replica` any more; returns when those under way are over."""
        seen = next((seen for own, seen in self._bound if own is replica), replica)
        self._bound = [pair for pair in self._bound if pair[0] is not replica]
        if isinstance(self.scheduler, Scheduler):
            await self.scheduler.remove_replica(seen)

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


async def confirm(versions: Sequence[ServedVersion], reference: str = "", instead_of: str = "") -> None:
    """Have it written down that these serve, see `WantedVersion.confirm`; a failure is told and changes nothing."""
    for version in versions:
        if version.wanted.confirm is None:
            continue
        try:
            await asyncio.to_thread(version.wanted.confirm, reference, instead_of)
        except (GatewayError, OSError) as error:
            log.warning(
                "model %s version %s serves, but that could not be noted: %s", version.name, version.version, error
            )
