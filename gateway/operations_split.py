"""How a model's requests are shared out between its versions, and changing that: `/api/models/NAME/split` and
`/promote` on the operations port.

POST takes `{"canary": 25}`, `{"shadow": 0}` or both, in percent, and answers what holds then. What was set holds until
the configuration's own share changes, or the process ends. Promoting makes the canary the version that the model's name
means, and keeps the former one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, cast

from gateway.catalog import ServedVersion
from gateway.errors import ConfigError, GatewayError
from gateway.operations_page import Asked, Page, PageFault
from gateway.variants import Variants
from gateway.variants_wanted import ROLES, VariantRole

audit = logging.getLogger("gateway.audit")

PATH: Final = "/api/models/{name}/split"
ALL: Final = "/api/splits"
PROMOTE: Final = "/api/models/{name}/promote"
Promote = Callable[[str, ServedVersion], Awaitable[object]]
"""Makes a loaded version the one that a model's name means; answers what came of it."""


def split_pages(variants: Variants, promote: Promote) -> list[Page]:
    """The pages of one process."""

    async def show(asked: Asked) -> object:
        try:
            return variants.status(asked.names["name"])
        except ConfigError as error:
            raise PageFault(404, str(error)) from None

    async def change(asked: Asked) -> object:
        name, percents = asked.names["name"], _percents(asked.body)
        try:
            status = variants.share(name, percents)
        except ConfigError as error:
            raise PageFault(404, str(error)) from None
        audit.info(
            "split of model %s: %s", name, ", ".join(f"{role} {percent:g} %" for role, percent in percents.items())
        )
        return status

    async def take_over(asked: Asked) -> object:
        name = asked.names["name"]
        try:
            return await promote(name, variants.candidate(name))
        except ConfigError as error:
            raise PageFault(404, str(error)) from None
        except GatewayError as error:
            raise PageFault(error.status, str(error)) from None

    async def show_all(asked: Asked) -> object:
        return list(variants.statuses().values())

    return [
        Page("GET", ALL, show_all, "models with a canary or a shadow: shares, requests, differences"),
        Page("GET", PATH, show),
        Page("POST", PATH, change),
        Page("POST", PROMOTE, take_over),
    ]


def _percents(body: bytes) -> Mapping[VariantRole, float]:
    """Raises PageFault: this is not what can be changed."""
    example = 'write for example {"canary": 25}'
    try:
        read: Any = json.loads(body)
    except (ValueError, RecursionError):
        raise PageFault(400, f"the body is not JSON; {example}") from None
    if not isinstance(read, dict) or not read:
        raise PageFault(400, f"the body names no share; {example}")
    for key, value in read.items():
        if key not in ROLES:
            raise PageFault(400, f"'{key[:64]}' is no share; there are {' and '.join(ROLES)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
            raise PageFault(400, f"{key} is a number of percent from 0 to 100")
    return cast("Mapping[VariantRole, float]", read)
