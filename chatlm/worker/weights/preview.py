"""Checks a model before its weights are downloaded: the role `preview`, which the download starts."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path

from chatlm.common.errors import ConfigError, printable, shown
from chatlm.common.files import Truncated
from chatlm.worker.weights.families.table import GGUF_FAMILIES
from chatlm.worker.weights.formats.folder.description import hf_blocks, hf_text
from chatlm.worker.weights.formats.gguf.description import gguf_blocks, gguf_text
from chatlm.worker.weights.formats.gguf.file import ROPE_TENSORS, check_gguf_types, read_gguf_file, readable
from chatlm.worker.weights.formats.nanochat.folder import MODEL_TYPE, folder_blocks
from chatlm.worker.weights.rules import read_json
from chatlm.worker.weights.text.folder_tokenizers import has_tokenizer
from chatlm.worker.weights.towers.table import FILE_TOWERS


def preview_folder(folder: Path):
    """ConfigError if this server cannot run the model of a folder, whose weights are not there yet."""
    path = folder / "config.json"
    raw = read_json(path)
    if raw.get("model_type") == MODEL_TYPE:
        model, _ = folder_blocks(path, raw)
    else:
        _, model = hf_blocks(path, None)
    if has_tokenizer(folder):
        hf_text(folder, model.vocab_size)


def preview_gguf(path: Path, size: int):
    """ConfigError if this server cannot run the model of a GGUF file of `size` bytes, of which only the
    beginning is here. Truncated if the header goes on."""
    with readable(path):
        metadata, stored = read_gguf_file(path, size)
        known = metadata.get("general.architecture") in GGUF_FAMILIES
        elsewhere = metadata.get("split.count", 1) != 1 or set(ROPE_TENSORS) & stored.keys()
        if not known or not elsewhere:  # what it states about tensors may need all of them
            gguf_blocks(path, metadata, stored, None)
        check_gguf_types(path, stored)
        gguf_text(path, metadata)


def preview_tower(path: Path, size: int):
    """ConfigError if no known mmproj file fits the model of a GGUF file of `size` bytes."""
    with readable(path):
        metadata = read_gguf_file(path, size)[0]
        architecture = metadata.get("general.architecture")
        tokens = {*metadata["tokenizer.ggml.tokens"]}
    if not any(architecture in family.architectures and family.token in tokens
               for family in FILE_TOWERS.values()):
        raise ConfigError(f"what models of the architecture {shown(architecture)} with its tokens see images "
                          "with is not known")


def preview_main(arguments: Seq[str]) -> int:
    """The role `preview PATH SIZE`, perhaps with `tower`, or `preview FOLDER`. Exit status 1: stdout says
    what is wrong. 2: not known yet."""
    path, *size = arguments
    try:
        if size:
            look = preview_tower if size[1:] == ["tower"] else preview_gguf
            look(Path(path), int(size[0]))
        else:
            preview_folder(Path(path))
    except Truncated:
        return 2
    except ConfigError as error:
        print(printable(str(error)), flush=True)
        return 1
    return 0
