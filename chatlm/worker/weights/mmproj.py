"""What a GGUF model sees pictures with: the file that llama.cpp calls mmproj, beside the model or named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TYPE_CHECKING

import numpy

from chatlm.common.errors import ConfigError, shown
from chatlm.common.messages.requests import Vision
from chatlm.worker.arrays.packed import dequantized
from chatlm.worker.model.kernels import choose_backend
from chatlm.worker.model.tower import Eyes
from chatlm.worker.weights.assemble import check_names_and_shapes, tensor_sources
from chatlm.worker.weights.gguf import file_shape, gguf_tensors, readable
from chatlm.worker.weights.gguf_file import check_gguf_types, read_gguf_file
from chatlm.worker.weights.rules import (
    MOST_CHANNELS, MOST_HEADS, MOST_LAYERS, Rule, check_divides, checked)
from chatlm.worker.weights.vision import SIDE, tower_spec

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.worker.weights.rules import LoadedModel


NAMES = {  # of a tower's tensors
    f"{ours}{ending}": (f"{theirs}.{part}",) for ending, part in (("", "weight"), ("_bias", "bias"))
    for ours, theirs in (
        ("final_norm", "v.post_ln"), ("attention_norm", "v.blk.{}.ln1"), ("ffn_norm", "v.blk.{}.ln2"),
        ("output", "v.blk.{}.attn_out"), ("up", "v.blk.{}.ffn_up"), ("down", "v.blk.{}.ffn_down"))} | {
    f"qkv{ending}": tuple(f"v.blk.{{}}.attn_{name}.{part}" for name in "qkv")
    for ending, part in (("", "weight"), ("_bias", "bias"))}
KERNEL, PLACES, PROJECT = "v.patch_embd.weight", "v.position_embd.weight", "mm.model.fc.weight"
BEST = ("f16", "bf16", "q8_0", "f32")  # the first of these among several files


def file_beside(model: Path) -> Path | None:
    """The mmproj*.gguf in a model's folder; of several the one of the best type."""
    def rank(path: Path) -> tuple[int, str]:
        name = path.name.lower()
        return next((i for i, kind in enumerate(BEST) if kind in name), len(BEST)), name

    return min((path for path in model.parent.iterdir() if path.name.lower().startswith("mmproj")
                and path.suffix.lower() == ".gguf"), key=rank, default=None)


def gguf_eyes(model: Path, settings: Settings, loaded: LoadedModel, device: str) -> Eyes | None:
    """None if there is no such file."""
    path = Path(settings.mmproj).expanduser() if settings.mmproj else file_beside(model)
    if path is None:
        return None
    if not path.is_file():
        raise ConfigError(f"--mmproj {path}: there is no such file")
    with readable(path):
        return eyes_of(path, settings, loaded, device, *read_gguf_file(path))


def eyes_of(path: Path, settings: Settings, loaded: LoadedModel, device: str, metadata: Mapping[str, Any],
            stored: dict[str, Any]) -> Eyes:
    def value(key: str, rule: Rule, default: Any = None, length: int | None = None) -> Any:
        return checked(path, f"clip.vision.{key}", metadata.get(f"clip.vision.{key}", default), rule, length)

    if metadata.get("general.architecture") != "clip":
        raise ConfigError(f"{path}: general.architecture is {shown(metadata.get('general.architecture'))}; a "
                          "file that sees images has clip")
    kind = metadata.get("clip.projector_type", metadata.get("clip.vision.projector_type"))
    checked(path, "clip.projector_type", kind, Rule(str, choices=("idefics3",)))
    if b'"<fake_token_around_image>"' not in loaded.text.payload:
        raise ConfigError(f"{path}: it belongs to another model: this one has no <fake_token_around_image>")
    side, patch = value("image_size", SIDE), value("patch_size", SIDE)
    check_divides(path, "clip.vision.image_size", side, patch)
    shuffle = value("projector.scale_factor", Rule(int, 1, 64))
    check_divides(path, "clip.vision.image_size / patch_size", side // patch, shuffle)
    patches, width = (side // patch) ** 2, value("embedding_length", Rule(int, 16, MOST_CHANNELS))
    heads = value("attention.head_count", Rule(int, 1, MOST_HEADS))
    check_divides(path, "clip.vision.embedding_length", width, heads)
    spec = tower_spec(width, value("block_count", Rule(int, 1, MOST_LAYERS)), heads,
                      value("feed_forward_length", Rule(int, 16, MOST_CHANNELS)), patches,
                      value("attention.layer_norm_epsilon", Rule(float, 0, 1)), "gelu_tanh")
    color = Rule(float, -10, 10, many=True)
    mean, std = (tuple(value(f"image_{name}", color, [0.5] * 3, 3)) for name in ("mean", "std"))
    if not all(std):
        raise ConfigError(f"{path}: clip.vision.image_std is {shown(list(std))}; none may be 0")
    longest = value("preproc_image_size", SIDE, 4 * side)
    vision = Vision("idefics3", loaded.spec.vocab_size, "<image>", side, patches // shuffle**2, longest)
    tensors = tower_tensors(path, settings, loaded, device, Eyes(
        vision, spec, stored, patch, shuffle, "lanczos", mean, std))
    return Eyes(vision, spec, tensors, patch, shuffle, "lanczos", mean, std)


def tower_tensors(path: Path, settings: Settings, loaded: LoadedModel, device: str,
                  eyes: Eyes) -> dict[str, Any]:
    """Those of Eyes; `eyes` has the file's. Layers stay as stored, all else becomes floats."""
    spec, stored, C, p = eyes.spec, dict(eyes.tensors), eyes.spec.width, eyes.patch
    check_gguf_types(path, stored)
    for layer in range(spec.layers):  # old files have these two exchanged
        up, down = (f"v.blk.{layer}.{name}" for name in ("ffn_up", "ffn_down"))
        if f"{up}.weight" in stored and spec.ffn_size != C and (
                file_shape(up, stored[f"{up}.weight"])[0] == C):
            for part in ("weight", "bias"):
                names = f"{up}.{part}", f"{down}.{part}"
                stored |= dict(zip(names, [stored.pop(name) for name in names][::-1]))
    sources, joined = tensor_sources(spec, NAMES, 0), C * eyes.shuffle**2
    own = {"patch": ((C, 3, p, p), KERNEL), "patch_bias": ((C,), "v.patch_embd.bias"),
           "places": ((eyes.patches, C), PLACES), "project": ((loaded.spec.width, joined), PROJECT)}
    check_names_and_shapes(path, {name: file_shape(name, tensor) for name, tensor in stored.items()},
                           sources | {ours: (shape, {name: shape}) for ours, (shape, name) in own.items()})
    tensors: dict[str, Any] = dict(gguf_tensors(path, settings, spec, sources, stored, loaded.dtype,
                                               choose_backend(device, spec), False, False))
    for ours, (shape, name) in own.items():
        columns = shape[-1]
        data = stored[name].data.reshape(-1, stored[name].data.shape[-1])
        values = dequantized((len(data), columns), [(stored[name]._replace(data=data), None)], "float32")
        tensors[ours] = values.reshape(shape)
    tensors["patch"] = numpy.ascontiguousarray(
        tensors["patch"].transpose(0, 2, 3, 1)).reshape(C, 3 * p * p)
    return tensors
