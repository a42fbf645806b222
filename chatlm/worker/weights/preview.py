"""What can be said of a model before its weights are here: the role `preview`, which the download starts."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path

from chatlm.common.errors import ConfigError, printable
from chatlm.common.files import Truncated
from chatlm.worker.weights.gguf import gguf_spec, gguf_text, readable
from chatlm.worker.weights.gguf_file import GGUF_FAMILIES, ROPE_TENSORS, check_gguf_types, read_gguf_file
from chatlm.worker.weights.huggingface import hf_spec, hf_text


def preview_folder(folder: Path):
    """ConfigError if no server can run the model of a folder that has no weights yet."""
    _, spec = hf_spec(folder / "config.json", None)
    if (folder / "tokenizer.json").exists():
        hf_text(folder, spec.vocab_size)


def preview_gguf(path: Path, size: int):
    """The same of the beginning of a GGUF file of `size` bytes. Truncated if its header goes on."""
    with readable(path):
        metadata, stored = read_gguf_file(path, size)
        known = metadata.get("general.architecture") in GGUF_FAMILIES
        elsewhere = metadata.get("split.count", 1) != 1 or set(ROPE_TENSORS) & stored.keys()
        if not known or not elsewhere:  # what it says of its tensors may need more of them
            gguf_spec(path, metadata, stored, None)
        check_gguf_types(path, stored)
        gguf_text(path, metadata)


def preview_main(arguments: Seq[str]) -> int:
    """The role `preview PATH SIZE`, or `preview FOLDER`. Exit status 1: stdout has what is wrong; 2: it
    cannot be told yet."""
    path, *size = arguments
    try:
        if size:
            preview_gguf(Path(path), int(size[0]))
        else:
            preview_folder(Path(path))
    except Truncated:
        return 2
    except ConfigError as error:
        print(printable(str(error)), flush=True)
        return 1
    return 0
