"""`mlserver infer`, MLServer's own batch client, unchanged against a whole gateway."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.live import models, venvs
from tests.live.gateway_process import GatewayProcess, gateway

pytestmark = pytest.mark.slow
MODELS = {"linear": models.whole_linear(), "words": models.identity("BYTES"), "counts": models.identity("INT64")}
WEIGHTS = np.random.default_rng(11).integers(-9, 10, (6, 3)).astype(np.float32)
"""Those of `models.whole_linear`."""


@pytest.fixture(scope="module")
def mlserver() -> venvs.Program:
    return venvs.need(venvs.mlserver)


@pytest.fixture(scope="module")
def served(mlserver: venvs.Program, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    root = models.repository(tmp_path_factory.mktemp("mlserver"), MODELS)
    with gateway("serve", str(root), "--workers", "2") as process:
        yield process


def infer(
    mlserver: venvs.Program,
    served: GatewayProcess,
    model: str,
    folder: Path,
    lines: list[Any],
    *more: str,
) -> list[dict[str, Any]]:
    """One answer for each line of the file that it is given, in that order."""
    asked, answered = folder / "asked.json", folder / "answered.json"
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    address = f"127.0.0.1:{served.port}"
    done = mlserver.run("infer", "-u", address, "-m", model, "-i", str(asked), "-o", str(answered), "-r", "1", *more)
    assert done.returncode == 0, done.stdout
    answers = [json.loads(line) for line in answered.read_text().splitlines()]
    assert len(answers) == len(lines), done.stdout
    return sorted(answers, key=lambda answer: int(answer["parameters"]["batch_index"]))


def rows(first: int, count: int) -> np.ndarray[Any, Any]:
    return np.arange(first, first + count * 6, dtype=np.float32).reshape(count, 6)


def request(x: np.ndarray[Any, Any], **more: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()}], **more}


@pytest.mark.parametrize("binary", [False, True])
def test_every_line_gets_its_own_answer(
    mlserver: venvs.Program, served: GatewayProcess, tmp_path: Path, binary: bool
) -> None:
    lines = [request(rows(number, 1 + number % 3)) for number in range(40)]
    lines[7] |= {"id": "mine", "outputs": [{"name": "y"}]}
    answers = infer(mlserver, served, "linear", tmp_path, lines, "-w", "8", *(["-b"] if binary else []))
    for number, answer in enumerate(answers):
        (output,) = answer["outputs"]
        expected = rows(number, 1 + number % 3) @ WEIGHTS
        assert (output["name"], output["datatype"], output["shape"]) == ("y", "FP32", list(expected.shape))
        assert output["data"] == expected.ravel().tolist()
    assert (answers[7]["id"], answers[7]["model_version"]) == ("mine", "1")


def test_micro_batches_of_the_client_are_taken_apart_rightly(
    mlserver: venvs.Program, served: GatewayProcess, tmp_path: Path
) -> None:
    lines = [request(rows(100 * number, 2), id=f"n{number}") for number in range(9)]
    answers = infer(mlserver, served, "linear", tmp_path, lines, "-s", "4")
    assert [answer["id"] for answer in answers] == [f"n{number}" for number in range(9)]
    for number, answer in enumerate(answers):
        assert answer["outputs"][0]["data"] == (rows(100 * number, 2) @ WEIGHTS).ravel().tolist()
    assert len({answer["parameters"]["inference_id"] for answer in answers}) == 3


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize(
    ("model", "datatype", "data"),
    [("words", "BYTES", ["a", "héé", ""]), ("counts", "INT64", [2**53 + 1, -(2**63), 0])],
)
def test_text_and_large_numbers_survive(
    mlserver: venvs.Program,
    served: GatewayProcess,
    tmp_path: Path,
    model: str,
    datatype: str,
    data: list[Any],
    binary: bool,
) -> None:
    line = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": datatype, "data": data}]}
    (answer,) = infer(mlserver, served, model, tmp_path, [line], *(["-b"] if binary else []))
    assert answer["outputs"][0]["data"] == data
    assert answer["outputs"][0]["shape"] == [1, 3]


def test_a_bad_line_is_told_what_is_wrong_and_harms_no_other(
    mlserver: venvs.Program, served: GatewayProcess, tmp_path: Path
) -> None:
    narrow = request(np.zeros((1, 5), np.float32))
    good, bad, last = infer(mlserver, served, "linear", tmp_path, [request(rows(0, 1)), narrow, request(rows(1, 1))])
    assert "unexpected shape for input 'x' for model 'linear'. Expected [-1,6], got [1,5]" in bad["error"]["msg"]
    assert good["outputs"][0]["data"] == (rows(0, 1) @ WEIGHTS).ravel().tolist()
    assert last["outputs"][0]["data"] == (rows(1, 1) @ WEIGHTS).ravel().tolist()


def test_an_unknown_model_is_named(mlserver: venvs.Program, served: GatewayProcess, tmp_path: Path) -> None:
    (answer,) = infer(mlserver, served, "nobody", tmp_path, [request(rows(0, 1))])
    assert "Request for unknown model: 'nobody' is not found" in answer["error"]["msg"]
