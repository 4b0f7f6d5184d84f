"""Trace and log settings that clients read and change at run time: names, values, refusals (wire notes §1.6).

Rules: all changes of one request are checked before the first is applied; unknown settings are ignored; where a file
is written is the server owner's business and never changed over the wire. A model has a trace setting of its own until
it is reset with null; everything else follows the global one, and that, reset, what the server was started with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

from gateway.errors import InvalidRequest, Malformed, RequestError, Unsupported
from gateway.observe import log as log_setup
from gateway.observe.request_trace import TracePlan

LEVELS: Final = ("OFF", "TIMESTAMPS", "TENSORS")
NUMBERS: Final[dict[str, tuple[int, int]]] = {
    "trace_rate": (0, 2**32 - 1),
    "trace_count": (-1, 2**31 - 1),
    "log_frequency": (0, 2**32 - 1),
}
"""Least and greatest value of each setting that is a number; on the wire they are all text."""
FORMATS: Final = ("default", "ISO8601")
_DEFAULTS: Final[dict[str, tuple[str, ...]]] = {
    "trace_level": ("OFF",),
    "trace_rate": ("1000",),
    "trace_count": ("-1",),
    "log_frequency": ("0",),
}

Changes = Mapping[str, object]


class UnknownLogFormat(RequestError):
    """Triton's statuses for a log format it does not know."""

    status: ClassVar[int] = 503
    grpc_code: ClassVar[int] = 3
    reason: ClassVar[str] = "log_format"


class TraceSettings:
    """The global settings and what models have of their own."""

    def __init__(self, trace_file: str = "") -> None:
        """`trace_file` is where the server's owner wants traces; empty: nowhere."""
        self.changed: Callable[[], None] = lambda: None
        """Called after every change."""
        self._file = trace_file
        self._global = dict(_DEFAULTS)
        self._of_model: dict[str, dict[str, tuple[str, ...]]] = {}

    def document(self, model: str | None = None) -> dict[str, Any]:
        """The settings that hold for a model (None: globally), all of them."""
        values = {**self._global, **self._of_model.get(model or "", {})}
        return {
            "trace_level": list(values["trace_level"]),
            **{name: values[name][0] for name in ("trace_rate", "trace_count", "log_frequency")},
            "trace_file": self._file,
            "trace_mode": "triton",
        }

    def plan(self, model: str) -> TracePlan:
        values = {**self._global, **self._of_model.get(model, {})}
        level = values["trace_level"]
        rate, count, frequency = (int(values[name][0]) for name in ("trace_rate", "trace_count", "log_frequency"))
        return TracePlan("TIMESTAMPS" in level, "TENSORS" in level, rate, count, frequency)

    def update(self, model: str | None, changes: Changes) -> dict[str, Any]:
        """Apply `changes`: setting → text, list of texts, or None and an empty list for "as inherited".

        Raises:
            Malformed: a value of a wrong type.
            InvalidRequest: a value that is none of the setting's.
            Unsupported: `trace_file`.
        """
        checked = {name: _trace_value(name, value) for name, value in changes.items() if name in _SETTABLE}
        if not self._file and (checked.get("trace_level") or ("OFF",)) != ("OFF",):
            raise InvalidRequest(
                "Attempting to set invalid trace setting :trace file name is not given; the server's owner sets it "
                "with server.trace.file"
            )
        if model is None:
            for name, texts in checked.items():
                self._global[name] = texts if texts is not None else _DEFAULTS[name]
        else:
            own = dict(self._of_model.get(model, {}))
            for name, texts in checked.items():
                own.pop(name, None)
                if texts is not None:
                    own[name] = texts
            self._of_model.pop(model, None)
            if own:
                self._of_model[model] = own
        self.changed()
        return self.document(model)

    def forget(self, model: str) -> None:
        """The model is gone for good."""
        self._of_model.pop(model, None)


_SETTABLE: Final = frozenset((*_DEFAULTS, "trace_file"))


def _trace_value(name: str, value: object) -> tuple[str, ...] | None:
    texts = [value] if isinstance(value, str) else value
    if name == "trace_file":
        raise Unsupported("trace file location can not be updated through network protocol")
    if texts is None or texts == []:
        return None
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise Malformed(f"'{name}' must be a string{', or an array of them' if name == 'trace_level' else ''}, or null")
    if name == "trace_level":
        return _levels(texts)
    least, greatest = NUMBERS[name]
    if len(texts) != 1:
        raise InvalidRequest(f"expect only 1 value for '{name}'")
    number = _number(texts[0])
    if number is None:
        raise InvalidRequest(f"Unable to parse '{name}', got: {texts[0][:64]}; write a whole number")
    if name == "trace_count" and number < least:
        raise InvalidRequest(f"Unable to parse '{name}'. Expecting value >= {least}, got: {texts[0][:64]}")
    if not least <= number <= greatest:
        raise InvalidRequest(
            f"Unable to parse '{name}', value is out of range [ {least}, {greatest} ], got: {texts[0][:64]}"
        )
    return (str(number),)


def _levels(texts: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    for text in texts:
        if text not in LEVELS:
            raise InvalidRequest(f"Unable to parse 'trace_level', got: {text[:64]}; write {', '.join(LEVELS)}")
    if "OFF" in texts and len(set(texts)) > 1:
        raise InvalidRequest("Expect only one trace level 'OFF' is specified in 'trace_level'; it excludes the others")
    return tuple(level for level in LEVELS if level in texts)


def _number(text: str) -> int | None:
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) <= 64 else None


class LogSettings:
    """The log's switches; a change works at once, for the whole process."""

    def __init__(self) -> None:
        self._format = "default"

    def document(self) -> dict[str, Any]:
        switches = log_setup.SWITCHES
        return {
            "log_file": "",
            "log_info": switches.info,
            "log_warning": switches.warning,
            "log_error": switches.error,
            "log_verbose_level": switches.verbose,
            "log_format": self._format,
        }

    def update(self, changes: Changes) -> dict[str, Any]:
        """Apply `changes`; None leaves a setting as it is.

        Raises:
            Malformed: a value of a wrong type, or a negative level.
            Unsupported: `log_file`.
            UnknownLogFormat: `log_format` is not one.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        if "log_file" in given:
            raise Unsupported("log file location can not be updated through network protocol")
        for name in ("log_info", "log_warning", "log_error"):
            if not isinstance(given.get(name, True), bool):
                raise Malformed(f"expect boolean for '{name}'")
        verbose = given.get("log_verbose_level", 0)
        if isinstance(verbose, bool) or not isinstance(verbose, int) or not 0 <= verbose < 2**32:
            raise Malformed("'log_verbose_level' must be a whole number, at least 0")
        form = given.get("log_format", self._format)
        if not isinstance(form, str):
            raise Malformed("'log_format' must be a string")
        if form not in FORMATS:
            raise UnknownLogFormat(f"invalid argument for log_format, got: {form[:64]}; write {' or '.join(FORMATS)}")
        self._format = form
        switches = log_setup.SWITCHES
        log_setup.switch(
            info=bool(given.get("log_info", switches.info)),
            warning=bool(given.get("log_warning", switches.warning)),
            error=bool(given.get("log_error", switches.error)),
            verbose=verbose if "log_verbose_level" in given else switches.verbose,
        )
        return self.document()
