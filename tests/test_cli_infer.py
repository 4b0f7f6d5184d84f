"""`gateway infer` and `gateway models` against a server on a real socket."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from gateway import cli_infer
from gateway.cli import main
from gateway.client import Access
from gateway.client_tensors import HEADER_LENGTH
from tests.test_client import Reply, serving

DIGEST = "sha256:" + "ab" * 32
PROVENANCE = {
    "X-Request-Id": "01937c5e-8f3a-7c2e-b1d4-2f6f0a9c1e77",
    "Inference-Model": f'"double";version="3";digest="{DIGEST}"',
    "Inference-Backend": '"onnx-1";attempt=2',
    "Inference-Batch": '"a1f3-000042";size=32;row=17',
    "Server-Timing": "queue;dur=0.81, infer;dur=1.43, total;dur=2.40",
}
METADATA = {
    "name": "double",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
}
MODELS = [
    {
        "name": "double",
        "version": "3",
        "state": "READY",
        "digest": DIGEST,
        "backends": [
            {"name": "onnx-1", "available": True, "in_flight": 1},
            {"name": "onnx-2", "available": False, "in_flight": 0},
        ],
        "max_batch_size": 32,
        "batching": "rows are independent",
        "reason": "",
        "source": "models:/double/3",
        "reference": "models:/double@live",
        "notes": ["digests are weak", "its registry is silent"],
    },
    {
        "name": "broken",
        "version": "1",
        "state": "FAILED",
        "digest": "",
        "backends": [],
        "reason": "not [an] ONNX file",
        "source": "/srv/broken",
    },
]


def double(method: str, path: str, headers: dict[str, str], body: bytes) -> Reply:
    """Twice the input, as a gateway would answer; reads JSON and binary inputs."""
    if path == "/api/models":
        return 200, {}, json.dumps(MODELS).encode()
    if not path.startswith("/v2/models/double"):
        return 404, {}, json.dumps({"error": f"Request for unknown model: '{path[11:]}' is not found"}).encode()
    if method == "GET":
        return 200, {}, json.dumps(METADATA).encode()
    end = int(headers.get(HEADER_LENGTH.lower(), len(body)))
    (entry,) = json.loads(body[:end])["inputs"]
    values = entry["data"] if "data" in entry else np.frombuffer(body[end:], "<f4").tolist()
    output = {"name": "y", "datatype": "FP32", "shape": entry["shape"], "data": [2 * value for value in values]}
    return 200, PROVENANCE, json.dumps({"model_name": "double", "outputs": [output]}).encode()


Said = pytest.CaptureFixture[str]


@pytest.mark.parametrize("data", ["[[1, 2], [3, 4]]", "[1, 2, 3, 4]", '{"x": [[1, 2], [3, 4]]}'])
def test_infer_prints_json_where_no_person_watches(data: str, capsys: Said) -> None:
    with serving(double) as url:
        assert main(["infer", "double", data, "--url", url]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {"y": [[2, 4], [6, 8]]}
    assert said.err == ""


def test_infer_reads_files_and_standard_input(tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "row.json").write_text("[1, 2]")
    np.save(tmp_path / "rows.npy", np.array([[1.0, 2.0]]))

    class Stdin:
        buffer = io.BytesIO(b"[[1, 2]]")

    monkeypatch.setattr("sys.stdin", Stdin)
    with serving(double) as url:
        for data in (f"@{tmp_path}/row.json", f"@{tmp_path}/rows.npy", "-"):
            assert main(["infer", "double", data, "--url", url]) == 0
            assert json.loads(capsys.readouterr().out) == {"y": [[2, 4]]}


def test_verbose_explains_the_provenance_on_standard_error(capsys: Said) -> None:
    with serving(double) as url:
        assert main(["infer", "double", "[1, 2]", "-v", "--url", url]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {"y": [[2, 4]]}
    *lines, last = said.err.splitlines()
    assert lines == [
        "request   01937c5e-8f3a-7c2e-b1d4-2f6f0a9c1e77",
        f"model     double version 3, digest {DIGEST}",
        "backend   onnx-1 executed it, attempt 2",
        "batch     a1f3-000042: 32 rows together, this request's first row is 17",
        "time      0.81 ms waiting in the queue",
        "time      1.43 ms executing the model",
        "time      2.40 ms in the gateway altogether",
    ]
    assert last.endswith("ms seen from here, connection included")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nope", "[1]"], "error: Request for unknown model: 'nope' is not found (status 404)\n"),
        (["a/b", "[1]"], "error: Request for unknown model: 'a%2Fb' is not found (status 404)\n"),
        (["double", "[1, 2, 3]"], "error: input 'x' has shape [-1, 2] (-1: any), but the data has shape [3]\n"),
        (["double", "[1"], "error: the data is not JSON: "),
        (["double", "@/nope.json"], "error: cannot read /nope.json: No such file or directory\n"),
    ],
)
def test_refusals_exit_with_1_and_say_why(arguments: list[str], expected: str, capsys: Said) -> None:
    with serving(double) as url:
        assert main(["infer", *arguments, "--url", url]) == 1
    assert capsys.readouterr().err.startswith(expected)


def test_no_server_is_one_line_with_a_hint(capsys: Said) -> None:
    assert main(["infer", "m", "[1]", "--url", "http://127.0.0.1:9"]) == 1
    assert "is the gateway running there?" in capsys.readouterr().err
    assert main(["models", "--ops-url", "http://127.0.0.1:9"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("or name its address with --ops-url)")


def test_models_is_one_line_a_model(capsys: Said) -> None:
    with serving(double) as url:
        assert main(["models", "--ops-url", url]) == 0
        assert capsys.readouterr().out.splitlines() == [
            f"double\t3\tREADY\t{DIGEST}\tonnx-1, onnx-2 (unavailable)\tmodels:/double/3 (models:/double@live)",
            "broken\t1\tFAILED\t-\t-\t/srv/broken",
        ]
        assert main(["models", "status", "broken", "--ops-url", url]) == 0
        reason = "not [an] ONNX file"
        line = ["broken", "1", "FAILED", "-", "-", "-", "-", reason, "/srv/broken", "-", f"not ready: {reason}"]
        assert capsys.readouterr().out == "\t".join(line) + "\n"
        assert main(["models", "status", "double", "--ops-url", url]) == 0
        assert "onnx-1 (1 in flight), onnx-2 (unavailable)\t32\trows are independent\t-" in capsys.readouterr().out
        assert main(["models", "list", "nope", "--ops-url", url]) == 1
        assert "no model is named 'nope'; there are: double, broken" in capsys.readouterr().err


def test_status_is_a_block_a_model_where_a_person_watches() -> None:
    text = io.StringIO()
    out = Console(file=text, force_terminal=True, width=80, color_system=None)
    with serving(double) as url:
        cli_infer.models(out, url, Access(10), detailed=True, only="double")
    assert text.getvalue().splitlines() == [
        "double version 3 READY",
        f"  digest          {DIGEST}",
        "  backends        onnx-1 (1 in flight)",
        "                  onnx-2 (unavailable)",
        "  max_batch_size  32",
        "  batching        rows are independent",
        "  source          models:/double/3 (models:/double@live)",
        "  notes           digests are weak",
        "                  its registry is silent",
    ]


def test_models_is_a_table_where_a_person_watches() -> None:
    text = io.StringIO()
    out = Console(file=text, force_terminal=True, width=80, color_system=None)
    listed = [
        {
            "name": "m", "version": "1", "state": "READY", "digest": DIGEST,
            "backends": [{"name": f"onnx-{n}", "available": True} for n in (10, 2, 1)],
        }
    ]  # fmt: skip
    with serving(lambda *_: (200, {}, json.dumps(listed).encode())) as url:
        cli_infer.models(out, url, Access(10), detailed=False, only=None)
    header, _, row = (line.rstrip() for line in text.getvalue().splitlines())
    assert [cell.strip() for cell in header.split("┃")] == ["name", "version", "state", "digest", "backends"]
    assert [cell.strip() for cell in row.split("│")] == [
        "m",
        "1",
        "READY",
        DIGEST[:19] + "…",
        "onnx-1, onnx-2, onnx-10",
    ]


@pytest.mark.parametrize(("width", "shown"), [(80, False), (120, True)])
def test_where_a_model_comes_from_is_listed_where_there_is_room(width: int, shown: bool) -> None:
    text = io.StringIO()
    with serving(double) as url:
        cli_infer.models(
            Console(file=text, force_terminal=True, width=width, color_system=None),
            *(url, Access(10)), detailed=False, only="double",
        )  # fmt: skip
    assert ("source" in text.getvalue()) is shown
    assert "unavailable" in text.getvalue()


@pytest.mark.parametrize("reply", [(404, {}, b'{"error":"Not Found"}'), (200, {}, b'{"a": 1}'), (200, {}, b"[1]")])
def test_the_wrong_port_is_named(reply: Any, capsys: Said) -> None:
    with serving(lambda *_: reply) as url:
        assert main(["models", "--ops-url", url]) == 1
    assert "operations port" in capsys.readouterr().err


def on_terminal() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=True, width=120, color_system=None), text


def test_a_person_sees_tables() -> None:
    out, text = on_terminal()
    with serving(double) as url:
        rows = json.dumps([[n, n] for n in range(60)])
        cli_infer.infer(out, out, "double", rows, url, Access(10), verbose=False)
        cli_infer.models(out, url, Access(10), detailed=True, only=None)
    said = text.getvalue()
    assert "FP32 [60, 2]" in said
    assert "98, 98" in said
    assert "118, 118" not in said
    assert "… and 10 more rows" in said
    assert "not [an] ONNX" in said


def test_wide_rows_and_scalars_are_shortened() -> None:
    out, text = on_terminal()

    def reply(method: str, *_: object) -> Reply:
        outputs = [
            {"name": "[y]", "datatype": "FP32", "shape": [1, 20], "data": [0.123456789] * 20},
            {"name": "s", "datatype": "INT64", "shape": [], "data": [7]},
        ]
        return 200, {}, json.dumps(METADATA if method == "GET" else {"outputs": outputs}).encode()

    with serving(reply) as url:
        cli_infer.infer(out, out, "double", "[1, 2]", url, Access(10), verbose=True)
    said = text.getvalue()
    assert "(20 values)" in said
    assert "0.123457" in said
    assert "[y]" in said
    assert "7" in said
    assert "not stated by the server" in said


@pytest.mark.parametrize(
    "arguments",
    [["infer", "double", "[1, 2]"], ["models", "load", "double"], ["models", "unload", "double"], ["models"]],
)
def test_headers_go_with_every_request(arguments: list[str], capsys: Said) -> None:
    def restricted(method: str, path: str, headers: dict[str, str], body: bytes) -> Reply:
        if (headers.get("admin-key"), headers.get("x-b")) != ("a=b c", ""):
            return 403, {}, b'{"error": "restricted"}'
        return (200, {}, b"") if "repository" in path else double(method, path, headers, body)

    with serving(restricted) as url:
        address = ["--ops-url" if arguments == ["models"] else "--url", url]
        assert main([*arguments, *address]) == 1
        assert "restricted" in capsys.readouterr().err
        assert main([*arguments, *address, "--header", "admin-key=a=b c", "--header", "X-B="]) == 0


@pytest.mark.parametrize("header", ["secret", "a b=secret", "=secret", "a=secret\r\nb: c", "a=secret\u00e9"])
def test_a_header_that_is_none_is_refused_without_repeating_its_value(header: str, capsys: Said) -> None:
    assert main(["models", "load", "m", "--header", header]) == 2
    said = capsys.readouterr().err
    assert "write NAME=VALUE" in said
    assert "secret" not in said
