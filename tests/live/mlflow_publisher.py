"""Runs in the environment of MLflow itself: logs and registers ONNX models the way a data scientist's script does.

One JSON object a line on stdin, one on stdout for each. The first line that is written says that it is ready.
"""

from __future__ import annotations

# mypy: disable-error-code="import-not-found,attr-defined"
import json
import sys
from typing import Any

import mlflow
import mlflow.onnx
import numpy as np
import onnx


def schema(listed: list[dict[str, Any]]) -> Any:
    return mlflow.types.Schema([mlflow.types.TensorSpec(np.dtype(t["dtype"]), t["shape"], t["name"]) for t in listed])


def publish(wanted: dict[str, Any]) -> dict[str, Any]:
    model = onnx.load(wanted["path"])
    signature = None
    if wanted["signature"]:
        inputs, outputs = (schema(wanted["signature"][side]) for side in ("inputs", "outputs"))
        signature = mlflow.models.ModelSignature(inputs=inputs, outputs=outputs)
    with mlflow.start_run() as run:
        if wanted["dataset"]:
            rows = np.arange(12, dtype=np.float32).reshape(3, 4)
            mlflow.log_input(mlflow.data.from_numpy(rows, name=wanted["dataset"]), context="training")
        for key, value in wanted["run_tags"].items():
            mlflow.set_tag(key, value)
        info = mlflow.onnx.log_model(
            model,
            name="model",
            registered_model_name=wanted["name"],
            signature=signature,
            save_as_external_data=wanted["external"],
            pip_requirements=["onnx"],  # else it runs the model to find out
        )
    client = mlflow.MlflowClient()
    version = str(info.registered_model_version)
    for key, value in wanted["tags"].items():
        client.set_model_version_tag(wanted["name"], version, key, value)
    if wanted["alias"]:
        client.set_registered_model_alias(wanted["name"], wanted["alias"], version)
    return {"version": version, "model_id": info.model_id, "run_id": run.info.run_id}


def alias(wanted: dict[str, Any]) -> dict[str, Any]:
    client = mlflow.MlflowClient()
    if wanted["version"]:
        client.set_registered_model_alias(wanted["name"], wanted["alias"], wanted["version"])
    else:
        client.delete_registered_model_alias(wanted["name"], wanted["alias"])
    return {}


def webhook(wanted: dict[str, Any]) -> dict[str, Any]:
    events: list[Any] = ["model_version_alias.created", "model_version_alias.deleted"]
    mlflow.MlflowClient().create_webhook("moved", wanted["url"], events, secret=wanted["secret"])
    return {}


def sklearn(wanted: dict[str, Any]) -> dict[str, Any]:
    """A model that is a pickle."""
    import mlflow.sklearn  # slow, and only for this
    from sklearn.linear_model import LinearRegression

    fitted = LinearRegression().fit(np.arange(4.0).reshape(4, 1), np.arange(4.0))
    with mlflow.start_run() as run:
        info = mlflow.sklearn.log_model(
            fitted,
            name="model",
            registered_model_name=wanted["name"],
            serialization_format="pickle",
            pip_requirements=["scikit-learn"],
        )
    return {"version": str(info.registered_model_version), "model_id": info.model_id, "run_id": run.info.run_id}


def main() -> None:
    mlflow.set_tracking_uri(sys.argv[1])
    answer = sys.stdout
    sys.stdout = sys.stderr  # MLflow prints
    print(json.dumps({"ready": True}), file=answer, flush=True)
    actions = {"publish": publish, "alias": alias, "webhook": webhook, "sklearn": sklearn}
    for line in sys.stdin:
        wanted = json.loads(line)
        try:
            said = actions[wanted.pop("do")](wanted)
        except Exception as error:
            said = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(said), file=answer, flush=True)


if __name__ == "__main__":
    main()
