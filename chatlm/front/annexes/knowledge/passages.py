"""Cuts the text of a file into passages, which are found and shown, and these into windows, which are
embedded.

All are slices of the text, so each has its place. The text is first cut into pieces, sentences or parts of
long ones, whose tokens are counted once. A passage is a run of pieces; so is a window of a passage.

The strategy `auto` begins a new passage at each heading and each page, so that a passage has one heading and
one page, and cuts longer ones between paragraphs if it can. A `static` one only counts tokens, as its client
has asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence as Seq
from itertools import islice
from typing import NamedTuple

PASSAGE_TOKENS = 512        # of a passage of `auto`, at most
FULL_PASSAGE = 0.5          # part of these from which on a passage ends at the end of a paragraph
WINDOW_TOKENS = 256         # of a window with its heading and special tokens, at most
WINDOW_OVERLAP = 0.15       # of a window's tokens are in the window before it too
HEADING_TOKENS = 32         # of the heading in front of a window, at most
PIECE_CHARACTERS = 240      # longer sentences are cut
HEADING_CHARACTERS = 200    # of each heading
LEVELS = 3                  # innermost headings above a passage
PIECE_LEAST = 24            # characters of a piece, unless its paragraph ends
MOST_PIECES = 50_000        # of a text
TOKEN_CHARACTERS = 16       # of a token, at most: some texts have none for a tokenizer, and yet a size
SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]?(?=\s)|[。！？]|\n")
FENCE = re.compile(r" {0,3}(```|~~~)")
MARK = re.compile(r"\[(?:page|slide) (\d+)\]$")


class TooManyPieces(Exception):
    """A text consists of more than MOST_PIECES sentences and headings."""


class Strategy(NamedTuple):
    """How a text is cut."""

    tokens: int = PASSAGE_TOKENS
    overlap: int = 0
    by_headings: bool = True


class Piece(NamedTuple):
    """A slice of the text that is not cut further."""

    start: int
    end: int
    tokens: int
    heading: str
    page: int | None
    begins: bool      # a paragraph
    section: int      # changes with each heading and each page


class Passage(NamedTuple):
    place: int        # 0, 1, ... within its file
    heading: str      # those above it, outermost first, joined by " > "
    start: int        # of its first character within the text
    page: int | None
    tokens: int
    text: str
    windows: tuple[str, ...]  # what is embedded, with a heading each


class Paragraph(NamedTuple):
    start: int
    end: int
    heading: str
    page: int | None
    section: int


def counting(count: Callable[[str], int]) -> Callable[[str], int]:
    """The tokens of a text, at least one for every TOKEN_CHARACTERS. count: as its tokenizer has it."""
    return lambda text: max(count(text), -(-len(text) // TOKEN_CHARACTERS))


def heading_in(line: str) -> tuple[int, str] | None:
    """(level, text) of the heading that a line of Markdown is."""
    bare = line.strip()
    words = bare.lstrip("#")
    level = len(bare) - len(words)
    words = words.strip(" \t#")[:HEADING_CHARACTERS].strip()
    return (level, words) if 1 <= level <= 6 and bare[level:level + 1] in (" ", "\t") and words else None


def paragraphs_of(text: str, marked: bool) -> Iterator[Paragraph]:
    """The paragraphs of a text; a heading belongs to the one after it. marked: lines such as `[page 3]` say
    where a page begins."""
    above: list[tuple[int, str]] = []  # the headings that hold here
    heading = ""
    page = 1 if marked else None
    section = 0
    fenced = False
    begin: int | None = None
    bare = False  # what has begun is a heading alone, which goes with what follows
    last = 0
    start = 0
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        line = text[start:min(end, start + 1000)]
        mark = MARK.match(line) if marked else None
        blank = not line.strip() and not text[start:end].strip()
        fenced ^= bool(FENCE.match(line))
        found = None if fenced or mark or blank else heading_in(line)
        if begin is not None and (mark or blank or found) and not (bare and not mark):
            yield Paragraph(begin, last, heading, page, section)
            begin = None
        if mark:
            page = int(mark[1][:9])
            section += 1
        elif found:
            above = [one for one in above if one[0] < found[0]] + [found]
            heading = " > ".join(words for _, words in above[-LEVELS:])
            section += 1
        if not mark and not blank:
            bare = bool(found) and (begin is None or bare)
            begin = start if begin is None else begin
            last = end
        start = end + 1
    if begin is not None:
        yield Paragraph(begin, last, heading, page, section)


def pieces_of(text: str, count: Callable[[str], int], most: int, marked: bool) -> Iterator[Piece]:
    """The pieces of a text, in order. count: the tokens of a text. most: of a piece."""
    for paragraph in paragraphs_of(text, marked):
        begins = True
        for start, end in sentences(text, paragraph.start, paragraph.end):
            for first, last, tokens in fitting(text, start, end, count, most):
                yield Piece(first, last, tokens, paragraph.heading, paragraph.page, begins, paragraph.section)
                begins = False


def sentences(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Slices of a paragraph: its sentences, those that are long in parts, short ones together. None begins or
    ends with a space."""
    while start < end:
        stop = min(end, start + PIECE_CHARACTERS)
        if found := SENTENCE_END.search(text, start + PIECE_LEAST, stop):
            stop = found.end()
        elif stop < end:  # it goes on: cut it between words
            space = text.rfind(" ", start + PIECE_CHARACTERS // 2, stop)
            stop = space if space > 0 else stop
        words = text[start:stop]
        if bare := words.strip():
            first = start + len(words) - len(words.lstrip())
            yield first, first + len(bare)
        start = stop


def fitting(text: str, start: int, end: int, count: Callable[[str], int],
            most: int) -> Iterator[tuple[int, int, int]]:
    """Slices of a slice that have at most `most` tokens each, with their tokens."""
    tokens = count(text[start:end])
    if tokens <= most or end - start < 2:
        yield start, end, tokens
        return
    middle = (start + end) // 2
    space = text.rfind(" ", start + 1, middle)
    cut = space if space > start + (end - start) // 4 else middle
    yield from fitting(text, start, cut, count, most)
    yield from fitting(text, cut, end, count, most)


def runs_of(pieces: Seq[Piece], strategy: Strategy) -> Iterator[Seq[Piece]]:
    """The pieces of each passage."""
    run = list[Piece]()
    size = 0
    for piece in pieces:
        leaves = strategy.by_headings and bool(run) and piece.section != run[-1].section
        is_full = size >= strategy.tokens * FULL_PASSAGE and piece.begins and strategy.by_headings
        if run and (leaves or is_full or size + piece.tokens > strategy.tokens):
            yield run
            run = overlapping(run, 0 if leaves or is_full else strategy.overlap)
            size = sum(one.tokens for one in run)
            while run and size + piece.tokens > strategy.tokens:
                size -= run.pop(0).tokens
        run.append(piece)
        size += piece.tokens
    if run:
        yield run


def overlapping(run: Seq[Piece], most: int) -> list[Piece]:
    """The last pieces of a run that have at most `most` tokens together, never all of it."""
    kept = list[Piece]()
    for piece in reversed(run[1:]):
        most -= piece.tokens
        if most < 0:
            break
        kept.insert(0, piece)
    return kept


def windows_of(text: str, run: Seq[Piece], most: int) -> Iterator[str]:
    """What of a passage the embedder reads at once."""
    window = list[Piece]()
    size = 0
    for piece in run:
        if window and size + piece.tokens > most:
            yield text[window[0].start:window[-1].end]
            window = overlapping(window, int(most * WINDOW_OVERLAP))
            size = sum(one.tokens for one in window)
            while window and size + piece.tokens > most:
                size -= window.pop(0).tokens
        window.append(piece)
        size += piece.tokens
    if window:
        yield text[window[0].start:window[-1].end]


def shortened(heading: str, count: Callable[[str], int], most: int) -> str:
    """The end of a heading, which is its innermost part, that has at most `most` tokens."""
    words = heading.split(" ")
    while words and count(" ".join(words)) > most:
        words = words[max(1, len(words) // 4):]
    return " ".join(words)


def windows_of_passage(text: str, heading: str, count: Callable[[str], int], longest: int,
                       special: int = 2) -> tuple[str, ...]:
    """The windows of a passage that was cut before, for another embedder. Arguments as for passages_of."""
    count = counting(count)
    room = max(min(WINDOW_TOKENS, longest) - special, 8)
    short = shortened(heading, count, min(HEADING_TOKENS, room // 4))
    left = room - (count(short) + 1 if short else 0)
    pieces = [Piece(start, end, tokens, heading, None, False, 0)
              for first, last in sentences(text, 0, len(text))
              for start, end, tokens in fitting(text, first, last, count, room // 2)]
    return tuple(f"{short}\n{words}" if short else words for words in windows_of(text, pieces, left))


def passages_of(text: str, count: Callable[[str], int], longest: int, special: int = 2,
                strategy: Strategy = Strategy(), marked: bool = False) -> Iterator[Passage]:
    """The passages of a text. count: the tokens of a text, without special ones. longest: tokens that the
    embedder reads, `special` ones included. marked: see lines_of. Raises TooManyPieces."""
    count = counting(count)
    room = max(min(WINDOW_TOKENS, longest) - special, 8)
    of_heading = min(HEADING_TOKENS, room // 4)
    most = min(room // 2, strategy.tokens)
    pieces = [*islice(pieces_of(text, count, most, marked), MOST_PIECES + 1)]
    if len(pieces) > MOST_PIECES:
        raise TooManyPieces
    short: dict[str, str] = {}
    for place, run in enumerate(runs_of(pieces, strategy)):
        first = run[0]
        if first.heading not in short:
            short[first.heading] = shortened(first.heading, count, of_heading)
        heading = short[first.heading]
        left = room - (count(heading) + 1 if heading else 0)
        windows = tuple(f"{heading}\n{words}" if heading else words
                        for words in windows_of(text, run, left))
        yield Passage(place, first.heading, first.start, first.page, sum(piece.tokens for piece in run),
                      text[first.start:run[-1].end], windows)
