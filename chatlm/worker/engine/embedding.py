"""Texts that become vectors, and pairs of texts that become scores, from the model's hidden states."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy

from chatlm.common.messages.requests import Embedding, Ended, Failed
from chatlm.worker.model.head import Head

if TYPE_CHECKING:
    from chatlm.common.messages.requests import WorkerEvent
    from chatlm.worker.engine.sequence import Chunk, Sequence
    from chatlm.worker.model.transformer import Transformer


class Pooler:
    """Pools the hidden states (C,) float64 of a text while its chunks are computed: their mean, the first or
    the last. A model's head turns what is pooled into a vector, or into the score of a pair."""

    def __init__(self, transformer: Transformer, head: Head, ranking: numpy.ndarray | None):
        """ranking: (C,), whose product with the last hidden state is the score of a pair, where the head has
        no layers. None: the model ranks no texts then."""
        self.transformer = transformer
        self.head = head
        self.ranking = ranking

    def pool(self, chunk: Chunk, first: int, last: int):
        """Pool the hidden states of a chunk, which are the rows [first, last) of the step.

        They are added one by one, so that the sum has the same bits however the prompt was split."""
        sequence = chunk.sequence
        output = sequence.output
        pooling = self.head.pools if sequence.pooling == "rank" else sequence.pooling
        size = len(sequence.tokens)
        unpooled = min(sequence.work.params.unpooled, size - 1)  # tokens that a mean leaves out
        begin = min(first + max(unpooled - sequence.computed, 0), last)
        rows = {"mean": (begin, last), "cls": (begin, begin + 1), "last": (last - 1, last)}[pooling]
        if pooling != "mean" or sequence.computed == 0:  # a sequence that was preempted starts over
            output.pooled = 0.0
        if rows[0] < last:
            for row in self.transformer.hidden_states(*rows):
                output.pooled = output.pooled + row
        if pooling == "mean" and chunk.count == sequence.pending:
            output.pooled = output.pooled / (size - unpooled)

    def events(self, sequence: Sequence) -> list[WorkerEvent]:
        """The end of a sequence whose hidden states have been pooled."""
        pooled = self.head(sequence.output.pooled)
        if sequence.pooling == "rank" and not self.head.layers:
            if self.ranking is None:
                return [Failed("this model ranks no texts")]
            pooled = numpy.array([pooled @ self.ranking])
        vector = shaped_vector(pooled, sequence)
        if not numpy.isfinite(vector).all():
            return [Failed("the model's hidden states are not finite")]
        output = sequence.output
        usage = replace(output.usage, compute_s=output.compute_s)
        return [Embedding(base64.b64encode(vector.tobytes()).decode()),
                Ended("stop", None, usage, output.queued_s or 0.0)]


def shaped_vector(pooled: numpy.ndarray, sequence: Sequence) -> numpy.ndarray:
    """A vector (C,) float64, cut and scaled to length 1 as its request asks, in float32; of a pair the score
    (1,), as it is."""
    params = sequence.work.params
    vector = pooled[:params.dimensions or None]
    if params.normalized and params.pooling != "rank":
        vector = vector / numpy.linalg.norm(vector)
    with numpy.errstate(over="ignore"):
        return vector.astype("<f4")
