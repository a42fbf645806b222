"""OpenDocument, as LibreOffice writes it: texts (ODT), sheets (ODS) and slides (ODP)."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from itertools import repeat
from typing import Any

from chatlm.front.documents import scripts
from chatlm.front.documents.archives import Archive, attribute, below, first, local, outermost
from chatlm.front.documents.document import Document, Reading, refusal
from chatlm.front.documents.equations import line_of
from chatlm.front.documents.slides import with_scripts
from chatlm.front.documents.tables import (
    INNER_TABLE, Cell, Copies, Merged, Merges, column_name, number_in, row_text, rule, sparse_row, spread)

MIMETYPE = "application/vnd.oasis.opendocument."
NOUNS = {"presentation": "slide", "spreadsheet": "sheet"}
SPACES = 1000       # that one element may stand for
COLUMNS = 16_384    # of a sheet
ROWS = 1 << 20
SPAN = 1000         # columns or rows that a merged cell takes, at most
VALUES = "string-value", "date-value", "time-value", "boolean-value", "value"  # of a cell without its text
FIELDS = "sheet-name", "page-number", "page-count", "date", "time", "file-name", "title"  # of headers
BLOCKS = ("h", "p", "list", "table", "section", "frame", "annotation", "note", "list-item", "list-header",
          "index-body", "g", "page", "custom-shape", "notes")


def read_opendocument(data: bytes, reading: Reading) -> Document:
    archive = Archive(data)
    manifest = archive.xml("META-INF/manifest.xml")
    if manifest is not None and any(True for _ in below(manifest, "encryption-data")):
        raise refusal("the file is encrypted: save it without its password", "encrypted")
    root = archive.xml("content.xml")
    body = None if root is None else first(root, "body")
    if body is None:
        raise ValueError("it has no content")
    content = next(each for each in body if local(each) in ("text", *NOUNS))
    walk = Walk(archive, root, reading)
    noun = NOUNS.get(local(content))
    if not noun:
        parts = [*walk.margins("header"), *walk.blocks(content), *walk.margins("footer")]
        return Document(["\n\n".join(parts)])
    pages = [each for each in content if local(each) in ("page", "table")]
    if noun == "slide":
        texts = ("\n\n".join(walk.slide(each, number)) for number, each in enumerate(pages, 1))
        return Document(texts, len(pages), noun, True)
    sheets = [each for each in pages if not walk.is_hidden(each)]
    return Document(("\n".join(walk.sheet(each)) for each in sheets), len(sheets), noun)


class Walk:
    """Goes through a document and writes what it finds as Markdown."""

    def __init__(self, archive: Archive, root: Any, reading: Reading, folder: str = ""):
        self.archive = archive
        self.reading = reading
        self.folder = folder
        self.place = ""
        self.copies = Copies()
        self.heights = heights_in(root)
        self.styles = {attribute(each, "name"): each for each in below(root, "style")}
        self.numbered = numbered_in(root) | numbered_in(archive.xml("styles.xml"))
        self.inner: list[Any] = []  # tables in the cells of the table that is read
        self.written_margins: set[str] = set()  # of sheets; each is written once

    def slide(self, element: Any, number: int) -> Iterator[str]:
        self.place = f"slide {number}"
        yield from self.blocks(element)

    def blocks(self, element: Any) -> Iterator[str]:
        """The paragraphs, lists and tables within an element."""
        for each in element:
            name = local(each)
            if name == "h":
                level = attribute(each, "outline-level")
                depth = min(int(level), 6) if level.isdigit() and len(level) < 3 else 1
                yield from self.paragraph(each, "#" * max(depth, 1) + " ")
            elif name == "p":
                yield from self.paragraph(each)
            elif name == "list":
                yield "\n".join(self.list_lines(each))
            elif name == "table":
                yield "\n".join(self.table(each))
            elif name == "forms":
                yield from form_values(each)
            elif name == "notes":
                yield from (f"Notes: {text}" for text in self.blocks(each))
            elif name == "frame":
                yield from self.frame(each)
            elif name == "annotation":
                yield f"Comment: {self.remark(each)}"
            elif name not in ("tracked-changes", "sequence-decls", "variable-decls", "scripts"):
                yield from self.blocks(each)

    def list_lines(self, element: Any, style: str = "", level: int = 1) -> Iterator[str]:
        """The items of a list, numbered as its style says."""
        style = attribute(element, "style-name") or style
        number = None
        for item in element:
            if local(item) not in ("list-item", "list-header"):
                continue
            start = attribute(item, "start-value") or self.numbered.get((style, level), "")
            if number is None or attribute(item, "start-value"):
                number = int(start) if start.isdecimal() and len(start) < 9 else None
            text = " ".join(self.blocks(each for each in item if local(each) != "list"))
            if text:
                sign = "*" if number is None or local(item) == "list-header" else f"{number}."
                yield f"{'   ' * (level - 1)}{sign} {text}"
                number = None if number is None else number + (local(item) == "list-item")
            for inner in item:
                if local(inner) == "list":
                    yield from self.list_lines(inner, style, level + 1)

    def paragraph(self, element: Any, before: str = "") -> Iterator[str]:
        text = self.line(element).strip()
        if text:
            yield before + text
        for frame in outermost(element, "frame", "custom-shape"):
            yield from self.frame(frame)

    def line(self, element: Any) -> str:
        """The text of a paragraph, in which notes and remarks stand in brackets."""
        runs: list[tuple[str, int]] = [(element.text or "", 0)]
        for each in element:
            name = local(each)
            if name == "s":
                count = attribute(each, "c")
                runs.append((" " * min(int(count) if count.isdigit() else 1, SPACES), 0))
            elif name == "tab":
                runs.append(("\t", 0))
            elif name == "line-break":
                runs.append(("\n", 0))
            elif name == "note":
                citation = first(each, "note-citation")
                sign = "" if citation is None else "".join(citation.itertext())
                runs.append((f" [note {sign}: {self.remark(first(each, 'note-body'))}]", 0))
            elif name == "annotation":
                runs.append((f" [comment: {self.remark(each)}]", 0))
            elif name == "span":
                height = self.heights.get(attribute(each, "style-name"), 0)
                runs.append((self.line(each), height))
            elif name not in ("frame", "custom-shape", "annotation-end"):
                runs.append((self.line(each), 0))
            runs.append((each.tail or "", 0))
        return with_scripts([run for run in runs if run[0]])

    def remark(self, element: Any) -> str:
        if element is None:
            return ""
        return " ".join(self.line(each).strip() for each in outermost(element, "p"))

    def frame(self, frame: Any) -> Iterator[str]:
        """What a frame shows: its texts, an equation, the table of a chart."""
        for each in frame:
            name = local(each)
            if name == "object":
                yield from self.embedded(attribute(each, "href"))
                return  # what follows are pictures of it
            if name == "image":
                self.reading.lacks("picture", self.place)
                return
            if name == "object-ole":
                self.reading.lacks("embedded", self.place)
                return
            if name in BLOCKS or name == "text-box":
                yield from self.blocks([each] if name in BLOCKS else each)

    def embedded(self, href: str) -> Iterator[str]:
        folder = posixpath.normpath(posixpath.join(self.folder, href))
        root = self.archive.xml(posixpath.join(folder, "content.xml"))
        if root is None:
            self.reading.lacks("embedded", self.place)
        elif local(root) == "math":
            yield line_of(root)
        elif folder != self.folder and not self.folder:
            walk = Walk(self.archive, root, self.reading, folder)
            titles = [" ".join("".join(each.itertext()).split()) for each in below(root, "title")
                      if local(each.getparent()) != "axis"]
            yield "\n".join([
                *(f"Chart: {title}" for title in titles[:1]),
                *([f"Axes: {', '.join(axes)}"] if (axes := axis_titles(root)) else []),
                *(line for table in below(root, "table") for line in walk.table(table))])

    def table(self, table: Any) -> Iterator[str]:
        """The lines of a table, and of those in its cells below it."""
        room = self.copies.room
        outer, self.inner = self.inner, []
        for number, texts in enumerate(spread(self.rows(table), self.copies)):
            while texts and not texts[-1]:
                texts.pop()
            if texts:
                yield row_text(texts)
                if not number:
                    yield rule(len(texts))
        if room >= 0 > self.copies.room:
            self.reading.lacks("merged", self.place)
        inner, self.inner = self.inner, outer
        for each in inner:
            yield ""
            yield from self.table(each)

    def rows(self, table: Any) -> Iterator[list[Cell]]:
        for row in rows_of(table):
            cells = [cell for each in row for cell in self.cells(each)]
            yield from repeat(cells, self.copied(row, "rows", len(cells)) if filled(cells) else 1)

    def copied(self, element: Any, name: str, cells: int = 1) -> int:
        """How often a row or cell with a text stands there, as far as there is room for copies."""
        count = repeats(element, f"number-{name}-repeated", ROWS)
        return count if self.copies.take((count - 1) * cells) else 1

    def cells(self, cell: Any) -> list[Cell]:
        if local(cell) != "table-cell":
            return []
        inner = [each for each in cell if local(each) == "table"]
        self.inner += inner
        texts = [*self.blocks([each for each in cell if each not in inner]), *[INNER_TABLE] * len(inner)]
        text = " ".join(filter(None, texts)).strip()
        span = Cell(text, repeats(cell, "number-columns-spanned"), repeats(cell, "number-rows-spanned"))
        return [span] * self.copied(cell, "columns")

    # sheets

    def is_hidden(self, table: Any) -> bool:
        """Is a sheet hidden? Then it is noted."""
        style = self.styles.get(attribute(table, "style-name"))
        shown = None if style is None else first(style, "table-properties")
        if shown is None or attribute(shown, "display") != "false":
            return False
        self.reading.lacks("sheet", attribute(table, "name"))
        return True

    def sheet(self, table: Any) -> Iterator[str]:
        """The lines of a sheet: its rows with a value, then what stands beside its cells."""
        self.place = attribute(table, "name")
        self.copies = Copies()
        yield f"# {self.place}"
        beside: list[str] = []
        merged = Merges()
        number = 1
        room = self.reading.room
        for row in rows_of(table):
            count = repeats(row, "number-rows-repeated", ROWS)
            texts = self.sheet_row(row, number, merged, beside)
            if texts:
                for copy in range(self.copied(row, "rows", len(texts))):
                    together = {**texts}
                    merged.repeat(number + copy, together, self.copies)
                    line = sparse_row(together)
                    room -= len(line) + 1
                    yield line
            number += count
            if room < 0 or self.reading.is_late:
                self.reading.place = f"row {number - 1:,} in the sheet {self.place}"
                return
        if self.copies.room < 0:
            self.reading.lacks("merged", self.place)
        for shapes in table:
            if local(shapes) == "shapes":
                beside += self.blocks(shapes)
        yield from beside
        yield from self.sheet_margins(table)

    def sheet_row(self, row: Any, number: int, merged: Merges, beside: list[str]) -> dict[int, str]:
        """The texts of a row by their columns. Its merged cells are added to `merged`, and what does not
        stand in a cell to `beside`."""
        texts: dict[int, str] = {}
        column = 0
        for cell in row:
            if local(cell) not in ("table-cell", "covered-table-cell"):
                continue
            name = f"{column_name(column)}{number}"
            text = self.sheet_cell(cell, name, beside) if len(cell) or cell.attrib else ""
            copies = repeats(cell, "number-columns-repeated", COLUMNS)
            if text and column < COLUMNS:
                copied = copies if self.copies.take(copies - 1) else 1
                texts |= dict.fromkeys(range(column, min(column + copied, COLUMNS)), text)
                columns, rows = repeats(cell, "number-columns-spanned"), repeats(cell, "number-rows-spanned")
                if columns > 1 or rows > 1:
                    merged.add(Merged(number, column, number + rows - 1, column + columns - 1))
            column += copies
        return texts

    def sheet_cell(self, cell: Any, name: str, beside: list[str]) -> str:
        texts = []
        for each in cell:
            if local(each) in ("p", "h"):
                texts.append(self.line(each).strip())
                for frame in outermost(each, "frame", "custom-shape"):
                    beside += self.frame(frame)
            elif local(each) == "annotation":
                beside.append(f"Comment on {name}: {self.remark(each)}")
            elif local(each) in ("list", "table"):
                texts += self.blocks([each])
            else:
                beside += self.blocks([each])
        text = " ".join(filter(None, texts)) or next(filter(None, (
            attribute(cell, value) for value in VALUES)), "")
        formula = attribute(cell, "formula")
        if not text and formula and not attribute(cell, "value-type"):
            self.reading.lacks("formula", f"{self.place}!{name}")
            return "=" + formula.rpartition(":=")[2].removeprefix("=")
        return text

    def sheet_margins(self, table: Any) -> Iterator[str]:
        """The header and footer of the pages on which a sheet is printed."""
        style = self.styles.get(attribute(table, "style-name"))
        page = "Default" if style is None else attribute(style, "master-page-name") or "Default"
        styles = self.archive.xml("styles.xml")
        for master in () if styles is None else below(styles, "master-page"):
            if attribute(master, "name") != page:
                continue
            for kind in ("header", "footer"):
                for text in self.margins_in(master, kind):
                    if text not in self.written_margins:
                        self.written_margins.add(text)
                        yield text

    # headers and footers

    def margins(self, kind: str) -> list[str]:
        """The headers, or footers, of all kinds of pages."""
        styles = self.archive.xml("styles.xml")
        return [] if styles is None else self.margins_in(styles, kind)

    def margins_in(self, element: Any, kind: str) -> list[str]:
        texts: dict[str, None] = {}
        for each in below(element, kind, f"{kind}-first", f"{kind}-left"):
            if attribute(each, "display") == "false":
                continue
            for field in [*below(each, *FIELDS)]:
                field.text = ""  # its value is another one on each page
            blocks = [*self.blocks(each)]
            if text := ("\n\n" if any("\n" in block for block in blocks) else " ").join(blocks).strip():
                texts[f"{kind.capitalize()}: {text}"] = None
        return [*texts]


def rows_of(table: Any) -> Iterator[Any]:
    """The rows of a table, without those of tables in it."""
    for row in below(table, "table-row"):
        if next(row.iterancestors("{*}table")) is table:
            yield row


def filled(cells: list[Cell]) -> bool:
    return any(cell.text for cell in cells)


def repeats(element: Any, name: str, most: int = SPAN) -> int:
    return number_in(attribute(element, name), most)


def axis_titles(chart: Any) -> list[str]:
    titles = (first(axis, "title") for axis in below(chart, "axis"))
    return [" ".join("".join(title.itertext()).split()) for title in titles if title is not None]


def numbered_in(root: Any) -> dict[tuple[str, int], str]:
    """The styles of lists whose items have numbers at a level, and the first of these numbers."""
    found = {}
    for style in () if root is None else below(root, "list-style"):
        for level in below(style, "list-level-style-number"):
            if attribute(level, "num-format"):
                place = attribute(style, "name"), number_in(attribute(level, "level"), 10)
                found[place] = attribute(level, "start-value") or "1"
    return found


def heights_in(root: Any) -> dict[str, int]:
    """Which styles of text are raised (1) or lowered (-1)."""
    heights = {}
    for style in below(root, "style"):
        for properties in below(style, "text-properties"):
            position = attribute(properties, "text-position").split(" ")[0]
            if position and position not in ("0%", "0"):
                heights[attribute(style, "name")] = -1 if position.startswith(("sub", "-")) else 1
    return heights


def form_values(forms: Any) -> Iterator[str]:
    """The fields of a form, with what was put into them."""
    for each in forms.iter("{*}*"):
        name = attribute(each, "label") or attribute(each, "name")
        value = attribute(each, "current-value") or attribute(each, "value")
        if local(each) in ("checkbox", "radio"):
            state = attribute(each, "current-state") or attribute(each, "state")
            yield f"[{'x' if state in ('checked', 'true') else ' '}] {name}"
        elif value and local(each) not in ("property", "list-property", "list-value", "button", "hidden"):
            yield f"{name}: {value}"
