"""Models that an operator downloads and deletes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.common.late import importer
from chatlm.front.annex import Annex
from chatlm.front.api.errors import OLLAMA, OPENAI
from chatlm.front.api.field_types import SWITCH, TEXT
from chatlm.front.api.fields import Field
from chatlm.front.server.routes import Route

if TYPE_CHECKING:
    from chatlm.front.annexes.downloads.routes import DownloadRoutes


GET_MODELS = "download and delete models"
HUB_NAME = Field("model", TEXT, "a short name, owner/name, or owner/name:FILE", required=True)
EITHER_NAME = (Field("model", TEXT, "a short name, owner/name, or owner/name:FILE"),
               Field("name", TEXT, "the same, for older clients"))
NEW_DOWNLOAD = HUB_NAME, Field("stream", SWITCH, "server-sent events until the download has ended; "
                               "otherwise the state after it was begun")
PULL = (*EITHER_NAME,
        Field("stream", SWITCH, "one JSON object per line (the default); false: one object, at the end"),
        Field("insecure", SWITCH, "has no effect: HF_ENDPOINT names the hub"))
HUB_SEARCH = Field("search", TEXT, "also search the hub, for this")
DOWNLOAD_ROUTES: tuple[Route[DownloadRoutes], ...] = (
    Route("GET", "/models/hub", OPENAI, lambda downloads, http: downloads.handle_list(http),
          "models that can be downloaded, those in the cache, downloads, and room", query=(HUB_SEARCH,),
          operator_act=GET_MODELS),
    Route("GET", "/models/hub/{name:.+}", OPENAI, lambda downloads, http: downloads.handle_look(http),
          "what the hub has of a model: files with sizes, and whether this program can run it",
          operator_act=GET_MODELS),
    Route("GET", "/models/downloads", OPENAI, lambda downloads, http: downloads.handle_downloads(http),
          "the state of each download, then each change, as events; ends when none is running",
          operator_act=GET_MODELS),
    Route("POST", "/models/download", OPENAI, lambda downloads, http: downloads.handle_download(http),
          "download a model, or follow its download", operator_act=GET_MODELS, body=NEW_DOWNLOAD),
    Route("POST", "/models/cancel", OPENAI, lambda downloads, http: downloads.handle_cancel(http),
          "end a download; the next one continues where it was", operator_act=GET_MODELS, body=(HUB_NAME,)),
    Route("POST", "/models/delete", OPENAI, lambda downloads, http: downloads.handle_delete(http),
          "remove a downloaded model from the cache", operator_act=GET_MODELS, body=(HUB_NAME,)),
    Route("POST", "/api/pull", OLLAMA, lambda downloads, http: downloads.handle_pull(http),
          "download a model as Ollama does", operator_act=GET_MODELS, body=PULL),
    Route("DELETE", "/api/delete", OLLAMA, lambda downloads, http: downloads.handle_ollama_delete(http),
          "remove a downloaded model from the cache", operator_act=GET_MODELS, body=EITHER_NAME),
)
DOWNLOADS: Annex[DownloadRoutes] = Annex(
    "downloads", importer("chatlm.front.annexes.downloads.routes:DownloadRoutes.of"), DOWNLOAD_ROUTES,
    close=lambda downloads: downloads.close())
