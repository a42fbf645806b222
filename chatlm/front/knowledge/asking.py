"""What knowledge asks of models: the vector of a question, and how well passages answer it."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Iterator, Sequence as Seq
from dataclasses import replace
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.jsontext import dump
from chatlm.common.messages.requests import Embedding
from chatlm.front.intake.arrival import Caller
from chatlm.front.intake.budget import Holding

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Embedder
    from chatlm.front.front import Front
    from chatlm.front.pool.models import Model


class Asker(NamedTuple):
    """For whom a search is done."""

    client: str                 # takes turns with other clients, and pays
    owner: str                  # owns KV pages
    low_priority: bool = False  # as the answer that needs the search


class QuestionVector(NamedTuple):
    data: bytes    # float32, little-endian
    embedder: str  # the digest of the weights that made it


class Asking:
    """The models that knowledge uses, whoever may use them otherwise: a key that is limited to some models
    may search its stores."""

    def __init__(self, front: Front):
        self.front = front
        self.catalogue = front.catalogue

    def embedder(self) -> Model | None:
        """The first model that was trained to make vectors; None if none is served."""
        return next((model for model, embedder in self._trained() if embedder.pooling != "rank"), None)

    def reranker(self) -> Model | None:
        """The first model that was trained to score pairs of a question and a text."""
        return next((model for model, embedder in self._trained() if embedder.pooling == "rank"), None)

    def _trained(self) -> Iterator[tuple[Model, Embedder]]:
        for model in self.catalogue.registry.models:
            tokenizer = model.pool and model.pool.tokenizer
            if tokenizer and tokenizer.spec.embedder:
                yield model, tokenizer.spec.embedder

    async def vector(self, model: Model, question: str, asker: Asker) -> QuestionVector:
        """The vector of a question. What does not fit into the model's context is cut."""
        [data] = await self._asked("/v1/embeddings", {
            "model": model.name, "input": question, "input_type": "query", "truncate_prompt_tokens": -1}, asker)
        assert model.pool
        return QuestionVector(data, model.pool.supervisor.card.facts.digest)

    async def scores(self, model: Model, question: str, passages: Seq[str], asker: Asker) -> list[bytes]:
        """How well passages answer a question: a raw score of each, float32."""
        return await self._asked("/v1/rerank", {
            "model": model.name, "query": question, "documents": [*passages]}, asker)

    async def _asked(self, route: str, body: dict, asker: Asker) -> list[bytes]:
        """The vectors that a body asks for, which is charged to the client."""
        intake = self.front.bodies.intake
        caller = Caller(route, asker.client, asker.owner)
        with Holding(intake.budget, asker.client) as holding, Holding(intake.budget, asker.client) as reading:
            async with intake.opened(caller, dump(body)) as arrival:
                served, parsed = await intake.answer(arrival, reading, holding)
            params = replace(parsed.request.params, client=asker.client, owner=asker.owner)
            request = replace(parsed.request, id=secrets.token_hex(16), params=params,
                              low_priority=asker.low_priority)
            budgets = self.front.ledger.budgets
            if budgets and budgets.is_over(asker.client, [(request, served.pool.context_length)]):
                request = replace(request, low_priority=True)
            vectors: dict[int, bytes] = {}
            async with self.front.answers.begin(served.pool, request, served.name) as (_, events):
                async for event in events:
                    if isinstance(event, Embedding):
                        vectors[event.choice] = base64.b64decode(event.vector)
        return [vectors[choice] for choice in sorted(vectors)]
