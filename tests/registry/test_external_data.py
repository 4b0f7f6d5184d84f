from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from gateway.registry.external_data import ExternalDataError, locations
from tests.registry.onnx_models import scaled


def outside(name: str, location: str, *, marked: bool = True) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1])
    if marked:
        tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "offset", "0"
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    return tensor


def empty_graph(*initializers: TensorProto) -> onnx.GraphProto:
    return helper.make_graph([], "inner", [], [], list(initializers))


def everywhere() -> Any:
    """A model with an external tensor in every place where a tensor can stand."""
    model = scaled()
    graph = model.graph
    graph.initializer.append(outside("a", "weights/a"))
    sparse = graph.sparse_initializer.add()
    sparse.values.CopyFrom(outside("b", "b"))
    sparse.indices.CopyFrom(outside("c", "c"))
    node = graph.node.add(op_type="If")
    attribute = node.attribute.add(name="t", type=onnx.AttributeProto.TENSOR)
    attribute.t.CopyFrom(outside("d", "d"))
    attribute.tensors.append(outside("e", "e"))
    attribute.g.CopyFrom(empty_graph(outside("f", "f")))
    attribute.graphs.append(empty_graph(outside("g", "g")))
    attribute.sparse_tensor.values.CopyFrom(outside("h", "h"))
    attribute.sparse_tensors.add().values.CopyFrom(outside("i", "i"))
    function = model.functions.add(name="fn")
    function.node.add(op_type="Constant").attribute.add(name="value").t.CopyFrom(outside("j", "j"))
    function.attribute_proto.add(name="k").t.CopyFrom(outside("k", "k"))
    training = model.training_info.add()
    training.initialization.CopyFrom(empty_graph(outside("l", "l")))
    training.algorithm.CopyFrom(empty_graph(outside("m", "m", marked=False)))
    return model


def test_a_tensor_is_found_wherever_it_stands() -> None:
    found = locations(everywhere().SerializeToString())
    assert set(found) == {"weights/a", *"bcdefghijklm"}


def test_a_model_of_one_file_names_nothing_even_if_a_text_in_it_says_location() -> None:
    model = scaled()
    assert locations(model.SerializeToString()) == {}
    model.doc_string = "location"
    model.graph.node[0].attribute.append(helper.make_attribute("location", "elsewhere"))
    assert locations(model.SerializeToString()) == {}


@pytest.mark.parametrize(
    "location",
    ["/etc/passwd", "../w", "a/../../w", "", ".", "a\0b", "*/_ORT_MEM_ADDR_/*", "x" * 2000],
)
def test_a_location_that_leaves_the_directory_is_refused(location: str) -> None:
    model = scaled()
    model.graph.initializer.append(outside("w2", location))
    with pytest.raises(ExternalDataError, match="external data file"):
        locations(model.SerializeToString())


def test_spellings_of_one_file_are_one_path() -> None:
    model = scaled()
    model.graph.initializer.extend([outside("p", "./d/w"), outside("q", "d//w")])
    assert locations(model.SerializeToString()) == {"./d/w": "d/w", "d//w": "d/w"}


def test_endless_nesting_is_refused() -> None:
    def field(number: int, content: bytes) -> bytes:
        length = len(content)
        return bytes([number << 3 | 2, length & 0x7F | 0x80, length >> 7]) + content

    graph = empty_graph(outside("w", "w")).SerializeToString()
    for _ in range(40):  # graph → node → attribute → graph
        graph = field(1, field(5, field(6, graph)))
    with pytest.raises(ExternalDataError, match="nested"):
        locations(field(7, graph))


SAMPLE = everywhere().SerializeToString()


@given(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255))
def test_whatever_protobuf_reads_differently_is_never_skipped(at: int, value: int) -> None:
    """With any byte changed: either it is refused, or every external tensor that onnx's own reader finds is named."""
    changed = SAMPLE[:at] + bytes([value]) + SAMPLE[at + 1 :]
    try:
        found = locations(changed)
    except ExternalDataError:
        return
    try:
        model = onnx.load_model_from_string(changed)
    except Exception:  # protobuf's errors share no public base
        return
    tensors = [*model.graph.initializer, *(s.values for s in model.graph.sparse_initializer)]
    named = {e.value for t in tensors for e in t.external_data if e.key == "location" and t.data_location == 1}
    assert named <= set(found)


def test_fuzzed_bytes_end_in_an_answer_or_a_refusal(tmp_path: Path) -> None:
    for cut in range(0, len(SAMPLE), 7):
        with pytest.raises(ExternalDataError):
            locations(SAMPLE[:cut] + b"\xff" * 11 + b"location")
