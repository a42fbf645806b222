"""What generation 1's rounding of cos and sin changes, which transformers' own nanochat leaves out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy

from chatlm.common.config import PAGE_SIZE
from chatlm.common.text.load import open_tokenizer
from chatlm.worker.kernels.choosing import load_kernels
from chatlm.worker.model.batch import Batch
from chatlm.worker.model.blocks.attention import Attention
from chatlm.worker.model.transformer import Transformer
from chatlm.worker.weights.load import load

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.worker.weights.formats.checkpoint import CheckpointModel

TEXT_TOKENS = 256
TEXT = """\
The rotary embedding turns each pair of numbers of a query and of a key by an angle that grows with the
position of their token, so that a product of the two depends on how far they are apart. Near the beginning of
a text the angles are small, and rounding them changes little; far from it the fast pairs have turned many
times. A model that was trained with rounded angles has learned with them, and computes slightly other numbers
without.
""" * 3


def difference(stored: CheckpointModel, settings: Settings) -> str:
    """A sentence: how much the logits of a text differ with the rounding and without, in float32.

    The model is in memory once at a time."""
    ids = [stored.tokenizer.bos_token or 0, *open_tokenizer(stored.tokenizer).encode(TEXT)]
    ids = ids[:min(TEXT_TOKENS, stored.model.answer_positions)]
    settings = replace(settings, dtype="float32")
    rounded, exact = (logits_of(with_rounding(stored, rounds), settings, ids) for rounds in (True, False))
    largest = float(numpy.abs(rounded - exact).max())
    same = int((rounded.argmax(-1) == exact.argmax(-1)).sum())
    return (f"Over a text of {len(ids)} tokens, its logits differ by at most {largest:.2g} from those of the "
            f"original for that reason, and the likeliest next token is the same after {same} of {len(ids)}.")


def with_rounding(stored: CheckpointModel, rounds: bool) -> CheckpointModel:
    layers = []
    for layer in stored.model.layers:
        attention = layer.mixer
        assert isinstance(attention, Attention)
        rope = replace(attention.rope, bfloat16=rounds)
        layers.append(replace(layer, mixer=replace(attention, rope=rope)))
    return replace(stored, model=replace(stored.model, layers=tuple(layers)))


def logits_of(stored: CheckpointModel, settings: Settings, ids: list[int]) -> numpy.ndarray:
    """(T, V), after each token of a text."""
    model = load(stored, settings, "cpu")
    count = len(ids)
    pages = -(-count // PAGE_SIZE)
    transformer = Transformer(
        model.architecture, dict(model.tensors), load_kernels("cpu"), num_pages=pages, max_tokens=count,
        device="cpu", dtype="float32")
    batch = Batch(token_ids=ids, previous_token_ids=[-1, *ids[:-1]], starts=[0, count], lengths=[count],
                  tables=[list(range(pages))], logit_rows=list(range(count)))
    return transformer.arrays.numpy(transformer.forward(batch)).copy()
