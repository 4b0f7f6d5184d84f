"""Rows and their tensors, from settled requests: whatever the mix, each row has its own request's bytes and place."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.batch import Execution, FinishedBatch
from gateway.core.log_policy import LogPolicy, Payload
from gateway.core.model import BatchPolicy, ModelSpec, TensorSpec
from gateway.core.request import InferRequest, InputTensor, OutputTensor, SequenceStep
from gateway.core.tensor import DATATYPE, DATATYPES, Datatype, element_count, pack_bytes
from gateway.errors import InvalidRequest, LogUnavailable, NotFound, Overloaded
from gateway.inference_log.handover import FRAME_BYTES, MAX_TEXT, Caller, InferenceLog, Wall
from gateway.inference_log.outlet import Outlet
from tests.inference_log.row_reader import Frames, Later, Logged, Tensor

CALLER = Caller("theirs", "ab" * 16)


def spec_of(inputs: Sequence[Datatype], outputs: Sequence[Datatype]) -> ModelSpec:
    given = tuple(TensorSpec(f"in{n}", datatype, (-1,)) for n, datatype in enumerate(inputs))
    made = tuple(TensorSpec(f"out{n}", datatype, (-1,)) for n, datatype in enumerate(outputs))
    return ModelSpec("m", "3", "sha256:" + "ab" * 32, "onnx", given, made, BatchPolicy(64))


class Bench:
    def __init__(self, spec: ModelSpec, policy: LogPolicy = LogPolicy(), seed: int = 1) -> None:  # noqa: B008  # frozen
        self.frames = Frames()
        self.turn = Later()
        outlet = Outlet(self.frames, 10**9, Later(), lambda: 5.0, lambda: 7)
        self.log = InferenceLog(outlet, self.turn, Wall(lambda: 7, lambda: 5.0), random.Random(seed).random)
        self.spec = spec
        version = self.log.of(spec, policy)
        assert version is not None
        self.version = version
        self.ids = 0
        self.expected: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def next_id(self) -> bytes:
        self.ids += 1
        return b"%036d" % self.ids

    def answer(self, request: InferRequest, **how: Any) -> str:
        request_id = self.next_id()
        self.version.answered(request, request_id, 0.5, "http", "infer", None, CALLER, **how)
        return request_id.decode()

    def refuse(self, error: Any, request: InferRequest | None = None) -> str:
        request_id = self.next_id()
        self.version.refused(error, request, request_id, 1.0, 0.5, "http", "infer", None, CALLER)
        return request_id.decode()

    @property
    def rows(self) -> list[Logged]:
        self.turn.run()
        return self.frames.rows


def tensor_bytes(rng: random.Random, datatype: Datatype, shape: tuple[int, ...]) -> bytes:
    count = element_count(shape)
    if datatype.kind == "bytes":
        return pack_bytes([rng.randbytes(rng.randrange(5)) for _ in range(count)])
    if datatype.kind == "bool":
        return bytes(rng.randrange(2) for _ in range(count))
    return rng.randbytes(count * datatype.itemsize)


def made_input(rng: random.Random, datatype: Datatype, shape: tuple[int, ...]) -> InputTensor:
    data = tensor_bytes(rng, datatype, shape)
    if datatype.kind in {"bytes", "half"} or rng.random() < 0.5:
        return InputTensor(datatype, shape, None, memoryview(b"?" + data)[1:] if rng.random() < 0.5 else data)
    values = np.frombuffer(data, datatype.numpy).tolist()
    return InputTensor(datatype, shape, values, None)


def bytes_of(tensor: InputTensor) -> bytes:
    if tensor.values is not None:
        with np.errstate(all="ignore"):
            return np.array(tensor.values, tensor.datatype.numpy).tobytes()
    assert tensor.buffer is not None
    return bytes(tensor.buffer)


def made_request(rng: random.Random, spec: ModelSpec, rows: int, outputs: tuple[int, ...]) -> InferRequest:
    width = rng.randrange(1, 4)
    inputs = tuple(made_input(rng, tensor.datatype, (rows, width)) for tensor in spec.inputs)
    request = InferRequest(inputs, rows, sum(len(bytes_of(t)) for t in inputs), None, outputs, None)
    request.received = 1.0
    request.attempt = 1
    return request


def settle_batch(bench: Bench, rng: random.Random, sizes: Sequence[int], outputs: tuple[int, ...]) -> None:
    """A batch of requests with so many rows each; some leave, some want fewer outputs, in any order of answers."""
    spec = bench.spec
    total = sum(sizes)
    parts = {
        index: [tensor_bytes(rng, spec.outputs[index].datatype, (1, 2)) for _ in range(total)] for index in outputs
    }
    made = {
        index: OutputTensor(spec.outputs[index].name, spec.outputs[index].datatype, (total, 2), b"".join(parts[index]))
        for index in outputs
    }
    batch = FinishedBatch(f"b{bench.ids}", total, made, "onnx-1", 1, 2.0, 3.0, "full", (1, 2, 3))
    members = []
    row = 0
    for size in sizes:
        request = made_request(rng, spec, size, outputs)
        request.batch, request.row = batch, row
        members.append(request)
        row += size
    if rng.random() < 0.3:
        rng.shuffle(members)
    for request in members:
        inputs = {
            tensor.name: Tensor(tensor.datatype.name, given.shape, bytes_of(given))
            for tensor, given in zip(spec.inputs, request.inputs, strict=True)
            if given is not None
        }
        if rng.random() < 0.15:
            request.batch = None
            bench.expected[bench.refuse(Overloaded("full"), request)] = (inputs, {})
            continue
        start, stop = request.row, request.row + request.rows
        expected = {
            made[index].name: Tensor(made[index].datatype.name, (request.rows, 2), b"".join(parts[index][start:stop]))
            for index in outputs
        }
        bench.expected[bench.answer(request)] = (inputs, expected)


@given(st.randoms(use_true_random=False))
def test_every_row_has_its_own_tensors(rng: random.Random) -> None:
    some = [rng.choice(DATATYPES) for _ in range(rng.randrange(1, 3))]
    more = [rng.choice(DATATYPES) for _ in range(rng.randrange(1, 3))]
    bench = Bench(spec_of(some, more))
    for _ in range(rng.randrange(1, 4)):
        outputs = tuple(sorted(rng.sample(range(len(more)), rng.randrange(1, len(more) + 1))))
        settle_batch(bench, rng, [rng.choice([1, 1, 1, 2, 3]) for _ in range(rng.randrange(1, 6))], outputs)
        if rng.random() < 0.3:
            bench.expected[bench.refuse(InvalidRequest("no"))] = ({}, {})
        if rng.random() < 0.3:
            bench.turn.run()
    rows = bench.rows
    assert [row.id for row in rows] == list(bench.expected), "each once, in the order in which they settled"
    for row in rows:
        assert (row.inputs, row.outputs) == bench.expected[row.id]


@given(st.randoms(use_true_random=False), st.sampled_from(["drop", "hash", "truncate"]))
def test_a_policy_changes_what_is_kept_and_nothing_else(rng: random.Random, payload: Payload) -> None:
    bench = Bench(
        spec_of([rng.choice(DATATYPES)], [rng.choice(DATATYPES)]), LogPolicy(payload=payload, truncate_bytes=3)
    )
    settle_batch(bench, rng, [rng.choice([1, 2]) for _ in range(rng.randrange(1, 5))], (0,))
    for row in bench.rows:
        for found, expected in zip((row.inputs, row.outputs), bench.expected[row.id], strict=True):
            assert found.keys() == expected.keys()
            for name, tensor in found.items():
                whole = expected[name].data
                kept = {"drop": b"", "truncate": whole[:3], "hash": hashlib.sha256(whole).digest()}[payload]
                assert (tensor.data, tensor.policy, tensor.length) == (kept, payload, len(whole))
                assert (tensor.datatype, tensor.shape) == (expected[name].datatype, expected[name].shape)


def batch_of(rows: int, **how: Any) -> FinishedBatch:
    output = OutputTensor("out0", DATATYPES[8], (rows, 1), np.arange(rows, dtype="<i8").tobytes())
    batch = FinishedBatch("b", rows, {0: output}, "onnx-1", 1, 2.0, 3.0, "full", (1, 2, 3))
    for name, value in how.items():
        setattr(batch, name, value)
    return batch


def one(batch: FinishedBatch, row: int = 0) -> InferRequest:
    request = InferRequest((InputTensor(DATATYPES[8], (1, 1), [row], None),), 1, 8, None, (0,), None)
    request.received, request.attempt, request.batch, request.row = 1.0, 1, batch, row
    return request


SPEC = spec_of([DATATYPES[8]], [DATATYPES[8]])


def test_one_frame_a_turn_with_each_batch_once() -> None:
    bench = Bench(SPEC)
    first, second = batch_of(3), batch_of(1)
    for request in (one(first, 0), one(second), one(first, 2), one(first, 1)):
        bench.answer(request)
    rows = bench.rows
    (found,) = bench.frames.taken
    assert len(found.batches) == 2  # type: ignore[union-attr]
    assert [row.row.batch_row for row in rows] == [0, 0, 2, 1]
    assert [np.frombuffer(row.outputs["out0"].data, "<i8")[0] for row in rows] == [0, 0, 2, 1]
    assert not bench.turn.due


def test_rows_without_payload_name_their_own_batch() -> None:
    bench = Bench(SPEC, LogPolicy(sampling=0.0))
    for number in range(50):  # nothing but the log keeps these: they would take each other's address
        bench.answer(one(batch_of(1, batch_id=f"b{number}")))
    assert [row.batch.batch_id for row in bench.rows if row.batch] == [f"b{number}" for number in range(50)]


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 2, 0], [0, 2], [1], [2, 1], [0, 1, 2]])
def test_answers_in_any_order_and_callers_that_left_shift_nothing(order: list[int]) -> None:
    bench = Bench(SPEC)
    batch = batch_of(3)
    for place in order:
        bench.answer(one(batch, place))
    assert [np.frombuffer(row.outputs["out0"].data, "<i8")[0] for row in bench.rows] == order


def numbered(batch_id: str, first: int, rows: int) -> FinishedBatch:
    """A batch of two outputs: element n of the first is `first + n`, of the second the same below zero."""
    made = {}
    for index, sign in ((0, 1), (1, -1)):
        data = (sign * np.arange(first, first + rows, dtype="<i8")).tobytes()
        made[index] = OutputTensor(f"out{index}", DATATYPES[8], (rows, 1), data)
    return FinishedBatch(batch_id, rows, made, "onnx-1", 1, 2.0, 3.0, "full", (1, 2, 3))


def numbers_in(row: Logged) -> dict[str, list[int]]:
    return {name: np.frombuffer(tensor.data, "<i8").tolist() for name, tensor in row.outputs.items()}


TWO_OUTPUTS = spec_of([DATATYPES[8]], [DATATYPES[8], DATATYPES[8]])


@pytest.mark.parametrize("refused_before", [False, True])
def test_a_place_in_one_batch_is_not_continued_in_another(refused_before: bool) -> None:
    bench = Bench(TWO_OUTPUTS)
    if refused_before:
        bench.refuse(InvalidRequest("no"))
    for batch, place in ((numbered("a", 10, 2), 0), (numbered("b", 20, 2), 1)):
        bench.answer(one(batch, place))
    assert [numbers_in(row) for row in bench.rows[-2:]] == [{"out0": [10]}, {"out0": [21]}]


@pytest.mark.parametrize("refused_before", [False, True])
def test_batch_mates_that_wanted_other_outputs_have_those_they_wanted(refused_before: bool) -> None:
    bench = Bench(TWO_OUTPUTS)
    batch = numbered("a", 10, 2)
    wants = [one(batch, 0), one(batch, 1)]
    wants[0].outputs, wants[1].outputs = (0,), (1,)
    if refused_before:
        bench.refuse(InvalidRequest("no"))
    for request in wants:
        bench.answer(request)
    assert [numbers_in(row) for row in bench.rows[-2:]] == [{"out0": [10]}, {"out1": [-11]}]


def test_a_single_row_that_was_served_something_else_than_its_outputs_has_that() -> None:
    bench = Bench(SPEC)
    classes = OutputTensor("out0", DATATYPE["BYTES"], (1, 1), pack_bytes([b"0.5:7"]))
    bench.answer(one(batch_of(2), 1), served=[classes])
    (row,) = bench.rows
    assert row.outputs == {"out0": Tensor("BYTES", (1, 1), pack_bytes([b"0.5:7"]))}


def test_a_row_that_was_not_drawn_takes_nobody_else_s_payload() -> None:
    bench = Bench(TWO_OUTPUTS, LogPolicy(sampling=0.5))
    drawn = iter([0.0, 0.9, 0.49])
    bench.log.draw = lambda: next(drawn)
    batch = numbered("a", 10, 2)
    for request in (one(batch, 0), one(numbered("b", 20, 1)), one(batch, 1)):
        bench.answer(request)
    assert [numbers_in(row) for row in bench.rows] == [{"out0": [10]}, {}, {"out0": [11]}]


def test_a_row_that_could_not_be_noted_counts_as_lost() -> None:
    bench = Bench(SPEC)
    bench.version.failed()
    assert bench.log.outlet.statistics().lost_rows == 1
    bench.log.outlet.finish()
    (gap,) = bench.frames.taken
    assert (gap.stream, gap.model, gap.version) == ("gap", "m", "3")  # type: ignore[union-attr]
    assert json.loads(gap.details)["rows"] == 1  # type: ignore[union-attr]


def test_an_answer_of_several_executions_names_them_all() -> None:
    bench = Bench(SPEC)
    parts = [(Execution("cache", 1, "c", 1), 0), (Execution("onnx-2", 2, "d", 9), 5)]
    whole = one(batch_of(1, parts=parts, attempt=2))
    whole.attempt = 0  # its parts were tried
    bench.answer(whole)
    bench.answer(one(batch_of(1, parts=parts[:1], remote=True)))
    several, single = bench.rows
    assert several.row.attempt == 2
    assert [(b.backend, b.batch_id, b.attempt, b.size, row) for b, row in several.executions] == [
        ("cache", "c", 1, 1, 0),
        ("onnx-2", "d", 2, 9, 5),
    ]
    assert (several.detail.queued_s, several.detail.infer_s) == (1.0, 1.0)
    assert several.batch is not None
    assert several.batch.backend == "cache"
    assert single.executions == []
    assert single.batch is not None
    assert single.batch.remote


def test_what_a_client_writes_is_bounded() -> None:
    bench = Bench(SPEC)
    request = one(batch_of(1))
    request.request_id = "x" * 5000
    bench.answer(request)
    bench.log.unresolved.refused(
        NotFound("n" * 5000), None, b"i", 1.0, 0.0, "http", "infer", None, CALLER, ("m" * 5000, "v" * 5000)
    )
    row, lost = bench.rows
    assert row.row.oip_id == "x" * MAX_TEXT
    assert [len(text or "") for text in (lost.detail.error, lost.detail.asked_model, lost.detail.asked_version)] == [
        MAX_TEXT
    ] * 3
    assert lost.model == ""


def test_parameters_are_kept() -> None:
    bench = Bench(SPEC)
    request = one(batch_of(1))
    request.parameters = {"temperature": 0.5}
    request.sequence = SequenceStep("s", start=True)
    request.priority, request.stated_timeout_s = 2, 0.25
    bench.answer(request)
    bench.refuse(Overloaded("full"), request)
    for row in bench.rows:
        assert json.loads(row.detail.parameters or "") == {
            "temperature": 0.5, "sequence_id": "s", "sequence_start": True, "sequence_end": False, "priority": 2,
            "timeout": 250_000,
        }  # fmt: skip


def test_parameters_that_json_has_no_number_for_are_texts() -> None:
    bench = Bench(SPEC)
    request = one(batch_of(1))
    request.unused = {"a": math.inf, "b": math.nan, "c": 1.5}
    bench.answer(request)
    (row,) = bench.rows
    assert json.loads(row.detail.parameters or "") == {"a": "inf", "b": "nan", "c": 1.5}


def test_sampling_says_with_what_probability() -> None:
    bench = Bench(SPEC, LogPolicy(sampling=0.25))
    batch = batch_of(2000)
    for place in range(2000):
        bench.answer(one(batch, place))
    bench.refuse(Overloaded("full"), one(batch))
    *answered, refused = bench.rows
    kept = [row for row in answered if row.inputs]
    assert 380 < len(kept) < 620, "a fixed seed"
    assert {row.row.sampling for row in answered} == {0.25}
    for row in kept:
        assert np.frombuffer(row.outputs["out0"].data, "<i8")[0] == row.row.batch_row
        assert np.frombuffer(row.inputs["in0"].data, "<i8")[0] == row.row.batch_row
    assert all(not row.outputs for row in answered if not row.inputs)
    assert refused.inputs
    assert refused.row.sampling == 1.0


def test_large_tensors_make_several_frames_and_no_row_is_in_two() -> None:
    bench = Bench(SPEC)
    for n in range(5):
        request = one(batch_of(1))
        data = bytes([n]) * (FRAME_BYTES // 2)
        request.inputs = (InputTensor(DATATYPES[8], (1, len(data) // 8), None, data),)
        request.nbytes = len(data)
        bench.answer(request)
    rows = bench.rows
    assert len(bench.frames.taken) == 3
    assert [row.inputs["in0"].data[0] for row in rows] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("answered", [True, False])
def test_a_request_too_large_for_the_room_takes_no_neighbour_along(answered: bool) -> None:
    bench = Bench(SPEC)
    bench.frames.room = FRAME_BYTES
    bench.answer(one(batch_of(1)))
    large = one(batch_of(1))
    data = bytes(2 * FRAME_BYTES)
    large.inputs = (InputTensor(DATATYPES[8], (1, len(data) // 8), None, data),)
    large.nbytes = len(data)
    if answered:
        bench.answer(large)
    else:
        bench.refuse(Overloaded("full"), large)
    bench.answer(one(batch_of(1)))
    assert len(bench.rows) == 2
    assert bench.log.statistics().outlet.lost_rows == 1


def test_tensors_that_cannot_be_read_cost_their_own_row_only(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(SPEC)
    batch = batch_of(3)
    requests = [one(batch, row) for row in range(3)]
    requests[1].inputs = (InputTensor(DATATYPES[8], (1, 1), ["no number"], None),)
    for request in requests:
        bench.answer(request)
    rows = bench.rows
    assert [bool(row.inputs) for row in rows] == [True, False, True]
    assert [np.frombuffer(rows[n].outputs["out0"].data, "<i8")[0] for n in (0, 2)] == [0, 2]
    assert "could not be read together" in caplog.text


def test_a_frame_that_cannot_be_made_costs_nobody_else_a_row(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(SPEC)
    other = bench.log.of(SPEC, LogPolicy())
    assert other is not None
    bench.refuse(InvalidRequest("half a pair: \ud800"))  # no text can be written with it
    other.refused(InvalidRequest("plain"), None, bench.next_id(), 1.0, 0.5, "http", "infer", None, CALLER)
    assert [row.detail.error for row in bench.rows] == ["plain"]
    statistics = bench.log.statistics().outlet
    assert (statistics.offered_rows, statistics.lost_rows, statistics.open_gaps) == (2, 1, 1)
    assert "could not be noted" in caplog.text
    bench.refuse(InvalidRequest("the next turn"))
    assert [row.detail.error for row in bench.rows] == ["plain", "the next turn"]


def test_what_cannot_be_noted_harms_neither_its_caller_nor_the_next_row(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(SPEC)
    batch = batch_of(4)
    odd, also_odd, copy = one(batch, 0), one(batch, 1), one(batch, 2)
    odd.request_id = also_odd.request_id = copy.request_id = 7  # type: ignore[assignment]  # whatever the fault may be
    with pytest.raises(TypeError):
        bench.answer(odd, served=[OutputTensor("out0", DATATYPES[8], (1, 1), bytes(8))])
    bench.refuse(Overloaded("full"), also_odd)
    bench.version.shadowed(copy, b"copy", 4.0, None)
    bench.answer(one(batch, 3))
    (row,) = bench.rows
    assert np.frombuffer(row.inputs["in0"].data, "<i8")[0] == np.frombuffer(row.outputs["out0"].data, "<i8")[0] == 3
    assert bench.log.statistics().outlet.lost_rows == 2
    assert "could not be noted" in caplog.text


def test_each_row_has_the_name_under_which_it_was_answered() -> None:
    bench = Bench(SPEC)
    canary, champion = bench.version.named("canary"), bench.version.named("champion")
    batch = batch_of(4)
    for place, log in enumerate((canary, champion, canary, bench.version)):
        log.answered(one(batch, place), bench.next_id(), 0.5, "http", "infer", None, CALLER)
    assert sorted((row.row.batch_row, row.variant) for row in bench.rows) == [
        (0, "canary"), (1, "champion"), (2, "canary"), (3, ""),
    ]  # fmt: skip
    assert canary.named("champion") is champion


def test_what_is_refused_for_want_of_room_is_no_row() -> None:
    bench = Bench(SPEC, LogPolicy(overflow="block"))
    bench.refuse(LogUnavailable("full"))
    assert bench.rows == []
    assert bench.log.statistics().outlet.refused_requests == 1


def test_a_shadow_says_what_it_copies() -> None:
    bench = Bench(SPEC)
    bench.version.shadowed(one(batch_of(1)), b"copy", 4.0, "original")
    failed = one(batch_of(1))
    failed.batch, failed.error = None, RuntimeError("secret text")
    bench.version.shadowed(failed, b"other", 4.0, None)
    copied, lost = bench.rows
    assert (copied.variant, copied.row.endpoint, copied.row.protocol) == ("shadow", "shadow", "")
    assert (copied.detail.cause, copied.row.total_s) == ("original", 3.0)
    assert lost.row.status == 500
    assert "secret" not in (lost.detail.error or "")


def test_no_log_for_a_model_that_does_not_want_one() -> None:
    bench = Bench(SPEC)
    assert bench.log.of(SPEC, LogPolicy(enabled=False)) is None
