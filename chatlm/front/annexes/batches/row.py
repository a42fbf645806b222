"""Batches, which are answered while nobody else asks, and the files that they are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.common.late import importer
from chatlm.front.annex import Annex, with_database
from chatlm.front.annexes.batches.fields import FILES_LIMIT, NEW_BATCH, PURPOSE
from chatlm.front.api.errors import OPENAI
from chatlm.front.api.list_fields import AFTER, LIMIT, ORDER
from chatlm.front.server.routes import Route

if TYPE_CHECKING:
    from chatlm.front.annexes.batches.file_routes import FileRoutes
    from chatlm.front.annexes.batches.routes import BatchRoutes


BATCH_ROUTES: tuple[Route[BatchRoutes], ...] = (
    Route("POST", "/v1/batches", OPENAI, lambda batches, http: batches.handle_create(http),
          "answer each line of a file while nobody else asks", body=NEW_BATCH),
    Route("GET", "/v1/batches", OPENAI, lambda batches, http: batches.handle_list(http),
          "your batches, the newest first",
          query=(LIMIT, AFTER)),
    Route("GET", "/v1/batches/{id}", OPENAI, lambda batches, http: batches.handle_batch(http),
          "how far a batch is"),
    Route("POST", "/v1/batches/{id}/cancel", OPENAI, lambda batches, http: batches.handle_cancel(http),
          "end a batch; what it has answered is kept"),
)
FILE_ROUTES: tuple[Route[FileRoutes], ...] = (
    Route("POST", "/v1/files", OPENAI, lambda files, http: files.handle_upload(http),
          "keep a file of requests for a batch: a form with `file` and `purpose`"),
    Route("GET", "/v1/files", OPENAI, lambda files, http: files.handle_list(http), "your files",
          query=(PURPOSE, FILES_LIMIT, ORDER, AFTER)),
    Route("GET", "/v1/files/{id}", OPENAI, lambda files, http: files.handle_file(http),
          "what is known of a file"),
    Route("GET", "/v1/files/{id}/content", OPENAI, lambda files, http: files.handle_content(http),
          "its content"),
    Route("DELETE", "/v1/files/{id}", OPENAI, lambda files, http: files.handle_delete(http),
          "delete a file"),
)
BATCHES: Annex[BatchRoutes] = Annex(
    "batches", importer("chatlm.front.annexes.batches.routes:BatchRoutes.of"), BATCH_ROUTES, with_database,
    lambda batches: batches.start(), lambda batches: batches.close())
FILES: Annex[FileRoutes] = Annex(
    "files", importer("chatlm.front.annexes.batches.routes:files_of"), FILE_ROUTES)
