"""Makes the prompts of models that embed texts or rank documents, cut to fit where that is allowed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence as Seq
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.client_words import too_long
from chatlm.common.config import LIMITS
from chatlm.common.errors import Overloaded, RequestError

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Embedder, Request, Retrieval
    from chatlm.common.text.tokenizer import Tokenizer


EMBEDS = "this model makes vectors of texts (/v1/embeddings, /api/embed, /v1/score)"
RANKS = "this model ranks documents for a query (/v1/rerank, /v1/score)"
PLACES = re.compile(r"\{(query|instruction)\}")  # filled in one go: what looks like one in a query is text
CANNOT = {"answer": "it cannot chat or continue texts", "embed": "it makes no vectors of texts",
          "rank": "it cannot rank documents, which takes a reranker"}


def task_for(pooling: str) -> str:
    """The task of a request with this AnswerParams.pooling: answer, embed or rank."""
    return {"": "answer", "rank": "rank"}.get(pooling, "embed")


def check_task(embedder: Embedder | None, task: str):
    """Raise RequestError if the model cannot do the task; the error says what the model can do."""
    if embedder is None:
        able = ("answer", "embed")
        does = "this model answers, and makes vectors of texts (/v1/embeddings)"
    else:
        able = (task_for(embedder.pooling),)
        does = RANKS if embedder.pooling == "rank" else EMBEDS
    if task not in able:
        raise RequestError(f"{does}; {CANNOT[task]}", code="unsupported_task", param="model")


class QueryHead(NamedTuple):
    """What stands before each document of one query."""

    text: str      # if query and document are encoded as one text
    ids: Seq[int]  # if they are encoded separately
    after: str     # what follows the document, if they are one text


def check_count(count: int, param: str):
    """Raise RequestError for texts that have too many tokens together."""
    if count > LIMITS.embedded_tokens:
        raise RequestError(f"{param}: {count:,} tokens given, at most {LIMITS.embedded_tokens:,} are allowed "
                           "in one request", code="limit_exceeded", param=param)


class RetrievalMaker:
    """Makes the prompts of texts, and of pairs of a query and a document, for one model."""

    def __init__(self, tokenizer: Tokenizer, embedder: Embedder, context_length: int,
                 start_of: Callable[..., str]):
        """start_of: returns a text, or its start if it is much longer than the context (see PromptMaker)."""
        self.tokenizer = tokenizer
        self.embedder = embedder
        self.start_of = start_of
        self.longest = min(embedder.longest, context_length)

    def prompts(self, request: Request, retrieval: Retrieval) -> tuple[tuple[int, ...], ...]:
        """The token ids of each text, or of each document with its query. Raises RequestError for what does
        not fit and may not be cut."""
        if request.params.pooling != self.embedder.pooling:
            raise Overloaded("the model was still loading when this request was read", retry_after_s=1)
        if not retrieval.queries:
            return tuple(tuple(self.text(text, retrieval, request.source, index))
                         for index, text in enumerate(request.prompts))
        documents = [str(document) for document in request.prompts]
        queries = retrieval.queries
        if len(queries) == 1:
            queries *= len(documents)
        size = sum(map(len, queries)) + len(retrieval.instruction or "") * len(documents)
        if size > LIMITS.ranked_characters:
            raise RequestError(f"the query is read again for each document, {size:,} characters in all; at "
                               f"most {LIMITS.ranked_characters:,} are allowed: send fewer documents",
                               code="limit_exceeded", param="query")
        heads = {query: self.head(query, retrieval) for query in dict.fromkeys(queries)}
        pairs = [tuple(self.pair(heads[query], document, retrieval))
                 for query, document in zip(queries, documents)]
        around = len(self.embedder.begins) + len(self.embedder.ends)
        check_count(sum(len(ids) - around - len(heads[query].ids) for query, ids in zip(queries, pairs)),
                    "documents")
        return tuple(pairs)

    def text(self, text: str | Seq[int], retrieval: Retrieval, param: str, index: int) -> Seq[int]:
        """The index-th text between its special tokens. Token ids stay as they are."""
        if isinstance(text, str):
            text = self.start_of(text, param, retrieval.cut)
            ids: Seq[int] = self.tokenizer.encode(retrieval.prompt + text)
            begins, ends = self.embedder.begins, self.embedder.ends
        else:
            ids = text
            begins, ends = (), ()
        most = self.longest if retrieval.most is None else min(self.longest, retrieval.most)
        room = max(most - len(begins) - len(ends), 0)
        if len(ids) > room and not retrieval.cut:
            raise self.too_long(f"{param}[{index}]", len(ids) + len(begins) + len(ends), param)
        return [*begins, *ids[:room], *ends]

    def unpooled(self, texts: Seq[str | Seq[int]], retrieval: Retrieval) -> int:
        """How many tokens at the beginning of each text are left out of the pooling: those of the prompt, if
        the model leaves it out.

        They are counted as in sentence-transformers: with the special tokens around the prompt, except the
        last one."""
        own = self.embedder
        if own.pools_prompt or not retrieval.prompt or not all(isinstance(text, str) for text in texts):
            return 0
        after = max(len(own.ends) - 1, 0)
        return len(own.begins) + len(self.tokenizer.encode(retrieval.prompt)) + after

    def head(self, query: str, retrieval: Retrieval) -> QueryHead:
        """What stands before each document of a query. Raises RequestError if it leaves no room for one."""
        own = self.embedder
        query = self.start_of(query, "query")
        instruction = own.instruction if retrieval.instruction is None else retrieval.instruction
        before, place, after = own.form.partition("{document}")
        text = PLACES.sub(lambda place: query if place[1] == "query" else instruction, before)
        ids = self.tokenizer.encode(text, begins=not own.begins) if place else self.tokenizer.encode(query)
        count = len(own.begins) + len(ids) + len(own.between) + len(own.ends)
        if count >= self.longest:
            raise self.too_long("query", count, "query")
        return QueryHead(text, [*ids, *own.between], after)

    def pair(self, head: QueryHead, document: str, retrieval: Retrieval) -> Seq[int]:
        """A query and a document between their special tokens. Only the document is ever cut."""
        own = self.embedder
        encode = self.tokenizer.encode
        document = self.start_of(document, "documents", retrieval.cut)
        if own.form:  # as one text: a token may span the end of the query and the start of the document
            ids = encode(head.text + document + head.after, begins=not own.begins)
        else:
            ids = [*head.ids, *encode(document)]
        room = self.longest - len(own.begins) - len(own.ends)
        most = len(ids) if retrieval.most is None else len(head.ids) + retrieval.most
        if min(len(ids), most) > room and not retrieval.cut:
            raise self.too_long("document with its query", len(ids) + self.longest - room, "documents")
        return [*own.begins, *ids[:min(room, most)], *own.ends]

    def too_long(self, what: str, count: int, param: str) -> RequestError:
        """The error for a text of `count` tokens, special tokens included."""
        return too_long(count, self.longest, what, param)
