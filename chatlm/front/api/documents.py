"""Extracts the text of documents: PDF, DOCX, PPTX, XLSX, EPUB, HTML. Runs only in a sandbox, each document in
a process of its own.

Libraries read the formats (the extra `documents`): pypdfium2 (PDFium, the fastest one that is free for all
uses), mammoth for DOCX, python-pptx, openpyxl, and markdownify for HTML. EPUB and DOCX are turned into HTML
first."""

from __future__ import annotations

import io
import posixpath
import re
import time
import urllib.parse
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple
from xml.etree import ElementTree

from chatlm.common.config import LIMITS
from chatlm.common.errors import ConfigError, RequestError, error_text, require_library, shown
from chatlm.common.invocation import pip_command
from chatlm.common.messages.protocol import SandboxResult

UNPACKED_BYTES = 256 << 20  # an archive may hold at most this much,
MEMBERS = 10_000            # in at most so many files
ROWS = 100_000              # this many rows of a sheet are read,
ROW_CELLS = 256             # and this many cells of a row
PACKAGES = "markdownify", "mammoth", "openpyxl", "pypdfium2", "python-pptx"  # the extra `documents`
FORMATS = "PDF, DOCX, PPTX, XLSX, EPUB and HTML"


class Document(NamedTuple):
    """What a format's reader returns."""

    parts: Iterable[str]      # the texts of its pages, read one by one, as far as needed
    pages: int | None = None  # how many pages, slides, sheets or chapters; None: the format has none
    noun: str = "part"        # what one of them is called
    marked: bool = False      # is each text put under the number of its page?
    notes: str = ""           # what was left out


def refusal(message: str, code: str = "unreadable_document") -> RequestError:
    return RequestError(message, code=code)


def library(name: str, kind: str) -> Any:
    try:
        return require_library(name, f"reading {kind} files")
    except ConfigError as error:
        advice = f"install all that documents need with: {pip_command(*PACKAGES)}"
        raise RequestError(f"{str(error).partition(';')[0]}; {advice}", status=501,
                           code="not_installed") from None


# PDF

SOFT_HYPHENS = "[\x02\xad\ufffe]\r?\n?"


def read_pdf(data: bytes) -> Document:
    pdfium = library("pypdfium2", "PDF")
    try:
        pdf = pdfium.PdfDocument(data)
        pages = len(pdf)
    except pdfium.PdfiumError as error:
        if "password" in str(error).lower():
            raise refusal("the PDF is encrypted: save it without its password", "encrypted") from None
        raise refusal(f"the PDF is damaged ({str(error)[:100]})") from None

    def text_of(number: int) -> str:
        page = pdf[number]
        try:
            text = page.get_textpage()
            try:
                whole = re.sub(SOFT_HYPHENS, "", text.get_text_bounded())
                return whole.replace("\r\n", "\n")
            finally:
                text.close()
        except pdfium.PdfiumError:
            return ""
        finally:
            page.close()

    return Document(map(text_of, range(pages)), pages, "page", True)


# archives

def open_archive(data: bytes) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OverflowError, OSError, NotImplementedError) as error:
        raise refusal(f"the file is damaged: {error_text(error)}") from None
    if len(members) > MEMBERS or sum(member.file_size for member in members) > UNPACKED_BYTES:
        raise refusal(f"unpacked, the file has more than {UNPACKED_BYTES >> 20} MiB or {MEMBERS:,} parts",
                      "too_complex")
    if any(member.flag_bits & 1 for member in members):
        raise refusal("the file is encrypted: save it without its password", "encrypted")
    return archive


def read_docx(data: bytes) -> Document:
    mammoth = library("mammoth", "DOCX")
    html = mammoth.convert_to_html(io.BytesIO(data), convert_image=lambda image: []).value
    return Document([to_markdown(html)])


def read_pptx(data: bytes) -> Document:
    slides = library("pptx", "PPTX").Presentation(io.BytesIO(data)).slides
    return Document((("\n\n".join(slide_texts(slide))) for slide in slides), len(slides), "slide", True)


def slide_texts(slide: Any) -> Iterator[str]:
    """The texts of a slide's shapes, also of those in groups, and of its notes."""
    waiting = [*reversed(slide.shapes)]
    while waiting:
        shape = waiting.pop()
        if hasattr(shape, "shapes"):
            waiting += reversed(shape.shapes)
        elif getattr(shape, "has_table", False):
            yield "\n".join(table_row(cell.text for cell in row.cells) for row in shape.table.rows)
        elif getattr(shape, "has_text_frame", False) and shape.text_frame.text.strip():
            yield shape.text_frame.text
    if slide.has_notes_slide and slide.notes_slide.notes_text_frame is not None:
        if notes := slide.notes_slide.notes_text_frame.text.strip():
            yield f"Notes: {notes}"


def table_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("\n", " ").replace("|", "\\|").strip() for cell in cells) + " |"


def read_xlsx(data: bytes) -> Document:
    book = library("openpyxl", "XLSX").load_workbook(io.BytesIO(data), read_only=True, data_only=True)
    sheets = [sheet for sheet in book.worksheets if sheet.sheet_state == "visible"]
    hidden = len(book.worksheets) - len(sheets)

    def text_of(sheet: Any) -> str:
        lines = [f"# {sheet.title}"]
        for row in islice(sheet.iter_rows(values_only=True, max_col=ROW_CELLS), ROWS):
            cells = ["" if value is None else str(value) for value in row]
            while cells and not cells[-1]:
                cells.pop()
            if cells:
                lines.append(table_row(cells))
        return "\n".join(lines)

    return Document(map(text_of, sheets), len(sheets), "sheet",
                    notes="hidden sheets are left out" if hidden else "")


def read_epub(data: bytes) -> Document:
    archive = open_archive(data)
    names = set(archive.namelist())
    container = ElementTree.fromstring(archive.read("META-INF/container.xml"))
    package = next(each.attrib["full-path"] for each in container.iter() if each.tag.endswith("}rootfile"))
    tree = ElementTree.fromstring(archive.read(package))
    folder = posixpath.dirname(package)
    items = {each.attrib["id"]: posixpath.normpath(
        posixpath.join(folder, urllib.parse.unquote(each.attrib["href"])))
        for each in tree.iter() if each.tag.endswith("}item")}
    chapters = [name for each in tree.iter() if each.tag.endswith("}itemref")
                if (name := items.get(each.attrib.get("idref", ""))) in names]
    if "META-INF/encryption.xml" in names:
        locked = {urllib.parse.unquote(each.attrib.get("URI", "")) for each in
                  ElementTree.fromstring(archive.read("META-INF/encryption.xml")).iter()}
        if locked & set(chapters):
            raise refusal("the EPUB is encrypted, as books with a copy protection are", "encrypted")
    return Document((to_markdown(archive.read(name)) for name in chapters), len(chapters), "chapter")


# HTML

def read_html(data: bytes) -> Document:
    return Document([to_markdown(data)])


def to_markdown(html: str | bytes) -> str:
    """HTML as Markdown: headings, lists, tables, code; without links, pictures, scripts and styles."""
    markdownify = library("markdownify", "HTML")
    parse = library("bs4", "HTML").BeautifulSoup
    soup = without_hidden(parse(html, "lxml"))
    whole = without_hidden(parse(html, "html.parser"))
    if len(soup.get_text()) < 0.9 * len(whole.get_text()):  # lxml stops where elements nest 256 times
        soup = whole
    try:
        text = markdownify.MarkdownConverter(strip=["a", "img"], heading_style="ATX").convert_soup(soup)
    except RecursionError:  # thousands of elements within each other
        text = soup.get_text("\n")
    return re.sub(r"\n{3,}", "\n\n", text)


def without_hidden(soup: Any) -> Any:
    """A document without what its reader does not see."""
    for hidden in soup(["script", "style", "noscript", "template", "svg", "head", "title"]):
        hidden.decompose()
    for hidden in soup(string=lambda text: text.__class__.__name__ not in ("NavigableString", "CData")):
        hidden.extract()  # comments, declarations
    return soup


# which reader

OFFICE = {"word/": ("DOCX", read_docx), "ppt/": ("PPTX", read_pptx), "xl/": ("XLSX", read_xlsx)}


HTML_BEGINS = (rb"(?i)(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*"
               rb"<(!doctype html|html|head|body)\b")


def find_reader(data: bytes, name: str) -> tuple[str, Callable[[bytes], Document]]:
    """A file's format, and its reader. The first bytes tell the format; the name only tells HTML from other
    text."""
    if b"%PDF-" in data[:1024]:
        return "PDF", read_pdf
    if data.startswith(b"PK\3\4"):
        names = open_archive(data).namelist()
        if "META-INF/container.xml" in names:
            return "EPUB", read_epub
        for folder, kind in OFFICE.items():
            if "[Content_Types].xml" in names and any(each.startswith(folder) for each in names):
                return kind
    if data.startswith(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"):
        if "EncryptedPackage".encode("utf-16-le") in data:
            raise refusal("the file is encrypted: save it without its password", "encrypted")
        raise refusal("the file is of the old Office formats DOC, XLS and PPT: save it as DOCX, XLSX or PPTX")
    named_html = re.search(r"(?i)\.x?html?$", name) and b"\0" not in data[:4096]
    if named_html or re.match(HTML_BEGINS, data[:4096], re.DOTALL):
        return "HTML", read_html
    raise refusal(f"{shown(name) if name else 'the file'} is of none of the formats that can be read: "
                  f"{FORMATS}", "unknown_format")


def part_of_form(body: bytes, boundary: str) -> tuple[bytes, str]:
    """The first file of a multipart/form-data body, and its name."""
    for part in (b"\r\n" + body).split(b"\r\n--" + boundary.encode())[1:]:
        head, found, data = part.partition(b"\r\n\r\n")
        name = re.search(rb'(?i)filename="((?:[^"\\\r\n]|\\.)*)"', head)
        if found and name:
            return data, name[1].decode("utf-8", "replace")
    raise RequestError("the form has no file: send one, as curl -F file=@report.pdf does", param="file")


class Extracted(NamedTuple):
    text: str
    pages: int | None
    cut: str | None  # what is missing, in words


def extract_text(data: bytes, name: str, cpu_s: float) -> Extracted:
    """The text of a document. Raises RequestError if it has none, or cannot be read."""
    kind, read = find_reader(data, name)
    try:
        document = read(data)
        return join_parts(kind, document, time.process_time() + cpu_s)
    except (RequestError, MemoryError):
        raise
    except Exception as error:  # each library has its own errors for a broken file
        raise refusal(f"the {kind} file is damaged: {error_text(error)[:200]}") from None


def join_parts(kind: str, document: Document, deadline_s: float) -> Extracted:
    """The text of a document's parts, as far as the limit and the deadline (of processor time) allow."""
    texts = []
    empty = []    # numbers of pages without text
    lacking = []  # what is missing, in words
    room = LIMITS.extracted_characters
    number = 0
    of_all = f" of {document.pages:,}" if document.pages else ""
    for number, part in enumerate(document.parts, 1):
        text = clean(part)
        if not text:
            empty.append(number)
            continue
        if document.marked and document.pages != 1:
            text = f"[{document.noun} {number}]\n{text}"
        texts.append(text[:room])
        room -= len(text) + 2
        if room <= 0:
            up_to = f", up to {document.noun} {number:,}{of_all}" if document.pages else ""
            lacking.append(f"only the first {LIMITS.extracted_characters:,} characters{up_to}")
            break
        if time.process_time() > deadline_s and number < (document.pages or 0):
            lacking.append(f"only up to {document.noun} {number:,}{of_all}: the rest takes too long to read")
            break
    if not texts:
        what = f"its {number} {document.noun}s" if number > 1 else "it"
        why = f": {what} may be pictures of text, which this program cannot read" if kind == "PDF" else ""
        raise refusal(f"the {kind} file has no text{why}", "no_text")
    if empty and kind == "PDF":
        which = ", ".join(map(str, empty[:10])) + (" and others" if len(empty) > 10 else "")
        lacking.append(f"no text on page{'s' * (len(empty) > 1)} {which}, which may be pictures")
    if document.notes:
        lacking.append(document.notes)
    return Extracted("\n\n".join(texts), document.pages, "; ".join(lacking) or None)


def clean(text: str) -> str:
    """The text without control characters, lone surrogates and spaces at the ends of lines."""
    text = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "", text.replace("\r", "\n"))
    return re.sub(r"[^\S\n]+$", "", text, flags=re.MULTILINE).strip()


class DocumentTasks:
    """The sandbox's task for documents."""

    def __init__(self, limit_s: float):
        self.soft_s = 0.6 * limit_s  # after this much processor time, the text ends with what has been read

    def prepare(self, name: str, arguments: Sequence):
        """Nothing is shared between documents."""

    def extract(self, name: str, boundary: str, body: bytes) -> SandboxResult:
        data, name = part_of_form(body, boundary) if boundary else (body, name)
        return SandboxResult([*extract_text(bytes(data), name, self.soft_s)])
