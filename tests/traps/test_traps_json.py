"""Traps 1–30: infer over HTTP with JSON. † in a name's comment: a documented deviation; where a flag restores what
Triton does, the flag is tested too. "M" is `m`, an FP32 identity of at most 8 rows."""

from __future__ import annotations

import gzip
import json
import math
from typing import Any

import numpy as np
import pytest

from tests.differential.build import SIMPLE, ask, blob, infer, tensor
from tests.differential.exchange import Http
from tests.traps.client import Client, output, refused


def malformed(plain: Client, flagged: Client, body: Any, model: str = "m", *words: str) -> None:
    """†: 400 here, and with `triton_status_codes` Triton's 500."""
    refused(plain.infer(body, model), 400, *words)
    refused(flagged.infer(body, model), 500, *words)


def test_trap_01_id_values_and_content_type(plain: Client) -> None:
    reply = plain.infer(ask(tensor(data=[1, 2.5, 0.1]), id="7"))
    assert reply.body["id"] == "7"
    assert reply.headers == {"content-type": "application/json"}
    assert reply.keys == (("id", "model_name", "model_version", "outputs"), ("name", "datatype", "shape", "data"))
    assert np.array_equal(np.array(output(reply)["data"], np.float32), np.array([1, 2.5, 0.1], np.float32))


def test_trap_02_id_absent_empty_or_mistyped(plain: Client, flagged: Client) -> None:
    for document in (ask(SIMPLE), ask(SIMPLE, id="")):
        assert "id" not in plain.infer(document).body
    for wrong in (7, None):
        malformed(plain, flagged, ask(SIMPLE, id=wrong), "m", "id")
    invented = flagged.infer(ask(SIMPLE)).body["id"]
    assert isinstance(invented, str)
    assert invented


@pytest.mark.parametrize("data", [[[1, 2], [3, 4]], [1, 2, 3, 4], [[1], [2, 3, 4]]], ids=["nested", "flat", "odd"])
def test_trap_03_nested_flat_and_irregular_data(plain: Client, data: Any) -> None:
    found = output(plain.infer(ask(tensor(shape=(2, 2), data=data))))
    assert (found["shape"], found["data"]) == ([2, 2], [1, 2, 3, 4])


@pytest.mark.parametrize("data", [[1, 2], [1, 2, 3, 4], []])
def test_trap_04_count_of_data(plain: Client, flagged: Client, data: Any) -> None:
    malformed(plain, flagged, ask(tensor(data=data)), "m", "Shape does not match true shape of 'data' field", "INPUT0")


@pytest.mark.parametrize("data", [["1", 2, 3], [True, 2, 3], [None, 2, 3], 5])
def test_trap_05_wrong_literals_for_floats(plain: Client, flagged: Client, data: Any) -> None:
    malformed(plain, flagged, ask(tensor(shape=(1, 3 if isinstance(data, list) else 1), data=data)), "m", "INPUT0")


def test_trap_06_datatypes(plain: Client) -> None:
    for wrong in ("fp32", "FP99"):
        refused(plain.infer(ask(tensor(datatype=wrong, data=[1, 2, 3]))), 400, "invalid datatype for input INPUT0")
    reply = plain.infer(ask(tensor(datatype="INT32", data=[1, 2, 3])))
    refused(reply, 400, "data-type is 'INT32', but model", "expects 'FP32'")


def test_trap_07_dimensions_that_are_no_sizes(plain: Client, flagged: Client) -> None:
    for shape in ([1, -3], [1, 3.0]):
        malformed(plain, flagged, ask(tensor(shape=shape, data=[1, 2, 3])), "m", "shape")
    missing = {key: item for key, item in SIMPLE.items() if key != "shape"}
    malformed(plain, flagged, ask(missing), "m", "shape")


def test_trap_08_exactly_one_source_of_data(plain: Client) -> None:
    refused(plain.infer(ask(tensor())), 400, "Input must set only one of the following fields")
    both = {**SIMPLE, "parameters": {"binary_data_size": 12}}
    refused(plain.infer(ask(both), "m", bytes(12)), 400, "Input must set only one of the following fields")


def test_trap_09_no_elements(plain: Client) -> None:
    found = output(plain.infer(ask(tensor(shape=(1, 0), data=[]))))
    assert (found["shape"], found["data"]) == ([1, 0], [])


def test_trap_10_batch_dimension(plain: Client) -> None:
    refused(plain.infer(ask(tensor(shape=(0, 3), data=[]))), 400, "batch-size")
    reply = plain.infer(ask(tensor(shape=(), data=[1])))
    refused(reply, 400, "has no shape but model requires batch dimension")
    refused(plain.infer(ask(tensor(shape=(3,), data=[1, 2, 3]))), 400, "unexpected shape for input 'INPUT0'")


def test_trap_11_more_rows_than_config_allows(plain: Client) -> None:
    reply = plain.infer(ask(tensor(shape=(9, 1), data=[1] * 9)))
    refused(reply, 400, "inference request batch-size must be <= 8")


def test_trap_12_element_count_overflows(plain: Client) -> None:
    before = plain.process.metric("process_resident_memory_bytes")
    for shape in ((2**40, 2**40), (1, 2**62), (2**31, 2**31, 2**31)):
        reply = plain.infer(ask(tensor(shape=shape, data=[])))
        refused(reply, 400, "causes total element count to exceed maximum size of", "INPUT0")
    refused(plain.infer(ask(tensor(shape=(1, 2**40), data=[1]))), 400, "INPUT0")  # ends a Triton 2.51
    assert plain.process.metric("process_resident_memory_bytes") - before < 50 * 2**20


def test_trap_13_wrong_sets_of_inputs(plain: Client) -> None:
    a = tensor("INPUT0", (2, 2), "INT32", data=[1, 2, 3, 4])
    b = {**a, "name": "INPUT1"}
    reply = plain.infer(ask(a, b, {**a, "name": "X"}), "add_sub")
    refused(reply, 400, "X")
    refused(
        plain.infer(ask(a, {**b, "name": "X"}), "add_sub"), 400, "unexpected inference input 'X' for model 'add_sub'"
    )
    missing = ("expected 2 inputs but got 1 inputs", "Got input(s) ['INPUT0']", "missing required input(s) ['INPUT1']")
    refused(plain.infer(ask(a), "add_sub"), 400, *missing)
    refused(plain.infer(ask(a, b, a), "add_sub"), 400, "input 'INPUT0' already exists in request")
    one_row = tensor("INPUT1", (1, 2), "INT32", data=[5, 6])
    refused(plain.infer(ask(a, one_row), "add_sub"), 400, "INPUT1")


def test_trap_14_lists_of_outputs(plain: Client) -> None:
    given = [tensor(f"INPUT{place}", (1, 2), "INT32", data=[1, 2]) for place in (0, 1)]
    every = plain.infer(ask(*given, outputs=[]), "add_sub")
    assert [found["name"] for found in every.body["outputs"]] == ["OUTPUT0", "OUTPUT1"]
    reply = plain.infer(ask(*given, outputs=[{"name": "Y"}]), "add_sub")
    refused(reply, 400, "unexpected inference output 'Y' for model 'add_sub'")
    refused(plain.infer(ask(*given, outputs=[{"name": "OUTPUT0"}] * 2), "add_sub"), 400, "output")


def test_trap_15_unknown_keys_are_ignored(plain: Client) -> None:
    assert output(plain.infer({**ask(SIMPLE), "model_name": "other", "foo": {"bar": [1]}}))["data"][0] == 1


def test_trap_16_no_json_object(plain: Client, flagged: Client) -> None:
    body = json.dumps(ask(SIMPLE)).encode()
    for wrong in (body[:-1], body[:40], body + b"x", body + body, b"[]", b"null", b"{"):
        malformed(plain, flagged, wrong)


def test_trap_17_whole_64_bit_range(plain: Client) -> None:
    values = [9007199254740993, -9223372036854775808, 9223372036854775807]
    assert output(plain.infer(ask(tensor(datatype="INT64", data=values)), "id_int64"))["data"] == values
    top = [18446744073709551615, 0, 9007199254740993]
    assert output(plain.infer(ask(tensor(datatype="UINT64", data=top)), "id_uint64"))["data"] == top


def test_trap_18_numbers_that_do_not_fit(plain: Client, flagged: Client) -> None:
    for wrong in (1.0, 2**63, -(2**63) - 1):
        malformed(plain, flagged, ask(tensor(datatype="INT64", data=[wrong, 1, 2])), "id_int64", "INPUT0")
    for client in (plain, flagged):  # Triton makes 44 of it; no flag brings that back
        assert client.infer(ask(tensor(datatype="INT8", data=[300, 1, 2])), "id_int8").status in (400, 500)
    refused(plain.infer(ask(tensor(datatype="INT8", data=[300, 1, 2])), "id_int8"), 400, "300", "INPUT0")


def test_trap_19_booleans(plain: Client, flagged: Client) -> None:
    malformed(plain, flagged, ask(tensor(shape=(1, 2), datatype="BOOL", data=[1, 0])), "id_bool", "INPUT0")
    found = output(plain.infer(ask(tensor(shape=(1, 2), datatype="BOOL", data=[True, False])), "id_bool"))
    assert found["data"] == [True, False]
    assert all(isinstance(value, bool) for value in found["data"])


def test_trap_20_fp16_is_not_json(plain: Client, flagged: Client) -> None:
    halves = tensor(datatype="FP16", data=[1, 2, 3.5])
    refused(plain.infer(ask(halves), "id_fp16"), 400, "receiving FP16 data via JSON is not supported")
    binary = tensor(datatype="FP16", parameters={"binary_data_size": 6})
    reply = plain.infer(ask(binary), "id_fp16", blob("FP16", [1, 2, 3.5]))
    refused(reply, 400, "sending FP16 data via JSON is not supported")
    assert output(flagged.infer(ask(halves), "id_fp16"))["data"] == [1, 2, 3.5]


def test_trap_21_strings(plain: Client, flagged: Client) -> None:
    texts = ["hé", "b\0c", "", "日本"]
    given = tensor(shape=(1, 4), datatype="BYTES", data=texts)
    assert output(plain.infer(ask(given), "id_bytes"))["data"] == texts
    malformed(plain, flagged, ask(tensor(shape=(1, 1), datatype="BYTES", data=[1])), "id_bytes", "INPUT0")


def test_trap_22_bytes_that_are_no_text(plain: Client) -> None:
    data = blob("BYTES", [b"\xff\xfe"])
    given = tensor(shape=(1, 1), datatype="BYTES", parameters={"binary_data_size": len(data)})
    reply = plain.infer(ask(given), "id_bytes", data)
    refused(reply, 400, "UTF-8")
    reply.text.encode("utf-8")


@pytest.mark.parametrize("element", [math.nan, math.inf, -math.inf])
def test_trap_23_non_finite_answers(plain: Client, element: float) -> None:
    data = blob("FP32", [element, 1, element])
    reply = plain.infer(ask(tensor(parameters={"binary_data_size": 12})), "m", data)
    read = json.loads(reply.text)["outputs"][0]["data"]
    assert np.array_equal(read, [element, 1, element], equal_nan=True)


def test_trap_24_non_finite_data(plain: Client, flagged: Client) -> None:
    found = output(plain.infer(ask(tensor(data=[math.nan, math.inf, -math.inf]))))
    assert np.array_equal(found["data"], [math.nan, math.inf, -math.inf], equal_nan=True)
    large = b'{"inputs":[{"name":"INPUT0","shape":[1,1],"datatype":"FP32","data":[%s]}]}'
    assert output(plain.infer(large % b"1e39"))["data"] == [math.inf]
    malformed(plain, flagged, large % b"1e400")


def test_trap_25_parameters(plain: Client) -> None:
    wrong: Any
    for wrong in ({}, None):
        refused(plain.infer(ask(SIMPLE, parameters={"a": wrong})), 400, "a")
    for good in (1.5, "x", 3, True):
        reply = plain.infer(ask(SIMPLE, parameters={"a": good}))
        assert output(reply)["data"][0] == 1
        assert "parameters" not in reply.body
    refused(plain.infer(ask(SIMPLE, parameters={"triton_x": 1})), 400, "triton_")


def test_trap_26_priority_and_timeout(plain: Client, flagged: Client) -> None:
    malformed(plain, flagged, ask(SIMPLE, parameters={"priority": -1}), "m", "priority")
    malformed(plain, flagged, ask(SIMPLE, parameters={"timeout": "5"}), "m", "timeout")
    assert plain.infer(ask(SIMPLE, parameters={"priority": 99}), "prio").status == 200


def test_trap_27_sequence_parameters_of_a_plain_model(plain: Client) -> None:
    for identifier in (7, "seven"):
        parameters = {"sequence_id": identifier, "sequence_start": True, "sequence_end": False}
        assert plain.infer(ask(SIMPLE, parameters=parameters)).status == 200


def test_trap_28_versions(plain: Client) -> None:
    assert plain.infer(ask(SIMPLE), version="1").body["model_version"] == "1"
    refused(plain.infer(ask(SIMPLE), version="2"), 404, "version 2 is not found")
    refused(plain.infer(ask(SIMPLE), version="abc"), 404)
    assert plain.post("/v2/repository/models/sleeper/load").status == 200
    assert plain.post("/v2/repository/models/sleeper/unload").status == 200
    refused(plain.infer(ask(SIMPLE), "sleeper"), 404, "has no available versions")


def test_trap_29_content_type_is_ignored(plain: Client) -> None:
    for headers in ({}, {"Content-Type": "text/xml"}):
        assert plain.infer(ask(SIMPLE), headers=headers).status == 200


def test_trap_30_largest_body(bounded: Client) -> None:
    """The status is 413 as RFC 9110 has it (Triton: 400); the text names the limit, inflated bodies count inflated."""
    body = json.dumps(ask(SIMPLE)).encode()
    assert bounded.infer(body.ljust(100_000)).status == 200
    refused(bounded.infer(body.ljust(100_001)), 413, "100000")
    bomb = gzip.compress(body.ljust(1_000_000))
    assert len(bomb) < 100_000
    refused(bounded.ask(infer(bomb, headers={"Content-Encoding": "gzip"})), 413, "100000")
    assert bounded.ask(Http("GET", "/v2/health/live")).status == 200
