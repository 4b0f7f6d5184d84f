"""Fixtures for tests in which workers die."""

from __future__ import annotations

import pytest

from gateway.workers import supervision


@pytest.fixture
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restarts without waiting, so that crash loops take seconds and not minutes."""
    monkeypatch.setattr(supervision, "FIRST_DELAY_S", 0.0)
