"""A round of gRPC load counts only if every call brought the answer that was checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.grpc_load import read_report, request_message
from benchmarks.server import BenchmarkError
from benchmarks.workload import prepare
from gateway.protocol import schema

REPORT = """
finished in 2.00s, 500.00 req/s, 1.00KB/s
requests: 1000 total, 1010 started, 1000 done, {succeeded} succeeded, {failed} failed, 0 errored, 0 timeout
status codes: 1000 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 1.00MB (1000000) total, 10.00KB (10000) headers (space savings 90.00%), 47.00KB ({data}) data
"""


def report(data: int, succeeded: int = 1000, failed: int = 0) -> str:
    return REPORT.format(data=data, succeeded=succeeded, failed=failed)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    path.write_text("".join(f"17000\t200\t{latency}\n" for latency in range(1, 201)))
    return path


def test_rate_and_latencies_come_from_the_report_and_the_log(log: Path) -> None:
    result = read_report(report(47_000), log, 47, "gateway")
    assert result.rate == 500.0
    assert 99 <= result.p50_us <= 102
    assert 196 <= result.p99_us <= 200


@pytest.mark.parametrize(
    "text",
    [
        report(0),  # every call failed with HTTP status 200 and no message
        report(46_953),  # one did
        report(94_000),  # answers longer than the one that was checked
        report(46_000, succeeded=999, failed=1),
        "h2load: could not connect",
    ],
)
def test_a_round_with_one_wrong_answer_does_not_count(text: str, log: Path) -> None:
    with pytest.raises(BenchmarkError):
        read_report(text, log, 47, "gateway")


def test_the_message_is_the_row_as_clients_send_it() -> None:
    work = prepare("tiny")
    request = schema.message("inference.ModelInferRequest").FromString(request_message(work, 3))
    assert request.raw_input_contents[0] == work.rows[3:4].tobytes()
    assert list(request.inputs[0].shape) == [1, 16]
