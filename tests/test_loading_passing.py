"""Which failures of a load may be over soon."""

from __future__ import annotations

import errno

import pytest

from gateway.backends.interface import Failure, FailureKind
from gateway.errors import ConfigError, GatewayError, ModelError, NotReady, SourceError, SourceUnavailable
from gateway.loading_passing import passes
from gateway.loading_trial import RunTimedOut, ServerLost, unanswered


def caused(cause: BaseException) -> GatewayError:
    try:
        try:
            raise cause
        except type(cause):
            raise ConfigError("the file cannot be read") from None
    except ConfigError as error:
        return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (NotReady("no worker process came up"), True),
        (RunTimedOut("late"), True),
        (ServerLost("gone"), True),
        (SourceUnavailable("silent"), True),
        (caused(OSError(errno.EMFILE, "too many open files")), True),
        (caused(FileNotFoundError(errno.ENOENT, "no such file")), False),
        (caused(ValueError("not JSON")), False),
        (SourceError("the digest is another"), False),
        (ConfigError("the signature is wrong"), False),
        (ModelError("this is no model"), False),
    ],
)
def test_what_is_of_the_moment_passes(error: GatewayError, expected: bool) -> None:
    assert passes(error) is expected


@pytest.mark.parametrize("kind", FailureKind)
def test_a_run_that_got_no_answer_is_the_model_s_fault_only_if_it_had_its_chance(kind: FailureKind) -> None:
    error = unanswered(Failure(kind, "why"), "golden input 1")
    of_the_moment = kind in (FailureKind.TIMEOUT, FailureKind.OVERLOAD, FailureKind.NOT_SENT)
    assert passes(error) is of_the_moment
    assert str(error) == "golden input 1: why"
