"""The draft head (MTP) that a model ships with: one layer more, which guesses the token after the next.

    x = eh_proj [norm_e(embedding of t_p); norm_h(h_{p-1})];  h'_p = norm(layer(x));  head(h'_p) draws t_{p+1}

h is the model's state after its final norm (llama.cpp's convention: entry p depends on tokens up to p alone).
It becomes a model of its own, whose input is a `Join`; embedding and output matrix are those of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TYPE_CHECKING

import numpy

from chatlm.worker.arrays.gguf_types import TYPES, block_of
from chatlm.worker.arrays.packed import dequantize
from chatlm.worker.model.blocks.experts import Experts
from chatlm.worker.model.blocks.feed_forward import FeedForward
from chatlm.worker.model.blocks.input import Join
from chatlm.worker.model.blocks.norms import RmsNorm

if TYPE_CHECKING:
    from chatlm.worker.model.blocks.model import Model
    from chatlm.worker.weights.families.family import Family


JOINED = ("join_embed", "join_hidden", "join_embed_norm", "join_hidden_norm")
Table = dict[str, tuple[str, ...]]
TABLE: Table = {name: (f"{name}.weight",) for name in JOINED}
FOLDER_NAMES = {"mtp.norm.weight": "model.norm.weight",
                "mtp.pre_fc_norm_embedding.weight": "join_embed_norm.weight",
                "mtp.pre_fc_norm_hidden.weight": "join_hidden_norm.weight"}
GGUF_NAMES = {"nextn.shared_head_norm.weight": "output_norm.weight",
              "nextn.enorm.weight": "join_embed_norm.weight",
              "nextn.hnorm.weight": "join_hidden_norm.weight"}
JOINT = "mtp.fc.weight"  # its first columns read the embedding, the others the model's state
GGUF_JOINT = "nextn.eh_proj.weight"
COPIES = ("nextn.embed_tokens.weight", "nextn.shared_head_head.weight")  # of the model's


def head_blocks(model: Model, dense: int | None) -> Model:
    """A model's draft head: one of its layers that attend, with a feed-forward part like theirs.

    dense: how wide that part is if it has no experts, although the model has"""
    feed = model.feed
    norm = model.norm
    assert isinstance(feed, Experts | FeedForward) and isinstance(norm, RmsNorm)
    if dense is not None:
        feed = FeedForward(dense, feed.activation)
    layer = next(layer for layer, attn in zip(model.layers, model.by_layer) if attn)
    return replace(model, input=Join(RmsNorm(norm.eps)), layers=(replace(layer, feed=feed),))


def folder_head(model: Model, row: Family, state: Mapping[str, numpy.ndarray],
                scales: Mapping[str, numpy.ndarray]
                ) -> tuple[Model, Table, dict[str, numpy.ndarray], dict[str, numpy.ndarray]] | None:
    """A folder's draft head as a model of one layer: its blocks, our tensors -> the names of its own, and
    these tensors and their scales by such names. None if the folder has none."""
    joint = state.get(JOINT)
    if not isinstance(joint, numpy.ndarray) or JOINT in scales:
        return None
    own = {name: tensor for name, tensor in of_one_layer(state).items()
           if not name.startswith("mtp.")}  # without a copy of the embedding
    shared = ["model.embed_tokens.weight"]
    if not model.tied:
        shared.append("lm_head.weight")
    own |= {name: state[name] for name in shared if name in state}
    own = row.repack(own) | {"join_embed.weight": joint[:, :model.width],
                             "join_hidden.weight": joint[:, model.width:]}
    dense = None
    if model.experts and not any(".experts." in name for name in own):
        dense = width_of(own.get("model.layers.0.mlp.down_proj.weight"), columns=1)
    return head_blocks(model, dense), row.all_tensors | TABLE, own, of_one_layer(scales)


def of_one_layer(tensors: Mapping[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
    """The tensors of a folder's draft head, except the joint one, by the names of a model of one layer."""
    own = {}
    for name, tensor in tensors.items():
        if name.startswith("mtp.") and name != JOINT:
            own[FOLDER_NAMES.get(name, name.replace("mtp.layers.0.", "model.layers.0."))] = tensor
    return own


def gguf_head(model: Model, row: Family, stored: Mapping[str, Any]
              ) -> tuple[Model, Table, dict[str, Any]] | None:
    """The same of a GGUF file, whose draft head is the layer after the model's."""
    prefix = f"blk.{len(model.layers)}."
    joint = stored.get(prefix + GGUF_JOINT)
    if joint is None:
        return None
    own: dict[str, Any] = {}
    for name, tensor in stored.items():
        part = name.removeprefix(prefix)
        if name != part and part not in (*COPIES, GGUF_JOINT):
            own[GGUF_NAMES.get(part, f"blk.0.{part}")] = tensor
    dense = None
    if model.experts and not any("_exps." in name for name in own):
        dense = width_of(own.get("blk.0.ffn_down.weight"), columns=0)
    shared = ["token_embd.weight", "output_norm.weight"]
    if not model.tied:
        shared.append("output.weight")
    for name in shared:
        if name in stored:
            own.setdefault(name, stored[name])
    own |= {f"{name}.weight": half for name, half in zip(JOINED, halves(joint))}
    return head_blocks(model, dense), row.gguf_names | TABLE, own


def width_of(down: Any, columns: int) -> int:
    """How many columns a matrix (C, F) has; 0 if it is missing. `columns`: their place in its shape."""
    shape = () if down is None else down.shape
    return int(shape[columns]) if len(shape) == 2 else 0


def halves(tensor: Any) -> tuple[Any, Any]:
    """The first half of a GgufTensor's columns, and the second; as floats if a block has columns of both."""
    columns, rows = map(int, tensor.shape)
    if columns % (2 * block_of(tensor.tensor_type.name)[0]):
        data = numpy.asarray(dequantize(tensor.tensor_type, tensor.data), numpy.float32)
        tensor = tensor._replace(tensor_type=TYPES["F32"], data=data.reshape(rows, columns))
    data = tensor.data.reshape(rows, -1)
    shape = numpy.array([columns // 2, rows], tensor.shape.dtype)
    first, second = (tensor._replace(
        shape=shape, n_elements=tensor.n_elements // 2, n_bytes=tensor.n_bytes // 2,
        data=numpy.ascontiguousarray(part)) for part in numpy.split(data, 2, axis=1))
    return first, second
