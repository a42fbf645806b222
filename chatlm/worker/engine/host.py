"""What a step computes on the host: masks of grammars, log-probabilities, scores of prompts, embeddings."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence as Seq
from typing import Any, TYPE_CHECKING

import numpy

from chatlm.common.messages.requests import PromptScores, TokenLogprob
from chatlm.worker.engine.batching import make_batch, sample_rows
from chatlm.worker.ops.sampling import clean_logits, penalize, sample_each, top_ids

if TYPE_CHECKING:
    from chatlm.common.messages.requests import WorkerEvent
    from chatlm.worker.engine.answer_maker import AnswerMaker
    from chatlm.worker.engine.embedding import Pooler
    from chatlm.worker.engine.sequence import Chunk, Sequence
    from chatlm.worker.kernels.kernels import StepRunner
    from chatlm.worker.model.transformer import Transformer
    from chatlm.worker.ops.rows import SampleRow


class HostSteps:
    """Steps whose logits or hidden states the host needs. No other step may be under way meanwhile."""

    def __init__(self, transformer: Transformer, runner: StepRunner, answers: AnswerMaker,
                 texts: Pooler | None, emit: Callable[[Sequence, WorkerEvent], None]):
        self.transformer = transformer
        self.runner = runner
        self.answers = answers
        self.texts = texts
        self.emit = emit

    def run(self, plan: Seq[Chunk]) -> tuple[list[Chunk], Callable[[], list[int]]]:
        """Run a step; returns the chunks that advanced, and a function that returns the drawn tokens."""
        if not plan:
            return [], list
        batch = make_batch(plan, self.transformer.model)
        if self.transformer.model.token_types:
            batch.previous_token_ids[:] = self._token_types(plan)
        logits = self.runner.forward(batch)
        self.transformer.arrays.wait(logits)
        for chunk, (first, last) in zip(plan, itertools.pairwise(batch.starts)):
            if chunk.sequence.pooling:
                assert self.texts    # else the engine has refused the sequence
                self.texts.pool(chunk, first, last)
        late = self._without_mask(plan)
        rows = itertools.accumulate((chunk.rows for chunk in plan), initial=0)
        spans = [(chunk, range(first, last))
                 for chunk, (first, last) in zip(plan, itertools.pairwise(rows)) if chunk not in late]
        tokens = self._draw(spans, logits)
        return [chunk for chunk, _ in spans], lambda: tokens

    def _without_mask(self, plan: Seq[Chunk]) -> list[Chunk]:
        """The chunks whose masks are late. They are computed again once their masks are ready."""
        deadline_s = time.monotonic() + self.answers.MASK_PATIENCE_S
        return [chunk for chunk in plan
                if chunk.draws and not self.answers.masked(chunk.sequence, deadline_s)]

    def _token_types(self, plan: Seq[Chunk]) -> list[int]:
        """The type of each token of a step: 1 in the second text of a pair, else 0."""
        embedder = self.answers.tokenizer.spec.embedder
        between = embedder.between[:1] if embedder else ()
        types: list[int] = []
        for chunk in plan:
            tokens = chunk.sequence.tokens
            second = len(tokens)  # where the second text begins
            if chunk.sequence.pooling == "rank" and self.transformer.model.token_types > 1:
                second = next((i + 1 for i, token in enumerate(tokens) if (token,) == between), second)
            types += [int(i >= second) for i in range(len(tokens))]
        return types

    def _draw(self, spans: Seq[tuple[Chunk, range]], logits) -> list[int]:
        """Score prompts, ban tokens that the grammars reject, draw, and record log-probabilities.

        spans: chunks and their rows of the logits (R, V)."""
        drawn = self._score_prompts(spans, logits)
        plan = [chunk for chunk, _ in spans]
        rows = sample_rows(plan, self.answers.tokenizer.stop_tokens)
        if not rows:
            return []
        arrays = self.transformer.arrays
        logits = logits if len(drawn) == len(logits) else logits[drawn]  # (len(rows), V)
        draws = [(chunk, i) for chunk in plan for i in range(chunk.draws)]
        lines = {at: host_row(arrays.numpy(logits[at])) for at, (chunk, _) in enumerate(draws)
                 if chunk.sequence.work.params.logprobs is not None}
        for line, (chunk, i) in zip(logits, draws):
            grammar = chunk.sequence.output.grammar
            if grammar and (allowed := grammar.allowed(len(line), i)) is not None:
                line[arrays.of(~allowed)] = -math.inf
        tokens = sample_each(self.transformer.kernels.sample, logits, rows)
        record_logprobs(draws, tokens, rows, lines)
        return tokens

    def _score_prompts(self, spans: Seq[tuple[Chunk, range]], logits) -> list[int]:
        """Send the scores of prompts; returns the rows of the logits from which tokens are drawn."""
        drawn: list[int] = []
        for chunk, rows in spans:
            if chunk.sequence.scoring:
                scores = score_prompt(chunk, self.transformer.arrays.numpy(logits[rows.start:rows.stop]))
                if scores:  # sent at once: the scores of a long prompt take 100 MB
                    self.emit(chunk.sequence, PromptScores(scores))
            drawn += rows[len(rows) - chunk.draws:]
        return drawn


def record_logprobs(draws: Seq[tuple[Chunk, int]], tokens: Seq[int], rows: Seq[SampleRow],
                    lines: dict[int, Any]):
    """Note the log-probabilities of drawn tokens in their sequences, but for those after a wrong draft.

    draws: (chunk, index among its draws) of each token. lines: the clean logits of those wanted, by place."""
    void = False
    for at, (chunk, i) in enumerate(draws):
        void = i > 0 and (void or tokens[at - 1] != chunk.draft[i - 1])
        if at in lines and not void:
            params = chunk.sequence.work.params
            logprob = logprob_of(penalize(lines[at], rows[at]), tokens[at], params.logprobs or 0,
                                 params.logprob_ids)
            chunk.sequence.output.logprobs[i:] = [logprob]


def host_row(logits: numpy.ndarray) -> numpy.ndarray:
    """A cleaned copy of one row of logits (V,), float32."""
    return clean_logits(logits.copy())


def logprob_of(logits: numpy.ndarray, token: int, top: int, named: Seq[int] = ()) -> TokenLogprob:
    """A token's log-probability in its row of clean logits (V,), with those of the `top` most likely tokens
    and of the tokens `named`."""
    with numpy.errstate(over="ignore"):
        weights = numpy.exp(logits - logits.max())
    total = float(logits.max()) + math.log(float(weights.sum(dtype=numpy.float64)))
    ids = dict.fromkeys([*(top_ids(logits, top).tolist() if top else ()), *named])
    return TokenLogprob(token, float(logits[token]) - total,
                        tuple((id_, float(logits[id_]) - total) for id_ in ids))


def score_prompt(chunk: Chunk, logits) -> tuple[TokenLogprob, ...]:
    """Log-probabilities of the prompt tokens that follow those of a chunk, from their logits (rows, V).
    Those already scored are left out: a sequence that was preempted, or whose worker died, starts over."""
    sequence = chunk.sequence
    output = sequence.output
    ids = sequence.work.prompt_ids
    top = sequence.work.params.prompt_logprobs
    first = sequence.computed + chunk.count - len(logits)  # position of the first row's token
    scores = [TokenLogprob(ids[0], None)] if output.scored == 0 else []
    for position, line in enumerate(logits, first + 1):
        if max(1, output.scored) <= position < len(ids):
            row = host_row(line)
            rank = 1 + int((row > row[ids[position]]).sum())
            scores.append(logprob_of(row, ids[position], top or 0)._replace(rank=rank))
    output.scored += len(scores)
    return tuple(scores)
