"""Many gRPC callers at once, unary and streaming, against a whole gateway: each gets its own rows, and whoever leaves
leaves nothing behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from gateway.config import Config, ModelEntry, Server
from gateway.protocol import schema
from tests.live import models
from tests.live.gateway_process import until
from tests.live.in_process import InProcess, in_process
from tests.live.test_grpc_clients import method
from tests.protocol.grpc_samples import infer_request

KINDS = {"FP32": "<f4", "INT64": "<i8", "UINT8": "u1", "BF16": "<u2"}
MODELS = {f"id_{datatype.lower()}": models.identity(datatype) for datatype in KINDS} | {"slow": models.slow()}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    root = models.repository(tmp_path_factory.mktemp("many"), MODELS)
    server = Server(http_port=0, grpc_port=0, metrics_port=0, workers=2)
    with in_process(Config(server=server, models=(ModelEntry(source=str(root)),))) as running:
        yield running


def channel_to(gateway: InProcess) -> Any:
    options = [("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.insecure_channel(f"127.0.0.1:{gateway.grpc_port}", options=options)


async def test_many_callers_get_their_own_rows(gateway: InProcess) -> None:
    """Identity models, so every answer is its request, whoever shared its batch; unary calls and streams together."""
    rng = np.random.default_rng(11)

    def request(n: int) -> Any:
        datatype = list(KINDS)[n % len(KINDS)]
        shape = [int(rng.integers(1, 9)), int(rng.integers(1, 4))]
        data = rng.integers(0, 100, shape).astype(KINDS[datatype]).tobytes()
        return infer_request(("x", datatype, shape, data), model=f"id_{datatype.lower()}", request_id=str(n))

    def check(asked: Any, answer: Any) -> None:
        assert answer.id == asked.id
        assert list(answer.outputs[0].shape) == list(asked.inputs[0].shape)
        assert list(answer.raw_output_contents) == list(asked.raw_input_contents)

    async with channel_to(gateway) as channel:
        asked = [request(n) for n in range(400)]

        async def stream(requests: list[Any]) -> None:
            call: Any = channel.stream_stream(
                "/inference.GRPCInferenceService/ModelStreamInfer",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=schema.message("inference.ModelStreamInferResponse").FromString,
            )(iter(requests))
            answers = [message.infer_response async for message in call]
            for one, answer in zip(requests, answers, strict=True):
                check(one, answer)

        async def unary(one: Any) -> None:
            check(one, await method(channel)(one))

        streams = [stream([request(n) for n in range(50)]) for _ in range(4)]
        await asyncio.gather(*streams, *[unary(one) for one in asked])


@pytest.mark.slow
async def test_callers_that_leave_at_any_moment_leave_nothing_behind(gateway: InProcess) -> None:
    chance = random.Random(5)
    async with channel_to(gateway) as channel:

        async def one(n: int) -> str:
            row = np.full((1, 768), n, "<f4")
            call = method(channel)(
                infer_request(("x", "FP32", [1, 768], row.tobytes()), model="slow"),
                timeout=chance.choice([None, 0.001, 0.01, 0.05]),
            )
            if chance.random() < 0.5:
                await asyncio.sleep(chance.random() / 50)
                call.cancel()
            try:
                answer = await call
            except grpc.aio.AioRpcError as error:
                return str(error.code().name)
            except asyncio.CancelledError:
                return "CANCELLED"
            assert list(answer.outputs[0].shape) == [1, 768]
            return "OK"

        outcomes = set(await asyncio.gather(*[one(n) for n in range(300)]))
    assert outcomes <= {"OK", "CANCELLED", "DEADLINE_EXCEEDED"}
    assert {"OK", "DEADLINE_EXCEEDED"} <= outcomes
    await asyncio.to_thread(until, lambda: not gateway.call(gateway.residue), 60, "something stays behind")
