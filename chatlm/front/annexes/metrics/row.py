"""/metrics, for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.common.late import importer
from chatlm.front.annex import Annex
from chatlm.front.api.errors import NANOCHAT
from chatlm.front.server.routes import Route

if TYPE_CHECKING:
    from chatlm.front.annexes.metrics.routes import MetricRoutes


METRIC_ROUTES: tuple[Route[MetricRoutes], ...] = (
    Route("GET", "/metrics", NANOCHAT, lambda metrics, http: metrics.handle_metrics(http),
          "Prometheus metrics", polled=True),
)
METRICS: Annex[MetricRoutes] = Annex(
    "metrics", importer("chatlm.front.annexes.metrics.routes:MetricRoutes.of"), METRIC_ROUTES)
