"""The command: verbs, exit codes, and that nobody ever sees a bare traceback."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import typer

import gateway
from gateway import cli
from gateway.cli import main
from gateway.cli_text import LATER_OPTIONS
from gateway.config import Config, ModelEntry
from gateway.errors import ConfigError, Overloaded
from gateway.registry.digest import read_artifact


class Served:
    """Stands for the running gateway: keeps what `run` was given, answers with an exit code."""

    def __init__(self) -> None:
        self.config = Config()
        self.demo = False
        self.calls = 0
        self.code = 0

    def run(self, config: Config, *, demo: bool = False, reread: object = None) -> int:
        self.config, self.demo = config, demo
        self.calls += 1
        return self.code


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    stand_in = Served()
    module = types.ModuleType("gateway.app")
    module.run = stand_in.run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gateway.app", module)
    return stand_in


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONFIG", "HOST", "HTTP_PORT", "METRICS_PORT", "WORKERS", "INSTANCES", "LOG_LEVEL", "DEBUG", "URL"):
        monkeypatch.delenv(f"GATEWAY_{name}", raising=False)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "models" / "m" / "1").mkdir(parents=True)
    (tmp_path / "models" / "m" / "1" / "model.onnx").write_bytes(b"x")
    return tmp_path / "models"


Said = pytest.CaptureFixture[str]


def test_the_version(capsys: Said) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gateway {gateway.__version__}\n"


def test_help_names_every_verb_and_option(capsys: Said) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(verb in said for verb in ("serve", "demo", "check", "schema", "infer", "models"))
    assert main(["serve", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(
        name in said
        for name in ("--http-port", "--grpc-port", "--workers", "--instances", "GATEWAY_HOST", "--insecure")
    )
    assert "--processes" not in said


@pytest.mark.parametrize(
    "arguments", [[], ["bogus"], ["serve", "--bogus"], ["serve", "--http-port", "x"], ["infer"], ["check"]]
)
def test_bad_usage_exits_with_2(arguments: list[str], capsys: Said) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert "Usage" in said.out + said.err
    assert "Traceback" not in said.err


def test_serve_hands_over_sources_and_options(served: Served, models: Path) -> None:
    arguments = ["--http-port", "0", "--metrics-port", "0", "--workers", "3", "--instances", "4"]
    assert main(["serve", str(models), *arguments, "--log-level", "debug", "--log-format", "json"]) == 0
    server = served.config.server
    assert (server.http_port, server.metrics_port, server.workers) == (0, 0, 3)
    assert (server.log_level, server.log_format, served.config.instances) == ("debug", "json", 4)
    assert served.config.models == (ModelEntry.model_validate({"source": str(models)}),)
    assert not served.demo


def test_serve_reads_file_and_environment(
    served: Served, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "g.yaml").write_text("server: {http_port: 1, metrics_port: 2, workers: 5}\nmodels: [{source: models}]")
    monkeypatch.setenv("GATEWAY_METRICS_PORT", "12")
    assert main(["serve", "-c", str(tmp_path / "g.yaml"), "--http-port", "21"]) == 0
    server = served.config.server
    assert (server.http_port, server.metrics_port, server.workers) == (21, 12, 5)
    monkeypatch.setenv("GATEWAY_CONFIG", str(tmp_path / "g.yaml"))
    assert main(["serve", str(models)]) == 0
    assert len(served.config.models) == 2


@pytest.mark.parametrize("code", [0, 2, 3, 4])
def test_the_exit_code_is_the_gateways(served: Served, models: Path, code: int) -> None:
    served.code = code
    assert main(["serve", str(models)]) == code


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["serve"], "error: command line: nothing to serve; name a SOURCE"),
        (["serve", "/nope"], "error: command line: SOURCE '/nope': there is no directory /nope"),
        (["serve", "http://127.0.0.1:1/v2"], "SOURCE 'http://127.0.0.1:1/v2': has more than host and port"),
        (["serve", "models:/a@b"], "does not say where to find it; add registries.mlflow or set MLFLOW_TRACKING_URI"),
        (["serve", "/", "--host", "0.0.0.0"], "error: command line: --host: '0.0.0.0' can be reached"),
        (["serve", "/", "--http-port", "70000"], "error: command line: --http-port: must be at most 65535"),
        (["serve", "/", "--log-level", "inof"], "did you mean 'info'?"),
        (["serve", "/", "--grpc-port", "70000"], "error: command line: --grpc-port: must be at most 65535"),
        (["serve", "/", "--processes", "2"], "--processes: several front-end processes are not supported"),
        (["serve", "/", "--processes", "x"], "--processes: several front-end processes are not supported"),
        (["serve", "/", "--model-control", "always"], "--model-control: "),
        (["models", "load"], "error: name the model: gateway models load NAME"),
        (["models", "unload"], "error: name the model: gateway models unload NAME"),
        (["models", "lsit"], "error: 'models lsit' does not exist; write list, status, history, refresh,"),
    ],
)
def test_configuration_faults_exit_with_2_and_say_what_to_do(
    served: Served, arguments: list[str], expected: str, capsys: Said
) -> None:
    assert main(arguments) == 2
    assert expected in capsys.readouterr().err
    assert served.calls == 0


def test_demo_serves_the_bundled_models_quietly(served: Served) -> None:
    assert main(["demo", "--http-port", "0", "--metrics-port", "0"]) == 0
    assert served.demo
    assert served.config.server.log_level == "warning"
    (entry,) = served.config.models
    assert Path(entry.source).name == "models"
    assert Path(entry.source).is_dir()


def test_check_prints_every_fault_at_once(tmp_path: Path, capsys: Said) -> None:
    file = tmp_path / "g.yaml"
    file.write_text("server: {http_prot: 1}\nmodels:\n  - name: a[0]\n    source: ./nope\n")
    assert main(["check", "-c", str(file)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == [f"{file}:{n}" for n in (1, 3, 4)]
    assert "did you mean 'http_port'?" in lines[0]
    assert "models[0].name: 'a[0]' cannot be a model name" in lines[1]


def test_check_counts_backends_and_contacts_none(models: Path, tmp_path: Path, capsys: Said) -> None:
    file = tmp_path / "g.yaml"
    file.write_text(
        "models:\n  - {source: ./models}\n  - {source: 'grpc://127.0.0.1:1'}\n"
        "  - {name: far, backends: [{url: 'http://127.0.0.1:1'}, {url: 'https://nowhere.invalid'}]}\n"
    )
    assert main(["check", "-c", str(file)]) == 0
    expected = "no faults; 2 models, 1 version to serve; 3 remote backends, not contacted; no model was loaded"
    assert capsys.readouterr().out == f"{file}: {expected}\n"


def test_check_prints_every_fault_of_backends_at_once(tmp_path: Path, capsys: Said) -> None:
    file = tmp_path / "g.yaml"
    file.write_text(
        "models:\n  - name: far\n    backends:\n      - url: http://a/v2\n        headers:\n          x: env:NOT_SET\n"
        "      - url: https://b\n        tls: {ca: nope.pem}\n"
    )
    assert main(["check", "-c", str(file)]) == 2
    places = [": ".join(line.split(": ")[1:3]) for line in capsys.readouterr().err.splitlines()]
    assert places == [
        f"{file}:4: models[0].backends[0].url",
        f"{file}:6: models[0].backends[0].headers.x",
        f"{file}:8: models[0].backends[1].tls.ca",
    ]


def test_check_looks_into_the_models_too(models: Path, tmp_path: Path, capsys: Said) -> None:
    file = tmp_path / "g.yaml"
    file.write_text("models: [{source: ./models}]")
    assert main(["check", "-c", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: no faults; 1 model, 1 version to serve; no model was loaded\n"
    (models / "m" / "config.pbtxt").write_text('parameters { key: "team" value { string_value: "x" } }')
    assert main(["check", "-c", str(file)]) == 0
    assert "note:" in capsys.readouterr().err
    (models / "m" / "config.pbtxt").write_text("rate_limiter { priority: 1 }")
    assert main(["check", "-c", str(file)]) == 2
    assert "config.pbtxt:1: " in capsys.readouterr().err


def test_check_hashes_what_is_pinned_and_reads_every_file(models: Path, tmp_path: Path, capsys: Said) -> None:
    file = tmp_path / "g.yaml"
    right = read_artifact(models / "m" / "1", "m", "1").digest
    file.write_text(f"models:\n  - source: models\n    digest: {right}")
    assert main(["check", "-c", str(file)]) == 0
    (models / "m" / "1" / "model.onnx").write_bytes(b"y")
    assert main(["check", "-c", str(file)]) == 2
    assert f"error: {file}:2: models[0].digest: the files of model 'm' version 1 have" in capsys.readouterr().err
    (models / "m" / "1" / "extra").symlink_to("/etc/hostname")
    assert main(["check", "-c", str(file)]) == 2
    assert "extra: this link leaves the version directory" in capsys.readouterr().err


def test_a_configuration_with_nothing_to_serve_is_a_fault(tmp_path: Path, capsys: Said) -> None:
    file = tmp_path / "g.yaml"
    file.write_text("server: {workers: 2}")
    for verb in ("check", "serve"):
        assert main([verb, "-c", str(file)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {file}: nothing to serve; name a SOURCE")


def test_what_has_no_effect_is_said(
    served: Served, models: Path, tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "g.yaml"
    file.write_text("server:\n  processes: 1\nmodels: [{source: models}]")
    monkeypatch.setenv("GATEWAY_HTP_PORT", "1")
    for verb in ("check", "serve"):
        assert main([verb, "-c", str(file)]) == 0
        assert capsys.readouterr().err.splitlines() == [
            ("warning: environment: GATEWAY_HTP_PORT is not a known variable; did you mean GATEWAY_HTTP_PORT?"),
        ]
    assert main(["serve", str(models), "--processes", "1", "--model-control", "none"]) == 0
    assert served.calls == 2


def test_no_option_of_a_later_version_is_suggested(capsys: Said) -> None:
    assert main(["serve", "--htp-port", "1"]) == 2
    said = capsys.readouterr().err
    assert "--http-port" in said
    assert main(["serve", "--proceses", "1"]) == 2
    assert "Possible options" not in capsys.readouterr().err
    hidden = {
        name
        for parameter in typer.main.get_command(cli.app).commands["serve"].params  # type: ignore[attr-defined]
        for name in parameter.opts
        if getattr(parameter, "hidden", False)
    }
    assert hidden == LATER_OPTIONS


def test_schema_prints_json(capsys: Said) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "gateway.yaml"


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (
            RuntimeError("boom\nboom"),
            1,
            "error: RuntimeError: boom boom; this is a fault of the gateway, GATEWAY_DEBUG=1",
        ),
        (KeyError(), 1, "error: KeyError: no further text;"),
        (
            ModuleNotFoundError("x", name="pyarrow.lib"),
            2,
            "error: this needs pyarrow, which is not installed: pip install",
        ),
        (ModuleNotFoundError("no own", name="own"), 1, "error: ModuleNotFoundError: no own; this is a fault of"),
        (Overloaded("queue [full]"), 1, "error: queue [full]"),
        (ConfigError("one"), 2, "error: one"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_no_error_is_a_bare_traceback(
    served: Served,
    models: Path,
    error: BaseException,
    code: int,
    expected: str,
    capsys: Said,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> int:
        raise error

    monkeypatch.setattr(sys.modules["gateway.app"], "run", fail)
    assert main(["serve", str(models)]) == code
    said = capsys.readouterr().err
    assert said.startswith(expected)
    assert "Traceback" not in said
    if isinstance(error, RuntimeError):
        monkeypatch.setenv("GATEWAY_DEBUG", "1")
        with pytest.raises(RuntimeError, match="boom"):
            main(["serve", str(models)])


def test_as_a_module_and_into_a_closed_pipe() -> None:
    version = subprocess.run([sys.executable, "-m", "gateway", "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == f"gateway {gateway.__version__}\n"
    piped = f"{sys.executable} -m gateway schema | true"
    closed = subprocess.run(["bash", "-c", piped], capture_output=True, text=True, check=True)
    assert "Traceback" not in closed.stderr
    assert "Exception" not in closed.stderr


def test_errors_are_wrapped_by_no_one(capsys: Said) -> None:
    """A long path must stay in one piece, so that it can be copied."""
    assert main(["serve", "/" + "x" * 300]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert cli.EXIT_CONFIG == 2
