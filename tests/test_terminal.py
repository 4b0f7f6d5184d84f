"""What a person sees: complete, on one screen, and unharmed by what models happen to be called."""

from __future__ import annotations

import asyncio
import http.server
import io
import json
import logging
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gateway import terminal
from gateway.catalog import ServedVersion
from gateway.core.batchability import SignatureTensor
from gateway.core.model import Artifact, BatchPolicy, ModelSpec, ModelState
from gateway.core.request import InputTensor
from gateway.errors import ConfigError, Fault
from gateway.loading import Settled, WantedVersion
from tests.scripted import Backend

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Console:
    console = Console(record=True, width=100, highlight=False, file=io.StringIO())
    monkeypatch.setattr(terminal, "out", console)
    monkeypatch.setattr(terminal, "err", console)
    return console


class Loaded:
    """A model on two workers, which nobody will ask anything."""

    def __init__(self) -> None:
        self.replicas = Backend(2, 1).replicas
        self.inputs: Sequence[SignatureTensor] = ()
        self.outputs: Sequence[SignatureTensor] = ()

    def set_warm_up(self, batches: Sequence[Sequence[InputTensor | None]], /) -> None:
        raise AssertionError

    async def unload(self) -> None:
        raise AssertionError


async def _never(artifact: Artifact) -> Loaded:
    raise AssertionError


def _unread() -> tuple[Artifact, bytes | None]:
    raise AssertionError


def served(name: str, version: str, policy: BatchPolicy) -> ServedVersion:
    """Must be called inside a loop."""
    wanted = WantedVersion(
        name, version, _unread, _never, None, "auto", None, False, 0.0, (), "split", 1000, 10**6, 30.0
    )  # fmt: skip
    found = ServedVersion(wanted)
    spec = ModelSpec(name, version, DIGEST, "onnxruntime_onnx", (), (), policy)
    found.settle(Settled(spec, 0.0, None), Loaded())
    found.state = ModelState.READY
    return found


def started(*models: tuple[str, BatchPolicy], host: str = "127.0.0.1") -> None:
    async def show() -> None:
        versions = [served(name, str(number), policy) for number, (name, policy) in enumerate(models, 1)]
        terminal.show_started(versions, host, 8000, 8002, grpc_port=8001)

    asyncio.run(show())


def test_the_table_tells_every_model(screen: Console) -> None:
    started(("digits", BatchPolicy(64)), ("mixer", BatchPolicy(8, merge=False)), ("whole", BatchPolicy(0)))
    lines = screen.export_text().splitlines()
    header = next(line for line in lines if "digest" in line)
    assert [word for word in header.split() if word.isalpha()] == [
        "name", "version", "digest", "backends", "state", "batching"
    ]  # fmt: skip
    for name, version, batching in (
        ("digits", "1", "up to 64 rows"), ("mixer", "2", "requests run alone"), ("whole", "3", "off")
    ):  # fmt: skip
        (row,) = [line for line in lines if name in line]
        cells = [cell.strip() for cell in row.split("│")[1:-1]]
        assert cells == [name, version, "sha256:0123456789ab…", "onnx-1, onnx-2", "READY", batching]
    assert "inference   http://127.0.0.1:8000/v2" in lines
    assert "grpc        127.0.0.1:8001" in lines
    assert any(line.startswith("operations  http://127.0.0.1:8002/ ") for line in lines)
    assert max(map(len, lines)) <= 100


def test_a_version_that_is_still_loading_ends_nothing(screen: Console) -> None:
    async def show() -> None:
        wanted = served("digits", "3", BatchPolicy(64)).wanted
        terminal.show_started(
            [served("digits", "2", BatchPolicy(64)), ServedVersion(wanted)], "127.0.0.1", 8000, 8002, grpc_port=8001
        )

    asyncio.run(show())
    (row,) = [line for line in screen.export_text().splitlines() if "LOADING" in line]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["digits", "3", "-", "", "LOADING", "-"]


def test_encrypted_ports_are_shown_as_such(screen: Console) -> None:
    terminal.show_started([], "127.0.0.1", 8000, 8002, grpc_port=8001, encrypted=True)
    lines = screen.export_text().splitlines()
    assert "inference   https://127.0.0.1:8000/v2" in lines
    assert "grpc        127.0.0.1:8001  (TLS)" in lines
    assert any(line.startswith("operations  http://") for line in lines)


def test_brackets_in_a_name_are_not_markup(screen: Console) -> None:
    started(("a[red]b[/red][/]", BatchPolicy(0)))
    assert "a[red]b[/red][/]" in screen.export_text()


def test_a_long_name_is_shown_whole_and_costs_no_other_column(screen: Console) -> None:
    name = "".join(f"{number:03d}" for number in range(30))
    started((name, BatchPolicy(0)))
    rows = [line.split("│")[1:-1] for line in screen.export_text().splitlines() if line.startswith("│")]
    assert "".join(row[0].strip() for row in rows) == name
    assert [cell.strip() for cell in rows[0][1:]] == ["1", "sha256:0123456789ab…", "onnx-1, onnx-2", "READY", "off"]


def table(width: int, *names: str, backends: Sequence[str] = ("onnx-1", "onnx-2")) -> list[str]:
    async def made() -> str:
        versions = [served(name, "1", BatchPolicy(64)) for name in names]
        for version in versions:
            for replica, backend in zip(version.replicas, backends, strict=True):
                replica._name = backend  # type: ignore[attr-defined]  # scripted
        console = Console(width=width, file=io.StringIO(), record=True)
        console.print(terminal._table(versions, width))
        return console.export_text()

    return asyncio.run(made()).splitlines()


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_no_name_is_broken_while_there_is_a_column_that_can_be_left_out(width: int) -> None:
    names, backends = ("digits", "customer-churn-eu"), ("triton-a:8000", "triton-b:8000")
    lines = table(width, *names, backends=backends)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for word in (*names, *backends, "READY"):
        assert word in text
    header = next(line for line in lines if "name" in line)
    assert ("digest" in header, "batching" in header) == (width > 80, width > 60)


@pytest.mark.parametrize("width", [20, 30, 40, 50, 60])
def test_on_a_narrow_screen_nothing_is_lost(width: int) -> None:
    names, backends = ("customer-churn-europe", "salary"), ("triton-a.example:8000", "onnx-1")
    lines = table(width, *names, backends=backends)
    assert max(map(len, lines)) <= width
    rows = [line.strip("│").split("│") for line in lines if not set("━─") & set(line)]
    cells = zip(*[row for row in rows if len(row) > 1], strict=True)
    whole = "".join("".join(cell.strip() for cell in column) for column in cells)
    text = whole if width >= 50 else "".join(lines).replace(" ", "")
    for word in (*names, *backends):
        assert word in text
    assert text.count("READY") == 2


def test_a_table_for_which_there_is_room_has_a_line_a_model() -> None:
    lines = table(120, "digits", "salary")
    assert len([line for line in lines if "READY" in line]) == len([line for line in lines if "│" in line]) == 2


def test_an_ipv6_address_stands_in_brackets(screen: Console) -> None:
    started(("m", BatchPolicy(0)), host="::1")
    assert "http://[::1]:8000/v2" in screen.export_text()


def test_faults_are_lines_with_place_and_remedy(screen: Console) -> None:
    faults = [
        Fault("gateway.yaml", 3, "models[0].name", "'[/x]' cannot be a model name; use letters"),
        Fault("command line", 0, "", "no model to serve: name a SOURCE " + "x" * 120),
    ]
    terminal.show_faults(ConfigError(faults))
    lines = screen.export_text().splitlines()
    assert lines[0] == "error: gateway.yaml:3: models[0].name: '[/x]' cannot be a model name; use letters"
    assert lines[1] == "error: command line: no model to serve: name a SOURCE " + "x" * 120, "long lines are not cut"
    assert len(lines) == 2


def test_progress_takes_any_name_and_leaves_nothing(screen: Console) -> None:
    with terminal.progress(2) as advance:
        advance("a[/b]")
        advance("[")
    assert screen.export_text().strip() == ""


def test_no_escape_codes_where_the_output_is_not_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(terminal, "err", Console(file=stream, highlight=False, width=100))
    terminal.show_error("the port is taken")
    assert stream.getvalue() == "error: the port is taken\n"


class OneAnswer(http.server.BaseHTTPRequestHandler):
    """A gateway as far as the demo asks for one."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["inputs"]
        outputs = [
            {"name": "text", "datatype": "BYTES", "shape": [2, 1], "data": ["[/bold]", "b"]},
            {"name": "scores", "datatype": "FP32", "shape": [2, 12], "data": [0.123456] * 12 + [0.99] * 12},
        ]
        body = json.dumps({"model_name": "m", "model_version": "1", "outputs": outputs}).encode()
        self.send_response(200)
        for name, value in {
            "Content-Length": str(len(body)),
            "X-Request-Id": "01937c5e-8f3a-7c2e-b1d4-2f6f0a9c1e77",
            "Inference-Model": f'"digits";version="3";digest="{DIGEST}"',
            "Inference-Backend": '"onnx-1";attempt=1, "onnx-2";attempt=2',
            "Inference-Batch": '"a1f3-000042";size=64;row=0, "a1f3-000043";size=1;row=3',
            "Server-Timing": "queue;dur=0.81, infer;dur=1.43, total;dur=2.40",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    with http.server.HTTPServer(("127.0.0.1", 0), OneAnswer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_the_demo_shows_answers_with_their_provenance(screen: Console, port: int) -> None:
    terminal.show_demo("127.0.0.1", port, 8002)
    text = screen.export_text()
    for model in ("digits", "digits_cnn"):
        assert f"\n{model}  2 rows sent, row 0 of them:\n  text = [/bold]\n  scores = [0.12, 0.12," in text
    assert "  scores = [0.12, 0.12, 0.12, 0.12, 0.12, 0.12, … (12 values)]\n" in text
    assert "0.99" not in text, "only the first row"
    assert text.count("  model    digits version 3 sha256:0123456789ab…\n") == 2
    assert "executed by onnx-1, attempt 1, batch a1f3-000042 of 64 rows, row 0\n" in text
    assert "executed by onnx-2, attempt 2, batch a1f3-000043 of 1 row, row 3\n" in text
    assert (
        "  request  01937c5e-8f3a-7c2e-b1d4-2f6f0a9c1e77\n  time     queue 0.81 ms, infer 1.43 ms, total 2.40 ms\n"
        in text
    )
    assert f"curl -i http://127.0.0.1:{port}/v2/models/digits\n" in text
    assert "http://127.0.0.1:8002/metrics" in text
    assert text.rstrip().endswith("Ctrl-C stops.")
    answers, _ = text.split("try next:")
    assert max(map(len, answers.splitlines())) <= 80


def test_what_the_demo_suggests_can_be_run_as_shown(screen: Console, port: int) -> None:
    terminal.show_demo("127.0.0.1", port, port)
    said = screen.export_text()
    (line,) = [line for line in said.splitlines() if " infer digits " in line]
    done = subprocess.run([*shlex.split(line), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (listing,) = [line for line in said.splitlines() if " models status" in line]
    assert listing.endswith(f" models status --ops-url http://127.0.0.1:{port}")
    arguments = shlex.split(line)
    assert arguments[-2:] == ["--url", f"http://127.0.0.1:{port}"]
    (sample,) = [part[1:] for part in arguments if part.startswith("@")]
    assert Path(sample).is_file()


def test_the_program_is_named_the_way_it_can_be_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binaries = tmp_path / "a venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "gateway").write_text("#!/bin/sh\n")
    (binaries / "gateway").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(binaries / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    assert terminal._program() == "'a venv/bin/gateway'"
    monkeypatch.setenv("PATH", str(binaries))
    assert terminal._program() == "gateway"
    (binaries / "gateway").unlink()
    assert terminal._program() == "'a venv/bin/python' -m gateway"


def test_where_nothing_is_loaded_yet_it_says_how(screen: Console) -> None:
    def shown(names: list[str], port: int = 8000) -> str:
        terminal.show_started([], "127.0.0.1", port, 8002, grpc_port=8001, loadable=names)
        text = screen.export_text(clear=True)
        assert "│" not in text, "no empty table"
        return text.splitlines()[0]

    assert shown(["a", "[b]"]) == ("no model is loaded; load one with: gateway models load NAME (there are: a, [b])")
    assert "load NAME --url http://127.0.0.1:9000 (there are: none)" in shown([], 9000)
    assert shown([f"m{n}" for n in range(30)]).endswith("m19, … (30 models))")


def test_an_ensemble_names_its_steps(screen: Console) -> None:
    async def show() -> None:
        version = served("e", "1", BatchPolicy(0))
        version.loaded, version.dependencies = None, ("a", "b")
        terminal.show_started([version], "127.0.0.1", 8000, 8002, grpc_port=8001)

    asyncio.run(show())
    assert "ensemble of a, b" in screen.export_text()


def test_the_log_is_printed_above_the_bar_and_goes_its_own_way_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=40, highlight=False)
    monkeypatch.setattr(terminal, "err", console)
    handler = logging.StreamHandler(stream)
    elsewhere = logging.StreamHandler(io.StringIO())
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler, elsewhere])
    line = "[x] " + "long " * 20 + "end"
    with terminal.progress(2) as advance:
        advance("one")
        logging.getLogger("gateway").error(line)
        assert elsewhere.stream.getvalue() == line + "\n"
    assert handler.stream is stream
    before, after = stream.getvalue().split(line + "\n")
    assert before.endswith("\x1b[2K"), "the bar was cleared, and the line begins at the edge"
    assert "loading models" in before + after or "loaded one" in before + after


def test_plain_is_one_record_of_the_log(screen: Console, caplog: pytest.LogCaptureFixture) -> None:
    async def show() -> None:
        terminal.show_started(
            [served("digits", "3", BatchPolicy(0))], "127.0.0.1", 8000, 8002, grpc_port=8001, plain=True
        )

    with caplog.at_level("INFO", "gateway"):
        asyncio.run(show())
    assert screen.export_text() == ""
    assert caplog.messages == [
        "serving digits version 3; inference http://127.0.0.1:8000/v2, grpc 127.0.0.1:8001, operations http://127.0.0.1:8002/"
    ]


def test_a_version_is_named_once_in_its_fault(screen: Console) -> None:
    async def show() -> None:
        versions = [served("a", "1", BatchPolicy(0)), served("b", "2", BatchPolicy(0))]
        versions[0].reason = "model 'a' version 1: not an ONNX file"
        versions[1].reason = "the files have another digest"
        terminal.show_not_loaded(versions)

    asyncio.run(show())
    assert screen.export_text().splitlines() == [
        "error: model 'a' version 1: not an ONNX file",
        "error: model 'b' version 2: the files have another digest",
    ]


def test_where_programs_read_a_fault_is_a_record_of_the_log(screen: Console, caplog: pytest.LogCaptureFixture) -> None:
    async def show() -> None:
        version = served("b", "2", BatchPolicy(0))
        version.reason = "not an ONNX file"
        terminal.show_not_loaded([version], plain=True)

    asyncio.run(show())
    assert screen.export_text() == ""
    assert caplog.messages == ["could not be loaded: model 'b' version 2: not an ONNX file"]
