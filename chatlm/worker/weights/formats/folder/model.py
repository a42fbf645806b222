"""`FolderModel`: a Hugging Face folder as a `StoredModel`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TYPE_CHECKING

from chatlm.common.errors import ConfigError
from chatlm.common.hub.links import refuse_links_out
from chatlm.common.text.load import open_tokenizer
from chatlm.worker.arrays.kinds import floats, item_bytes, kind_of
from chatlm.worker.arrays.packed import unpermute_rope
from chatlm.worker.model.tensors import TILE_ROWS
from chatlm.worker.weights.changes import FileSlice, fused_slices
from chatlm.worker.weights.families.family import draft_layers, is_one_more
from chatlm.worker.weights.families.table import FAMILIES
from chatlm.worker.weights.formats.array_tensors import ArrayTensors
from chatlm.worker.weights.formats.draft_heads import folder_head
from chatlm.worker.weights.formats.folder.description import described_blocks, hf_text
from chatlm.worker.weights.formats.folder.tensors import read_safetensors
from chatlm.worker.weights.formats.sources import (
    file_shapes, made_by, of_rows, pairs_of, tensor_sources, unread_keys, without_shared)
from chatlm.worker.weights.formats.stored_model import AdapterTargets, Purpose, Report, Storage, with_head_of
from chatlm.worker.weights.formats.tied_heads import Pair, head_of_folder
from chatlm.worker.weights.packed.fp8 import fp8_block, unscaled
from chatlm.worker.weights.packed.layouts import NotExact, PackedWeight
from chatlm.worker.weights.packed.mxfp4 import Mxfp4
from chatlm.worker.weights.packed.quantization import origin_of, without_zero_biases
from chatlm.worker.weights.purposes import cross_encoders
from chatlm.worker.weights.purposes.classifiers import SCORE
from chatlm.worker.weights.purposes.embedders import folder_embedder
from chatlm.worker.weights.purposes.rerankers import of_folder, score_of
from chatlm.worker.weights.rules import float_type, own_sampling, read_json

if TYPE_CHECKING:
    import numpy
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import ModelSource, TextSpec
    from chatlm.worker.kernels.kernels import Backend
    from chatlm.worker.model.blocks.model import Model
    from chatlm.worker.model.tensors import MappedRows, Unread
    from chatlm.worker.weights.changes import Change, Copy
    from chatlm.worker.weights.families.family import Family
    from chatlm.worker.weights.formats.sources import Sources
    from chatlm.worker.weights.text.vocabulary import Vocabulary


def read_folder_model(source: ModelSource, settings: Settings) -> FolderModel:
    refuse_links_out(source.path)
    path = source.path / "config.json"
    config = FolderConfig.of(path, read_json(path), settings.context_length)
    return folder_model(source, config, *with_prefix(*read_safetensors(source.path)))


@dataclass(frozen=True)
class FolderConfig:
    """What the config of a folder says."""

    path: Path           # config.json, or the file that says the same in another form
    raw: dict[str, Any]  # as in a config.json
    family: str          # its row of FAMILIES
    model: Model

    @classmethod
    def of(cls, path: Path, raw: dict[str, Any], context: int | None) -> FolderConfig:
        """Of a file that says what `raw`, a config.json, does, for contexts of `context` tokens (None: the
        model's own)."""
        return cls(path, raw, *described_blocks(path, raw, context))


def same_text(text: TextSpec) -> TextSpec:
    return text


def folder_model(source: ModelSource, config: FolderConfig, state: dict[str, Any],
                 scales: Mapping[str, numpy.ndarray],
                 restyled: Callable[[TextSpec], TextSpec] = same_text) -> FolderModel:
    """The model of a folder with these tensors, by transformers' names; `scales` are those of tensors in FP8,
    `restyled` is what else the folder says of its chats."""
    family = config.family
    row = FAMILIES[family]
    called = names_of_folder(source, config.raw)
    head_name = row.all_tensors["head"][0]
    model = config.model
    has_head = model.of_texts or head_name in state
    score = state.pop(SCORE, None)
    if score is not None:
        score = score_of(source.path, config.raw, family, called, score, has_head)
    embeds = model.of_texts or (source.path / "modules.json").exists()
    if not has_head and (score is not None or embeds):
        model = model.with_tied_head()  # it has no head, and needs none
    whole = state
    model, state, scales = head_of_folder(config.path, model, row, row.repack(state), scales)
    whole = whole | {name: state[name] for name in Pair.of(row.all_tensors) if name in state}
    whole_scales = scales
    drafts = left_out(whole, state)
    scales = {name: scale for name, scale in scales.items() if not name.startswith(drafts)}
    state = without_shared(model, state)
    scales = without_shared(model, scales)
    if lost := sorted(set(scales) - set(state)):
        raise ConfigError(f"{source.path}: {lost[0]} is in FP8, which is not supported for this tensor of "
                          f"a {family} model: use the unquantized model or a GGUF file of it")
    if any(isinstance(tensor, PackedWeight) for tensor in state.values()):
        expected = file_shapes(tensor_sources(model, row.all_tensors, model.vocab_size))
        state = without_zero_biases(state, expected)
    return FolderModel(source, config, model, row.all_tensors, state, scales, whole, whole_scales,
                       score, embeds, restyled)


def left_out(whole: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[str, ...]:
    """What the names of a folder's draft heads begin with, if its model has none of their tensors."""
    return tuple(begin for begin in draft_layers(whole) if not any(name.startswith(begin) for name in state))


def names_of_folder(source: ModelSource, raw: Mapping[str, Any]) -> tuple[str, str, str]:
    """What its makers and its user call the model of a folder."""
    return source.name, source.path.name, str(raw.get("_name_or_path") or "")


def with_prefix(state: dict, scales: dict) -> tuple[dict, dict]:
    """A folder's tensors by the names of a model with a head, if it was written without one."""
    if "embed_tokens.weight" not in state:
        return state, scales
    state, scales = ({name if name == "lm_head.weight" else f"model.{name}": tensor
                      for name, tensor in tensors.items()} for tensors in (state, scales))
    return state, scales


@dataclass(frozen=True)
class FolderModel:
    """The model of a Hugging Face folder, or of one that says the same in other words."""

    source: ModelSource
    config: FolderConfig
    model: Model                           # the config's, once the tensors have been looked at
    table: Mapping[str, tuple[str, ...]]
    state: dict[str, Any]                  # the tensors that `table` names: arrays, PackedWeight, Mxfp4
    scales: dict[str, numpy.ndarray]       # of those in FP8
    whole: dict[str, Any]                  # the folder's tensors as they are, a draft head's too
    whole_scales: dict[str, numpy.ndarray]
    score: Any                             # a reranker's row, if it has one
    embeds: bool                           # it makes vectors of texts, or scores of pairs
    restyled: Callable[[TextSpec], TextSpec]

    @property
    def family(self) -> str:
        return self.config.family

    @property
    def row(self) -> Family:
        return FAMILIES[self.family]

    @property
    def title(self) -> str:
        return self.family

    @property
    def names(self) -> tuple[str, ...]:
        name, _, stated = self.called
        return name, str(self.source.path), stated

    @property
    def called(self) -> tuple[str, str, str]:
        return names_of_folder(self.source, self.config.raw)

    @property
    def vocabulary_rows(self) -> int:
        return self.model.vocab_size

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.state.items()}

    def storage(self, settings: Settings, backend: Backend) -> Storage:
        """Packed matrices stay packed where kernels read them, and unless --dtype asks for floats."""
        as_stored = None if settings.dtype else backend.as_stored
        dtype = float_type(settings, backend)
        if self.model.of_texts and as_stored:  # vectors are compared with those of others: nothing is rounded
            unpacked = [tensor for tensor in self.state.values() if not isinstance(tensor, PackedWeight)]
            dtype = max(map(kind_of, unpacked), key=item_bytes, default=dtype)
        return Storage(backend, dtype, as_stored)

    def targets(self, sources: Sources) -> AdapterTargets:
        return AdapterTargets(partial(folder_slices, self.row, self.model, sources),
                      partial(in_our_order, self.row, self.model), Pair.in_adapters(self.row, self.model))

    def with_own_head(self) -> FolderModel:
        pair = Pair.of(self.table)
        return replace(self, model=self.model.with_own_head(), state=with_head_of(self.state, pair),
                       scales=with_head_of(self.scales, pair), whole=with_head_of(self.whole, pair))

    def tensors(self, settings: Settings, sources: Sources, added: Mapping[str, list[Change | Copy]],
                storage: Storage) -> dict[str, Unread | MappedRows]:
        row = self.row
        scales = self.scales
        dtype = storage.dtype
        assert dtype is not None
        config = self.config.path
        scale_block = fp8_block(config, self.config.raw) if scales else []
        turned = partial(in_our_order, row, self.model)

        def changed(name: str, tensor: Any) -> numpy.ndarray:
            if name in scales:
                tensor = unscaled(config, scales, scale_block, name, tensor)
            if isinstance(tensor, PackedWeight):
                tensor = tensor.values("float32" if name in added else dtype)
            for change in added.get(name, ()):
                tensor = change.on(tensor)
            tensor = turned(name, tensor)
            return floats(tensor) + 1 if is_one_more(row, name) else tensor

        def packed_rows(name: str, blocks: numpy.ndarray) -> numpy.ndarray:
            if name in added:
                raise NotExact
            return turned(name, blocks)

        rows_of = of_rows
        if "k_up" in self.table:  # keys and values of latents
            rows_of = partial(made_by, self.model)
        return ArrayTensors(self.source.path, settings, self.state, dtype, changed, storage.as_stored,
                            packed_rows, rows_of).of(sources)

    def text(self) -> tuple[TextSpec, Vocabulary | None]:
        return self.restyled(hf_text(self.source.path, self.model.vocab_size)), None

    def purpose(self, text: TextSpec) -> Purpose:
        if self.row.has_rerankers:
            text, ranking = of_folder(self.source.path, self.config.raw, self.called, self.model, text,
                                      self.state, self.score)
            if ranking is not None:
                return Purpose(text, ranking=ranking)
        if not self.embeds:
            return Purpose(text)
        pipeline = getattr(open_tokenizer(text), "pipeline")
        embedder, head = folder_embedder(self.source.path, pipeline, self.family, self.model, self.called)
        if self.model.of_texts:
            if cross_encoders.classifies(self.whole):
                head = cross_encoders.folder_head(self.config.path, self.config.raw, self.model, self.whole)
                sigmoid = cross_encoders.makes_probabilities(self.config.path, self.config.raw)
                embedder = embedder._replace(pooling="rank", size=1, least=0, sigmoid=sigmoid, dimensions=0,
                                             pools_prompt=True)
        return Purpose(replace(text, embedder=embedder, chat_template=None), head)

    def draft_head(self) -> FolderModel | None:
        if not self.row.has_draft_head:
            return None
        found = folder_head(self.model, self.row, self.whole, self.whole_scales)
        if found is None:
            return None
        model, table, state, scales = found
        return replace(self, model=model, table=table, state=state, scales=scales)

    def report(self, sources: Sources, tensors: Mapping[str, Unread | MappedRows],
               storage: Storage) -> Report:
        details = origin_of(self.state, storage.as_stored is not None)
        if self.scales:
            details += ", from FP8"
        path = self.source.path / "generation_config.json"
        return Report(details, max(blocks_in(self.state), default=TILE_ROWS),
                      sampling=own_sampling(path, read_json(path, needed=False)))


def blocks_in(state: Mapping[str, Any]) -> Iterator[int]:
    """How many columns are packed together in each matrix that is packed."""
    for tensor in state.values():
        if isinstance(tensor, Mxfp4):
            yield 32
        if isinstance(tensor, PackedWeight):
            yield 128


def folder_slices(row: Family, model: Model, sources: Sources) -> dict[str, list[FileSlice]]:
    """By adapters' names, the matrices and vectors of a folder that they may change. A table that stays in
    its file is none, and neither are the matrices of all experts in one tensor."""
    mapped = sources.get("layer_embed", ((), ()))[1]
    shapes = {name: shape for name, shape in file_shapes(sources).items()
              if len(shape) < 3 and name not in mapped} | unread_keys(model)
    slices = fused_slices({name: [FileSlice(name)] for name in shapes}, shapes, row.fused, len(model.layers))
    return row.named_by_adapters(model, slices)


def in_our_order(row: Family, model: Model, name: str, rows: numpy.ndarray) -> numpy.ndarray:
    """The rows of a folder's matrix or bias, of values or of packed blocks."""
    if row.interleaved and re.search(r"\.[qk]_(proj|norm)\.", name):
        return unpermute_rope(rows, pairs_of(model))
    return row.ordered(model, name, rows) if row.ordered else rows
