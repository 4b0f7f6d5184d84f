"""`inference_log.postgres`: where the secret is named, and what is said about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import load
from gateway.config_postgres import Postgres, anchored_dsn
from gateway.errors import ConfigError


def write(directory: Path, postgres: str) -> Path:
    file = directory / "gateway.yaml"
    (directory / "m.onnx").write_bytes(b"")
    file.write_text(f"models: [{{source: ./m.onnx}}]\ninference_log:\n  postgres: {postgres}\n")
    return file


def faults(directory: Path, postgres: str, environ: dict[str, str]) -> list[str]:
    with pytest.raises(ConfigError) as told:
        load(write(directory, postgres), {}, environ)
    return [str(fault) for fault in told.value.faults]


def test_keys_and_defaults(tmp_path: Path) -> None:
    section = load(write(tmp_path, "{dsn: 'env:LOG_DSN'}"), {}, {"LOG_DSN": "postgresql://u:s3cret@h/d"}).inference_log
    assert section is not None
    assert section.postgres == Postgres(dsn="env:LOG_DSN")
    assert section.postgres is not None
    assert (section.postgres.db_schema, section.postgres.showcase_tables) == ("public", False)
    assert "s3cret" not in repr(section)
    text = "{dsn: 'env:LOG_DSN', schema: audit, showcase_tables: true, batch_rows: 10, timeout_s: 5}"
    section = load(write(tmp_path, text), {}, {"LOG_DSN": "x"}).inference_log
    assert section is not None
    assert section.postgres is not None
    assert (section.postgres.db_schema, section.postgres.batch_rows) == ("audit", 10)


@pytest.mark.parametrize(
    ("postgres", "says"),
    [
        ("{}", "dsn"),
        ("{dsn: 'env:LOG_DSN'}", "the variable LOG_DSN is not set"),
        ("{dsn: 'file:none'}", "there is no file"),
        ("{dsn: 'postgresql://u:s3cret@h/d'}", "dsn"),
        ("{dsn: 'env:SET', schema: 'a b'}", "schema"),
        ("{dsn: 'env:SET', batch_rows: 0}", "batch_rows"),
        ("{dsn: 'env:SET', shema: x}", "schema"),
    ],
)
def test_what_is_wrong_is_said_with_its_line_and_without_the_secret(tmp_path: Path, postgres: str, says: str) -> None:
    found = faults(tmp_path, postgres, {"SET": "x"})
    assert any(says in fault and "gateway.yaml:3" in fault for fault in found), found
    assert not any("s3cret" in fault for fault in found)


def test_a_relative_file_means_the_same_elsewhere(tmp_path: Path) -> None:
    assert anchored_dsn(Postgres(dsn="file:dsn"), tmp_path) == f"file:{tmp_path}/dsn"
    assert anchored_dsn(Postgres(dsn="file:/etc/dsn"), tmp_path) == "file:/etc/dsn"
    assert anchored_dsn(Postgres(dsn="env:X"), tmp_path) == "env:X"
