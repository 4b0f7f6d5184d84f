"""The manifest behind a digest: which files, from where, made by which run, executed by what.

Rules: pure. What the gateway saw itself (files, digest, source, runtime) stands at the top level and cannot be
overridden; lineage is only what somebody stated in the sidecar `provenance.json` of the version directory, which is
covered by the digest like every file. What nobody stated is null and named under `unknown`, never guessed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson

from gateway.core.model import Artifact
from gateway.errors import ConfigError, Fault

SIDECAR: Final = "provenance.json"
MAX_SIDECAR_BYTES: Final = 64 * 1024
LINEAGE: Final = ("immutable_id", "run_id", "git_commit")
"""Keys of the sidecar with a meaning; all others are passed on under `given`."""


def manifest(
    artifact: Artifact,
    runtime: Mapping[str, str],
    sidecar: bytes | None = None,
    registered: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest of one model version, ready for JSON.

    Args:
        artifact: the version as it was read.
        runtime: what executes it, for instance `{"onnxruntime": "1.20.1"}`.
        sidecar: content of the version's `provenance.json`, if it has one.
        registered: what the registry says that the version comes from, None where it says nothing; it stands before
            what the sidecar says.

    Raises:
        ConfigError: the sidecar is not what was hashed, too large, or not an object with texts under the known keys.
    """
    given = _read_sidecar(artifact, sidecar) if sidecar is not None else {}
    lineage: dict[str, str | None] = {key: given.pop(key, None) for key in LINEAGE}
    document: dict[str, Any] = {
        "name": artifact.name,
        "version": artifact.version,
        "digest": artifact.digest,
        "files": [{"path": f.path, "size": f.size, "sha256": f.sha256} for f in artifact.files],
        "source": artifact.source,
        **lineage,
        "runtime": dict(runtime),
        "unknown": [key for key, value in lineage.items() if value is None],
    }
    if artifact.verification is not None:
        document["verification"] = dict(artifact.verification)
    if registered is not None:
        given |= _add_registered(document, registered, lineage)
    if given:
        document["given"] = given
    return document


def _add_registered(
    document: dict[str, Any], registered: Mapping[str, Any], stated: Mapping[str, str | None]
) -> dict[str, str]:
    """Put what a registry says into the manifest; returns what the sidecar said otherwise."""
    merged = {key: stated.get(key) if value is None else value for key, value in registered.items()}
    document.update(merged)
    document["unknown"] = sorted(key for key, value in merged.items() if value is None)
    return {key: text for key, text in stated.items() if text is not None and text != merged.get(key, text)}


def remote_manifest(artifact: Artifact, backends: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is known of a version that only remote servers have: no file of it is here, so there is no digest."""
    return {
        "name": artifact.name,
        "version": artifact.version,
        "digest": None,
        "files": None,
        "source": artifact.source,
        "backends": list(backends),
        "unknown": ["digest", "files", *LINEAGE],
    }


def _read_sidecar(artifact: Artifact, sidecar: bytes) -> dict[str, Any]:
    def refused(message: str) -> ConfigError:
        return ConfigError([Fault(f"{artifact.name}/{artifact.version}/{SIDECAR}", 0, "", message)])

    if len(sidecar) > MAX_SIDECAR_BYTES:
        raise refused(f"is larger than {MAX_SIDECAR_BYTES // 1024} KiB")
    listed = next((file.sha256 for file in artifact.files if file.path == SIDECAR), None)
    if listed != hashlib.sha256(sidecar).hexdigest():
        raise refused("changed while the model was read; load the model again")
    try:
        given = orjson.loads(sidecar)
    except orjson.JSONDecodeError as error:
        raise refused(f"is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise refused('must be an object, for example {"run_id": "8f3a", "git_commit": "0a1b2c"}')
    for key in LINEAGE:
        if given.get(key) is not None and not isinstance(given[key], str):
            raise refused(f"'{key}' must be text or null")
    return given
