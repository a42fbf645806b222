"""Chats that all devices of their owner have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.common.late import importer
from chatlm.front.annex import Annex
from chatlm.front.annexes.chats.fields import CHAT_PLACE, COUNT, SINCE, WAIT, WORDS
from chatlm.front.api.additions import AddedField
from chatlm.front.api.errors import OPENAI
from chatlm.front.api.list_fields import AFTER, LIMIT
from chatlm.front.server.routes import Route

if TYPE_CHECKING:
    from chatlm.front.annexes.chats.routes import ChatRoutes
    from chatlm.front.front import Front


def with_chats(front: Front) -> bool:
    return front.store is not None and CHATS.name in front.store.tables and front.settings.chats


CHAT_ROUTES: tuple[Route[ChatRoutes], ...] = (
    Route("POST", "/v1/chats/changes", OPENAI, lambda chats, http: chats.handle_change(http),
          "change records of your chats: a list of up to 500 changes"),
    Route("GET", "/v1/chats/changes", OPENAI, lambda chats, http: chats.handle_changes(http),
          "what has changed after a revision; waits until something does", query=(SINCE, WAIT), quiet=True),
    Route("GET", "/v1/chats/search", OPENAI, lambda chats, http: chats.handle_search(http),
          "your chats that have all of these words, the newest first", query=(WORDS, AFTER)),
    Route("GET", "/v1/chats/export", OPENAI, lambda chats, http: chats.handle_export(http),
          "all your chats as a file"),
    Route("POST", "/v1/chats/files", OPENAI, lambda chats, http: chats.handle_picture(http),
          "keep a picture, the body, which messages then show by its SHA-256"),
    Route("GET", "/v1/chats/files/{sha256}", OPENAI, lambda chats, http: chats.handle_show(http),
          "a picture of your chats"),
    Route("GET", "/v1/chats", OPENAI, lambda chats, http: chats.handle_list(http),
          "your chats, the newest first", query=(LIMIT, AFTER)),
    Route("DELETE", "/v1/chats", OPENAI, lambda chats, http: chats.handle_delete_all(http),
          "delete all your chats", query=(COUNT,)),
    Route("GET", "/v1/chats/{id}", OPENAI, lambda chats, http: chats.handle_chat(http),
          "a chat with its messages"),
    Route("DELETE", "/v1/chats/{id}", OPENAI, lambda chats, http: chats.handle_delete(http), "delete it"),
)
CHATS: Annex[ChatRoutes] = Annex(
    "chats", importer("chatlm.front.annexes.chats.routes:ChatRoutes.of"), CHAT_ROUTES, with_chats,
    lambda chats: chats.start(), lambda chats: chats.close(),
    tables=importer("chatlm.front.annexes.chats.tables:STEPS"), needs="--database",
    fields=(AddedField(CHAT_PLACE, (
        "/chat/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/chat")),),
    joins=lambda parsed: CHAT_PLACE.name in parsed.added,
    prepare=lambda chats, parsed: chats.prepared(parsed),
    around=lambda chats, begin, ask: chats.written(begin, ask))
