"""How layers' keys and values lie in pages."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence as Seq
from typing import NamedTuple, Protocol

from chatlm.common.config import PACKED_BLOCK, PAGE_SIZE


class Cached(Protocol):
    """What a layer caches for each token, and what of that its queries see; see Attention."""

    @property
    def kv_heads(self) -> int: ...

    @property
    def head_size(self) -> int: ...

    @property
    def value_size(self) -> int: ...

    @property
    def slot_size(self) -> int: ...

    @property
    def values_in_keys(self) -> bool: ...

    @property
    def window(self) -> int: ...

    @property
    def source(self) -> int | None: ...


KV_BLOCKS = {  # how keys and values are kept -> (numbers, their bytes): in a float, in a block with its scale
    "float32": (1, 4), "float16": (1, 2), "bfloat16": (1, 2), "q8_0": (PACKED_BLOCK, PACKED_BLOCK + 2)}


class KvType(NamedTuple):
    """How layers keep keys and values: as floats, or packed as q8_0.

    With q8_0, each head is multiplied by the normalized Hadamard matrix, which spreads large numbers over
    all of it, and kept as 8-bit integers with a float16 scale for each 32. Heads whose size is not a power
    of two, or is below 32, stay floats."""

    floats: str = "float16"
    packed: bool = False

    @property
    def unit(self) -> int:
        """The unit of page sizes in bytes: that of a number, or 1 if layers may differ."""
        return 1 if self.packed else KV_BLOCKS[self.floats][1]

    @staticmethod
    def unpacked_sizes(attn: Cached) -> set[int]:
        """The sizes of a layer's keys and values that q8_0 does not allow."""
        return {size for size in (attn.head_size, attn.value_size)
                if size < PACKED_BLOCK or size & (size - 1)}

    def packs(self, attn: Cached) -> bool:
        return self.packed and not self.unpacked_sizes(attn)

    def of(self, attn: Cached) -> str:
        """The type of a layer's keys and values: "q8_0" or a type of floats."""
        return "q8_0" if self.packs(attn) else self.floats

    def slot_size(self, attn: Cached) -> int:
        """Units that a layer caches per token."""
        numbers, block_bytes = KV_BLOCKS[self.of(attn)]
        return attn.slot_size // numbers * block_bytes // self.unit


class LayerGroups(NamedTuple):
    """Which layers share pages. All pages have the same bytes, so that any group may take any of them."""

    members: tuple[tuple[int, ...], ...]  # the layers of each group, among those that keep keys and values
    windows: tuple[int, ...] = (0,)  # for each group, the keys that a token sees, including its own; 0 = all

    @property
    def holes(self) -> bool:
        """May a table have holes? The cache then has one more page, which stands for them."""
        return any(self.windows)

    @property
    def depth(self) -> int:
        """The largest number of layers in a page."""
        return max(map(len, self.members), default=0)


MOST_GROUPS = 16  # more would make tables long


def group_layers(attentions: Seq[Cached | None], context: int, apart: bool = True,
                 kv: KvType = KvType()) -> LayerGroups:
    """The groups of a model for contexts of this length; one group unless they may be `apart`. None: a layer
    that keeps a state instead of keys and values."""
    readers: dict[int, list[int]] = {
        l: [] for l, attn in enumerate(attentions) if attn and attn.source is None}
    for l, attn in enumerate(attentions):
        if attn:
            readers[l if attn.source is None else attn.source].append(
                attn.window if attn.window < context else 0)
    reach = {l: 0 if 0 in windows else max(windows) for l, windows in readers.items()}
    widest = 0 if 0 in reach.values() else max(reach.values(), default=0)  # 0: of layers without a window
    sizes = {l: kv.slot_size(attn) for l in readers if (attn := attentions[l])}
    full, local = ([l for l in readers if (reach[l] != widest) == limited] for limited in (False, True))
    if not (apart and local):
        return LayerGroups((tuple(readers),), (widest * apart,))
    if len({*sizes.values()}) == 1:
        depth = max(min(len(full), len(local)), -(-len(readers) // MOST_GROUPS))
        choices = [depth * sizes[full[0]]]
    else:
        choices = [size for alike in (full, local)
                   for size in itertools.accumulate(sizes[l] for l in alike) if size >= max(sizes.values())]
    packed = {size: [pack_layers(alike, sizes, size) for alike in (full, local)] for size in choices}

    def held(size: int) -> tuple[int, int]:  # by a sequence of the longest context, approximately
        whole, limited = map(len, packed[size])
        return (size * (whole * min(widest or context, context) + limited * max(reach[l] for l in local)),
                whole + limited)

    few = [size for size in choices if held(size)[1] <= MOST_GROUPS] or [max(choices)]
    groups = [members for part in packed[min(few, key=held)] for members in part]
    return LayerGroups(tuple(groups), tuple(max(reach[l] for l in members) for members in groups))


def pack_layers(layers: Seq[int], sizes: Mapping[int, int], most: int) -> list[tuple[int, ...]]:
    """The layers in runs whose total sizes are at most `most`."""
    runs: list[tuple[int, ...]] = []
    for l in layers:
        if runs and sum(sizes[other] for other in (*runs[-1], l)) <= most:
            runs[-1] += l,
        else:
            runs.append((l,))
    return runs


class PageLayout(NamedTuple):
    """Where each layer's keys and values are in the pages, in units of their type, per token. Pages are only
    compatible if their layouts are equal.

    If all layers cache the same size, each layer's part of all pages is contiguous, in the order of the
    layers; otherwise each page is."""

    group: tuple[int, ...]   # of each layer
    offset: tuple[int, ...]  # of each layer in a page of its group
    size: int                # of a page
    own: int                 # of each layer, if all are equal; else 0
    types: tuple[str, ...]   # of each layer's keys and values, see KvType; "" has none
    unit: int                # bytes

    @classmethod
    def of(cls, groups: LayerGroups, attentions: Seq[Cached | None], kv: KvType = KvType()) -> PageLayout:
        """The layout for a rank's attentions; the groups are the whole model's."""
        offsets = {}
        size = 0
        sizes = [kv.slot_size(attn) if attn else 0 for attn in attentions]
        for group, members in enumerate(groups.members):
            starts = itertools.accumulate((sizes[l] for l in members), initial=0)
            offsets |= {l: (group, start) for l, start in zip(members, starts)}
            size = max(size, sum(sizes[l] for l in members))
        found = [offsets.get(l if attn is None or attn.source is None else attn.source, (0, 0))
                 for l, attn in enumerate(attentions)]
        group, offset = zip(*found)
        kept = {size for size in sizes if size}
        types = tuple(kv.of(attn) if attn else "" for attn in attentions)
        return cls(group, offset, size, kept.pop() if len(kept) == 1 else 0, types, kv.unit)

    @property
    def shared(self) -> PageLayout:
        """The layout in which all layers have the same memory, one after another: a step computes whole
        texts, and no later one reads their keys and values. All must cache the same size."""
        return self._replace(offset=(0,) * len(self.offset), size=self.own)

    @property
    def page_bytes(self) -> int:
        return self.size * self.unit * PAGE_SIZE

    def place(self, layer: int, count: int) -> tuple[int, int]:
        """The offset of a layer's part in `count` pages or slots, and the distance between its parts."""
        offset = self.offset[layer]
        return (offset * count, self.own) if self.own else (offset, self.size)
