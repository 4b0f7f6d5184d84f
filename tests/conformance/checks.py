"""What a check is, the list of all of them, and how they are run.

A check is a function of a `Subject`. It returns what it saw, in a few words; it raises `Failed` with what was wrong, or
`NotOffered` where the server does not have what it is about. Anything else it raises is a failure of the server too: a
closed connection, an answer that is no JSON.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import grpc

from tests.conformance.subject import Subject

Level = Literal["required", "recommended", "extension"]


class Failed(Exception):
    """The server did something else than the protocol says."""


class NotOffered(Exception):
    """The server does not have what the check is about, and does not say that it has."""


class Verdict(enum.Enum):
    PASSED = "passed"
    FAILED = "failed"
    NOT_OFFERED = "not offered"


@dataclass(frozen=True)
class Check:
    id: str
    section: str
    level: Level
    source: str
    """Where the rule stands."""
    what: str
    """What has to hold, in a sentence."""
    run: Callable[[Subject], str]


@dataclass(frozen=True)
class Result:
    check: Check
    verdict: Verdict
    seen: str


CHECKS: Final[list[Check]] = []
OIP_REST: Final = "OIP inference_rest"
OIP_GRPC: Final = "OIP inference_grpc"


def check(section: str, level: Level, source: str) -> Callable[[Callable[[Subject], str]], Callable[[Subject], str]]:
    """Register a function as a check. Its name is the id, its docstring says what has to hold."""

    def register(run: Callable[[Subject], str]) -> Callable[[Subject], str]:
        name = run.__name__.removeprefix("check_").replace("_", "-")
        CHECKS.append(Check(name, section, level, source, " ".join((run.__doc__ or "").split()), run))
        return run

    return register


def expect(holds: object, otherwise: str) -> None:
    """Raises Failed with `otherwise` unless `holds`."""
    if not holds:
        raise Failed(otherwise)


def run_check(found: Check, subject: Subject) -> Result:
    """Never raises for the server's sake."""
    try:
        return Result(found, Verdict.PASSED, found.run(subject))
    except NotOffered as reason:
        return Result(found, Verdict.NOT_OFFERED, str(reason))
    except Failed as reason:
        return Result(found, Verdict.FAILED, str(reason))
    except grpc.RpcError as error:
        return Result(found, Verdict.FAILED, f"{error.code().name}: {error.details()}"[:200])
    except Exception as error:
        return Result(found, Verdict.FAILED, f"{type(error).__name__}: {error}"[:200])
