"""The elements of JSON tensors: types, ranges, nesting and counts, element by element."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import simdjson
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.tensor import DATATYPE, element_count
from gateway.errors import InvalidRequest
from gateway.protocol.json_strict import MinusZero
from gateway.protocol.oip_data import MAX_DEPTH, from_array, from_checked, from_json
from gateway.protocol.oip_plan import InputPlan

from .oip_samples import INTEGERS, JSON_DATATYPES, naive_bytes, tensor_bytes

SAMPLES: dict[str, list[Any]] = {
    "BOOL": [True, False, True, False],
    "BYTES": ["", "hé", "b\0c", "😀"],
    "FP32": [1, 2.5, -0.0, 1e39],
    "FP64": [1, 2.5, -0.0, 1e300],
    **{name: [0, 1, np.iinfo(DATATYPE[name].numpy).max, np.iinfo(DATATYPE[name].numpy).min] for name in INTEGERS},
}


def plan(datatype: str, *shape: int) -> InputPlan:
    found = DATATYPE[datatype]
    return InputPlan(0, "X", found, shape, element_count(shape), in_json=found.kind != "half")


def both(datatype: str, text: str, *shape: int) -> list[bytes]:
    """`text` decoded from lists and from a simdjson array."""
    import json

    planned = plan(datatype, *shape)
    array = simdjson.Parser().parse(text.encode())
    return [tensor_bytes(from_json(planned, json.loads(text))), tensor_bytes(from_array(planned, array))]


def refused(datatype: str, data: Any, *words: str, shape: tuple[int, ...] = (1, 3)) -> None:
    with pytest.raises(InvalidRequest) as caught:
        from_json(plan(datatype, *shape), data)
    assert caught.value.status == 400
    for word in ("'X'", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("datatype", JSON_DATATYPES)
def test_every_datatype(datatype: str) -> None:
    data = SAMPLES[datatype]
    expected = naive_bytes(datatype, data)
    assert tensor_bytes(from_json(plan(datatype, 2, 2), list(data))) == expected
    assert tensor_bytes(from_checked(plan(datatype, 2, 2), list(data))) == expected


@pytest.mark.parametrize(
    "text", ["[1,2,3,4]", "[[1,2],[3,4]]", "[[1],[2,3,4]]", "[[[1]],2,[[],[3]],4]", "[[],[1,2,3,4]]"]
)
@pytest.mark.parametrize("datatype", ["FP32", "INT64", "UINT8"])
def test_any_nesting_is_flattened_in_order(datatype: str, text: str) -> None:
    assert both(datatype, text, 2, 2) == [naive_bytes(datatype, [1, 2, 3, 4])] * 2


@pytest.mark.parametrize("text", ["[]", "[[]]", "[[],[]]"])
@pytest.mark.parametrize("datatype", ["FP32", "INT64", "UINT8", "BOOL", "BYTES"])
def test_empty_data(datatype: str, text: str) -> None:
    assert both(datatype, text, 1, 0) == [b"", b""]


@pytest.mark.parametrize("datatype", JSON_DATATYPES)
@pytest.mark.parametrize("count", [0, 3, 5])
def test_count_that_differs_from_the_shape(datatype: str, count: int) -> None:
    data = (SAMPLES[datatype] * 2)[:count]
    refused(datatype, data, "[2, 2]", "needs 4 elements", f"holds {count}", shape=(2, 2))


@pytest.mark.parametrize("datatype", JSON_DATATYPES)
@pytest.mark.parametrize("wrong", [None, {}, {"a": 1}])
def test_null_and_objects_inside(datatype: str, wrong: Any) -> None:
    first, second = SAMPLES[datatype][:2]
    refused(datatype, [first, second, wrong], "element 2", datatype)
    refused(datatype, [first, [second, [wrong]]], "element 2", datatype)


@pytest.mark.parametrize("datatype", ["FP32", "FP64", *INTEGERS])
@pytest.mark.parametrize("wrong", ["1", True, False, ""])
def test_strings_and_booleans_inside_numbers(datatype: str, wrong: Any) -> None:
    refused(datatype, [1, wrong, 3], "element 1", datatype)


@pytest.mark.parametrize("datatype", INTEGERS)
@pytest.mark.parametrize("wrong", [1.0, -0.0, 1e3, math.nan, math.inf])
def test_floats_inside_integers(datatype: str, wrong: float) -> None:
    refused(datatype, [1, 2, wrong], "element 2", "integers")


@pytest.mark.parametrize("wrong", [1, 0, "true", 1.0])
def test_bool_takes_only_true_and_false(wrong: Any) -> None:
    refused("BOOL", [True, False, wrong], "element 2", "true or false")


@pytest.mark.parametrize("wrong", [1, True, 1.5])
def test_bytes_takes_only_strings(wrong: Any) -> None:
    refused("BYTES", ["a", "b", wrong], "element 2", "strings")


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_precision_has_no_json_form(datatype: str) -> None:
    refused(datatype, [1, 2, 3], f"receiving {datatype} data via JSON is not supported", "binary data format")
    with pytest.raises(InvalidRequest, match="binary data format"):
        from_array(plan(datatype, 1, 3), simdjson.Parser().parse(b"[1,2,3]"))


@pytest.mark.parametrize("data", [5, "abc", True, {"a": 1}, 1.5])
def test_data_that_is_not_an_array(data: Any) -> None:
    refused("FP32", data, "'data' must be an array")


@pytest.mark.parametrize("datatype", INTEGERS)
def test_integer_limits_are_exact(datatype: str) -> None:
    limits = np.iinfo(DATATYPE[datatype].numpy)
    low, high = int(limits.min), int(limits.max)
    assert both(datatype, f"[{low},{high}]", 1, 2) == [naive_bytes(datatype, [low, high])] * 2
    for wrong in (low - 1, high + 1, 10**30, -(10**30)):
        refused(datatype, [0, wrong, 0], str(wrong), "out of range", str(low), str(high))


@pytest.mark.parametrize("datatype", ["INT8", "UINT8", "INT16", "UINT16", "INT32", "UINT32"])
def test_integer_limits_of_large_arrays(datatype: str) -> None:
    limits = np.iinfo(DATATYPE[datatype].numpy)
    for wrong in (int(limits.min) - 1, int(limits.max) + 1):
        array = simdjson.Parser().parse(f"[0,{wrong},0]".encode())
        with pytest.raises(InvalidRequest, match=rf"'X': {wrong} is out of range|'X': -1 is out of range"):
            from_array(plan(datatype, 1, 3), array)


def test_64_bit_integers_do_not_pass_through_doubles() -> None:
    numbers = [9007199254740993, -9223372036854775808, 9223372036854775807]
    assert both("INT64", str(numbers), 1, 3) == [np.array(numbers, "<i8").tobytes()] * 2
    numbers = [9007199254740993, 18446744073709551615, 18446744073709551614]
    assert both("UINT64", str(numbers), 1, 3) == [np.array(numbers, "<u8").tobytes()] * 2


def test_fp32_overflow_is_infinity() -> None:
    expected = np.array([math.inf, -math.inf, 1], "<f4").tobytes()
    assert both("FP32", "[1e39,-1e39,1]", 1, 3) == [expected] * 2


def test_minus_zero_integer_literal() -> None:
    data: list[Any] = [MinusZero(0), 1, [MinusZero(0)]]
    assert tensor_bytes(from_json(plan("FP64", 3), list(data))) == np.array([-0.0, 1, -0.0], "<f8").tobytes()
    assert tensor_bytes(from_json(plan("INT32", 3), list(data))) == np.array([0, 1, 0], "<i4").tobytes()
    refused("BOOL", [True, False, MinusZero(0)], "element 2")


def nested(levels: int) -> Any:
    data: Any = 1
    for _ in range(levels):
        data = [data]
    return data


def test_nesting_has_a_limit() -> None:
    assert tensor_bytes(from_json(plan("FP32", 1, 1), nested(MAX_DEPTH))) == np.array([1], "<f4").tobytes()
    refused("FP32", nested(MAX_DEPTH + 1), f"nested deeper than {MAX_DEPTH} levels", shape=(1, 1))


def test_lone_surrogate_in_a_string() -> None:
    refused("BYTES", ["a", "b", "\ud800"], "surrogate")


@pytest.mark.parametrize(
    ("datatype", "text"),
    [("FP32", "[1,true,3]"), ("FP32", '[1,"2",3]'), ("FP32", "[1,null,3]"), ("INT32", "[1,2.0,3]"),
     ("UINT8", "[1,-1,3]"), ("BOOL", "[true,1,false]"), ("BYTES", '["a",1,"b"]'), ("FP32", "[1,2]"),
     ("FP32", "[1,{},3]"), ("INT64", "[1,9223372036854775808,3]")],
)  # fmt: skip
def test_large_arrays_are_refused_in_the_same_words(datatype: str, text: str) -> None:
    import json

    messages = []
    for decode, data in ((from_json, json.loads(text)), (from_array, simdjson.Parser().parse(text.encode()))):
        with pytest.raises(InvalidRequest) as caught:
            decode(plan(datatype, 1, 3), data)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


# -- FP16 and BF16, where the server's owner lets them stand in JSON ------------------------------------------------


def in_json(datatype: str, elements: int) -> InputPlan:
    return InputPlan(0, "X", DATATYPE[datatype], (1, elements), elements, in_json=True)


def nearest_half(datatype: str, value: float) -> int:
    """Bits of the value nearest to `value`, ties to even: by exact arithmetic over all candidates around it."""
    if math.isnan(value):
        return 0x7FC0 if datatype == "BF16" else 0x7E00
    sign = 0x8000 if math.copysign(1, value) < 0 else 0
    infinity = 0x7F80 if datatype == "BF16" else 0x7C00

    def exact(bits: int) -> Fraction:
        if bits == infinity:  # as if the exponent went on
            return 2 * exact(infinity - (128 if datatype == "BF16" else 1024))
        if datatype == "BF16":
            return Fraction(float(np.uint32(bits << 16).view(np.float32)))
        return Fraction(float(np.uint16(bits).view(np.float16)))

    if math.isinf(value):
        return sign | infinity
    wanted, low, high = abs(Fraction(value)), 0, infinity
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if exact(middle) <= wanted else (low, middle)
    if wanted >= exact(high):
        return sign | infinity
    below, above = wanted - exact(low), exact(high) - wanted
    return sign | (low if below < above or (below == above and low % 2 == 0) else high)


TIES = [1 + 2**-8, 1 + 2**-8 + 2**-40, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 2**-11 + 2**-50, 65519.99, 65520.0, 3.3961e38]


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
@settings(deadline=None)
@given(values=st.lists(st.floats() | st.floats(width=32) | st.sampled_from(TIES), min_size=1, max_size=8))
def test_halves_are_the_nearest_ones(datatype: str, values: list[float]) -> None:
    tensor = from_json(in_json(datatype, len(values)), list(values))
    bits = np.frombuffer(tensor_bytes(tensor), "<u2").tolist()
    for value, got in zip(values, bits, strict=True):
        expected = nearest_half(datatype, value)
        assert got & 0x7FFF == expected & 0x7FFF if math.isnan(value) else got == expected


def test_halves_of_integers_and_what_is_no_number() -> None:
    tensor = from_json(in_json("BF16", 3), [1, [-2, 10**40]])
    assert np.frombuffer(tensor_bytes(tensor), "<u2").tolist() == [0x3F80, 0xC000, 0x7F80]
    for wrong in ("1", True, None):
        with pytest.raises(InvalidRequest, match=r"element 0 is .*FP16 takes numbers only"):
            from_json(in_json("FP16", 1), [wrong])
    array = simdjson.Parser().parse(b"[1,2.5]")
    assert tensor_bytes(from_array(in_json("FP16", 2), array)) == np.array([1, 2.5], "<f2").tobytes()


def test_a_large_array_of_strings_is_refused_before_it_becomes_python_objects() -> None:
    array = simdjson.Parser().parse(b"[" + b'"",' * 1_048_576 + b'""]')
    with pytest.raises(InvalidRequest, match="'data' holds 1048577 elements, at most 1048576 strings are allowed"):
        from_array(plan("BYTES", 2), array)
