"""What was used, by day, key and model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.common.late import importer
from chatlm.front.annex import Annex
from chatlm.front.api.errors import OPENAI
from chatlm.front.api.field_types import TEXT
from chatlm.front.api.fields import Field
from chatlm.front.server.routes import Route

if TYPE_CHECKING:
    from chatlm.front.annexes.usage.routes import UsageRoutes


FROM_DAY = Field("from", TEXT, "the first day (UTC), as 2026-11-24; default: 30 days before the last")
TO_DAY = Field("to", TEXT, "the last day; default: today")
USAGE_ROUTES: tuple[Route[UsageRoutes], ...] = (
    Route("GET", "/v1/usage", OPENAI, lambda usage, http: usage.handle_usage(http),
          "what the request's API key used by day and model; a key with role=admin sees all keys",
          query=(FROM_DAY, TO_DAY)),
)
USAGE: Annex[UsageRoutes] = Annex(
    "usage", importer("chatlm.front.annexes.usage.routes:UsageRoutes.of"), USAGE_ROUTES)
