"""`GgufModel`: a GGUF file as a `StoredModel`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TYPE_CHECKING

from chatlm.worker.arrays.packed import RopePairs, unpermute_rope
from chatlm.worker.model.head import Head
from chatlm.worker.model.tensors import TILE_ROWS
from chatlm.worker.weights.families.table import FAMILIES
from chatlm.worker.weights.formats.draft_heads import gguf_head
from chatlm.worker.weights.formats.gguf.description import gguf_blocks, kept_texts
from chatlm.worker.weights.formats.gguf.factors import with_factors
from chatlm.worker.weights.formats.gguf.file import ROPE_TENSORS, check_gguf_types
from chatlm.worker.weights.formats.gguf.file_types import quantization_of
from chatlm.worker.weights.formats.gguf.slices import gguf_slices
from chatlm.worker.weights.formats.gguf.tensors import GgufTensors, details_of, file_shape, growth
from chatlm.worker.weights.formats.sources import made_by, of_rows, pairs_of, without_shared
from chatlm.worker.weights.formats.stored_model import AdapterTargets, Purpose, Report, Storage, with_head_of
from chatlm.worker.weights.formats.tied_heads import Pair
from chatlm.worker.weights.packed.rows import packed_together
from chatlm.worker.weights.purposes import cross_encoders, rerankers
from chatlm.worker.weights.purposes.embedders import CLASSES, gguf_embedder, pooling_of_gguf
from chatlm.worker.weights.rules import own_sampling

if TYPE_CHECKING:
    import numpy
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import ModelSource, TextSpec
    from chatlm.worker.kernels.kernels import Backend
    from chatlm.worker.model.blocks.model import Model
    from chatlm.worker.model.tensors import MappedRows, Unread
    from chatlm.worker.weights.changes import Change, Copy
    from chatlm.worker.weights.changes import FileSlice
    from chatlm.worker.weights.families.family import Family
    from chatlm.worker.weights.formats.sources import Sources
    from chatlm.worker.weights.text.vocabulary import Vocabulary


def gguf_model(source: ModelSource, settings: Settings, metadata: Mapping[str, Any],
               stored: dict[str, Any]) -> GgufModel:
    """The model of a GGUF file with these metadata and tensors."""
    types = Counter(tensor.tensor_type.name for tensor in stored.values())
    model_type, model = gguf_blocks(source.path, metadata, stored, settings.context_length)
    row = FAMILIES[model_type]
    check_gguf_types(source.path, stored)
    whole = row.gguf.repack(with_factors(source.path, stored))
    stored = without_shared(model, whole)
    if metadata.get(f"{metadata['general.architecture']}.nextn_predict_layers"):
        stored = without_draft_head(stored, len(model.layers))
    heads = {}
    classes = None
    if model.of_texts:
        heads = {name: tensor for name, tensor in stored.items() if re.match(r"(cls|dense_\d)\.", name)}
        stored = {name: tensor for name, tensor in stored.items() if name not in heads}
    else:
        classes = stored.pop(CLASSES, None)
    names = row.gguf_names | row.gguf.names_in(stored)
    return GgufModel(source, metadata, types, model_type, model, names, stored, whole, heads, classes)


def without_draft_head(stored: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The tensors of a model of so many layers. Those after them are a draft head's."""
    own = {}
    for name, tensor in stored.items():
        layer = re.match(r"blk\.(\d+)\.", name)
        if layer is None or int(layer[1]) < layers:
            own[name] = tensor
    return own


@dataclass(frozen=True)
class GgufModel:
    """The model of a GGUF file, or of several that it is split into. Tensors are gguf.header.GgufTensor."""

    source: ModelSource
    metadata: Mapping[str, Any]
    types: Counter[str]        # how many tensors the file has of each type
    model_type: str            # its row of FAMILIES
    model: Model
    table: Mapping[str, tuple[str, ...]]
    stored: dict[str, Any]     # the tensors that `table` names
    whole: Mapping[str, Any]   # the file's tensors, a draft head's too
    heads: Mapping[str, Any]   # of a model of whole texts: what follows it
    classes: Any               # a reranker's rows for yes and no, if it has them

    @property
    def family(self) -> str:
        return self.metadata["general.architecture"]

    @property
    def row(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def title(self) -> str:
        return self.family

    @property
    def names(self) -> tuple[str, ...]:
        return self.source.name, str(self.metadata.get("general.name") or "")

    @property
    def vocabulary_rows(self) -> int:
        return self.model.vocab_size

    @property
    def pairs(self) -> RopePairs:
        """Which rows of q and k turn together, if they are adjacent."""
        return pairs_of(self.model)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Without ROPE_TENSORS, which became factors of the angles."""
        return {name: file_shape(name, tensor) for name, tensor in self.stored.items()
                if name not in ROPE_TENSORS}

    def storage(self, settings: Settings, backend: Backend) -> Storage:
        """As in the file where kernels read its types, and unless --dtype asks for floats."""
        dtype = settings.dtype
        if self.model.of_texts and self.types.keys() == {"F32"}:  # else it would become bfloat16
            dtype = dtype or "float32"
        if dtype or not backend.as_stored:
            return Storage(backend, dtype or backend.dtype, None)
        return Storage(backend, None, backend.as_stored)

    def targets(self, sources: Sources) -> AdapterTargets:
        row = self.row
        model = self.model
        table = self.table

        def slices() -> dict[str, list[FileSlice]]:
            return gguf_slices(row, model, table, sources)

        turned = partial(in_our_order, self.pairs if row.interleaved else None)
        return AdapterTargets(slices, turned, Pair.in_adapters(row, model))

    def with_own_head(self) -> GgufModel:
        pair = Pair.of(self.table)
        return replace(self, model=self.model.with_own_head(), stored=with_head_of(self.stored, pair),
                       whole=with_head_of(self.whole, pair))

    def tensors(self, settings: Settings, sources: Sources, added: Mapping[str, list[Change | Copy]],
                storage: Storage) -> dict[str, Unread | MappedRows]:
        interleaved = self.row.interleaved
        rows_of = of_rows
        if self.has_kv_up:
            rows_of = partial(made_by, self.model)
        return GgufTensors(
            self.source.path, settings, self.stored, storage,
            self.pairs if interleaved or self.row.gguf.permuted else None,
            self.pairs if interleaved else None, added, rows_of).of(sources)

    @property
    def has_kv_up(self) -> bool:
        """Does the file have keys and values of latents in one matrix?"""
        return "k_up" in self.table and self.table["k_up"] == self.table["v_up"]

    def text(self) -> tuple[TextSpec, Vocabulary | None]:
        return kept_texts(self.source.path, self.metadata)

    @property
    def may_rank(self) -> bool:
        """May the file be a causal model's reranker, or claim to be one?"""
        if self.model.of_texts:
            return False
        pooling = pooling_of_gguf(self.source.path, f"{self.family}.", self.metadata)
        return self.row.has_rerankers or self.classes is not None or pooling == "rank"

    def purpose(self, text: TextSpec) -> Purpose:
        path = self.source.path
        head = Head()
        ranking = None
        if self.may_rank:
            text, ranking = rerankers.of_gguf(path, self.metadata, self.model_type, self.model, text,
                                              self.stored, self.classes)
        embedder = gguf_embedder(path, self.metadata, text, self.model_type, self.model)
        if embedder is None:
            return Purpose(text, ranking=ranking)
        if self.model.of_texts:
            head = cross_encoders.gguf_head(path, self.metadata, self.model, embedder.pooling, self.heads)
        embedder = embedder._replace(size=head.size or embedder.size)
        return Purpose(replace(text, embedder=embedder, chat_template=None), head, ranking)

    def draft_head(self) -> GgufModel | None:
        if not self.row.has_draft_head:
            return None
        found = gguf_head(self.model, self.row, self.whole)
        if found is None:
            return None
        model, table, stored = found
        return replace(self, model=model, table=table, stored=stored)

    def report(self, sources: Sources, tensors: Mapping[str, Unread | MappedRows],
               storage: Storage) -> Report:
        details = details_of(self.types, sources, self.stored, storage)
        down = [packed_together(tensor) for name, tensor in self.stored.items() if ".ffn_down" in name]
        mapped = sources["layer_embed"][1] if "layer_embed" in sources else ()
        read = {name: tensor for name, tensor in self.stored.items() if name not in mapped}
        return Report(details, max([TILE_ROWS, *down]), growth(tensors, read, storage.dtype is None),
                      own_sampling(self.source.path, self.metadata, "general.sampling."),
                      quantization_of(self.metadata, self.whole.values()))


def in_our_order(pairs: RopePairs | None, name: str, rows: numpy.ndarray) -> numpy.ndarray:
    """The rows of what an adapter changes in a file's matrix."""
    return unpermute_rope(rows, pairs if re.search(r"attn_[qk](_norm)?\.", name) else None)
