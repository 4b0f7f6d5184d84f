"""Processes that work on the inference log beside the serving one: sealing to Parquet, shipping to sinks.

Apart, so that their work never holds up the event loop, and so that none of their faults reaches serving. Each is
started anew when it ends, after a pause that doubles. Its stdin is a pipe that stays open while we live: when it ends,
also because we were killed, the companion finishes the step at hand and ends too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Final

log = logging.getLogger("gateway.inference_log")

PAUSES_S: Final = (1.0, 60.0)
LONG_ENOUGH_S: Final = 60.0
"""A companion that ran this long is started again at once."""
END_S: Final = 10.0
"""Time to finish the step at hand."""


class Companions:
    """Keeps a set of commands running."""

    def __init__(self, commands: Mapping[str, Sequence[str]]) -> None:
        """`commands`: arguments by the name that people know each by."""
        self._commands = commands
        self._tasks: list[asyncio.Task[None]] = []
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._failing: dict[str, str] = {}
        self._closing = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Companions {list(self._processes)} failing={list(self._failing)}>"

    def start(self) -> None:
        for name, command in self._commands.items():
            self._tasks.append(asyncio.ensure_future(self._keep(name, command)))

    def failing(self) -> dict[str, str]:
        """Those that do not run at present, with what is known of the reason."""
        return dict(self._failing)

    async def close(self) -> None:
        """Let each finish the step at hand and end; who does not in time is killed."""
        self._closing.set()
        await asyncio.gather(*[_end(process) for process in list(self._processes.values())])
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _keep(self, name: str, command: Sequence[str]) -> None:
        pause_s = PAUSES_S[0]
        while not self._closing.is_set():
            started = time.monotonic()
            try:
                process = await asyncio.create_subprocess_exec(
                    *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL
                )
            except OSError as error:
                how = f"could not be started: {error.strerror}"
            else:
                self._processes[name] = process
                self._failing.pop(name, None)
                code = await process.wait()
                del self._processes[name]
                how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            if self._closing.is_set():
                return
            if time.monotonic() - started >= LONG_ENOUGH_S:
                pause_s = PAUSES_S[0]
            self._failing[name] = how
            log.error("the inference log's %s process %s; it is started again in %g s", name, how, pause_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._closing.wait()
            pause_s = min(pause_s * 2, PAUSES_S[1])


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.stdin is not None:
        process.stdin.close()
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(END_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
