"""Loading real models as config.pbtxt says: reshape, order, fewer outputs, narrower dims, optional inputs, warm-up.

The rig is test_catalog's: one pool of real workers, a catalog for each test.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import numpy as np
import pytest
from onnx import helper

from gateway.catalog import ServedVersion
from gateway.core.assembly import slice_rows
from gateway.core.model import TensorSpec
from gateway.core.request import InferRequest, InputTensor
from gateway.core.tensor import DATATYPE, pack_bytes
from gateway.errors import ConfigError, ModelError
from gateway.loading import bound, refuse_not_yet
from gateway.protocol.model_config import parse
from tests import test_catalog
from tests.live import models
from tests.test_catalog import Rig
from tests.workers.rig import pid_of

FP32, INT64 = DATATYPE["FP32"], DATATYPE["INT64"]
runner, pool, rig = test_catalog.runner, test_catalog.pool, test_catalog.rig


def tensor(array: np.ndarray[Any, Any]) -> InputTensor:
    return InputTensor(FP32, array.shape, None, array.astype(np.float32).tobytes())


def ask(rig: Rig, version: ServedVersion, *inputs: np.ndarray[Any, Any] | None) -> dict[str, np.ndarray[Any, Any]]:
    """The answer to one request for all outputs, by name."""
    tensors = tuple(None if array is None else tensor(array) for array in inputs)
    rows = next(array.shape[0] for array in inputs if array is not None) if version.spec.batched else 1
    trailing = tuple(None if array is None else array.shape for array in inputs)
    wanted = tuple(range(len(version.spec.outputs)))
    request = InferRequest(tensors, rows, 8, (trailing, wanted), wanted, None)
    request.received = time.monotonic()

    async def settled() -> None:
        loop = rig.runner.get_loop()
        done = loop.create_future()
        request.settle = lambda _: done.set_result(None)
        assert version.scheduler is not None
        version.scheduler.submit(request)
        await done

    rig.run(settled())
    if request.error is not None:
        raise request.error
    found = {}
    for output in request.batch.outputs.values():
        part = slice_rows(output, request.row, rows) if version.spec.batched else output
        found[part.name] = np.frombuffer(part.data, np.float32).reshape(part.shape)
    return found


# -- reshape, order, subsets ---------------------------------------------------------------------------------------


def test_clients_see_other_dims_than_the_model_has(rig: Rig) -> None:
    config = """max_batch_size: 8
      input { name: "x" data_type: TYPE_FP32 dims: [ 2, 8 ] reshape { shape: [ 16 ] } }
      output { name: "y" data_type: TYPE_FP32 dims: [ 1, 4, 1 ] reshape { shape: [ 4 ] } }"""
    version = rig.one(models.linear(), config)
    assert version.spec.inputs == (TensorSpec("x", FP32, (2, 8), reshape=(16,)),)
    assert version.spec.policy.merge
    x = np.random.default_rng(1).standard_normal((3, 2, 8)).astype(np.float32)
    (plain,) = ask_plain(rig, models.linear(), x.reshape(3, 16))
    answer = ask(rig, version, x)["y"]
    assert answer.shape == (3, 1, 4, 1)
    np.testing.assert_allclose(answer.reshape(3, 4), plain, rtol=1e-6)
    assert version.config_document["input"][0]["reshape"] == {"shape": [16]}


def ask_plain(rig: Rig, content: bytes, *inputs: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """What onnxruntime says without a gateway."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return list(session.run(None, dict(zip(names, inputs, strict=True))))


def test_a_scalar_for_each_row(rig: Rig) -> None:
    config = """max_batch_size: 8 input { name: "index" data_type: TYPE_INT64 dims: [ 1 ] reshape { shape: [ ] } }"""
    version = rig.one(models.lookup(), config)
    index = InputTensor(INT64, (2, 1), [3, 1], None)
    request = InferRequest((index,), 2, 16, "k", (0,), None)
    request.received = time.monotonic()
    done = rig.runner.get_loop().create_future()
    request.settle = lambda _: done.set_result(None)

    async def settled() -> None:
        assert version.scheduler is not None
        version.scheduler.submit(request)
        await done

    rig.run(settled())
    rows = np.frombuffer(request.batch.outputs[0].data, np.float32).reshape(2, 3)
    assert rows.tolist() == [[9, 10, 11], [3, 4, 5]]


def test_order_and_outputs_are_the_configs(rig: Rig) -> None:
    config = "max_batch_size: 8 " + "".join(
        f'{role} {{ name: "{name}" data_type: TYPE_FP32 dims: [ -1 ] }}\n'
        for role, name in (("input", "b"), ("input", "a"), ("output", "d"))
    )
    version = rig.one(models.difference(), config)
    assert [t.name for t in version.spec.inputs] == ["b", "a"]
    assert [t.name for t in version.spec.outputs] == ["d"]
    a, b = np.array([[5.0, 7.0]]), np.array([[1.0, 10.0]])
    assert {name: values.tolist() for name, values in ask(rig, version, b, a).items()} == {"d": [[4.0, -3.0]]}


def test_only_the_second_output(rig: Rig) -> None:
    config = 'max_batch_size: 8 output { name: "s" data_type: TYPE_FP32 dims: [ -1 ] }'
    version = rig.one(models.difference(), config)
    assert ask(rig, version, np.array([[1.0]]), np.array([[2.0]]))["s"].tolist() == [[3.0]]
    assert [output["name"] for output in version.config_document["output"]] == ["s"]


def test_a_model_served_as_its_file_says_uses_the_replicas_themselves(rig: Rig) -> None:
    version = rig.one(models.difference(), "max_batch_size: 8")
    assert version.loaded is not None
    assert bound(version.spec, version.loaded) is version.loaded.replicas


def test_dims_narrower_than_the_files_are_served(rig: Rig) -> None:
    config = 'max_batch_size: 8 input { name: "x" data_type: TYPE_FP32 dims: [ 3 ] }'
    version = rig.one(models.identity("FP32"), config)
    assert version.spec.inputs[0].dims == (3,)
    assert version.spec.outputs[0].dims == (-1,)
    assert version.config_document["input"][0]["dims"] == [3]


def test_a_model_that_runs_only_on_the_stated_dims_is_tried_on_them(rig: Rig) -> None:
    """Made-up sizes do not fit it; the ones that config.pbtxt states do, so it is proven."""
    shape: list[int | str | None] = ["batch", "n"]
    content = models.model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [models.value("x", "FP32", shape)],
        [models.value("y", "FP32", ["batch", 1])],
        {"w": np.ones((5, 1), np.float32)},
    )
    config = 'max_batch_size: 8 input { name: "x" data_type: TYPE_FP32 dims: [ 5 ] }'
    assert rig.one(content, config).spec.policy.merge


def test_an_output_that_is_not_as_stated_fails_the_request(rig: Rig) -> None:
    config = 'max_batch_size: 8 output { name: "y" data_type: TYPE_FP32 dims: [ 2 ] }'
    version = rig.one(models.identity("FP32"), config)
    assert ask(rig, version, np.ones((1, 2)))["y"].shape == (1, 2)
    with pytest.raises(ModelError, match=r"output 'y' has shape \[3\] where \[2\] was expected"):
        ask(rig, version, np.ones((1, 3)))


@pytest.mark.parametrize(
    ("dims", "shape", "reason"),
    [
        ("2, 4", "8", "has the reshape [8], the model file says [16]"),
        ("-1", "-1", "is [-1], the model file says [16]; state its dims where they are fixed"),
    ],
)
def test_a_reshape_that_contradicts_the_file(rig: Rig, dims: str, shape: str, reason: str) -> None:
    tensor = f'name: "x" data_type: TYPE_FP32 dims: [ {dims} ] reshape {{ shape: [ {shape} ] }}'
    config = f"max_batch_size: 8 input {{ {tensor} }}"
    assert reason in rig.refused(models.linear(), config)


# -- optional inputs -----------------------------------------------------------------------------------------------

OPTIONAL = (
    'max_batch_size: {size} input [ {{ name: "bias" data_type: TYPE_FP32 dims: [ {dims} ] optional: true }}, '
    '{{ name: "x" data_type: TYPE_FP32 dims: [ {full} ] }} ]'
)


def test_an_input_with_a_default_may_be_left_out(rig: Rig) -> None:
    version = rig.one(models.with_default([2]), OPTIONAL.format(size=0, dims="2", full="-1, 2"))
    assert [(t.name, t.optional) for t in version.spec.inputs] == [("bias", True), ("x", False)]
    x = np.array([[1.0, 2.0]])
    assert ask(rig, version, None, x)["y"].tolist() == [[11.0, 22.0]]
    assert ask(rig, version, np.array([5.0, 6.0]), x)["y"].tolist() == [[6.0, 8.0]]
    assert [given["optional"] for given in version.config_document["input"]] == [True, False]


def test_an_input_with_a_default_is_no_input_unless_it_is_listed(rig: Rig) -> None:
    version = rig.one(models.with_default([2]))
    assert [t.name for t in version.spec.inputs] == ["x"]
    assert version.spec.policy.merge
    assert ask(rig, version, np.array([[1.0, 2.0]]))["y"].tolist() == [[11.0, 22.0]]


def test_one_that_has_no_batch_dimension_cannot_be_batched(rig: Rig) -> None:
    reason = rig.refused(models.with_default([2]), OPTIONAL.format(size=8, dims="2", full="2"))
    assert reason.startswith("max_batch_size is 8, but the model cannot batch: the first dimension of input 'bias'")


def test_an_input_without_a_default_cannot_be_optional(rig: Rig) -> None:
    config = 'max_batch_size: 8 input { name: "x" data_type: TYPE_FP32 dims: [ 16 ] optional: true }'
    assert rig.refused(models.linear(), config) == (
        "config.pbtxt says input 'x' is optional, but the model file has no default for it; remove optional, or export "
        "the model with an initializer of this name"
    )


def test_one_that_has_a_batch_dimension_is_batched_with_and_without_it(rig: Rig) -> None:
    version = rig.one(models.with_default(["batch", 2]), OPTIONAL.format(size=8, dims="2", full="2"))
    assert version.spec.policy.merge
    x = np.array([[1.0, 2.0], [3.0, 4.0]])
    assert ask(rig, version, None, x)["y"].tolist() == [[11.0, 22.0], [13.0, 24.0]]
    assert ask(rig, version, x, x)["y"].tolist() == [[2.0, 4.0], [6.0, 8.0]]


def test_rows_are_proven_independent_with_the_optional_inputs_too(rig: Rig) -> None:
    """Left out, the model treats each row alone; given, it subtracts their mean: never to be merged."""
    shape: list[int | str | None] = ["batch", 2]
    content = models.model(
        [
            helper.make_node("ReduceMean", ["shift"], ["mean"], axes=[0], keepdims=1),
            helper.make_node("Sub", ["x", "mean"], ["y"]),
        ],
        [models.value("x", "FP32", shape), models.value("shift", "FP32", shape)],
        [models.value("y", "FP32", shape)],
        {"shift": np.zeros((1, 2), np.float32)},
    )
    assert rig.one(content, "max_batch_size: 8").spec.policy.merge
    listed = OPTIONAL.format(size=8, dims="2", full="2").replace("bias", "shift")
    assert not rig.one(content, listed).spec.policy.merge


def test_rows_are_proven_independent_without_the_optional_inputs_too(rig: Rig) -> None:
    """By default it subtracts the mean of all rows; no made-up `mode` makes it do so."""
    shape: list[int | str | None] = ["batch", 2]
    content = models.model(
        [
            helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1),
            helper.make_node("Equal", ["mode", "seven"], ["mixing"]),
            helper.make_node("Where", ["mixing", "mean", "zero"], ["shift"]),
            helper.make_node("Sub", ["x", "shift"], ["y"]),
        ],
        [models.value("x", "FP32", shape), models.value("mode", "FP32", ["batch", 1])],
        [models.value("y", "FP32", shape)],
        {"mode": np.array([[7]], np.float32), "seven": np.array(7, np.float32), "zero": np.array(0, np.float32)},
    )
    listed = OPTIONAL.format(size=8, dims="1", full="2").replace("bias", "mode")
    assert not rig.one(content, listed).spec.policy.merge


# -- warm-up -------------------------------------------------------------------------------------------------------


def sample(inside: str, key: str = "x", more: str = "") -> str:
    return f'max_batch_size: 8 model_warmup {{ name: "first" {more} inputs {{ key: "{key}" value {{ {inside} }} }} }}'


def test_samples_are_run_on_every_instance_and_kept_for_restarts(rig: Rig) -> None:
    config = sample("data_type: TYPE_FP32 dims: 16 random_data: true", more="batch_size: 2 count: 3")
    version = rig.one(models.linear(), config)
    loaded: Any = version.loaded
    assert [batch[0].shape for batch in loaded.warm_up] == [(5, 16), *[(2, 16)] * 3]
    before = loaded.replicas[0].restarts
    os.kill(pid_of(rig.pool, loaded.replicas[0].name), signal.SIGKILL)

    async def back() -> None:
        while loaded.replicas[0].restarts == before or not loaded.replicas[0].available:
            await asyncio.sleep(0.01)

    rig.run(back())
    assert ask(rig, version, np.zeros((1, 16)))["y"].shape == (1, 4)


def test_a_sample_that_the_model_fails_on_fails_the_load(rig: Rig) -> None:
    (rig.root / "m" / "warmup").mkdir(parents=True)
    (rig.root / "m" / "warmup" / "raw").write_bytes(np.array([99], "<i8").tobytes())
    config = sample('data_type: TYPE_INT64 dims: [ ] input_data_file: "raw"', "index")
    reason = rig.refused(models.lookup(), config)
    assert reason.startswith("warm-up sample 'first' failed on onnx-")
    assert "indices element out of data bounds" in reason


@pytest.mark.parametrize("content", [pack_bytes([b"a"]), pack_bytes([b"a", b"b"])], ids=["a row", "both"])
def test_a_file_holds_one_row_or_all(rig: Rig, content: bytes) -> None:
    (rig.root / "m" / "warmup").mkdir(parents=True)
    (rig.root / "m" / "warmup" / "raw").write_bytes(content)
    config = sample('data_type: TYPE_STRING dims: 1 input_data_file: "raw"', more="batch_size: 2")
    loaded: Any = rig.one(models.identity("BYTES"), config).loaded
    expected = content if content == pack_bytes([b"a", b"b"]) else content * 2
    assert loaded.warm_up[-1][0].parts[0].buffer == expected


@pytest.mark.parametrize(
    ("inside", "key", "more", "reason"),
    [
        ("data_type: TYPE_FP32 dims: 15 zero_data: true", "x", "", "unexpected shape for input 'x' for model 'm'. Exp"),
        ("data_type: TYPE_INT32 dims: 16 zero_data: true", "x", "", "inference input 'x' data-type is 'INT32', but"),
        ("data_type: TYPE_FP32 dims: 16 zero_data: true", "z", "", "unexpected inference input 'z' for model 'm'"),
        ("data_type: TYPE_FP32 dims: 16 zero_data: true", "x", "batch_size: 9", "batch-size must be <= 8 for 'm'"),
        ('data_type: TYPE_FP32 dims: 16 input_data_file: "raw"', "x", "", "this file is missing"),
        (
            'data_type: TYPE_FP32 dims: 16 input_data_file: "short"',
            "x",
            "",
            "short holds 15 elements of FP32, expected",
        ),
        ('data_type: TYPE_FP32 dims: 16 input_data_file: "odd"', "x", "", "odd holds 16 elements of FP32"),
    ],
)
def test_a_sample_that_is_no_request_fails_the_load_by_name(
    rig: Rig, inside: str, key: str, more: str, reason: str
) -> None:
    folder = rig.root / "m" / "warmup"
    folder.mkdir(parents=True)
    (folder / "short").write_bytes(bytes(60))
    (folder / "odd").write_bytes(bytes(65))
    text = rig.refused(models.linear(), sample(inside, key, more))
    assert text.startswith("warm-up sample 'first': ")
    assert reason in text


# -- the rest ------------------------------------------------------------------------------------------------------


def test_what_is_read_and_not_built_is_refused_by_name() -> None:
    config = parse("sequence_batching { iterative_sequence: true }")
    text = "config.pbtxt: sequence_batching.iterative_sequence is not supported yet; remove it"
    with pytest.raises(ConfigError, match=text):
        refuse_not_yet(config.scheduling)


def test_the_document_is_there_with_the_version(rig: Rig) -> None:
    config = 'name: "m" max_batch_size: 8 parameters { key: "a" value { string_value: "b" } }'
    version = rig.one(models.linear(), config)
    document = version.config_document
    assert (document["name"], document["platform"], document["backend"]) == ("m", "onnxruntime_onnx", "onnxruntime")
    assert [t["name"] for t in document["input"]] == [t.name for t in version.spec.inputs]
    assert document["dynamic_batching"]["preferred_batch_size"] == [8]
    assert document["instance_group"][0]["count"] == 2
    assert document["parameters"] == {"a": {"string_value": "b"}}
    assert document["default_model_filename"] == "model.onnx"
