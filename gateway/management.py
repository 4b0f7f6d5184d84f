"""Everything the protocol offers besides inference: the one implementation behind REST and gRPC.

Decides what each request means and answers. Rules: names, keys and texts are Triton's (wire notes §1.3 to §1.7); a
document is a dict exactly as REST sends it, and its keys are the fields of the gRPC message; every refusal is a typed
error of `errors.py`. Nothing here knows a wire format. Only what is really on is advertised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from gateway import __version__
from gateway.catalog import GONE, Catalog, ServedVersion
from gateway.core.model import ModelState, TensorSpec
from gateway.errors import InvalidRequest, NotFound, Unsupported
from gateway.management_access import Restrictions
from gateway.management_repository import Repository
from gateway.management_settings import Changes, LogSettings, TraceSettings
from gateway.management_statistics import version_document
from gateway.protocol.options import SERVER_NAME
from gateway.shared_memory import SharedMemory

EXTENSIONS: Final = (
    "classification",
    "sequence",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "system_shared_memory",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
)
"""In Triton's order; clients decide by this list. What is not on is left out."""


class Management:
    """One for the process. Methods that wait for something are coroutines; the others answer at once."""

    def __init__(
        self,
        catalog: Catalog,
        repository: Repository,
        obstacle: Callable[[], str],
        *,
        server_name: str = SERVER_NAME,
        trace: TraceSettings | None = None,
        restrictions: Restrictions | None = None,
        memory: SharedMemory | None = None,
    ) -> None:
        """`obstacle`: why the whole server takes no requests, empty if it does; `memory`: None: clients cannot share
        theirs."""
        self.restrictions = restrictions or Restrictions()
        self._catalog = catalog
        self._repository = repository
        self._obstacle = obstacle
        self._server_name = server_name
        self._trace = trace or TraceSettings()
        self._log = LogSettings()
        self._memory = memory

    # -- health and metadata -------------------------------------------------------------------------------------

    def server_live(self) -> bool:
        return True

    def server_ready(self) -> bool:
        """Every model that should serve does, and the server is not stopping."""
        return not self._obstacle()

    def server_obstacle(self) -> str:
        """Why it is not ready, in words; empty where it is."""
        return self._obstacle()

    def server_metadata(self) -> dict[str, Any]:
        return {"name": self._server_name, "version": __version__, "extensions": self._extensions()}

    def _extensions(self) -> list[str]:
        return [name for name in EXTENSIONS if name != "system_shared_memory" or self._memory is not None]

    def models(self) -> list[str]:
        """Names of all models that are served or should be, in order."""
        return sorted({version.name for version in self._catalog.versions() if version.state not in GONE})

    def model_ready(self, name: str, version: str | None = None) -> bool:
        """Whether it can answer now. Raises NotFound: unknown model or version."""
        return not self.model_obstacle(name, version)

    def model_obstacle(self, name: str, version: str | None = None) -> str:
        """Why it cannot answer now, in words; empty where it can. Raises NotFound: unknown model or version."""
        return self._catalog.find(name, version).refusal

    def model_metadata(self, name: str, version: str | None = None) -> dict[str, Any]:
        """Raises NotFound, NotReady."""
        found = self._catalog.resolve(name, version)
        spec = found.spec
        return {
            "name": spec.name,
            "versions": [spec.version] if version is not None else self._catalog.ready_versions(spec.name),
            "platform": spec.platform,
            "inputs": [_tensor(tensor, spec.batched) for tensor in spec.inputs],
            "outputs": [_tensor(tensor, spec.batched) for tensor in spec.outputs],
        }

    def model_config(self, name: str, version: str | None = None) -> dict[str, Any]:
        """The completed configuration; the keys are `ModelConfig`'s. Raises NotFound, NotReady."""
        return self._catalog.resolve(name, version).config_document

    # -- statistics ----------------------------------------------------------------------------------------------

    def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """Of one version, all versions of a model, or (no name) everything that serves.

        Raises:
            InvalidRequest: unknown or not serving; Triton says 400 here, not 404.
        """
        if not name:
            return {"model_stats": [version_document(v) for v in self._catalog.distinct() if _counts(v)]}
        versions = [v for v in self._catalog.distinct() if v.name == name and _counts(v)]
        if not versions:
            raise InvalidRequest(f"requested model '{_short(name)}' is not available")
        if version:
            versions = [v for v in versions if v.version == version]
            if not versions:
                raise InvalidRequest(
                    f"requested model version is not available for model '{name}': it has no {_short(version)}"
                )
        return {"model_stats": [version_document(v) for v in versions]}

    # -- repository ----------------------------------------------------------------------------------------------

    async def repository_index(self, ready: bool = False, repository: str = "") -> list[dict[str, str]]:
        """See `Repository.index`."""
        return await self._repository.index(ready, repository)

    async def load(self, name: str, parameters: Mapping[str, object] | None = None, repository: str = "") -> None:
        """See `Repository.load`."""
        await self._repository.load(name, parameters or {}, repository)

    async def unload(self, name: str, unload_dependents: bool = False, repository: str = "") -> None:
        """See `Repository.unload`."""
        await self._repository.unload(name, unload_dependents, repository)

    # -- settings ------------------------------------------------------------------------------------------------

    def trace_settings(self, model: str | None = None) -> dict[str, Any]:
        """All settings as they hold for a model, or globally. Raises NotFound: unknown model."""
        self._known(model)
        return self._trace.document(model)

    def update_trace_settings(self, model: str | None, changes: Changes) -> dict[str, Any]:
        """See `TraceSettings.update`. Raises NotFound besides: unknown model."""
        self._known(model)
        return self._trace.update(model, changes)

    def log_settings(self) -> dict[str, Any]:
        return self._log.document()

    def update_log_settings(self, changes: Changes) -> dict[str, Any]:
        """See `LogSettings.update`."""
        return self._log.update(changes)

    def _known(self, model: str | None) -> None:
        if model is not None and not self._catalog.of(model):
            raise NotFound(f"Request for unknown model : {_short(model)}")

    # -- shared memory -------------------------------------------------------------------------------------------

    def shm_status(self, name: str | None = None, kind: str = "system") -> list[dict[str, Any]]:
        """Registered regions. `kind`: `system` or `cuda`. Raises NotFound: no region of this name."""
        if self._memory is not None and kind == "system":
            return self._memory.status(name)
        if name is not None:
            raise NotFound(f"Unable to find {kind} shared memory region: '{_short(name)}'")
        return []

    def shm_register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Register a part of a POSIX shared memory object as a region; see `SharedMemory.register`.

        Raises Unsupported besides: clients cannot share memory.
        """
        self._shared_memory().register(name, key, offset, byte_size)

    def cuda_shm_register(self, name: str) -> None:
        """Raises InvalidRequest: models run on CPUs here."""
        raise InvalidRequest(f"failed to register CUDA shared memory region: '{_short(name)}', GPUs not supported")

    def shm_unregister(self, name: str | None = None) -> None:
        """Forget a region, or all of them; harmless where there is none. Raises Unsupported: clients cannot share
        memory."""
        self._shared_memory().unregister(name)

    def _shared_memory(self) -> SharedMemory:
        if self._memory is None:
            raise Unsupported(_NO_SHARED_MEMORY)
        return self._memory

    # -- access --------------------------------------------------------------------------------------------------

    def restricted(self, api: str) -> tuple[str, str] | None:
        """Header and value that callers of a group of APIs must send; None: nothing."""
        return self.restrictions.required(api)


_NO_SHARED_MEMORY: Final = (
    "shared memory of clients is switched off: send tensors in the request, or let the server's owner start it with "
    "--allow-client-shm"
)


def _counts(version: ServedVersion) -> bool:
    """Whether there is anything to be said about it: clients are answered by it, or were until its workers failed."""
    return (
        version.reachable and version.state in (ModelState.READY, ModelState.FAILED) and version.scheduler is not None
    )


def _tensor(tensor: TensorSpec, batched: bool) -> dict[str, Any]:
    shape = [-1, *tensor.dims] if batched else list(tensor.dims)
    return {"name": tensor.name, "datatype": tensor.datatype.name, "shape": shape}


def _short(text: str) -> str:
    return text if len(text) <= 64 else text[:64] + "…"
