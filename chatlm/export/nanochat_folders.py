"""nanochat's checkpoints as Hugging Face folders: with code of their own, or as transformers' own `nanochat`.

transformers' model is generation 1, and does not round cos and sin to bfloat16 as nanochat did then. Loaded
with the model_type `nanochat`, the weights of a later generation would make a model that is silently wrong,
so those have a model_type of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from chatlm.common.errors import ConfigError
from chatlm.export.hub_model import HubModel, Weights
from chatlm.export.older_words import notes_on_versions
from chatlm.worker.arrays.kinds import as_kind, floats, item_bytes, kind_of
from chatlm.worker.model.tensors import advise
from chatlm.worker.weights.formats.nanochat.checkpoint import nanochat_generation
from chatlm.worker.weights.formats.nanochat.folder import (
    MODEL_TYPE, features_of, folder_name, rope_base, sizes_of)

if TYPE_CHECKING:
    import numpy

    from chatlm.worker.weights.changes import Change, Copy
    from chatlm.worker.weights.formats.checkpoint import CheckpointModel

OWN_CODE = ("configuration_nanochat_generations.py", "modeling_nanochat_generations.py")
AUTO_MAP = {
    "AutoConfig": "configuration_nanochat_generations.NanochatGenerationsConfig",
    "AutoModel": "modeling_nanochat_generations.NanochatGenerationsModel",
    "AutoModelForCausalLM": "modeling_nanochat_generations.NanochatGenerationsForCausalLM"}
NO_SMEAR_ELSEWHERE = (
    "Programs that run a model of transformers' on tokens without their neighbours, such as vLLM, cannot run "
    "this one: a token's input has a part of the token before it.")
UNROUNDED = (
    "nanochat's generation 1 rounds cos and sin of its rotary embedding to bfloat16, and transformers' "
    "`nanochat` does not. ")


def with_own_code(stored: CheckpointModel, added: Mapping[str, list[Change | Copy]],
                  dtype: str | None) -> HubModel:
    """A checkpoint of any generation, exactly. `added`: what adapters change."""
    number = nanochat_generation(stored.state)
    config = sizes_of(stored.model) | {
        "dtype": dtype or widest(stored.state.values()),
        "architectures": ["NanochatGenerationsForCausalLM"], "auto_map": AUTO_MAP,
        "model_type": MODEL_TYPE} | features_of(stored.model, number)
    notes = (NO_SMEAR_ELSEWHERE,) if config["smear_channels"] else ()
    return HubModel(config, weights_of(stored, added, dtype), stored.tokenizer, code=OWN_CODE,
                    notes=(*notes, *notes_on_versions(config)))


def as_transformers_own(stored: CheckpointModel, added: Mapping[str, list[Change | Copy]], dtype: str | None,
                        difference: Callable[[], str]) -> HubModel:
    """A checkpoint of generation 1 as transformers' model. `difference` computes a sentence about what the
    rounding changes. ConfigError for other generations."""
    number = nanochat_generation(stored.state)
    if number != 1:
        raise ConfigError(f"--format transformers: transformers' own nanochat is generation 1, and this is "
                          f"generation {number}, which it cannot compute. --format hf can hold it, with "
                          "code of its own")
    base = rope_base(stored.model)
    config = sizes_of(stored.model) | {
        "dtype": dtype or widest(stored.state.values()),
        "architectures": ["NanoChatForCausalLM"], "model_type": "nanochat", "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": base}}
    return HubModel(config, weights_of(stored, added, dtype), stored.tokenizer,
                    notes=(UNROUNDED + difference(), *notes_on_versions(config)))


def widest(tensors: Iterable[numpy.ndarray]) -> str:
    """The type that holds the values of all tensors: float32 if they differ."""
    kinds = {kind_of(tensor) for tensor in tensors}
    return kinds.pop() if len(kinds) == 1 else "float32"


def weights_of(stored: CheckpointModel, added: Mapping[str, list[Change | Copy]],
               dtype: str | None) -> list[Weights]:
    """The checkpoint's tensors by transformers' names, without the padding of the vocabulary."""
    weights = []
    for name, tensor in stored.state.items():
        kind = target_kind(tensor, name in added, dtype)
        shape = tensor.shape
        if is_of_vocabulary(name):
            shape = stored.model.vocab_size, *shape[1:]
        called = folder_name(name)
        read = partial(tensor_of, tensor, added.get(name, ()), shape, kind)
        weights.append(Weights({called: tuple(shape)}, kind, read))
    return weights


def target_kind(tensor: numpy.ndarray, changed: bool, dtype: str | None) -> str:
    """The type of a tensor in the folder. Vectors, such as the lambdas, are few and are never rounded."""
    kind = kind_of(tensor)
    if kind == "float64" or changed:
        kind = "float32"
    if dtype and (tensor.ndim > 1 or item_bytes(dtype) > item_bytes(kind)):
        return dtype
    return kind


def tensor_of(tensor: numpy.ndarray, changes: Iterable[Change | Copy], shape: tuple[int, ...],
              kind: str) -> Iterator[numpy.ndarray]:
    made = tensor
    for change in changes:
        made = change.on(made)
    made = made[:shape[0]]
    yield as_kind(floats(made) if kind_of(made) == "float64" else made, kind)
    advise((tensor,), "MADV_DONTNEED")


def is_of_vocabulary(name: str) -> bool:
    return name in ("transformer.wte.weight", "lm_head.weight") or name.startswith("value_embeds.")
