"""MLmodel files, as MLflow writes them and as nobody should."""

from __future__ import annotations

import json
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.batchability import SignatureTensor
from gateway.core.tensor import DATATYPE
from gateway.errors import SourceError
from gateway.registry.layout import model_file
from gateway.registry.mlmodel import MAX_BYTES, Mlmodel, differences, parse_mlmodel, read_mlmodel

REAL = """\
artifact_path: mlflow-artifacts:/0/models/m-1/artifacts
flavors:
  onnx:
    code: null
    data: model.onnx
    onnx_session_options: null
  python_function:
    data: model.onnx
    loader_module: mlflow.onnx
signature:
  inputs: '[{"type": "tensor", "name": "x", "tensor-spec": {"dtype": "float32", "shape": [-1, 4]}}]'
  outputs: '[{"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1,
    2]}}]'
  params: null
"""
X = SignatureTensor("x", DATATYPE["FP32"], (None, 4))
Y = SignatureTensor("y", DATATYPE["FP32"], (None, 2))


def described(inputs: object = None, outputs: object = None) -> Mlmodel:
    texts = [
        f"  {side}: '{json.dumps(listed)}'\n" for side, listed in (("inputs", inputs), ("outputs", outputs)) if listed
    ]
    return parse_mlmodel(
        f"flavors: {{onnx: {{data: m.onnx}}}}\nsignature:\n{''.join(texts) or '  params: null'}".encode()
    )


def tensor(dtype: str, *shape: int, name: str | None = None) -> dict[str, object]:
    spec: dict[str, object] = {"type": "tensor", "tensor-spec": {"dtype": dtype, "shape": list(shape)}}
    return spec if name is None else {**spec, "name": name}


def test_what_no_document_can_hold_counts_as_not_stated() -> None:
    found = described([tensor("float32", -1, 10**30, name="half a pair: \ud800")]).signature()
    assert found == {"inputs": [{"name": None, "datatype": "FP32", "shape": None}], "outputs": None}
    assert orjson.loads(orjson.dumps(found)) == found


def test_what_mlflow_writes_is_read() -> None:
    found = parse_mlmodel(REAL.encode())
    assert (found.flavors, found.onnx_file) == (("onnx", "python_function"), "model.onnx")
    assert found.signature() == {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": None, "datatype": "FP32", "shape": [-1, 2]}],
    }
    assert differences(found, [X], [Y]) == ()


@pytest.mark.parametrize(
    ("stated", "inputs", "said"),
    [
        ([tensor("float64", -1, 4, name="x")], [X], "says the input 'x' is FP64, the file says FP32"),
        ([tensor("float32", -1, 5, name="x")], [X], "has shape [-1, 5], the file says [-1, 4]"),
        ([tensor("float32", 4, name="x")], [X], "has shape [4]"),
        ([tensor("float32", -1, 4, name="z")], [X], "calls the input 'z', the file 'x'"),
        (
            [tensor("float32", -1, 4, name="z"), tensor("float32", -1, 4, name="x")],
            [X, Y],
            "has the input 'z', the file has",
        ),
        ([{"type": "double", "name": "x"}], [X], "says the input 'x' is FP64"),
        ([{"type": "double", "name": n} for n in "abc"], [X], "has 3 input columns, the file's 'x' has 4"),
    ],
)
def test_differences_are_said(stated: object, inputs: list[SignatureTensor], said: str) -> None:
    (text,) = differences(described(stated), inputs, [Y])
    assert said in text


@pytest.mark.parametrize(
    ("stated", "inputs"),
    [
        ([tensor("float32", -1, 4)], [X]),
        ([tensor("unknown", -1, 4)], [X]),
        ([{"type": "double", "name": n} for n in "abcd"], [X]),
        ([{"type": "double", "name": n} for n in "abc"], [X, Y]),
        ([tensor("float32", -1, 4), tensor("float32", -1, 2)], [X, Y]),
        (None, [X]),
    ],
)
def test_what_cannot_be_compared_is_not_called_different(stated: object, inputs: list[SignatureTensor]) -> None:
    assert differences(described(stated), inputs, [Y]) == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"a: [", "is not YAML"),
        (b"- 1", "names no flavors"),
        (b"flavors: 3", "names no flavors"),
        (b"flavors: {onnx: {data: /etc/passwd}}", "not inside"),
        (b"flavors: {onnx: {data: ../x}}", "not inside"),
        (b"flavors: {onnx: {data: [1]}}", "no usable file"),
        (b"!!python/object/apply:os.system ['true']", "is not YAML"),
        (b"[" * 5000, "is not YAML"),
        (b"#" * (MAX_BYTES + 1), "larger than"),
        (b"\xff\xfe\xfd", "is not YAML|names no flavors"),
    ],
)
def test_what_nobody_should_write_is_refused(text: bytes, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        parse_mlmodel(text)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        parse_mlmodel(b"flavors: {onnx: {data: m}}\nsignature: " + data)
    except SourceError:
        return


def test_which_file_is_the_model(tmp_path: Path) -> None:
    assert read_mlmodel(tmp_path) is None
    with pytest.raises(SourceError, match="holds no ONNX model"):
        model_file(tmp_path)
    (tmp_path / "a.onnx").write_bytes(b"")
    assert model_file(tmp_path) == "a.onnx"
    (tmp_path / "b.onnx").write_bytes(b"")
    with pytest.raises(SourceError, match=r"holds a\.onnx, b\.onnx; call the one"):
        model_file(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"")
    assert model_file(tmp_path) == "model.onnx"
    (tmp_path / "MLmodel").write_text("flavors: {onnx: {data: b.onnx}}")
    assert model_file(tmp_path) == "b.onnx"
    (tmp_path / "MLmodel").write_text("flavors: {onnx: {data: c.onnx}}")
    with pytest.raises(SourceError, match=r"names the file c\.onnx, which is not there"):
        model_file(tmp_path)


def test_a_pickle_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "MLmodel").write_text("flavors: {sklearn: {pickled_model: model.pkl}, python_function: {}}")
    (tmp_path / "model.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(SourceError, match=r"flavors python_function, sklearn and no onnx.*gateway convert model\.pkl"):
        model_file(tmp_path)
