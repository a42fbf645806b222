"""How the keys and values of layers lie in pages."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence as Seq
from typing import NamedTuple, Protocol

from chatlm.common.config import PACKED_BLOCK, PAGE_SIZE


class Cached(Protocol):
    """What a layer caches for each token, and which of it its queries see. Attention explains the fields."""

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


KV_BLOCKS = {  # type of keys and values -> (numbers, bytes) of a float, or of a block with its scale
    "float32": (1, 4), "float16": (1, 2), "bfloat16": (1, 2), "q8_0": (PACKED_BLOCK, PACKED_BLOCK + 2)}


class KvType(NamedTuple):
    """How layers keep keys and values: as floats, or packed as q8_0.

    With q8_0 each head is multiplied by the normalized Hadamard matrix, which spreads large numbers over the
    head. Then it is kept as 8-bit integers with a float16 scale for each 32. Heads stay floats if their size
    is no power of two or is below 32. Keys of latents have two parts, the value and what follows it. Each is
    multiplied by its own matrix, so that the value can be read alone."""

    floats: str = "float16"
    packed: bool = False

    @property
    def unit(self) -> int:
        """The unit of page sizes in bytes: the size of a number, or 1 if layers may have different types."""
        return 1 if self.packed else KV_BLOCKS[self.floats][1]

    @staticmethod
    def unpacked_sizes(attn: Cached) -> set[int]:
        """The sizes of a layer's keys and values that q8_0 cannot have."""
        of_keys = attn.head_size - attn.value_size if attn.values_in_keys else attn.head_size
        return {size for size in (of_keys, attn.value_size)
                if size < PACKED_BLOCK or size & (size - 1)}

    def packs(self, attn: Cached) -> bool:
        return self.packed and not self.unpacked_sizes(attn)

    def of(self, attn: Cached) -> str:
        """The type of a layer's keys and values: "q8_0" or a type of floats."""
        return "q8_0" if self.packs(attn) else self.floats

    def slot_size(self, attn: Cached) -> int:
        """How many units a layer caches for a token."""
        numbers, block_bytes = KV_BLOCKS[self.of(attn)]
        return attn.slot_size // numbers * block_bytes // self.unit


class LayerGroups(NamedTuple):
    """Which layers share pages. All pages have the same size, so that any group may take any page."""

    members: tuple[tuple[int, ...], ...]  # for each group its layers, of those that keep keys and values
    windows: tuple[int, ...] = (0,)  # for each group, how many keys a token sees, its own included; 0: all

    @property
    def holes(self) -> bool:
        """May a table have holes? Then the cache has one more page, which stands for every hole."""
        return any(self.windows)

    @property
    def depth(self) -> int:
        """The largest number of layers in a page."""
        return max(map(len, self.members), default=0)


MOST_GROUPS = 16  # more would make tables long


def group_layers(attentions: Seq[Cached | None], context: int, apart: bool = True,
                 kv: KvType = KvType()) -> LayerGroups:
    """The groups of a model for contexts of this length. It is one group unless layers may be `apart`.

    attentions: for each layer what it caches, or None if it keeps a state instead of keys and values."""
    readers: dict[int, list[int]] = {
        l: [] for l, attn in enumerate(attentions) if attn and attn.source is None}
    for l, attn in enumerate(attentions):
        if attn:
            readers[l if attn.source is None else attn.source].append(
                attn.window if attn.window < context else 0)
    # how far back any reader of a layer's keys sees, and any reader of all; 0: to the beginning
    reach = {l: 0 if 0 in windows else max(windows) for l, windows in readers.items()}
    widest = 0 if 0 in reach.values() else max(reach.values(), default=0)
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

    def cost(size: int) -> tuple[int, int]:
        """About what a sequence of the longest context takes, and how many groups there are."""
        whole, limited = map(len, packed[size])
        positions = whole * min(widest or context, context) + limited * max(reach[l] for l in local)
        return size * positions, whole + limited

    few = [size for size in choices if cost(size)[1] <= MOST_GROUPS] or [max(choices)]
    of_full, of_local = packed[min(few, key=cost)]
    groups = of_full + of_local
    return LayerGroups(tuple(groups), tuple(max(reach[l] for l in members) for members in groups))


def pack_layers(layers: Seq[int], sizes: Mapping[int, int], most: int) -> list[tuple[int, ...]]:
    """The layers in runs, each of a total size of at most `most`."""
    runs: list[tuple[int, ...]] = []
    for l in layers:
        if runs and sum(sizes[other] for other in (*runs[-1], l)) <= most:
            runs[-1] += l,
        else:
            runs.append((l,))
    return runs


class PageLayout(NamedTuple):
    """Where the keys and values of each layer lie in pages. Sizes are in units of their type, for one token.

    Pages fit together only if their layouts are equal. If all layers cache the same size, a layer's part of
    all pages is contiguous, one layer after another. Otherwise each page is contiguous."""

    group: tuple[int, ...]   # of each layer
    offset: tuple[int, ...]  # of each layer in a page of its group
    size: int                # of a page
    own: int                 # of each layer, if all cache the same size; else 0
    types: tuple[str, ...]   # of each layer's keys and values (KvType.of); "" for a layer without any
    unit: int                # bytes

    @classmethod
    def of(cls, groups: LayerGroups, attentions: Seq[Cached | None], kv: KvType = KvType()) -> PageLayout:
        """The layout for the attentions of a rank. The groups are those of the whole model."""
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
        """The layout in which all layers use the same memory in turn.

        It serves steps of whole texts, because no later step reads their keys and values. All layers must
        cache the same size."""
        return self._replace(offset=(0,) * len(self.offset), size=self.own)

    @property
    def page_bytes(self) -> int:
        return self.size * self.unit * PAGE_SIZE

    def place(self, layer: int, count: int) -> tuple[int, int]:
        """(offset of a layer's first part in `count` pages or slots, distance from part to part)"""
        offset = self.offset[layer]
        return (offset * count, self.own) if self.own else (offset, self.size)
