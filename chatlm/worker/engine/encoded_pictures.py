"""The pictures of prompts while they are encoded: which rows are known, and what the tower does next."""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Generator, Iterable, Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy

from chatlm.common.vision.layout import layout_of
from chatlm.common.vision.pictures import row_places, rows_in
from chatlm.worker.arrays.kinds import FLOATS
from chatlm.worker.engine.batching import picture_rows
from chatlm.worker.engine.part import EnginePart
from chatlm.worker.tower import Tower, chunk_work, tiles_of
from chatlm.worker.model.transformer import first_turn

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import Picture, Vision
    from chatlm.common.vision.layout import PictureLayout
    from chatlm.worker.arrays.kinds import Device
    from chatlm.worker.engine.sequence import Assignment, Chunk, Sequence
    from chatlm.worker.model.transformer import Transformer
    from chatlm.worker.weights.loaded.model import LoadedModel


# How many chunks of prompts take as long as a part of an image. Others wait for that part and for a step,
# which may have a chunk: so for no more than two chunks.
PART_CHUNKS = 1
FLOAT_TYPES = (*FLOATS, "f32", "f16", "bf16")  # of matrices, as tensors and as tiles call them


@dataclass(eq=False)
class EncodedPicture:
    """A picture, and its rows (tokens, width) float32 once the tower has computed them."""

    picture: Picture
    layout: PictureLayout
    rows: numpy.ndarray | None = None

    @property
    def nbytes(self) -> int:
        return len(self.picture.pixels) + (0 if self.rows is None else self.rows.nbytes)

    @property
    def turns(self) -> int:
        """By how many positions it turns what follows it: the rows of its longer side; 0 without a grid."""
        return max(self.layout.grid or (0,))


class Placeholders:
    """Where the rows of its pictures stand in a sequence's prompt: each row takes the place of a token.

    In some models rows turn by their time, row and column in the picture, and what follows a picture turns as
    if it had only as many tokens as its longer side has rows (M-RoPE)."""

    def __init__(self, first_id: int, places: list[int], owners: list[tuple[int, int]],
                 pictures: Seq[EncodedPicture], two_sided: bool = False, first_turn: int = 0):
        """first_id: ids from here on stand for rows. places: of the rows in the prompt. owners: of each
        place, (number of the picture, row). two_sided: rows of a picture see all of its rows, and must be
        computed in one step. first_turn: the row of the rotary tables with the turn of a step's first row; 0:
        all rows turn by their positions."""
        self.first_id = first_id
        self.places = places
        self.two_sided = two_sided
        self.owners = owners
        self.pictures = pictures
        self.first_turn = first_turn
        self.begins = [place for place, (_, row) in zip(places, owners) if row == 0]  # of each picture
        self.turns = list[int]()  # by which the first row of each picture turns
        if first_turn:
            lost = 0
            for begin, each in zip(self.begins, pictures):
                self.turns.append(begin - lost)
                lost += each.layout.tokens - each.turns

    def known(self, first: int, count: int) -> int:
        """How many of these tokens come before the first row that is not encoded."""
        place = self.missing(first)
        return count if place is None else min(count, place - first)

    def missing(self, first: int) -> int | None:
        """The place of the first row from token `first` on that is not encoded."""
        at = bisect.bisect_left(self.places, first)
        while at < len(self.places):
            number, row = self.owners[at]
            picture = self.pictures[number]
            if picture.rows is None:
                return self.places[at]
            at += picture.layout.tokens - row
        return None

    def missing_picture(self, first: int) -> EncodedPicture | None:
        """The next picture that the tokens from `first` on need and that is not encoded."""
        place = self.missing(first)
        if place is None:
            return None
        number, _ = self.owners[bisect.bisect_left(self.places, place)]
        return self.pictures[number]

    def turned(self, first: int, count: int, begin: int) -> list[int]:
        """The rows of the rotary tables for these tokens, which begin in row `begin` of a step."""
        turns = []
        for place in range(first, first + count):
            number = bisect.bisect_right(self.begins, place) - 1  # of the picture here, or the one before
            if number < 0:
                turns.append(place)
                continue
            picture = self.pictures[number]
            after = place - self.begins[number] - picture.layout.tokens
            if after < 0:
                turns.append(self.first_turn + begin + place - first)
            else:
                turns.append(self.turns[number] + picture.turns + after)
        return turns

    def _places_in(self, number: int, rows: numpy.ndarray) -> numpy.ndarray | None:
        """Time, row and column (n, 3) of these rows of a picture, by which they turn."""
        grid = self.pictures[number].layout.grid
        if not self.turns or not grid:
            return None
        return self.turns[number] + numpy.stack([0 * rows, rows // grid[0], rows % grid[0]], axis=1)

    def rows(self, first: int, count: int) -> list[tuple[int, numpy.ndarray, numpy.ndarray | None]]:
        """The rows among these tokens: (index in them, rows, places by which they turn) of each run."""
        begin = bisect.bisect_left(self.places, first)
        end = bisect.bisect_left(self.places, first + count)
        runs = []
        while begin < end:
            last = self._end_of_run(begin, end)
            number, row = self.owners[begin]
            rows = self.pictures[number].rows
            assert rows is not None  # the scheduler has waited for them
            length = last - begin
            runs.append((self.places[begin] - first, rows[row:row + length],
                         self._places_in(number, numpy.arange(row, row + length))))
            begin = last
        return runs

    def _end_of_run(self, begin: int, end: int) -> int:
        """The end, at most `end`, of the rows that follow each other in one picture from `begin` on."""
        number, _ = self.owners[begin]
        last = begin + 1
        while (last < end and self.places[last] == self.places[last - 1] + 1
               and self.owners[last][0] == number):
            last += 1
        return last

    def spans(self, first: int, end: int) -> list[tuple[int, int]]:
        """(first place, that after the last) of each picture with rows among the tokens [first, end)."""
        spans = []
        at = 0
        while at < len(self.places) and self.places[at] < end:
            number, _ = self.owners[at]
            count = self.pictures[number].layout.tokens
            last = self.places[at] + count
            if last > first:
                spans.append((self.places[at], last))
            at += count
        return spans

    def as_one_id(self, ids: Iterable[int]) -> list[int]:
        """The ids with the same one for every row: that after the last of the vocabulary."""
        return [min(token, self.first_id) for token in ids]

    def without_rows(self, tokens: Iterable[int]) -> list[int]:
        return [token for token in tokens if token < self.first_id]


class Pictures(EnginePart):
    """Encodes the pictures that running sequences wait for, the oldest sequence's first. Before each step a
    part of one is computed, so that other answers wait no longer than for that. Rows are kept by the
    digest of the pixels, for pictures that come again."""

    KEPT_BYTES = 256 << 20

    def __init__(self, tower: Tower, transformer: Transformer):
        self.tower = tower
        self.transformer = transformer
        self.first_id = tower.stored.vision.first_id       # ids from here on stand for rows of pictures
        self.first_turn = first_turn(transformer.model)  # see Placeholders
        self.by_digest: OrderedDict[bytes, EncodedPicture] = OrderedDict()
        self.resizing = ThreadPoolExecutor(1, "pictures")
        self.tiles: dict[bytes, Future[list[numpy.ndarray]]] = {}  # of the picture that is wanted next
        self.work: tuple[EncodedPicture, Generator[None, None, numpy.ndarray]] | None = None
        self.encoded = 0        # pictures

    def comes(self, sequence: Sequence) -> str:
        """Set its placeholders."""
        sequence.placeholders, fault = self.placeholders_of(sequence.work)
        return fault

    def changes_input(self, chunks: Seq[Chunk]) -> bool:
        """Must rows of pictures be put into the input of a step, or removed?"""
        return bool(chunks and (self.transformer.shown or picture_rows(chunks)))

    def change_input(self, chunks: Seq[Chunk]):
        self.transformer.show_pictures(picture_rows(chunks))

    def placeholders_of(self, work: Assignment) -> tuple[Placeholders | None, str]:
        """What an answer sees, None if its prompt has no pictures; or why it cannot see them."""
        if not work.pictures:
            return None, ""
        try:
            return self._placeholders(work, self.tower.stored.vision), ""
        except ValueError as error:
            return None, str(error)

    def _placeholders(self, work: Assignment, vision: Vision) -> Placeholders:
        """ValueError if the ids of its prompt are not those of its pictures."""
        pictures = [self._encoded_picture(picture, vision) for picture in work.pictures]
        self._forget()
        counts = [(each.picture.digest, each.layout.tokens) for each in pictures]
        return Placeholders(vision.first_id, rows_in(vision, work.prompt_ids),
                     row_places(vision, work.prompt_ids, counts), pictures, vision.two_sided, self.first_turn)

    def _encoded_picture(self, picture: Picture, vision: Vision) -> EncodedPicture:
        """The picture as it is known here; a new one is not encoded yet."""
        if picture.digest not in self.by_digest:
            layout = layout_of(vision, picture.width, picture.height)
            self.by_digest[picture.digest] = EncodedPicture(picture, layout)
        self.by_digest.move_to_end(picture.digest)
        return self.by_digest[picture.digest]

    @property
    def preparing(self) -> list[Future]:
        """What a thread does for pictures now."""
        return [tiles for tiles in self.tiles.values() if not tiles.done()]

    def before_step(self, running: Iterable[Sequence]):
        """Do the next part of the picture that the oldest of these sequences needs first."""
        wanted = self._wanted(running)
        if wanted is None:
            self.tiles = {}
            self.work = None
            return
        if self.work is None or self.work[0] is not wanted:
            self.work = None
            self.work = self._begin(wanted)
        if self.work is not None:
            self._encode_part(*self.work)

    def _wanted(self, running: Iterable[Sequence]) -> EncodedPicture | None:
        for sequence in running:
            placeholders = sequence.placeholders
            if placeholders and (picture := placeholders.missing_picture(sequence.computed)):
                return picture
        return None

    def _begin(self, wanted: EncodedPicture
               ) -> tuple[EncodedPicture, Generator[None, None, numpy.ndarray]] | None:
        """Begin to encode a picture once a thread has resized it; None until then."""
        digest = wanted.picture.digest
        if digest not in self.tiles:
            tiles = self.resizing.submit(tiles_of, wanted.picture, wanted.layout, self.tower.stored.filter)
            self.tiles = {digest: tiles}
        if not self.tiles[digest].done():
            return None
        return wanted, self.tower.encode(self.tiles.pop(digest).result())

    def _encode_part(self, picture: EncodedPicture, parts: Generator[None, None, numpy.ndarray]):
        try:
            next(parts)
        except StopIteration as done:
            picture.rows = done.value
            picture.picture = picture.picture._replace(pixels=b"")
            self.encoded += 1
            self.work = None
            self._forget()
        except Exception:
            self.work = None
            raise

    def _forget(self):
        """Drop the oldest pictures beyond what is kept; sequences have their own."""
        held = sum(picture.nbytes for picture in self.by_digest.values())
        while held > self.KEPT_BYTES and len(self.by_digest) > 1:
            _, oldest = self.by_digest.popitem(last=False)
            held -= oldest.nbytes


def make_tower(model: LoadedModel, transformer: Transformer, settings: Settings, device: Device,
               chunk: int) -> Tower:
    """What sees images. Where the model's own matrices are quantized, layers of
    floats in the tower become q8_0: that is no less exact than what reads their results, and 2.3 times as
    fast."""
    assert model.tower
    is_quantized = bool(transformer.matrix_types) and transformer.matrix_types[0] not in FLOAT_TYPES
    quantize = settings.quantize
    if not quantize and is_quantized and transformer.kernels.backend.quantizes:
        quantize = "q8_0"
    return Tower(model.tower, device, dtype=model.dtype, quantize=quantize,
                 part=PART_CHUNKS * chunk_work(model.architecture, chunk, is_quantized))
