"""What a folder sees pictures with: what its files say of a row of TOWERS, and its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, TYPE_CHECKING

import numpy

from chatlm.common.errors import ConfigError, shown
from chatlm.worker.arrays.kinds import FLOATS, bits_of, floats, kind_of, of_kind
from chatlm.worker.model.projectors import PROJECTORS
from chatlm.worker.weights.files.safetensors_file import read_safetensors_file
from chatlm.worker.weights.files.weight_files import weight_files
from chatlm.worker.weights.formats.array_tensors import ArrayTensors
from chatlm.worker.weights.formats.folder.tensors import IMAGES
from chatlm.worker.weights.formats.sources import check_names_and_shapes, tensor_sources
from chatlm.worker.weights.rules import Rule, check_divides, checked, read_json
from chatlm.worker.weights.towers.families import CLAMPS, clamps_of
from chatlm.worker.weights.towers.table import TOWERS

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.worker.tower import StoredTower
    from chatlm.worker.weights.formats.sources import Sources
    from chatlm.worker.model.blocks.model import Model
    from chatlm.worker.weights.towers.families import TowerFamily


SECTIONS = Rule(int, 0, 1024, many=True)  # of M-RoPE


class FolderSays:
    """`Said` of a config.json, and of preprocessor_config.json or else processor_config.json."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config_path = folder / "config.json"
        self.config, self.shapes = read_json(self.config_path), dict[str, tuple[int, ...]]()

    @cached_property
    def preprocessor(self) -> tuple[Path, dict]:
        path = self.folder / "preprocessor_config.json"
        if raw := read_json(path, needed=False):
            return path, raw
        path = self.folder / "processor_config.json"
        return path, read_json(path, needed=False).get("image_processor") or {}

    def tower(self, key: str, rule: Rule, default: Any = None) -> Any:
        raw = self.config.get("vision_config")
        if not isinstance(raw, dict):
            raise ConfigError(f"{self.config_path}: vision_config is {shown(raw)}; it must be an object")
        return self.model(f"vision_config.{key}", rule, default)

    def model(self, key: str, rule: Rule, default: Any = None) -> Any:
        return checked(self.config_path, key, value_at(self.config, key, default), rule)

    def picture(self, key: str, rule: Rule, default: Any = None, length: int | None = None) -> Any:
        path, raw = self.preprocessor
        return checked(path, key, value_at(raw, key, default), rule, length)

    def divides(self, key: str, value: int, by: int):
        check_divides(self.config_path, key, value, by)

    def flag(self, key: str) -> bool:
        return False

    def sections(self) -> tuple[int, ...]:
        text = self.config.get("text_config")
        text = text if isinstance(text, dict) else {}
        rope = text.get("rope_parameters") or text.get("rope_scaling")
        rope = rope if isinstance(rope, dict) else {}
        where = "text_config.rope_parameters"
        if rope.get("mrope_interleaved", True) is not True:
            raise ConfigError(f"{self.config_path}: {where}.mrope_interleaved must be true")
        return tuple(checked(self.config_path, f"{where}.mrope_section", rope.get("mrope_section"),
                             SECTIONS, 3))

    def refuse(self, problem: str) -> NoReturn:
        raise ConfigError(f"{self.preprocessor[0]}: {problem}")


def value_at(raw: Any, path: str, default: Any) -> Any:
    """A value in nested objects. The path joins their names by dots."""
    value = raw
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return default if value is None else value


def folder_tower(folder: Path, settings: Settings, model: Model, dtype: str) -> StoredTower | None:
    """What the folder sees with; None if it has nothing. ConfigError if this program cannot compute it."""
    said = FolderSays(folder)
    kind = said.config.get("model_type", "")
    family = TOWERS.get(kind)
    if family is None:
        if said.config.get("vision_config"):
            raise ConfigError(f"{said.config_path}: this server cannot compute the vision tower of a "
                              f"{shown(kind)} yet")
        return None
    tower = family.of_folder(said, model)
    return tower._replace(tensors=folder_tensors(folder, settings, family, tower, model.width, dtype))


def folder_tensors(folder: Path, settings: Settings, family: TowerFamily, tower: StoredTower, width: int,
                   dtype: str) -> dict[str, Any]:
    """The tensors of StoredTower, yet to be read."""
    state = tower_state(folder)
    numbers = {name: float(floats(state.pop(name)).reshape(())) for name in [*state] if name.endswith(CLAMPS)}
    for name, tensor in state.items():
        if kind_of(tensor) not in FLOATS:
            raise ConfigError(f"{folder}: {shown(name)} is of type {kind_of(tensor)}; what sees images must "
                              f"be {', '.join(FLOATS)}")
    state = in_our_layout(state, family, tower.head_size)
    sources = tower_sources(family, family.names, tower, width)
    check_names_and_shapes(folder, {name: tuple(tensor.shape) for name, tensor in state.items()}, sources)
    tensors: dict[str, Any] = dict(ArrayTensors(folder, settings, state, dtype).of(sources))
    return tensors | unstored(tower) | clamps_of(folder, family.names, tower.architecture, numbers)


def tower_state(folder: Path) -> dict[str, Any]:
    """A folder's tensors of what sees pictures, by their names from the tower's or the projector's on."""
    state = {}
    for path in weight_files(folder):
        for name, tensor in read_safetensors_file(path).items():
            if re.match(rf"(model\.)?({IMAGES})\b", name):
                name = re.sub(r"^(model\.)?(vision_tower\.)?(vision_model\.|connector\.)?", "", name)
                state[name] = tensor
    return {name: tensor for name, tensor in state.items()
            if not name.startswith(("head.", "audio_tower.", "embed_audio."))}


def in_our_layout(state: Mapping[str, Any], family: TowerFamily, head_size: int) -> dict[str, Any]:
    """A folder's tensors with rows, columns and values as ours have them."""
    state = dict(state)
    [kernel] = family.names["patch"]
    weight = state.get(kernel)
    if weight is not None and len(weight.shape) == 4:
        state[kernel] = of_kind(by_color(bits_of(weight)), kind_of(weight))
    if weight is not None and len(weight.shape) == 5:  # a picture is a film of so many equal ones
        state[kernel] = by_color(floats(weight).sum(axis=2))
    for name in state:
        if family.axes and re.search(family.axes, name):
            rows = bits_of(state[name])
            state[name] = of_kind(rows[by_halves(len(rows), head_size)], kind_of(state[name]))
    for ours in (*family.transposed, *family.swapped):
        [name] = family.names[ours]
        weight = state.get(name)
        if weight is not None and len(weight.shape) > 1:
            swapped = numpy.ascontiguousarray(bits_of(weight).swapaxes(0, 1))
            state[name] = of_kind(swapped, kind_of(weight))
    for ours, more in family.added.items():
        [name] = family.names[ours]
        if name in state:
            state[name] = floats(state[name]) + numpy.float32(more)
    return state


def by_halves(count: int, size: int) -> numpy.ndarray:
    """An order of rows for heads of this size. In the file each half of a head has its own first and second
    half of pairs; here the first halves come first."""
    order = numpy.arange(count).reshape(-1, 2, 2, size // 4)
    return order.swapaxes(1, 2).reshape(-1)


def by_pairs(count: int, size: int) -> numpy.ndarray:
    """An order of rows for heads of this size. In the file pairs are adjacent; here they are (i, i + D /
    2)."""
    return numpy.arange(count).reshape(-1, size // 2, 2).swapaxes(1, 2).reshape(-1)


def unstored(tower: StoredTower) -> dict[str, Any]:
    """The tensors of a stage that no file has: a last norm, which nothing reads."""
    if PROJECTORS[tower.projector].normed:
        return {}
    return {"final_norm": numpy.ones(tower.architecture.width, numpy.float32)}


def tower_sources(family: TowerFamily, names: Any, tower: StoredTower, width: int) -> Sources:
    """The sources of a tower's layers and of its own tensors."""
    sources: Sources = {}
    for ours, source in tensor_sources(tower.architecture, names, 0).items():
        if ours not in unstored(tower) and not ours.endswith(".clamps"):
            sources[ours] = source
    for ours, shape in family.own(tower, width).items():
        sources[ours] = shape, {names[ours][0]: shape}
    return sources


def by_color(kernel: numpy.ndarray) -> numpy.ndarray:
    """A convolution's (C, 3, p, p) as (C, p * p * 3): the numbers of a patch by row, column and color."""
    return numpy.ascontiguousarray(kernel.transpose(0, 2, 3, 1)).reshape(
        len(kernel), math.prod(kernel.shape[1:]))
