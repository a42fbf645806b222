"""The hidden states that parts of an engine read after a step, before the next one overwrites them."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple, TYPE_CHECKING

if TYPE_CHECKING:
    from chatlm.worker.engine.part import EnginePart
    from chatlm.worker.engine.sequence import Chunk, Sequence
    from chatlm.worker.model.transformer import Transformer


class HiddenRows(NamedTuple):
    """Where the hidden states of a sequence are after a step."""

    sequence: Sequence
    first: int   # position of the first
    count: int   # tokens; the rows after these are of a draft
    rows: range  # of the step


def mark_hidden(plan: Seq[Chunk], parts: Seq[EnginePart]):
    """Note in a plan's sequences whether a part needs their hidden states after the step."""
    if not parts:
        return
    for chunk in plan:
        sequence = chunk.sequence
        sequence.needs_hidden = any(part.wants_hidden(sequence) for part in parts)


def hidden_rows(chunks: Seq[Chunk]) -> list[HiddenRows]:
    """The hidden states that are to be read after a step of these chunks."""
    needed = []
    row = 0
    for chunk in chunks:
        sequence = chunk.sequence
        end = row + chunk.count + len(chunk.draft)
        if sequence.needs_hidden:
            needed.append(HiddenRows(sequence, sequence.computed, chunk.count, range(row, end)))
        row = end
    return needed


def hand_over_hidden(hidden: Seq[HiddenRows], parts: Seq[EnginePart], transformer: Transformer
                     ) -> list[tuple[Sequence, Exception]]:
    """Give the hidden states of a finished step to the parts, before the next step overwrites them. Returns
    the sequences for which a part fails."""
    failed: list[tuple[Sequence, Exception]] = []
    for sequence, first, count, rows in hidden:
        states = transformer.hidden_states(rows.start, rows.stop)
        try:
            for part in parts:
                part.read_hidden(sequence, first, count, states)
        except Exception as error:
            failed.append((sequence, error))
    return failed
