"""The text of a page by where its letters stand: lines, raised and lowered digits, and tables, whose cells
stay apart and under their headings, also beside empty ones.

Letters come in the order in which the file draws them, which is mostly the order of reading. It is kept, with
two exceptions: what stands beside each other is a row, and rows below each other whose gaps meet are a table.

    glyphs > words > bands (what is drawn on one height) > plain lines, or tables of bands

All lengths are in units of the page, y grows upwards. An em is the height of a line of the text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence as Seq
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import NamedTuple

from chatlm.front.documents import scripts
from chatlm.front.documents.tables import REPEATED, row_text

SPACE_EM = 0.15     # between letters, from which on they belong to two words even without a space
COLUMN_EM = 0.8     # between words, from which on they belong to two cells
SPACED_SHARE = 0.7  # of the gaps between words, from which on a page is one that draws spaces
CLOSE_EM = 0.4      # between the lines of a cell, at most
GUTTER_EM = 0.15    # between two columns, at least
BACK_LINES = 8      # so far up may the next cell of a row begin, in lines
LEAST_HEADINGS = 3  # that stand close to each other
TOLD_ROWS = 40      # of a table, among which another one may begin
HEADINGS = 3        # rows of headings, at most
MOST_CELLS = 200    # of a row, or a wrapped one
SMALL = 0.85        # height of a raised or lowered letter, by that of its neighbour, at most
SHIFT = 0.15        # of its foot or head, by that height, at least
HYPHENS = "\x02", "\xad", "\ufffe"  # what PDFium reports where a word is divided
NUMBER = re.compile(r"[-+(]?[€$£¥]?\d[\d.,:/]*[%)€$£¥]?|[-–—]")
# of an item of a list
LABEL = re.compile(r"[•◦▪●○■·*–—-]|\(?(?:\d{1,3}|[A-Za-z]|[ivx]{1,4})[.)]")
THOUSANDS = re.compile(r"\d{3}(?:[.,]\d+)?")


class Glyph(NamedTuple):
    """A letter and its box; or several on a line, of which none is raised or lowered."""

    text: str
    left: float
    right: float
    bottom: float
    top: float

    @property
    def height(self) -> float:
        return self.top - self.bottom


@dataclass(slots=True)
class Word:
    """Letters without a space between them."""

    text: str
    left: float
    right: float
    bottom: float
    top: float
    is_spaced: bool = False  # does the file draw a space before it?

    @property
    def height(self) -> float:
        return self.top - self.bottom

    def gap_to(self, other: Word) -> float:
        """The room between two words beside each other, in either direction of writing."""
        return max(other.left - self.right, self.left - other.right)


@dataclass
class Segment:
    """Words that stand close to each other, as in a sentence or a cell."""

    words: list[Word]

    @property
    def text(self) -> str:
        return joined(self.words)

    @property
    def left(self) -> float:
        return min(word.left for word in self.words)

    @property
    def right(self) -> float:
        return max(word.right for word in self.words)

    @property
    def bottom(self) -> float:
        return min(word.bottom for word in self.words)

    @property
    def top(self) -> float:
        return max(word.top for word in self.words)


@dataclass
class Band:
    """What is drawn at one height: a line of text, or a row of a table."""

    segments: list[Segment] = field(default_factory=list)
    bottom: float = 0.0
    top: float = 0.0
    is_lower: bool = False  # does its first cell stand lower than the others, as one of several rows may?

    def add(self, segment: Segment):
        is_first = not self.segments or self.is_lower and len(self.segments) == 1
        self.bottom = segment.bottom if is_first else min(self.bottom, segment.bottom)
        self.top = segment.top if is_first else max(self.top, segment.top)
        self.segments.append(segment)

    @property
    def is_row(self) -> bool:
        return len(self.segments) > 1


def text_of_page(glyphs: Iterable[Glyph]) -> str:
    """The text of a page with these letters. "\\n" among them ends a line."""
    words = [*words_of(glyphs)]
    bands = bands_of(segments_of(words, draws_spaces(words)))
    text = "\n".join(lines_of(bands))
    return re.sub(f"[{''.join(HYPHENS)}]\n?", "", text)


def joined(words: Seq[Word]) -> str:
    """The text of words. A divided word becomes one again."""
    text = ""
    for word in words:
        if text.endswith(HYPHENS):
            text = text[:-1]
        elif text:
            text += " "
        text += word.text
    return text


# words


def words_of(glyphs: Iterable[Glyph]) -> Iterator[Word]:
    """The words of a page as they are drawn."""
    letters: list[Glyph] = []
    is_spaced = False
    for glyph in glyphs:
        if letters and (glyph.text.isspace() or is_apart(letters[-1], glyph)):
            yield word_of(letters, is_spaced)
            letters = []
            is_spaced = False
        if glyph.text == " ":
            is_spaced = True
        elif not glyph.text.isspace():
            letters.append(glyph)
    if letters:
        yield word_of(letters, is_spaced)


def is_apart(one: Glyph, other: Glyph) -> bool:
    if not overlap(one.bottom, one.top, other.bottom, other.top):
        return True
    gap = max(other.left - one.right, one.left - other.right)
    return gap > 0 and gap > SPACE_EM * max(one.height, other.height)


def word_of(letters: Seq[Glyph], is_spaced: bool) -> Word:
    """A word of letters, in which raised and lowered ones are marked."""
    if len(letters) == 1:
        return Word(*letters[0], is_spaced)
    height = max(letter.height for letter in letters)
    large = [letter for letter in letters if letter.height > SMALL * height]
    bottom = min(letter.bottom for letter in large)
    top = max(letter.top for letter in large)
    return Word(marked(letters, bottom, top), min(letter.left for letter in letters),
                max(letter.right for letter in letters), bottom, top, is_spaced)


def draws_spaces(words: Seq[Word]) -> bool:
    """Does a page draw a space between nearly all words of a sentence? Then what has none belongs to two
    cells, however close they stand. Other programs only leave room."""
    beside = [word.is_spaced for last, word in pairwise(words)
              if stand_level(last, word) and 0 < last.gap_to(word) < COLUMN_EM * word.height]
    return sum(beside) > SPACED_SHARE * len(beside)


def marked(letters: Seq[Glyph], bottom: float, top: float) -> str:
    """The text of letters on a line with this foot and head."""
    parts: list[tuple[int, str]] = []
    for letter in letters:
        height = shift_of(letter, bottom, top) if parts else 0
        if parts and parts[-1][0] == height:
            parts[-1] = height, parts[-1][1] + letter.text
        else:
            parts.append((height, letter.text))
    text = ""
    for place, (height, part) in enumerate(parts):
        after = parts[place + 1][1] if place + 1 < len(parts) else ""
        if height > 0:
            part = scripts.raised(part, after)
        elif height < 0:
            part = scripts.lowered(part, text, after)
        text += part
    return text


def shift_of(letter: Glyph, bottom: float, top: float) -> int:
    """1 if a letter is raised, -1 if it is lowered, else 0."""
    height = top - bottom
    if letter.height > SMALL * height or not letter.text.isalnum() and letter.text not in "+-−–":
        return 0
    if letter.bottom - bottom > SHIFT * height and letter.top >= top - SHIFT * height:
        return 1
    return -1 if top - letter.top > SHIFT * height and letter.bottom <= bottom + SHIFT * height else 0


# segments


def segments_of(words: Iterable[Word], spaced: bool) -> Iterator[Segment]:
    """Words that stand close to each other on a line, as they are drawn. spaced: are there spaces between
    those of a sentence?"""
    segment: Segment | None = None
    for word in words:
        if segment and continues(segment.words[-1], word, spaced):
            segment.words.append(word)
            continue
        if segment:
            yield segment
        segment = Segment([word])
    if segment:
        yield segment


def continues(last: Word, word: Word, spaced: bool) -> bool:
    """Does a word belong to the same sentence or cell as the one before it?"""
    if not stand_level(last, word):
        return False
    em = max(last.height, word.height)
    gap = last.gap_to(word)
    if not -em < gap < COLUMN_EM * em:
        return False
    if gap < GUTTER_EM * em:
        return True
    if spaced and not word.is_spaced:
        return False
    if NUMBER.fullmatch(last.text) and NUMBER.fullmatch(word.text) and not THOUSANDS.fullmatch(word.text):
        return False
    return True


def stand_level(one: Word, other: Word) -> bool:
    """Do two words stand at one height?"""
    return overlap(one.bottom, one.top, other.bottom, other.top)


def overlap(low: float, high: float, other_low: float, other_high: float) -> bool:
    """Do two ranges have half of the smaller one in common?"""
    common = min(high, other_high) - max(low, other_low)
    return common > 0.5 * min(high - low, other_high - other_low)


# bands


def bands_of(segments: Iterable[Segment]) -> list[Band]:
    """What is drawn at one height. A cell of several lines makes its band higher: the cells beside it are
    drawn before or after it."""
    bands: list[Band] = []
    for segment in segments:
        place = place_of(bands, segment)
        if place is None:
            place = len(bands)
            bands.append(Band())
        for lower in bands[place + 1:]:
            for each in lower.segments:
                bands[place].add(each)
        del bands[place + 1:]
        bands[place].add(segment)
    for band in bands:
        join_label(band)
    for band, below in pairwise(bands):
        part_headings(band, below)
    return bands


def place_of(bands: Seq[Band], segment: Segment) -> int | None:
    """The band to which a segment belongs, with all after it; None if it begins a new one."""
    if not bands:
        return None
    first = segment.words[0]
    last = len(bands) - 1
    if overlap(bands[last].bottom, bands[last].top, first.bottom, first.top):
        return last
    if bands[last].is_lower and goes_on(segment, bands[last]):
        return last
    taken = [*bands[last].segments]
    bottom = bands[last].bottom
    for place in range(last - 1, max(-1, last - BACK_LINES), -1):
        band = bands[place]
        if band.bottom - bands[place + 1].top > first.height:
            break  # these are no lines of one cell
        taken += band.segments
        bottom = min(bottom, band.bottom)
        if len(taken) > MOST_CELLS:
            return None
        if overlap(bottom, band.top, first.bottom, first.top):
            if is_free(segment, taken):
                return begin_of_cell(bands, place)
            break
    rises = first.bottom - bands[-1].top
    is_below_others = not last or first.top <= bands[-2].bottom
    if -first.height < rises < BACK_LINES * first.height and is_below_others and is_free(
            segment, bands[-1].segments):
        bands[last].is_lower = len(bands[last].segments) == 1
        return last
    return None


def begin_of_cell(bands: Seq[Band], place: int) -> int:
    """The first line of a cell whose lines from `place` on are the last bands. The cell beside it stands at
    its foot."""
    if place + 1 == len(bands) or bands[place].is_row:
        return place
    line = bands[place].segments[0]
    room = line.bottom - bands[place + 1].top
    while place:
        above = bands[place - 1].segments[0]
        differs = max(abs(above.left - line.left), abs(above.bottom - line.top - room))
        if bands[place - 1].is_row or differs > SPACE_EM * line.words[0].height:
            break
        place -= 1
        line = above
    return place


def goes_on(segment: Segment, band: Band) -> bool:
    """Is a segment the next line of a cell in a band whose first cell stands lower, or a cell beside it?"""
    label, *_, last = band.segments
    is_close = abs(last.bottom - segment.top) < CLOSE_EM * segment.words[0].height
    is_below = not is_free(segment, [last]) and is_free(segment, band.segments[:-1])
    if is_close and is_below and not NUMBER.fullmatch(segment.text):
        return True
    return overlap(label.bottom, label.top, segment.bottom, segment.top) and is_free(segment, band.segments)


def is_free(segment: Segment, others: Seq[Segment]) -> bool:
    """Is there nothing of others above or below a segment?"""
    return all(other.right <= segment.left or other.left >= segment.right for other in others)


def join_label(band: Band):
    """A bullet or number in front of a text is no cell."""
    if len(band.segments) == 2 and LABEL.fullmatch(band.segments[0].text):
        label, text = band.segments
        band.segments = [Segment([*label.words, *text.words])]


def part_headings(band: Band, below: Band):
    """Headings that stand as close to each other as words are cells, if each has its own one below it."""
    if band.is_row or len(below.segments) < LEAST_HEADINGS:
        return
    words = band.segments[0].words
    cells = [[place for place, cell in enumerate(below.segments) if overlaps(word, cell)] for word in words]
    first = cells[0][0] if cells[0] else 0
    is_over_each = len(words) == len(below.segments) - first and first < 2 and cells == [
        [place] for place in range(first, first + len(words))]
    if is_over_each and 0 < band.bottom - below.top < 2 * words[0].height:
        band.segments = [Segment([word]) for word in words]


def overlaps(word: Word, cell: Segment) -> bool:
    return word.left < cell.right and word.right > cell.left


# lines and tables


def lines_of(bands: Seq[Band]) -> Iterator[str]:
    place = 0
    while place < len(bands):
        rows = one_table(rows_from(bands, place))
        columns = columns_of(rows) if sum(band.is_row for band in rows) > 1 else []
        if 1 < len(columns) <= MOST_CELLS:
            yield from table_of(rows, columns)
            place += len(rows)
        else:
            yield from plain(bands[place])
            place += 1


def plain(band: Band) -> list[str]:
    """A band as lines: its segments in their order, those at one height beside each other."""
    lines: list[list[Word]] = []
    for segment in band.segments:
        last = lines[-1][-1] if lines else None
        first = segment.words[0]
        if last and overlap(last.bottom, last.top, first.bottom, first.top):
            lines[-1] += segment.words
        else:
            lines.append([*segment.words])
    return [joined(line) for line in lines]


def rows_from(bands: Seq[Band], place: int) -> list[Band]:
    """The bands from this one on that may be the rows of a table: below each other, and each with several
    cells, or with one that stands below one of the row before."""
    rows: list[Band] = []
    last: Band | None = None   # the last one with several cells
    usual = 3.0                # room between rows, in lines
    for band in islice(bands, place, None):
        if rows:
            room = (rows[-1].bottom - band.top) / height_of(band)
            if not -0.5 < room < usual:
                break
            usual = min(usual, 1.5 * max(room, 0.0) + 0.4)
        if band.is_row:
            last = band
        elif last is None or not fits(band.segments[0], last):
            break
        rows.append(band)
    while rows and not rows[-1].is_row and not is_continued(rows[-2], rows[-1]) and not has_one_value(rows):
        rows.pop()
    return rows


def has_one_value(rows: Seq[Band]) -> bool:
    """Is the last row one with a single number, which stands as far below the row before it as that one does
    below its own, and not in the first column?"""
    if len(rows) < 3 or not rows[-2].is_row:
        return False
    first, before, last = rows[-3:]
    [segment] = last.segments
    differs = abs((first.bottom - before.top) - (before.bottom - last.top)) > CLOSE_EM * height_of(last)
    return not differs and segment.left > before.segments[0].right and bool(NUMBER.fullmatch(segment.text))


def one_table(rows: Seq[Band]) -> Seq[Band]:
    """The rows of the first table, where another one stands so close below it that both seem one: its cells
    cover the gutters of the first."""
    most = 0
    for count in range(2, min(len(rows), TOLD_ROWS) + 1):
        if sum(band.is_row for band in rows[:count]) < 2:
            continue
        columns = len(columns_of(rows[:count]))
        if columns < most - 1:
            return rows[:count - 1]
        most = max(most, columns)
    return rows


def height_of(band: Band) -> float:
    return band.segments[0].words[0].height


def fits(segment: Segment, row: Band) -> bool:
    """Does a segment stand below at most one cell of a row?"""
    return sum(other.right > segment.left and other.left < segment.right for other in row.segments) < 2


def is_continued(row: Band, band: Band) -> bool:
    """Does a cell of a row go on in the line below it?"""
    close = row.bottom - band.top < 0.5 * height_of(band)
    return close and len(band.segments) == 1 and not NUMBER.fullmatch(band.segments[0].text)


def columns_of(rows: Seq[Band]) -> list[tuple[float, float]]:
    """The columns of a table: what is left and right of the gutters between them, which no cell covers. Cells
    of the first rows may: headings that stand above several columns."""
    whole = [band for band in rows if band.is_row]
    columns = between_gutters(whole)
    for headings in range(1, min(HEADINGS, len(whole) - 2) + 1):
        if len(below := between_gutters(whole[headings:])) > len(columns):
            columns = below
    return united(columns, whole)


def united(columns: Seq[tuple[float, float]], rows: Seq[Band]) -> list[tuple[float, float]]:
    """The columns of a table in which a heading at the left of its column, and values at the right of it, are
    one."""
    filled = [[number for number, band in enumerate(rows) if any(
        stands_in(segment, column, columns) for segment in band.segments)] for column in columns]
    found: list[tuple[float, float]] = []
    last: list[int] = []
    for column, places in zip(columns, filled):
        if last and places and (last[-1] < min(places[0], HEADINGS) or places[-1] < min(last[0], HEADINGS)):
            found[-1] = found[-1][0], column[1]
            last = sorted(last + places)
        else:
            found.append(column)
            last = places
    return found


def stands_in(segment: Segment, column: tuple[float, float], columns: Seq[tuple[float, float]]) -> bool:
    """Does a segment stand in this column alone?"""
    return [column] == [each for each in columns if each[0] < segment.right and each[1] > segment.left]


def between_gutters(rows: Seq[Band]) -> list[tuple[float, float]]:
    least = GUTTER_EM * height_of(rows[0])
    columns: list[tuple[float, float]] = []
    for left, right in sorted((each.left, each.right) for band in rows for each in band.segments):
        if columns and left - columns[-1][1] < least:
            columns[-1] = columns[-1][0], max(columns[-1][1], right)
        else:
            columns.append((left, right))
    return columns


def table_of(rows: Seq[Band], columns: Seq[tuple[float, float]]) -> Iterator[str]:
    """A table as lines of Markdown."""
    texts: list[list[str]] = []
    for place, band in enumerate(rows):
        cells = [""] * len(columns)
        for segment in band.segments:
            for column, text in placed(segment, columns, band.is_row):
                cells[column] = f"{cells[column]} {text}".strip()
        if texts and is_continued(rows[place - 1], band) and (column := filled(cells)) is not None:
            texts[-1][column] = f"{texts[-1][column]} {cells[column]}".strip()
        else:
            texts.append(cells)
    for cells in texts:
        yield row_text(cells)


def filled(cells: Seq[str]) -> int | None:
    """The only column with a text; None if there are several."""
    places = [place for place, text in enumerate(cells) if text]
    return places[0] if len(places) == 1 else None


def placed(segment: Segment, columns: Seq[tuple[float, float]], beside: bool) -> list[tuple[int, str]]:
    """The columns of a segment, with its text in each. Words that stand close to each other are parted where
    each column has its own; a heading over several columns stands in each of them. beside: are there other
    cells in its row?"""
    begin, end = segment.left, segment.right
    over = [place for place, (left, right) in enumerate(columns) if left < end and right > begin]
    if not over:
        over = [min(range(len(columns)), key=lambda place: abs(columns[place][0] - begin))]
    if len(over) > 1 and beside and (parted := by_column(segment.words, [columns[place] for place in over])):
        return [(over[place], joined(words)) for place, words in parted.items()]
    if not beside or len(segment.text) > REPEATED:
        over = over[:1]
    return [(place, segment.text) for place in over]


def by_column(words: Seq[Word], columns: Seq[tuple[float, float]]) -> dict[int, list[Word]]:
    """The words of each column, if no word reaches over a gutter and no column is without one; else {}."""
    parted: dict[int, list[Word]] = {}
    for word in words:
        over = [place for place, (left, right) in enumerate(columns)
                if left < word.right and right > word.left]
        if len(over) != 1:
            return {}
        parted.setdefault(over[0], []).append(word)
    return parted if len(parted) == len(columns) else {}
