"""XLSX: the cells of each sheet in rows, with what stands beside them: comments, charts, texts in drawings,
headers and footers.

The cells are read from the XML itself. What a sheet says of its own size is not believed, merged cells are
known, and a formula is seen beside its result, which openpyxl's fast reader does not offer. openpyxl knows
the formats of dates, and what shared formulas mean."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from chatlm.front.documents import scripts
from chatlm.front.documents.archives import READS_XML, Archive, attribute, below, first, local
from chatlm.front.documents.charts import drawn
from chatlm.front.documents.document import Document, Reading, library
from chatlm.front.documents.slides import text_of_shape
from chatlm.front.documents.tables import Copies, Merged, Merges, sparse_row

COLUMNS = 16_384       # of a sheet; so many there are
MARGIN_BYTES = 20_000  # of all headers and footers of a sheet
MERGED = re.compile(rb"""<(?:\w+:)?mergeCell\s[^<>]*?ref\s*=\s*["']([A-Z]+)(\d+):([A-Z]+)(\d+)["']""")
ROW_TAGS = re.compile(rb"<(?:\w+:)?row[\s/>]")
PLACE = re.compile(r"([A-Z]{1,3})(\d+)")
# the codes of headers and footers: fonts, colours, places, fields
MARGIN_CODES = re.compile(r'&(?:"[^"]*"|K[0-9A-F]{6}|\d{1,3}|[A-Z])')


class Book:
    """What all sheets of a file share."""

    def __init__(self, archive: Archive, root: Any, part: str):
        self.archive = archive
        dates = library("openpyxl.utils.datetime", "XLSX")
        properties = first(root, "workbookPr")
        since_1904 = properties is not None and properties.get("date1904") in ("1", "true")
        self.epoch = dates.CALENDAR_MAC_1904 if since_1904 else dates.CALENDAR_WINDOWS_1900
        calculation = first(root, "calcPr")
        # its writer computes nothing, and stores 0 as the result of each formula
        self.uncomputed = calculation is not None and calculation.get("fullCalcOnLoad") in ("1", "true")
        kinds = {each.kind: each.part for each in archive.related(part)}
        strings = archive.xml(kinds.get("sharedStrings", ""))
        self.strings = [] if strings is None else [rich_text(each) for each in below(strings, "si")]
        self.formats = formats_in(archive.xml(kinds.get("styles", "")))

    def value(self, cell: Any) -> str:
        """The text of a cell."""
        kind = cell.get("t", "n")
        if kind == "inlineStr":
            inner = first(cell, "is")
            return "" if inner is None else rich_text(inner)
        stored = first(cell, "v")
        text = "" if stored is None else stored.text or ""
        if not text:
            return ""
        if kind == "s":
            place = int(text)
            return self.strings[place] if 0 <= place < len(self.strings) else ""
        if kind == "b":
            return "True" if text.strip() in ("1", "true") else "False"
        return self.number(text, cell.get("s", "0")) if kind == "n" else text

    def number(self, text: str, style: str) -> str:
        """A number as it was typed: with 15 digits, as a date, in percent, with its leading zeros."""
        number = int(style) if style.isdigit() else 0
        shown_as = self.formats[number] if number < len(self.formats) else "General"
        try:
            number = float(text)
        except ValueError:
            return text
        kind = kind_of(shown_as)
        if kind == "date":
            return self.date(number, shown_as) or text
        if kind == "percent":
            return f"{100 * number:.15g}%"
        whole = re.fullmatch(r"-?\d{1,17}", text)
        if whole and kind == "digits":
            return text.zfill(len(shown_as))
        return text if whole else f"{number:.15g}"

    def date(self, number: float, shown_as: str) -> str:
        """A date or time; "" if it is none that there is."""
        dates = library("openpyxl.utils.datetime", "XLSX")
        formats = library("openpyxl.styles.numbers", "XLSX")
        try:
            moment = dates.from_excel(number, self.epoch, timedelta=formats.is_timedelta_format(shown_as))
        except (ValueError, OverflowError):
            return ""
        return str(moment).removesuffix(" 00:00:00")


def read_xlsx(data: bytes, reading: Reading) -> Document:
    archive = Archive(data)
    part = next((each.part for each in archive.related() if each.kind == "officeDocument"), "xl/workbook.xml")
    root = archive.xml(part)
    if root is None:
        raise ValueError("it has no list of sheets")
    book = Book(archive, root, part)
    targets = {each.id: each for each in archive.related(part)}
    sheets = []
    for each in below(root, "sheet"):
        name = each.get("name", "")
        target = targets.get(attribute(each, "id"))
        if each.get("state", "visible") != "visible":
            reading.lacks("sheet", name)
        elif target and archive.find(target.part):
            sheets.append(Sheet(book, name, target.part, reading))
    return Document((sheet.text() for sheet in sheets), len(sheets), "sheet")


def rich_text(element: Any) -> str:
    """The text of a cell whose parts may be raised or lowered, without the sounds of its letters."""
    texts = []
    runs = [each for each in element if local(each) in ("r", "t")]
    for place, each in enumerate(runs):
        text = text_in(each)
        height = first(each, "rPr", "vertAlign")
        kind = "" if height is None else height.get("val", "")
        after = text_in(runs[place + 1]) if place + 1 < len(runs) else ""
        if kind == "superscript":
            text = scripts.raised(text, after)
        elif kind == "subscript":
            text = scripts.lowered(text, texts[-1] if texts else "", after)
        texts.append(text)
    return "".join(texts)


def text_in(run: Any) -> str:
    element = run if local(run) == "t" else first(run, "t")
    return "" if element is None else element.text or ""


def formats_in(styles: Any) -> list[str]:
    """The number format of each style."""
    if styles is None:
        return []
    usual = library("openpyxl.styles.numbers", "XLSX").BUILTIN_FORMATS
    own = {each.get("numFmtId"): each.get("formatCode", "") for each in below(styles, "numFmt")}
    cells = first(styles, "cellXfs")
    numbers = [each.get("numFmtId", "0") for each in cells] if cells is not None else []
    return [own.get(number) or usual.get(int(number) if number.isdigit() else 0, "General")
            for number in numbers]


@cache
def kind_of(shown_as: str) -> str:
    """What a number format makes of a number: a date, percent, or so many digits; "" of any other."""
    if library("openpyxl.styles.numbers", "XLSX").is_date_format(shown_as):
        return "date"
    if "%" in re.sub(r'"[^"]*"|\\.', "", shown_as.partition(";")[0]):
        return "percent"
    return "digits" if re.fullmatch("0{2,18}", shown_as) else ""


class Sheet:
    """One sheet of a file."""

    def __init__(self, book: Book, name: str, part: str, reading: Reading):
        self.book = book
        self.name = name
        self.part = part
        self.reading = reading
        self.shared: dict[str, tuple[str, str]] = {}  # number of a shared formula -> its text and cell
        self.copies = Copies()

    def text(self) -> str:
        archive = self.book.archive
        data = archive.read(self.part)
        lines = [f"# {self.name}"]
        room = self.reading.room
        rows = 0
        for rows, line in enumerate(self.rows(data), 1):
            if line:
                lines.append(line)
                room -= len(line) + 1
            if room < 0 or self.reading.is_late:
                of_all = sum(1 for _ in ROW_TAGS.finditer(data))
                self.reading.place = f"row {rows:,} of {of_all:,} in the sheet {self.name}"
                return "\n".join(lines)
        if self.copies.room < 0:
            self.reading.lacks("merged", self.name)
        return "\n".join([*lines, *self.beside(data)])

    def rows(self, data: bytes) -> Iterator[str]:
        """The line of each row; "" of an empty one."""
        etree = library("lxml.etree", "XLSX")
        merged = Merges(map(merged_in, MERGED.finditer(data)))
        number = 0
        for _, row in etree.iterparse(io.BytesIO(data), tag="{*}row", **READS_XML):
            at = row.get("r", "")
            number = int(at) if at.isascii() and at.isdigit() and len(at) < 9 else number + 1
            texts = self.cells(row) if any(map(len, row)) else {}
            if texts:
                merged.repeat(number, texts, self.copies)
            row.clear()
            while row.getprevious() is not None:  # else all rows would be kept
                del row.getparent()[0]
            yield sparse_row(texts) if texts else ""

    def cells(self, row: Any) -> dict[int, str]:
        """The texts of a row's cells by their columns."""
        texts: dict[int, str] = {}
        column = -1
        for cell in row:
            place = PLACE.fullmatch(cell.get("r", ""))
            column = column_of(place[1]) if place else column + 1
            if not len(cell):
                continue  # it has a style alone
            text = self.book.value(cell)
            formula = first(cell, "f")
            if formula is not None and (not text or text == "0" and self.book.uncomputed):
                text = self.formula(formula, cell.get("r", "")) or text
            if text and column < COLUMNS:
                texts[column] = text
        return texts

    def formula(self, formula: Any, place: str) -> str:
        """A formula that has no result."""
        text = formula.text or ""
        number = formula.get("si", "")
        if formula.get("t") == "shared" and text:
            self.shared[number] = text, place
        elif number in self.shared:
            translator = library("openpyxl.formula.translate", "XLSX").Translator
            text, origin = self.shared[number]
            text = translator(f"={text}", origin).translate_formula(place).removeprefix("=")
        if text:
            self.reading.lacks("formula", f"{self.name}!{place}")
        return f"={text}" if text else ""

    def beside(self, data: bytes) -> Iterator[str]:
        """What a sheet has beside its cells."""
        archive = self.book.archive
        for place, text in comments_of(archive, self.part).items():
            yield f"Comment on {place}: {text}"
        for relation in archive.related(self.part):
            root = archive.xml(relation.part) if relation.kind == "drawing" else None
            if root is None:
                continue
            yield from filter(None, map(text_of_shape, below(root, "sp")))
            yield from drawn(archive, relation.part, root, self.reading, f"sheet {self.name}")
        yield from margins(data)


def merged_in(found: re.Match[bytes]) -> Merged:
    first_column, first_row, last_column, last_row = (each.decode() for each in found.groups())
    return Merged(int(first_row[:8]), column_of(first_column), int(last_row[:8]),
                  min(column_of(last_column), COLUMNS - 1))


def column_of(letters: str) -> int:
    """The number of a column, from 0."""
    number = 0
    for letter in letters[:4]:
        number = 26 * number + ord(letter) - 64
    return number - 1


def comments_of(archive: Archive, part: str) -> dict[str, str]:
    """The comments on cells by their places. Those in threads win: older programs find a notice there."""
    found: dict[str, str] = {}
    for root in archive.of_kind(part, "comments"):
        for comment in below(root, "comment"):
            found[comment.get("ref", "")] = " ".join("".join(
                text.text or "" for text in below(comment, "t")).split())
    threads: dict[str, list[str]] = {}
    for root in archive.of_kind(part, "threadedComment"):
        for comment in below(root, "threadedComment"):
            text = " ".join("".join(each.text or "" for each in below(comment, "text")).split())
            threads.setdefault(comment.get("ref", ""), []).append(text)
    return found | {place: " / ".join(texts) for place, texts in threads.items()}


def margins(data: bytes) -> list[str]:
    """The header and footer of a sheet's pages."""
    end = data.rfind(b"headerFooter>")  # closes what has them
    lines = []
    for kind in ("Header", "Footer"):
        pattern = rb"<(?:\w+:)?(?:odd|even|first)%s[^<>]*>([^<]*)<" % kind.encode()
        found = re.findall(pattern, data[max(0, end - MARGIN_BYTES):max(0, end)])
        for text in dict.fromkeys(each.decode("utf-8", "replace") for each in found):
            plain = MARGIN_CODES.sub(" ", unescaped(text)).replace("&&", "&")
            if plain.strip():
                lines.append(f"{kind}: {' '.join(plain.split())}")
    return lines


def unescaped(text: str) -> str:
    for name, letter in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&apos;", "'"), ("&amp;", "&")):
        text = text.replace(name, letter)
    return text
