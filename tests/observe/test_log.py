from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.observe.log import (
    FIELD_LIMIT,
    MESSAGE_LIMIT,
    ConsoleFormatter,
    JsonFormatter,
    LogFormat,
    clean,
    dropped,
    set_up,
)


@pytest.fixture(autouse=True)
def _root_logger_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def record(message: str, *args: object, **fields: Any) -> logging.LogRecord:
    made = logging.getLogger("gateway.test").makeRecord(
        "gateway.test", logging.WARNING, "f", 1, message, args, None, extra=fields
    )
    made.created = 1_767_225_600.25
    return made


def logged(log_format: LogFormat, level: str = "info") -> tuple[logging.Logger, io.StringIO]:
    stream = io.StringIO()
    set_up(level, log_format, stream)
    return logging.getLogger("gateway.test"), stream


def test_a_console_line_is_exact() -> None:
    line = ConsoleFormatter().format(record("worker %s died", "onnx-1", model="digits", restarts=2))
    assert line == "2026-01-01T00:00:00.250Z WARNING gateway.test: worker onnx-1 died model=digits restarts=2"


def test_a_json_line_is_exact() -> None:
    line = JsonFormatter().format(record("worker %s died", "onnx-1", model="digits", ok=True, none=None))
    assert json.loads(line) == {
        "time": "2026-01-01T00:00:00.250Z",
        "level": "warning",
        "logger": "gateway.test",
        "message": "worker onnx-1 died",
        "model": "digits",
        "ok": True,
        "none": None,
    }


@given(st.text(st.characters(), max_size=60))
def test_no_text_can_forge_a_line_or_drive_a_terminal(text: str) -> None:
    console = ConsoleFormatter().format(record("%s", text, field=text))
    assert console.splitlines() == [console]
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", console)
    row = JsonFormatter().format(record("%s", text, field=text))
    assert row.splitlines() == [row]
    assert json.loads(row)["message"] == clean(text)


def test_escapes_are_readable() -> None:
    assert clean("a\r\n\x1b[31m\u202eb") == "a\\r\\n\\x1b[31m\\u202eb"


def test_long_texts_are_cut_and_say_so() -> None:
    assert clean("x" * (FIELD_LIMIT + 7)) == "x" * FIELD_LIMIT + "… (7 more characters)"
    line = ConsoleFormatter().format(record("y" * 10**6, field="z" * 10**6))
    assert len(line) < MESSAGE_LIMIT + FIELD_LIMIT + 200


def test_values_that_json_lacks_do_not_break_a_line() -> None:
    row = json.loads(JsonFormatter().format(record("m", big=2**80, path=object, raw=b"\xff", nan=float("nan"))))
    assert row["big"] == str(2**80)
    assert row["raw"] == "b'\\xff'"
    assert row["nan"] is None


def test_a_field_cannot_replace_what_every_line_has() -> None:
    assert json.loads(JsonFormatter().format(record("m", level="fake", time="fake")))["level"] == "warning"


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_a_traceback_stays_apart_from_real_lines(log_format: LogFormat) -> None:
    logger, stream = logged(log_format)
    try:
        raise ValueError("bad\n2026-01-01T00:00:00.000Z INFO gateway.app: forged")
    except ValueError:
        logger.exception("it failed")
    lines = stream.getvalue().splitlines()
    if log_format == "json":
        assert len(lines) == 1
        assert "ValueError: bad" in json.loads(lines[0])["traceback"]
    else:
        assert lines[0].endswith("ERROR gateway.test: it failed")
        assert all(line.startswith("    | ") for line in lines[1:])
        assert any("ValueError: bad" in line for line in lines[1:])


def test_set_up_twice_writes_each_line_once() -> None:
    _, first = logged("console")
    logger, second = logged("console")
    logger.info("once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1


def test_the_level_holds() -> None:
    logger, stream = logged("console", "warning")
    logger.info("quiet")
    logger.warning("loud")
    assert "quiet" not in stream.getvalue()
    assert "loud" in stream.getvalue()
    with pytest.raises(ValueError):
        set_up("shout", "console", stream)


def test_a_digest_is_short_for_people_and_whole_for_programs() -> None:
    digest = "sha256:" + "0123456789abcdef" * 4
    record = logging.makeLogRecord({"msg": "ready", "levelname": "INFO", "name": "gateway", "digest": digest})
    assert ConsoleFormatter().format(record).endswith(" gateway: ready digest=sha256:0123456789ab…")
    assert json.loads(JsonFormatter().format(record))["digest"] == digest


def _read(descriptor: int) -> str:
    """All that is there now."""
    os.set_blocking(descriptor, False)
    found = b""
    while True:
        try:
            found += os.read(descriptor, 1 << 20)
        except BlockingIOError:
            return found.decode()


def test_a_log_that_nobody_reads_holds_nothing_up_and_says_later_what_was_lost() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", encoding="utf-8") as stream:
        set_up("info", "console", stream)
        log = logging.getLogger("gateway.test")
        for n in range(2000):  # without the check the 600th would wait for ever
            log.info("line %d %s", n, "é" * 60)
        lost = dropped()
        assert 0 < lost < 2000
        first = _read(reader).splitlines()
        assert len(first) >= 2000 - lost
        log.info("again %s", "long " * 390)
        told, again = _read(reader).splitlines()[-2:]
        assert told.endswith(f"gateway.observe.log: {lost} log records were dropped: the log was not read")
        assert again.endswith("long ")
        log.info("and again")
        assert len(_read(reader).splitlines()) == 1
        assert dropped() == lost
    os.close(reader)


def test_a_reader_that_left_is_no_fault_of_the_gateway(capfd: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w", encoding="utf-8")  # closing it fails
    set_up("info", "console", stream)
    os.close(reader)
    logging.getLogger("gateway.test").info("nobody hears this")
    assert dropped() == 1
    with contextlib.suppress(BrokenPipeError):
        stream.close()
    assert capfd.readouterr().err == ""
