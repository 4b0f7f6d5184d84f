"""Exports: one file per digest, labels joined to the right rows, everything left out counted."""

from __future__ import annotations

import csv
import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace

from gateway.errors import ConfigError
from gateway.inference_log.exported_file import FORMS
from gateway.inference_log.exporting import Selection, export_log
from gateway.inference_log.flattening import Roles
from gateway.inference_log.frame import Column, Event, Requests
from gateway.inference_log.store import Store
from tests.inference_log.log_on_disk import event, ids, new_log, seal, write
from tests.inference_log.log_rows import DAY_S, NOON, requests

ALL = Selection()


def two_rows(numbers: range, **changes: Any) -> Requests:
    """Requests of two rows each: x = [n, n + 0.5], y = [[p, 1 - p]] with p = n / 100."""
    made = requests(numbers)
    inputs = b"".join(np.array([[n], [n + 0.5]], "<f4").tobytes() for n in numbers)
    outputs = b"".join(np.array([[1 - n / 100, n / 100]] * 2, "<f4").tobytes() for n in numbers)
    tensors: dict[str, Any] = {
        "inputs": [Column("x", "FP32", None, [(2, 1)], inputs, None, "keep", None)],
        "outputs": [Column("proba", "FP32", None, [(2, 2)], outputs, None, "keep", None)],
    }
    return replace(made, **(tensors | changes))


def said(request_id: str, key: str, at_us: int, **details: Any) -> Event:
    kind = "override" if "new" in details else "label"
    return event(
        "feedback", kind, {"request_id": request_id, "idempotency_key": key, "at_us": at_us, "row": None} | details
    )


def table(directory: Path, form: str = "parquet") -> list[dict[str, Any]]:
    (file,) = directory.glob("digits*")
    if form == "jsonl":
        return [json.loads(line) for line in file.read_text().splitlines()]
    if form == "evidently":
        with file.open() as stream:
            return list(csv.DictReader(stream))
    rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    return rows


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("sealed", [False, True])
def test_each_row_is_a_line_with_its_own_values(tmp_path: Path, form: str, sealed: bool) -> None:
    log, out = new_log(tmp_path / "log"), tmp_path / "out"
    made = two_rows(range(10, 13))
    write(log, [made])
    if sealed:
        seal(log)
    result = export_log(Store(log), form, out, ALL, Roles())
    (file,) = result.files
    assert (file.requests, file.rows, file.labelled, file.digest) == (3, 6, 0, "sha256:aa")
    assert file.sha256 == hashlib.sha256((out / file.path).read_bytes()).hexdigest()
    lines = table(out, form)
    found = {(line["request_id"], int(line["row"])): line for line in lines}
    for n, request_id in zip(range(10, 13), ids(made), strict=True):
        for row in (0, 1):
            line = found[request_id, row]
            assert float(line["x"]) == n + row / 2
            assert float(line["prediction_probability"]) == pytest.approx(n / 100)
            assert int(line["prediction"]) == 0
            assert (line["digest"], line["model_version"]) == ("sha256:aa", "3")
    document = json.loads((out / "export.json").read_text())
    assert document["files"][0]["columns"]["x"] == "input x[0]"
    if form == "nannyml":
        assert document["files"][0]["settings"]["nannyml"]["y_pred_proba"] == "prediction_probability"
        assert document["files"][0]["settings"]["nannyml"]["problem_type"] == "classification_binary"


def test_versions_never_mix(tmp_path: Path) -> None:
    log = new_log(tmp_path / "log")
    write(log, [two_rows(range(2)), two_rows(range(3), digest="sha256:bb"), two_rows(range(4), version="4", digest="")])
    result = export_log(Store(log), "parquet", tmp_path / "out", ALL, Roles())
    assert {(f.path, f.requests) for f in result.files} == {
        ("digits-3-aa.parquet", 2),
        ("digits-3-bb.parquet", 3),
        ("digits-4-digest-unknown.parquet", 4),
    }
    for file in result.files:
        assert set(pq.read_table(tmp_path / "out" / file.path)["digest"].to_pylist()) == {file.digest}


def test_labels_and_overrides_join_their_rows_and_the_last_word_counts(tmp_path: Path) -> None:
    log = new_log(tmp_path / "log")
    made = two_rows(range(4))
    first, second, third, fourth = ids(made)
    write(log, [made])
    write(
        log,
        [
            said(first, "a", 5, label=1),
            said(first, "b", 9, label=0, row=1),
            said(first, "a", 99, label=7),  # the same post again: does not count
            said(second, "c", 5, label=[1, 0]),
            said(third, "d", 8, label=1, row=0),
            said(third, "e", 7, label=0, row=0),  # said before it
            said(third, "f", 7, old=0, new=1, row=1),
            said(third, "g", 7, label=1, row=2),  # there is no such row
            said("01a2082b-ebb9-7edb-aca6-7c599a775e75", "h", 7, label=1),  # nor such a request
        ],
    )
    export_log(Store(log), "parquet", tmp_path / "out", ALL, Roles())
    found = {(line["request_id"], line["row"]): line for line in table(tmp_path / "out")}
    targets = {where: line["target"] for where, line in found.items()}
    assert targets == {
        (first, 0): 1,
        (first, 1): 0,
        (second, 0): 1,
        (second, 1): 0,
        (third, 0): 1,
        (third, 1): None,
        (fourth, 0): None,
        (fourth, 1): None,
    }
    assert {where for where, line in found.items() if line["human_override"] is not None} == {(third, 1)}


def test_of_labels_said_at_one_time_the_last_in_the_log_counts(tmp_path: Path) -> None:
    log = new_log(tmp_path / "log")
    made = two_rows(range(1))
    (one,) = ids(made)
    write(log, [made, *(said(one, f"key-{n}", 5, label=n) for n in range(500))])
    export_log(Store(log), "jsonl", tmp_path / "out", ALL, Roles())
    assert [line["target"] for line in table(tmp_path / "out", "jsonl")] == [499, 499]


@pytest.mark.parametrize(
    ("labels", "kept"),
    [([1, 2], [1, 2]), ([1, 2.5], [1.0, 2.5]), (["a", 2], ["a", "2"]), ([True, False], ["true", "false"])],
)
def test_labels_have_the_narrowest_type_that_holds_all(tmp_path: Path, labels: list[Any], kept: list[Any]) -> None:
    log = new_log(tmp_path / "log")
    made = two_rows(range(2))
    write(log, [made, *(said(one, one, 5, label=label) for one, label in zip(ids(made), labels, strict=True))])
    export_log(Store(log), "parquet", tmp_path / "out", ALL, Roles())
    found = {line["request_id"]: line["target"] for line in table(tmp_path / "out")}
    assert [found[one] for one in ids(made)] == kept


def test_what_has_no_line_is_counted(tmp_path: Path) -> None:
    log = new_log(tmp_path / "log")
    made = two_rows(range(3))
    failed = [one._replace(status=503) for one in two_rows(range(2)).rows]
    write(
        log,
        [
            made,
            two_rows(range(2), rows=failed),
            two_rows(range(5), variant="shadow"),
            two_rows(range(4), inputs=[], outputs=[]),
            event("gap", "dropped", {"rows": 17}),
        ],
    )
    result = export_log(Store(log), "parquet", tmp_path / "out", ALL, Roles())
    assert result.skipped == {
        "they were refused or failed": 2,
        "they were shadows, which answer nobody": 5,
        "their tensors were not kept (sampling)": 4,
    }
    assert [(file.requests, file.rows) for file in result.files] == [(3, 6)]
    assert {line["request_id"] for line in table(tmp_path / "out")} == set(ids(made))
    assert any("17 lost rows" in note for note in result.notes)
    assert json.loads((tmp_path / "out" / "export.json").read_text())["left_out"] == result.skipped


def test_model_and_time_choose(tmp_path: Path) -> None:
    log = new_log(tmp_path / "log")
    later = two_rows(range(5), wall_ns=(NOON + DAY_S) * 10**9)
    write(log, [two_rows(range(2)), later, two_rows(range(3), model="salary")])
    border = datetime.fromtimestamp(NOON + 60, UTC)
    cases = {Selection("digits", border): [5], Selection("digits", None, border): [2], Selection("salary"): [3]}
    for n, (selection, expected) in enumerate(cases.items()):
        result = export_log(Store(log), "jsonl", tmp_path / f"out{n}", selection, Roles())
        assert [file.requests for file in result.files] == expected


def test_a_directory_with_something_in_it_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "log", [two_rows(range(1))])
    with pytest.raises(ConfigError, match="it holds something already"):
        export_log(Store(tmp_path / "log"), "parquet", tmp_path, ALL, Roles())
    with pytest.raises(ConfigError, match="write parquet, jsonl, evidently, nannyml"):
        export_log(Store(tmp_path / "log"), "excel", tmp_path / "x", ALL, Roles())


def test_names_of_models_make_no_paths(tmp_path: Path) -> None:
    log = new_log(tmp_path / "log")
    write(log, [two_rows(range(1), model="../../evil", version="3/4", digest="sha256:cc")])
    (file,) = export_log(Store(log), "parquet", tmp_path / "out", ALL, Roles()).files
    assert "/" not in file.path
    assert {path.name for path in (tmp_path / "out").iterdir()} == {file.path, "export.json"}


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (["age", "height"], ["age", "height"]),
        (["x"], ["x_0", "x_1"]),
        (["a", "a"], ["x_0", "x_1"]),
        ([None, "b"], ["x_0", "x_1"]),
    ],
)
def test_a_registry_s_signature_names_the_columns_where_it_names_each(
    tmp_path: Path, names: list[str | None], columns: list[str]
) -> None:
    log = new_log(tmp_path / "log")
    made = requests(range(2))
    wide = [Column("x", "FP32", None, [(1, 2)], np.arange(4, dtype="<f4").tobytes(), None, "keep", None)]
    stated = {
        "digest": "sha256:aa",
        "source": "models:/digits/3",
        "signature": {"inputs": [{"name": n} for n in names]},
    }
    write(log, [event("lifecycle", "serving", stated), replace(made, inputs=wide)])
    (file,) = export_log(Store(log), "parquet", tmp_path / "out", ALL, Roles()).files
    assert [name for name, origin in file.columns.items() if origin.startswith("input")] == columns
    assert table(tmp_path / "out")[1][columns[1]] == 3
