"""`written_model`: which models can be written as a GGUF file, by the kind of their files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError
from chatlm.export.gguf.folder import written_folder
from chatlm.export.gguf.gguf_source import written_gguf
from chatlm.export.gguf.nanochat_files import written_nanochat

if TYPE_CHECKING:
    from chatlm.common.messages.requests import ModelSource
    from chatlm.export.gguf.export_model import ExportModel


def written_model(source: ModelSource, softcap: float | None = None) -> ExportModel:
    """ConfigError for models that this program cannot write as a GGUF file."""
    if source.kind == "gguf":
        return written_gguf(source.path)
    if source.kind == "nanochat":
        return written_nanochat(source, softcap)
    if source.kind == "hf":
        return written_folder(source)
    raise ConfigError(f"{source.path}: a {source.kind} model cannot be written as a GGUF file; GGUF files, "
                      "nanochat checkpoints and Hugging Face folders can")
