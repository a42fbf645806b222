"""Tables become lines of Markdown in which every value stands under its heading, also beside merged cells."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence as Seq
from typing import NamedTuple

COPIES = 100_000      # of merged cells, in all tables of a document
REPEATED = 100        # characters up to which the text of a merged cell is repeated
INNER_TABLE = "(table below)"  # stands in a cell whose table follows the one around it
EMPTY_CELLS = 16      # beside each other, from which on one cell says that they are empty


class Cell(NamedTuple):
    """A cell with its text, and how many columns and rows it takes."""

    text: str
    columns: int = 1
    rows: int = 1


class Copies:
    """How often the merged cells of a document may still be repeated."""

    def __init__(self, room: int = COPIES):
        self.room = room

    def take(self, count: int = 1) -> bool:
        self.room -= count
        return self.room >= 0


def number_in(value: str, most: int) -> int:
    """How many columns or rows an attribute says that a cell takes: from 1 to `most`."""
    return min(max(1, int(value)), most) if re.fullmatch("[0-9]{1,8}", value) else 1


class Above(NamedTuple):
    """A cell of an earlier row that also takes the place of later ones."""

    text: str
    rows: int  # that are still to come


def row_text(cells: Iterable[str]) -> str:
    """A row as a line of Markdown."""
    return "| " + " | ".join(" ".join(cell.split("\n")).replace("|", "\\|").strip() for cell in cells) + " |"


def rule(columns: int) -> str:
    """The line below the headings."""
    return "| " + " | ".join(["---"] * columns) + " |"


def spread(rows: Iterable[Seq[Cell]], copies: Copies) -> Iterator[list[str]]:
    """The texts of each row, by column. A merged cell stands in all columns and rows that it takes, unless it
    is long, or alone in its row, as titles are. Rows without a cell of their own are left out."""
    above: dict[int, Above] = {}
    for row in rows:
        texts: list[str] = []
        alone = len(row) == 1 and not above
        for cell in row:
            fill_from(above, texts, copies)
            width = max(1, cell.columns)
            repeated = cell.text if len(cell.text) <= REPEATED and not alone else ""
            if not copies.take(width - 1):
                width = 1
            if cell.rows > 1:
                below = Above(repeated, cell.rows)
                above.update((len(texts) + place, below) for place in range(width))
            texts += [cell.text, *[repeated] * (width - 1)]
        fill_from(above, texts, copies)
        above = {} if copies.room < 0 else {
            column: each._replace(rows=each.rows - 1) for column, each in above.items() if each.rows > 1}
        copies.take(len(above))
        if row:
            yield texts


def fill_from(above: dict[int, Above], texts: list[str], copies: Copies):
    """Continue a row with the cells of earlier rows that stand at its next places."""
    while (each := above.get(len(texts))) and copies.take():
        texts.append(each.text)


def table_lines(rows: Iterable[Seq[Cell]], copies: Copies) -> list[str]:
    """A table as lines of Markdown. Its first row has the headings."""
    lines: list[str] = []
    for texts in spread(rows, copies):
        lines.append(row_text(texts))
        if len(lines) == 1:
            lines.append(rule(len(texts)))
    return lines


# sheets


def sparse_row(texts: dict[int, str]) -> str:
    """The row with these texts by column, from 0. Many empty cells beside each other are one that names them.
    """
    cells: list[str] = []
    next_column = 0
    for column in sorted(texts):
        gap = column - next_column
        if gap > EMPTY_CELLS:
            cells.append(f"({column_name(next_column)} to {column_name(column - 1)}: empty)")
        else:
            cells += [""] * gap
        cells.append(texts[column])
        next_column = column + 1
    return row_text(cells)


def column_name(column: int) -> str:
    """The letters of a sheet's column, from 0: A, ..., Z, AA."""
    letters = ""
    number = column + 1
    while number:
        number, letter = divmod(number - 1, 26)
        letters = chr(65 + letter) + letters
    return letters


class Merged(NamedTuple):
    """Merged cells: rows and columns from 1 and 0, the last ones included."""

    first_row: int
    first_column: int
    last_row: int
    last_column: int


class Merges:
    """The merged cells of a sheet, row by row."""

    def __init__(self, merged: Iterable[Merged] = ()):
        self.waiting = sorted(merged, reverse=True)
        self.open: list[tuple[Merged, str]] = []  # that reach the present row, with their texts

    def add(self, merged: Merged):
        """Add merged cells of the present row, which is the last one so far."""
        self.waiting.append(merged)

    def repeat(self, row: int, texts: dict[int, str], copies: Copies):
        """Put the text of merged cells into all cells that they cover, where their row has others."""
        self.open = [each for each in self.open if each[0].last_row >= row]
        alone = len(texts) == 1
        own = {*texts}
        for merged, text in self.open:
            if own and text:
                self.fill(merged, text, texts, copies)
        while self.waiting and self.waiting[-1].first_row <= row:
            merged = self.waiting.pop()
            text = texts.get(merged.first_column, "") if merged.first_row == row else ""
            if len(text) > REPEATED or not text:
                continue
            if not alone:
                self.fill(merged, text, texts, copies)
            if merged.last_row > row and copies.room >= 0 and not alone:
                self.open.append((merged, text))

    @staticmethod
    def fill(merged: Merged, text: str, texts: dict[int, str], copies: Copies):
        for column in range(merged.first_column, merged.last_column + 1):
            if not copies.take():
                return
            texts.setdefault(column, text)
