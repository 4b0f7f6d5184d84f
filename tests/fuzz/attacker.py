"""An attacker on the gRPC port, an honest caller beside it, and what they have in common."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable

import grpc
import numpy as np
from hpack import Decoder

from gateway.protocol.hpack_blocks import Fields
from gateway.protocol.http2_frames import END_STREAM, FRAME_HEAD_BYTES, GOAWAY, HEADERS, PREFACE, ErrorCode, settings
from tests.live.gateway_process import GatewayProcess, until
from tests.live.test_hostile import rss_bytes
from tests.protocol.grpc_samples import RESPONSE, infer_request
from tests.protocol.http2_peer import REQUEST, Sent, data, headers, parse

METHOD = b"/inference.GRPCInferenceService/ModelInfer"
CALL: Fields = [(name, METHOD if name == b":path" else value) for name, value in REQUEST]
PATIENCE_S = 90


def message(*row: float, model: str = "whole") -> bytes:
    array = np.array([row], "<f4")
    written: bytes = infer_request(("x", "FP32", list(array.shape), array.tobytes()), model=model).SerializeToString(
        deterministic=True
    )
    return written


def prefixed(content: bytes, flag: int = 0) -> bytes:
    return bytes([flag]) + len(content).to_bytes(4, "big") + content


class GoodCaller:
    """Keeps asking over gRPC, each time on the same channel; every answer must be right."""

    def __init__(self, served: GatewayProcess) -> None:
        self.answers = 0
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(served.grpc_port,))

    def __enter__(self) -> GoodCaller:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        before = self.answers
        until(lambda: self.answers > before + 3 or not self._thread.is_alive(), 60, "no answers")
        self._stop.set()
        self._thread.join(60)
        if self._error is not None:
            raise self._error

    def _run(self, port: int) -> None:
        row = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
        request = message(*row)
        expected = None
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                ask = channel.unary_unary(METHOD.decode())
                while not self._stop.is_set():
                    answer = RESPONSE.FromString(ask(request, timeout=30))
                    found = answer.raw_output_contents[0]
                    expected = expected or found
                    assert found == expected
                    assert any(found)
                    self.answers += 1
        except BaseException as error:  # handed to the test's thread
            self._error = error


class Attacker:
    """A connection to the gRPC port: writes what it likes, and may read what comes back."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.seen: list[Sent] = []

    async def send(self, *parts: bytes) -> bool:
        """False: the gateway has hung up."""
        try:
            self.writer.write(b"".join(parts))
            await self.writer.drain()
        except ConnectionError:
            return False
        return not self.writer.is_closing()

    async def frame(self) -> Sent:
        head = await self.reader.readexactly(FRAME_HEAD_BYTES)
        payload = await self.reader.readexactly(int.from_bytes(head[:3], "big"))
        (found,) = parse(head + payload)
        self.seen.append(found)
        return found

    async def rest(self) -> list[Sent]:
        """All frames until the gateway closes."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await self.frame()
        return self.seen

    async def until(self, kind: int, stream_id: int | None = None) -> Sent:
        while True:
            found = await self.frame()
            if found.kind == kind and stream_id in (None, found.stream):
                return found

    def goodbye(self) -> str:
        """Why the gateway ended the connection; "" if it did not say (or we lost it to a reset)."""
        for each in self.seen:
            if each.kind == GOAWAY:
                return ErrorCode(int.from_bytes(each.payload[4:8], "big")).name
        return ""


def attack(served: GatewayProcess, story: Callable[[Attacker], Awaitable[None]], *, count: int = 1) -> list[Attacker]:
    """`count` attackers at the same time, each with a connection of its own, greeted."""

    async def one() -> Attacker:
        attacker = Attacker(*await asyncio.open_connection("127.0.0.1", served.grpc_port))
        try:
            await attacker.send(PREFACE, settings({}))
            await story(attacker)
        finally:
            attacker.writer.transport.abort()
        return attacker

    async def all_of_them() -> list[Attacker]:
        async with asyncio.timeout(PATIENCE_S):
            return list(await asyncio.gather(*(one() for _ in range(count))))

    return asyncio.run(all_of_them())


def status_of(found: Sent) -> tuple[int, str]:
    fields = {str(name): str(value) for name, value in Decoder().decode(found.payload)}
    return int(fields.get("grpc-status", -1)), fields.get("grpc-message", "")


def answer_to(served: GatewayProcess, *parts: bytes) -> tuple[int, str]:
    """Status of call 1."""

    async def story(attacker: Attacker) -> None:
        await attacker.send(*parts)
        while True:
            found = await attacker.frame()
            if found.kind == HEADERS and found.stream == 1 and found.flags & END_STREAM:
                return

    (attacker,) = attack(served, story)
    return status_of(attacker.seen[-1])


def whole(content: bytes, fields: Fields = CALL) -> tuple[bytes, ...]:
    pieces = [content[at : at + 16_000] for at in range(0, len(content), 16_000)]
    last = len(pieces) - 1
    return (
        headers(1, fields, end=False),
        *(data(1, piece, end=place == last) for place, piece in enumerate(pieces)),
    )


class Peak:
    """The largest resident size of a process meanwhile."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.before = self.bytes = rss_bytes(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.bytes = max(self.bytes, rss_bytes(self._pid))
