"""Every reading leaves an entry before anything is shown; no entry, no reading."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from gateway.errors import ConfigError
from gateway.inference_log import access_trail, writer
from gateway.inference_log.store import Store
from gateway.inference_log.verification import verify
from tests.inference_log.log_on_disk import new_log, seal


def test_the_entry_says_who_when_and_what(tmp_path: Path) -> None:
    new_log(tmp_path)
    before = time.time()
    access_trail.record(tmp_path, "show", {"id": "01a2", "model": "digits"})
    access_trail.record(tmp_path, "query", {"sql": "x" * 10_000})
    seal(tmp_path)
    with Store(tmp_path).opened(["access"]) as connection:
        first, second = connection.sql('select * from access order by "at"').to_arrow_table().to_pylist()
    assert (first["kind"], first["model"]) == ("show", "digits")
    assert before - 1 <= first["at"].timestamp() <= time.time() + 1
    assert json.loads(first["details"]) == {"who": access_trail.reader(), "id": "01a2", "model": "digits"}
    assert json.loads(second["details"])["sql"] == "x" * access_trail.MAX_TEXT
    assert verify(Store(tmp_path)).faults == []


def test_no_entry_no_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_log(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(access_trail, "write_events", full)
    with pytest.raises(ConfigError, match="cannot be recorded, so it does not take place: No space left"):
        access_trail.record(tmp_path, "show", {})
    assert writer.write_events is not full


def test_a_foreign_directory_is_not_written_to(tmp_path: Path) -> None:
    new_log(tmp_path)
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match="can be written to by others"):
        access_trail.record(tmp_path, "show", {})


def test_before_sudo_is_who_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setenv("SUDO_USER", "anna")
    assert access_trail.reader() == "anna (as root)"
    monkeypatch.delenv("SUDO_USER")
    monkeypatch.setattr("os.getuid", lambda: 4_000_000)
    assert access_trail.reader() == "uid 4000000"
