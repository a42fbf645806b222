"""The embedder of vector stores, and vectors of texts through the path of all embeddings."""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Sequence as Seq
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.errors import EngineFailure, Overloaded, RequestError, shown
from chatlm.common.messages.requests import AnswerParams, Embedding, Request, Retrieval
from chatlm.front.annexes.knowledge.stores import Embedded
from chatlm.front.api.dialects.retrieval import chosen_prompt, decoded_vector
from chatlm.front.intake.intake import loaded_tokenizer
from chatlm.front.server.ledger import Charge

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Embedder
    from chatlm.front.pool.catalogue import Catalogue
    from chatlm.front.pool.models import ModelOrAdapter
    from chatlm.front.server.access import Owners
    from chatlm.front.server.answering import Answers
    from chatlm.front.server.ledger import Ledger


NO_EMBEDDER = "this server has no model that embeds texts: start it with --embedder"


class Chosen(NamedTuple):
    """A served model that embeds texts."""

    served: ModelOrAdapter
    embedder: Embedder

    @property
    def longest(self) -> int:
        """Tokens of a text, special ones included."""
        return min(self.embedder.longest, self.served.pool.context_length)

    @property
    def special(self) -> int:
        return len(self.embedder.begins) + len(self.embedder.ends)

    @property
    def dimensions(self) -> int:
        return self.embedder.dimensions or self.embedder.size

    @property
    def digest(self) -> str:
        """Of its weights; "" until it has been loaded once."""
        return self.served.pool.supervisor.card.facts.digest

    def count(self, text: str) -> int:
        """The tokens of a text, without special ones."""
        return len(loaded_tokenizer(self.served.pool).encode(text))


def no_embedder(message: str = NO_EMBEDDER) -> RequestError:
    return RequestError(message, status=409, code="no_embedder", param="embedding_model")


class Embedders:
    """Finds the embedder of a store, and asks it."""

    def __init__(self, catalogue: Catalogue, owners: Owners, answers: Answers, ledger: Ledger):
        self.catalogue = catalogue
        self.owners = owners
        self.answers = answers
        self.ledger = ledger

    def choose(self, name: str = "", bound: Seq[str] = ()) -> Chosen:
        """The embedder that a store asks for: the named one, else that of --embedder, else the first.

        bound: the models that a key is limited to. Raises RequestError 404 for an unknown name, 409 if none
        embeds, and Overloaded while nobody knows yet."""
        if name:
            served = self.catalogue.find(name, bound)
            if served.failed:
                raise no_embedder(f"{shown(name)} cannot be loaded: {served.public_reason}")
            embedder = loaded_tokenizer(served.pool).spec.embedder
            if embedder is None or embedder.pooling == "rank":
                raise no_embedder(f"{shown(name)} is not a model that embeds texts")
            return Chosen(served, embedder)
        usual = self.catalogue.settings.embedder
        loading = False
        found = list[Chosen]()
        for served in self.catalogue.registry.served_models(bound):
            if served.adapter or served.failed:
                continue
            tokenizer = served.pool and served.pool.tokenizer
            if not tokenizer:
                loading = True
                continue
            embedder = tokenizer.spec.embedder
            if embedder and embedder.pooling != "rank":
                found.append(Chosen(served, embedder))
        found.sort(key=lambda chosen: chosen.served.model.entry.path != usual)
        if found:
            return found[0]
        if loading:
            raise Overloaded("the models are still loading", retry_after_s=2)
        raise no_embedder()

    def bound_of(self, client: str) -> Seq[str]:
        """The models that a client's key is limited to; () if it is not limited."""
        return next((key.models for key in self.catalogue.settings.keys if key.name == client), ())

    async def vectors(self, chosen: Chosen, texts: Seq[str], client: str, owner: str, kind: str = "document",
                      low: bool = True, later: list[Charge] | None = None,
                      temporary: bool = False) -> list[tuple[float, ...]]:
        """The vectors of texts, each of length 1. What they cost is entered in the ledger, or in `later`.

        client: who asks; owner: of the texts; kind: document, or query, for which somebody waits as for an
        answer; low: it waits for all else; temporary: as of AnswerParams."""
        embedder = chosen.embedder
        params = AnswerParams(pooling=embedder.pooling, dimensions=embedder.dimensions, normalized=True,
                              client=client, owner=owner, temporary=temporary,
                              urgent=kind == "query" and not low)
        retrieval = Retrieval(chosen_prompt({"input_type": kind}, embedder), cut=True)
        request = Request(id=secrets.token_hex(16), params=params, low_priority=low, prompts=tuple(texts),
                          truncate=True, retrieval=retrieval)
        pool = chosen.served.pool
        if low and self.ledger.budgets:
            self.ledger.budgets.check_line(client, (request, pool.context_length))
        found: list[tuple[float, ...]] = [()] * len(texts)
        own = list[Charge]()
        try:
            async with self.answers.begin(pool, request, chosen.served.name,
                                          later=None if later is None else own) as (_, events):
                async for event in events:
                    if isinstance(event, Embedding):
                        found[event.choice] = decoded_vector(event)
        except BaseException:
            for charge in own:  # a failed try costs nothing
                self.ledger.release(charge)
            raise
        if later is not None:
            later += own
        if not all(found):
            raise EngineFailure("the embedder has left out a text")
        return found


def packed(vector: Seq[float]) -> Embedded:
    """A vector as int8 and a scale."""
    largest = max(map(abs, vector))
    scale = largest / 127 or 1.0
    return Embedded(array("b", [round(number / scale) for number in vector]).tobytes(), scale)
