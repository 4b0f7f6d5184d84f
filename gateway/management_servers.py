"""What the repository asks of whoever knows models that are not on disk, and what holds where there are none: of remote
servers, and of registries."""

from __future__ import annotations

from typing import Protocol

from gateway.config import Config
from gateway.loading import WantedVersion


class Servers(Protocol):
    """The models that are not on disk: those of remote servers; `remote_models.RemoteModels` fits."""

    @property
    def configured(self) -> bool:
        """Whether there are any servers to ask."""

    def names(self) -> list[str]: ...

    def settings(self) -> dict[str, object]:
        """For each of `names`, what makes it another model when it changes."""

    async def wanted(self, name: str) -> list[WantedVersion]: ...

    async def refresh(self) -> None:
        """Ask the servers anew what they have."""

    async def reload(self, config: Config) -> None:
        """Take over another configuration's servers. Raises ConfigError, and nothing was changed then."""

    async def reconcile(self) -> None:
        """Bring the replicas of what is loaded in line with the servers."""


class NoServers:
    """Fits `Servers`."""

    configured = False

    def names(self) -> list[str]:
        return []

    def settings(self) -> dict[str, object]:
        return {}

    async def wanted(self, name: str) -> list[WantedVersion]:
        return []

    async def refresh(self) -> None:
        """There is nobody to ask."""

    async def reload(self, config: Config) -> None:
        """There is nothing to take over."""

    async def reconcile(self) -> None:
        """There is nothing to bring in line."""


class Registered(Protocol):
    """The models that come from registries; `plan_registry.RegisteredModels` fits. Nothing but `wanted` blocks."""

    def names(self) -> list[str]: ...

    def settings(self) -> dict[str, object]:
        """For each of `names`, what makes it another model when the configuration changes it."""

    def wanted(self, name: str) -> list[WantedVersion]:
        """Ask the registry; runs in a thread. Raises SourceError, ConfigError."""

    def reload(self, config: Config) -> None:
        """Take over another configuration."""


class NoneRegistered:
    """Fits `Registered`."""

    def names(self) -> list[str]:
        return []

    def settings(self) -> dict[str, object]:
        return {}

    def wanted(self, name: str) -> list[WantedVersion]:
        return []

    def reload(self, config: Config) -> None:
        """There is nothing to take over."""
