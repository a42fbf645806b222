"""Several models, asked the same question."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.common.late import importer
from chatlm.front.annex import Annex
from chatlm.front.api.errors import OPENAI
from chatlm.front.server.routes import Route

if TYPE_CHECKING:
    from chatlm.front.annexes.compare.routes import CompareRoutes


COMPARE_ROUTES: tuple[Route[CompareRoutes], ...] = (
    Route("POST", "/v1/compare", OPENAI, lambda compare, http: compare.handle_compare(http),
          "answers of several models to one question, streamed, and where each diverges from the first"),
)
COMPARE: Annex[CompareRoutes] = Annex(
    "compare", importer("chatlm.front.annexes.compare.routes:CompareRoutes.of"), COMPARE_ROUTES)
