"""What a search asks of models: the vector of a question, and how well passages answer it."""

from __future__ import annotations

import secrets
import struct
from collections.abc import Sequence as Seq
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.messages.requests import AnswerParams, Embedding, Request, Retrieval
from chatlm.front.annexes.knowledge.embedding import Chosen
from chatlm.front.api.dialects.retrieval import decoded_vector

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Embedder
    from chatlm.front.annexes.knowledge.embedding import Embedders


class Asker(NamedTuple):
    """For whom a search is done."""

    client: str                 # takes turns with other clients, and pays
    owner: str                  # owns KV pages
    low_priority: bool = False  # as the answer that needs the search
    temporary: bool = False     # as that answer: nothing of the question stays here


class Asking:
    """The models that searches use, whatever models a key is limited to: who may search a store may have a
    question embedded for it."""

    def __init__(self, embedders: Embedders):
        self.embedders = embedders

    def _trained(self) -> list[Chosen]:
        """The models that are served for texts alone."""
        found = list[Chosen]()
        for served in self.embedders.catalogue.registry.served_models(()):
            if served.adapter or served.failed:
                continue
            embedder: Embedder | None = served.pool.tokenizer and served.pool.tokenizer.spec.embedder
            if embedder:
                found.append(Chosen(served, embedder))
        return found

    def embedder(self, digest: str) -> Chosen | None:
        """The served embedder with these weights; one whose weights are not known yet, because it was not
        loaded, if there is no other."""
        found = [chosen for chosen in self._trained() if chosen.embedder.pooling != "rank"]
        for known in (digest, ""):
            for chosen in found:
                if chosen.digest == known:
                    return chosen
        return None

    def reranker(self) -> Chosen | None:
        """The first model that scores pairs of a question and a text; None if none is served."""
        return next((chosen for chosen in self._trained() if chosen.embedder.pooling == "rank"), None)

    async def vector(self, chosen: Chosen, question: str, asker: Asker) -> bytes:
        """The vector of a question, as float32. What does not fit into the embedder's context is cut."""
        [vector] = await self.embedders.vectors(chosen, [question], asker.client, asker.owner, "query",
                                                self._is_low(asker), temporary=asker.temporary)
        return struct.pack(f"<{len(vector)}f", *vector)

    async def scores(self, chosen: Chosen, question: str, passages: Seq[str], asker: Asker) -> list[float]:
        """How well each passage answers a question: raw scores."""
        low = self._is_low(asker)
        params = AnswerParams(pooling="rank", client=asker.client, owner=asker.owner,
                              temporary=asker.temporary, urgent=not low)
        request = Request(id=secrets.token_hex(16), params=params, low_priority=low,
                          prompts=tuple(passages), truncate=True,
                          retrieval=Retrieval(queries=(question,), cut=True))
        scores = [0.0] * len(passages)
        async with self.embedders.answers.begin(chosen.served.pool, request,
                                                chosen.served.name) as (_, events):
            async for event in events:
                if isinstance(event, Embedding):
                    [scores[event.choice]] = decoded_vector(event)
        return scores

    def _is_low(self, asker: Asker) -> bool:
        """Does a search wait for all else? It does for a key that is over its budget."""
        budgets = self.embedders.ledger.budgets
        return asker.low_priority or budgets is not None and budgets.is_over(asker.client)
