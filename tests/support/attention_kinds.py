"""Small random models whose layers attend in several ways."""

import dataclasses
import math

import torch

from chatlm.worker.model.tensors import Cut, Unread
from chatlm.worker.weights.model_of import model_of
from chatlm.worker.weights.recipe import Attention, ModelSpec

SLIDING = Attention(4, 2, 16, window=24, q_scale=4.0, value_norm=True)
FULL = Attention(4, 1, 32, rope_base=1e6, rope_factors=(1.0,) * 4 + (math.inf,) * 12, q_scale=32**0.5, value_norm=True,
                 values_from_keys=True)
PLAIN = Attention(4, 4, 16, rope_size=0)
LARGE = Attention(4, 2, 512, rope_size=64)
WIDE = Attention(4, 2, 32, own_value_size=16)
KINDS = {  # as Gemma 4 has them, and all that may differ
    "gemma 4": (SLIDING, FULL, SLIDING, FULL, *(dataclasses.replace(its, source=layer) for its, layer in (
        (SLIDING, 2), (SLIDING, 2), (FULL, 3)))),
    "heads": (PLAIN, SLIDING, LARGE, FULL, dataclasses.replace(LARGE, source=2), dataclasses.replace(SLIDING, source=1)),
    "all": (PLAIN, SLIDING, WIDE, FULL, SLIDING, dataclasses.replace(WIDE, source=2))}


def kinds_model(name, seed=0, **changes):
    """A small random model -> its spec and tensors."""
    attentions = KINDS[name]
    spec = ModelSpec(vocab_size=96, layers=len(attentions), width=48, heads=4, kv_heads=2, head_size=16, ffn_size=64,
                     max_positions=512, qk_norm="before_rope", qk_norm_weights=True, attentions=attentions, **changes)
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
        part: object = None

        def __post_init__(self):
            self.architecture = self.part or self.architecture

    return Loaded(model_of(spec), {name: unread(tensor) for name, tensor in tensors.items()})
