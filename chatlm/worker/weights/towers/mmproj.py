"""What a GGUF model sees pictures with: the file that llama.cpp calls mmproj, beside the model or named by
--mmproj."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TYPE_CHECKING

import numpy

from chatlm.common.errors import ConfigError, shown
from chatlm.worker.arrays.packed import dequantized
from chatlm.worker.kernels.choosing import choose_backend
from chatlm.worker.weights.formats.gguf.file import check_gguf_types, read_gguf_file, readable
from chatlm.worker.weights.formats.gguf.tensors import GgufTensors, file_shape
from chatlm.worker.weights.formats.sources import check_names_and_shapes
from chatlm.worker.weights.formats.stored_model import Storage
from chatlm.worker.weights.rules import Rule, check_divides, checked
from chatlm.worker.weights.towers.families import CLAMPS, clamps_of
from chatlm.worker.weights.towers.folder import (
    SECTIONS, by_color, by_halves, by_pairs, tower_sources, unstored)
from chatlm.worker.weights.towers.table import FILE_TOWERS

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.worker.tower import StoredTower
    from chatlm.worker.weights.loaded.model import LoadedModel
    from chatlm.worker.weights.towers.families import TowerFamily


def gguf_tower(path: Path, model: Path, settings: Settings, loaded: LoadedModel, device: str) -> StoredTower:
    """What a model sees with, by this file. ConfigError if there is no such file, or it has no such thing."""
    if not path.is_file():
        raise ConfigError(f"--mmproj {path}: there is no such file")
    with readable(path):
        return tower_in_file(path, model, settings, loaded, device, *read_gguf_file(path))


class FileSays:
    """A `Said` of a GGUF file's metadata."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], shapes: dict[str, tuple[int, ...]],
                 model_path: Path):
        self.path = path
        self.metadata = metadata
        self.shapes = shapes
        self.model_path = model_path

    def picture(self, key: str, rule: Rule, default: Any = None, length: int | None = None) -> Any:
        key = f"clip.vision.{key}"
        return checked(self.path, key, self.metadata.get(key, default), rule, length)

    def tower(self, key: str, rule: Rule, default: Any = None) -> Any:
        return self.picture(key, rule, default)

    def model(self, key: str, rule: Rule, default: Any = None) -> Any:
        return default

    def divides(self, key: str, value: int, by: int):
        check_divides(self.path, f"clip.vision.{key}", value, by)

    def flag(self, key: str) -> bool:
        key = f"clip.{key}"
        return checked(self.path, key, self.metadata.get(key, False), Rule(bool))

    def sections(self) -> tuple[int, ...]:
        metadata = read_gguf_file(self.model_path)[0]
        key = f"{metadata.get('general.architecture')}.rope.dimension_sections"
        sections = checked(self.model_path, key, metadata.get(key), SECTIONS)
        if len(sections) < 3:
            raise ConfigError(f"{self.model_path}: {key} has {len(sections)} numbers; it must have 3")
        return tuple(sections[:3])

    def refuse(self, problem: str) -> NoReturn:
        raise ConfigError(f"{self.path}: clip.vision.{problem}")


def tower_in_file(path: Path, model: Path, settings: Settings, loaded: LoadedModel, device: str,
                 metadata: Mapping[str, Any], stored: dict[str, Any]) -> StoredTower:
    if metadata.get("general.architecture") != "clip":
        raise ConfigError(f"{path}: general.architecture is {shown(metadata.get('general.architecture'))}; a "
                          "file that sees images has clip")
    kind = metadata.get("clip.projector_type", metadata.get("clip.vision.projector_type"))
    family = FILE_TOWERS[checked(path, "clip.projector_type", kind, Rule(str, choices=tuple(FILE_TOWERS)))]
    if json.dumps(family.token).encode() not in loaded.text.payload:
        raise ConfigError(f"{path}: it belongs to another model: this one has no {family.token}")
    shapes = {name: file_shape(name, tensor) for name, tensor in stored.items()}
    tower = family.of_file(FileSays(path, metadata, shapes, model), loaded.architecture)
    return tower._replace(tensors=file_tensors(path, settings, loaded, device, family, tower, dict(stored)))


def file_tensors(path: Path, settings: Settings, loaded: LoadedModel, device: str, family: TowerFamily,
                 tower: StoredTower, stored: dict[str, Any]) -> dict[str, Any]:
    """The tensors of StoredTower. Layers stay as stored, everything else becomes floats."""
    stored = {name: tensor for name, tensor in stored.items()
              if not name.startswith(("a.", "mm.a.", *family.unread))}  # audio is not heard
    numbers = {name: float(stored.pop(name).data.reshape(-1)[0])
               for name in [*stored] if name.endswith(CLAMPS)}
    for names, order_of in ((family.axes, by_halves), (family.adjacent, by_pairs)):
        for name in stored:
            if names and re.search(names, name):
                rows = stored[name].data
                stored[name] = stored[name]._replace(data=rows[order_of(len(rows), tower.head_size)])
    check_gguf_types(path, stored)
    stored = with_names_of_now(stored, tower)
    [kernel] = family.file_names["patch"]
    second = stored.pop(f"{kernel}.1", None)  # of a film of two pictures; both show the same one
    shapes = {name: file_shape(name, tensor) for name, tensor in stored.items()}
    form = shapes.get(kernel, ())  # (C, 3, p, p), or (C, 3 * p * p)
    if len(form) == 4:
        shapes[kernel] = form[0], math.prod(form[1:])
    turned = {name for ours in family.transposed for name in family.file_names[ours]}
    shapes |= {name: shapes[name][::-1] for name in turned if name in shapes}
    sources = tower_sources(family, family.file_names, tower, loaded.architecture.width)
    check_names_and_shapes(path, shapes, sources)
    own = family.own(tower, loaded.architecture.width)
    layers = {name: source for name, source in sources.items() if name not in own}
    backend = choose_backend(device, tower.architecture)
    storage = Storage(backend, loaded.dtype, None if loaded.dtype else backend.as_stored)
    tensors: dict[str, Any] = dict(GgufTensors(path, settings, stored, storage).of(layers))
    for ours, shape in own.items():
        [name] = family.file_names[ours]
        if name == kernel:
            tensors[ours] = values_of(stored[name], form[-1]).reshape(form)
        elif name in turned:
            tensors[ours] = values_of(stored[name], shape[0]).reshape(shape[::-1])
        else:
            tensors[ours] = values_of(stored[name], shape[-1]).reshape(shape)
        if ours in family.planar:
            whole = tensors[ours].shape
            tensors[ours] = by_color(tensors[ours].reshape(-1, 3, tower.patch, tower.patch)).reshape(whole)
        if name in turned:
            tensors[ours] = numpy.ascontiguousarray(tensors[ours].T)
    if second is not None:
        tensors["patch"] = tensors["patch"] + values_of(second, form[-1]).reshape(form)
    if len(form) == 4:
        tensors["patch"] = by_color(tensors["patch"])
    return tensors | unstored(tower) | clamps_of(path, family.file_names, tower.architecture, numbers)


def with_names_of_now(stored: dict[str, Any], tower: StoredTower) -> dict[str, Any]:
    """A file's tensors under the names that they have in new files, and deepstack by its number, not by the
    layer that it follows."""
    blocks = tower.architecture
    width = blocks.feed.width if blocks.feed else 0
    for layer in range(len(blocks.layers)):  # old files have these two exchanged
        up = f"v.blk.{layer}.ffn_up"
        down = f"v.blk.{layer}.ffn_down"
        weight = stored.get(f"{up}.weight")
        if weight is not None and width != blocks.width and file_shape(up, weight)[0] == blocks.width:
            for part in ("weight", "bias"):
                first = stored.pop(f"{up}.{part}")
                second = stored.pop(f"{down}.{part}")
                stored |= {f"{up}.{part}": second, f"{down}.{part}": first}
    for number, layer in enumerate(tower.deep):
        begin = f"v.deepstack.{layer}."
        stored = {name.replace(begin, f"v.deepstack.{number}.") if name.startswith(begin) else name: tensor
                  for name, tensor in stored.items()}
    return stored


def values_of(tensor: Any, columns: int) -> numpy.ndarray:
    """A gguf.header.GgufTensor as floats (rows, columns)."""
    data = tensor.data.reshape(-1, tensor.data.shape[-1])
    return dequantized((len(data), columns), [(tensor._replace(data=data), None)], "float32")
