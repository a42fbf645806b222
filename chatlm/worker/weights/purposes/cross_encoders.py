"""The heads of cross-encoders: rerankers that read both texts of a pair at once and score them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy

from chatlm.common.errors import ConfigError, shown
from chatlm.common.log import log
from chatlm.worker.arrays.kinds import floats
from chatlm.worker.arrays.packed import dequantize
from chatlm.worker.model.head import Dense, Head
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.weights.rules import Rule, checked, read_json

SCORES = "classifier.weight", "classifier.out_proj.weight"  # with one row for each label


def classifies(state: Mapping[str, Any]) -> bool:
    """Does a folder of a model of whole texts have the head of a cross-encoder?"""
    return any(name in state for name in SCORES)


def folder_head(path: Path, config: Mapping, model: Model, state: Mapping[str, Any]) -> Head:
    """The head of a folder's cross-encoder, whose tensors are in `state`. ConfigError if it has another form,
    or more than one label."""
    def dense(name: str, activation: str = "identity", **norm: Any) -> Dense:
        rows = model.width if name.endswith("dense") else 1
        weight = one(f"{name}.weight", (rows, model.width))
        bias = maybe(f"{name}.bias", (rows,))
        return Dense(weight, bias, activation, **norm)

    def one(name: str, shape: tuple[int, ...]) -> numpy.ndarray:
        return floating(path.parent, name, state.get(name), shape, floats)

    def maybe(name: str, shape: tuple[int, ...]) -> numpy.ndarray | None:
        return one(name, shape) if name in state else None

    if "classifier.out_proj.weight" in state:  # RoBERTa
        return Head((dense("classifier.dense", "tanh"), dense("classifier.out_proj")), "cls")
    last = dense("classifier")
    if "head.dense.weight" in state:  # ModernBERT
        pools = checked(path, "classifier_pooling", config.get("classifier_pooling", "cls"),
                        Rule(str, choices=("cls", "mean")))
        activation = checked(path, "classifier_activation", config.get("classifier_activation", "gelu"),
                             Rule(str, choices=("gelu",)))
        assert model.norm
        norm = {"norm": one("head.norm.weight", (model.width,)), "eps": model.norm.eps,
                "norm_bias": maybe("head.norm.bias", (model.width,))}
        return Head((dense("head.dense", activation, **norm), last), pools)
    pooler = next((name for name in state if name.endswith("pooler.dense.weight")), "")
    if not pooler:
        raise ConfigError(f"{path.parent}: {SCORES[0]} stands alone; a cross-encoder of this family has a "
                          "pooler.dense before it")
    return Head((dense(pooler.removesuffix(".weight"), "tanh"), last), "cls")


def makes_probabilities(path: Path, config: Mapping) -> bool:
    """Does a sigmoid follow the scores of a folder's cross-encoder? Its files may say that it does not.
    sentence-transformers has written it in three places; the latest one counts first."""
    key = "sbert_ce_default_activation_function"
    latest = path.with_name("config_sentence_transformers.json")
    more = config.get("sentence_transformers")
    name = read_json(latest, needed=False).get("activation_fn")
    if name is not None:
        path = latest
    elif isinstance(more, dict):
        name = more.get("activation_fn")
    name = name or config.get(key) or "torch.nn.modules.activation.Sigmoid"
    kind = str(name).rpartition(".")[2]
    if kind not in ("Sigmoid", "Identity"):
        raise ConfigError(f"{path}: the activation of its scores is {shown(name)}; it must be Sigmoid or "
                          "Identity")
    return kind == "Sigmoid"


def gguf_head(path: Path, metadata: Mapping, model: Model, pooling: str,
              stored: Mapping[str, Any]) -> Head:
    """The head of a GGUF file's encoder, from the tensors in `stored`: a cross-encoder's classifier, or dense
    layers.

    Files of BERT lack the pooler that its classifier needs, so they are refused. RoBERTa's are complete."""
    def value(tensor: Any) -> numpy.ndarray:
        rows = floats(dequantize(tensor.tensor_type, numpy.asarray(tensor.data)))
        return rows.reshape(tuple(reversed(tensor.shape.tolist())))

    def one(name: str, shape: tuple[int, ...]) -> numpy.ndarray:
        return floating(path, name, stored.get(name), shape, value)

    if pooling != "rank":
        layers = []
        width = model.width
        for name in sorted(name for name in stored if re.fullmatch(r"dense_\d\.weight", name)):
            layers.append(Dense(one(name, (int(stored[name].shape[1]), width))))
            width = int(stored[name].shape[1])
        if not layers and metadata["general.architecture"] == "gemma-embedding":
            log.warning("%s lacks the dense layers that follow the mean in EmbeddingGemma, as many such "
                        "files do: its vectors differ from those of the original", path)
        return Head(tuple(layers))
    own = f"{metadata['general.architecture']}."
    if metadata.get("tokenizer.ggml.model") == "bert" or "cls.weight" not in stored:
        raise ConfigError(f"{path}: {own}pooling_type is 4 (rank), but the file lacks a part of the head, as "
                          "llama.cpp's files of BERT rerankers do: use the model's folder")
    C = model.width
    first = Dense(one("cls.weight", (C, C)), one("cls.bias", (C,)), "tanh")
    return Head((first, Dense(one("cls.output.weight", (1, C)), one("cls.output.bias", (1,)))), "cls")


def floating(path: Path, name: str, tensor: Any, shape: tuple[int, ...],
             read: Callable[[Any], numpy.ndarray]) -> numpy.ndarray:
    """A tensor as float32 of this shape. ConfigError if it has another shape or is missing."""
    if tensor is None:
        raise ConfigError(f"{path}: the tensors do not match this model: missing {name} {shape}")
    found = read(tensor)
    if tuple(found.shape) != shape:
        more = ("; this server ranks with models that have one label" if shape[0] == 1
                and name.startswith("c") else "")
        raise ConfigError(f"{path}: {name} is {tuple(found.shape)} instead of {shape}{more}")
    if not numpy.isfinite(found).all():
        raise ConfigError(f"{path}: {name} has values that are not finite")
    return found
