"""What a configuration with backends means: the contract's example, settings, secrets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import Backend, Config, ModelEntry, json_schema, load
from gateway.config_backends import MAX_SECRET_BYTES, entry_faults, read_headers
from gateway.core.resilience import RESILIENCE, Resilience
from gateway.errors import ConfigError
from gateway.registry.reference import OipServerSource

CONTRACT = """
models:
  - name: salary
    idempotent: true
    backends:                              # redundant remote backends of one model
      - {url: "http://triton-a:8000", weight: 1}
      - {url: "grpc://triton-b:8001"}
"""
SECRET = "Bearer very-secret"


def written(folder: Path, text: str, environ: dict[str, str] | None = None) -> Config:
    file = folder / "gateway.yaml"
    file.write_text(text)
    return load(file, {}, environ or {})


def test_the_contracts_example(tmp_path: Path) -> None:
    config = written(tmp_path, CONTRACT)
    (entry,) = config.models
    assert (entry.source, entry.name, config.source(entry)) == ("", "salary", None)
    assert [(b.url, b.weight, b.max_slots, b.connect_timeout_ms, b.json_tensors) for b in entry.backends] == [
        ("http://triton-a:8000", 1.0, 8, 250.0, "auto"),
        ("grpc://triton-b:8001", 1.0, 8, 250.0, "auto"),
    ]
    assert config.settings(entry).resilience == RESILIENCE


def test_built_in_values_are_those_of_the_core() -> None:
    assert Config().settings(ModelEntry(source=".")).resilience == Resilience()


def test_every_key_of_resilience_reaches_the_core_and_an_entry_outranks_the_defaults(tmp_path: Path) -> None:
    keys = (
        "idempotent: false, balancing: p2c_ewma, attempt_timeout_ms: 1500, max_attempts: 2, retry_budget_percent: 20, "
        "hedging_percent: 2, agreement_percent: 1, poison_denylist: false"
    )
    config = written(tmp_path, f"defaults: {{{keys}}}\nmodels: [{{source: .}}, {{source: ., max_attempts: 5}}]")
    wanted = Resilience(
        idempotent=False,
        balancing="p2c_ewma",
        attempt_timeout_s=1.5,
        max_attempts=2,
        retry_budget=0.2,
        hedging=0.02,
        agreement=0.01,
        poison_denylist=False,
    )
    plain, own = config.models
    assert config.settings(plain).resilience == wanted
    assert config.settings(own).resilience.max_attempts == 5


def test_a_source_may_be_a_server(tmp_path: Path) -> None:
    config = written(tmp_path, "models: [{source: 'grpc://H', name: a}]")
    assert config.source(config.models[0]) == OipServerSource("grpc://H", "grpc", "h", 8001)
    (entry,) = Config(base=Path("/elsewhere")).with_sources(["http://h:1"]).models
    assert entry.source == "http://h:1"


def test_headers_come_from_the_text_a_variable_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{SECRET}\n")
    text = (
        "models: [{name: a, backends: [{url: 'http://a', "
        "headers: {a: env:TOKEN, b: 'file:token', c: plain text}}, {url: grpc://b}]}]"
    )
    config = written(tmp_path, text, {"TOKEN": SECRET, "OTHER": "x"})
    first, second = config.models[0].backends
    assert config.headers(first) == {"a": SECRET, "b": SECRET, "c": "plain text"}
    assert config.headers(second) == {}
    assert dict(config.environ) == {"TOKEN": SECRET}
    (tmp_path / "token").write_text("rotated")
    assert config.headers(first)["b"] == "rotated"
    (tmp_path / "token").unlink()
    with pytest.raises(ConfigError, match=r"backend http://a: header b: the file .*token cannot be read"):
        config.headers(first)


def test_secrets_are_shown_nowhere(tmp_path: Path) -> None:
    text = "models: [{name: a, backends: [{url: 'http://a', headers: {a: env:T, b: Bearer very-secret}}]}]"
    config = written(tmp_path, text, {"T": SECRET})
    assert SECRET not in repr(config)
    assert SECRET not in str(config.models)
    assert "env:" in json.dumps(json_schema()["$defs"]["Backend"]["properties"]["headers"]["examples"])


@pytest.mark.parametrize("value", ["a\nb", "", " b7x", "é", "a" * (MAX_SECRET_BYTES + 1), "a\x00"])
def test_a_faulty_secret_is_not_repeated(tmp_path: Path, value: str) -> None:
    (tmp_path / "token").write_text(value)
    backend = Backend(url="http://a", headers={"x": "file:token"})
    with pytest.raises(ConfigError, match="must be one line of printable ASCII") as caught:
        read_headers(backend, tmp_path, {})
    assert not value or value not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = ("source", "name", "digest", "backends", "url", "tls", "headers", "json", "model", "version", "ca", "cert")


@given(
    st.dictionaries(
        st.sampled_from(KEYS), JSON | st.lists(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=5), max_size=3)
    )
)
def test_whatever_an_entry_holds_its_faults_can_be_told(entry: dict[str, object]) -> None:
    for fault in entry_faults(entry, Path("/nonexistent"), {}, {}):
        assert fault.message
        assert fault.place
