"""An HTTP server that answers exactly what a test says, byte for byte, and keeps what it was asked."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

Script = Callable[[bytes, socket.socket], None]
"""Given the request's head and body so far, and the connection; may write anything, or wait."""


@dataclass
class Scripted:
    """`requests` are whole requests as they came."""

    port: int
    requests: list[bytes] = field(default_factory=list)
    hold: threading.Event = field(default_factory=threading.Event)
    """Set at the end; a script that hangs waits for it."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def heads(self, name: str) -> list[str]:
        """Values of a header in all requests, empty where it was not sent."""
        found = []
        for request in self.requests:
            lines = request.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
            fields = dict(line.split(": ", 1) for line in lines)
            found.append({key.lower(): value for key, value in fields.items()}.get(name, ""))
        return found


def answer(status: int, body: bytes = b"", **headers: str) -> bytes:
    fields = {"Content-Length": str(len(body)), **{key.replace("_", "-"): value for key, value in headers.items()}}
    lines = "".join(f"{key}: {value}\r\n" for key, value in fields.items())
    return f"HTTP/1.1 {status} X\r\n{lines}\r\n".encode() + body


@contextlib.contextmanager
def scripted(script: Script) -> Iterator[Scripted]:
    """A server on a free port of loopback."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = Scripted(listener.getsockname()[1])

    def one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            data = b""
            while b"\r\n\r\n" not in data:
                if not (more := connection.recv(65536)):
                    return
                data += more
            head, _, body = data.partition(b"\r\n\r\n")
            length = next(
                (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
            )
            while len(body) < length:
                body += connection.recv(65536)
            server.requests.append(head + b"\r\n\r\n" + body)
            script(head, connection)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threads.append(thread := threading.Thread(target=one, args=(connection,)))
            thread.start()

    threads = [threading.Thread(target=accept)]
    threads[0].start()
    try:
        yield server
    finally:
        server.hold.set()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in threads:  # it grows no more
            thread.join(30)
