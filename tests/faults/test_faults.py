"""A selection of the scenarios in their quick form, one of every sort: counts must hold on any machine, times are not
looked at. All of them: `python -m tests.faults --quick`."""

from __future__ import annotations

from typing import Final

import pytest

from tests.faults.every import SCENARIOS
from tests.faults.rig import Run, none_left

PLAYED: Final = (
    "01-kill-worker",
    "02-kill-remote",
    "02-kill-once-only",
    "03-freeze-remote",
    "05-drip-http",
    "06-close-reused-http",
    "07-reset-mid-grpc",
    "07-reset-after-http",
    "08-short-body-http",
    "09-garbage-grpc",
    "10-row-less-http",
    "11-datatype-grpc",
    "12-grpc-clients",
    "12-mixed-rows",
    "14-endless-http",
    "16-all-500",
    "19-retry-after",
    "22-all-down",
    "25-half-open-http",
    "25-limit",
    "26-black-hole",
    "27-refuse",
    "29-tls",
    "30-refused-grpc",
    "33-other-metadata",
    "35-poison-again",
    "35-poison-crash",
    "36-poison-error",
    "37-poison-loop",
    "41-log-unread",
    "42-clock",
    "43-blocked-loop",
    "46-kill-gateway",
    "46-stop",
    "49-leave-mid-batch",
    "50-all-leave",
    "51-never-read",
    "99-control",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAYED)
async def test_no_client_notices(name: str) -> None:
    run = Run(quick=True)
    try:
        result = await SCENARIOS[name].play(run)
    finally:
        run.close()
    assert await none_left() == 0
    if result.skipped:
        pytest.skip(result.skipped)
    assert result.broken == [], (result.outcomes, result.texts, result.notes)
