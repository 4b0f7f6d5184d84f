"""Many histories, in one process or several, and what came of them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from tests.simulation.histories import History
from tests.simulation.play import play, play_history

REPOSITORY: Final = Path(__file__).parent.parent.parent


@dataclass(slots=True)
class Campaign:
    histories: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of one core; more than one process shares `seconds`."""
    failures: list[str] = field(default_factory=list)
    """One text for each history in which an invariant did not hold, with its seed."""
    tally: Counter[str] = field(default_factory=Counter)

    def plain(self) -> dict[str, object]:
        """For a process to say; see `_side_by_side`."""
        return {
            "histories": self.histories, "cpu_seconds": self.cpu_seconds, "failures": self.failures,
            "tally": dict(self.tally),
        }  # fmt: skip

    def figures(self) -> str:
        rate = self.histories / self.cpu_seconds if self.cpu_seconds else 0.0
        happened = ", ".join(f"{count} {what}" for what, count in self.tally.most_common())
        return f"{self.histories} histories in {self.seconds:.0f} s ({rate:.0f} per second of a core): {happened}"


def campaign(first: int, histories: int, processes: int = 1, keep_going: int = 10) -> Campaign:
    """Play the histories of the seeds from `first` on. With several processes each plays every n-th seed."""
    begun = time.monotonic()
    if processes <= 1:
        done = sweep(range(first, first + histories), keep_going)
    else:
        done = _side_by_side(first, histories, processes, keep_going)
    done.seconds = time.monotonic() - begun
    return done


def sweep(seeds: Iterable[int], keep_going: int = 10) -> Campaign:
    done = Campaign()
    begun = time.process_time()
    for seed in seeds:
        played = play(seed)
        done.histories += 1
        done.tally.update(played.tally)
        if played.violations:
            done.failures.append(f"seed {seed} ({played.history.theme}): " + "; ".join(map(str, played.violations[:3])))
            if len(done.failures) >= keep_going:
                break
    done.cpu_seconds = time.process_time() - begun
    return done


def _side_by_side(first: int, histories: int, processes: int, keep_going: int) -> Campaign:
    """Each process plays every n-th seed, so that all of them have as much to do."""
    children = []
    for number in range(processes):
        share = len(range(number, histories, processes))
        arguments = ["--first", str(first + number), "--stride", str(processes), "--histories", str(share)]
        command = [sys.executable, "-m", "tests.simulation", "--json", "--keep-going", str(keep_going), *arguments]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY))
    done = Campaign()
    for child in children:
        said, _ = child.communicate()
        try:
            part = json.loads(said)
        except json.JSONDecodeError:
            done.failures.append(f"a process of the campaign ended with status {child.returncode}: {said[-500:]}")
            continue
        done.histories += part["histories"]
        done.failures += part["failures"]
        done.cpu_seconds += part["cpu_seconds"]
        done.tally.update(part["tally"])
    return done


def reduced(made: History) -> History:
    """The history without the events that it does not need to break the same invariant; itself if it breaks none."""
    broken = play_history(made).broken
    if not broken:
        return made
    for size in (32, 16, 8, 4, 2, 1, 1):
        for name in ("arrivals", "changes"):
            at = 0
            while at < len(getattr(made, name)):
                events = getattr(made, name)
                shorter = replace(made, **{name: events[:at] + events[at + size :]})
                if play_history(shorter).broken & broken:
                    made = shorter
                else:
                    at += size
    return made
