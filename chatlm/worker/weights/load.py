"""`open_model`: a `ModelSource` becomes a `LoadedModel`, whose weights are yet to be read."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError
from chatlm.common.log import log
from chatlm.worker.arrays.kinds import Device
from chatlm.worker.weights.huggingface import open_hf
from chatlm.worker.weights.litgpt import open_litgpt
from chatlm.worker.weights.nanochat import open_nanochat
from chatlm.worker.weights.nanogpt import open_nanogpt
from chatlm.worker.weights.rules import check_rotary_memory
from chatlm.worker.weights.vision import folder_eyes

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import ModelSource
    from chatlm.worker.weights.rules import LoadedModel


def open_model(source: ModelSource, settings: Settings,
               device: str = "cpu") -> LoadedModel:
    """Everything of a model but its weights, which are read later, as --dtype or else the fastest type here.

    Norms and per-layer scalars stay float32. Raises ConfigError naming file, keys and shapes when the files
    are not a complete model of a known kind."""
    if source.kind == "gguf":
        from chatlm.worker.weights.gguf import open_gguf as opener
    else:
        opener = {"nanochat": open_nanochat, "nanogpt": open_nanogpt, "hf": open_hf,
                  "litgpt": open_litgpt}[source.kind]
    model = with_eyes(opener(source, settings, device), source, settings, device)
    length = settings.context_length or model.context_length
    if length > model.context_length:
        raise ConfigError(f"--context-length {length} is more than the model's {model.context_length}, its "
                          "own rope scaling included")
    embeds = model.text.embedder is not None
    model.spec = replace(model.spec, embeds=embeds)
    if settings.context_length:
        model.spec = replace(model.spec, max_positions=length, answer_positions=0)  # no longer than needed
    check_rotary_memory(source.path, model.spec, model.spec.max_positions)
    return model


def with_eyes(model: LoadedModel, source: ModelSource, settings: Settings, device: str) -> LoadedModel:
    """A loaded model that sees with what its files have; without that, and where towers are not computed, it
    reads texts alone."""
    if source.kind not in ("hf", "gguf") or model.text.embedder:
        return model
    several = settings.tensor_parallel_size > 1 or settings.pipeline_parallel_size > 1
    try:
        if source.kind == "gguf":
            from chatlm.worker.weights.mmproj import gguf_eyes
            eyes = gguf_eyes(source.path, settings, model, device)
        else:
            eyes = folder_eyes(source.path, settings, model.spec, model.dtype or "float32")
        if eyes and (several or Device(device).type != "cpu"):
            raise ConfigError("models see images only on a CPU, in one process")
    except ConfigError as error:
        if settings.mmproj:
            raise
        log.warning("%s reads texts alone: %s", model.name, error)
        return model
    if eyes:
        model.spec = replace(
            model.spec, sees=True, deep_rows=len(eyes.deep), rope_axes=eyes.axes, two_sided=eyes.two_sided,
            picture_pad=eyes.pad)
        model.text = replace(model.text, vision=eyes.vision)
        model.eyes = eyes
    return model
