"""gRPC clients beside the HTTP ones: grpcio's own, a closed loop of few, every answer checked.

They keep a history of their own, with nonces of their own, which `checker.check` takes like the other.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import Final

import grpc
import numpy as np

from gateway.protocol.schema import message
from tests.faults.history import BROKEN_OFF, MALFORMED, RIGHT, WRONG, History
from tests.faults.nonce import INPUT, MODEL, OUTPUT, answers

METHOD: Final = "/inference.GRPCInferenceService/ModelInfer"
_FIRST: Final = 1 << 54
STATUS: Final = {3: 400, 4: 504, 5: 404, 8: 429, 13: 500, 14: 503}
"""HTTP status that stands for a gRPC code in the history."""


class GrpcLoad:
    """`callers` calls at a time on two channels."""

    def __init__(self, port: int, callers: int = 8, rows: tuple[int, ...] = (1, 4, 16), seed: int = 1) -> None:
        self.history = History()
        self._rng = random.Random(seed)
        self._rows = rows
        self._next = _FIRST + (seed << 32)
        self._channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}") for _ in range(2)]
        self._callers = callers
        self._running = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._running = True
        for number in range(self._callers):
            call = self._channels[number % len(self._channels)].unary_unary(METHOD)
            self._tasks.append(asyncio.create_task(self._ask(call)))

    async def stop(self) -> None:
        """Returns when all calls have ended."""
        self._running = False
        await asyncio.gather(*self._tasks)
        for channel in self._channels:
            await channel.close()

    async def _ask(self, call: grpc.aio.UnaryUnaryMultiCallable) -> None:
        while self._running:
            rows = self._rng.choice(self._rows)
            first, self._next = self._next, self._next + rows
            index = self.history.new(time.monotonic(), first, rows)
            nonces = np.arange(first, first + rows, dtype=np.int64)
            request = message("inference.ModelInferRequest")(model_name=MODEL)
            request.inputs.add(name=INPUT, datatype="INT64", shape=[rows, 1])
            request.raw_input_contents.append(nonces.tobytes())
            try:
                answer = await call(request.SerializeToString(), timeout=35.0)
            except grpc.aio.AioRpcError as error:
                outcome = STATUS.get(error.code().value[0], BROKEN_OFF if error.code().value[0] == 2 else MALFORMED)
                self.history.said(f"{error.code().name} {error.details()}")
            else:
                outcome = self._outcome(answer, nonces)
            self.history.end(index, time.monotonic(), outcome)

    def _outcome(self, data: bytes, nonces: np.ndarray[tuple[int], np.dtype[np.int64]]) -> int:
        answer = message("inference.ModelInferResponse").FromString(data)
        if len(answer.outputs) != 1 or len(answer.raw_output_contents) != 1:
            return MALFORMED
        (output,) = answer.outputs
        form = (output.name, output.datatype, list(output.shape)) == (OUTPUT, "INT64", [len(nonces), 1])
        got = np.frombuffer(answer.raw_output_contents[0], np.int64)
        return RIGHT if form and np.array_equal(got, answers(nonces)) else WRONG
