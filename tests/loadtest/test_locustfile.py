"""The locustfile loads and lists its user; locust runs in a process of its own because it patches the interpreter."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="the extra `loadtest` is missing")


def test_locust_lists_the_user_and_its_tasks() -> None:
    command = [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "--show-task-ratio"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("Client", "one_row_json", "one_row_binary", "several_rows"):
        assert name in done.stdout + done.stderr
