"""`gateway check`: everything that can be said of a configuration without serving it.

Rules: every fault of one kind is named at once; no model is loaded, no registry and no server is asked, and what was
not looked at is said.
"""

from __future__ import annotations

from gateway.cli_text import count
from gateway.config import Config, ModelEntry
from gateway.config_models import find_models, verify
from gateway.config_sources import check_lock
from gateway.config_variant_models import check_variants
from gateway.registry.directory import FoundModel
from gateway.registry.reference import OipServerSource, RegistrySource

Found = list[tuple[ModelEntry, FoundModel]]


def check_models(config: Config) -> tuple[str, list[str]]:
    """What would be served, in words; and notes on settings of models that have no effect.

    Raises:
        ConfigError: with the faults.
    """
    found = find_models(config)
    verify(config, found)
    check_variants(config)
    check_lock(config)
    notes = [
        f"{model.source}/config.pbtxt: {key} has no effect here"
        for _, model in found
        for key in (model.config.ignored if model.config is not None else ())
    ]
    return _summary(config, found), notes


def _summary(config: Config, found: Found) -> str:
    names = {model.name for _, model in found} | {entry.name for entry in config.models if entry.backends}
    versions = sum(len(model.versions) for _, model in found)
    what = f"{count(len(names), 'model')}, {count(versions, 'version')} to serve"
    sources = [config.source(entry) for entry in config.models]
    asked = sum(isinstance(source, RegistrySource) for source in sources)
    if asked:
        what += f"; {count(asked, 'model')} from registries, not asked"
    servers = sum(isinstance(source, OipServerSource) for source in sources)
    servers += sum(len(entry.backends) for entry in config.models)
    if servers:
        what += f"; {count(servers, 'remote backend')}, not contacted"
    return what
