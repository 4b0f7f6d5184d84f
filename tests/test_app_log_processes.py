"""Companion processes: kept running, and gone when the gateway is."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway import app_log_processes
from gateway.app_log_processes import Companions

WAITS = "import os, sys; open(sys.argv[1], 'a').write('%d\\n' % os.getpid()); sys.stdin.read()"
ENDS = "import sys; open(sys.argv[1], 'a').write('0\\n'); sys.exit(7)"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # another process makes it true
            await asyncio.sleep(0.01)


def starts(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().splitlines()] if file.exists() else []


async def test_it_runs_and_ends_with_us(tmp_path: Path) -> None:
    file = tmp_path / "starts"
    companions = Companions({"sealer": [sys.executable, "-c", WAITS, str(file)]})
    companions.start()
    await until(lambda: len(starts(file)) == 1)
    assert companions.failing() == {}
    await companions.close()
    with pytest.raises(ProcessLookupError):
        os.kill(starts(file)[0], 0)


async def test_one_that_ends_is_told_and_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_log_processes, "PAUSES_S", (0.01, 0.02))
    file = tmp_path / "starts"
    companions = Companions({"sealer": [sys.executable, "-c", ENDS, str(file)], "lost": ["/nowhere/to/be/found"]})
    companions.start()
    await until(lambda: len(starts(file)) >= 3 and len(companions.failing()) == 2)
    failing = companions.failing()
    assert failing["lost"] == "could not be started: No such file or directory"
    assert failing["sealer"] == "ended with exit code 7"
    await companions.close()
    count = len(starts(file))
    await asyncio.sleep(0)
    assert len(starts(file)) == count
