"""What loading is told of a version that only remote servers have."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from gateway.backends.remote_endpoint import RemoteModel
from gateway.config import Config
from gateway.core.model import Artifact
from gateway.errors import GatewayError
from gateway.loading import LoadedModel, WantedVersion
from gateway.remote_census import Redundant
from gateway.remote_versions import facts_of

Load = Callable[[Artifact], Awaitable[LoadedModel]]


def wanted_version(
    config: Config, model: Redundant, version: str, heard: Sequence[RemoteModel], load: Load
) -> WantedVersion:
    """`heard`: the version on each server that answered, the one that defines the signature first.

    Raises:
        ConfigError: it cannot be served as the configuration says.
    """
    settings = config.settings(model.entry)
    facts = facts_of(settings, heard)
    return WantedVersion(
        name=model.name,
        version=version,
        read=partial(_artifact, model, version),
        load=load,
        digest_pin=None,
        batching=settings.batching,
        max_batch_size=facts.max_batch_size,
        size_is_stated=facts.size_is_stated,
        max_queue_delay_s=settings.max_queue_delay_s,
        preferred_batch_sizes=settings.preferred_batch_sizes,
        oversize=settings.oversize,
        max_queue_rows=max(settings.max_queue_rows, facts.max_batch_size or 0),
        max_queue_bytes=settings.max_queue_bytes,
        deadline_s=settings.deadline_s,
        stated_inputs=facts.stated_inputs,
        stated_outputs=facts.stated_outputs,
        resilience=settings.resilience,
        logged=settings.logged,
        platform=facts.platform,
        forwards_parameters=True,
        independent=facts.independent,
        apart=facts.apart,
        untried=facts.untried,
    )


def broken_version(config: Config, model: Redundant, version: str, error: GatewayError) -> WantedVersion:
    """A version whose load ends with `error`."""

    def read() -> tuple[Artifact, bytes | None]:
        raise error

    async def load(artifact: Artifact) -> LoadedModel:
        raise error

    settings = config.settings(model.entry)
    return WantedVersion(
        model.name, version, read, load, None, settings.batching, None, False, 0.0, (), settings.oversize,
        settings.max_queue_rows, settings.max_queue_bytes, settings.deadline_s,
    )  # fmt: skip


def settings_of(config: Config, model: Redundant) -> object:
    """What makes it another model when it changes; backends come and go without that."""
    own = model.entry.model_dump_json(exclude={"backends", "source", "canary", "shadow"})
    return own, config.defaults.model_dump_json()


def _artifact(model: Redundant, version: str) -> tuple[Artifact, bytes | None]:
    """Stands for files that are not here."""
    source = ", ".join(site.endpoint.url for site in model.sites())
    return Artifact(model.name, version, source, (), "", b"", ""), None
