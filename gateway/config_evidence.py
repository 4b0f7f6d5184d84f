"""What versions are judged by besides their files: golden inputs, and the keys of who signs. Whether it can be used.

A version is refused at load if its golden inputs cannot be read, or if it must be signed and the public key is none;
`gateway check` says so before. Golden inputs that a registry has beside its model are not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from gateway.config import Config, ModelEntry
from gateway.config_variant_models import entries_with_variants, variant_model
from gateway.config_variants import VARIANTS
from gateway.errors import ConfigError, Fault
from gateway.registry.directory import FoundModel
from gateway.registry.golden_file import golden_requests, read_golden
from gateway.registry.reference import RegistrySource
from gateway.registry.signing import key_fault


def evidence_faults(config: Config, found: Sequence[tuple[ModelEntry, FoundModel]]) -> list[Fault]:
    """What is wrong with it, each thing once; reads the files. `found`: the models on disk."""
    faults: dict[str, Fault] = {}
    for index, entry in enumerate(config.models):
        models = [model for owner, model in found if owner is entry]
        line = config.model_lines[index] if index < len(config.model_lines) else 0
        place = config.file if line else "command line"
        for key, message in [*_golden_faults(config, entry, models), *_key_faults(config, entry)]:
            faults.setdefault(message, Fault(place, line, f"models[{index}].{key}", message))
    return list(faults.values())


def _golden_faults(config: Config, entry: ModelEntry, models: Sequence[FoundModel]) -> Iterator[tuple[str, str]]:
    stated = config.base / entry.golden.file if entry.golden is not None else None
    places = [path for model in models if not _ensemble(model) for path in model.versions.values()]
    places += _variants(config, entry)
    if not places and stated is not None and stated.is_file() and isinstance(config.source(entry), RegistrySource):
        places = [stated]
    for directory in places:
        try:
            golden = read_golden(stated, stated.name if stated is not None else None, directory)
        except ConfigError as error:
            yield "golden", str(error)
            continue
        try:
            if golden is not None:
                golden_requests(golden)
        except ConfigError as error:
            yield "golden", f"golden inputs {golden.place if golden is not None else stated}: {error}"


def _ensemble(model: FoundModel) -> bool:
    """Ensembles have no answers of their own to be checked."""
    return model.config is not None and model.config.ensemble


def _variants(config: Config, entry: ModelEntry) -> list[Path]:
    """Directories of the canary and shadow that are on disk; what is wrong with these is told elsewhere."""
    found: list[Path] = []
    try:
        names = [name for name, _, owner in entries_with_variants(config) if owner is entry]
        for name in names:
            for keys in (getattr(entry, role) for role in VARIANTS):
                model = variant_model(keys, name, config.base) if keys is not None else None
                found += model.versions.values() if model is not None else ()
    except ConfigError:
        pass
    return found


def _key_faults(config: Config, entry: ModelEntry) -> Iterator[tuple[str, str]]:
    signing = config.settings(entry).signing
    if signing.mode != "off" and signing.public_key is not None and (fault := key_fault(signing.public_key)):
        yield "signature.public_key", f"{signing.public_key}: {fault}"
