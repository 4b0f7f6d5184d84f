"""`python -m tests.simulation`: a campaign over many seeds, or one seed step by step.

    python -m tests.simulation --histories 100000 [--first 0] [--processes 2]
    python -m tests.simulation --seed 4711 [-v] [--control NAME] [--reduce]

A campaign ends with one line of figures and, for each history in which an invariant did not hold, its seed and what
was found; the exit status is 1 then. `-v` prints all that happened in one history. `--reduce` leaves out of a failing
history what it does not need to fail.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext

from tests.simulation.campaign import campaign, reduced, sweep
from tests.simulation.controls import CONTROLS
from tests.simulation.histories import history
from tests.simulation.play import play_history


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seed", type=int, help="play this history only")
    parser.add_argument("-v", "--verbose", action="store_true", help="with --seed: print what happens, step by step")
    parser.add_argument("--reduce", action="store_true", help="with --seed: leave out what is not needed to fail")
    parser.add_argument("--control", choices=sorted(CONTROLS), help="break the gateway on purpose first")
    parser.add_argument("--histories", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--keep-going", type=int, default=10, help="failing histories after which it stops")
    parser.add_argument("--stride", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    control = CONTROLS[chosen.control].applied() if chosen.control else nullcontext()
    with control:
        if chosen.seed is not None:
            return one(chosen.seed, chosen.verbose, chosen.reduce)
        if chosen.json:
            last = chosen.first + chosen.stride * chosen.histories
            done = sweep(range(chosen.first, last, chosen.stride), chosen.keep_going)
            say(json.dumps(done.plain()))
            return 0
        done = campaign(chosen.first, chosen.histories, chosen.processes, chosen.keep_going)
    say(done.figures())
    for failure in done.failures:
        say(failure)
    return 1 if done.failures else 0


def one(seed: int, verbose: bool, reduce: bool) -> int:
    made = history(seed)
    if reduce:
        made = reduced(made)
    played = play_history(made, verbose=True)
    say(
        f"seed {seed}: {made.theme}, {made.policy}, {made.resilience}, turns {made.turn_s}, late {made.late_s}, "
        f"{made.promise}"
    )
    for replica in made.replicas:
        say(f"  {replica}")
    if verbose:
        for line in played.trace or ():
            say(line)
    for violation in played.violations:
        say(str(violation))
    say(", ".join(f"{count} {what}" for what, count in played.tally.items()))
    return 1 if played.violations else 0


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201  # a program's output


if __name__ == "__main__":
    sys.exit(main())
