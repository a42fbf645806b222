"""Computes texts with a model but without an engine, to compare its predictions and to time it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Seq
from typing import Any, TYPE_CHECKING

from chatlm.common.config import PAGE_SIZE
from chatlm.worker.arrays.kinds import Device
from chatlm.worker.memory_plan import plan_model
from chatlm.worker.model.batch import Batch
from chatlm.worker.model.transformer import Transformer
from chatlm.worker.ranks.alone import RankAlone

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.worker.model.blocks.model import Model
    from chatlm.worker.weights.loaded.model import LoadedModel

CPU = Device("cpu")


def row_bytes(model: Model) -> int:
    """A rough number of bytes that a step holds for each of its tokens: logits and activations."""
    width = model.feed.width if model.feed else 0
    return 4 * (model.vocab_size + 8 * (model.width + width))


def ready(model: LoadedModel, settings: Settings, tokens: int, shared: Mapping[str, Any] = {}) -> Transformer:
    """A model that is ready for one text of so many tokens; `model` loses its tensors. shared: weights that
    another one has packed."""
    plan = plan_model(model, model.architecture, settings, CPU, RankAlone())
    num_pages = -(-tokens // PAGE_SIZE) * max(len(plan.groups.windows), 1)
    return Transformer(model.architecture, model.tensors, plan.kernels, dtype=model.dtype, groups=plan.groups,
                       kv=plan.memory.kv, num_pages=num_pages, num_slots=2, shared=shared,
                       max_tokens=plan.max_tokens, max_rows=plan.max_rows)


def step(transformer: Transformer, ids: Seq[int], begin: int, end: int, rows: Seq[int],
         whole: bool = False) -> Any:
    """The logits (len(rows), V) of these of the tokens from `begin` to `end`, after those before them; they
    are overwritten by the next step. whole: the last layer computes all tokens, not only these."""
    count = end - begin
    pages = [*range(-(-len(ids) // PAGE_SIZE) * max(len(transformer.groups.windows), 1))]
    return transformer.forward(Batch(
        [*ids[begin:end]], [ids[i - 1] if i else -1 for i in range(begin, end)], [0, count], [end], [pages],
        [*rows], states=whole, state_reads=[0], write_rows=[count - 1], write_slots=[0]))
