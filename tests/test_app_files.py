"""Descriptors: all that may be had, and never more connections than there are descriptors for."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.app_files import RESERVE, connections_for


@pytest.mark.parametrize(
    ("limit", "wanted", "granted"),
    [(-1, 4096, 4096), (1 << 20, 4096, 4096), (2 * 4096 + 256, 4096, 4096), (1024, 4096, 384), (128, 4096, 32)],
)
def test_connections_for(limit: int, wanted: int, granted: int) -> None:
    assert connections_for(limit, wanted) == granted


@given(st.integers(8, 1 << 20), st.integers(1, 1 << 20))
def test_two_full_ports_leave_a_reserve(limit: int, wanted: int) -> None:
    granted = connections_for(limit, wanted)
    assert 1 <= granted <= wanted
    assert limit - 2 * granted >= min(RESERVE, limit // 2)


def test_the_soft_limit_becomes_the_hard_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, {min(hard, 4096) if hard > 0 else 4096}))\n"
        "from gateway.app_files import raise_file_limit; print(raise_file_limit())\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(min(hard, 4096) if hard > 0 else 4096)] * 2
    assert soft <= hard or hard < 0
