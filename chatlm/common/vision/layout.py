"""`layout_of`: what a model makes of a picture of some size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

from chatlm.common.messages.requests import Vision

Size = tuple[int, int]  # width, height


class PictureLayout(NamedTuple):
    """The sizes that a picture is resized to, one after the other, the tiles that the tower then reads, and
    what stands for it in the prompt."""

    sizes: tuple[Size, ...]        # at the last, it is cut into tiles
    columns: int                   # of tiles; 0: it is not cut, and has the size of one
    rows: int
    whole: Size | None             # the size of the whole as one tile more, after the others
    parts: tuple[str | int, ...]   # texts, with special tokens, and how many rows of the picture stand there
    afresh: bool = False           # is the whole made of the picture itself, not of what was cut?

    grid: Size | None = None       # columns and rows of its rows, where these have places of their own

    @property
    def tokens(self) -> int:
        """How many rows it has."""
        return sum(part for part in self.parts if isinstance(part, int))

    @property
    def tiles(self) -> int:
        return self.columns * self.rows + bool(self.whole) if self.columns else 1


def in_proportion(size: Size, longest: int) -> Size:
    """The size with this longer side; the other is rounded down, then up to an even number."""
    width, height = size
    if width >= height:
        height = int(longest / (width / height))
        width = longest
        return width, max(height + height % 2, 1)
    width = int(longest * (width / height))
    height = longest
    return max(width + width % 2, 1), height


def in_tiles(size: Size, tile: int) -> Size:
    """The size with sides that are multiples of a tile's: the longer side first, then the other of the new
    proportion."""
    width, height = size
    ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / ratio) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * ratio) / tile) * tile
    return max(width, tile), max(height, tile)


LARGEST = 4096  # pixels of a side, before a picture is cut into tiles
AROUND = "<fake_token_around_image>"
WHOLE = "<global-img>"


def idefics3(vision: Vision, size: Size) -> PictureLayout:
    """SmolVLM, Idefics3: tiles in raster order, then the whole as one tile (Idefics3Processor)."""
    tile = vision.tile
    tokens = vision.tokens
    size = in_proportion(size, min(vision.longest, LARGEST))
    alone = (f"{AROUND}{WHOLE}", tokens, AROUND)
    if not vision.splits:
        return PictureLayout((size, (tile, tile)), 0, 0, None, alone)
    cut = in_tiles(size, tile)
    columns = cut[0] // tile
    rows = cut[1] // tile
    if columns * rows == 1:
        return PictureLayout((size, cut), 0, 0, None, alone)
    parts = list[str | int]()
    before = ""
    for row in range(1, rows + 1):
        for column in range(1, columns + 1):
            parts += [f"{before}{AROUND}<row_{row}_col_{column}>", tokens]
            before = ""
        before = "\n"
    return PictureLayout((size, cut), columns, rows, (tile, tile),
                         (*parts, f"\n\n{AROUND}{WHOLE}", tokens, AROUND))


def in_units(size: Size, unit: int, fewest: int, most: int) -> Size:
    """The size with sides that are multiples of `unit`, about in proportion, and `fewest` to `most` units in
    all."""
    width, height = (max(unit, round(side / unit) * unit) for side in size)  # half to even
    if width * height > most * unit * unit:
        factor = math.sqrt(size[0] * size[1] / (most * unit * unit))
        width, height = (max(unit, math.floor(side / factor / unit) * unit) for side in size)
    elif width * height < fewest * unit * unit:
        factor = math.sqrt(fewest * unit * unit / (size[0] * size[1]))
        width, height = (math.ceil(side * factor / unit) * unit for side in size)
    return width, height


def closest_grid(size: Size, fewest: int, most: int, tile: int) -> tuple[int, int]:
    """The (columns, rows) of `fewest` to `most` tiles that come closest to the picture's proportion. Of
    equally close grids it is the largest that the picture fills by more than half."""
    sides = range(1, most + 1)
    grids = [grid for grid in itertools.product(sides, sides) if fewest <= grid[0] * grid[1] <= most]
    grids.sort(key=lambda grid: grid[0] * grid[1])
    ratio = size[0] / size[1]
    best = (1, 1)
    least = math.inf
    for grid in grids:
        difference = abs(ratio - grid[0] / grid[1])
        if difference < least or difference == least and (
                size[0] * size[1] > 0.5 * tile * tile * grid[0] * grid[1]):
            best = grid
            least = difference
    return best


def lfm2(vision: Vision, size: Size) -> PictureLayout:
    """LFM2-VL: whole, with sides that are multiples of `unit`; a large one is cut into tiles, and this is one
    more (Lfm2VlProcessor)."""
    unit = vision.unit
    fewest, most = vision.tiles
    begin = "<|image_start|>"
    end = "<|image_end|>"
    whole = in_units(size, unit, vision.fewest, vision.tokens)
    rows_of_whole = whole[0] * whole[1] // unit**2
    area = math.prod(max(unit // 2, round(side / unit) * unit) for side in size)
    if not vision.splits or most == 1 or area <= vision.tokens * unit**2 * vision.whole_from:
        return PictureLayout((whole,), 0, 0, None, (begin, rows_of_whole, end))
    columns, rows = closest_grid(size, fewest, most, vision.tile)
    sizes = ((columns * vision.tile, rows * vision.tile),)
    parts = list[str | int]()
    if columns * rows == 1:
        return PictureLayout(sizes, 0, 0, None, (begin, (vision.tile // unit)**2, end))
    for row in range(1, rows + 1):
        for column in range(1, columns + 1):
            parts += [f"<|img_row_{row}_col_{column}|>", (vision.tile // unit)**2]
    if not vision.shows_whole:
        return PictureLayout(sizes, columns, rows, None, (begin + str(parts[0]), *parts[1:], end))
    return PictureLayout(sizes, columns, rows, whole, (
        begin + str(parts[0]), *parts[1:], "<|img_thumbnail|>", rows_of_whole, end), afresh=True)


def qwen3vl(vision: Vision, size: Size) -> PictureLayout:
    """Qwen3-VL, Qwen3.5: whole, with sides that are multiples of `unit` (Qwen2VLImageProcessor)."""
    width, height = in_units(size, vision.unit, vision.fewest, vision.tokens)
    columns = width // vision.unit
    rows = height // vision.unit
    parts = "<|vision_start|>", columns * rows, "<|vision_end|>"
    return PictureLayout(((width, height),), 0, 0, None, parts, grid=(columns, rows))


def pixtral(vision: Vision, size: Size) -> PictureLayout:
    """Mistral's models: whole, no larger than the longest side allows, and with sides that are multiples of
    `unit` (PixtralProcessor). Then, if it has too many units, shrunk in proportion."""
    ratio = max(1.0, max(size) / vision.longest)
    width, height = (max(1, math.floor(side / ratio)) for side in size)
    columns = math.ceil(width / vision.unit)
    rows = math.ceil(height / vision.unit)
    if columns * rows > vision.tokens:
        factor = math.sqrt(vision.tokens * vision.unit**2 / (width * height))
        columns, rows = (max(1, math.floor(factor * side / vision.unit)) for side in (width, height))
        columns = min(columns, vision.tokens)
        rows = min(rows, vision.tokens)
    parts: tuple[str | int, ...] = (columns, "[IMG_BREAK]") * (rows - 1) + (columns, "[IMG_END]")
    return PictureLayout(((columns * vision.unit, rows * vision.unit),), 0, 0, None, parts)


def gemma3(vision: Vision, size: Size) -> PictureLayout:
    """Gemma 3: one square, whatever the picture's proportion (Gemma3Processor; its pan and scan is off)."""
    return PictureLayout(((vision.tile, vision.tile),), 0, 0, None,
                         ("\n\n<start_of_image>", vision.tokens, "<end_of_image>\n\n"))


def gemma4(vision: Vision, size: Size) -> PictureLayout:
    """Gemma 4: whole, with sides that are multiples of `unit`, and as many units as `tokens` allow
    (Gemma4ImageProcessor)."""
    width, height = size
    factor = math.sqrt(vision.tokens * vision.unit**2 / (width * height))
    columns, rows = (math.floor(factor * side / vision.unit) for side in size)
    if not rows:  # so long that a unit is more than its height
        columns = min(width // height, vision.tokens)
        rows = 1
    elif not columns:
        columns = 1
        rows = min(height // width, vision.tokens)
    return PictureLayout(((columns * vision.unit, rows * vision.unit),), 0, 0, None,
                         ("<|image>", columns * rows, "<image|>"))


LAYOUTS: dict[str, Callable[[Vision, Size], PictureLayout]] = {
    "idefics3": idefics3, "lfm2": lfm2, "gemma3": gemma3, "gemma4": gemma4, "qwen3vl": qwen3vl,
    "pixtral": pixtral}


def layout_of(vision: Vision, width: int, height: int) -> PictureLayout:
    return LAYOUTS[vision.kind](vision, (width, height))
