"""Log lines: one event, one line, to standard error, as text for people or JSON for machines.

Decides the form only. Rules: times are UTC with milliseconds; control characters (and those that reorder text
on a screen) are written as escapes, so what a client sent can neither forge a line nor drive a terminal;
messages and fields are cut at a fixed length. Fields come as `extra={"model": …}` of the standard logging
calls. Nothing is logged per request.
Whoever reads the log cannot hold up the gateway: a record that the stream does not take at once is dropped and counted.
"""

from __future__ import annotations

import logging
import select
import sys
from datetime import UTC, datetime
from typing import Final, Literal, TextIO

import orjson

LogFormat = Literal["console", "json"]

MESSAGE_LIMIT: Final = 2000
FIELD_LIMIT: Final = 500
TRACEBACK_LIMIT: Final = 8000
"""Characters kept of each; a traceback keeps its end, where the error is."""

PIECE: Final = 1000
"""Characters of one write: at most 4 bytes each, and so less than a page."""
SHORT_DIGEST: Final = 19
"""Characters: `sha256:` and twelve digits."""

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _escapes() -> dict[int, str]:
    c0_c1 = [*range(0x20), *range(0x7F, 0xA0)]
    reordering = [0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
    surrogates = range(0xD800, 0xE000)
    table = {code: f"\\x{code:02x}" for code in c0_c1}
    table |= {code: f"\\u{code:04x}" for code in (*reordering, *surrogates)}
    return table | {0x09: "\\t", 0x0A: "\\n", 0x0D: "\\r"}


_ESCAPES: Final = _escapes()


def clean(text: str, limit: int = FIELD_LIMIT) -> str:
    """`text` on one line, safe to show, at most `limit` characters of it kept."""
    cut = text[:limit]
    dropped = len(text) - len(cut)
    return cut.translate(_ESCAPES) + (f"… ({dropped} more characters)" if dropped else "")


def _value(value: object) -> str | int | float | bool | None:
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return value
    return clean(str(value))


def _fields(record: logging.LogRecord) -> dict[str, str | int | float | bool | None]:
    return {clean(k): _value(v) for k, v in vars(record).items() if k not in _STANDARD}


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _traceback(record: logging.LogRecord) -> list[str]:
    if record.exc_info is None or record.exc_info[0] is None:
        return []
    text = logging.Formatter().formatException(record.exc_info)[-TRACEBACK_LIMIT:]
    return [clean(line, TRACEBACK_LIMIT) for line in text.split("\n")]


def _for_people(value: object) -> object:
    """A digest cut to what tells two apart; the JSON form has all of it."""
    if isinstance(value, str) and value.startswith("sha256:") and len(value) > SHORT_DIGEST:
        return value[:SHORT_DIGEST] + "…"
    return value


class ConsoleFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z INFO gateway.app: message key=value`; traceback lines follow, marked."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join([f" {key}={_for_people(value)}" for key, value in _fields(record).items()])
        message = clean(record.getMessage(), MESSAGE_LIMIT)
        line = f"{_time(record)} {record.levelname} {clean(record.name)}: {message}{fields}"
        return "\n    | ".join([line, *_traceback(record)])


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the fields, `traceback` where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        row: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": clean(record.name),
            "message": clean(record.getMessage(), MESSAGE_LIMIT),
        }
        # What every line has cannot be overwritten by a field of the same name.
        row = _fields(record) | row
        if lines := _traceback(record):
            row["traceback"] = "\n".join(lines)
        return orjson.dumps(row).decode()


class SteadyHandler(logging.StreamHandler[TextIO]):
    """Writes to a stream as long as that does not block: a pipe that nobody reads is full at some time, a terminal may
    be stopped. What was dropped meanwhile is told by one line when the stream takes something again.

    Invariant: a write is of at most `PIECE` characters, after the kernel has said that there is room; a pipe that has
    room takes 4096 bytes at once (pipe(7)). Streams without a file descriptor are written to as they are.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.dropped = 0
        """Records that were not written, or not to their end."""
        self._untold = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record) + self.terminator
            if self._untold:
                lost = logging.makeLogRecord(
                    {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING",
                     "msg": "%d log records were dropped: the log was not read", "args": (self._untold,)}
                )  # fmt: skip
                text = self.format(lost) + self.terminator + text
            if self._written(text):
                self._untold = 0
            else:
                self.dropped += 1
                self._untold += 1
        except Exception:
            self.handleError(record)

    def _written(self, text: str) -> bool:
        for start in range(0, len(text), PIECE):
            if not _takes(self.stream):
                return False
            try:
                self.stream.write(text[start : start + PIECE])
                self.flush()
            except OSError:  # the reader left, the disk is full
                return False
        return True


def _takes(stream: TextIO) -> bool:
    """Whether a write would not block."""
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError, ValueError):
        return True
    ready = select.poll()
    ready.register(descriptor, select.POLLOUT)
    return bool(ready.poll(0))


class Switches(logging.Filter):
    """Which severities are written; a record that is none of the named ones (critical) always is."""

    def __init__(self) -> None:
        super().__init__()
        self.info = self.warning = self.error = True
        self.verbose = 0
        """0: no debug records."""

    def filter(self, record: logging.LogRecord) -> bool:
        level = record.levelno
        if level < logging.INFO:
            return self.verbose > 0
        if level < logging.WARNING:
            return self.info
        if level < logging.ERROR:
            return self.warning
        return self.error or level >= logging.CRITICAL


SWITCHES: Final = Switches()
"""Of the one log that `set_up` makes; change them with `switch`."""


def switch(*, info: bool, warning: bool, error: bool, verbose: int) -> None:
    """Write these severities and no others. `verbose` above 0 adds debug records; they are no richer above 1."""
    SWITCHES.info, SWITCHES.warning, SWITCHES.error, SWITCHES.verbose = info, warning, error, verbose
    # What no switch lets through is not even made.
    wanted = (logging.DEBUG, verbose > 0), (logging.INFO, info), (logging.WARNING, warning), (logging.ERROR, error)
    logging.getLogger().setLevel(next((level for level, on in wanted if on), logging.CRITICAL))


def set_up(level: str, log_format: LogFormat, stream: TextIO | None = None) -> None:
    """Send every log record of `level` ("debug", "info", "warning", "error") and above to one stream.

    Args:
        stream: standard error if None.

    Raises:
        ValueError: `level` is not the name of a level.
    """
    handler = SteadyHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else ConsoleFormatter())
    handler.addFilter(SWITCHES)
    root = logging.getLogger()
    root.setLevel(level.upper())
    least = root.level
    switch(info=least <= logging.INFO, warning=least <= logging.WARNING, error=True, verbose=int(least < logging.INFO))
    root.setLevel(least)
    root.handlers[:] = [handler]


def dropped() -> int:
    """Records that the log did not take, since `set_up`."""
    return sum(handler.dropped for handler in logging.getLogger().handlers if isinstance(handler, SteadyHandler))
