"""What the end of a process means for each batch it had."""

from __future__ import annotations

import pytest

from gateway.core.outcome import FailureKind, Sign
from gateway.workers.attempt import End, fate
from gateway.workers.board import Progress

K, S, E, P = FailureKind, Sign, End, Progress


@pytest.mark.parametrize(
    ("end", "progress", "overdue", "kind", "sign"),
    [
        (E.DIED, P.EXECUTING, False, K.BROKEN, S.EXIT),
        (E.CRASHED, P.EXECUTING, False, K.BROKEN, S.CRASH),
        (E.CRASHED, P.NOT_BEGUN, False, K.NOT_SENT, S.BYSTANDER),
        (E.CRASHED, P.FINISHED, False, K.BROKEN, S.BYSTANDER),
        (E.NO_MEMORY, P.EXECUTING, False, K.BROKEN, S.MEMORY),
        (E.HUNG, P.EXECUTING, True, K.TIMEOUT, S.NONE),
        (E.HUNG, P.EXECUTING, False, K.BROKEN, S.BYSTANDER),
        (E.HUNG, P.NOT_BEGUN, True, K.NOT_SENT, S.BYSTANDER),
        (E.DIED, P.NOT_BEGUN, False, K.NOT_SENT, S.BYSTANDER),
        (E.DIED, P.FINISHED, False, K.BROKEN, S.BYSTANDER),
        (E.WISH, P.EXECUTING, False, K.BROKEN, S.BYSTANDER),
        (E.WISH, P.NOT_BEGUN, False, K.NOT_SENT, S.BYSTANDER),
        (E.NONSENSE, P.NOT_BEGUN, False, K.BROKEN, S.NONE),
        (E.NONSENSE, P.EXECUTING, False, K.BROKEN, S.NONE),
    ],
)
def test_only_who_was_executing_is_suspected(
    end: End, progress: Progress, overdue: bool, kind: FailureKind, sign: Sign
) -> None:
    failure = fate(end, progress, "text", overdue=overdue)
    assert (failure.kind, failure.sign, failure.message) == (kind, sign, "text")


@pytest.mark.parametrize("end", End)
def test_a_batch_that_may_have_run_is_never_called_not_sent(end: End) -> None:
    """A model that must not execute twice relies on it."""
    for progress in (P.EXECUTING, P.FINISHED):
        assert fate(end, progress, "text", overdue=False).kind is not K.NOT_SENT
