"""SIGHUP: the configuration is read again, and what it says of models holds from then on.

Rules:
  * a configuration that is wrong anywhere changes nothing;
  * one reload at a time: a signal that comes meanwhile has it read once more;
  * what only a restart can change is named, and stays;
  * what is said to be done was done: models that could not be loaded are named, and no more is claimed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from gateway.app_models import Models
from gateway.config import Config, Server
from gateway.config_variant_models import check_variants
from gateway.errors import ConfigError, GatewayError

log = logging.getLogger("gateway")

WHO: Final = "SIGHUP"
"""Who asks the registries."""


class Reloading:
    """Reads the configuration again when asked to."""

    def __init__(self, config: Config, reread: Callable[[], Config] | None, models: Models) -> None:
        """`config`: as at the start; `reread`: makes it anew, raises ConfigError; None: there is none to read."""
        self._config = config
        self._reread = reread
        self._models = models
        self._turn = asyncio.Lock()

    @property
    def possible(self) -> bool:
        return self._reread is not None

    async def reload(self) -> None:
        """Take over the models of the configuration as it is now. Raises nothing: what went wrong is logged."""
        if self._reread is None:
            log.warning("SIGHUP: there is no configuration to read again")
            return
        async with self._turn:
            try:
                config = await asyncio.to_thread(self._reread)
                await asyncio.to_thread(check_variants, config)
                failed = await self._models.repository.reload(config)
                self._models.backends.reloaded(self._models.remotes.server_names())
            except GatewayError as error:
                log.error("SIGHUP: nothing was changed: %s", error)
                return
            await self._models.releases.refresh_all(WHO)
            await self._reload_variants(config)
        self._tell(config.server, failed)

    async def _reload_variants(self, config: Config) -> None:
        variants = self._models.variants
        try:
            await variants.configure(config)
        except ConfigError as error:  # the files were others a moment ago
            log.error("SIGHUP: canaries and shadows stay as they were: %s", error)
        await variants.settle()

    def _tell(self, now: Server, failed: list[str]) -> None:
        """Say what was done; `failed`: models that could not be loaded as they are wanted."""
        before = self._config.server
        if changed := _changed(before, now):
            log.warning("SIGHUP: changed too, but takes a restart: %s", ", ".join(changed))
        if before.model_control == "explicit":
            log.info("SIGHUP: models are loaded from where the configuration says now; what is loaded stays as it is")
        elif failed:
            log.error("SIGHUP: the models of the configuration are served, but for %s: see above", ", ".join(failed))
        else:
            log.info("SIGHUP: the models of the configuration are served")


def _changed(before: Server, now: Server) -> list[str]:
    """The keys of `server` that differ, dotted."""
    return [f"server.{key}" for key in type(before).model_fields if getattr(before, key) != getattr(now, key)]
