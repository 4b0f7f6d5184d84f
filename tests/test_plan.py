"""The plan: what a configuration wants served, settled before anything is loaded, or every fault at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import pytest

from gateway import plan
from gateway.catalog import ServedVersion
from gateway.config import Config, ModelSettings
from gateway.config import load as load_config
from gateway.core.model import Artifact
from gateway.errors import ConfigError, NotReady
from gateway.loading import LoadedModel, WantedVersion
from tests.live import models

LINEAR = models.linear()
NOTE = '{"run_id": "8f3a", "git_commit": "0a1b2c", "trained_by": "nightly"}'


class Loader:
    """Stands for the worker pool: remembers what it was asked to load."""

    def __init__(self) -> None:
        self.asked: list[tuple[Artifact, ModelSettings]] = []

    async def __call__(self, artifact: Artifact, settings: ModelSettings) -> LoadedModel:
        self.asked.append((artifact, settings))
        raise AssertionError("planning loads nothing")


def planned(config: Config) -> list[WantedVersion]:
    return plan.versions(config, Loader())


def from_file(directory: Path, text: str, environ: Mapping[str, str] | None = None) -> Config:
    (directory / "gateway.yaml").write_text(text)
    return load_config(directory / "gateway.yaml", {}, environ or {})


def faults_of(config: Config) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        planned(config)
    return [str(fault) for fault in caught.value.faults]


def labels(wanted: list[WantedVersion]) -> list[str]:
    return [f"{version.name}/{version.version}" for version in wanted]


def versioned(root: Path, name: str, versions: tuple[str, ...], config: str = "") -> Path:
    for version in versions:
        directory = root / name / version
        directory.mkdir(parents=True)
        (directory / "model.onnx").write_bytes(models.linear(seed=int(version)))
    if config:
        (root / name / "config.pbtxt").write_text(config)
    return root


def test_a_repository_and_a_file_side_by_side(tmp_path: Path) -> None:
    models.repository(tmp_path / "repository", {"b": LINEAR, "a": LINEAR})
    (tmp_path / "single.onnx").write_bytes(LINEAR)
    config = Config().with_sources([str(tmp_path / "repository"), str(tmp_path / "single.onnx")])
    assert labels(planned(config)) == ["a/1", "b/1", "single/1"]


def test_a_single_file_is_read_like_a_version_directory(tmp_path: Path) -> None:
    models.repository(tmp_path / "repository", {"m": LINEAR})
    (tmp_path / "m2.onnx").write_bytes(LINEAR)
    config = Config().with_sources([str(tmp_path / "repository"), str(tmp_path / "m2.onnx")])
    (in_directory, _), (alone, sidecar) = [version.read() for version in planned(config)]
    assert alone.model == in_directory.model == LINEAR
    assert alone.digest == in_directory.digest
    assert sidecar is None


def test_every_fault_of_every_source_at_once(tmp_path: Path) -> None:
    models.repository(tmp_path / "a", {"good": LINEAR, "broken": LINEAR}, {"broken": "max_batch_size: no"})
    (tmp_path / "a" / "unversioned").mkdir()
    (tmp_path / "a" / "unversioned" / "model.onnx").write_bytes(LINEAR)
    (tmp_path / "a name.onnx").write_bytes(LINEAR)
    (tmp_path / "empty").mkdir()
    config = from_file(tmp_path, "models:\n  - {source: a}\n  - {source: 'a name.onnx'}\n  - {source: empty}\n")
    found = faults_of(config)
    assert len(found) == 4, found
    for part, fault in zip(("max_batch_size", "unversioned", "a name", "empty"), found, strict=True):
        assert part in fault
    assert "config.pbtxt:1" in found[0]


def test_nothing_to_serve_is_a_fault() -> None:
    (fault,) = faults_of(Config())
    assert "name a SOURCE" in fault


def test_two_sources_cannot_claim_one_name(tmp_path: Path) -> None:
    models.repository(tmp_path / "a", {"m": LINEAR, "other": LINEAR})
    models.repository(tmp_path / "b", {"m": LINEAR})
    (fault,) = faults_of(from_file(tmp_path, "models:\n  - {source: a}\n  - {source: b}\n"))
    assert "gateway.yaml:3: models[1]" in fault
    assert "model 'm' is already served from a" in fault


def test_the_same_source_twice_is_found_even_if_it_is_the_same_text(tmp_path: Path) -> None:
    source = str(models.repository(tmp_path, {"m": LINEAR}))
    (fault,) = faults_of(Config().with_sources([source, source]))
    assert "model 'm' is already served from" in fault


def test_what_check_refuses_is_refused_here_too(tmp_path: Path) -> None:
    """`preferred_batch_sizes` and `max_batch_size` come from different files, so no one file is wrong."""
    models.repository(tmp_path / "a", {"m": LINEAR}, {"m": "max_batch_size: 4"})
    (fault,) = faults_of(from_file(tmp_path, "models:\n  - {source: a, preferred_batch_sizes: [8]}\n"))
    assert "models[0].preferred_batch_sizes: 8 is more than max_batch_size of model 'm', which is 4" in fault


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("", ["3"]),
        ("version_policy: { latest: { num_versions: 2 } }", ["2", "3"]),
        ("version_policy: { all: {} }", ["1", "2", "3"]),
        ("version_policy: { specific: { versions: [ 3, 1 ] } }", ["1", "3"]),
    ],
)
def test_version_policies(tmp_path: Path, policy: str, expected: list[str]) -> None:
    versioned(tmp_path, "m", ("1", "2", "3"), policy)
    wanted = planned(Config().with_sources([str(tmp_path)]))
    assert [version.version for version in wanted] == expected
    for version in wanted:
        assert version.read()[0].model == models.linear(seed=int(version.version))


def test_a_version_that_does_not_exist_is_a_fault(tmp_path: Path) -> None:
    versioned(tmp_path, "m", ("1",), "version_policy: { specific: { versions: [ 1, 7 ] } }")
    (fault,) = faults_of(Config().with_sources([str(tmp_path)]))
    assert "version 7 does not exist" in fault


def test_name_renames_a_model(tmp_path: Path) -> None:
    models.repository(tmp_path, {"m": LINEAR})
    (tmp_path / "file.onnx").write_bytes(LINEAR)
    config = from_file(
        tmp_path,
        "models:\n  - {source: m, name: first}\n  - {source: m, name: second}\n  - {source: file.onnx, name: f}",
    )
    wanted = planned(config)
    assert labels(wanted) == ["first/1", "second/1", "f/1"]
    assert [version.read()[0].name for version in wanted] == ["first", "second", "f"]


def test_settings_come_from_the_entry_then_config_pbtxt_then_defaults(tmp_path: Path) -> None:
    stated = (
        "max_batch_size: 8\n"
        'input [ { name: "x", data_type: TYPE_FP32, dims: [ 16 ] } ]\n'
        "dynamic_batching { preferred_batch_size: [ 4, 2 ], max_queue_delay_microseconds: 1500 }"
    )
    models.repository(tmp_path / "a", {"m": LINEAR}, {"m": stated})
    models.repository(tmp_path / "b", {"n": LINEAR})
    config = from_file(
        tmp_path,
        "defaults: {deadline_ms: 500, max_queue_delay_ms: 9}\n"
        f"models:\n  - {{source: a, digest: 'sha256:{'1' * 64}', batching: 'on', max_queue_rows: 100}}\n"
        "  - {source: b}\n",
    )
    m, n = planned(config)
    assert (m.max_batch_size, m.size_is_stated, m.oversize, m.batching) == (8, True, "reject", "on")
    assert (m.preferred_batch_sizes, m.max_queue_delay_s, m.deadline_s) == ((2, 4), 0.0015, 0.5)
    assert (m.max_queue_rows, m.digest_pin) == (100, "sha256:" + "1" * 64)
    assert [(tensor.name, tensor.dims) for tensor in m.stated_inputs] == [("x", (16,))]
    assert (n.max_batch_size, n.size_is_stated, n.oversize, n.batching) == (None, False, "split", "auto")
    assert (n.max_queue_delay_s, n.deadline_s, n.digest_pin) == (0.009, 0.5, None)
    assert n.stated_inputs == n.stated_outputs == ()


async def test_load_gets_the_artifact_and_its_settings(tmp_path: Path) -> None:
    models.repository(tmp_path, {"m": LINEAR}, {"m": "instance_group [ { count: 3, kind: KIND_CPU } ]"})
    loader = Loader()
    (wanted,) = plan.versions(Config().with_sources([str(tmp_path)]), loader)
    artifact, _ = wanted.read()
    with pytest.raises(AssertionError, match="loads nothing"):
        await wanted.load(artifact)
    ((asked, settings),) = loader.asked
    assert asked is artifact
    assert settings.instances == 3


def served(wanted: WantedVersion) -> ServedVersion:
    version = ServedVersion(wanted)
    version.artifact, version.sidecar = wanted.read()
    return version


def with_sidecar(tmp_path: Path, content: str) -> WantedVersion:
    models.repository(tmp_path, {"m": LINEAR})
    (tmp_path / "m" / "1" / "provenance.json").write_text(content)
    (wanted,) = planned(Config().with_sources([str(tmp_path)]))
    return wanted


def test_the_manifest_holds_files_runtime_and_lineage(tmp_path: Path) -> None:
    version = served(with_sidecar(tmp_path, NOTE))
    document = plan.manifest_of(version)
    assert version.artifact is not None
    assert document["digest"] == version.artifact.digest
    assert [file["path"] for file in document["files"]] == ["model.onnx", "provenance.json"]
    assert (document["run_id"], document["git_commit"], document["unknown"]) == ("8f3a", "0a1b2c", ["immutable_id"])
    assert document["given"] == {"trained_by": "nightly"}
    assert document["runtime"]["onnxruntime"] == metadata.version("onnxruntime")
    assert json.loads(json.dumps(document)) == document


def test_the_manifest_is_of_the_bytes_that_were_read(tmp_path: Path) -> None:
    version = served(with_sidecar(tmp_path, NOTE))
    (tmp_path / "m" / "1" / "provenance.json").write_text('{"run_id": "other"}')
    assert plan.manifest_of(version)["run_id"] == "8f3a"


@pytest.mark.parametrize("content", ["{", "[]", '{"run_id": 7}', '"' + "x" * 70_000 + '"'])
def test_a_sidecar_that_makes_no_sense_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigError, match=r"m/1/provenance\.json"):
        plan.manifest_of(served(with_sidecar(tmp_path, content)))


def test_no_manifest_of_what_was_never_read(tmp_path: Path) -> None:
    models.repository(tmp_path, {"m": LINEAR})
    (wanted,) = planned(Config().with_sources([str(tmp_path)]))
    with pytest.raises(NotReady, match="model 'm' version 1 is not at ready state"):
        plan.manifest_of(ServedVersion(wanted))
