"""What tests of the log share: one PostgreSQL server for all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.live.postgres_server import PostgresServer, postgres


@pytest.fixture(scope="session")
def server() -> Iterator[PostgresServer]:
    """Shared: whoever stops or freezes it needs one of their own."""
    with postgres() as started:
        yield started


@pytest.fixture
def dsn(server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of an empty database; the variable LOG_DSN holds it too."""
    found = server.database()
    monkeypatch.setenv("LOG_DSN", found)
    return found
