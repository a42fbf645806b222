"""`open_model`: a `ModelSource` becomes a `LoadedModel`, whose weights are yet to be read.

docs/loading.md says of each step what it reads, decides and hands on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.errors import ConfigError
from chatlm.common.hub.links import refuse_links_out
from chatlm.common.hub.stamps import mmproj_of
from chatlm.common.log import log
from chatlm.common.memory import available_memory
from chatlm.worker.arrays.kinds import Device
from chatlm.worker.kernels.choosing import choose_backend
from chatlm.worker.weights.adapters.merging import merge
from chatlm.worker.weights.formats.folder.model import read_folder_model
from chatlm.worker.weights.formats.gguf.file import read_gguf, readable
from chatlm.worker.weights.formats.gguf.model import gguf_model
from chatlm.worker.weights.formats.litgpt import read_litgpt_model
from chatlm.worker.weights.formats.nanochat.checkpoint import read_nanochat_model
from chatlm.worker.weights.formats.nanochat.folder import MODEL_TYPE, read_nanochat_folder
from chatlm.worker.weights.formats.nanochat.gguf import is_nanochat, read_nanochat_gguf
from chatlm.worker.weights.formats.nanogpt import read_nanogpt_model
from chatlm.worker.weights.formats.sources import check_names_and_shapes, tensor_sources, unread_keys
from chatlm.worker.weights.formats.stored_model import Adaptable, Merged
from chatlm.worker.weights.loaded.model import LoadedModel
from chatlm.worker.weights.rules import read_json
from chatlm.worker.weights.towers.folder import folder_tower
from chatlm.worker.weights.towers.mmproj import gguf_tower

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import ModelSource, TextSpec
    from chatlm.worker.model.blocks.model import Model
    from chatlm.worker.tower import StoredTower
    from chatlm.worker.weights.formats.sources import Sources
    from chatlm.worker.weights.formats.stored_model import Storage, StoredModel


def open_model(source: ModelSource, settings: Settings, device: str = "cpu") -> LoadedModel:
    """Everything of a model but its weights, which are read later, as --dtype or else the fastest type here.

    Norms and per-layer scalars stay float32. Raises ConfigError naming file, keys and shapes when the files
    are not a complete model of a known kind."""
    form = FORMATS[source.kind]
    with form.readable(source.path):
        stored = form.read(source, settings)
        model = load(stored, settings, device)
    add_tower(model, source, settings, device)
    set_context(model, source.path, settings.context_length)
    return model


def load(stored: StoredModel, settings: Settings, device: str) -> LoadedModel:
    """A model in its files becomes one that has only its weights left to read."""
    sources = name_tensors(stored)
    storage = stored.storage(settings, choose_backend(device, stored.model))
    merged = merge_adapters(settings, stored, sources)
    stored = merged.stored
    sources = merged.sources
    tensors = stored.tensors(settings, sources, merged.added, storage)
    text, vocabulary = stored.text()
    purpose = stored.purpose(text)
    draft_head = draft_head_of(
        settings, stored.source.path, lambda: load_draft_head(stored, settings, storage, text))
    report = stored.report(sources, tensors, storage)
    model = stored.model
    targets = stored.targets(sources)
    adapted = tuple(name for name, tensor in model.tensors().items() if tensor.adapted)
    adaptable = Adaptable(
        (*settings.served_model_name, *stored.names), sources, targets.slices, targets.turned,
        unread_keys(model), adapted, tied=merged.tied)
    sizes = f"{stored.title}, {len(model.layers)} layers, width {model.width}"
    return LoadedModel(
        model, tensors, purpose.text, stored.source.name,
        sizes + report.details + merged.described, storage.dtype, **report.sampling,
        family=stored.family, grows=report.grows, block=report.block, adaptable=adaptable,
        head=purpose.head, vocabulary=vocabulary, draft_head=draft_head, ranking=purpose.ranking,
        quantization=report.quantization)


def name_tensors(stored: StoredModel) -> Sources:
    """Which rows of the files' tensors make each of ours. ConfigError unless the files have these tensors and
    no others."""
    sources = tensor_sources(stored.model, stored.table, stored.vocabulary_rows)
    check_names_and_shapes(stored.source.path, stored.shapes(), sources)
    return sources


def merge_adapters(settings: Settings, stored: StoredModel, sources: Sources) -> Merged:
    """Read the adapters of --lora. Where they make a tied head and the embedding different matrices, the
    model gets a head of its own, which in the files is still the embedding."""
    targets = stored.targets(sources)
    tied = targets.tied if stored.model.tied else ()
    if not settings.lora:
        return Merged(stored, sources, {}, "", tied)
    return merge(settings, stored, sources, targets, tied)


def draft_head_of(settings: Settings, path: Path, make: Callable[[], LoadedModel | None]
                  ) -> LoadedModel | None:
    """The draft head that `make` opens, where drafts may come from one. One that is faulty is an error only
    if --drafts asks for it."""
    if settings.drafts not in ("mtp", "auto"):
        return None
    try:
        return make()
    except ConfigError as error:
        if settings.drafts == "mtp":
            raise
        log.warning("%s: its draft head is not used: %s", path, error)
    return None


def load_draft_head(stored: StoredModel, settings: Settings, storage: Storage,
                    text: TextSpec) -> LoadedModel | None:
    """The draft head in a model's files as a model of its own; None if they have none. Adapters do not change
    it."""
    head = stored.draft_head()
    if head is None:
        return None
    tensors = head.tensors(settings, name_tensors(head), {}, storage)
    return LoadedModel(head.model, tensors, text, head.source.name, "", storage.dtype,
                       family=head.family)


class Format(NamedTuple):
    """How files of one kind are read. Within `readable`, whatever a damaged file makes fail becomes a
    ConfigError."""

    read: Callable[[ModelSource, Settings], StoredModel]
    readable: Callable[[Path], AbstractContextManager] = lambda path: nullcontext()


def read_gguf_model(source: ModelSource, settings: Settings) -> StoredModel:
    """The model of a GGUF file: one of nanochat's, or one of a family in the table."""
    metadata, stored = read_gguf(source.path)
    if str(metadata.get("general.architecture")).startswith("nanochat"):
        if is_nanochat(metadata):
            return read_nanochat_gguf(source, settings, metadata, stored)
    return gguf_model(source, settings, metadata, stored)


def read_hf_model(source: ModelSource, settings: Settings) -> StoredModel:
    """The model of a Hugging Face folder: one of nanochat's, or one of a family in the table."""
    refuse_links_out(source.path)
    if read_json(source.path / "config.json").get("model_type") == MODEL_TYPE:
        return read_nanochat_folder(source, settings)
    return read_folder_model(source, settings)


FORMATS = {
    "gguf": Format(read_gguf_model, readable), "hf": Format(read_hf_model),
    "litgpt": Format(read_litgpt_model), "nanochat": Format(read_nanochat_model),
    "nanogpt": Format(read_nanogpt_model)}


def add_tower(model: LoadedModel, source: ModelSource, settings: Settings, device: str):
    """Give a model what it sees pictures with, if its files have that. Without it, and where towers are not
    computed, it reads texts alone."""
    if model.text.embedder:
        return
    several = settings.tensor_parallel_size > 1 or settings.pipeline_parallel_size > 1
    try:
        tower = stored_tower_of(model, source, settings, device)
        if tower and (several or Device(device).type != "cpu"):
            raise ConfigError("models see images only on a CPU, in one process")
    except ConfigError as error:
        if settings.mmproj:
            raise
        log.warning("%s reads texts alone: %s", model.name, error)
        return
    if tower:
        model.architecture = model.architecture.with_sight(
            len(tower.deep), tower.axes, tower.two_sided, tower.pad)
        model.text = replace(model.text, vision=tower.vision)
        model.tower = tower


def stored_tower_of(model: LoadedModel, source: ModelSource, settings: Settings,
                    device: str) -> StoredTower | None:
    """What a folder or a GGUF model sees pictures with. Other formats have nothing of the kind."""
    if source.kind == "gguf":
        path = mmproj_of(source.path, settings)
        if path is None:
            return None
        return gguf_tower(path, source.path, settings, model, device)
    if source.kind == "hf":
        return folder_tower(source.path, settings, model.architecture, model.dtype or "float32")
    return None


def set_context(model: LoadedModel, path: Path, stated: int | None):
    """Give a model the context of --context-length, if that is `stated`. ConfigError if the model or the
    memory has no room for it."""
    length = stated or model.context_length
    if length > model.context_length:
        raise ConfigError(f"--context-length {length} is more than the model's {model.context_length}, its "
                          "own rope scaling included")
    model.architecture = replace(model.architecture, waits=model.text.embedder is not None)
    if stated:
        model.architecture = model.architecture.with_context(length)  # no longer than needed
    check_rotary_memory(path, model.architecture)


def check_rotary_memory(path: Path, model: Model):
    """ConfigError if the rotary tables of its context, in float64, do not fit into memory."""
    context_length = model.max_positions
    tables = {attn.rope for attn in model.attentions}
    needed = 32 * context_length * sum(len(rope.frequencies) for rope in tables)
    free = available_memory()
    if needed > free:
        raise ConfigError(f"{path}: a context of {context_length:,} tokens needs {needed:,} bytes for its "
                          f"rotary tables, and {free:,} are free; give a shorter --context-length")
