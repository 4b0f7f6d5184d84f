"""Bytes become the values that they are, and what was not kept is said."""

from __future__ import annotations

import hashlib
import json
import math
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.tensor import DATATYPES, pack_bytes
from gateway.inference_log import arrow_tables, rendering

Tensor = dict[str, Any]


def tensor(datatype: str, shape: list[int], data: bytes, policy: str = "keep", size: int | None = None) -> Tensor:
    return {
        "name": "x",
        "datatype": datatype,
        "shape": shape,
        "data": data,
        "policy": policy,
        "bytes": len(data) if size is None else size,
    }


@pytest.mark.parametrize("datatype", [d for d in DATATYPES if d.kind in ("int", "uint", "bool", "float")], ids=repr)
def test_numbers_of_every_datatype_are_exact(datatype: Any) -> None:
    values = np.array([[1, 0], [0, 1]], datatype.numpy)
    document = rendering.document_of(tensor(datatype.name, [2, 2], values.tobytes()))
    assert document["data"] == values.tolist()
    assert "note" not in document


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_fp32_reads_short_and_means_the_same_bits(numbers: list[float]) -> None:
    values = np.array(numbers, "<f4")
    data = rendering.document_of(tensor("FP32", [len(numbers)], values.tobytes()))["data"]
    assert np.array(data, "<f4").tobytes() == values.tobytes()
    assert rendering.document_of(tensor("FP32", [1], np.float32(0.1).tobytes()))["data"] == [0.1]


def test_half_precision_and_bfloat16() -> None:
    assert rendering.document_of(tensor("FP16", [1], np.float16(1.5).tobytes()))["data"] == [1.5]
    assert rendering.document_of(tensor("BF16", [2], b"\x80\x3f\x00\xc0"))["data"] == [1.0, -2.0]


def test_json_gets_words_for_what_it_has_no_numbers_for() -> None:
    values = np.array([math.nan, math.inf, -math.inf, 1.0], "<f8")
    document = rendering.document_of(tensor("FP64", [4], values.tobytes()))
    assert document["data"] == ["NaN", "Infinity", "-Infinity", 1.0]
    json.dumps(document, allow_nan=False)


def test_texts_and_bytes() -> None:
    data = pack_bytes(["grün".encode(), b"", b"\xff\x00"])
    assert rendering.document_of(tensor("BYTES", [3, 1], data))["data"] == [["grün"], [""], [{"base64": "/wA="}]]


def test_scalars_and_empty_tensors() -> None:
    assert rendering.document_of(tensor("INT8", [], b"\x05"))["data"] == 5
    assert rendering.document_of(tensor("INT8", [0, 3], b""))["data"] == []
    assert rendering.document_of(tensor("INT8", [2, 0], b""))["data"] == []


def test_what_is_not_kept_is_said() -> None:
    whole = np.arange(100, dtype="<f4").tobytes()
    dropped = rendering.document_of(tensor("FP32", [100], b"", "drop", 400))
    assert "data" not in dropped
    assert dropped["note"] == "400 bytes, not kept"
    digest = hashlib.sha256(whole).digest()
    hashed = rendering.document_of(tensor("FP32", [100], digest, "hash", 400))
    assert "data" not in hashed
    assert digest.hex() in hashed["note"]
    cut = rendering.document_of(tensor("FP32", [100], whole[:10], "truncate", 400))
    assert (cut["data"], cut["note"]) == ([0.0, 1.0], "400 bytes, of which the first 10 are kept")
    texts = rendering.document_of(tensor("BYTES", [9], pack_bytes([b"ab", b"cd"])[:-1], "truncate", 99))
    assert texts["data"] == ["ab"]


@given(
    st.sampled_from([d.name for d in DATATYPES] + ["NEW9"]),
    st.lists(st.integers(-3, 40), max_size=4),
    st.binary(max_size=64),
    st.sampled_from(["keep", "drop", "hash", "truncate", "new"]),
)
def test_whatever_stands_in_the_log_can_be_shown(datatype: str, shape: list[int], data: bytes, policy: str) -> None:
    document = rendering.document_of(tensor(datatype, shape, data, policy))
    json.dumps(document, allow_nan=False)
    assert document.keys() & {"data", "note", "base64"}


def test_values_out_of_queries() -> None:
    when = datetime(2026, 11, 23, 10, 0, 0, 5, UTC)
    value = {"at": when, "t": [tensor("INT8", [1], b"\x01")], "b": b"\x00", "n": None, "f": math.nan, "d": when.date()}
    assert rendering.jsonable(value) == {
        "at": "2026-11-23T10:00:00.000005Z",
        "t": [{"name": "x", "datatype": "INT8", "shape": [1], "data": [1]}],
        "b": "AA==",
        "n": None,
        "f": "NaN",
        "d": "2026-11-23",
    }


def test_what_a_query_made_of_a_tensor_is_no_tensor() -> None:
    for changed in ({"data": "0a"}, {"data": None}, {"shape": 3}, {"datatype": None}, {"policy": 1}, {"bytes": "x"}):
        value = tensor("INT8", [1], b"\x01") | changed
        assert rendering.jsonable(value) == {**value, "data": changed.get("data", "AQ==")} | changed
    assert rendering.jsonable(tensor("INT8", [1], b"") | {"data": None, "policy": "drop", "bytes": 1})["note"]


def test_a_document_has_every_column_of_the_log() -> None:
    """A new column that nobody shows would be a column nobody finds."""
    row: dict[str, Any] = dict.fromkeys(arrow_tables.REQUESTS.names)
    marked: dict[str, str | None] = {name: f"<{name}>" for name in row}
    marked |= dict.fromkeys(("received", "dispatched", "done")) | {"inputs": None, "outputs": None}
    text = json.dumps(rendering.request_document(marked, []))
    missing = [name for name, mark in marked.items() if mark is not None and mark not in text]
    assert missing == []


def test_json_cannot_command_a_terminal_and_means_the_same() -> None:
    said = {"id": "\x1b[2J \x9b2J \x7f \u202e \u2028 ä 数"}
    for indented in (False, True):
        text = rendering.json_text(said, indented=indented)
        assert text.replace("\n", "").isprintable()
        assert json.loads(text) == said
