"""The files by which models of nanoGPT and litgpt are known."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path


NANOGPT_FILE = "ckpt.pt"
LITGPT_FILE = "lit_model.pth"
LITGPT_CONFIG = "model_config.yaml"


def is_hugging_face(names: Collection[str]) -> bool:
    return "config.json" in names and any(name.endswith(".safetensors") for name in names)


def is_litgpt(names: Collection[str]) -> bool:
    """Is a folder of these files one of litgpt? Where the Hugging Face files that it was made from still lie
    beside, they are the same model, and count."""
    return LITGPT_FILE in names and LITGPT_CONFIG in names and not is_hugging_face(names)


def is_litgpt_folder(folder: Path) -> bool:
    """Not one that cannot be listed: its reader says why."""
    with suppress(OSError):
        return is_litgpt(os.listdir(folder)) and (folder / LITGPT_FILE).is_file()
    return False
