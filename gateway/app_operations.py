"""The operations port of one process: what it shows, and what may be asked of it.

Decides which families a scrape finds and which pages there are; how they are served is decided by operations.py.
Everything is read when somebody asks: this port does no work of its own.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from gateway import app_registries, variants_metrics
from gateway.app_models import Models
from gateway.app_ports import DataPorts
from gateway.app_views import Views, release_view
from gateway.config import Config
from gateway.observe import metrics_releases
from gateway.observe.loop_lag import LoopLag
from gateway.observe.metrics import Metrics, Sources, build_labels
from gateway.operations import Operations
from gateway.operations_feedback import Feedback
from gateway.operations_releases import ReleasePages
from gateway.operations_split import split_pages
from gateway.operations_webhooks import MlflowWebhook


def operations_port(
    config: Config, models: Models, ports: DataPorts, lag: LoopLag, health: Callable[[], Mapping[str, Any]]
) -> Operations:
    """The port, not yet bound. `health`: what `/healthz` says besides that the process answers."""
    token = config.server.admin_token_file
    views = Views(models.catalog.versions, models.agreement)
    return Operations(
        Metrics(_sources(models, ports, views, lag), time.monotonic),
        views.for_people,
        lambda: models.pool.statistics().workers,
        models.backends,
        config.base / token if token is not None else None,
        health=health,
        pages=[
            *ReleasePages(models.releases).pages(),
            MlflowWebhook(models.releases, models.webhook_secret).page(),
            *split_pages(models.variants, models.promote),
            _feedback(config, models).page(),
        ],
    )


def _sources(models: Models, ports: DataPorts, views: Views, lag: LoopLag) -> Sources:
    return Sources(
        views.for_metrics,
        ports.http_view,
        {"0": lag.histogram},
        build_labels(),
        ports.grpc_view,
        more=[
            lambda: metrics_releases.families(map(release_view, models.releases.statistics())),
            lambda: variants_metrics.families(models.variants.statuses()),
            lambda: app_registries.families(models.registered),
            lambda: models.serving_log.families() if models.serving_log is not None else [],
        ],
    )


def _feedback(config: Config, models: Models) -> Feedback:
    section = config.inference_log
    file = section.feedback_token_file if section is not None else None
    return Feedback(
        models.inference_log,
        lambda: time.time_ns() // 1000,
        lambda: uuid.uuid4().hex,
        config.base / file if file is not None else None,
    )
