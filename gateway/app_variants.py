"""Canaries and shadows of one process: what variants.py needs of the other parts, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from gateway import variants_sources
from gateway.backends.onnx import LoadOptions
from gateway.config import Config, ModelEntry, ModelSettings
from gateway.config_release import Canary, Shadow
from gateway.core.model import Artifact
from gateway.loading import LoadedModel
from gateway.variants import Variants
from gateway.variants_sources import Registered, Target
from gateway.variants_wanted import VariantRole

WAIT_S: Final = 30.0
"""How long a start waits for canaries and shadows; those that take longer join later."""
SHADOW_NICENESS: Final = 19

LoadOnWorkers = Callable[[Artifact, LoadOptions], Awaitable[LoadedModel]]


class VariantLoader:
    """Finds variants where the configuration says, for workers of their own; `find` is `variants.Find`."""

    def __init__(self, load: LoadOnWorkers, registered: Registered) -> None:
        self._load_on_workers = load
        self._registered = registered

    async def find(
        self, config: Config, name: str, entry: ModelEntry, keys: Canary | Shadow, role: VariantRole
    ) -> Target:
        load = partial(self._load, SHADOW_NICENESS if role == "shadow" else 0)
        return await asyncio.to_thread(variants_sources.find, config, name, entry, keys, load, self._registered)

    async def looks(self, config: Config, entry: ModelEntry, keys: Canary | Shadow) -> object:
        """See `variants_sources.looks`."""
        return await asyncio.to_thread(variants_sources.looks, config, entry, keys)

    async def _load(self, niceness: int, artifact: Artifact, settings: ModelSettings) -> LoadedModel:
        """Without the servers that may stand beside the model: they are the champion's."""
        options = LoadOptions(settings.instances, True, settings.intra_op_threads, niceness)
        return await self._load_on_workers(artifact, options)


async def start(variants: Variants, config: Config, stopping: asyncio.Event, spawn: Callable[[object], None]) -> None:
    """Have them there before the first request, as far as they can be loaded in time; then follow what changes."""
    await variants.configure(config)
    first = asyncio.ensure_future(variants.settle())
    stopped = asyncio.ensure_future(stopping.wait())
    await asyncio.wait({first, stopped}, timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    spawn(first)
    spawn(variants.follow())
