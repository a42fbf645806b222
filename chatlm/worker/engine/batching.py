"""A step's plan as one batch for the model, and how a token is drawn from each of its rows of logits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence as Seq
from dataclasses import replace
from typing import TYPE_CHECKING

from chatlm.worker.model.batch import Batch
from chatlm.worker.ops.rows import SampleRow

if TYPE_CHECKING:
    import numpy
    from chatlm.worker.engine.sequence import Chunk, Sequence
    from chatlm.worker.model.blocks.model import Model


def make_batch(plan: Seq[Chunk], model: Model | None = None) -> Batch:
    """Flatten the plan into one forward pass of a model, sequence after sequence."""
    adapters = [chunk.sequence.adapter for chunk in plan]
    reads_hidden = any(chunk.sequence.pooling or chunk.sequence.needs_hidden for chunk in plan)
    batch = Batch([], [], [0], [], [], [], reads_hidden, state_reads=[], write_rows=[], write_slots=[],
                  adapters=adapters if any(adapters) else [])
    for chunk in plan:
        before, *ids = chunk.ids
        begin = len(batch.token_ids)
        end = begin + len(ids)
        batch.token_ids.extend(ids)
        batch.previous_token_ids.append(before)
        batch.previous_token_ids.extend(ids[:-1])
        batch.starts.append(end)
        batch.lengths.append(chunk.sequence.computed + len(ids))
        batch.tables.append(chunk.sequence.pages)
        batch.logit_rows.extend(range(end - chunk.rows, end))
        batch.state_reads.append(chunk.reads)
        for token, slot in chunk.writes:
            batch.write_rows.append(begin + token)
            batch.write_slots.append(slot)
    return with_pictures(batch, plan, model) if model and model.sees else batch


def with_pictures(batch: Batch, plan: Seq[Chunk], model: Model) -> Batch:
    """The batch with what rows of pictures need too."""
    if model.picture_pad is not None:
        batch.previous_token_ids[:] = pad_ids(batch.token_ids, model.picture_pad, model.vocab_size)
    ahead = [0] * len(batch.token_ids)
    for chunk, start, last in zip(plan, batch.starts, batch.starts[1:]):
        first = chunk.sequence.computed
        for begin, end in chunk.sequence.spans(first, first + last - start):
            rows = slice(start + max(begin - first, 0), start + end - first)
            ahead[rows] = [end] * (rows.stop - rows.start)
    return batch._replace(ahead=ahead if any(ahead) else [], turns=turns_of(plan))


def pad_ids(token_ids: Iterable[int], pad: int, vocab_size: int) -> list[int]:
    """The previous_token_ids of a model with a picture_pad."""
    return [pad if token == vocab_size else vocab_size for token in token_ids]


def turns_of(plan: Seq[Chunk]) -> list[int]:
    """Batch.turns, of models whose positions are not those of tokens where pictures are."""
    if not any(chunk.sequence.placeholders and chunk.sequence.placeholders.turns for chunk in plan):
        return []
    turns = list[int]()
    for chunk in plan:
        first = chunk.sequence.computed
        count = len(chunk.ids) - 1
        placeholders = chunk.sequence.placeholders
        if placeholders and placeholders.turns:
            turns += placeholders.turned(first, count, len(turns))
        else:
            turns += range(first, first + count)
    return turns


def sample_rows(plan: Seq[Chunk], eos_tokens: frozenset[int]) -> list[SampleRow]:
    """How to draw each token of a step, in the order of its rows of logits."""
    return [sample_row(chunk.sequence, eos_tokens, i) for chunk in plan for i in range(chunk.draws)]


def sample_row(sequence: Sequence, eos_tokens: frozenset[int], offset: int = 0) -> SampleRow:
    """How to draw a sequence's next token, or the one `offset` tokens after it: with which parameters, at
    which absolute position, and which tokens penalties count."""
    work = sequence.work
    params = sequence.work.params
    sampling = sequence.work.sampling
    if sequence.generated + offset < params.min_tokens and not params.ignore_eos:
        banned = tuple((token, -math.inf) for token in sorted(eos_tokens | set(params.stop_token_ids)))
        sampling = replace(sampling, logit_bias=sampling.logit_bias + banned)
    return SampleRow(sampling, len(sequence.tokens) + offset, *sequence.counted, sequence.output.kept)


def picture_rows(plan: Seq[Chunk]) -> list[tuple[int, numpy.ndarray, numpy.ndarray | None]]:
    """The rows of pictures in a step, as show_pictures takes them."""
    found = []
    begin = 0
    for chunk in plan:
        if placeholders := chunk.sequence.placeholders:
            found += [(begin + first, *rows)
                      for first, *rows in placeholders.rows(chunk.sequence.computed, chunk.count)]
        begin += chunk.count + len(chunk.draft)
    return found
