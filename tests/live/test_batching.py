"""Batching as users see it: what is merged, split, refused or kept apart, and how config.pbtxt steers it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from gateway.provenance.headers import Member, parse
from tests.live import models
from tests.live.alone import Alone, check
from tests.live.gateway_process import GatewayProcess, gateway, until
from tests.live.in_process import gather_all
from tests.live.oip_wire import Answer, Request, Tensor, connect

MODELS = {
    "mixes": models.mixes_rows(),
    "lookup": models.lookup(),
    "chosen": models.whole_linear(),
    "stated": models.whole_linear(),
    "patient": models.whole_linear(),
    "delayed": models.whole_linear(),
    "lingering": models.whole_linear(),
    "shapes": models.identity("INT64"),
}
CONFIGS = {
    "stated": "max_batch_size: 8\n",
    "patient": (
        "max_batch_size: 8\ndynamic_batching { preferred_batch_size: [4] max_queue_delay_microseconds: 600000 }\n"
    ),
    "delayed": "max_batch_size: 8\ndynamic_batching { max_queue_delay_microseconds: 600000 }\n",
    "lingering": "max_batch_size: 8\ndynamic_batching { max_queue_delay_microseconds: 20000000 }\n",
    "shapes": "max_batch_size: 8\ndynamic_batching { max_queue_delay_microseconds: 600000 }\n",
}
DELAY_S = 0.6


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    root = models.repository(tmp_path_factory.mktemp("batching"), MODELS, CONFIGS)
    with gateway("serve", str(root), "--workers", "2") as process:
        yield process


@pytest.fixture(scope="module")
def alone() -> dict[str, Alone]:
    return {name: Alone(data) for name, data in MODELS.items()}


def whole(model: str, rows: int, value: int = 1) -> Request:
    array = np.arange(value, value + rows * 6, dtype=np.float32).reshape(rows, 6)
    return Request(model, [Tensor("x", "FP32", array)], request_id=f"{model}-{value}")


def together(served: GatewayProcess, requests: list[Request]) -> list[Answer]:
    """All requests at the same time, each on a connection of its own."""
    barrier = asyncio.Barrier(len(requests))

    async def one(request: Request) -> Answer:
        async with connect(served.port) as connection:
            await barrier.wait()
            return await connection.ask(request)

    async def story() -> list[Answer]:
        return await gather_all([one(request) for request in requests])

    return asyncio.run(story())


def in_one_piece(served: GatewayProcess, requests: list[Request]) -> list[Answer]:
    """All requests pipelined in one write: the gateway sees them in the same instant, however busy the machine is."""

    async def story() -> list[Answer]:
        async with connect(served.port) as connection:
            await connection.send(b"".join([request.encode() for request in requests]))
            return [await connection.receive() for _ in requests]

    return asyncio.run(story())


def members(answer: Answer) -> tuple[Member, ...]:
    return parse(answer.headers).members


def reasons(served: GatewayProcess, model: str) -> Counter[str]:
    """Why batches of the model left the queue, so far."""
    kinds = ("worker_free", "full", "delay", "deadline", "shape")
    return Counter({k: int(served.metric("gateway_batches_total", model=model, reason=k)) for k in kinds})


def executions(served: GatewayProcess, model: str) -> float:
    return served.metric("nv_inference_exec_count", model=model)


# -- what is merged --------------------------------------------------------------------------------------------------


def test_a_model_that_mixes_rows_is_served_one_request_at_a_time(
    served: GatewayProcess, alone: dict[str, Alone]
) -> None:
    log = [line for line in served.output().splitlines() if "model mixes version 1: requests are not merged" in line]
    assert len(log) == 1
    assert "differs when run with other rows" in log[0]
    rng = np.random.default_rng(0)
    requests = [
        Request(
            "mixes", [Tensor("x", "FP32", rng.standard_normal((1 + n % 5, 4)).astype(np.float32))], request_id=str(n)
        )
        for n in range(64)
    ]
    before = executions(served, "mixes")
    for request, answer in zip(requests, together(served, requests), strict=True):
        check(request, answer, alone["mixes"], 1e-6)
    assert executions(served, "mixes") - before == 64


def test_without_a_delay_a_lone_request_waits_for_nobody(served: GatewayProcess, alone: dict[str, Alone]) -> None:
    request = whole("chosen", 1)
    (answer,) = together(served, [request])
    check(request, answer, alone["chosen"])
    assert [(m.size, m.row) for m in members(answer)] == [(1, 0)]
    assert served.metric("gateway_batches_total", model="chosen", reason="worker_free") >= 1


def test_requests_of_other_shapes_never_share_a_batch(served: GatewayProcess, alone: dict[str, Alone]) -> None:
    """Two shapes, interleaved, within one queue delay: two batches, whoever came in between."""
    requests = [
        Request("shapes", [Tensor("x", "INT64", np.full((1, 2 + n % 2), n))], request_id=str(n)) for n in range(8)
    ]
    before = executions(served, "shapes")
    answers = in_one_piece(served, requests)
    batches: dict[str, set[int]] = {}
    for request, answer in zip(requests, answers, strict=True):
        check(request, answer, alone["shapes"])
        batches.setdefault(members(answer)[0].batch_id, set()).add(request.inputs[0].array.shape[1])
    assert all(len(widths) == 1 for widths in batches.values()), batches
    assert executions(served, "shapes") - before == len(batches) == 2


# -- sizes -----------------------------------------------------------------------------------------------------------


def test_more_rows_than_config_pbtxt_allows_are_refused_as_triton_does(
    served: GatewayProcess, alone: dict[str, Alone]
) -> None:
    requests = [whole("stated", 9), whole("stated", 8)]
    refused, taken = together(served, requests)
    assert refused.status == 400
    assert "inference request batch-size must be <= 8 for 'stated'" in refused.error
    check(requests[1], taken, alone["stated"])


def test_more_rows_than_the_gateway_chose_are_split_and_joined(served: GatewayProcess, alone: dict[str, Alone]) -> None:
    """The bystanders' rows fill up the last piece's batch, and nobody notices."""
    requests = [whole("chosen", 200)] + [whole("chosen", 1, 1000 + n) for n in range(8)]
    answers = together(served, requests)
    for request, answer in zip(requests, answers, strict=True):
        check(request, answer, alone["chosen"])
    pieces = members(answers[0])
    assert len(pieces) == 4
    assert len({piece.batch_id for piece in pieces}) == 4
    assert [piece.size for piece in pieces[:3]] == [64, 64, 64]
    assert 8 <= pieces[3].size <= 16


def test_batches_never_exceed_the_size_that_was_stated(served: GatewayProcess, alone: dict[str, Alone]) -> None:
    requests = [whole("stated", 1 + n % 8, n) for n in range(64)]
    before = executions(served, "stated")
    answers = together(served, requests)
    for request, answer in zip(requests, answers, strict=True):
        check(request, answer, alone["stated"])
        ((member,),) = [members(answer)]
        assert member.row + request.inputs[0].array.shape[0] <= member.size <= 8
    ran = executions(served, "stated") - before
    assert len({members(answer)[0].batch_id for answer in answers}) == ran < 64


# -- failure ---------------------------------------------------------------------------------------------------------


def test_an_index_out_of_range_fails_its_own_caller_only(served: GatewayProcess, alone: dict[str, Alone]) -> None:
    """The model refuses the whole batch; the batch is halved until the offender stands alone."""
    offenders = {7, 8, 40}
    indexes = [99 if n in offenders else n % 8 for n in range(64)]
    requests = [
        Request("lookup", [Tensor("index", "INT64", np.array([index]))], request_id=str(n))
        for n, index in enumerate(indexes)
    ]
    for _ in range(5):
        for number, answer in enumerate(together(served, requests)):
            if number in offenders:
                assert answer.status == 500
                assert "model 'lookup' failed" in answer.error
                assert "idx=99" in answer.error
            else:
                check(requests[number], answer, alone["lookup"])
    assert served.metric("gateway_requests_total", model="lookup", code="500") == 15
    assert served.metric("gateway_requests_total", model="lookup", code="200") == 5 * 61
    assert served.metric("gateway_backend_attempts_total", model="lookup", outcome="suspect") >= 15


# -- delays, with wide margins ---------------------------------------------------------------------------------------


def test_one_request_waits_out_the_queue_delay(served: GatewayProcess, alone: dict[str, Alone]) -> None:
    request = whole("delayed", 1)
    before = reasons(served, "delayed")
    (answer,) = together(served, [request])
    check(request, answer, alone["delayed"])
    assert parse(answer.headers).timings_ms["queue"] >= DELAY_S * 1e3
    assert reasons(served, "delayed") - before == {"delay": 1}


def test_full_batches_do_not_wait(served: GatewayProcess, alone: dict[str, Alone]) -> None:
    requests = [whole("delayed", 4, n) for n in range(8)]
    before = reasons(served, "delayed")
    for request, answer in zip(requests, in_one_piece(served, requests), strict=True):
        check(request, answer, alone["delayed"])
        assert members(answer)[0].size == 8
    assert reasons(served, "delayed") - before == {"full": 4}


def test_rows_of_a_caller_who_left_are_never_executed(served: GatewayProcess, alone: dict[str, Alone]) -> None:
    """Two callers wait in the queue, one vanishes: the batch that later goes is not its."""
    stays, fills = whole("lingering", 2, 50), whole("lingering", 6, 70)

    async def waiting(rows: int) -> None:
        await asyncio.to_thread(
            until, lambda: served.metric("gateway_queue_rows", model="lingering") == rows, 15, "it is not noticed"
        )

    async def story() -> tuple[Answer, Answer]:
        async with connect(served.port) as left, connect(served.port) as first, connect(served.port) as second:
            await left.send(whole("lingering", 3).encode())
            await waiting(3)
            await first.send(stays.encode())
            await waiting(5)
            left.abort()
            await waiting(2)
            answer = await second.ask(fills)
            return await first.receive(), answer

    answers = asyncio.run(story())
    for request, answer, row in zip((stays, fills), answers, (0, 2), strict=True):
        check(request, answer, alone["lingering"])
        assert [(member.size, member.row) for member in members(answer)] == [(8, row)]
    assert served.metric("nv_inference_count", model="lingering") == 8
    assert executions(served, "lingering") == 1
    assert served.metric("nv_inference_request_failure", model="lingering", reason="CANCELED") == 1


@pytest.mark.parametrize(
    ("sizes", "left_for"),
    [
        pytest.param([1], {"delay": 1}, id="one waits"),
        pytest.param([4], {"full": 1}, id="four go at once"),
        pytest.param([4, 1], {"full": 1, "delay": 1}, id="of five, four go at once and one waits"),
    ],
)
def test_preferred_sizes_go_at_once_and_the_rest_waits(
    served: GatewayProcess, alone: dict[str, Alone], sizes: list[int], left_for: dict[str, int]
) -> None:
    """preferred_batch_size 4, with a queue delay: Triton's rule (wire notes, trap 64)."""
    requests = [whole("patient", 1, 10 * n) for n in range(sum(sizes))]
    before, ran = reasons(served, "patient"), executions(served, "patient")
    answers = in_one_piece(served, requests)
    for request, answer in zip(requests, answers, strict=True):
        check(request, answer, alone["patient"])
    assert [members(answer)[0].size for answer in answers] == [size for size in sizes for _ in range(size)]
    assert reasons(served, "patient") - before == left_for
    assert executions(served, "patient") - ran == len(sizes)
    if "delay" in left_for:
        assert parse(answers[-1].headers).timings_ms["queue"] >= DELAY_S * 1e3
