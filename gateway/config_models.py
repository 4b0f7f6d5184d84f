"""From `models` of a configuration to the models on disk: what `serve` will load, and `check` checks.

Rules: every fault of every entry at once; a name is served from one entry only. `find_models` reads config.pbtxt
files, no models; `verify` reads and hashes every file of the versions to serve, and loads none.
"""

from __future__ import annotations

from pathlib import Path

from gateway.config import Config, ModelEntry
from gateway.config_evidence import evidence_faults
from gateway.core import ragged
from gateway.errors import ConfigError, Fault
from gateway.registry.directory import FoundModel, locate, names, read, read_version, scan
from gateway.registry.reference import DirectorySource, ModelFileSource, OipServerSource, RegistrySource


def find_models(config: Config) -> list[tuple[ModelEntry, FoundModel]]:
    """The models of all entries, in the order of the file.

    Raises:
        ConfigError: broken models, names that two entries claim, batch sizes that contradict each other.
    """
    found: list[tuple[ModelEntry, FoundModel]] = []
    faults: list[Fault] = []
    owners: dict[str, int] = {}
    for index, entry in enumerate(config.models):
        source = config.source(entry)
        if source is None or isinstance(source, OipServerSource):
            continue  # what servers have is asked of them (remote_models.py)
        if isinstance(source, RegistrySource):  # what registries mean is asked of them (plan_registry.py)
            name = entry.name or source.title
            if (owner := owners.setdefault(name, index)) != index:
                faults.append(_taken(config, index, name, owner))
            continue
        scanned = scan(source.path, entry.name)
        faults += scanned.faults
        for model in scanned.models:
            owner = owners.setdefault(model.name, index)
            if owner != index:
                faults.append(_taken(config, index, model.name, owner))
            elif entry.backends and (wrong := _mixed_fault(model)) is not None:
                faults.append(_fault(config, index, ".backends", wrong))
            elif (wrong := _batch_fault(config, entry, model)) is not None:
                faults.append(_fault(config, index, ".preferred_batch_sizes", wrong))
            else:
                found.append((entry, model))
    if faults:
        raise ConfigError(faults)
    return found


def find_model(config: Config, name: str) -> tuple[ModelEntry, FoundModel] | None:
    """One model, read anew; None if no entry has it.

    Raises:
        ConfigError: it is there, and broken.
    """
    located = locate_model(config, name)
    if located is None:
        return None
    entry, path = located
    found = read(path, name)
    if found.faults:
        raise ConfigError(list(found.faults))
    (model,) = found.models
    check_batch_sizes(config, entry, model)
    if entry.backends and (wrong := _mixed_fault(model)) is not None:
        raise ConfigError(f"model '{name}': its entry has backends, which {wrong}")
    return entry, model


def locate_model(config: Config, name: str) -> tuple[ModelEntry, Path] | None:
    """The first entry that has the model, and its directory or file; nothing is read."""
    for entry in config.models:
        source = config.source(entry)
        if not isinstance(source, DirectorySource | ModelFileSource):
            continue
        if (path := locate(source.path, entry.name, name)) is not None:
            return entry, path
    return None


def check_batch_sizes(config: Config, entry: ModelEntry, model: FoundModel) -> None:
    """Raises ConfigError: the entry's batch sizes contradict the model's."""
    if (wrong := _batch_fault(config, entry, model)) is not None:
        own = (entry.source, entry.name)
        index = next((i for i, e in enumerate(config.models) if (e.source, e.name) == own), len(config.models))
        raise ConfigError([_fault(config, index, ".preferred_batch_sizes", wrong)])


def model_names(config: Config) -> list[str]:
    """Names of all models in the sources, in order, whether or not they could be loaded."""
    found: set[str] = set()
    for entry in config.models:
        source = config.source(entry)
        if isinstance(source, DirectorySource | ModelFileSource):
            found.update(names(source.path, entry.name))
    return sorted(found)


def verify(config: Config, found: list[tuple[ModelEntry, FoundModel]]) -> None:
    """Read every version that would be served, compare it with the digest its entry pins, and look at what it would be
    judged by (config_evidence.py).

    Raises:
        ConfigError: files that cannot be read, and digests that differ.
    """
    faults: list[Fault] = []
    for entry, model in found:
        for version, path in model.versions.items():
            try:
                digest = read_version(model, version, path).digest
            except ConfigError as error:
                faults += error.faults
                continue
            except OSError as error:
                faults.append(Fault(str(path), 0, "", f"cannot be read: {error.strerror}; check its permissions"))
                continue
            if entry.digest not in (None, digest):
                message = (
                    f"the files of model '{model.name}' version {version} have digest {digest}, but {entry.digest} "
                    "is pinned; put the right files there or change the pin"
                )
                index = next(i for i, known in enumerate(config.models) if known is entry)
                faults.append(_fault(config, index, ".digest", message))
    faults += evidence_faults(config, found)
    if faults:
        raise ConfigError(faults)


def _mixed_fault(model: FoundModel) -> str | None:
    """Why remote backends cannot stand beside the workers of this model."""
    if model.config is None:
        return None
    scheduling = model.config.scheduling
    asked = {
        "sequence_batching": scheduling.sequence is not None,
        "ensemble_scheduling": bool(scheduling.ensemble),
        "ragged batches": ragged.asked_for(scheduling, model.config.inputs),
    }
    what = next((key for key, stands in asked.items() if stands), None)
    if what is None:
        return None
    return f"cannot stand beside a source with {what}: only plain models can have both; serve one of the two"


def _taken(config: Config, index: int, name: str, owner: int) -> Fault:
    """Two entries claim one name; `owner`: the first of them."""
    other = config.models[owner].source
    return _fault(config, index, "", f"model '{name}' is already served from {other}; give one of them another name")


def _fault(config: Config, index: int, key: str, message: str) -> Fault:
    line = config.model_lines[index] if index < len(config.model_lines) else 0
    return Fault(config.file if line else "command line", line, f"models[{index}]{key}", message)


def _batch_fault(config: Config, entry: ModelEntry, model: FoundModel) -> str | None:
    settings = config.settings(entry, model.config)
    limit = settings.max_batch_size
    largest = max(settings.preferred_batch_sizes, default=0)
    if limit is None or largest <= limit:
        return None
    return f"{largest} is more than max_batch_size of model '{model.name}', which is {limit}; write at most {limit}"
