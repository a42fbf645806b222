"""PPTX: the texts of each slide in their order, with tables, charts, diagrams, equations, notes, comments."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any

from chatlm.front.documents import scripts
from chatlm.front.documents.archives import Archive, below, first, local
from chatlm.front.documents.charts import drawn
from chatlm.front.documents.document import Document, Reading, library
from chatlm.front.documents.equations import line_of
from chatlm.front.documents.tables import Cell, Copies, number_in, table_lines

LARGEST_SPAN = 1000  # columns or rows that a cell may take
COMMENTS = "comments", "comment"  # the kinds of relations to a slide's comments


def read_pptx(data: bytes, reading: Reading) -> Document:
    archive = Archive(data)
    presentation = library("pptx", "PPTX").Presentation(io.BytesIO(transitional(archive, data)))
    slides = presentation.slides
    copies = Copies()

    def text_of(number: int, slide: Any) -> str:
        part = str(slide.part.partname).lstrip("/")
        texts = Slide(archive, part, reading, copies, f"slide {number}").texts(slide.element)
        return "\n\n".join([*texts, *notes_of(slide), *comments_of(archive, part)])

    texts = (text_of(number, slide) for number, slide in enumerate(slides, 1))
    return Document(texts, len(slides), "slide", True)


def transitional(archive: Archive, data: bytes) -> bytes:
    """The file with ECMA's names in place of ISO's strict ones, which the library does not read."""
    if b"purl.oclc.org" not in archive.zip.read(archive.find("_rels/.rels")):
        return data
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as written:
        for name in archive.names:
            written.writestr(name, archive.read(name))
    return file.getvalue()


class Slide:
    """The shapes of a slide."""

    def __init__(self, archive: Archive, part: str, reading: Reading, copies: Copies, place: str):
        self.archive = archive
        self.part = part
        self.reading = reading
        self.copies = copies
        self.place = place

    def texts(self, element: Any) -> Iterator[str]:
        """The texts of all shapes within an element, each in lines."""
        for shape in element:
            name = local(shape)
            if name == "AlternateContent":
                yield from self.texts(chosen(shape))
            elif name in ("sp", "cxnSp"):
                yield from filter(None, [text_of_shape(shape)])
            elif name in ("graphicFrame", "pic"):
                yield from self.graphics(shape)
            elif name in ("cSld", "spTree", "grpSp", "Choice", "Fallback", "contentPart"):
                yield from self.texts(shape)

    def graphics(self, frame: Any) -> Iterator[str]:
        for table in below(frame, "tbl"):
            room = self.copies.room
            yield "\n".join(table_lines(map(cells_of, below(table, "tr")), self.copies))
            if room >= 0 > self.copies.room:
                self.reading.lacks("merged", self.place)
        for _ in below(frame, "oleObj"):
            self.reading.lacks("embedded", self.place)
        yield from drawn(self.archive, self.part, frame, self.reading, self.place)


def chosen(alternatives: Any) -> Any:
    """The alternative with the most text: newer programs' or older ones'."""
    return max(alternatives, key=lambda each: len("".join(each.itertext())), default=alternatives)


def text_of_shape(shape: Any) -> str:
    return "\n".join(paragraphs_of(shape)).strip()


def paragraphs_of(element: Any) -> list[str]:
    return [text_of_paragraph(each) for each in below(element, "p")]


def text_of_paragraph(paragraph: Any) -> str:
    runs: list[tuple[str, int]] = []  # text, and how far it is raised
    for each in paragraph:
        name = local(each)
        if name == "AlternateContent":
            each = chosen(each)
        if name == "br":
            runs.append(("\n", 0))
        elif name in ("r", "fld"):
            properties = first(each, "rPr")
            height = "" if properties is None else properties.get("baseline", "")
            text = "".join(text.text or "" for text in each if local(text) == "t")
            runs.append((text, sign_of(height)))
        elif name not in ("pPr", "endParaRPr"):
            equations = [equation for equation in below(each, "oMath")]
            runs += [(f" {line_of(equation)} ", 0) for equation in equations]
    return with_scripts(runs)


def sign_of(height: str) -> int:
    number = height.rstrip("%")
    if number in ("", "0"):
        return 0
    return -1 if number.startswith("-") else 1


def with_scripts(runs: list[tuple[str, int]]) -> str:
    """The text of runs, each of which is raised (1), lowered (-1) or neither."""
    texts = []
    runs = [("".join(text for text, _ in group), height)
            for height, group in groupby(runs, key=itemgetter(1))]
    for place, (text, height) in enumerate(runs):
        before = runs[place - 1][0] if place else ""
        after = runs[place + 1][0] if place + 1 < len(runs) else ""
        if height > 0:
            text = scripts.raised(text, after)
        elif height < 0:
            text = scripts.lowered(text, before, after)
        texts.append(text)
    return "".join(texts)


def cells_of(row: Any) -> list[Cell]:
    """The cells of a table's row, without those that a merged one covers."""
    cells = []
    for cell in row:
        if local(cell) == "tc" and not {"hMerge", "vMerge"} & {*cell.keys()}:
            text = "\n".join(paragraphs_of(cell))
            columns, rows = (number_in(cell.get(name, "1"), LARGEST_SPAN) for name in ("gridSpan", "rowSpan"))
            cells.append(Cell(text, columns, rows))
    return cells


def notes_of(slide: Any) -> list[str]:
    if not slide.has_notes_slide or slide.notes_slide.notes_text_frame is None:
        return []
    text = "\n".join(paragraphs_of(slide.notes_slide.notes_text_frame._txBody)).strip()
    return [f"Notes: {text}"] if text else []


def comments_of(archive: Archive, part: str) -> list[str]:
    """The comments on a slide, as old and new programs keep them."""
    texts = []
    for kind in COMMENTS:
        for root in archive.of_kind(part, kind):
            for comment in below(root, "cm", "reply"):
                own = [each for each in comment if local(each) in ("text", "txBody")]
                text = " ".join(" ".join("".join(each.itertext()).split()) for each in own)
                if text:
                    texts.append(f"Comment: {text}")
    return texts
