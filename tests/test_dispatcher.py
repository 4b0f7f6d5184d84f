"""One batch at a time: what the dispatcher makes of an outcome, seen by the owner it reports to."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

import pytest

from gateway.backends.interface import FailureKind, Success
from gateway.core.batch import FinishedBatch
from gateway.core.batching import Reason
from gateway.core.model import BatchPolicy
from gateway.core.request import RUNNING, SETTLED, InferRequest, OutputTensor
from gateway.core.resilience import RESILIENCE, Resilience
from gateway.dispatcher import Dispatcher
from gateway.dispatcher_lanes import Lane
from gateway.errors import GatewayError, ModelError
from gateway.observe.record import ModelStatistics
from tests.scripted import INT64, Backend, Kind, ScriptedBatch, model_spec, request_of, simulated


class Desk:
    """The owner of the batches: notes what it is told."""

    def __init__(
        self,
        replicas: int = 2,
        kinds: Sequence[Kind] = (),
        resilience: Resilience = RESILIENCE,
    ) -> None:
        self.now = 0.0
        self.backend = Backend(replicas, 1, kinds)
        self.statistics = ModelStatistics()
        self.dispatcher = Dispatcher(
            model_spec(BatchPolicy(8), resilience=resilience),
            self.statistics,
            lambda: self.now,
            self,
            0.0,
            random.Random(0),
        )
        for replica in self.backend.replicas:
            self.dispatcher.join(replica)
        self.succeeded: list[tuple[list[InferRequest], FinishedBatch]] = []
        self.failed: list[tuple[list[InferRequest], GatewayError]] = []
        self.returned = 0

    def call_soon(self, callback: Callable[..., None], *arguments: object) -> None:
        raise AssertionError("nothing goes wrong in these tests")

    def batch_succeeded(self, members: list[InferRequest], batch: FinishedBatch) -> None:
        self.succeeded.append((members, batch))

    def batch_failed(self, members: list[InferRequest], error: GatewayError) -> None:
        self.failed.append((members, error))
        for member in members:
            member.state = SETTLED

    def batch_returned(self) -> None:
        self.returned += 1

    def run(self, members: list[InferRequest]) -> ScriptedBatch:
        for member in members:
            member.state = RUNNING
            member.deadline = member.deadline or self.now + 30.0
        chosen = self.dispatcher.fleet.choose(self.now, len(members))
        assert chosen is not None
        self.dispatcher.dispatch(members, Reason.FULL, chosen)
        return self.backend.executed[-1]

    def again(self) -> ScriptedBatch:
        """The one batch that goes next from the lanes."""
        before = len(self.backend.executed)
        self.now += 2.0  # whatever pause there was is over
        self.dispatcher.serve(self.now)
        assert len(self.backend.executed) > before
        return self.backend.executed[before]


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
    assert (finished.backend, finished.attempt, finished.rows) == (batch.replica.name, 1, 3)
    assert (finished.reason, finished.remote) == ("full", False)
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
async def test_batches_go_where_nothing_is_under_way() -> None:
    desk = Desk(replicas=3)
    assert {desk.run(requests(1)).replica.name for _ in range(3)} == {"onnx-1", "onnx-2", "onnx-3"}
    assert desk.dispatcher.fleet.choose(desk.now, 1) is None


@simulated
async def test_a_stated_attempt_timeout_is_the_replica_s() -> None:
    desk = Desk(resilience=Resilience(attempt_timeout_s=0.75))
    assert desk.run(requests(2)).timeout_s == 0.75


@simulated
async def test_broken_batches_go_again_whole_and_elsewhere() -> None:
    desk, members = Desk(kinds=["oip", "oip"]), requests(3)
    first = desk.run(members)
    first.fail(FailureKind.BROKEN)
    assert desk.returned == 1
    assert {member.avoid for member in members} == {first.replica.name}
    again = desk.again()
    assert again.replica is not first.replica
    assert (again.rows, again.lane) == (3, Lane.RETRY)
    assert {member.attempt for member in members} == {2}


@simulated
async def test_the_second_break_makes_singles() -> None:
    desk, members = Desk(kinds=["oip", "oip"]), requests(3)
    desk.run(members).fail(FailureKind.TIMEOUT)
    desk.again().fail(FailureKind.TIMEOUT)
    assert desk.dispatcher.lanes.statistics().quarantined == 3
    assert [*desk.dispatcher.lanes] == members
    assert desk.again().numbers == [0]


@simulated
async def test_halves_keep_their_order_and_their_company() -> None:
    desk, members = Desk(), requests(5)
    desk.run(members).fail(FailureKind.SUSPECT)
    assert desk.dispatcher.lanes.statistics().isolated == 2
    desk.dispatcher.serve(desk.now)  # the model refused politely: both at once
    assert [batch.numbers for batch in desk.backend.executed[1:]] == [[0, 1, 2], [3, 4]]


@simulated
@pytest.mark.parametrize("kind", [FailureKind.BROKEN, FailureKind.NOT_SENT, FailureKind.OVERLOAD])
async def test_isolated_members_never_go_back_among_others(kind: FailureKind) -> None:
    desk, members = Desk(replicas=1), requests(4)
    desk.run(members).fail(FailureKind.SUSPECT)
    desk.again().fail(kind)
    lanes = desk.dispatcher.lanes.statistics()
    assert (lanes.retried, lanes.rows) == (0, 4)
    if kind is not FailureKind.BROKEN:
        assert desk.again().numbers == [0, 1]  # ahead of the other half


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
    desk, members = Desk(replicas=1), requests(2)
    desk.run(members).fail(kind)
    for _ in range(20):
        desk.again().fail(kind)
    assert [member.attempt for member in members] == [0, 0]
    assert [member.trouble.broken for member in members if member.trouble is not None] == [0, 0]
    assert desk.statistics.retries == 0


@simulated
async def test_who_left_is_not_run_again() -> None:
    desk, members = Desk(), requests(4)
    batch = desk.run(members)
    members[1].state = SETTLED
    batch.fail(FailureKind.BROKEN)
    again = desk.again()
    assert again.numbers == [0, 2, 3]
    for member in members:
        member.state = SETTLED
    again.fail(FailureKind.BROKEN)
    assert desk.dispatcher.lanes.count == 0
    assert desk.dispatcher.running == 0
    assert desk.failed == []


@simulated
async def test_who_leaves_a_lane_is_out_at_once() -> None:
    desk, members = Desk(), requests(4)
    desk.run(members).fail(FailureKind.SUSPECT)
    for member in members[:3]:
        member.state = SETTLED
        desk.dispatcher.left(member)
    lanes = desk.dispatcher.lanes.statistics()
    assert (lanes.requests, lanes.rows, lanes.nbytes, lanes.isolated) == (1, 1, 8, 1)
    assert desk.again().numbers == [3]


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
    assert desk.returned == 1
    assert [*desk.dispatcher.lanes] == members
    assert list(desk.statistics.attempts.values()) == [1]


@simulated
async def test_attempts_and_retries_are_counted() -> None:
    desk, members = Desk(kinds=["oip", "oip"]), requests(3)
    desk.run(members).fail(FailureKind.TIMEOUT)
    desk.again().fail(FailureKind.BROKEN)
    assert sorted(outcome for _, outcome in desk.statistics.attempts) == ["broken", "timeout"]
    assert len({backend for backend, _ in desk.statistics.attempts}) == 2
    assert desk.statistics.retries == 6
