"""`POST /api/feedback` on the operations port: labels and overrides for answers that were given.

Answers 202 with counts: `accepted`, `duplicates` (said already, by idempotency key) and `faults`, each with its index
in the list and the reason. 400 where no item can be taken, 503 where no inference log is configured or it has no room.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from gateway.inference_log.feedback import MAX_BODY, FeedbackError, RecentKeys, read
from gateway.operations_page import Asked, Page, PageFault


class Log(Protocol):
    """Where feedback goes; `handover.InferenceLog` fits."""

    def feedback(self, kind: str, model: str, version: str, details: Mapping[str, object]) -> bool: ...


class Feedback:
    """The page.

    Args:
        log: None if no inference log is configured.
        now_us: microseconds since 1970.
        fresh_key: makes an idempotency key for an item without one.
        token_file: a token that allows this page and nothing else.
    """

    def __init__(
        self,
        log: Log | None,
        now_us: Callable[[], int],
        fresh_key: Callable[[], str],
        token_file: Path | None = None,
    ) -> None:
        self._log = log
        self._now_us = now_us
        self._fresh_key = fresh_key
        self._token_file = token_file
        self._recent = RecentKeys()

    def __repr__(self) -> str:
        return f"<Feedback log={self._log is not None} recent={self._recent!r}>"

    def page(self) -> Page:
        return Page(
            "POST",
            "/api/feedback",
            self._answer,
            "labels and overrides for answers, by request id (POST)",
            max_body=MAX_BODY,
            status=202,
            token_file=self._token_file,
        )

    async def _answer(self, asked: Asked) -> object:
        if self._log is None:
            raise PageFault(503, "there is no inference log; write inference_log: {} into the configuration")
        try:
            items, faults = read(asked.body, self._now_us(), self._fresh_key)
        except FeedbackError as error:
            raise PageFault(400, str(error)) from None
        if not items:
            raise PageFault(400, f"item {faults[0].index}: {faults[0].error}")
        accepted = duplicates = 0
        for item in items:
            if item.key in self._recent:
                duplicates += 1
            elif self._log.feedback(item.kind, "", "", item.details):
                self._recent.add(item.key)
                accepted += 1
            else:
                raise PageFault(
                    503, f"the inference log has no room; {accepted} items were taken. Send all again later, with keys"
                )
        return {"accepted": accepted, "duplicates": duplicates, "faults": faults}
