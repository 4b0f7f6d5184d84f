"""Which actions `gateway models` knows, and which of them need a name."""

from __future__ import annotations

import pytest

from gateway import cli_models
from gateway.cli import main

OF_ONE = ["history", "refresh", "rollback", "split", "promote", "load", "unload"]


@pytest.mark.parametrize("action", OF_ONE)
def test_an_action_on_one_model_asks_for_its_name_before_it_asks_anybody(
    action: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", action]) == 2
    assert capsys.readouterr().err == f"error: name the model: gateway models {action} NAME\n"


def test_an_unknown_action_is_told_every_known_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "delete", "m"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: 'models delete' does not exist; write list, status, history, ")
    assert all(f" {action}" in told for action in OF_ONE)
    assert told.endswith(" load or unload\n")


def test_the_help_names_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--help"]) == 0
    told = "".join(capsys.readouterr().out.split())
    assert all(action in told for action in OF_ONE)
    assert set(cli_models._OF_ONE_MODEL) == set(OF_ONE)
