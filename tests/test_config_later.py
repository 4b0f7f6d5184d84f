"""Keys of later versions: what is accepted, what is said about it, and which variables look mistyped."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import json_schema, load
from gateway.config_faults import OPTIONS
from gateway.config_later import unknown_variables
from gateway.config_schema import Server
from gateway.errors import ConfigError

NEUTRAL = "server: {processes: 1}"


def test_values_that_ask_for_nothing_more_are_accepted(tmp_path: Path) -> None:
    file = tmp_path / "g.yaml"
    file.write_text(NEUTRAL)
    config = load(file)
    assert config.server == Server()
    assert config.notes == ()


def test_they_are_accepted_as_variables_and_options_too() -> None:
    assert load(None, {}, {"GATEWAY_PROCESSES": "1"}).server == Server()
    assert load(None, {"processes": "1"}).server == Server()


@pytest.mark.parametrize("environ", [{"GATEWAY_PROCESSES": "2"}])
def test_any_other_value_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="not supported in this version"):
        load(None, {}, environ)


def test_the_schema_accepts_exactly_these_values() -> None:
    keys = json_schema()["$defs"]["Server"]["properties"]
    assert {key: keys[key]["const"] for key in ("processes",)} == {"processes": 1}


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("GATEWAY_HTP_PORT", "GATEWAY_HTTP_PORT"),
        ("GATEWAY_WORKER", "GATEWAY_WORKERS"),
        ("GATEWAY_LOGLEVEL", "GATEWAY_LOG_LEVEL"),
        ("GATEWAY_http_port", "GATEWAY_HTTP_PORT"),
    ],
)
def test_a_variable_near_one_of_ours_is_noted(variable: str, meant: str) -> None:
    (note,) = unknown_variables({variable: "1"}, OPTIONS)
    assert note == f"environment: {variable} is not a known variable; did you mean {meant}?"


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("GATEWAY_HTTP_PORT", "1"),
        ("GATEWAY_CONFIG", "g.yaml"),
        ("GATEWAY_OPS_URL", "http://a"),
        ("GATEWAY_UNRELATED", "1"),
        ("GATEWAY_SERVICE_HOST", "10.0.0.1"),
        ("GATEWAY_SERVICE_PORT", "80"),
        ("GATEWAY_PORT", "tcp://10.0.0.1:80"),
        ("GATEWAY_PORT_80_TCP_ADDR", "10.0.0.1"),
        ("HTTP_PROT", "1"),
    ],
)
def test_foreign_variables_are_left_alone(variable: str, text: str) -> None:
    assert unknown_variables({variable: text}, OPTIONS) == []
