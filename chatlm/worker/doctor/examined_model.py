"""The model that checks look at. Its files are opened once, when a check first needs them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from chatlm.common.text.load import open_tokenizer
from chatlm.worker.weights.formats.gguf.file import read_gguf, readable
from chatlm.worker.weights.formats.litgpt import config_json
from chatlm.worker.weights.load import open_model
from chatlm.worker.weights.rules import read_json

if TYPE_CHECKING:
    from pathlib import Path
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import ModelSource, TextSpec
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.worker.weights.loaded.model import LoadedModel


class ExaminedModel:
    """A model as a worker would open it, and what its files say themselves.

    Each property may raise ConfigError. `against`: the model it was quantized from, if one was given."""

    def __init__(self, source: ModelSource, settings: Settings, against: ModelSource | None = None,
                 threads: int = 1):
        self.source = source
        self.settings = settings
        self.threads = threads
        self.original = against and ExaminedModel(against, replace(settings, quantize=None, lora=()),
                                            threads=threads)

    @property
    def kind(self) -> str:
        """The kind of ModelSource: "gguf", "hf", "litgpt", "nanochat" or "nanogpt"."""
        return self.source.kind

    @property
    def path(self) -> Path:
        return self.source.path

    @cached_property
    def model(self) -> LoadedModel:
        """The spec, the unread tensors and the text, as a worker without a GPU has them."""
        return open_model(self.source, self.settings, "cpu")

    @cached_property
    def floats(self) -> LoadedModel:
        """The same model, whose matrices are float32 when they are read."""
        return open_model(self.source, replace(self.settings, dtype="float32", quantize=None), "cpu")

    @property
    def text(self) -> TextSpec:
        return self.model.text

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer as the front has it."""
        return open_tokenizer(self.text)

    @cached_property
    def pipeline(self) -> dict:
        """The tokenizer.json, or what stands for one; {} where the tokenizer is of another kind."""
        return json.loads(self.text.payload) if self.text.kind == "hf" else {}

    @cached_property
    def vocab(self) -> dict[str, int]:
        """The ids of a tokenizer.json's own tokens, without those added; {} for other tokenizers."""
        vocab = self.pipeline.get("model", {}).get("vocab", {})
        return {entry[0]: token for token, entry in enumerate(vocab)} if isinstance(vocab, list) else vocab

    @cached_property
    def gguf(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """The metadata and the tensors (gguf.header.Tensor) of a GGUF file; ({}, {}) of other models."""
        if self.kind != "gguf":
            return {}, {}
        with readable(self.path):
            return read_gguf(self.path)

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.gguf[0]

    def json(self, name: str) -> dict:
        """A JSON file of a folder of Hugging Face or litgpt; {} without it, or if the model is no folder."""
        return read_json(self.path / name, needed=False) if self.kind in ("hf", "litgpt") else {}

    @property
    def config(self) -> dict:
        """The config.json of a folder, or what litgpt's says; {} of other models."""
        return config_json(self.path) if self.kind == "litgpt" else self.json("config.json")
