"""What the sources of variants mean now, as versions that can be loaded.

Rules: a variant has the keys of its model's entry, with its own source, pin and number of instances, and workers of its
own; its backends, golden inputs aside, are not the model's. Files are read anew each time, in a thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from gateway import plan
from gateway.config import Config, ModelEntry
from gateway.config_release import Canary, Shadow
from gateway.config_variant_models import variant_model
from gateway.errors import ConfigError, SourceUnavailable
from gateway.loading import WantedVersion
from gateway.registry.directory import looks_of
from gateway.registry.reference import DirectorySource, ModelFileSource, parse


@dataclass(frozen=True, slots=True)
class Target:
    """What a variant's source means now."""

    identity: str
    """Equal for as long as nothing need be loaded anew."""
    wanted: WantedVersion
    mutable: bool = False
    """Whether the source may mean something else by itself, later."""


Registered = Callable[[Config, ModelEntry, str, plan.Load], Target]
"""Asks a registry what an entry's source means, as a version of the model that is named. Blocks. Raises
SourceUnavailable, SourceError."""


def variant_entry(entry: ModelEntry, keys: Canary | Shadow) -> ModelEntry:
    """What holds for a variant."""
    return entry.model_copy(
        update={
            "source": keys.source,
            "digest": keys.digest,
            "instances": keys.instances or 1,
            "isolation": "dedicated",
            "backends": (),
            "canary": None,
            "shadow": None,
        }
    )


def looks(config: Config, entry: ModelEntry, keys: Canary | Shadow) -> object:
    """Something else whenever the files have changed by which a variant on disk is judged; None: it is not on disk.
    Blocks on the disk."""
    source = parse(keys.source, config.base)
    if not isinstance(source, DirectorySource | ModelFileSource):
        return None
    signing = config.settings(variant_entry(entry, keys)).signing
    golden = config.base / entry.golden.file if entry.golden is not None else None
    places = [source.path, golden, signing.public_key]
    return [looks_of(place) for place in places if place is not None]


def find(
    config: Config, name: str, entry: ModelEntry, keys: Canary | Shadow, load: plan.Load, registered: Registered
) -> Target:
    """What a variant of model `name` is now. Blocks: on the disk, on the network.

    Raises:
        ConfigError, SourceError: it is not there, or cannot be one.
        SourceUnavailable: its registry does not answer, or its files cannot be read.
    """
    own = variant_entry(entry, keys)
    found = variant_model(keys, name, config.base)
    if found is None:
        target = registered(config, own, name, load)
        wanted = target.wanted
        if keys.version is not None and keys.version != wanted.version:
            raise ConfigError(f"{keys.source} is version {wanted.version}, not {keys.version}; remove `version`")
        return target
    config = replace(config, instances=None)  # an option for all models, and not for their variants
    (wanted,) = plan.settled(config, own, found, load)
    try:
        artifact, _ = wanted.read()
    except OSError as error:
        raise SourceUnavailable(f"its files cannot be read: {error.strerror or error}") from None
    return Target(f"{wanted.version} {artifact.digest}", wanted)
