"""What went wrong while a version was loaded: its own fault, or one of its surroundings that may be over soon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from gateway.errors import ConfigError, GatewayError, NotReady, SourceUnavailable
from gateway.loading_trial import RunTimedOut, ServerLost

_NOT_THERE: Final = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""What is wrong with the files themselves."""


def passes(error: GatewayError) -> bool:
    """Whether a load that ended with this error may succeed later, with the same files."""
    if isinstance(error, (SourceUnavailable, NotReady, RunTimedOut, ServerLost)):
        return True
    below = error.__cause__ or error.__context__
    return isinstance(below, OSError) and not isinstance(below, _NOT_THERE)


class Passing:
    """Remembers whether what went wrong may be over soon: a registry that is down, a disk that is full."""

    def __init__(self) -> None:
        self.seen = False

    def watch(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (SourceUnavailable, OSError) as error:
            self.seen = True
            if isinstance(error, OSError):
                raise ConfigError(f"the model's files cannot be read: {error.strerror or error}") from None
            raise
