"""Models from an OCI registry, an S3 store and a Hub, served by a real gateway: verified, pinned, with provenance."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.registry.digest import read_artifact
from tests.live.docker_registry import docker_registry
from tests.live.gateway_process import GatewayProcess
from tests.live.s3_server import ACCESS_KEY, SECRET_KEY, s3_server
from tests.registry.hub_server import Hub, HubServer
from tests.registry.onnx_models import save, scaled
from tests.registry.test_signing import keys, sign

pytestmark = pytest.mark.slow

INPUT = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 1, 1, 1]}]}


@contextmanager
def gateway(folder: Path, config: dict[str, Any], env: dict[str, str] | None = None) -> Iterator[GatewayProcess]:
    path = folder / "gateway.yaml"
    path.write_text(json.dumps(config))  # YAML holds JSON
    process = GatewayProcess("serve", "-c", str(path), "--workers", "1", "--instances", "1", env=env)
    try:
        yield process
    finally:
        process.close()


def files_of(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def provenance(process: GatewayProcess, model: str) -> Any:
    status, _, body = process.request("GET", f"/v2/models/{model}/provenance")
    assert status == 200, body
    return json.loads(body)


def test_a_signed_model_with_external_data_from_every_source(tmp_path: Path) -> None:
    private, _ = keys(tmp_path, "ours")
    version = save(tmp_path / "made", scaled(2.0), "weights.bin")
    sign(version, private)
    files, digest = files_of(version), read_artifact(version, "m", "1").digest
    hub = Hub()
    commit = hub.commit(files)
    with docker_registry() as registry, s3_server() as store, HubServer(hub):
        pushed = registry.push("team/digits", "v1", [registry.file("team/digits", n, c) for n, c in files.items()])
        store.bucket("models", versioned=True)
        for name, content in files.items():
            store.put("models", f"digits/3/{name}", content)
        secret = tmp_path / "secret"
        secret.write_text(SECRET_KEY + "\n")
        s3 = {"endpoint": store.endpoint, "region": "us-east-1"}
        config = {
            "registries": {
                "cache": "cache",
                "s3": {**s3, "access_key": "env:S3_KEY", "secret_key": "file:secret"},
                "oci": {"hosts": {registry.host: {}}},
                "huggingface": {"url": hub.url},
            },
            "defaults": {"verification": "enforce", "signature": {"public_key": "ours.pub"}},
            "models": [
                {"name": "oci", "source": f"oci://{registry.host}/team/digits:v1", "digest": digest},
                {"name": "s3", "source": "s3://models/digits/3", "digest": digest},
                {"name": "hub", "source": "hf://acme/digits@main", "digest": digest},
                {"name": "here", "source": str(version / "model.onnx"), "verification": "off"},
            ],
        }
        with gateway(tmp_path, config, {"S3_KEY": ACCESS_KEY}) as process:
            process.wait_started()
            for model in ("oci", "s3", "hub", "here"):
                status, headers, answer = process.infer(model, INPUT)
                assert (status, answer["outputs"][0]["data"]) == (200, [8.0, 8.0, 8.0])
                assert f'digest="{digest}"' in headers["inference-model"] or model == "here"
            found = {model: provenance(process, model) for model in ("oci", "s3", "hub")}
            assert {document["verification"]["status"] for document in found.values()} == {"verified"}
            assert found["oci"]["source"] == f"oci://{registry.host}/team/digits@{pushed}"
            assert found["s3"]["source"].startswith("s3://models/digits/3?versions=")
            assert found["hub"]["source"] == f"hf://acme/digits@{commit}"
            assert provenance(process, "here")["verification"]["status"] == "unchecked"
            assert SECRET_KEY not in process.output() + json.dumps(found)


def test_a_model_that_was_changed_after_it_was_signed_is_not_served(tmp_path: Path) -> None:
    private, _ = keys(tmp_path, "ours")
    version = save(tmp_path / "made", scaled(2.0), "weights.bin")
    sign(version, private)
    save(version, scaled(5.0), "weights.bin")
    with docker_registry() as registry:
        layers = [registry.file("digits", name, content) for name, content in files_of(version).items()]
        registry.push("digits", "v1", layers)
        config = {
            "registries": {"cache": "cache", "oci": {"hosts": {registry.host: {}}}},
            "models": [
                {
                    "source": f"oci://{registry.host}/digits:v1",
                    "verification": "enforce",
                    "signature": {"public_key": "ours.pub"},
                }
            ],
        }
        with gateway(tmp_path, config) as process:
            assert process.process.wait(120) == 4
            assert "weights.bin was changed" in process.output()
