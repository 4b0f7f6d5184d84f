"""perf_analyzer, Triton's load generator, unchanged against a whole gateway: it must measure, find every counter that
it reads, and be answered rightly.

perf_analyzer exports what it sent and got; answers are compared element by element. Its report has the differences of
the server's statistics between two moments of its own choice: a request or two at the beginning may be missing there,
so whole runs are counted here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.differential.triton_process import TritonProcess, triton
from tests.ingress.certificates import Certificates
from tests.live import models, venvs
from tests.live.example_models import MODELS as EXAMPLES
from tests.live.example_models import for_gateway, for_triton
from tests.live.gateway_process import GatewayProcess, gateway, until

pytestmark = pytest.mark.slow
COUNT = 60
MODELS = {
    "echo": models.identity("FP32", 5),
    "words": models.identity("BYTES"),
    "two": models.two_inputs(),
    "cached": models.identity("FP32", 5),
    "small": models.identity("FP32", 5),
    "direct": models.running_sum(),
    "oldest": models.running_sum(),
}
ENSEMBLE = """
platform: "ensemble"
max_batch_size: 8
input [ { name: "IN" data_type: TYPE_FP32 dims: [ 5 ] } ]
output [ { name: "OUT" data_type: TYPE_FP32 dims: [ 5 ] } ]
ensemble_scheduling { step [
  { model_name: "echo" model_version: -1
    input_map { key: "x" value: "IN" } output_map { key: "y" value: "between" } },
  { model_name: "small" model_version: -1
    input_map { key: "x" value: "between" } output_map { key: "y" value: "OUT" } } ] }
"""
CONFIGS = {
    "cached": "max_batch_size: 8 response_cache { enable: true }",
    "small": "max_batch_size: 8 dynamic_batching { }",
    "direct": models.RUNNING_SUM % "direct { }",
    "oldest": models.RUNNING_SUM % "oldest { max_candidate_sequences: 4 }",
}


@pytest.fixture(scope="module")
def analyzer() -> venvs.Program:
    return venvs.need(venvs.perf_analyzer)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces") / "trace.json"


@pytest.fixture(scope="module")
def served(analyzer: venvs.Program, tmp_path_factory: pytest.TempPathFactory, traces: Path) -> Iterator[GatewayProcess]:
    root = models.repository(tmp_path_factory.mktemp("models"), MODELS, CONFIGS)
    (root / "pair" / "1").mkdir(parents=True)
    (root / "pair" / "config.pbtxt").write_text(ENSEMBLE)
    config = traces.parent / "gateway.yaml"
    config.write_text(f"server:\n  client_shared_memory: true\n  trace: {{file: {traces}}}\n")
    with gateway("serve", str(root), "-c", str(config), "--workers", "2") as process:
        yield process


@dataclass(frozen=True)
class Measured:
    text: str
    requests: list[dict[str, Any]]
    """As exported: `request_inputs`, one `response_outputs`, `sequence_id` of a sequence's."""
    statistics: dict[str, int]
    """What the server's statistics of the model grew by: `rows`, `executions`, `requests`, `hits`."""

    def said(self, label: str) -> list[int]:
        """The numbers behind `label` in the report; several, of an ensemble."""
        return [int(number) for number in re.findall(rf"^\s*{re.escape(label)}: (\d+)", self.text, re.MULTILINE)]


class Bench:
    """Runs perf_analyzer and fails unless it says that all went well."""

    def __init__(self, analyzer: venvs.Program, served: GatewayProcess, folder: Path) -> None:
        self.analyzer, self.served, self.folder = analyzer, served, folder

    def start(self, protocol: str, model: str, *arguments: str, scheme: str = "") -> tuple[int, str]:
        port = self.served.port if protocol == "http" else self.served.grpc_port
        done = self.analyzer.run("-m", model, "-i", protocol, "-u", f"{scheme}127.0.0.1:{port}", *arguments)
        return done.returncode, done.stdout

    def measure(self, protocol: str, model: str, *arguments: str, count: int = COUNT) -> Measured:
        """One measurement of `count` requests."""
        export = self.folder / "export.json"
        export.unlink(missing_ok=True)
        told = ("--request-count", str(count), "--profile-export-file", str(export))
        before = self.statistics(model)
        code, text = self.start(protocol, model, *told, *arguments)
        assert code == 0, text
        assert "WARNING" not in text, text
        grown = {name: value - before[name] for name, value in self.statistics(model).items()}
        (experiment,) = json.loads(export.read_text())["experiments"]
        assert len(experiment["requests"]) >= count
        return Measured(text, experiment["requests"], grown)

    def statistics(self, model: str) -> dict[str, int]:
        (found,) = json.loads(self.served.request("GET", f"/v2/models/{model}/stats")[2])["model_stats"]
        durations = found["inference_stats"]
        return {
            "rows": found["inference_count"],
            "executions": found["execution_count"],
            "requests": durations["success"]["count"],
            "hits": durations["cache_hit"]["count"],
        }


@pytest.fixture
def bench(analyzer: venvs.Program, served: GatewayProcess, tmp_path: Path) -> Bench:
    return Bench(analyzer, served, tmp_path)


def check_echoes(requests: list[dict[str, Any]], rows: int = 1, given: str = "x", got: str = "y") -> None:
    """The export has the input of one row, which every row of the request repeats."""
    for request in requests:
        (answer,) = request["response_outputs"]
        assert answer[got] == request["request_inputs"][given] * rows


@pytest.mark.parametrize(
    ("protocol", "rows", "arguments"),
    [
        ("http", 1, ""),
        ("http", 2, "-b 2"),
        ("http", 1, "--input-tensor-format json --output-tensor-format json"),
        ("http", 1, "--async --concurrency-range 8"),
        ("http", 1, "--concurrency-range 4"),
        ("grpc", 1, ""),
        ("grpc", 2, "-b 2"),
        ("grpc", 1, "--async --concurrency-range 8"),
        ("grpc", 3, "-b 3 --streaming --async --concurrency-range 8"),
        ("grpc", 1, "--grpc-compression-algorithm gzip"),
        ("grpc", 1, "-x 1 --request-parameter tenant:7:int --request-parameter note:hello:string"),
    ],
)
def test_every_way_of_asking(bench: Bench, protocol: str, rows: int, arguments: str) -> None:
    measured = bench.measure(protocol, "echo", *arguments.split())
    check_echoes(measured.requests, rows)
    assert (measured.statistics["rows"], measured.statistics["requests"]) == (COUNT * rows, COUNT)
    (said,) = measured.said("Inference count")
    assert 0 < said <= COUNT * rows
    assert 0 < measured.said("Execution count")[0] <= measured.statistics["executions"] <= COUNT


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_tensors_in_shared_memory(bench: Bench, protocol: str) -> None:
    """Its export knows nothing of what is in shared memory; the content is checked in test_triton_examples.py."""
    measured = bench.measure(protocol, "echo", "--shared-memory", "system", "-b", "2")
    assert measured.statistics["rows"] == 2 * COUNT
    text = ("--shape", "x:3", "--string-length", "9")
    assert bench.measure(protocol, "words", "--shared-memory", "system", *text).statistics["rows"] == COUNT
    assert json.loads(bench.served.request("GET", "/v2/systemsharedmemory/status")[2]) == []


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_shared_memory_that_is_too_small_is_told(bench: Bench, protocol: str) -> None:
    options = ("--shared-memory", "system", "--shape", "x:3", "--output-shared-memory-size", "4")
    code, text = bench.start(protocol, "words", "--request-count", "10", "--string-length", "9", *options)
    assert code != 0
    assert "for output 'y' (4 bytes) should be at least 39 bytes" in text


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_text_of_a_shape_the_user_states(bench: Bench, protocol: str) -> None:
    measured = bench.measure(protocol, "words", "--shape", "x:3", "--string-length", "20")
    check_echoes(measured.requests)


def test_inputs_of_a_shape_the_user_states(bench: Bench) -> None:
    for request in bench.measure("http", "two", "--shape", "a:3", "--shape", "b:3").requests:
        a, b = (np.array(request["request_inputs"][name], np.int32) for name in "ab")
        (answer,) = request["response_outputs"]
        assert (answer["sum"], answer["product"]) == ((a + b).tolist(), (a * b).tolist())


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_several_levels_of_load(bench: Bench, protocol: str) -> None:
    """Windows of time, as it measures by default. It may find that a busy machine is not steady, and say so."""
    report = bench.folder / "report.csv"
    window = ("-p", "400", "-s", "90", "-r", "3", "--percentile", "95", "--verbose-csv", "-f", str(report))
    code, text = bench.start(protocol, "echo", "--concurrency-range", "1:3:2", *window)
    assert code == 0 or "Failed to obtain stable measurement" in text, text
    assert "error" not in text.lower(), text
    if "Failed to obtain stable measurement" not in text:
        lines = report.read_text().splitlines()
        assert [line.split(",")[0] for line in lines] == ["Concurrency", "1", "3"]
        assert "Server Compute Infer" in lines[0]


def test_a_rate_of_requests(bench: Bench) -> None:
    check_echoes(bench.measure("grpc", "echo", "--request-rate-range", "50", "--async").requests)


@pytest.mark.parametrize("model", ["direct", "oldest"])
@pytest.mark.parametrize("protocol", ["http", "grpc", "stream"])
def test_sequences(bench: Bench, protocol: str, model: str) -> None:
    """Over HTTP it may, at its end, send a sequence's END before the START of the same is answered, on another
    connection; which of them arrives first is luck, with any server. Until then every sequence is told its own sum."""
    given = [[1, 2, 3], [10, 20, 30, 40]]
    data = bench.folder / "data.json"
    data.write_text(json.dumps({"data": [[{"INPUT": [value]} for value in values] for values in given]}))
    streaming = ("--streaming",) if protocol == "stream" else ()
    options = ("--concurrency-range", "4", "--input-data", str(data), "--sequence-id-range", "10:90")
    measured = bench.measure("http" if protocol == "http" else "grpc", model, *streaming, *options)
    sums: dict[int, int] = {}
    seen = 0
    for request in sorted(measured.requests, key=lambda request: int(request["timestamp"])):
        identity, value = request["sequence_id"], request["request_inputs"]["INPUT"]
        sums[identity] = value if value in {1, 10} else sums[identity] + value
        for answer in request["response_outputs"]:
            seen += 1
            assert answer["OUTPUT"] == sums[identity]
    assert seen >= COUNT


def test_a_sequence_takes_one_row(bench: Bench) -> None:
    code, text = bench.start("http", "direct", "-b", "2")
    assert code != 0
    assert "can not specify batch size > 1 when using a sequence model" in text


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_an_ensemble_and_its_models(bench: Bench, protocol: str) -> None:
    measured = bench.measure(protocol, "pair", "-b", "2")
    check_echoes(measured.requests, 2, "IN", "OUT")
    assert "Composing models:" in measured.text
    for name in ("echo", "small"):
        assert re.search(rf"^\s*{name}, version: 1\s*$", measured.text, re.MULTILINE), measured.text
    assert measured.statistics["rows"] == 2 * COUNT
    assert len(measured.said("Inference count")) == 3
    assert min(measured.said("Inference count")) > 0


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_cached_model(bench: Bench, protocol: str) -> None:
    measured = bench.measure(protocol, "cached")
    check_echoes(measured.requests)
    assert measured.statistics["hits"] >= COUNT - 1
    assert measured.statistics["hits"] + measured.statistics["rows"] == measured.statistics["requests"] == COUNT
    assert measured.said("Cache hit count")[0] > 0


def test_metrics_of_the_server(bench: Bench) -> None:
    url = f"http://127.0.0.1:{bench.served.operations_port}/metrics"
    options = ("--verbose-csv", "--collect-metrics", "--metrics-url", url, "--metrics-interval", "50")
    code, text = bench.start("http", "echo", "--request-count", str(COUNT), *options)
    assert code == 0, text
    unknown = set(re.findall(r"Unable to parse '(\w+)' metric", text))
    assert all(name.startswith("nv_gpu_") for name in unknown), text
    assert "Unable to" not in text.replace("Unable to parse 'nv_gpu_", ""), text


def test_traces_on_request(bench: Bench, traces: Path) -> None:
    settings = ("--trace-level", "TIMESTAMPS", "--trace-rate", "10", "--log-frequency", "5")
    bench.measure("http", "echo", *settings)
    first = traces.with_name(f"{traces.name}.0")
    until(first.exists, 60.0, "no traces were written")
    until(lambda: "REQUEST_START" in first.read_text(), 60.0, "the traces have no timestamps")


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_what_cannot_be_is_told(bench: Bench, protocol: str) -> None:
    code, text = bench.start(protocol, "nobody")
    assert code != 0
    assert "Request for unknown model: 'nobody' is not found" in text
    code, text = bench.start(protocol, "echo", "-x", "9")
    assert code != 0
    assert "version 9 is not found" in text
    code, text = bench.start(protocol, "small", "-b", "9", "--request-count", "10")
    assert code != 0
    assert "<= 8" in text


def test_encrypted(analyzer: venvs.Program, tmp_path: Path) -> None:
    authority = str(Certificates(tmp_path)["ca"])
    root = models.repository(tmp_path / "models", {"echo": models.identity("FP32", 5)})
    config = tmp_path / "gateway.yaml"
    config.write_text("server:\n  tls: {cert: server.pem, key: server-key.pem}\n")
    counted = ("--request-count", str(COUNT))
    with gateway("serve", str(root), "-c", str(config), "--workers", "1") as served:
        bench = Bench(analyzer, served, tmp_path)
        trust = ("--ssl-https-ca-certificates-file", authority)
        code, text = bench.start("http", "echo", *counted, *trust, scheme="https://")
        assert code == 0, text
        secured = ("--ssl-grpc-use-ssl", "true", "--ssl-grpc-root-certifications-file", authority)
        code, text = bench.start("grpc", "echo", *counted, *secured)
        assert code == 0, text
        assert served.metric("nv_inference_count", model="echo") == 2 * COUNT
        code, text = bench.start("http", "echo", *counted, scheme="https://")
        assert code != 0, "the authority is not known to it"


SAME = (
    ("http", "-m simple"),
    ("grpc", "-m simple -b 3"),
    ("http", "-m simple_string --string-data 7 --shared-memory system"),
    ("grpc", "-m simple_sequence --streaming --concurrency-range 3 --sequence-length 4"),
    ("http", "-m nobody"),
    ("grpc", "-m simple -x 7"),
    ("http", "-m simple_identity --shape x:2 --shared-memory system --output-shared-memory-size 3"),
    ("grpc", "-m simple --shared-memory cuda"),
)


def test_what_it_says_is_what_it_says_of_triton(analyzer: venvs.Program, tmp_path: Path) -> None:
    """Line by line, but for the numbers."""

    def reports(server: GatewayProcess | TritonProcess) -> list[tuple[int, list[str]]]:
        found = []
        for protocol, arguments in SAME:
            address = f"127.0.0.1:{server.port if protocol == 'http' else server.grpc_port}"
            done = analyzer.run("-u", address, "-i", protocol, *arguments.split(), "--request-count", "20")
            found.append((done.returncode, re.sub(r"\d+(\.\d+)?", "N", done.stdout).splitlines()))
        return found

    with triton(for_triton(tmp_path / "triton"), sorted(EXAMPLES)) as real:
        expected = reports(real)
    with gateway("serve", str(for_gateway(tmp_path / "gateway")), "--allow-client-shm", "--workers", "2") as ours:
        got = reports(ours)
    assert [code for code, _ in expected] == [0] * 4 + [99] * 4
    for (protocol, arguments), of_triton, of_ours in zip(SAME, expected, got, strict=True):
        assert of_ours == of_triton, f"{protocol} {arguments}"
