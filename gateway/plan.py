"""From a configuration to the model versions to serve: sources scanned, settings settled, readers and loaders bound.

Every fault of every source is found before anything is loaded; a plan with faults is refused whole.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from gateway.catalog import ServedVersion
from gateway.config import Config, ModelEntry, ModelSettings
from gateway.config_models import find_model, find_models
from gateway.core.model import Artifact
from gateway.core.scheduling import PLAIN
from gateway.ensemble import Ensemble
from gateway.errors import ConfigError, Fault, NotReady
from gateway.loading import LoadedModel, WantedVersion
from gateway.provenance.manifest import MAX_SIDECAR_BYTES, SIDECAR, manifest, remote_manifest
from gateway.registry.directory import FoundModel, read_side_file, read_version
from gateway.registry.golden_file import GoldenFile, read_golden
from gateway.registry.signing import Signing, verify

log = logging.getLogger("gateway.plan")

Load = Callable[[Artifact, ModelSettings], Awaitable[LoadedModel]]


def versions(config: Config, load: Load) -> list[WantedVersion]:
    """Everything the configuration wants served. Reads config.pbtxt files, not models.

    Raises:
        ConfigError: with every fault of every source.
    """
    if not config.models:
        raise ConfigError(
            [Fault(config.file or "command line", 0, "", "no model to serve: name a SOURCE, such as ./models")]
        )
    return [version for entry, model in find_models(config) for version in _versions_of(config, entry, model, load)]


def versions_of(config: Config, load: Load, name: str) -> list[WantedVersion]:
    """The versions of one model, read anew from its source; empty if no source has it.

    Raises:
        ConfigError: the model is broken.
    """
    found = find_model(config, name)
    return [] if found is None else settled(config, *found, load)


def settled(config: Config, entry: ModelEntry, model: FoundModel, load: Load) -> list[WantedVersion]:
    """The versions of a model that was found."""
    return list(_versions_of(config, entry, model, load))


def _versions_of(config: Config, entry: ModelEntry, model: FoundModel, load: Load) -> Iterator[WantedVersion]:
    stated = model.config
    settings = config.settings(entry, stated)
    if stated is not None and stated.ignored:
        log.info("model %s: config.pbtxt keys without effect here: %s", model.name, ", ".join(stated.ignored))
    for version, path in model.versions.items():
        yield WantedVersion(
            name=model.name,
            version=version,
            read=partial(read_model, path, model, version, settings.signing),
            load=partial(_load, load, settings),
            digest_pin=entry.digest,
            batching=settings.batching,
            max_batch_size=settings.max_batch_size,
            size_is_stated=settings.max_batch_size is not None,
            max_queue_delay_s=settings.max_queue_delay_s,
            preferred_batch_sizes=settings.preferred_batch_sizes,
            oversize=settings.oversize,
            max_queue_rows=settings.max_queue_rows,
            max_queue_bytes=settings.max_queue_bytes,
            deadline_s=settings.deadline_s,
            resilience=settings.resilience,
            logged=settings.logged,
            stated_inputs=stated.inputs if stated is not None else (),
            stated_outputs=stated.outputs if stated is not None else (),
            scheduling=stated.scheduling if stated is not None else PLAIN,
            config_text=stated.text if stated is not None else "",
            side_file=partial(read_side_file, model.directory or path),
            golden=partial(golden_of, config, entry, path),
        )


def read_model(path: Path, model: FoundModel, version: str, signing: Signing) -> tuple[Artifact, bytes | None]:
    """Files and sidecar of one version, read and checked, and its signature; blocks on the disk.

    Raises:
        ConfigError, OSError: as `read_version`.
        SourceError: its signature is not verified, and that is demanded.
    """
    artifact = read_version(model, version, path)
    verification = verify(path, artifact.files, signing, f"model {model.name} version {version}")
    artifact = replace(artifact, verification=verification.document())
    sidecar = _read_sidecar(path)
    manifest(artifact, {}, sidecar)  # a broken sidecar is known at load, not when somebody asks
    return artifact, sidecar


def golden_of(config: Config, entry: ModelEntry, directory: Path) -> GoldenFile | None:
    """The golden inputs of a version that lies in `directory`; blocks on the disk. Raises ConfigError."""
    keys = entry.golden
    if keys is None:
        return read_golden(None, None, directory)
    return read_golden(config.base / keys.file, Path(keys.file).name, directory, keys.rtol, keys.atol)


async def _load(load: Load, settings: ModelSettings, artifact: Artifact) -> LoadedModel:
    return await load(artifact, settings)


def manifest_of(version: ServedVersion) -> dict[str, Any]:
    """The manifest behind a version's digest, with the lineage its `provenance.json` gives. That of an ensemble lists
    the versions which its steps would meet now.

    Raises:
        NotReady: the version was never read, or a step's model is not there.
    """
    if version.artifact is None:
        raise NotReady(f"model '{version.name}' version {version.version} is not at ready state: {version.reason}")
    backends = version.origin() if version.origin is not None else []
    if not version.artifact.digest:
        return remote_manifest(version.artifact, backends)
    runtime = {"onnxruntime": metadata.version("onnxruntime"), "execution_provider": "CPUExecutionProvider"}
    facts = version.wanted.facts() if version.wanted.facts is not None else None
    document = manifest(version.artifact, runtime, version.sidecar, facts)
    if backends:
        document["backends"] = backends
    if isinstance(version.scheduler, Ensemble):
        document["steps"] = [
            {"model": name, "version": number, "digest": digest or None}
            for name, number, digest in version.scheduler.members()
        ]
    return document


def _read_sidecar(path: Path) -> bytes | None:
    """`provenance.json` of a version directory, if it has one; bounded, the manifest checks it against its hash."""
    try:
        with (path / SIDECAR).open("rb") as stream:
            return stream.read(MAX_SIDECAR_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
