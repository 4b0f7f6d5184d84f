"""Every scenario in its quick form: counts must hold on any machine, times are not looked at."""

from __future__ import annotations

import pytest

from tests.faults.every import BY_NAME_ONLY, SCENARIOS
from tests.faults.rig import Run, none_left

QUICK = [name for name, one in SCENARIOS.items() if one.quick and not name.startswith(BY_NAME_ONLY)]


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
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
