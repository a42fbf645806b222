"""Small random models whose layers attend in several ways."""

import dataclasses
import math

import torch

from chatlm.worker.arrays.rotary import Rope
from chatlm.worker.model.blocks.attention import Attention, HeadNorms, Scores
from chatlm.worker.model.blocks.feed_forward import FeedForward
from chatlm.worker.model.blocks.input import Input
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.lm_head import LmHead
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.model.blocks.norms import RmsNorm
from chatlm.worker.model.tensors import Cut, Unread
from flat_models import model_of


def attention(heads, kv_heads, size, value_size=None, window=0):
    """Attention as most models have it."""
    return Attention(heads, kv_heads, size, value_size or size, Rope(size), Scores(window=window))


NORMS = HeadNorms("before_rope", 1e-5)
SLIDING = Attention(4, 2, 16, 16, Rope(16), Scores(scale=4.0, window=24), NORMS, value_norm=True)
FULL = Attention(4, 1, 32, 32, Rope(32, 1e6, (1.0,) * 4 + (math.inf,) * 12), Scores(scale=32**0.5), NORMS, value_norm=True,
                 values_from_keys=True)
PLAIN = Attention(4, 4, 16, 16, Rope(0), norms=NORMS)
LARGE = Attention(4, 2, 512, 512, Rope(64), norms=NORMS)
WIDE = Attention(4, 2, 32, 16, Rope(32), norms=NORMS)
KINDS = {  # as Gemma 4 has them, and all that may differ
    "gemma 4": (SLIDING, FULL, SLIDING, FULL, *(dataclasses.replace(its, source=layer) for its, layer in (
        (SLIDING, 2), (SLIDING, 2), (FULL, 3)))),
    "heads": (PLAIN, SLIDING, LARGE, FULL, dataclasses.replace(LARGE, source=2), dataclasses.replace(SLIDING, source=1)),
    "all": (PLAIN, SLIDING, WIDE, FULL, SLIDING, dataclasses.replace(WIDE, source=2))}


def blocks_of(model):
    """The blocks of a spec; blocks are their own."""
    return model if isinstance(model, Model) else model_of(model)


def with_attentions(attentions):
    """A small model whose layers attend so."""
    norm = RmsNorm(1e-5)
    layers = tuple(Layer(its, FeedForward(64), attention_norm=norm, ffn_norm=norm) for its in attentions)
    return Model(96, 48, 512, Input(), layers, norm, LmHead())


def kinds_model(name, seed=0):
    """A small random model -> its blocks and tensors."""
    spec = with_attentions(KINDS[name])
    random = torch.Generator().manual_seed(seed)
    return spec, {key: torch.randn(shape, generator=random) * (0.2 if len(shape) > 1 else 1.0)
                  for key, shape in model_of(spec).shapes().items()}


def unread(tensor):
    return Unread(Cut.whole(tuple(tensor.shape)), lambda cut: torch.cat([part for _, part in cut.apply([tensor])]), tensor.nbytes,
                  (torch.empty(0),))      # no file's memory, which would be given back


def loaded(spec, tensors):
    """As a LoadedModel, as far as shards look at it."""
    @dataclasses.dataclass
    class Loaded:
        architecture: object
        tensors: dict
        block: int = 16
        adaptable: None = None

    return Loaded(model_of(spec), {name: unread(tensor) for name, tensor in tensors.items()})
