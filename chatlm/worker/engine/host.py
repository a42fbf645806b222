"""What a step computes on the host: masks of grammars, log-probabilities, scores of prompts, embeddings."""

from __future__ import annotations

import base64
import itertools
import math
import time
from collections.abc import Callable, Sequence as Seq
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy

from chatlm.common.messages.requests import Embedding, Ended, Failed, PromptScores, TokenLogprob
from chatlm.worker.engine.batch import make_batch, sample_rows
from chatlm.worker.model.head import Head
from chatlm.worker.ops.sampling import clean_logits, penalize, sample_each, top_ids

if TYPE_CHECKING:
    from chatlm.common.messages.requests import AnswerParams, WorkerEvent
    from chatlm.worker.engine.answer_maker import AnswerMaker
    from chatlm.worker.engine.sequence import Chunk, Output, Sequence
    from chatlm.worker.model.transformer import Transformer


class HostSteps:
    """Steps whose logits or hidden states the host needs. No other step may be under way meanwhile."""

    def __init__(self, transformer: Transformer, steps, answers: AnswerMaker,
                 emit: Callable[[Sequence, WorkerEvent], None], head: Head = Head()):
        self.transformer = transformer
        self.steps = steps
        self.answers = answers
        self.emit = emit
        self.head = head

    def run(self, plan: Seq[Chunk]) -> tuple[list[Chunk], Callable[[], list[int]]]:
        """Run a step; returns the chunks that advanced, and a function that returns the drawn tokens."""
        if not plan:
            return [], list
        batch = make_batch(plan, self.transformer.model)
        if self.transformer.model.token_types:
            batch.previous_token_ids[:] = self._token_types(plan)
        logits = self.steps.forward(batch)
        self.transformer.arrays.wait(logits)
        for chunk, (first, last) in zip(plan, itertools.pairwise(batch.starts)):
            if chunk.sequence.pooling:
                pool(self.transformer, chunk, first, last, self.head.pools)
        late = []
        deadline_s = time.monotonic() + self.answers.MASK_PATIENCE_S
        for chunk in plan:
            if chunk.draws and not self.answers.masked(chunk.sequence, deadline_s):
                late.append(chunk)  # computed again once its mask is ready
        rows = list(itertools.accumulate((chunk.rows for chunk in plan), initial=0))
        spans = [(chunk, range(first, last))
                 for chunk, (first, last) in zip(plan, itertools.pairwise(rows)) if chunk not in late]
        tokens = self._draw(spans, logits)
        return [chunk for chunk, _ in spans], lambda: tokens

    def _token_types(self, plan: Seq[Chunk]) -> list[int]:
        """The type of each token of a step: 1 in the second text of a pair, else 0."""
        embedder = self.answers.tokenizer.spec.embedder
        types = []
        between = embedder.between[:1] if embedder else ()
        for chunk in plan:
            tokens = chunk.sequence.tokens
            second = len(chunk.sequence.tokens)
            if chunk.sequence.pooling == "rank" and self.transformer.model.token_types > 1:
                second = next((i + 1 for i, token in enumerate(tokens) if (token,) == between), second)
            types += [int(i >= second) for i in range(len(tokens))]
        return types

    def _draw(self, spans: Seq[tuple[Chunk, range]], logits) -> list[int]:
        """Score prompts, ban tokens the grammars reject, draw, and record logprobs.

        spans: chunks and their rows of the logits (R, V)."""
        drawn = []
        plan = [chunk for chunk, _ in spans]
        arrays = self.transformer.arrays
        for chunk, mine in spans:
            if chunk.sequence.scoring:
                if scores := score_prompt(chunk, arrays.numpy(logits[mine.start:mine.stop])):
                    # Sent at once: the scores of a long prompt take 100 MB.
                    self.emit(chunk.sequence, PromptScores(scores))
            drawn += mine[len(mine) - chunk.draws:]
        rows = sample_rows(plan, self.answers.tokenizer.stop_tokens)
        if not rows:
            return []
        logits = logits if len(drawn) == len(logits) else logits[drawn]  # (len(rows), V)
        draws = [(chunk, i) for chunk in plan for i in range(chunk.draws)]
        lines = {at: host_row(arrays.numpy(logits[at])) for at, (chunk, _) in enumerate(draws)
                 if chunk.sequence.work.params.logprobs is not None}
        for line, (chunk, i) in zip(logits, draws):
            grammar = chunk.sequence.output.grammar
            if grammar and (allowed := grammar.allowed(len(line), i)) is not None:
                line[arrays.of(~allowed)] = -math.inf
        tokens = sample_each(self.transformer.kernels.sample, logits, rows)
        void = False
        for at, (chunk, i) in enumerate(draws):
            void = i > 0 and (void or tokens[at - 1] != chunk.draft[i - 1])
            if at in lines and not void:
                output = chunk.sequence.output
                own = chunk.sequence.work.params
                output.logprobs[i:] = [logprob_of(penalize(lines[at], rows[at]), tokens[at],
                                                  own.logprobs or 0, own.logprob_ids)]
        return tokens


def pool(transformer: Transformer, chunk: Chunk, first: int, last: int, of_pairs: str = "last"):
    """Pool the hidden states of a chunk, the rows [first, last) of the step; `of_pairs`: how those of a pair
    are pooled. They are added one by one, so that the sum has the same bits however the prompt was split."""
    output = chunk.sequence.output
    pooling = chunk.sequence.pooling
    pooling = of_pairs if pooling == "rank" else pooling
    size = len(chunk.sequence.tokens)
    computed = chunk.sequence.computed
    unpooled = min(chunk.sequence.work.params.unpooled, size - 1)
    start = min(first + max(unpooled - computed, 0), last)  # of the rows that count
    rows = {"mean": (start, last), "cls": (start, start + 1), "last": (last - 1, last)}[pooling]
    if pooling != "mean" or computed == 0:  # a sequence that was preempted starts over
        output.pooled = 0.0
    if rows[0] < last:
        for row in transformer.hidden_states(*rows):
            output.pooled = output.pooled + row
    if pooling == "mean" and chunk.count == chunk.sequence.pending:
        output.pooled = output.pooled / (size - unpooled)


def embedding_events(pooled: numpy.ndarray, params: AnswerParams, output: Output) -> list[WorkerEvent]:
    """The end of a sequence that was embedded: its vector (C,) float64, cut and scaled to length 1 as asked,
    or the score (1,) of its pair, as it is."""
    vector = pooled[:params.dimensions or None]
    if params.normalized and params.pooling != "rank":
        vector = vector / numpy.linalg.norm(vector)
    with numpy.errstate(over="ignore"):
        vector = vector.astype("<f4")
    if not numpy.isfinite(vector).all():
        return [Failed("the model's hidden states are not finite")]
    usage = replace(output.usage, compute_s=output.compute_s)
    return [Embedding(base64.b64encode(vector.tobytes()).decode()),
            Ended("stop", None, usage, output.queued_s or 0.0)]


def host_row(logits: numpy.ndarray) -> numpy.ndarray:
    """A cleaned copy of one row of logits (V,), float32."""
    return clean_logits(logits.copy())


def logprob_of(logits: numpy.ndarray, token: int, top: int, named: Seq[int] = ()) -> TokenLogprob:
    """A token's log-probability in its row of clean logits (V,), the `top` most likely tokens, and those
    `named` beside them."""
    with numpy.errstate(over="ignore"):
        weights = numpy.exp(logits - logits.max())
    total = float(logits.max()) + math.log(float(weights.sum(dtype=numpy.float64)))
    ids = dict.fromkeys([*(top_ids(logits, top).tolist() if top else ()), *named])
    return TokenLogprob(token, float(logits[token]) - total,
                        tuple((id_, float(logits[id_]) - total) for id_ in ids))


def score_prompt(chunk: Chunk, logits) -> tuple[TokenLogprob, ...]:
    """Log-probabilities of the prompt tokens one after the chunk's last, from their logits (rows, V).
    Skips those already scored: a sequence that was preempted, or whose worker died, starts over."""
    sequence = chunk.sequence
    first = chunk.sequence.computed + chunk.count - len(logits)
    ids = sequence.work.prompt_ids
    top = sequence.work.params.prompt_logprobs
    output = sequence.output
    scores = [TokenLogprob(ids[0], None)] if output.scored == 0 else []
    for position, line in enumerate(logits, first + 1):
        if max(1, output.scored) <= position < len(ids):
            row = host_row(line)
            rank = 1 + int((row > row[ids[position]]).sum())
            scores.append(logprob_of(row, ids[position], top or 0)._replace(rank=rank))
    output.scored += len(scores)
    return tuple(scores)
