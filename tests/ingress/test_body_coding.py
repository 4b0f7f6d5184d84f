"""Compressed bodies: what a refused one leaves behind. (Coding itself: tests/protocol/test_content_coding.py.)"""

from __future__ import annotations

import asyncio
import gc
import gzip
import tracemalloc
from typing import Any, cast

import pytest

from gateway.errors import InvalidRequest, TooLarge
from gateway.ingress.body_coding import BodyCoding
from gateway.protocol.content_coding import GZIP

LIMIT = 8 * 2**20


class Caller:
    """The exchange of a request, as far as its body's coding needs it."""

    def __init__(self) -> None:
        self.on_abort: Any = None

    def hold(self, count: int) -> None:
        raise AssertionError("a refused body is not held")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (gzip.compress(bytes(2 * LIMIT), 1), TooLarge),
        (gzip.compress(bytes(LIMIT - 1), 1)[:-9], InvalidRequest),
        (gzip.compress(bytes(LIMIT - 1), 1) + b"more", InvalidRequest),
    ],
    ids=["too large", "cut short", "more behind it"],
)
async def test_a_refused_body_is_gone_at_once(body: bytes, why: type[Exception]) -> None:
    """Not only when the garbage collector comes round: a client could fill the memory in between."""
    coding = BodyCoding(LIMIT)
    loop = asyncio.get_running_loop()

    async def refused() -> type[Exception]:
        answer: asyncio.Future[type[Exception]] = loop.create_future()
        coding.inflate(cast("Any", Caller()), GZIP, body, lambda plain: None, lambda e: answer.set_result(type(e)))
        return await answer

    assert await refused() is why
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(3):
            assert await refused() is why
        async with asyncio.timeout(30):  # the thread that made the last one may still be on its way out
            while tracemalloc.get_traced_memory()[0] > LIMIT // 8:
                await asyncio.sleep(0.001)
    finally:
        tracemalloc.stop()
        gc.enable()
