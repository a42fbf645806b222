"""`Batch`: what a step computes, and the forms in which ops and blocks read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Seq
from typing import Any, NamedTuple

from chatlm.common.config import PAGE_SIZE


class Batch(NamedTuple):
    """A step: the T new tokens of N sequences, one sequence after another, those with one token first."""

    token_ids: list[int]           # (T); ~i stands for the token that row i of the step before is drawing
    previous_token_ids: list[int]  # (T): the tokens before these, -1 at position 0; or token types, or what
                                   # Model.picture_pad says
    starts: list[int]              # (N + 1): tokens starts[i] .. starts[i + 1] - 1 belong to sequence i
    lengths: list[int]             # (N): how many keys sequence i has after this step
    tables: list[list[int]]        # (N): pages of sequence i, in order; of each group of layers in turn
    logit_rows: list[int]          # (R): which of the T rows need logits
    states: bool = False           # are the hidden states of all T rows needed?
    state_reads: list[int] = []    # (N): the slot with the state before the new tokens; any at position 0
    write_rows: list[int] = []     # rows after which states are written, ascending
    write_slots: list[int] = []    # the slot for each of these rows
    adapters: list[int] = []       # (N): the slot of each sequence's adapter, 0: none; []: nobody has one
    turns: list[int] = []          # (T): row of the rotary tables for each token; []: rows are positions
    ahead: list[int] = []          # (T), or []: in two-sided layers a token sees all positions below this,
                                   # even those after itself; 0: it sees those up to itself


class Sequences(NamedTuple):
    """What layers with states read of a step's sequences. Lists are as in Batch."""

    starts: list[int]
    firsts: list[int]              # (N): the position of each sequence's first new token
    reads: list[int]
    writes: list[tuple[int, int]]  # (row, slot)

    @classmethod
    def of(cls, batch: Batch) -> Sequences:
        firsts = [length - end + start
                  for length, start, end in zip(batch.lengths, batch.starts, batch.starts[1:])]
        return cls(batch.starts, firsts, batch.state_reads, list(zip(batch.write_rows, batch.write_slots)))


class Inputs(NamedTuple):
    """A Batch as the ops read it: int64 tensors on the device, and the plan of attention.

    `parts[group]` has the slots and the plan of a group of layers. Those of group 0 are also here."""

    token_ids: Any           # (T,)
    previous_token_ids: Any  # (T,)
    positions: Any           # (T,)
    slots: Any               # (T,) page * PAGE_SIZE + offset: k and v are written there
    logit_rows: Any          # (R,)
    attention: Any           # the kernels' plan: where each row finds its keys
    parts: tuple = ()
    sequences: Any = None    # Sequences, for layers that keep states
    adapters: Any = None     # RowAdapters
    turns: Any = None        # (T,) rows of the rotary tables


class RowAdapters(NamedTuple):
    """Which rows of a step have which adapter: (its matrices by name, the rows) for each adapter.

    `tokens` counts rows of tokens; `logits` counts logit rows, for the head."""

    tokens: Seq[tuple[Mapping[str, Any], list[int]]] = ()
    logits: Seq[tuple[Mapping[str, Any], list[int]]] = ()

    @classmethod
    def of(cls, batch: Batch, adapters: Mapping[int, Mapping[str, Any]]) -> RowAdapters:
        owner = []  # the slot of each row's adapter
        for slot, first, end in zip(batch.adapters, batch.starts, batch.starts[1:]):
            owner += [slot] * (end - first)
        slots = [slot for slot in dict.fromkeys(batch.adapters) if slot]

        def rows_of(owners: Seq[int]) -> list[tuple[Mapping[str, Any], list[int]]]:
            return [(adapters.get(slot, {}), [row for row, owner in enumerate(owners) if owner == slot])
                    for slot in slots]

        return cls(rows_of(owner), rows_of([owner[row] for row in batch.logit_rows]))

    def of_matrix(self, name: str) -> list[tuple[list[int], Any]]:
        """(rows, what their adapter adds to the product with a matrix) for each adapter that changes it."""
        owned = self.logits if name == "head" else self.tokens
        return [(rows, matrices[name]) for matrices, rows in owned if name in matrices and rows]


def token_places(batch: Batch) -> tuple[Seq[int], Seq[int]]:
    """The position of each new token in its sequence, and the slot for its keys and values."""
    counts = [end - start for start, end in zip(batch.starts, batch.starts[1:])]
    pairs = [(position, table[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE)
             for count, length, table in zip(counts, batch.lengths, batch.tables)
             for position in range(length - count, length)]
    positions, slots = zip(*pairs)
    return positions, slots
