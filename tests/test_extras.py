"""`gateway.extras`: what is said where a package of an extra is missing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gateway import extras
from gateway.config import load
from gateway.errors import ConfigError

ROOT = Path(__file__).parent.parent
WITHOUT = """\
import sys
for package in {packages!r}:
    sys.modules[package] = None
from gateway.cli import main
sys.exit(main({arguments!r}))
"""


def test_every_extra_brings_its_packages() -> None:
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package, extra in extras.EXTRA_OF.items():
        assert any(requirement.startswith(package) for requirement in stated[extra]), package


def test_what_is_lacking_is_told_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert extras.lacking("pyarrow") is None
    monkeypatch.setattr(extras, "find_spec", lambda package: None)
    assert extras.lacking("pyarrow") == "needs pyarrow, which is not installed: pip install 'oip-gateway[log]'"
    assert extras.advice("numpy") is None


@pytest.mark.parametrize(
    ("section", "told"),
    [("{}", True), ("", True), ("{directory: ./log}", True), (None, False)],
)
def test_a_log_that_could_not_be_sealed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str | None, told: bool
) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("server: {workers: 1}\n" + (f"inference_log: {section}\n" if section is not None else ""))
    monkeypatch.setattr(extras, "find_spec", lambda package: None)
    if not told:
        load(file)
        return
    with pytest.raises(ConfigError, match=r":2: inference_log: needs pyarrow.*oip-gateway\[log\]"):
        load(file)


def test_a_model_of_an_object_store_that_could_not_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(
        "registries: {s3: {endpoint: 'http://h', buckets: [models]}, mlflow: {url: 'http://h'}}\n"
        "models:\n  - {name: b, source: 'models:/b@x'}\n  - {name: a, source: 's3://models/a'}\n"
    )
    load(file)
    monkeypatch.setattr(extras, "find_spec", lambda package: None)
    with pytest.raises(ConfigError) as caught:
        load(file)
    (fault,) = caught.value.faults
    assert (fault.line, fault.where) == (4, "models[1].source")
    assert fault.message == "needs obstore, which is not installed: pip install 'oip-gateway[objects]'"


@pytest.mark.parametrize(
    "arguments",
    [
        ["tail"], ["show", "x"], ["query", "select 1"], ["stats"], ["verify"], ["seal"],
        ["export", "--as", "jsonl", "-o", "o"],
    ],
)  # fmt: skip
def test_commands_of_the_log_say_what_they_need(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "log").mkdir()
    arguments = ["log", *arguments, "--dir", str(tmp_path / "log")]
    assert importlib.util.find_spec("pyarrow") is not None
    script = WITHOUT.format(packages=["pyarrow", "duckdb"], arguments=arguments)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: this needs ")
    assert "pip install 'oip-gateway[log]'" in done.stderr.replace("\n", " ")
