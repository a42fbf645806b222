"""The adapters of --lora, merged into a model in its files at load."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from chatlm.worker.weights.adapters.lora import read_adapters
from chatlm.worker.weights.changes import Change, Copy
from chatlm.worker.weights.changes import FileSlice
from chatlm.worker.weights.formats.sources import file_shapes, unread_keys
from chatlm.worker.weights.formats.stored_model import Merged
from chatlm.worker.weights.formats.tied_heads import Pair, equal

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.worker.weights.formats.sources import Sources
    from chatlm.worker.weights.formats.stored_model import AdapterTargets, StoredModel


def merge(settings: Settings, stored: StoredModel, sources: Sources, targets: AdapterTargets,
          tied: Seq[str]) -> Merged:
    """Like `merge_adapters`, of adapters that there are."""
    shapes = file_shapes(sources) | unread_keys(stored.model)
    slices = targets.slices()
    if not tied:
        return Merged(stored, sources, *read_adapters(settings, shapes, slices, stored.names), tied)
    pair = Pair.of(stored.table)
    shapes[pair.head] = shapes[pair.embed]
    slices[targets.tied.head] = [FileSlice(pair.head)]
    added, described = read_adapters(settings, shapes, slices, stored.names, tied)
    if not divided_by(added, pair):
        return Merged(stored, sources, added, described, tied)
    shape, in_file = sources["embed"]
    sources = {**sources, "head": (shape, {pair.head: in_file[pair.embed]})}
    return Merged(stored.with_own_head(), sources, added, described, ())


def divided_by(added: dict[str, list[Change | Copy]], pair: Pair) -> bool:
    """Do adapters make the head and the embedding different matrices? If not, `added` has for the embedding
    what both become."""
    both = [*added.get(pair.embed, []), *added.get(pair.head, [])]
    copies = [change for change in both if isinstance(change, Copy)]
    if len(copies) < len(both) or len(copies) == 1:
        return True
    if copies and not equal(copies[0].weight, copies[1].weight):
        return True
    added.pop(pair.head, None)
    return False
