"""`StoredModel`: a model in its files, with the steps of loading that depend on their format.

docs/loading.md tells the whole story; `load` is its code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TYPE_CHECKING

from chatlm.worker.model.head import Head
from chatlm.worker.model.tensors import TILE_ROWS

if TYPE_CHECKING:
    import numpy
    from typing_extensions import Self

    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import ModelSource, TextSpec
    from chatlm.worker.kernels.kernels import Backend
    from chatlm.worker.model.blocks.model import Model
    from chatlm.worker.model.tensors import MappedRows, Unread
    from chatlm.worker.weights.changes import Change, Copy
    from chatlm.worker.weights.changes import FileSlice
    from chatlm.worker.weights.formats.sources import Sources
    from chatlm.worker.weights.formats.tied_heads import Pair
    from chatlm.worker.weights.text.vocabulary import Vocabulary


class Storage(NamedTuple):
    """How matrices are held in memory; vectors are always float32."""

    backend: Backend
    dtype: str | None           # of the matrices that become floats; None: all stay packed
    as_stored: Callable | None  # makes a matrix of the file's packed blocks; None: all become floats


class AdapterTargets(NamedTuple):
    """What adapters may change in the files. They use the names and the rows of a Hugging Face folder.

    It is used for as long as the model is served, so it holds no tensor."""

    slices: Callable[[], dict[str, list[FileSlice]]]       # by the names that adapters use
    turned: Callable[[str, numpy.ndarray], numpy.ndarray]  # the rows of a file's matrix in our order
    tied: Pair                                             # adapters' names of the embedding and the head


@dataclass(frozen=True)
class Adaptable:
    """What is needed to fit adapters to a model. They use Hugging Face's names and order of rows; the model's
    files may have others."""

    names: tuple[str, ...]  # what the model is called
    sources: Sources        # which rows of the files make each of our tensors
    # Hugging Face's matrices -> where the files have their rows
    slices: Callable[[], Mapping[str, list[FileSlice]]]
    # (a file's matrix, its rows) -> the rows in our order
    turned: Callable[[str, numpy.ndarray], numpy.ndarray]
    ignored: dict[str, tuple[int, ...]]  # matrices that no layer reads; see unread_keys
    adapted: tuple[str, ...]  # our tensors of the whole model that adapters may change
    first_layer: int = 0    # of a stage
    tied: Seq[str] = ()  # Hugging Face's names of an embedding and of the head that it is


class Purpose(NamedTuple):
    """What a model is for: to chat, or to make vectors or scores of texts. The fields are LoadedModel's."""

    text: TextSpec
    head: Head = Head()
    ranking: Any = None


@dataclass(frozen=True)
class Report:
    """What a model's files say to the log and to requests. The fields are LoadedModel's."""

    details: str = ""  # of the description, after the sizes
    block: int = TILE_ROWS
    grows: str = ""
    sampling: dict = field(default_factory=dict)  # the three fields of `own_sampling`
    quantization: str = ""


class StoredModel(Protocol):
    """What a model's files say, and the steps of `load` that depend on their format, in its order."""

    @property
    def source(self) -> ModelSource: ...

    @property
    def family(self) -> str:
        """Its model_type, its GGUF architecture, or the trainer that makes such models."""
        ...

    @property
    def title(self) -> str:
        """The beginning of its description."""
        ...

    @property
    def model(self) -> Model: ...

    @property
    def names(self) -> tuple[str, ...]:
        """What the model is called. An adapter names the model that it was made for."""
        ...

    @property
    def table(self) -> Mapping[str, tuple[str, ...]]:
        """Our tensors (of layer {}) -> the files' tensors whose rows they are made of."""
        ...

    @property
    def vocabulary_rows(self) -> int:
        """The rows of the files' embedding. Those beyond model.vocab_size are padding."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The files' tensors that belong to the model, which must be those that its blocks have."""
        ...

    def storage(self, settings: Settings, backend: Backend) -> Storage: ...

    def targets(self, sources: Sources) -> AdapterTargets: ...

    def with_own_head(self) -> Self:
        """The same model with a head that is a copy of the embedding, no longer the embedding itself."""
        ...

    def tensors(self, settings: Settings, sources: Sources, added: Mapping[str, list[Change | Copy]],
                storage: Storage) -> dict[str, Unread | MappedRows]:
        """Our tensors, yet to be read. `added`: what adapters change in the files' tensors."""
        ...

    def text(self) -> tuple[TextSpec, Vocabulary | None]:
        """The tokenizer, the chat template and the tokens that end answers; and what ids mean, where that was
        read along with them."""
        ...

    def purpose(self, text: TextSpec) -> Purpose: ...

    def draft_head(self) -> Self | None:
        """The files' draft head as a model of its own, if they have one that this program knows."""
        ...

    def report(self, sources: Sources, tensors: Mapping[str, Unread | MappedRows],
               storage: Storage) -> Report: ...


class Merged(NamedTuple):
    """A model in its files once adapters are merged into it."""

    stored: StoredModel
    sources: Sources
    added: dict[str, list[Change | Copy]]  # what changes in each of the files' tensors
    described: str
    tied: Seq[str]  # Hugging Face's names of an embedding and of the head that it still is


def with_head_of(tensors: Mapping[str, Any], pair: Pair) -> dict[str, Any]:
    """A file's tensors with the embedding as the head too, if it is among them."""
    if pair.embed not in tensors:
        return {**tensors}
    return {**tensors, pair.head: tensors[pair.embed]}
