"""Extracts the text of documents. Runs only in a sandbox, each document in a process of its own.

Libraries read the formats (the extra `documents`): pypdfium2 (PDFium, the fastest one that is free for all
uses), mammoth for DOCX, python-pptx, openpyxl, and markdownify for HTML. EPUB and DOCX are turned into HTML
first. What the libraries lose is read from the XML of a file."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError, error_text, shown
from chatlm.common.messages.protocol import SandboxResult
from chatlm.front.documents.archives import Archive
from chatlm.front.documents.book import read_epub
from chatlm.front.documents.document import Document, Reading, refusal
from chatlm.front.documents.forms import part_of_form
from chatlm.front.documents.markup import read_html
from chatlm.front.documents.opendocument import read_opendocument
from chatlm.front.documents.portable import read_pdf
from chatlm.front.documents.sheets import read_xlsx
from chatlm.front.documents.slides import read_pptx
from chatlm.front.documents.texts import html_of_bytes, is_html, is_pdf, plain_text, utf16_of
from chatlm.front.documents.word import read_docx

FORMATS = "PDF, DOCX, PPTX, XLSX, ODT, ODS, ODP, EPUB, HTML and text (UTF-8, UTF-16 or Windows-1252)"


class Reader(NamedTuple):
    """What reads a format."""

    kind: str
    read: Callable[[bytes, Reading], Document]


PDF = Reader("PDF", read_pdf)
EPUB = Reader("EPUB", read_epub)
HTML = Reader("HTML", read_html)
OPEN_DOCUMENT = Reader("OpenDocument", read_opendocument)
OFFICE = {"word/": Reader("DOCX", read_docx), "ppt/": Reader("PPTX", read_pptx),
          "xl/": Reader("XLSX", read_xlsx)}
OLD_OFFICE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"


class Extracted(NamedTuple):
    text: str
    pages: int | None
    cut: str | None  # what is missing, in words


def find_reader(data: bytes, name: str) -> Reader:
    """The reader of a file's format. The first bytes tell the format; the name only tells HTML from other
    text."""
    if is_pdf(data[:4096]):
        return PDF
    if data.startswith(b"PK\3\4"):
        archive = Archive(data)
        if archive.find("META-INF/container.xml"):
            return EPUB
        if archive.find("mimetype") and archive.read("mimetype").startswith(b"application/vnd.oasis.opendoc"):
            return OPEN_DOCUMENT
        for folder, reader in OFFICE.items():
            if archive.find("[Content_Types].xml") and any(
                    each.lower().lstrip("/").startswith(folder) for each in archive.names):
                return reader
    if data.startswith(OLD_OFFICE):
        if "EncryptedPackage".encode("utf-16-le") in data:
            raise refusal("the file is encrypted: save it without its password", "encrypted")
        raise refusal("the file is of the old Office formats DOC, XLS and PPT: save it as DOCX, XLSX or PPTX")
    named_html = re.search(r"(?i)\.x?html?$", name) and (utf16_of(data) or b"\0" not in data[:4096])
    if named_html or is_html(html_of_bytes(data[:4096]), ""):
        return HTML
    raise refusal(f"{shown(name) if name else 'the file'} is of none of the formats that can be read: "
                  f"{FORMATS}", "unknown_format")


def extract_text(data: bytes, name: str, cpu_s: float) -> Extracted:
    """The text of a document. Raises RequestError if it has none, or cannot be read."""
    if (text := plain_text(data, name)) is not None:
        if not text.text.strip():
            raise refusal("the file has no text", "no_text")
        return Extracted(*text)
    reader = find_reader(data, name)
    reading = Reading(cpu_s)
    try:
        return join_parts(reader.kind, reader.read(data, reading), reading)
    except (RequestError, MemoryError):
        raise
    except Exception as error:  # each library has its own errors for a broken file
        raise refusal(f"the {reader.kind} file is damaged: {error_text(error)[:200]}") from None


def join_parts(kind: str, document: Document, reading: Reading) -> Extracted:
    """The text of a document's parts, as far as the limit and the deadline allow."""
    texts = []
    empty = []    # numbers of pages without text
    lacking = []  # what is missing, in words
    number = 0
    of_all = f" of {document.pages:,}" if document.pages else ""
    for number, part in enumerate(document.parts, 1):
        text = clean(part)
        up_to = f"{document.noun} {number:,}{of_all}"
        if reading.place:  # it was not read whole
            up_to = f"{reading.place}, {up_to}" if (document.pages or 1) > 1 else reading.place
        if not text:
            empty.append(number)
            continue
        if document.marked and document.pages != 1:
            text = f"[{document.noun} {number}]\n{text}"
        texts.append(text[:reading.room])
        reading.room -= len(text) + 2
        if reading.room <= 0:
            whole = f", up to {up_to}" if document.pages else f" of {len(text):,}"
            lacking.append(f"only the first {LIMITS.extracted_characters:,} characters{whole}")
            break
        if reading.place or reading.is_late and number < (document.pages or 0):
            lacking.append(f"only up to {up_to}: the rest takes too long to read")
            break
    if not texts:
        what = f"its {number} {document.noun}s" if number > 1 else "it"
        why = f": {what} may be pictures of text, which this program cannot read" if kind == "PDF" else ""
        raise refusal(f"the {kind} file has no text{why}", "no_text")
    if empty and kind == "PDF":
        which = ", ".join(map(str, empty[:10])) + (
            f" and {len(empty) - 10:,} others" if len(empty) > 10 else "")
        lacking.append(f"no text on page{'s' * (len(empty) > 1)} {which}, which may be pictures")
    return Extracted("\n\n".join(texts), document.pages, "; ".join([*lacking, *reading.lacking()]) or None)


def clean(text: str) -> str:
    """The text without control characters, lone surrogates and spaces at the ends of lines."""
    text = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "", text.replace("\r", "\n"))
    return "\n".join(line.rstrip() for line in text.split("\n")).strip()


class DocumentTasks:
    """The sandbox's task for documents."""

    def __init__(self, limit_s: float):
        self.soft_s = 0.6 * limit_s  # after this much processor time, the text ends with what has been read

    def prepare(self, name: str, arguments: Sequence):
        """Nothing is shared between documents."""

    def extract(self, name: str, boundary: str, body: bytes) -> SandboxResult:
        data, name = part_of_form(body, boundary) if boundary else (body, name)
        return SandboxResult([*extract_text(bytes(data), name, self.soft_s)])
