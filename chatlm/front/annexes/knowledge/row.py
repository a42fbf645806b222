"""Vector stores: files that are cut into passages, embedded and searched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.common.late import importer
from chatlm.front.annex import Annex
from chatlm.front.annexes.knowledge.fields import (
    BEFORE, CHANGED_FILE, CHANGES, FILE_SEARCH_ITEM, FILE_SEARCH_OPTIONS, FILE_SEARCH_PARAMETERS,
    KNOWLEDGE_OF_CHAT, NEW_FILE, NEW_FILES, NEW_STORE, PAGE, QUERIES, SEARCH, STATUS)
from chatlm.front.api.additions import AddedField, ServerTool
from chatlm.front.api.errors import OPENAI
from chatlm.front.api.list_fields import AFTER, LIMIT, ORDER
from chatlm.front.server.routes import Route

if TYPE_CHECKING:
    from chatlm.front.annexes.knowledge.routes import KnowledgeRoutes
    from chatlm.front.front import Front


A_PLACE = LIMIT, ORDER, AFTER, BEFORE
KNOWLEDGE_ROUTES: tuple[Route[KnowledgeRoutes], ...] = (
    Route("POST", "/v1/vector_stores", OPENAI, lambda knowledge, http: knowledge.handle_create(http),
          "make a vector store, perhaps with files", body=NEW_STORE),
    Route("GET", "/v1/vector_stores", OPENAI, lambda knowledge, http: knowledge.handle_list(http),
          "your vector stores", query=A_PLACE),
    Route("GET", "/v1/vector_stores/{id}", OPENAI, lambda knowledge, http: knowledge.handle_store(http),
          "a vector store, and how far its files are"),
    Route("POST", "/v1/vector_stores/{id}", OPENAI, lambda knowledge, http: knowledge.handle_update(http),
          "change its name, metadata or expiry", body=CHANGES),
    Route("DELETE", "/v1/vector_stores/{id}", OPENAI, lambda knowledge, http: knowledge.handle_delete(http),
          "delete it with all passages; the files stay"),
    Route("POST", "/v1/vector_stores/{id}/search", OPENAI,
          lambda knowledge, http: knowledge.handle_search(http), "the passages that fit a question",
          body=SEARCH),
    Route("POST", "/v1/vector_stores/{id}/files", OPENAI, lambda knowledge, http: knowledge.handle_add(http),
          "put an uploaded file into it, which is read in the background", body=NEW_FILE),
    Route("GET", "/v1/vector_stores/{id}/files", OPENAI, lambda knowledge, http: knowledge.handle_files(http),
          "its files", query=(*A_PLACE, STATUS)),
    Route("GET", "/v1/vector_stores/{id}/files/{file}", OPENAI,
          lambda knowledge, http: knowledge.handle_file(http), "how far a file is, or why it has failed"),
    Route("POST", "/v1/vector_stores/{id}/files/{file}", OPENAI,
          lambda knowledge, http: knowledge.handle_change(http), "change a file's attributes",
          body=CHANGED_FILE),
    Route("DELETE", "/v1/vector_stores/{id}/files/{file}", OPENAI,
          lambda knowledge, http: knowledge.handle_remove(http), "take a file out of it"),
    Route("GET", "/v1/vector_stores/{id}/files/{file}/content", OPENAI,
          lambda knowledge, http: knowledge.handle_content(http), "the passages of a file", query=(PAGE,)),
    Route("POST", "/v1/vector_stores/{id}/file_batches", OPENAI,
          lambda knowledge, http: knowledge.handle_begin_batch(http), "put several files into it",
          body=NEW_FILES),
    Route("GET", "/v1/vector_stores/{id}/file_batches/{batch}", OPENAI,
          lambda knowledge, http: knowledge.handle_batch(http), "how far a batch of files is"),
    Route("POST", "/v1/vector_stores/{id}/file_batches/{batch}/cancel", OPENAI,
          lambda knowledge, http: knowledge.handle_cancel(http), "leave out those of its files that wait"),
    Route("GET", "/v1/vector_stores/{id}/file_batches/{batch}/files", OPENAI,
          lambda knowledge, http: knowledge.handle_batch_files(http), "the files of a batch",
          query=(*A_PLACE, STATUS)),
)


def with_knowledge(front: Front) -> bool:
    return front.store is not None and KNOWLEDGE.name in front.store.tables


FILE_SEARCH: ServerTool[KnowledgeRoutes] = ServerTool(
    "file_search", "Search the user's documents. Returns numbered passages that may help to answer.",
    FILE_SEARCH_PARAMETERS, lambda knowledge, call: knowledge.searched(call), FILE_SEARCH_OPTIONS,
    FILE_SEARCH_ITEM, first=QUERIES, rounds=3)
KNOWLEDGE: Annex[KnowledgeRoutes] = Annex(
    "knowledge", importer("chatlm.front.annexes.knowledge.routes:KnowledgeRoutes.of"), KNOWLEDGE_ROUTES,
    with_knowledge, lambda knowledge: knowledge.start(), lambda knowledge: knowledge.close(),
    fields=(AddedField(KNOWLEDGE_OF_CHAT, ("/chat/completions", "/v1/chat/completions")),),
    needs="--database", tools=(FILE_SEARCH,),
    prompt=lambda knowledge, parsed, caller, pool: knowledge.prompted(parsed, caller, pool),
    tables=importer("chatlm.front.annexes.knowledge.tables:KNOWLEDGE"),
    metrics=lambda knowledge, families: knowledge.metric_families(families))
