"""`gateway convert` with real scikit-learn models and with pickles that do what pickles can."""

from __future__ import annotations

import json
import os
import pickle
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from gateway import conversion
from gateway.cli import app
from gateway.conversion import Bounds, convert
from gateway.errors import ConfigError
from gateway.provenance.manifest import manifest
from gateway.registry.digest import read_artifact
from gateway.workers.session import Session

joblib = pytest.importorskip("joblib", reason="needs pip install 'oip-gateway[convert]'")
pytest.importorskip("skl2onnx", reason="needs pip install 'oip-gateway[convert]'")


class Runs:
    """A pickle that calls a function when it is opened."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def pickled(path: Path, thing: Any) -> Path:
    path.write_bytes(pickle.dumps(thing))
    return path


def model(path: Path, labels: bool = True) -> tuple[Path, Any]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows = np.random.default_rng(0).standard_normal((200, 5))
    fitted = make_pipeline(StandardScaler(), LogisticRegression()).fit(rows, np.where(rows[:, 0] > 0, "yes", "no"))
    joblib.dump(fitted, path)
    return path, fitted


def test_nothing_is_opened_unless_it_is_trusted(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    source = pickled(tmp_path / "m.pkl", Runs(Path.touch, touched))
    result = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "model.onnx")])
    assert isinstance(result.exception, ConfigError)
    assert "--i-trust-this-pickle" in str(result.exception)
    assert not touched.exists()


def test_places_are_checked_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pickled(tmp_path / "m.pkl", 1)
    (tmp_path / "old.onnx").touch()
    (tmp_path / "v" / "1").mkdir(parents=True)
    (tmp_path / "v" / "1" / "provenance.json").touch()
    for place, target, why in (
        (tmp_path / "none.pkl", tmp_path / "a.onnx", "no such file"),
        (pickled(tmp_path / "m.bin", 1), tmp_path / "a.onnx", "only scikit-learn"),
        (source, tmp_path / "a.bin", "does not end in"),
        (source, tmp_path / "old.onnx", "exists already"),
        (source, tmp_path / "v" / "1" / "model.onnx", "provenance.json exists already"),
    ):
        with pytest.raises(ConfigError, match=why):
            convert(place, target)
    monkeypatch.setattr(conversion, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"oip-gateway\[convert\]"):
        convert(source, tmp_path / "a.onnx")


@pytest.mark.slow
def test_a_classifier_becomes_a_model_that_answers_the_same_and_says_where_it_comes_from(tmp_path: Path) -> None:
    source, fitted = model(tmp_path / "salary.joblib")
    target = tmp_path / "models" / "salary" / "1" / "model.onnx"
    done = convert(source, target)
    assert done.figures[0] == "predict: 512 of 512 answers are equal"
    rows = np.random.default_rng(1).standard_normal((3, 5)).astype(np.float32)
    session = Session(target.read_bytes(), 1)
    feeds = session.feeds([(0, rows.shape, rows.data.cast("B"))])
    _, probabilities = session.run(feeds, session.output_names((0, 1)))
    assert np.allclose(probabilities, fitted.predict_proba(rows), atol=1e-5)
    artifact = read_artifact(target.parent, "salary", "1")
    document = manifest(artifact, {}, (target.parent / "provenance.json").read_bytes())
    assert document["given"]["converted_from"]["sha256"] == done.sha256
    assert document["given"]["converter"]["skl2onnx"]


@pytest.mark.slow
def test_the_pickle_runs_elsewhere_without_network_environment_and_for_a_while_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    script = tmp_path / "found.txt"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = (
            "import os, socket, json\n"
            "probe = socket.socket()\n"
            "probe.settimeout(5)\n"
            f"found = {{'pid': os.getpid(), 'net': probe.connect_ex(('127.0.0.1', {port})),"
            " 'env': sorted(os.environ), 'cwd': os.getcwd()}\n"
            f"open({str(script)!r}, 'w').write(json.dumps(found))\n"
        )
        with pytest.raises(ConfigError, match="not a scikit-learn model"):
            convert(pickled(tmp_path / "m.pkl", Runs(exec, code)), tmp_path / "a.onnx")
    found = json.loads(script.read_text())
    assert found["pid"] != os.getpid()
    assert found["net"] != 0
    assert "AWS_SECRET_ACCESS_KEY" not in found["env"]
    assert "gateway-convert-" in found["cwd"]
    assert not Path(found["cwd"]).exists()
    assert not (tmp_path / "a.onnx").exists()
    endless = pickled(tmp_path / "endless.pkl", Runs(exec, "while True: pass"))
    with pytest.raises(ConfigError, match=r"--time-s|ended with signal"):
        convert(endless, tmp_path / "a.onnx", bounds=Bounds(time_s=3))
    greedy = pickled(tmp_path / "greedy.pkl", Runs(bytes, 8 * 2**30))
    with pytest.raises(ConfigError, match="--memory-mb"):
        convert(greedy, tmp_path / "a.onnx", bounds=Bounds(memory_mb=4096))


@pytest.mark.slow
def test_a_model_that_answers_differently_is_not_written(tmp_path: Path) -> None:
    source, _ = model(tmp_path / "m.joblib")
    target = tmp_path / "1" / "model.onnx"
    with pytest.raises(ConfigError, match="does not answer as the original"):
        convert(source, target, bounds=Bounds(tolerance=0.0))
    assert not target.parent.exists()
