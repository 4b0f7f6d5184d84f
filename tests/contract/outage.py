"""An address of a server that can be out of reach for a while, while the server itself goes on for others."""

from __future__ import annotations

import contextlib
import shutil
import socket
import socketserver
import threading
from collections.abc import Iterator


class Outage:
    """A loopback port that passes every connection on to `target`; with `down()` connections are refused there."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._port = 0
        self._server: socketserver.ThreadingTCPServer | None = None
        self.up()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def up(self) -> None:
        target = self._target

        class Relay(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.create_connection(("127.0.0.1", target)) as onward:
                    back = threading.Thread(target=_pump, args=(onward, self.request), daemon=True)
                    back.start()
                    _pump(self.request, onward)
                    back.join()

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True
            block_on_close = False

        self._server = Server(("127.0.0.1", self._port), Relay)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def down(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    @contextlib.contextmanager
    def out(self) -> Iterator[None]:
        """Out of reach inside the block."""
        self.down()
        try:
            yield
        finally:
            self.up()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Until `source` has no more to say; then `sink` hears so."""
    with contextlib.suppress(OSError), source.makefile("rb", 0) as reading, sink.makefile("wb", 0) as writing:
        shutil.copyfileobj(reading, writing)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
