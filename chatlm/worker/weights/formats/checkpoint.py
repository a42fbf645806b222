"""`CheckpointModel`: a checkpoint of torch as a `StoredModel`, with tensors as its trainer names them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TYPE_CHECKING

import numpy

from chatlm.common.errors import ConfigError
from chatlm.worker.arrays.kinds import address_of, kind_of
from chatlm.worker.weights.changes import FileSlice
from chatlm.worker.weights.formats.array_tensors import ArrayTensors
from chatlm.worker.weights.formats.sources import file_shapes
from chatlm.worker.weights.formats.stored_model import AdapterTargets, Purpose, Report, Storage, with_head_of
from chatlm.worker.weights.formats.tied_heads import Pair
from chatlm.worker.weights.rules import check_bytes, float_type

if TYPE_CHECKING:
    from typing_extensions import Self

    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import ModelSource, TextSpec
    from chatlm.worker.kernels.kernels import Backend
    from chatlm.worker.model.blocks.model import Model
    from chatlm.worker.model.tensors import MappedRows, Unread
    from chatlm.worker.weights.changes import Change, Copy
    from chatlm.worker.weights.formats.sources import Sources
    from chatlm.worker.weights.text.vocabulary import Vocabulary

PLAIN_TENSORS = "float32", "bfloat16", "float16", "float64"
AdapterNames = Callable[[str, tuple[int, ...]], Iterable[str]]


@dataclass(frozen=True)
class CheckpointModel:
    """A model whose trainer saved a state dict of plain tensors.

    The tokenizer is read along with it: the checkpoint has to fit it, and some models need its size."""

    source: ModelSource
    family: str
    title: str
    model: Model
    table: Mapping[str, tuple[str, ...]]
    vocabulary_rows: int
    state: dict[str, numpy.ndarray]
    tokenizer: TextSpec
    adapter_names: AdapterNames  # of a tensor and its shape: how adapters may call it; none: they cannot

    @property
    def names(self) -> tuple[str, ...]:
        return self.source.name, str(self.source.path)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.state.items()}

    def storage(self, settings: Settings, backend: Backend) -> Storage:
        return Storage(backend, float_type(settings, backend), None)

    def targets(self, sources: Sources) -> AdapterTargets:
        return AdapterTargets(partial(whole_tensors, sources, self.adapter_names), in_the_same_order,
                      Pair.of(self.table))

    def with_own_head(self) -> Self:
        return replace(self, model=self.model.with_own_head(),
                       state=with_head_of(self.state, Pair.of(self.table)))

    def tensors(self, settings: Settings, sources: Sources, added: Mapping[str, list[Change | Copy]],
                storage: Storage) -> dict[str, Unread | MappedRows]:
        dtype = storage.dtype
        assert dtype is not None

        def changed(name: str, tensor: numpy.ndarray) -> numpy.ndarray:
            for change in added.get(name, ()):
                tensor = change.on(tensor)
            return tensor

        return ArrayTensors(self.source.path, settings, self.state, dtype, changed).of(sources)

    def text(self) -> tuple[TextSpec, Vocabulary | None]:
        return self.tokenizer, None

    def purpose(self, text: TextSpec) -> Purpose:
        return Purpose(text)

    def draft_head(self) -> Self | None:
        return None

    def report(self, sources: Sources, tensors: Mapping[str, Unread | MappedRows],
               storage: Storage) -> Report:
        return Report()


def whole_tensors(sources: Sources, adapter_names: AdapterNames) -> dict[str, list[FileSlice]]:
    """Each of an adapter's matrices is a whole one of the checkpoint."""
    return {called: [FileSlice(name)] for name, shape in file_shapes(sources).items()
            for called in adapter_names(name, shape)}


def in_the_same_order(name: str, rows: numpy.ndarray) -> numpy.ndarray:
    return rows


def plain_state(path: Path, state: dict) -> dict[str, numpy.ndarray]:
    """A state dict whose values are plain tensors. Its names lose the `_orig_mod.` of torch.compile."""
    for name, value in state.items():
        if not (type(name) is str and tensor_words(value) in PLAIN_TENSORS):
            key = name if type(name) is str else f"a key of type {type(name).__name__}, not str,"
            raise ConfigError(f"{path}: {key} is {tensor_words(value)}; it must be one of "
                              f"{', '.join(PLAIN_TENSORS)}")
    check_bytes(path, {name: value.nbytes for name, value in state.items()})
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}


def tensor_words(value) -> str:
    """What a state dict's value is, in words: "float32", "int64", "list"."""
    return kind_of(value) if isinstance(value, numpy.ndarray) else type(value).__name__


def without_tied_head(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict without a head that is the embedding, stored once."""
    both = state.get("lm_head.weight"), state.get("transformer.wte.weight")
    plain = all(tensor_words(tensor) in PLAIN_TENSORS for tensor in both)
    if not plain or len({address_of(tensor) for tensor in both if tensor is not None}) != 1:
        return state
    return {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
