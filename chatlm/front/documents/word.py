"""DOCX becomes Markdown. mammoth turns it into HTML; what it does not read is put before it in forms that it
does: headers and footers, equations, charts, diagrams, fields, skipped cells."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from typing import Any

from chatlm.front.documents.archives import Archive, attribute, below, first, local
from chatlm.front.documents.charts import drawn
from chatlm.front.documents.document import Document, Reading, library
from chatlm.front.documents.equations import line_of
from chatlm.front.documents.markup import to_markdown

WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
PREFIX = "{" + WORD + "}"
# elements that mammoth skips with all that is in them; as w:ins it reads them
TRANSPARENT = "fldSimple", "customXml", "dir", "bdo", "moveTo", "ruby", "rt", "rubyBase"
STYLES = "comment-reference => sup"  # has mammoth write the comments below the text


def read_docx(data: bytes, reading: Reading) -> Document:
    mammoth = library("mammoth", "DOCX")
    archive = Archive(data)
    main = main_part(archive)
    root = archive.xml(main)
    if root is None or first(root, "body") is None:
        raise ValueError("it has no text part")
    prepare(archive, main, root, reading)
    html = mammoth.convert_to_html(io.BytesIO(packed(archive, main, root)), style_map=STYLES,
                                   convert_image=lambda image: []).value
    return Document([to_markdown(html, reading)])


def main_part(archive: Archive) -> str:
    names = [each.part for each in archive.related() if each.kind == "officeDocument"]
    return next(filter(archive.find, names), "word/document.xml")


def packed(archive: Archive, main: str, root: Any) -> bytes:
    """The file for mammoth: its XML, with another main part, and without pictures."""
    etree = library("lxml.etree", "DOCX")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as written:
        for name in archive.names:
            if name.lower() == main.lower():
                written.writestr(name, etree.tostring(root))
            elif name.lower().endswith((".xml", ".rels")):
                written.writestr(name, archive.read(name))
    return file.getvalue()


def prepare(archive: Archive, main: str, root: Any, reading: Reading):
    """Change the main part so that mammoth finds all that a reader of the document sees."""
    body = first(root, "body")
    for kind, place in (("header", 0), ("footer", None)):
        found = margin_texts(archive, main, root, kind)
        end = len(body) if place is None else place
        body[end:end] = found
    write_equations(root)
    write_drawings(archive, main, root, reading)
    for drop_down in below(root, "ddList"):
        write_choice(drop_down)
    for element in [*below(root, *TRANSPARENT)]:
        if element.tag.startswith(PREFIX):
            element.tag = PREFIX + "ins"
    for row in [*below(root, "tr")]:
        fill_skipped(row)
    for _ in below(root, "altChunk", "OLEObject"):
        reading.lacks("embedded")


def margin_texts(archive: Archive, main: str, root: Any, kind: str) -> list[Any]:
    """The paragraphs and tables of all headers, or footers, that the document uses and that have text."""
    parts = {each.id: each.part for each in archive.related(main) if each.kind == kind}
    used = [attribute(each, "id") for each in below(root, f"{kind}Reference")]
    texts: dict[str, list[Any]] = {}
    for part in dict.fromkeys(parts[each] for each in used if each in parts):
        margin = archive.xml(part)
        if margin is None:
            continue
        write_equations(margin)
        for each in [*below(margin, "blip", "imagedata", "headerReference", "footerReference")]:
            each.getparent().remove(each)
        for link in below(margin, "hyperlink"):
            link.attrib.clear()  # it names a relation of this part
        text = "".join(each.text or "" for each in below(margin, "t"))
        if text.strip() and text not in texts:
            title = paragraph(f"{kind.capitalize()}:")
            texts[text] = [title, *(child for child in margin if local(child) in ("p", "tbl", "sdt"))]
    return [each for elements in texts.values() for each in elements]


def paragraph(text: str) -> Any:
    etree = library("lxml.etree", "DOCX")
    element = etree.Element(PREFIX + "p")
    element.append(run(text))
    return element


def run(text: str) -> Any:
    etree = library("lxml.etree", "DOCX")
    element = etree.Element(PREFIX + "r")
    etree.SubElement(element, PREFIX + "t").text = text
    return element


def replace(old: Any, new: Any):
    new.tail = old.tail
    old.getparent().replace(old, new)


def write_equations(root: Any):
    """Put equations into lines."""
    for equation in [*below(root, "oMath")]:
        if not any(local(above) == "oMath" for above in equation.iterancestors()):
            replace(equation, run(f" {line_of(equation)} "))
    for group in [*below(root, "oMathPara")]:
        group.tag = PREFIX + "ins"


def write_drawings(archive: Archive, main: str, root: Any, reading: Reading):
    """Put the numbers of charts and the texts of diagrams behind the paragraphs that they stand in."""
    for drawing in [*below(root, "drawing", "pict")]:
        texts = drawn(archive, main, drawing, reading, "")
        holder = next((each for each in drawing.iterancestors() if local(each) == "p"), None)
        if holder is None or not texts:
            continue
        place = holder.getparent().index(holder) + 1
        holder.getparent()[place:place] = [each for text in texts for each in elements_of(text)]


def elements_of(text: str) -> Iterator[Any]:
    """The lines of a chart or diagram as paragraphs, and their tables as tables."""
    etree = library("lxml.etree", "DOCX")
    table = None
    for line in text.split("\n"):
        if not line.startswith("| "):
            table = None
            yield paragraph(line)
        elif not line.startswith("| ---"):
            if table is None:
                table = etree.Element(PREFIX + "tbl")
                yield table
            row = etree.SubElement(table, PREFIX + "tr")
            for cell in line[2:-2].split(" | "):
                etree.SubElement(row, PREFIX + "tc").append(paragraph(cell.replace("\\|", "|")))


def write_choice(drop_down: Any):
    """Put the chosen entry of a drop-down list of a form behind its field."""
    entries = [attribute(each, "val") for each in below(drop_down, "listEntry")]
    result = first(drop_down, "result")
    chosen = attribute(result, "val") if result is not None else "0"
    holder = next((each for each in drop_down.iterancestors() if local(each) == "r"), None)
    if holder is not None and chosen.isdigit() and int(chosen) < len(entries):
        holder.addnext(run(entries[int(chosen)]))


def fill_skipped(row: Any):
    """Put empty cells where a row of a table skips columns."""
    etree = library("lxml.etree", "DOCX")
    properties = first(row, "trPr")
    for name in ("gridBefore", "gridAfter"):
        skipped = None if properties is None else first(properties, name)
        count = "" if skipped is None else attribute(skipped, "val")
        if not count.isdigit() or not 0 < int(count) < 64:
            continue
        cell = etree.Element(PREFIX + "tc")
        size = etree.SubElement(cell, PREFIX + "tcPr")
        etree.SubElement(size, PREFIX + "gridSpan").set(PREFIX + "val", count)
        etree.SubElement(cell, PREFIX + "p")
        if name == "gridAfter":
            row.append(cell)
        else:
            row.insert(row.index(properties) + 1, cell)
