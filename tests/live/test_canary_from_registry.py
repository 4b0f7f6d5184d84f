"""A canary and a shadow that come from a real MLflow registry: they follow their aliases, and the canary takes over.

Each version multiplies by a number of its own, so an answer tells which version made it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gateway.provenance.headers import parse
from tests.live.gateway_process import GatewayProcess, gateway, until
from tests.live.mlflow_server import MlflowServer, mlflow
from tests.live.test_canary_and_shadow import times

__all__ = ["mlflow"]

NAME = "canary-test"


def command(process: GatewayProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    url = f"http://127.0.0.1:{process.operations_port}"
    return subprocess.run(
        [sys.executable, "-m", "gateway", "models", *arguments, "--ops-url", url],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def split(process: GatewayProcess) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(process.operations(f"/api/models/{NAME}/split"))
    return found


def ask(process: GatewayProcess, variant: str = "") -> tuple[str, str, str]:
    """(version, variant, shadow) of an answer, which fits the version's number."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}
    headers = {"X-Variant": variant} if variant else {}
    path = f"/v2/models/{NAME}/infer"
    code, told, body = process.request("POST", path, json.dumps({"inputs": [tensor]}).encode(), headers)
    assert code == 200, body
    provenance = parse(told.items())
    assert provenance.model is not None
    assert provenance.model.digest.startswith("sha256:")
    assert json.loads(body)["outputs"][0]["data"][0] == float(provenance.model.version)
    shadow = provenance.shadow.version if provenance.shadow is not None else ""
    return provenance.model.version, provenance.model.variant, shadow


@pytest.mark.slow
def test_variants_follow_their_aliases_and_the_canary_takes_over(mlflow: MlflowServer, tmp_path: Path) -> None:
    for number, alias in ((1, "champion"), (2, "challenger"), (3, "")):
        assert mlflow.publish(NAME, times(float(number)), alias=alias).version == str(number)
    config = tmp_path / "gateway.yaml"
    config.write_text(
        json.dumps(
            {
                "registries": {
                    "cache": str(tmp_path / "cache"),
                    "lock": str(tmp_path / "models.lock"),
                    "mlflow": {"url": mlflow.url},
                },
                "models": [
                    {
                        "source": f"models:/{NAME}@champion",
                        "poll_interval_s": 0.5,
                        "canary": {"source": f"models:/{NAME}@challenger", "header": {"X-Variant": "canary"}},
                        "shadow": {"source": f"models:/{NAME}/3"},
                    }
                ],
            }
        )
    )
    with gateway("serve", "-c", str(config), "--workers", "1") as process:
        assert ask(process)[:2] == ("1", "champion")
        until(lambda: ask(process)[2] == "3", 60, "nothing was mirrored")
        assert ask(process, "canary") == ("2", "canary", "")

        fourth = mlflow.publish(NAME, times(4.0), alias="challenger")
        until(lambda: ask(process, "canary")[0] == fourth.version, 60, "the canary did not follow its alias")
        assert ask(process)[:2] == ("1", "champion")

        done = command(process, "promote", NAME)
        assert done.returncode == 0, done.stderr
        assert ask(process)[:2] == (fourth.version, "champion")
        after = split(process)
        assert after["champion"] == fourth.version
        assert "is what the model's name means already" in after["canary"]["reason"]
        assert ask(process, "canary")[0] == fourth.version
        until(lambda: ask(process)[2] == "3", 60, "the shadow does not follow the new champion")

        assert command(process, "rollback", NAME).returncode == 0
        until(lambda: ask(process)[0] == "1", 60, "the rollback did not happen")
        until(lambda: ask(process, "canary")[0] == fourth.version, 60, "the canary did not come back")
        refused = command(process, "promote", "nobody")
        assert refused.returncode == 1
        assert "no canary" in refused.stderr

        assert command(process, "promote", NAME).returncode == 0
        assert process.stop() == 0
    with gateway("serve", "-c", str(config), "--workers", "1") as process:
        assert ask(process)[:2] == (fourth.version, "champion"), "a promotion outlives the process"
        mlflow.publish(NAME, times(5.0), alias="champion")
        until(lambda: ask(process)[0] == "5", 60, "the alias is not followed any more")
