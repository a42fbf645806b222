"""What an engine is made of, in figures: for the card of its worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from chatlm.worker.arrays.kinds import Device


@dataclass(frozen=True)
class CacheFacts:
    """The KV cache of this rank."""

    pages: int
    page_bytes: int
    has_holes: bool           # do tables have holes, where windows have passed?
    depth: int                # the most layers whose keys and values share a page
    pages_of_longest: int     # the most pages that a sequence of the whole context holds
    types: tuple[str, ...]    # of keys and values, each once
    token_bytes: int          # that all layers cache for a token,
    lasting_token_bytes: int  # and that remain once it is out of all windows

    @property
    def nbytes(self) -> int:
        return self.pages * self.page_bytes


@dataclass(frozen=True)
class StateFacts:
    """The states of layers that keep one for each sequence."""

    slots: int
    most_snapshots: int
    bytes_each: int  # in all ranks


@dataclass(frozen=True)
class EngineFacts:
    """See chatlm/worker/card.py: `facts_of`."""

    device: Device
    stages: int
    tp: int
    context_length: int  # tokens of the longest answer with its prompt,
    scored_length: int   # and of the longest prompt that is only scored
    max_batch: int
    prefill_chunk: int   # tokens of prompts in a step
    of_texts: bool       # does it embed whole texts, and give no answers?
    kernel_names: dict[str, str]  # by op
    row_invariant: bool
    weight_types: str    # with the memory of all weights
    matrix_type: str     # the commonest
    weights_bytes: int
    cache: CacheFacts
    states: StateFacts | None

    @property
    def ranks(self) -> int:
        return self.stages * self.tp
