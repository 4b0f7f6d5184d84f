"""NaN and Infinity in bodies that only the fast parser may read."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import Malformed
from gateway.protocol.json_literals import MAX_LITERALS, MAX_QUOTES, Literals
from gateway.protocol.oip_json import SLOW_BYTES, RequestDecoder

from .oip_samples import PATIENT, decode, model, naive_bytes, of_x, refused, request_body, tensor_spec, x_of

FILLER = b" " * SLOW_BYTES


def large(data: str, datatype: str = "FP32", shape: str = "[1,3]", extra: str = "") -> bytes:
    return request_body(datatype, data, shape, extra) + FILLER


@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
def test_literals_come_back_as_they_were(datatype: str) -> None:
    body = large("[NaN,-Infinity,[Infinity]]", datatype)
    assert x_of(decode(of_x(datatype), body)) == naive_bytes(datatype, [float("nan"), float("-inf"), float("inf")])


@PATIENT
@given(st.lists(st.floats(allow_nan=False) | st.sampled_from([float("nan")]), min_size=1, max_size=40))
def test_any_doubles(values: list[float]) -> None:
    body = large(json.dumps(values), "FP64", f"[1,{len(values)}]")
    request = decode(of_x("FP64"), body)
    read = np.frombuffer(x_of(request), "<f8")
    np.testing.assert_array_equal(read, np.array(values))


@pytest.mark.parametrize("name", ["NaN", "Infinity", "a-Infinity", "[NaN]"])
def test_literals_in_strings_are_text(name: str) -> None:
    spec = model([tensor_spec(name)])
    body = large("[1,NaN,3]", extra=f'"id":"{name}",').replace(b'"X"', json.dumps(name).encode())
    request = RequestDecoder(spec).decode(body)
    assert request.request_id == name
    assert x_of(request) == naive_bytes("FP32", [1, float("nan"), 3])


@pytest.mark.parametrize(
    "data",
    [
        "[1NaN,2,3]", "[NaN1,2,3]", "[-NaN,2,3]", "[+Infinity,2,3]", "[--Infinity,2,3]", "[1-Infinity,2]", "[NaNNaN,2]",
        "[NaN,2,3", "[.NaN,2,3]", "[1e NaN,2]", "[nan,2,3]", "[Inf,2,3]",
    ],
)  # fmt: skip
def test_what_is_no_json_stays_none(data: str) -> None:
    refused(of_x(), large(data), "must be valid")


def test_a_body_that_holds_a_stand_in_itself() -> None:
    for text in ("1.7976931348623119e+308", "1.7976931348623123e308", "-1.7976931348623123e+308"):
        refused(of_x("FP64"), large(f"[NaN,{text},3]", "FP64"), "binary tensor extension")
        expected = naive_bytes("FP64", [1, float(text), 3])
        assert x_of(decode(of_x("FP64"), large(f"[1,{text},3]", "FP64"))) == expected


def test_literals_where_no_numbers_belong() -> None:
    refused(of_x("INT32"), large("[1,NaN,3]", "INT32"), "'X'", "INT32 takes integers only")
    refused(of_x("BOOL"), large("[true,NaN,true]", "BOOL"), "'X'")
    refused(of_x(), large("[1,2,3]", extra='"foo":NaN,'), "'data' arrays")
    refused(of_x(), large("[1,NaN,3]", extra='"id":"\\"",'), "binary tensor extension")


def test_shape_still_counts() -> None:
    with pytest.raises(Malformed, match="needs 3 elements"):
        decode(of_x(), large("[1,NaN]"))


def test_bounds() -> None:
    assert Literals(b"[" + b"NaN," * MAX_LITERALS + b"1]").text is not None
    assert Literals(b"[" + b"NaN," * (MAX_LITERALS + 1) + b"1]").text is None
    assert Literals(b'"' * (MAX_QUOTES + 1) + b"NaN").text is None
    assert Literals(b"[1,2]").text is None


def test_nothing_is_copied_without_need() -> None:
    numbers: np.ndarray[Any, Any] = np.array([1.0, 2.0])
    assert Literals(b"[NaN]").restored(numbers) is numbers
