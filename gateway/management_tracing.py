"""Which model versions are traced now: the settings, carried out.

Rules: a version is traced by a tracer of its own as long as its settings hold; other changes leave it, and what it has
counted, alone. Without a file nothing is traced; the settings say so to whoever switches it on.
"""

from __future__ import annotations

from gateway.catalog import Catalog, ServedVersion
from gateway.management_settings import TraceSettings
from gateway.observe.request_trace import ModelTracer, TraceFile
from gateway.scheduler import Scheduler
from gateway.sequence_scheduler import SequenceScheduler


class Tracing:
    """Puts tracers where the settings want them; an ensemble is traced as the models it is made of."""

    def __init__(self, catalog: Catalog, settings: TraceSettings, file: TraceFile | None) -> None:
        self._catalog = catalog
        self._settings = settings
        self._file = file
        settings.changed = self.attach_all

    def attach_all(self) -> None:
        for version in self._catalog.versions():
            self.attach(version)

    def attach(self, version: ServedVersion) -> None:
        """Trace a loaded version as its settings say, or not at all."""
        scheduler = version.scheduler
        if not isinstance(scheduler, Scheduler | SequenceScheduler):
            return
        plan = self._settings.plan(version.name)
        if not plan.on:
            scheduler.tracer = None
        elif self._file is not None and (scheduler.tracer is None or scheduler.tracer.plan != plan):
            scheduler.tracer = ModelTracer(version.spec, self._file, plan)

    async def close(self) -> None:
        """Write what was traced."""
        if self._file is not None:
            await self._file.close()
