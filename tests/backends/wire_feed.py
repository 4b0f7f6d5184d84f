"""Connections without a network: what a peer sends is fed in by hand, and what is sent can be looked at."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

from gateway.backends.remote_connections import Connection, Exchange


class FakeTransport:
    def __init__(self) -> None:
        self.sent = bytearray()
        self.aborted = False

    def write(self, data: bytes) -> None:
        self.sent += data

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted

    def get_write_buffer_size(self) -> int:
        return 0


class FakeChannel:
    """What a connection needs of its channel."""

    name = "peer"
    closed = False

    def __init__(self, max_bytes: int = 1 << 20) -> None:
        self.max_bytes = max_bytes
        self.released: list[Connection] = []
        self.disturbances = 0
        self.watcher = self

    def release(self, connection: Connection) -> None:
        self.released.append(connection)

    def lost(self, connection: Connection) -> None:
        pass

    def disturbed(self) -> None:
        self.disturbances += 1


@contextlib.contextmanager
def open_connection(kind: Any, max_bytes: int = 1 << 20) -> Iterator[tuple[Any, FakeChannel]]:
    channel = FakeChannel(max_bytes)
    with socket.socket() as sock:
        connection = kind(channel, sock)
        connection.connection_made(FakeTransport())
        yield connection, channel


def exchange(connection: Any, request: Any, pieces: Sequence[bytes], *, lost: bool = False) -> list[Any]:
    """What one exchange was settled with when the peer sent `pieces`, then perhaps was lost."""
    found: list[Any] = []
    connection.send(Exchange(request, found.append, connection.channel.max_bytes))
    for piece in pieces:
        if not connection.dropped:
            connection.data_received(piece)
    if lost and not connection.dropped:
        connection.connection_lost(None)
    return found


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges) if b > a]


PLACES = st.lists(st.integers(0, 1 << 20), max_size=12)
