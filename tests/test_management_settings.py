"""Trace and log settings: values, refusals, inheritance; and that the log really follows."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from gateway.errors import GatewayError, InvalidRequest, Malformed, Unsupported
from gateway.management_settings import LogSettings, TraceSettings, UnknownLogFormat
from gateway.observe import log as log_setup
from gateway.observe.request_trace import TracePlan

DEFAULTS = {
    "trace_level": ["OFF"],
    "trace_rate": "1000",
    "trace_count": "-1",
    "log_frequency": "0",
    "trace_file": "",
    "trace_mode": "triton",
}
LOG_DEFAULTS = {
    "log_file": "",
    "log_info": True,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "default",
}


def test_the_full_set_is_shown_and_unknown_keys_are_ignored() -> None:
    settings = TraceSettings()
    assert settings.document() == settings.document("m") == DEFAULTS
    assert settings.update(None, {"nope": 1, "trace_mode": "opentelemetry"}) == DEFAULTS


def test_a_model_inherits_until_it_has_a_setting_of_its_own_and_again_after_null() -> None:
    settings = TraceSettings("file")
    changed: list[int] = []
    settings.changed = lambda: changed.append(1)
    settings.update(None, {"trace_rate": "5"})
    assert settings.document("m")["trace_rate"] == "5"
    settings.update("m", {"trace_rate": "7", "trace_level": ["TENSORS", "TIMESTAMPS"]})
    settings.update(None, {"trace_rate": "9", "trace_count": "3"})
    assert settings.document("m") == DEFAULTS | {
        "trace_rate": "7", "trace_count": "3", "trace_level": ["TIMESTAMPS", "TENSORS"], "trace_file": "file",
    }  # fmt: skip
    assert settings.plan("m") == TracePlan(timestamps=True, tensors=True, rate=7, count=3, log_frequency=0)
    assert not settings.plan("other").on
    assert settings.update("m", {"trace_rate": None, "trace_level": []})["trace_rate"] == "9"
    assert settings.update(None, {"trace_rate": None})["trace_rate"] == "1000"
    assert len(changed) == 5
    settings.forget("m")
    assert settings.document("m") == settings.document()


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"trace_rate": "x"}, InvalidRequest, "Unable to parse 'trace_rate', got: x"),
        ({"trace_rate": ""}, InvalidRequest, "Unable to parse 'trace_rate', got: "),
        ({"trace_rate": "1.5"}, InvalidRequest, "Unable to parse 'trace_rate', got: 1.5"),
        ({"trace_rate": "-1"}, InvalidRequest, "out of range [ 0, 4294967295 ], got: -1"),
        ({"log_frequency": "9" * 70}, InvalidRequest, "Unable to parse 'log_frequency', got: 999"),
        ({"trace_count": "-2"}, InvalidRequest, "Unable to parse 'trace_count'. Expecting value >= -1, got: -2"),
        ({"trace_count": ["1", "2"]}, InvalidRequest, "expect only 1 value for 'trace_count'"),
        ({"trace_rate": 5}, Malformed, "'trace_rate' must be a string"),
        ({"trace_level": [1]}, Malformed, "'trace_level' must be a string, or an array"),
        ({"trace_level": ["OFF", "TENSORS"]}, InvalidRequest, "Expect only one trace level 'OFF' is specified"),
        ({"trace_level": ["LOUD"]}, InvalidRequest, "Unable to parse 'trace_level', got: LOUD"),
        ({"trace_file": "y"}, Unsupported, "trace file location can not be updated through network protocol"),
    ],
)
def test_bad_trace_settings_change_nothing(changes: dict[str, Any], kind: type[GatewayError], text: str) -> None:
    settings = TraceSettings("file")
    for model in (None, "m"):
        with pytest.raises(kind) as caught:
            settings.update(model, {"trace_rate": "5", **changes})
        assert text in str(caught.value)
        assert type(caught.value) is kind
        assert settings.document(model) == DEFAULTS | {"trace_file": "file"}


def test_without_a_file_nothing_can_be_switched_on() -> None:
    settings = TraceSettings()
    with pytest.raises(InvalidRequest, match="trace file name is not given"):
        settings.update(None, {"trace_level": ["TIMESTAMPS"]})
    assert settings.update(None, {"trace_level": ["OFF"], "trace_rate": "2"})["trace_rate"] == "2"


@pytest.fixture
def switches() -> Iterator[log_setup.Switches]:
    """The process's own switches, put back afterwards."""
    root, own = logging.getLogger(), log_setup.SWITCHES
    before = (own.info, own.warning, own.error, own.verbose)
    level = root.level
    log_setup.switch(info=True, warning=True, error=True, verbose=0)
    yield own
    own.info, own.warning, own.error, own.verbose = before
    root.setLevel(level)


def made(level: int) -> bool:
    """Whether a record of this level would be written."""
    record = logging.LogRecord("gateway", level, "", 0, "text", None, None)
    return logging.getLogger().isEnabledFor(level) and log_setup.SWITCHES.filter(record)


def test_switching_the_log_works_at_once(switches: log_setup.Switches) -> None:
    settings = LogSettings()
    levels = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL)
    assert [made(level) for level in levels] == [False, True, True, True, True]
    assert settings.document() == LOG_DEFAULTS
    assert settings.update({"log_verbose_level": 2, "log_info": None, "nope": 1}) == LOG_DEFAULTS | {
        "log_verbose_level": 2
    }
    assert [made(level) for level in levels] == [True, True, True, True, True]
    settings.update({"log_verbose_level": 0, "log_info": False, "log_error": False, "log_format": "ISO8601"})
    assert [made(level) for level in levels] == [False, False, True, False, True]
    assert settings.document() == LOG_DEFAULTS | {"log_info": False, "log_error": False, "log_format": "ISO8601"}


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"log_info": 1}, Malformed, "expect boolean for 'log_info'"),
        ({"log_error": "true"}, Malformed, "expect boolean for 'log_error'"),
        ({"log_verbose_level": -1}, Malformed, "'log_verbose_level' must be a whole number"),
        ({"log_verbose_level": True}, Malformed, "'log_verbose_level' must be a whole number"),
        ({"log_format": 5}, Malformed, "'log_format' must be a string"),
        ({"log_format": "xml"}, UnknownLogFormat, "invalid argument for log_format, got: xml"),
        ({"log_file": ""}, Unsupported, "log file location can not be updated through network protocol"),
    ],
)
def test_bad_log_settings_change_nothing(
    switches: log_setup.Switches, changes: dict[str, Any], kind: type[GatewayError], text: str
) -> None:
    settings = LogSettings()
    with pytest.raises(kind) as caught:
        settings.update({"log_warning": False, **changes})
    assert text in str(caught.value)
    assert settings.document() == LOG_DEFAULTS
