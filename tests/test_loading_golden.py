"""Golden inputs: files good and bad, answers right, nearly right and wrong, on a scripted instance and a real one."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.backends.interface import Batch, Failure, FailureKind, Success, Traits
from gateway.core.model import BatchPolicy, ModelSpec, TensorSpec
from gateway.core.request import OutputTensor
from gateway.core.tensor import DATATYPE, pack_bytes
from gateway.errors import ConfigError, GatewayError, ModelError
from gateway.loading_golden import check_golden
from gateway.registry.golden_file import MAX_BYTES, GoldenFile, read_golden
from tests import test_catalog
from tests.fakes import PlainReplica
from tests.live import models
from tests.test_catalog import Rig

runner, pool, rig = test_catalog.runner, test_catalog.pool, test_catalog.rig
SPEC = ModelSpec(
    "m",
    "1",
    "",
    "onnx",
    (TensorSpec("x", DATATYPE["FP32"], (2,)),),
    (
        TensorSpec("y", DATATYPE["FP32"], (2,)),
        TensorSpec("label", DATATYPE["INT64"], (1,)),
        TensorSpec("name", DATATYPE["BYTES"], (1,)),
    ),
    BatchPolicy(8),
)
ASKED = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}
Y = {"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [0.25, -4.0]}
LABEL = {"name": "label", "datatype": "INT64", "shape": [1, 1], "data": [7]}
NAME = {"name": "name", "datatype": "BYTES", "shape": [1, 1], "data": ["seven"]}


class Instance(PlainReplica):
    """Answers every batch with `values`, label 7 and the name `seven`."""

    def __init__(self, values: Sequence[float] = (0.25, -4.0)) -> None:
        self.name, self.available, self.in_flight, self.free_slots = "onnx-1", True, 0, 1
        self.values = values
        self.asked = 0
        self.failure: Failure | None = None

    def set_listener(self, changed: Any, /) -> None:
        """Nothing changes."""

    def execute(self, batch: Batch, timeout_s: float, /) -> None:
        self.asked += 1
        outputs = [
            OutputTensor("y", DATATYPE["FP32"], (1, 2), np.array(self.values, "<f4").tobytes()),
            OutputTensor("label", DATATYPE["INT64"], (1, 1), np.array([7], "<i8").tobytes()),
            OutputTensor("name", DATATYPE["BYTES"], (1, 1), pack_bytes([b"seven"])),
        ]
        answer = self.failure or Success([outputs[place] for place in batch.outputs], 1, 2, 3)
        asyncio.get_running_loop().call_soon(batch.done, answer)


def golden(*items: Any, **tolerance: float) -> GoldenFile:
    return GoldenFile("golden.json", json.dumps(list(items)).encode(), **tolerance)


def item(*outputs: Any, asked: Any = ASKED) -> dict[str, Any]:
    return {"inputs": [asked], "outputs": list(outputs)}


def checked(file: GoldenFile, *instances: Any, spec: ModelSpec = SPEC) -> int:
    return asyncio.run(check_golden(file, spec, instances or [Instance()]))


def test_every_instance_answers_every_request() -> None:
    first, second = Instance(), Instance()
    assert checked(golden(item(Y, LABEL, NAME), item(NAME, Y)), first, second) == 2
    assert (first.asked, second.asked) == (2, 2)


def test_a_remote_server_beside_workers_is_not_asked() -> None:
    own, far = Instance(), Instance((9, 9))
    far.traits = Traits("oip")
    assert checked(golden(item(Y)), own, far) == 1
    assert far.asked == 0


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ({**Y, "data": [0.25, -4.1]}, r"output 'y' is -4 in element 1, expected -4\.0999999 \(1 of 2 are wrong\)"),
        ({**LABEL, "data": [8]}, "output 'label' is 7 in element 0, expected 8"),
        ({**NAME, "data": ["eight"]}, "output 'name' differs in element 0"),
        ({**Y, "shape": [2, 2], "data": [0.25, -4.0] * 2}, r"is FP32 \[1, 2\], expected FP32 \[2, 2\]"),
    ],
)
def test_a_wrong_answer_is_named(output: Any, why: str) -> None:
    with pytest.raises(ModelError, match=f"golden input 2 of golden.json: .*{why}"):
        checked(golden(item(Y), item(output)))


def test_one_wrong_instance_is_enough() -> None:
    with pytest.raises(ModelError, match="output 'y' is 3"):
        checked(golden(item(Y)), Instance(), Instance((3.0, -4.0)))


def test_a_request_that_fails_is_a_wrong_answer() -> None:
    instance = Instance()
    instance.failure = Failure(FailureKind.SUSPECT, "this node divides by zero")
    with pytest.raises(ModelError, match=r"is not answered: .*divides by zero"):
        checked(golden(item(Y)), instance)


@given(
    st.floats(-1e6, 1e6, width=32),
    st.floats(0, 0.1),
    st.floats(0, 1),
    st.floats(-2, 2),
)
def test_the_tolerance_is_what_it_says(value: float, rtol: float, atol: float, times: float) -> None:
    answer = float(np.float32(value + times * (atol + rtol * abs(value))))
    distance, allowed = abs(answer - value), atol + rtol * max(abs(answer), abs(value))
    if abs(distance - allowed) <= 1e-9 * max(1.0, allowed):
        return  # a hair's breadth that FP64 cannot judge
    file = golden(item({**Y, "data": [value, 1.0]}), rtol=rtol, atol=atol)
    if distance <= allowed:
        assert checked(file, Instance((answer, 1.0))) == 1
    else:
        with pytest.raises(ModelError):
            checked(file, Instance((answer, 1.0)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_fits_a_number(value: float) -> None:
    with pytest.raises(ModelError):
        checked(golden(item(Y), rtol=1e6, atol=1e6), Instance((value, -4.0)))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"{", "this is not JSON"),
        (b"{}", "write a list of requests"),
        (b"[]", "write a list of requests"),
        (b"[1]", "item 1 is no request"),
        (json.dumps([{"inputs": [ASKED]}]).encode(), "item 1 needs the outputs"),
        (json.dumps([item(Y, asked={**ASKED, "shape": [1, 3]})]).encode(), "item 1: .*3"),
        (json.dumps([item(Y, asked={**ASKED, "name": "z"})]).encode(), "item 1: .*'z'"),
        (json.dumps([item({**Y, "name": "z"})]).encode(), "no output 'z'; the outputs are y, label, name"),
        (json.dumps([item({**Y, "datatype": "FP64"})]).encode(), "output 'y' is FP32, not 'FP64'"),
        (json.dumps([item({**Y, "shape": "all"})]).encode(), "needs its 'shape'"),
        (json.dumps([item({**Y, "data": [1]})]).encode(), "needs 2 elements, 'data' holds 1"),
        (json.dumps([item({**Y, "data": None})]).encode(), "'data' must be an array"),
        (json.dumps([item(Y, Y)]).encode(), "item 1 gives an output twice"),
        (json.dumps([item(Y)] * 1001).encode(), "at most 1000 requests"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(content: bytes, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        checked(GoldenFile("golden.json", content))


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=5))
def test_no_file_whatever_breaks_the_reader(value: Any) -> None:
    for document in (value, [value], [{"inputs": value, "outputs": [value]}], [item({**Y, "data": value})]):
        with pytest.raises(GatewayError):
            checked(GoldenFile("golden.json", json.dumps(document).encode()))


def test_a_stated_file_comes_first_then_the_one_beside_the_model(tmp_path: Path) -> None:
    stated, version = tmp_path / "stated.json", tmp_path / "1"
    version.mkdir()
    assert read_golden(None, None, version) is None
    with pytest.raises(ConfigError, match=r"neither .*stated.json nor a file stated.json"):
        read_golden(stated, "stated.json", version)
    (version / "golden.json").write_bytes(b"[0]")
    (version / "stated.json").write_bytes(b"[1]")
    assert read_golden(None, None, version) == GoldenFile(str(version / "golden.json"), b"[0]")
    found = read_golden(stated, "stated.json", version, 0.5, 0.25)
    assert found == GoldenFile(str(version / "stated.json"), b"[1]", 0.5, 0.25)
    stated.write_bytes(b"[2]")
    assert read_golden(stated, "stated.json", version) == GoldenFile(str(stated), b"[2]")


def test_a_link_out_of_the_version_and_a_file_too_large_are_refused(tmp_path: Path) -> None:
    version = tmp_path / "1"
    version.mkdir()
    (tmp_path / "elsewhere.json").write_bytes(b"[]")
    (version / "golden.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ConfigError, match="leaves the version's directory"):
        read_golden(None, None, version)
    large = tmp_path / "large.json"
    with large.open("wb") as stream:
        stream.truncate(MAX_BYTES + 1)
    with pytest.raises(ConfigError, match="larger than"):
        read_golden(large, "large.json", version)


def test_a_real_model_serves_only_if_it_answers_rightly(rig: Rig) -> None:
    models.repository(rig.root, {"good": models.identity("FP32", 2), "bad": models.identity("FP32", 2)})
    for name, answer in (("good", [1.0, 2.0]), ("bad", [1.0, 2.5])):
        expected = {"name": "y", "datatype": "FP32", "shape": [1, 2], "data": answer}
        (rig.root / name / "1" / "golden.json").write_text(json.dumps([item(expected)]))
    (failed,) = rig.load()
    assert failed.name == "bad"
    assert "output 'y' is 2 in element 1, expected 2.5" in failed.reason
    assert rig.catalog.resolve("good", None).ready
