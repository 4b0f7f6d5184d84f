"""A whole gateway whose data ports are encrypted."""

from __future__ import annotations

import json
import ssl
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc
import tritonclient.http

import gateway.demo
from tests.ingress.certificates import Certificates
from tests.live.gateway_process import GatewayProcess
from tests.live.gateway_process import gateway as started

MODELS = Path(gateway.demo.__file__).parent / "models"


def configuration(directory: Path, **tls: str) -> str:
    file = directory / "gateway.yaml"
    document = {"server": {"workers": 1, "tls": tls}, "defaults": {"instances": 1}, "models": [{"source": str(MODELS)}]}
    file.write_text(json.dumps(document))
    return str(file)


@pytest.mark.slow
def test_triton_clients_over_tls(tmp_path: Path) -> None:
    made = Certificates(tmp_path)
    file = configuration(tmp_path, cert="server.pem", key="server-key.pem")  # relative to the file
    with started("serve", "-c", file) as process:
        assert "https://" in process.output()
        assert "(TLS)" in process.output()
        grpc: Any = tritonclient.grpc.InferenceServerClient(
            f"127.0.0.1:{process.grpc_port}", ssl=True, root_certificates=str(made["ca"])
        )
        assert grpc.is_server_ready()
        assert grpc.get_model_metadata("digits").name == "digits"
        grpc.close()
        trust = ssl.create_default_context(cafile=str(made["ca"]))
        with urllib.request.urlopen(f"https://127.0.0.1:{process.port}/v2/models/digits", context=trust) as response:
            assert json.load(response)["name"] == "digits"
        assert process.stop() == 0


def test_a_file_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    file = configuration(tmp_path, cert="server.pem", key="server-key.pem")
    process = GatewayProcess("serve", "-c", file)
    try:
        assert process.process.wait(60) == 2
        fault = f"gateway.yaml:1: server.tls.cert: there is no file {tmp_path / 'server.pem'}"
        assert fault in " ".join(process.output().split())
    finally:
        process.close()
