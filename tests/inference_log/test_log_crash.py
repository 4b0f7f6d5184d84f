"""The gateway killed under load, in small; `python -m tests.log_crash --rows 1000000` is the same in big."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import log_crash


@pytest.mark.slow
def test_a_gateway_killed_under_load_keeps_what_it_answered(tmp_path: Path) -> None:
    answers = log_crash.loaded(tmp_path, rows=8_000, kills=1, connections=16)
    found = log_crash.compared(tmp_path, answers, connections=16)
    assert found.answered >= 8_000
    assert found.rows + found.lost == found.answered + found.unasked
