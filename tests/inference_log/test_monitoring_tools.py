"""The real Evidently and NannyML, each in an environment of its own, read what was exported for them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway.inference_log.exporting import Selection, export_log
from gateway.inference_log.flattening import Roles
from gateway.inference_log.frame import Column, Requests
from gateway.inference_log.store import Store
from tests.inference_log.log_on_disk import event, ids, write
from tests.inference_log.log_rows import NOON, requests
from tests.live import venvs

pytestmark = pytest.mark.slow

EVIDENTLY = """
import json, sys, pandas
from evidently import DataDefinition, Dataset, MulticlassClassification, Report
from evidently.presets import DataDriftPreset
known = json.load(open(sys.argv[1] + "/export.json"))["files"][0]
frame = pandas.read_csv(sys.argv[1] + "/" + known["path"], parse_dates=["timestamp"])
names = known["settings"]["numerical_features"]
definition = DataDefinition(numerical_columns=names, timestamp=known["settings"]["timestamp"])
half = len(frame) // 2
reference, current = (Dataset.from_pandas(part, definition) for part in (frame[:half], frame[half:]))
result = Report([DataDriftPreset(columns=names)]).run(current, reference).dict()
names_of = lambda metric: str(metric.get("metric_name") or metric.get("metric_id"))
counted = [metric["value"] for metric in result["metrics"] if "DriftedColumnsCount" in names_of(metric)]
print(json.dumps({"rows": len(frame), "drifted": counted[0]["count"]}))
"""
NANNYML = """
import json, sys, nannyml, pandas
known = json.load(open(sys.argv[1] + "/export.json"))["files"][0]
frame = pandas.read_parquet(sys.argv[1] + "/" + known["path"])
frame["timestamp"] = frame["timestamp"].dt.tz_localize(None)
arguments = known["settings"]["nannyml"]
half = len(frame) // 2
reference, analysis = frame[:half], frame[half:]
estimator = nannyml.CBPE(metrics=["accuracy"], chunk_size=500, **arguments).fit(reference)
estimated = estimator.estimate(analysis.drop(columns=["target"])).filter(period="analysis").to_df()
realised = (analysis[arguments["y_pred"]] == analysis[arguments["y_true"]]).mean()
found = {"estimated": float(estimated[("accuracy", "value")].mean()), "realised": float(realised)}
print(json.dumps({"rows": len(frame)} | found))
"""


def calibrated(count: int, classes: int) -> tuple[Requests, list[int]]:
    """Requests whose labels follow the probabilities that were answered; the inputs drift half-way."""
    dice = np.random.default_rng(11)
    inputs = dice.normal(size=(count, 3)).astype("<f4")
    inputs[count // 2 :, 1] += 3
    answers = dice.dirichlet([0.5] * classes, count).astype("<f4")
    labels = [int(dice.choice(classes, p=p / p.sum())) for p in answers.astype("f8")]
    made = requests(range(count))
    rows = [row._replace(received=100.0 + n) for n, row in enumerate(made.rows)]
    x = Column("x", "FP32", None, [(1, 3)], inputs.tobytes(), None, "keep", None)
    y = Column("proba", "FP32", None, [(1, classes)], answers.tobytes(), None, "keep", None)
    return Requests(NOON * 10**9, 100.0, "digits", "3", "sha256:aa", "", made.batches, rows, [x], [y]), labels


def exported(tmp_path: Path, form: str, classes: int) -> Path:
    made, labels = calibrated(4000, classes)
    said = [
        event("feedback", "label", {"request_id": one, "row": None, "label": label, "at_us": 1, "idempotency_key": one})
        for one, label in zip(ids(made), labels, strict=True)
    ]
    write(tmp_path / "log", [made, *said])
    export_log(Store(tmp_path / "log"), form, tmp_path / "out", Selection(), Roles())
    return tmp_path / "out"


def run(program: Callable[[], venvs.Program], code: str, directory: Path) -> dict[str, Any]:
    python = venvs.need(program)
    done = subprocess.run(
        [python.path, "-W", "ignore", "-c", code, str(directory)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def test_evidently_sees_the_one_column_that_drifts(tmp_path: Path) -> None:
    found = run(venvs.evidently, EVIDENTLY, exported(tmp_path, "evidently", 3))
    assert found == {"rows": 4000, "drifted": 1}


@pytest.mark.parametrize("classes", [2, 3])
def test_nannyml_estimates_what_the_labels_say(tmp_path: Path, classes: int) -> None:
    found = run(venvs.nannyml, NANNYML, exported(tmp_path, "nannyml", classes))
    assert found["rows"] == 4000
    assert found["estimated"] == pytest.approx(found["realised"], abs=0.05)
