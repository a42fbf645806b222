"""`LoadedModel`: a model whose weights are still in its files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TYPE_CHECKING

from chatlm.worker.model.head import Head
from chatlm.worker.model.tensors import TILE_ROWS

if TYPE_CHECKING:
    from chatlm.common.messages.requests import TextSpec
    from chatlm.worker.model.blocks.model import Model
    from chatlm.worker.model.tensors import MappedRows, Unread
    from chatlm.worker.tower import StoredTower
    from chatlm.worker.weights.formats.stored_model import Adaptable
    from chatlm.worker.weights.text.vocabulary import Vocabulary


@dataclass
class LoadedModel:
    """A model whose weights are still in its files. `tensors` has the names and shapes of
    `architecture.tensors()`, without a tied head."""

    architecture: Model  # what computes it: the whole model, or the part of a rank or a stage
    tensors: dict[str, "Unread | MappedRows"]
    text: TextSpec
    name: str
    description: str
    dtype: str | None    # of the weight matrices; None: as stored in the file
    sampling: dict = field(default_factory=dict)  # the makers' defaults
    sampling_origin: str = ""    # where they come from
    notes: tuple[str, ...] = ()  # more lines for the start-up log
    family: str = ""
    grows: str = ""              # a note if the weights outgrow their file
    block: int = TILE_ROWS       # columns of `down` that are packed together
    adaptable: "Adaptable | None" = None  # if it accepts adapters without merging
    head: Head = Head()          # of an embedder or a reranker: what its pooled hidden states go through
    vocabulary: Vocabulary | None = None  # what `text` says, where it was not read from a tokenizer.json
    draft_head: LoadedModel | None = None  # if the files have one and drafts may come from it
    ranking: Any = None          # float64 (C,): what makes the last hidden state of a pair its score
    tower: "StoredTower | None" = None   # what it sees pictures with
    quantization: str = ""       # what its file calls it, such as Q4_K_M; "": nothing

    @property
    def context_length(self) -> int:
        return self.architecture.context_length
