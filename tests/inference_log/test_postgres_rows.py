"""From Arrow tables to records: what PostgreSQL can hold, and values exactly as they were."""

from __future__ import annotations

import json
import struct
from typing import Any
from uuid import UUID

import numpy as np
import orjson
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.tensor import DATATYPE, pack_bytes
from gateway.inference_log import arrow_tables, postgres_schema
from gateway.inference_log.frame import Column, Requests
from gateway.inference_log.postgres_rows import RequestRows, Tensor, _oip_tensor, json_text, tensors, text
from tests.inference_log.log_rows import BATCH, NOON, new_epoch, requests, row


@given(st.text(alphabet=st.sampled_from(["\0", "\\", "u", "0", '"', "a", "é"]), max_size=30))
def test_json_loses_its_nul_characters_and_nothing_else(value: str) -> None:
    for ascii_only in (True, False):
        found = json_text(json.dumps({value: value}, ensure_ascii=ascii_only))
        assert found is not None
        changed = value.replace("\0", "\ufffd")
        assert orjson.loads(found) == {changed: changed}
    assert text(value) == value.replace("\0", "\ufffd")


@pytest.mark.parametrize("value", ["", "{", "NaN", '{"a": NaN}', '"\\ud800"', "\0"])
def test_what_is_no_json_becomes_a_string_of_it(value: str) -> None:
    found = json_text(value)
    assert found is not None
    assert orjson.loads(found) == value.replace("\0", "\ufffd")


@pytest.mark.parametrize("name", sorted(set(DATATYPE) - {"BYTES", "BF16"}))
def test_numbers_in_json_are_the_numbers(name: str) -> None:
    values = np.array([0, 1, 2], DATATYPE[name].numpy)
    found = _oip_tensor(Tensor("x", name, [3], values.tobytes(), "keep", values.nbytes))
    assert orjson.loads(orjson.dumps(found["data"], option=orjson.OPT_SERIALIZE_NUMPY)) == values.tolist()


def test_bf16_and_bytes_in_json() -> None:
    bits = struct.pack("<3H", 0x3FC0, 0xC000, 0x0000)
    assert _oip_tensor(Tensor("x", "BF16", [3], bits, "keep", 6))["data"].tolist() == [1.5, -2.0, 0.0]
    found = _oip_tensor(Tensor("x", "BYTES", [2], pack_bytes(["é".encode(), b""]), "keep", 0))
    assert (found["data"], found["parameters"]) == (["é", ""], {})
    found = _oip_tensor(Tensor("x", "BYTES", [1], pack_bytes([b"\xff"]), "keep", 0))
    assert (found["data"], found["parameters"]) == (["/w=="], {"content_type": "base64"})


@given(
    st.lists(st.lists(st.binary(max_size=5), max_size=3) | st.none(), max_size=8), st.integers(0, 3), st.integers(0, 9)
)
def test_tensors_of_a_slice_are_those_of_its_rows(rows: list[list[bytes] | None], start: int, length: int) -> None:
    listed: list[Any] = [
        None
        if row is None
        else [
            {
                "name": f"t{n}",
                "datatype": "UINT8",
                "shape": [len(data)],
                "data": data,
                "policy": "keep",
                "bytes": len(data),
            }
            for n, data in enumerate(row)
        ]
        for row in rows
    ]
    column = pa.chunked_array([pa.array(listed, arrow_tables.REQUESTS.field("inputs").type)]).slice(start, length)
    found = tensors(column)
    expected = rows[start : start + length]
    assert [None if row is None else [one.data for one in row] for row in found] == expected


def test_records_have_the_columns_that_are_copied() -> None:
    epoch = new_epoch()
    table = arrow_tables.to_tables([(7, requests([1, 2, 3]))], epoch)["requests"]
    rows = RequestRows(table.slice(1), UUID(epoch))
    names = postgres_schema.REQUESTS.names
    found = [dict(zip(names, record, strict=True)) for record in rows.records(names)]
    assert [one["position"] for one in found] == [8, 9]
    assert [one["input_data"] for one in found] == [[struct.pack("<d", 2)], [struct.pack("<d", 3)]]
    assert {one["epoch"] for one in found} == {UUID(epoch)}
    assert found[0]["received_us"] == NOON * 10**6
    assert found[0]["inputs"] is found[1]["inputs"], "rows that are alike share one description"
    four = list(rows.four(postgres_schema.FOUR.names, {}))
    assert len(four) == 2
    assert len(four[0]) == len(postgres_schema.FOUR.names)


def test_the_showcases_rows_have_their_own_tensors_and_metadata() -> None:
    epoch = new_epoch()
    rows = RequestRows(arrow_tables.to_tables([(7, requests([1, 2, 3]))], epoch)["requests"], UUID(epoch))
    names = postgres_schema.FOUR.names
    found = [dict(zip(names, record, strict=True)) for record in rows.four(names, {})]
    assert [orjson.loads(one["inputs"])[0]["data"] for one in found] == [[1.0], [2.0], [3.0]]
    assert [orjson.loads(one["outputs"])[0]["data"] for one in found] == [[1.0], [4.0], [9.0]]
    assert [orjson.loads(one["raw_request"])["id"] for one in found] == [one["id"] for one in found]
    assert len({one["id"] for one in found}) == 3
    assert [orjson.loads(one["metadata"])["position"] for one in found] == [7, 8, 9]
    assert [orjson.loads(one["metadata"])["batch"]["row"] for one in found] == [0, 1, 2]


@pytest.mark.parametrize("policy", ["drop", "hash", "truncate"])
def test_what_was_not_kept_whole_has_no_values_in_the_showcases_tables(policy: Any) -> None:
    inputs = [Column("x", "FP64", None, [(1,)], b"12345678", None, policy, [800])]
    outputs = [Column("y", "FP64", None, [(1,)], b"12345678", None, "keep", None)]
    one = row(b"01937c5e-8f3a-7c2e-b1d4-2f6f0a9c1e77")
    frame = Requests(NOON * 10**9, 100.0, "digits", "3", "", "", [BATCH], [one], inputs, outputs)
    epoch = new_epoch()
    rows = RequestRows(arrow_tables.to_tables([(0, frame)], epoch)["requests"], UUID(epoch))
    names = postgres_schema.FOUR.names
    (record,) = rows.four(names, {})
    found = dict(zip(names, record, strict=True))
    assert (found["raw_request"], found["raw_response"], found["error"]) == (None, None, None)
    assert found["metadata"] is not None


def test_shadows_have_no_place_in_the_showcases_tables() -> None:
    one = row(b"01937c5e-8f3a-7c2e-b1d4-2f6f0a9c1e77")
    frame = Requests(NOON * 10**9, 100.0, "digits", "3", "", "shadow", [BATCH], [one], [], [])
    epoch = new_epoch()
    rows = RequestRows(arrow_tables.to_tables([(0, frame)], epoch)["requests"], UUID(epoch))
    assert list(rows.four(postgres_schema.FOUR.names, {})) == []
    assert len(list(rows.records(postgres_schema.REQUESTS.names))) == 1
