"""The process that ships the log to PostgreSQL: `python -m gateway.inference_log.sink_process DIR --dsn env:NAME`.

Started by the gateway beside itself, so that neither a slow database nor the work of shipping ever reaches serving; its
stdin is a pipe that ends when the gateway does, however that ends. It then ships what it still can, within END_S, and
ends too. The next one goes on from there. Exit codes: 0 all was shipped · 1 some is left · 2 it cannot work like this.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from gateway.errors import ConfigError
from gateway.inference_log.postgres import Postgres, PostgresSettings, read_dsn
from gateway.inference_log.private_files import take_lock
from gateway.inference_log.segments import prepare
from gateway.inference_log.sink_feed import Feed
from gateway.inference_log.sink_state import NAME, Job, SinkState, state_file
from gateway.inference_log.sinks import Shipper
from gateway.observe import log as log_setup

log = logging.getLogger("gateway.inference_log")

END_S: Final = 5.0
"""Time to ship what is left when the gateway has ended."""
LOCK_S: Final = 1.0
"""Between two looks whether another process that ships has ended."""
EXIT_LEFT: Final = 1
EXIT_CONFIG: Final = 2


async def ship(job: Job, *, once: bool, started: Callable[[Shipper], None] = lambda _: None) -> tuple[bool, SinkState]:
    """Ship until stopped, or, with `once`, until all is shipped that is there; whether all was, and the final state.

    `started` is called before anything is shipped.

    Raises:
        ConfigError: there is no log, no data source name, or, with `once`, another process that ships it.
    """
    read_dsn(job.dsn)
    layout = prepare(job.directory)
    lock = await _lock(state_file(layout.directory, NAME).with_suffix(".lock"), wait=not once)
    try:
        feed = Feed(job.directory, job.spill, job.batch_rows)
        settings = PostgresSettings(lambda: read_dsn(job.dsn), job.schema, job.showcase_tables, job.timeout_s)
        shipper = Shipper(feed, Postgres(settings), NAME, once=once)
        started(shipper)
        return await shipper.run(), shipper.state
    finally:
        os.close(lock)


async def _lock(path: Path, *, wait: bool) -> int:
    told = False
    while (lock := take_lock(path)) is None:
        if not wait:
            raise ConfigError("another process ships this log already; it shows in gateway log stats how far it is")
        if not told:
            log.info("sink %s: waits for the process that ships this log now", NAME)
            told = True
        await asyncio.sleep(LOCK_S)
    return lock


async def _serve(job: Job) -> int:
    """Until stdin ends or a signal comes, and then END_S more."""
    loop = asyncio.get_running_loop()
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    with contextlib.suppress(PermissionError):  # a file or /dev/null is always readable: nobody's end to wait for
        loop.add_reader(sys.stdin.fileno(), _read_end, loop, ending)
    shippers: list[Shipper] = []
    work = asyncio.ensure_future(ship(job, once=False, started=shippers.append))
    end = asyncio.ensure_future(ending.wait())
    await asyncio.wait({work, end}, return_when=asyncio.FIRST_COMPLETED)
    for shipper in shippers:
        shipper.stop()
    if shippers:
        await asyncio.wait({work}, timeout=END_S)
    end.cancel()
    if not work.done():
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work
        return EXIT_LEFT
    return 0 if work.result()[0] else EXIT_LEFT


def _read_end(loop: asyncio.AbstractEventLoop, ending: asyncio.Event) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        loop.remove_reader(sys.stdin.fileno())
        ending.set()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gateway.inference_log.sink_process", description="Ship the log to PostgreSQL."
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--spill", type=Path)
    parser.add_argument("--dsn", required=True, metavar="env:NAME|file:PATH")
    parser.add_argument("--schema", default="public")
    parser.add_argument("--showcase-tables", action="store_true")
    parser.add_argument("--batch-rows", type=int, default=5000)
    parser.add_argument("--timeout-s", type=float, default=60.0)
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--log-format", default="console")
    found = vars(parser.parse_args(arguments))
    log_setup.set_up(found.pop("log_level"), found.pop("log_format"))
    try:
        return asyncio.run(_serve(Job(**found)))
    except ConfigError as error:
        log.error("sink %s: %s", NAME, error)
        return EXIT_CONFIG


if __name__ == "__main__":
    sys.exit(main())
