"""MLflow's webhooks: it says that an alias was moved, and the models that refer to it are asked for at once.

    POST /api/webhooks/mlflow      events model_version_alias.created and .deleted, model_version.created

Rules: an event is only a reason to ask the registry again, never an answer; so a forged or repeated one costs a
question. It must be signed all the same (MLflow's scheme: HMAC-SHA256 over `<delivery id>.<timestamp>.<body>`, base64
behind `v1,`), by a secret that is looked up for each event, and be no older than `MAX_AGE_S`. Of one model one question
waits at most; the event is answered before it is asked.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Final

import orjson

from gateway.operations_page import Asked, Page, PageFault
from gateway.releases import Releases

log = logging.getLogger("gateway.releases")

PATH: Final = "/api/webhooks/mlflow"
MAX_AGE_S: Final = 300.0
MAX_BODY: Final = 65_536
ENTITIES: Final = frozenset(("model_version_alias", "model_version", "registered_model"))
_TIMESTAMP: Final = re.compile(r"[0-9]{1,12}")


def signature_fault(secret: str, headers: Mapping[str, str], body: bytes, now: float) -> str:
    """Why an event is not MLflow's; empty: it is. `now`: seconds since 1970."""
    delivery, timestamp = headers.get("X-MLflow-Delivery-Id", ""), headers.get("X-MLflow-Timestamp", "")
    given = headers.get("X-MLflow-Signature", "")
    if not (delivery and timestamp and given):
        return "it is not signed; give the webhook a secret in MLflow, the one of registries.mlflow.webhook_secret"
    if _TIMESTAMP.fullmatch(timestamp) is None or abs(now - int(timestamp)) > MAX_AGE_S:
        return f"it is not from the last {MAX_AGE_S:g} s; are the clocks of both machines right?"
    signed = b".".join((delivery.encode("utf-8", "surrogateescape"), timestamp.encode(), body))
    wanted = "v1," + base64.b64encode(hmac.new(secret.encode(), signed, hashlib.sha256).digest()).decode()
    if not hmac.compare_digest(wanted.encode(), given.encode("utf-8", "surrogateescape")):
        return "its signature does not fit; MLflow and registries.mlflow.webhook_secret must have the same secret"
    return ""


def model_of(body: bytes) -> str | None:
    """Name of the registered model that an event is about; None: it is about something else.

    Raises:
        PageFault: it is no event.
    """
    try:
        event = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise PageFault(400, f"this is not JSON: {error}") from None
    data = event.get("data") if isinstance(event, dict) else None
    if not isinstance(data, dict):
        raise PageFault(400, "this is no event of MLflow: it has no 'data'")
    name = data.get("name")
    return name if event.get("entity") in ENTITIES and isinstance(name, str) and name else None


class MlflowWebhook:
    """The page of this file's header."""

    def __init__(
        self, releases: Releases, secret: Callable[[], str | None], wall_clock: Callable[[], float] = time.time
    ) -> None:
        """`secret`: looks it up; may block. None: none is configured; empty: it cannot be read at the moment."""
        self._releases = releases
        self._secret = secret
        self._now = wall_clock
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._again: set[str] = set()
        """Models about which an event came while they were being asked for."""

    def page(self) -> Page:
        return Page("POST", PATH, self._answer, open=True, max_body=MAX_BODY)

    async def _answer(self, asked: Asked) -> object:
        secret = await asyncio.to_thread(self._secret)
        if secret is None:
            raise PageFault(403, "webhooks are not taken: registries.mlflow.webhook_secret is not configured")
        if not secret:
            raise PageFault(503, "the secret of registries.mlflow.webhook_secret cannot be read or is empty")
        if fault := signature_fault(secret, asked.headers, asked.body, self._now()):
            log.warning("a webhook was refused: %s", fault)
            raise PageFault(401, f"the event was refused: {fault}")
        name = model_of(asked.body)
        models = self._releases.referring((f"models:/{name}@", f"models:/{name}/")) if name is not None else []
        for model in models:
            self._ask(model)
        return {"models": models}

    def _ask(self, model: str) -> None:
        self._again.add(model)
        if model not in self._asking:
            self._asking[model] = asyncio.get_running_loop().create_task(self._refresh(model))

    async def _refresh(self, model: str) -> None:
        try:
            while model in self._again:
                self._again.discard(model)  # what moves from now on is another question
                await self._releases.look(model, "webhook")
        finally:
            del self._asking[model]

    def __repr__(self) -> str:
        return f"<MlflowWebhook {len(self._asking)} under way>"
