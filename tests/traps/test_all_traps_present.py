"""Every numbered trap has its test."""

from __future__ import annotations

import re
from pathlib import Path


def test_traps_1_to_74_are_all_there() -> None:
    text = "".join(path.read_text() for path in sorted(Path(__file__).parent.glob("test_traps_*.py")))
    numbers = [int(number) for number in re.findall(r"^(?:async )?def test_trap_(\d\d)_\w+\(", text, re.MULTILINE)]
    assert sorted(numbers) == list(range(1, 75))
