"""Models that an operator exports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.common.late import importer
from chatlm.front.annex import Annex
from chatlm.front.api.errors import OPENAI
from chatlm.front.api.field_types import TEXT
from chatlm.front.api.fields import Field
from chatlm.front.server.routes import Route

if TYPE_CHECKING:
    from chatlm.front.annexes.exports.routes import ExportRoutes


NEW_EXPORT = (Field("model", TEXT, "a served model", required=True),
              Field("name", TEXT, "of the new folder in that of --export-folder", required=True))
EXPORT_ROUTES: tuple[Route[ExportRoutes], ...] = (
    Route("GET", "/models/exports", OPENAI, lambda exports, http: exports.handle_list(http),
          "what is in the folder of --export-folder", operator_act="export models"),
    Route("POST", "/models/export", OPENAI, lambda exports, http: exports.handle_export(http),
          "write a served model as a folder for transformers, into that of --export-folder",
          operator_act="export models", body=NEW_EXPORT),
)
EXPORTS: Annex[ExportRoutes] = Annex(
    "exports", importer("chatlm.front.annexes.exports.routes:ExportRoutes.of"), EXPORT_ROUTES,
    close=lambda exports: exports.close())
