"""`layout_of`: what a model makes of a picture of some size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from chatlm.common.messages.requests import Vision

Size = tuple[int, int]  # width, height


class Layout(NamedTuple):
    """The sizes that a picture is resized to, one after the other, the tiles that the tower then reads, and
    what stands for it in the prompt."""

    sizes: tuple[Size, ...]        # at the last, it is cut into tiles
    columns: int                   # of tiles; 0: it is not cut, and has the size of one
    rows: int
    whole: Size | None             # the size of the whole as one tile more, after the others
    parts: tuple[str | int, ...]   # texts, with special tokens, and how many rows of the picture stand there
    afresh: bool = False           # is the whole made of the picture itself, not of what was cut?

    @property
    def tokens(self) -> int:
        """How many rows it has."""
        return sum(part for part in self.parts if isinstance(part, int))

    @property
    def tiles(self) -> int:
        return self.columns * self.rows + 1 if self.columns else 1


def in_proportion(size: Size, longest: int) -> Size:
    """The size with this longer side; the other is rounded down, then up to an even number."""
    width, height = size
    if width >= height:
        width, height = longest, int(longest / (width / height))
        return width, max(height + height % 2, 1)
    width, height = int(longest * (width / height)), longest
    return max(width + width % 2, 1), height


def in_tiles(size: Size, tile: int) -> Size:
    """The size with sides that are multiples of a tile's: the longer side first, then the other of the new
    proportion."""
    (width, height), ratio = size, size[0] / size[1]
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / ratio) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * ratio) / tile) * tile
    return max(width, tile), max(height, tile)


LARGEST = 4096  # pixels of a side, before a picture is cut into tiles
AROUND, WHOLE = "<fake_token_around_image>", "<global-img>"


def idefics3(vision: Vision, size: Size) -> Layout:
    """SmolVLM, Idefics3: tiles in raster order, then the whole as one tile (Idefics3Processor)."""
    tile, tokens = vision.tile, vision.tokens
    size = in_proportion(size, min(vision.longest, LARGEST))
    alone = (f"{AROUND}{WHOLE}", tokens, AROUND)
    if not vision.splits:
        return Layout((size, (tile, tile)), 0, 0, None, alone)
    cut = in_tiles(size, tile)
    columns, rows = cut[0] // tile, cut[1] // tile
    if columns * rows == 1:
        return Layout((size, cut), 0, 0, None, alone)
    parts, before = list[str | int](), ""
    for row in range(1, rows + 1):
        for column in range(1, columns + 1):
            parts += [f"{before}{AROUND}<row_{row}_col_{column}>", tokens]
            before = ""
        before = "\n"
    return Layout((size, cut), columns, rows, (tile, tile),
                  (*parts, f"\n\n{AROUND}{WHOLE}", tokens, AROUND))


LAYOUTS: dict[str, Callable[[Vision, Size], Layout]] = {"idefics3": idefics3}


def layout_of(vision: Vision, width: int, height: int) -> Layout:
    return LAYOUTS[vision.kind](vision, (width, height))
