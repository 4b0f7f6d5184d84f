"""What a configuration promises: every fault at once with file, line and a way out; nothing secret, nothing unasked."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest

from tests.contract.black_box import command, configuration, coreutils_digest, put, times

pytestmark = pytest.mark.slow

FAULTY = """\
registries:
  mlflow: {url: "http://mlflow:5000", token: plain-secret}
  s4: {}
inference_log:
  directry: x
  postgres: {dsn: "postgresql://u:hunter2@db/x"}
models:
  - name: a
    source: models:/a@champion
    digest: sha256:12
    verification: maybe
    canary: {source: x, percent: 101}
  - name: b
    source: models:/b@champion
    inference_log: {overflow: sometimes}
  - name: c
    source: models:/c@champion
    inference_log: {sampling: 2}
  - name: d
    source: models:/d@champion
    inference_log: {payloads: {tensors: {x: encrypt}}}
    golden: {rtoll: 1}
"""
TOLD = {
    2: "env:", 3: "s3", 5: "directory", 6: "env:", 10: "sha256", 11: "enforce", 12: "100",
    15: "spill", 18: "1", 21: "truncate", 22: "rtol",
}  # fmt: skip
"""Line → what its message names."""


def lines(text: str) -> dict[int, str]:
    """Messages by the line of gateway.yaml that they name."""
    found: dict[int, str] = defaultdict(str)
    parts = re.split(r"gateway\.yaml:(\d+)", text)
    for number, message in zip(parts[1::2], parts[2::2], strict=True):
        found[int(number)] += message
    return found


def test_check_prints_every_fault_at_once_and_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(FAULTY)
    done = command("check", "-c", str(file))
    assert done.returncode == 2
    said = done.stdout + done.stderr
    told = lines(said)
    assert sorted(told) == sorted(TOLD), said
    for number, part in TOLD.items():
        assert part in told[number], (number, told[number])
    assert "plain-secret" not in said
    assert "hunter2" not in said


def test_check_knows_what_cannot_be_kept_or_asked(tmp_path: Path) -> None:
    put(tmp_path, "m", "1", 2.0)
    put(tmp_path, "n", "1", 2.0)
    (tmp_path / "model.pkl").write_bytes(b"\x80\x04N.")
    file = tmp_path / "gateway.yaml"
    file.write_text(
        """\
inference_log: {retention_days: 182}
models:
  - {name: short, source: m, inference_log: {retention_days: 30}}
  - {name: spilling, source: m, inference_log: {overflow: spill}}
  - {name: elsewhere, source: "s3://bucket/m"}
  - {name: unasked, source: "models:/m@champion"}
  - {name: odd, source: "ftp://host/m"}
  - {name: pickled, source: model.pkl}
"""
    )
    done = command("check", "-c", str(file))
    assert done.returncode == 2
    said = done.stdout + done.stderr
    told = lines(said)
    expected = {1: "183", 3: "183", 4: "spill_directory", 5: "registries", 6: "registries", 7: "", 8: "gateway convert"}
    assert sorted(told) == sorted(expected), said
    for number, part in expected.items():
        assert part in told[number], (number, told[number])


def test_a_pinned_digest_is_compared_by_check_and_at_start(tmp_path: Path) -> None:
    is_there = coreutils_digest(put(tmp_path, "m", "1", 2.0))
    pinned = f"sha256:{'0' * 64}"
    file = configuration(tmp_path / "gateway.yaml", {"models": [{"name": "m", "source": "m", "digest": pinned}]})
    start = ("serve", "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
    for arguments, code in ((("check",), 2), (start, 4)):
        done = command(*arguments, "-c", str(file))
        said = done.stdout + done.stderr
        assert done.returncode == code, said
        assert is_there in said
        assert pinned in said


def test_retention_can_be_short_where_it_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(times(2.0))
    log = {"retention_days": 7, "allow_short_retention": True}
    file = configuration(tmp_path / "gateway.yaml", {"inference_log": log, "models": [{"source": "m.onnx"}]})
    done = command("check", "-c", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "inference-log").exists(), "checking makes nothing"


def test_the_schema_names_every_key_of_the_documents() -> None:
    schema = json.loads(command("schema").stdout)
    assert {"registries", "inference_log", "models"} <= set(schema["properties"])
    text = json.dumps(schema)
    for key in ("retention_days", "sampling", "canary", "shadow", "golden", "poll_interval_s", "showcase_tables"):
        assert f'"{key}"' in text
