"""The manifest says what was seen, what somebody stated, and what nobody knows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway.core.model import Artifact
from gateway.errors import ConfigError
from gateway.provenance.manifest import MAX_SIDECAR_BYTES, manifest
from gateway.registry.digest import read_artifact

RUNTIME = {"onnxruntime": "1.2.3"}


def artifact_with(folder: Path, sidecar: bytes | None) -> Artifact:
    (folder / "model.onnx").write_bytes(b"model")
    if sidecar is not None:
        (folder / "provenance.json").write_bytes(sidecar)
    return read_artifact(folder, "m", "3", source="./models/m")


def test_without_a_sidecar_lineage_is_unknown_never_guessed(tmp_path: Path) -> None:
    artifact = artifact_with(tmp_path, None)
    (file,) = artifact.files
    assert manifest(artifact, RUNTIME) == {
        "name": "m",
        "version": "3",
        "digest": artifact.digest,
        "files": [{"path": "model.onnx", "size": 5, "sha256": file.sha256}],
        "source": "./models/m",
        "immutable_id": None,
        "run_id": None,
        "git_commit": None,
        "runtime": RUNTIME,
        "unknown": ["immutable_id", "run_id", "git_commit"],
    }


def test_a_sidecar_adds_lineage_and_cannot_override_what_was_seen(tmp_path: Path) -> None:
    given = {
        "run_id": "r1",
        "git_commit": None,
        "digest": "sha256:0",
        "name": "evil",
        "dataset": {"uri": "x"},
    }
    sidecar = json.dumps(given).encode()
    artifact = artifact_with(tmp_path, sidecar)
    document = manifest(artifact, RUNTIME, sidecar)
    assert (document["name"], document["digest"], document["run_id"]) == ("m", artifact.digest, "r1")
    assert document["unknown"] == ["immutable_id", "git_commit"]
    assert document["given"] == {"digest": "sha256:0", "name": "evil", "dataset": {"uri": "x"}}
    json.dumps(document)


@pytest.mark.parametrize(
    ("sidecar", "expected"),
    [
        (b"{", "is not JSON"),
        (b"[]", "must be an object"),
        (b'{"run_id": 5}', "'run_id' must be text or null"),
        (b"[" * 5000, "is not JSON"),
        (b" " * (MAX_SIDECAR_BYTES + 1), "is larger than 64 KiB"),
    ],
)
def test_sidecars_that_are_refused(tmp_path: Path, sidecar: bytes, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        manifest(artifact_with(tmp_path, sidecar), RUNTIME, sidecar)


def test_what_the_registry_says_stands_before_the_sidecar_and_what_nobody_says_is_unknown(tmp_path: Path) -> None:
    artifact = artifact_with(tmp_path, b'{"run_id": "mine", "git_commit": "0a1b", "immutable_id": "m-1"}')
    registered = {"immutable_id": "m-1", "run_id": "theirs", "git_commit": None, "experiment": None, "datasets": None}
    found = manifest(artifact, RUNTIME, (tmp_path / "provenance.json").read_bytes(), registered)
    assert (found["immutable_id"], found["run_id"], found["git_commit"]) == ("m-1", "theirs", "0a1b")
    assert found["unknown"] == ["datasets", "experiment"]
    assert found["given"] == {"run_id": "mine"}, "what the sidecar says otherwise is not lost"
    assert (found["experiment"], found["digest"]) == (None, artifact.digest)


def test_a_sidecar_that_is_not_the_hashed_one_is_refused(tmp_path: Path) -> None:
    artifact = artifact_with(tmp_path, b'{"run_id": "a"}')
    with pytest.raises(ConfigError, match="changed while the model was read"):
        manifest(artifact, RUNTIME, b'{"run_id": "b"}')
    with pytest.raises(ConfigError, match="changed while the model was read"):
        manifest(artifact_with_nothing(tmp_path), RUNTIME, b"{}")


def artifact_with_nothing(folder: Path) -> Artifact:
    (folder / "other").mkdir()
    return artifact_with(folder / "other", None)
