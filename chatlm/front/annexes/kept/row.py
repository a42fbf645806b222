"""Responses that are kept, and conversations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.common.late import importer
from chatlm.front.annex import Annex, with_database
from chatlm.front.annexes.kept.fields import CHANGES, CONVERSATION, MORE_ITEMS, STARTING_AFTER, STREAM
from chatlm.front.api.errors import OPENAI
from chatlm.front.api.list_fields import AFTER, LIMIT, ORDER
from chatlm.front.server.routes import Route

if TYPE_CHECKING:
    from chatlm.front.annexes.kept.routes import ConversationRoutes, ResponseKeeper


CONVERSATION_ROUTES: tuple[Route[ConversationRoutes], ...] = (
    Route("GET", "/v1/responses/{id}", OPENAI, lambda kept, http: kept.handle_response(http),
          "a response that was kept, or that runs in the background", query=(STREAM, STARTING_AFTER)),
    Route("POST", "/v1/responses/{id}/cancel", OPENAI, lambda kept, http: kept.handle_cancel(http),
          "stop a response that runs in the background"),
    Route("DELETE", "/v1/responses/{id}", OPENAI, lambda kept, http: kept.handle_delete(http),
          "delete it"),
    Route("GET", "/v1/responses/{id}/input_items", OPENAI, lambda kept, http: kept.handle_inputs(http),
          "what it was asked, with what was said before", query=(LIMIT, ORDER, AFTER)),
    Route("POST", "/v1/conversations", OPENAI, lambda kept, http: kept.handle_create(http),
          "begin a conversation", body=CONVERSATION),
    Route("GET", "/v1/conversations/{id}", OPENAI, lambda kept, http: kept.handle_conversation(http),
          "a conversation"),
    Route("POST", "/v1/conversations/{id}", OPENAI, lambda kept, http: kept.handle_update(http),
          "change its metadata", body=CHANGES),
    Route("DELETE", "/v1/conversations/{id}", OPENAI, lambda kept, http: kept.handle_forget(http),
          "delete it with its items"),
    Route("GET", "/v1/conversations/{id}/items", OPENAI, lambda kept, http: kept.handle_items(http),
          "its items",
          query=(LIMIT, ORDER, AFTER)),
    Route("POST", "/v1/conversations/{id}/items", OPENAI, lambda kept, http: kept.handle_add(http),
          "add items to it", body=MORE_ITEMS),
    Route("GET", "/v1/conversations/{id}/items/{item}", OPENAI, lambda kept, http: kept.handle_item(http),
          "one item"),
    Route("DELETE", "/v1/conversations/{id}/items/{item}", OPENAI,
          lambda kept, http: kept.handle_drop(http),
          "delete it; the answer is the conversation"),
)
KEPT: Annex[ResponseKeeper] = Annex(
    "kept", importer("chatlm.front.annexes.kept.routes:ResponseKeeper.of"), wanted=with_database,
    close=lambda kept: kept.close(), joins=lambda parsed: parsed.is_kept,
    around=lambda kept, begin, ask: kept.answering(begin(ask), ask.encoder),
    earlier=lambda kept, opened_body, reading: kept.earlier(opened_body, reading),
    in_background=lambda kept, encoder, recording: kept.show_running(encoder, recording))
CONVERSATIONS: Annex[ConversationRoutes] = Annex(
    "conversations", importer("chatlm.front.annexes.kept.routes:conversations_of"), CONVERSATION_ROUTES)
