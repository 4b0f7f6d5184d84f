"""Sessions alone, in this process: what is refused at load, what is said about failures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gateway.core.tensor import DATATYPE
from gateway.workers.session import MAX_OPTIONAL, TEXT_LIMIT, ModelRefusedError, RunError, Session, clean_text
from tests.live.models import ONNX_TYPE
from tests.workers.rig import (
    expand,
    gather,
    identity,
    matmul,
    model_bytes,
    nonzero,
    packed,
    value,
)


def test_the_signature_is_the_files() -> None:
    signature = Session(matmul(), 1).signature
    assert [(t.name, t.datatype.name, t.shape) for t in signature.inputs] == [("x", "FP32", (None, 4))]
    assert [(t.name, t.datatype.name, t.shape) for t in signature.outputs] == [("y", "FP32", (None, 3))]


def with_defaults(count: int) -> bytes:
    """`x` + `w0` + `w1` + …, each `w` an input with a default of its number."""
    names = [f"w{number}" for number in range(count)]
    nodes = [helper.make_node("Sum", ["x", *names], ["y"])]
    inputs = [value(name, "FP32", ["n"]) for name in ["x", *names]]
    weights = [numpy_helper.from_array(np.array([number], np.float32), name) for number, name in enumerate(names)]
    return model_bytes(nodes, inputs, [value("y", "FP32", ["n"])], weights)


def test_inputs_with_a_default_are_optional_and_come_last() -> None:
    session = Session(with_defaults(2), 1)
    assert [(t.name, t.optional) for t in session.signature.inputs] == [("x", False), ("w0", True), ("w1", True)]
    one, five = np.array([1], np.float32), np.array([5], np.float32)
    assert session.run({"x": one}, ["y"])[0].tolist() == [2]
    assert session.run({"x": one, "w1": five}, ["y"])[0].tolist() == [6]


def test_a_model_that_declares_every_weight_an_input_has_no_optional_ones() -> None:
    assert len(Session(with_defaults(MAX_OPTIONAL), 1).signature.inputs) == MAX_OPTIONAL + 1
    assert [t.name for t in Session(with_defaults(MAX_OPTIONAL + 1), 1).signature.inputs] == ["x"]


@pytest.mark.parametrize("name", sorted(ONNX_TYPE))
def test_every_datatype_is_known(name: str) -> None:
    signature = Session(identity(name), 1).signature
    assert signature.inputs[0].datatype is signature.outputs[0].datatype is DATATYPE[name]


def test_a_sequence_output_is_refused_by_name() -> None:
    node = helper.make_node("SequenceConstruct", ["x", "x"], ["pieces"])
    output = helper.make_tensor_sequence_value_info("pieces", TensorProto.FLOAT, None)
    with pytest.raises(ModelRefusedError, match=r"output pieces has type seq\(tensor\(float\)\)"):
        Session(model_bytes([node], [value("x", "FP32", [2])], [output]), 1)


def test_an_eight_bit_float_is_refused_by_name() -> None:
    node = helper.make_node("Identity", ["tiny"], ["y"])
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT8E4M3FN, [2]) for name in ("tiny", "y")]
    with pytest.raises(ModelRefusedError, match="input tiny has type"):
        Session(model_bytes([node], tensors[:1], tensors[1:]), 1)


def test_bfloat16_and_strings_together_are_refused() -> None:
    nodes = [helper.make_node("Identity", ["a"], ["b"]), helper.make_node("Identity", ["c"], ["d"])]
    content = model_bytes(
        nodes,
        [value("a", "BF16", [1]), value("c", "BYTES", [1])],
        [value("b", "BF16", [1]), value("d", "BYTES", [1])],
    )
    with pytest.raises(ModelRefusedError, match="bfloat16 and string"):
        Session(content, 1)


@pytest.mark.parametrize("content", [b"", b"not a model at all", matmul()[:-20]])
def test_what_is_not_a_model_is_said_to_be_none(content: bytes) -> None:
    with pytest.raises(ModelRefusedError, match="not an ONNX model"):
        Session(content, 1)


def external_model() -> bytes:
    """y = x @ w; w (4 x 3, FP32) lies in `weights.bin`."""
    weights = numpy_helper.from_array(np.ones((4, 3), np.float32), "w")
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    entry = weights.external_data.add()
    entry.key, entry.value = "location", "weights.bin"
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    content = model_bytes([node], [value("x", "FP32", ["n", 4])], [value("y", "FP32", ["n", 3])], [weights])
    assert onnx.load_model_from_string(content)
    return content


def test_external_data_is_taken_from_memory() -> None:
    weights = np.arange(12, dtype=np.float32).reshape(4, 3)
    session = Session(external_model(), 1, {"weights.bin": memoryview(weights.tobytes())})
    ((shape, data),) = run(session, ((1, 4), np.ones(4, np.float32).tobytes()))
    assert shape == (1, 3)
    assert np.frombuffer(data, np.float32).tolist() == weights.sum(axis=0).tolist()


@pytest.mark.parametrize("files", [{}, {"other.bin": bytes(48)}, {"weights.bin": bytes(47)}, {"weights.bin": b""}])
def test_external_data_that_is_not_what_the_model_says_is_refused(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(48))
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")  # as in a worker, whose directory holds nothing
    with pytest.raises(ModelRefusedError, match="external data files do not hold what the model says"):
        Session(external_model(), 1, {name: memoryview(content) for name, content in files.items()})


def run(session: Session, *feeds: tuple[tuple[int, ...], bytes]) -> list[tuple[tuple[int, ...], bytes]]:
    fed = session.feeds([(index, shape, memoryview(data)) for index, (shape, data) in enumerate(feeds)])
    outputs = tuple(range(len(session.signature.outputs)))
    values = session.run(fed, session.output_names(outputs))
    return [(output.shape, bytes(output.data)) for output in session.collect(outputs, values)]


def test_dynamic_output_size() -> None:
    x = np.array([0, 5, 0, 7], np.float32)
    ((shape, data),) = run(Session(nonzero(), 1), ((4,), x.tobytes()))
    assert shape == (1, 2)
    assert np.frombuffer(data, np.int64).tolist() == [1, 3]


def test_scalars_have_rank_zero() -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    session = Session(model_bytes([node], [value("x", "FP64", [])], [value("y", "FP64", [])]), 1)
    assert run(session, ((), np.float64(2.5).tobytes())) == [((), np.float64(2.5).tobytes())]


def test_a_failing_node_is_reported_in_one_line() -> None:
    with pytest.raises(RunError, match=r"^Non-zero status.*idx=9 must be within") as caught:
        run(Session(gather(), 1), ((1,), np.array([9], np.int64).tobytes()))
    assert "\n" not in str(caught.value)


def test_a_wrong_shape_is_reported() -> None:
    with pytest.raises(RunError, match="Got: 5 Expected: 4"):
        run(Session(matmul(), 1), ((1, 5), bytes(20)))


def test_bytes_that_contradict_the_shape_are_reported() -> None:
    with pytest.raises(RunError, match=r"input x: 20 bytes do not make up shape \[1, 4\] of FP32"):
        run(Session(matmul(), 1), ((1, 4), bytes(20)))


def test_outputs_of_too_high_rank_are_reported() -> None:
    shape = np.ones(17, np.int64)
    with pytest.raises(RunError, match="rank 17"):
        run(Session(expand(), 1), ((17,), shape.tobytes()))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (packed(b"ok", b"\xff\xfe"), "element 1 is not valid UTF-8"),
        (packed(b"one"), "1 strings where the shape asks for 2"),
        (packed(b"one", b"two")[:-1], "incomplete string data"),
    ],
)
def test_strings_that_are_none_are_reported(data: bytes, text: str) -> None:
    with pytest.raises(RunError, match=text):
        run(Session(identity("BYTES"), 1), ((1, 2), data))


def test_texts_are_short_and_hold_no_paths() -> None:
    text = "[ONNXRuntimeError] : 1 : FAIL : at /onnxruntime_src/core/a.cc:12\n /home/me/m.onnx Node:'/conv/1' \x1b[0m"
    cleaned = clean_text(text + "x" * 1000)
    assert "/home" not in cleaned
    assert "a.cc" not in cleaned
    assert "\n" not in cleaned
    assert "\x1b" not in cleaned
    assert "'/conv/1'" in cleaned
    assert len(cleaned) == TEXT_LIMIT
