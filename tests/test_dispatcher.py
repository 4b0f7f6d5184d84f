"""One batch at a time: what the dispatcher makes of an outcome, seen by the owner it reports to."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from gateway.backends.interface import FailureKind, Success
from gateway.core.batch import FinishedBatch
from gateway.core.batching import Reason
from gateway.core.model import BatchPolicy
from gateway.core.request import RUNNING, SETTLED, InferRequest, OutputTensor
from gateway.dispatcher import ATTEMPT_TIMEOUT_FACTOR, ATTEMPT_TIMEOUT_FLOOR_S, Dispatcher
from gateway.errors import BackendError, GatewayError, ModelError
from gateway.observe.record import ModelStatistics
from tests.scripted import INT64, Backend, ScriptedBatch, model_spec, request_of, simulated


class Desk:
    """The owner of the batches: notes what it is told."""

    def __init__(self, replicas: int = 2, row_s: float = 0.0) -> None:
        self.now = 0.0
        self.backend = Backend(replicas, 1)
        self.statistics = ModelStatistics()
        self.dispatcher = Dispatcher(
            model_spec(BatchPolicy(8)), self.backend.replicas, self.statistics, lambda: self.now, self, row_s
        )
        self.succeeded: list[tuple[list[InferRequest], FinishedBatch]] = []
        self.failed: list[tuple[list[InferRequest], GatewayError]] = []
        self.returned: list[tuple[list[InferRequest], bool]] = []

    def call_soon(self, callback: Callable[..., None], *arguments: object) -> None:
        raise AssertionError("nothing goes wrong in these tests")

    def batch_succeeded(self, members: list[InferRequest], batch: FinishedBatch) -> None:
        self.succeeded.append((members, batch))

    def batch_failed(self, members: list[InferRequest], error: GatewayError) -> None:
        self.failed.append((members, error))

    def batch_returned(self, members: list[InferRequest], taken: bool) -> None:
        self.returned.append((members, taken))

    def run(self, members: list[InferRequest], isolated: bool = False) -> ScriptedBatch:
        for member in members:
            member.state = RUNNING
        replica = self.dispatcher.free_replica(members[0].avoid)
        assert replica is not None
        self.dispatcher.dispatch(members, Reason.FULL, replica, isolated)
        return self.backend.executed[-1]


def requests(count: int) -> list[InferRequest]:
    return [request_of([number]) for number in range(count)]


@simulated
async def test_a_finished_batch_says_who_ran_it_and_when() -> None:
    desk, members = Desk(), requests(3)
    desk.now = 5.0
    batch = desk.run(members)
    assert desk.dispatcher.running == 1
    desk.now = 5.5
    batch.reply()
    ((told, finished),) = desk.succeeded
    assert told is members
    assert (finished.backend, finished.attempt, finished.rows, finished.reason) == ("onnx-1", 1, 3, "full")
    assert (finished.dispatched, finished.finished) == (5.0, 5.5)
    assert (finished.input_ns, finished.infer_ns, finished.output_ns) == (1, 10, 1)
    assert re.fullmatch(r"[0-9a-f]{4}-[0-9]{6,}", finished.batch_id)
    assert desk.dispatcher.running == 0


@simulated
async def test_no_two_batches_have_the_same_id() -> None:
    desks = [Desk(), Desk()]  # two models of one process
    for _ in range(3):
        for desk in desks:
            desk.run(requests(1)).reply()
    assert len({finished.batch_id for desk in desks for _, finished in desk.succeeded}) == 6


@simulated
async def test_batches_take_turns_over_the_replicas() -> None:
    desk = Desk(replicas=3)
    names = []
    for _ in range(6):
        batch = desk.run(requests(1))
        names.append(batch.replica.name)
        batch.reply()
    assert sorted(names) == ["onnx-1", "onnx-1", "onnx-2", "onnx-2", "onnx-3", "onnx-3"]


@simulated
async def test_before_the_first_run_the_trial_at_load_bounds_an_attempt_else_the_deadline() -> None:
    for row_s, expected in ((1.0, ATTEMPT_TIMEOUT_FACTOR * 2.0), (0.001, ATTEMPT_TIMEOUT_FLOOR_S), (0.0, 30.0)):
        desk = Desk(row_s=row_s)
        members = requests(2)
        for member in members:
            member.deadline = desk.now + 30.0
        assert desk.run(members).timeout_s == expected


@simulated
async def test_the_attempt_timeout_follows_the_longest_recent_run() -> None:
    desk = Desk(replicas=1)
    first = desk.run(requests(1))
    assert first.timeout_s == ATTEMPT_TIMEOUT_FLOOR_S
    desk.now = 2.0
    first.reply()
    second = desk.run(requests(1))
    assert second.timeout_s == ATTEMPT_TIMEOUT_FACTOR * 2.0
    second.reply()
    assert 1.9 < desk.dispatcher.execute_s < 2.0


@simulated
async def test_broken_batches_go_back_whole_and_avoid_the_place() -> None:
    desk, members = Desk(), requests(3)
    desk.run(members).fail(FailureKind.BROKEN)
    assert desk.returned == [(members, True)]
    assert {member.avoid for member in members} == {"onnx-1"}
    assert desk.run(members).replica.name == "onnx-2"
    assert {member.attempt for member in members} == {2}


@simulated
async def test_the_second_break_makes_singles_and_the_third_alone_fails() -> None:
    desk, members = Desk(), requests(3)
    for _ in range(2):
        desk.run(members).fail(FailureKind.TIMEOUT)
    assert desk.returned[-1] == ([], True)
    assert desk.dispatcher.isolated == 3
    assert desk.dispatcher.isolated_members() == members
    alone = desk.dispatcher.next_isolated()
    assert alone == members[:1]
    desk.run(alone, isolated=True).fail(FailureKind.BROKEN, "it died")
    ((failed, error),) = desk.failed
    assert failed == members[:1]
    assert isinstance(error, BackendError)
    assert "it died" in str(error)


@simulated
async def test_halves_keep_their_order_and_their_company() -> None:
    desk, members = Desk(), requests(5)
    desk.run(members).fail(FailureKind.SUSPECT)
    assert desk.returned == [([], True)]
    assert desk.dispatcher.next_isolated() == members[:3]
    assert desk.dispatcher.next_isolated() == members[3:]
    assert desk.dispatcher.next_isolated() is None


@simulated
@pytest.mark.parametrize("kind", [FailureKind.BROKEN, FailureKind.NOT_SENT, FailureKind.OVERLOAD])
async def test_isolated_members_never_go_back_among_others(kind: FailureKind) -> None:
    desk, members = Desk(), requests(4)
    desk.run(members).fail(FailureKind.SUSPECT)
    half = desk.dispatcher.next_isolated()
    assert half is not None
    desk.run(half, isolated=True).fail(kind)
    assert desk.returned[-1] == ([], kind is FailureKind.BROKEN)
    assert desk.dispatcher.next_isolated() == half  # ahead of the other half


@simulated
async def test_one_member_that_the_model_refuses_is_told_so() -> None:
    desk, members = Desk(), requests(1)
    desk.run(members).fail(FailureKind.SUSPECT, "index 9 out of range")
    ((_, error),) = desk.failed
    assert isinstance(error, ModelError)
    assert "index 9 out of range" in str(error)


@simulated
@pytest.mark.parametrize("kind", [FailureKind.NOT_SENT, FailureKind.OVERLOAD])
async def test_what_was_not_taken_does_not_count_as_an_attempt(kind: FailureKind) -> None:
    desk, members = Desk(), requests(2)
    for _ in range(20):
        desk.run(members).fail(kind)
    assert {(member.attempt, member.broken) for member in members} == {(0, 0)}
    assert desk.returned == [(members, False)] * 20


@simulated
async def test_who_left_is_not_run_again() -> None:
    desk, members = Desk(), requests(4)
    batch = desk.run(members)
    members[1].state = SETTLED
    batch.fail(FailureKind.BROKEN)
    assert desk.returned == [([members[0], members[2], members[3]], True)]
    desk.run([members[0]]).fail(FailureKind.SUSPECT)
    batch = desk.run([members[2], members[3]])
    members[2].state = members[3].state = SETTLED
    batch.fail(FailureKind.BROKEN)
    assert desk.returned[-1] == ([], True)
    assert desk.dispatcher.running == 0


@simulated
async def test_isolated_members_who_left_are_skipped() -> None:
    desk, members = Desk(), requests(4)
    desk.run(members).fail(FailureKind.SUSPECT)
    members[0].state = members[1].state = members[2].state = SETTLED
    assert desk.dispatcher.isolated_members() == members[3:]
    assert desk.dispatcher.next_isolated() == members[3:]
    assert desk.dispatcher.isolated == 0


@simulated
@pytest.mark.parametrize(
    "change",
    [
        lambda outputs: outputs[:-1],
        lambda outputs: [OutputTensor("triple", INT64, (2, 1), bytes(16))],
        lambda outputs: [OutputTensor("other", INT64, (3, 1), bytes(24))],
        lambda outputs: outputs * 2,
    ],
)
async def test_an_answer_that_is_not_the_batch_s_reaches_nobody(change: object) -> None:
    desk, members = Desk(), requests(3)
    batch = desk.run(members)
    good = [OutputTensor("triple", INT64, (3, 1), bytes(24))]
    batch._end(Success(change(good), 0, 0, 0))  # type: ignore[operator]
    assert desk.succeeded == []
    assert desk.returned == [(members, True)]
    assert desk.statistics.attempts == {("onnx-1", "broken"): 1}


@simulated
async def test_attempts_and_retries_are_counted() -> None:
    desk, members = Desk(), requests(3)
    desk.run(members).fail(FailureKind.TIMEOUT)
    desk.run(members).fail(FailureKind.BROKEN)
    assert desk.statistics.attempts == {("onnx-1", "timeout"): 1, ("onnx-2", "broken"): 1}
    assert desk.statistics.retries == 6
