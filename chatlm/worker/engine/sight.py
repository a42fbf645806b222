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
from chatlm.worker.model.tower import tiles_of

if TYPE_CHECKING:
    from chatlm.common.messages.requests import Picture, Vision
    from chatlm.common.vision.layout import Layout
    from chatlm.worker.engine.sequence import Assignment, Sequence
    from chatlm.worker.model.tower import Tower


@dataclass(eq=False)
class Seen:
    """A picture, and its rows (tokens, width) float32 once the tower has computed them."""

    picture: Picture
    layout: Layout
    rows: numpy.ndarray | None = None

    @property
    def nbytes(self) -> int:
        return len(self.picture.pixels) + (0 if self.rows is None else self.rows.nbytes)


class Sight:
    """Where the rows of its pictures stand in a sequence's prompt.

    In some models these turn by their place in the picture, and all after it as if it had as many tokens as
    its longer side has rows (M-RoPE)."""

    def __init__(self, first_id: int, places: list[int], owners: list[tuple[int, int]], seen: Seq[Seen],
                 two_sided: bool = False, first_turn: int = 0):
        """two_sided: rows of a picture see all of its rows, and must be computed in one step. first_turn: the
        row of the rotary tables with the turn of a step's first row; 0: all turn by their position."""
        self.first_id = first_id
        self.places = places
        self.two_sided = two_sided
        # of each place: (number of the picture, row)
        self.owners = owners
        self.seen = seen
        self.first_turn = first_turn
        self.begins = [place for place, (_, row) in zip(places, owners) if row == 0]  # of each picture
        self.turns = list[int]()  # by which the first row of each turns, and what follows the last
        if first_turn:
            lost = 0
            for begin, each in zip(self.begins, seen):
                self.turns.append(begin - lost)
                lost += each.layout.tokens - max(each.layout.grid or (0,))

    def known(self, first: int, count: int) -> int:
        """How many of these tokens come before the first row that is not encoded."""
        place = self.missing(first)
        return count if place is None else min(count, place - first)

    def missing(self, first: int) -> int | None:
        """The place of the first row from token `first` on that is not encoded."""
        at = bisect.bisect_left(self.places, first)
        while at < len(self.places):
            number, row = self.owners[at]
            if (seen := self.seen[number]).rows is None:
                return self.places[at]
            at += seen.layout.tokens - row
        return None

    def unknown(self, first: int) -> Seen | None:
        """The next picture that the tokens from `first` on need, if its rows are not known."""
        place = self.missing(first)
        return None if place is None else self.seen[self.owners[bisect.bisect_left(self.places, place)][0]]

    def turned(self, first: int, count: int, begin: int) -> list[int]:
        """The rows of the rotary tables for these tokens, which begin in row `begin` of a step."""
        turns = []
        for place in range(first, first + count):
            number = bisect.bisect_right(self.begins, place) - 1
            layout = self.seen[max(number, 0)].layout
            after = place - self.begins[number] - layout.tokens
            if number < 0:
                turns.append(place)
            elif after < 0:
                turns.append(self.first_turn + begin + place - first)
            else:
                turns.append(self.turns[number] + max(layout.grid or (0,)) + after)
        return turns

    def _places(self, number: int, rows: numpy.ndarray) -> numpy.ndarray | None:
        """Time, row and column of a picture's rows."""
        grid = self.seen[number].layout.grid
        if not self.turns or not grid:
            return None
        return self.turns[number] + numpy.stack([0 * rows, rows // grid[0], rows % grid[0]], axis=1)

    def rows(self, first: int, count: int) -> list[tuple[int, numpy.ndarray, numpy.ndarray | None]]:
        """The rows among these tokens: (index in them, rows, places by which they turn) of each run."""
        begin, end = (bisect.bisect_left(self.places, place) for place in (first, first + count))
        found = []
        while begin < end:
            last, (number, row) = begin + 1, self.owners[begin]
            while (last < end and self.places[last] == self.places[last - 1] + 1
                   and self.owners[last][0] == number):
                last += 1
            rows = self.seen[number].rows
            assert rows is not None  # the scheduler has waited for them
            count = last - begin
            found.append((self.places[begin] - first, rows[row:row + count],
                          self._places(number, numpy.arange(row, row + count))))
            begin = last
        return found

    def spans(self, first: int, end: int) -> list[tuple[int, int]]:
        """(first place, that after the last) of each picture with rows among the tokens [first, end)."""
        found = []
        at = 0
        while at < len(self.places) and self.places[at] < end:
            count = self.seen[self.owners[at][0]].layout.tokens
            if (last := self.places[at] + count) > first:
                found.append((self.places[at], last))
            at += count
        return found

    def as_one_id(self, ids: Iterable[int]) -> list[int]:
        """The ids with that after the last of the vocabulary for every row."""
        return [min(token, self.first_id) for token in ids]

    def without_rows(self, tokens: Iterable[int]) -> list[int]:
        return [token for token in tokens if token < self.first_id]


class Pictures:
    """Encodes the pictures that running sequences wait for, the oldest sequence's first: with each call of
    `advance` a part of one, so that others wait no longer. Rows are kept by the digest of the pixels."""

    KEPT_BYTES = 256 << 20  # of rows, for pictures that come again

    def __init__(self, tower: Tower | None, first_turn: int = 0):
        """tower: None: the model sees nothing, and no sequence has a sight. first_turn: see Sight."""
        self.tower = tower
        self.first_turn = first_turn
        self.seen: OrderedDict[bytes, Seen] = OrderedDict()
        self.resizing = ThreadPoolExecutor(1, "pictures")
        self.tiles: dict[bytes, Future[list[numpy.ndarray]]] = {}  # of pictures that are wanted
        self.work: tuple[Seen, Generator[None, None, numpy.ndarray]] | None = None
        self.encoded = 0        # pictures

    def sight(self, work: Assignment, vision: Vision) -> Sight:
        """ValueError if the ids of its prompt are not those of its pictures."""
        seen = [self._of(picture, vision) for picture in work.pictures]
        self._forget()
        counts = [(each.picture.digest, each.layout.tokens) for each in seen]
        return Sight(vision.first_id, rows_in(vision, work.prompt_ids),
                     row_places(vision, work.prompt_ids, counts), seen, vision.two_sided, self.first_turn)

    def _of(self, picture: Picture, vision: Vision) -> Seen:
        if (seen := self.seen.get(picture.digest)) is None:
            layout = layout_of(vision, picture.width, picture.height)
            seen = self.seen[picture.digest] = Seen(picture, layout)
        self.seen.move_to_end(picture.digest)
        return seen

    @property
    def preparing(self) -> list[Future]:
        """What a thread does for pictures now."""
        return [tiles for tiles in self.tiles.values() if not tiles.done()]

    def advance(self, running: Iterable[Sequence]):
        """Do the next part of the picture that the oldest of these sequences needs first."""
        wanted = [seen for sequence in running if sequence.sight
                  and (seen := sequence.sight.unknown(sequence.computed))]
        if not wanted or self.tower is None:
            if self.tiles or self.work:
                self.tiles = {}
                self.work = None
            return
        seen = wanted[0]
        if self.work is None or self.work[0] is not seen:
            self.work = None
            digest = seen.picture.digest
            if digest not in self.tiles:
                self.tiles = {digest: self.resizing.submit(
                    tiles_of, seen.picture, seen.layout, self.tower.eyes.filter)}
            if not self.tiles[digest].done():
                return
            self.work = seen, self.tower.encode(self.tiles.pop(digest).result())
        parts = self.work[1]
        try:
            next(parts)
        except StopIteration as done:
            seen.rows, seen.picture = done.value, seen.picture._replace(pixels=b"")
            self.encoded += 1
            self.work = None
            self._forget()
        except Exception:
            self.work = None
            raise

    def _forget(self):
        """Drop the oldest pictures beyond what is kept; sequences have their own."""
        held = sum(seen.nbytes for seen in self.seen.values())
        while held > self.KEPT_BYTES and len(self.seen) > 1:
            held -= self.seen.popitem(last=False)[1].nbytes


def sight_of(pictures: Pictures, work: Assignment) -> tuple[Sight | None, str]:
    """What an answer sees, None if nothing; or why it cannot be."""
    if not work.pictures:
        return None, ""
    if pictures.tower is None:
        return None, "this model cannot see images"
    try:
        return pictures.sight(work, pictures.tower.eyes.vision), ""
    except ValueError as error:
        return None, str(error)
