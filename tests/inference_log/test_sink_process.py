"""The shipping process beside a log that is written and sealed, while it and the database are killed at any moment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.inference_log import segments
from gateway.inference_log.sealing import seal
from gateway.inference_log.segments import Layout
from gateway.inference_log.sink_process import EXIT_CONFIG
from gateway.inference_log.sink_state import Job, SinkState, command, read_state, shipped_up_to
from gateway.inference_log.writer import LogWriter, WriterSettings
from tests.inference_log.log_rows import encoded, new_epoch
from tests.live.gateway_process import until
from tests.live.postgres_server import PostgresServer, postgres

WAIT_S = 90.0


class Traffic:
    """Writes rows as a gateway does, and seals what is closed; a thread of its own."""

    def __init__(self, directory: Path, pause_s: float = 0.002) -> None:
        settings = WriterSettings(segment_bytes=60_000, seal_s=0.5, sync_ms=5)
        self.directory = directory
        self.epoch = new_epoch(time.time())
        self.written = 0
        self._pause_s = pause_s
        self._writer = LogWriter(directory, self.epoch, settings)
        self._writer.start()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        layout = Layout(self.directory)
        while not self._ending.wait(self._pause_s):
            count = random.randint(1, 32)
            if self._writer.offer(encoded(range(self.written, self.written + count)), count):
                self.written += count
            closed = [one for one in layout.segments(self.epoch) if segments.is_final(layout, one)]
            for segment in closed[:-1]:
                seal(layout, segment, time.time_ns() // 1000)

    def end(self) -> None:
        self._ending.set()
        self._thread.join(30)
        self._writer.close()


class Sink:
    """The process, as the gateway starts it."""

    def __init__(self, job: Job, dsn: str) -> None:
        self._command = command(job, "warning", "console")
        self._environment = os.environ | {"LOG_DSN": dsn}
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdin=subprocess.PIPE, env=self._environment)

    def kill(self) -> None:
        self.process.kill()
        self.end()

    def end(self) -> int:
        """As when the gateway ends: its stdin ends."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(60)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return segments.prepare(tmp_path / "log").directory


@pytest.fixture
def own_server() -> Iterator[PostgresServer]:
    """One that may be stopped and frozen."""
    with postgres() as started:
        yield started


def counted(server: PostgresServer, dsn: str) -> tuple[int, int]:
    ((rows, different),) = server.rows(dsn, "SELECT count(*), count(DISTINCT position) FROM gateway_requests")
    return rows, different


def state(directory: Path) -> SinkState:
    return read_state(directory, "postgres") or SinkState(name="postgres")


@pytest.mark.slow
def test_killed_at_any_moment_nothing_is_lost_or_doubled(directory: Path, own_server: PostgresServer) -> None:
    dsn = own_server.database()
    traffic = Traffic(directory)
    sink = Sink(Job(directory, None, "env:LOG_DSN", batch_rows=200, showcase_tables=True), dsn)
    try:
        for turn in range(9):
            time.sleep(random.uniform(0.05, 0.9))  # the moment is what varies, nothing waits for it
            sink.kill()
            if turn % 4 == 2:
                own_server.stop()
                own_server.start()
            sink.start()
        traffic.end()
        until(
            lambda: state(directory).epochs.get(traffic.epoch) == traffic.written, WAIT_S, "not everything was shipped"
        )
    finally:
        traffic.end()
        code = sink.end()
    assert code == 0
    assert traffic.written > 500
    assert counted(own_server, dsn) == (traffic.written, traffic.written)
    assert own_server.rows(dsn, "SELECT count(*) FROM inference_metadata") == [(traffic.written,)]
    wrong = (
        "SELECT count(*) FROM inference_requests q JOIN inference_responses r USING (id) WHERE "
        "(q.inputs->0->'data'->>0)::float8 ^ 2 <> (r.outputs->0->'data'->>0)::float8"
    )
    assert own_server.rows(dsn, wrong) == [(0,)], "an answer stands beside another request"


@pytest.mark.slow
def test_a_database_that_is_away_slow_or_frozen_is_waited_for(directory: Path, own_server: PostgresServer) -> None:
    dsn = own_server.database()
    own_server.stop()
    traffic = Traffic(directory, pause_s=0.02)
    sink = Sink(Job(directory, None, "env:LOG_DSN", batch_rows=500, timeout_s=2.0), dsn)
    try:
        until(lambda: "cannot be reached" in (state(directory).failing or ""), WAIT_S, "nobody said that it is away")
        until(lambda: state(directory).lag_rows > 0, WAIT_S, "no lag was seen")
        own_server.start()
        until(
            lambda: state(directory).shipped_rows > 0 and state(directory).failing is None, WAIT_S, "it did not go on"
        )
        own_server.freeze()
        until(lambda: "did not answer" in (state(directory).failing or ""), WAIT_S, "a frozen server was not noticed")
        assert state(directory).oldest_unshipped_us is not None
        own_server.freeze(frozen=False)
        until(lambda: state(directory).failing is None, WAIT_S, "it did not go on after the frost")
        own_server.execute(
            dsn,
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql"
            " AS 'BEGIN PERFORM pg_sleep(0.01); RETURN NEW; END';"
            "CREATE TRIGGER slow BEFORE INSERT ON gateway_requests FOR EACH ROW EXECUTE FUNCTION slow()",
        )
        before = state(directory).shipped_rows
        until(lambda: state(directory).shipped_rows > before + 300, WAIT_S, "a slow disk stopped it")
        own_server.execute(dsn, "DROP TRIGGER slow ON gateway_requests")
        traffic.end()
        until(lambda: shipped_up_to(directory, "postgres").get(traffic.epoch) == traffic.written, WAIT_S, "it is stuck")
        until(lambda: state(directory).lag_rows == 0, WAIT_S, "the lag did not end")
    finally:
        traffic.end()
        code = sink.end()
    assert code == 0
    assert counted(own_server, dsn) == (traffic.written, traffic.written)


@pytest.mark.slow
def test_two_processes_ship_one_after_the_other(directory: Path, dsn: str, server: PostgresServer) -> None:
    traffic = Traffic(directory, pause_s=0.02)
    job = Job(directory, None, "env:LOG_DSN")
    first = Sink(job, dsn)
    until(lambda: state(directory).shipped_rows > 0, WAIT_S, "the first shipped nothing")
    second = Sink(job, dsn)
    try:
        first.process.send_signal(signal.SIGTERM)
        assert first.process.wait(60) == 0
        shipped = state(directory).shipped_rows
        until(lambda: state(directory).shipped_rows > shipped, WAIT_S, "the second did not take over")
    finally:
        traffic.end()
        first.end()
        assert second.end() == 0
    assert counted(server, dsn) == (traffic.written, traffic.written)


def test_what_cannot_work_ends_with_the_reason(directory: Path) -> None:
    done = subprocess.run(
        command(Job(directory, None, "env:NOT_SET_ANYWHERE"), "info", "console"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == EXIT_CONFIG
    assert "the variable NOT_SET_ANYWHERE holds no data source name" in done.stderr
