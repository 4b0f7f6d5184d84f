"""From `canary` and `shadow` of entries to the models they belong to, and to the files on disk that they mean.

Rules: every fault of every variant at once. A variant is one version: of a directory the highest that its config.pbtxt
serves, or the one that is named, whether or not it would serve that. Reads config.pbtxt files, no models; no registry
is asked.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gateway.config import Config, ModelEntry
from gateway.config_release import Canary, Shadow, Variant
from gateway.config_variants import VARIANTS
from gateway.errors import ConfigError, Fault
from gateway.registry.directory import FoundModel, names, scan
from gateway.registry.reference import DirectorySource, ModelFileSource, RegistrySource, parse


def entries_with_variants(config: Config) -> list[tuple[str, int, ModelEntry]]:
    """(model, place in `models`, entry) of every entry that has a canary or a shadow; blocks on the disk.

    Raises:
        ConfigError: it cannot be told whose they are.
    """
    found, faults = [], []
    for index, entry in enumerate(config.models):
        if entry.canary is None and entry.shadow is None:
            continue
        owners = _owners(config, entry)
        if len(owners) == 1:
            found.append((owners[0], index, entry))
            continue
        key = next(key for key in VARIANTS if getattr(entry, key) is not None)
        line = config.model_lines[index] if index < len(config.model_lines) else 0
        text = f"belongs to one model, and {entry.source} holds {len(owners)}; pick one of them with name:"
        faults.append(Fault(config.file if line else "command line", line, f"models[{index}].{key}", text))
    if faults:
        raise ConfigError(faults)
    return found


def _owners(config: Config, entry: ModelEntry) -> list[str]:
    if entry.name is not None:
        return [entry.name]
    source = config.source(entry)
    if isinstance(source, DirectorySource | ModelFileSource):
        return names(source.path)
    return [source.title] if isinstance(source, RegistrySource) else []


def check_variants(config: Config) -> None:
    """Whether every variant on disk is there; reads config.pbtxt, no model.

    Raises:
        ConfigError: with every fault.
    """
    faults: list[Fault] = []
    for name, index, entry in entries_with_variants(config):
        for key in VARIANTS:
            keys: Canary | Shadow | None = getattr(entry, key)
            if keys is None:
                continue
            try:
                variant_model(keys, name, config.base)
            except ConfigError as error:
                line = config.model_lines[index] if index < len(config.model_lines) else 0
                place = f"models[{index}].{key}"
                faults += [
                    Fault(config.file if line else "command line", line, place, str(one)) for one in error.faults
                ]
    if faults:
        raise ConfigError(faults)


def variant_model(variant: Variant, name: str, base: Path) -> FoundModel | None:
    """The one version on disk that a variant of model `name` means; None: its source is a registry. Reads config.pbtxt,
    no model.

    Raises:
        ConfigError: it is not there, or cannot stand beside another version.
    """
    source = parse(variant.source, base)
    if not isinstance(source, DirectorySource | ModelFileSource):
        return None
    scanned = scan(source.path, name)
    if scanned.faults:
        raise ConfigError(list(scanned.faults))
    (found,) = scanned.models
    if found.config is not None and found.config.ensemble:
        raise ConfigError(f"{found.source} is an ensemble, which has no files of its own; give a model's source")
    return replace(found, versions=_chosen(found, variant.version))


def _chosen(found: FoundModel, version: str | None) -> dict[str, Path]:
    highest, path = list(found.versions.items())[-1]
    if version is None or version == highest:
        return {highest: path}
    if path.is_file():
        return {version: path}
    named = path.parent / version
    if not (named / found.model_file).is_file():
        raise ConfigError(f"{named} holds no {found.model_file}; name a version that is there")
    return {version: named}
