"""The list of scenarios. A scenario is a coroutine function from `Run` to `Result`, registered under the number of the
fault in the list of faults and a short name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from tests.faults.results import Result
from tests.faults.rig import Run

Body = Callable[[Run, Result], Awaitable[Result]]


class Unavailable(Exception):
    """Something that the scenario needs cannot be had here; the text says what."""


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    fault: str
    expected: str
    body: Body

    async def play(self, run: Run) -> Result:
        result = Result(self.name, self.fault, self.expected)
        try:
            return await self.body(run, result)
        except Unavailable as why:
            result.skipped = str(why)
            return result


SCENARIOS: Final[dict[str, Scenario]] = {}


def scenario(name: str, fault: str, expected: str) -> Callable[[Body], Body]:
    """Register the decorated coroutine function.

    Args:
        name: number of the fault and a word: `02-kill-remote`.
        fault: what is done.
        expected: what must come of it.
    """

    def register(body: Body) -> Body:
        assert name not in SCENARIOS, name
        SCENARIOS[name] = Scenario(name, fault, expected, body)
        return body

    return register
