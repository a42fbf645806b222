"""What one step computes (`Batch`), and how ops and blocks read that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Seq
from typing import Any, NamedTuple

from chatlm.common.config import PAGE_SIZE


class Batch(NamedTuple):
    """One flattened step: the T new tokens of N sequences, one after another; one-token sequences first."""

    token_ids: list[int]           # (T); ~i stands for the token that row i of the previous step is drawing
    previous_token_ids: list[int]  # (T); -1 at position 0. In a model with token types, or a picture_pad:
                                   # these
    starts: list[int]              # (N + 1): tokens starts[i] .. starts[i + 1] - 1 belong to sequence i
    lengths: list[int]             # (N): number of keys of sequence i after this step
    tables: list[list[int]]        # (N): pages of sequence i, in order; for each group of layers in turn
    logit_rows: list[int]          # (R): which of the T rows need logits
    states: bool = False           # are the hidden states of all T rows needed?
    state_reads: list[int] = []    # (N): the slot with the state before the new tokens; any at position 0
    write_rows: list[int] = []     # rows after which the state is written, ascending
    write_slots: list[int] = []    # the slot for each
    adapters: list[int] = []       # (N): the slot of each sequence's adapter, 0: none; []: none has one
    turns: list[int] = []          # (T): the row of the rotary tables of each token; []: its position
    ahead: list[int] = []          # (T), or []: the position before which a token sees all others in layers
                                   # that are two-sided, even those after itself; 0: those up to itself


class Sequences(NamedTuple):
    """What layers with states need to know of a step's sequences; lists as in Batch."""

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
    """A Batch as the ops read it: int64 tensors on the device, and attention's plan.

    `parts[group]` has a group's slots and plan; those of group 0 are also here."""

    token_ids: Any           # (T,)
    previous_token_ids: Any  # (T,)
    positions: Any           # (T,)
    slots: Any               # (T,) page * PAGE_SIZE + offset: where k and v are written
    logit_rows: Any          # (R,)
    attention: Any           # the kernels' plan: where each row finds its keys
    parts: tuple = ()
    sequences: Any = None    # Sequences, where layers keep states
    adapters: Any = None     # see RowAdapters
    turns: Any = None        # (T,) rows of the rotary tables


class RowAdapters(NamedTuple):
    """Which rows of a step have which adapter: (its matrices by name, the rows) of each. For the head, rows
    are logit rows."""

    tokens: Seq[tuple[Mapping[str, Any], list[int]]] = ()
    logits: Seq[tuple[Mapping[str, Any], list[int]]] = ()

    @classmethod
    def of(cls, batch: Batch, adapters: Mapping[int, Mapping[str, Any]]) -> RowAdapters:
        owner = [slot for slot, first, end in zip(batch.adapters, batch.starts, batch.starts[1:])
                 for _ in range(first, end)]
        slots = [slot for slot in dict.fromkeys(batch.adapters) if slot]

        def rows_of(owners: Seq[int]) -> list[tuple[Mapping[str, Any], list[int]]]:
            return [(adapters.get(slot, {}), [row for row, owner in enumerate(owners) if owner == slot])
                    for slot in slots]

        return cls(rows_of(owner), rows_of([owner[row] for row in batch.logit_rows]))

    def of_matrix(self, name: str) -> list[tuple[list[int], Any]]:
        """(the rows, what their adapter adds to their products with a matrix) of each adapter that has it."""
        owned = self.logits if name == "head" else self.tokens
        return [(rows, matrices[name]) for matrices, rows in owned if name in matrices and rows]


def token_places(batch: Batch) -> tuple[Seq[int], Seq[int]]:
    """The absolute position of each new token, and the slot for its keys and values."""
    counts = [end - start for start, end in zip(batch.starts, batch.starts[1:])]
    pairs = [(position, table[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE)
             for count, length, table in zip(counts, batch.lengths, batch.tables)
             for position in range(length - count, length)]
    positions, slots = zip(*pairs)
    return positions, slots
