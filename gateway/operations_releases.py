"""What operators see of a model's releases, and what they can do: ask its source now, go back to the former one.

    GET  /api/models/M/releases     what serves, what is kept, what was refused and why, and the history
    POST /api/models/M/refresh      ?force=true also what was refused or rolled back from; ?wait_s=30
    POST /api/models/M/rollback

An answer waits for what it asked for, `wait_s` at most (30 by default); what takes longer goes on, and the history says
how it ended.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

from gateway.errors import GatewayError
from gateway.operations_page import Asked, Page, PageFault
from gateway.releases import NothingToDo, Releases
from gateway.releases_model import Result

MAX_WAIT_S: Final = 600.0
WAIT_S: Final = 30.0
_SECONDS: Final = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")


@dataclass(frozen=True, slots=True)
class UnderWay:
    """What was asked for takes longer than the caller waits."""

    model: str
    outcome: str = "under_way"
    text: str = "it goes on; /api/models/M/releases says how it ends"


class ReleasePages:
    """The pages of this file's header."""

    def __init__(self, releases: Releases) -> None:
        self._releases = releases
        self._tasks: set[asyncio.Task[Result]] = set()

    def pages(self) -> list[Page]:
        path = "/api/models/{name}"
        return [
            Page("GET", f"{path}/releases", self._show, "a model's releases: what serves, what is kept, what happened"),
            Page("POST", f"{path}/refresh", self._refresh),
            Page("POST", f"{path}/rollback", self._rollback),
        ]

    async def _show(self, asked: Asked) -> object:
        name = asked.names["name"]
        found = self._releases.status(name)
        if found is None:
            raise PageFault(404, f"model '{name[:64]}' is not loaded here")
        return found

    async def _refresh(self, asked: Asked) -> object:
        _only(asked.query, ("force", "wait_s"))
        force = asked.query.get("force", "false")
        if force not in ("true", "false"):
            raise PageFault(400, "force is true or false")
        name = asked.names["name"]
        return await self._done(asked, lambda: self._releases.refresh(name, "operator", insist=force == "true"))

    async def _rollback(self, asked: Asked) -> object:
        _only(asked.query, ("wait_s",))
        return await self._done(asked, lambda: self._releases.rollback(asked.names["name"], "operator"))

    async def _done(self, asked: Asked, work: Callable[[], Awaitable[Result]]) -> object:
        if asked.body.strip() not in (b"", b"{}"):
            raise PageFault(400, "the body must be empty or {}; options stand in the query")
        wait = asked.query.get("wait_s", f"{WAIT_S:g}")
        if _SECONDS.fullmatch(wait) is None or float(wait) > MAX_WAIT_S:
            raise PageFault(400, f"wait_s is a number of seconds from 0 to {MAX_WAIT_S:g}")
        task: asyncio.Task[Result] = asyncio.ensure_future(work())
        self._tasks.add(task)
        task.add_done_callback(self._over)
        await asyncio.wait({task}, timeout=float(wait))
        if not task.done():
            return UnderWay(asked.names["name"])
        try:
            return task.result()
        except NothingToDo as error:
            raise PageFault(409, str(error)) from None
        except GatewayError as error:
            raise PageFault(502 if error.reason == "source_unavailable" else 422, str(error)) from None

    def _over(self, task: asyncio.Task[Result]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # it was told where it happened

    def __repr__(self) -> str:
        return f"<ReleasePages {len(self._tasks)} under way>"


def _only(query: Mapping[str, str], known: tuple[str, ...]) -> None:
    if unknown := set(query) - set(known):
        raise PageFault(400, f"'{min(unknown)[:64]}' is no option; there are {' and '.join(known)}")
