"""Bytes that are text become text, as static/tree.js: `textOf` does in the page. Both pass the cases of
tests/fixtures/encodings.json."""

from __future__ import annotations

import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, lookup
from contextlib import suppress
from typing import NamedTuple

from chatlm.common.config import LIMITS

LOOKED_AT = 4096  # bytes from the start, by which UTF-16 without a mark is told, and HTML
DECLARED_IN = 1024  # bytes from the start, in which HTML says how it is encoded
UNTEXT = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")
BINARY = re.compile("[\x00-\x08\x0e-\x19\x1c-\x1f]")       # characters that no text has
BINARY_1252 = re.compile("[\x00-\x08\x0e-\x19\x1c-\x1f\x7f]")
PDF = re.compile(rb"(?:^|[\r\n\x00-\x08\x0e-\x1f\x80-\xff])[ \t]*%PDF-")
DECLARATION = re.compile(rb"""(?i)(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]{1,40})""")
# Python's name of an encoding that HTML may declare -> how browsers read it
DECLARED = {
    "utf-8": "utf-8", "ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "iso8859-11": "cp874",
    "tis-620": "cp874", "gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949",
    "big5": "big5hkscs",
    **{name: name for name in (
        "iso8859-2", "iso8859-3", "iso8859-4", "iso8859-5", "iso8859-6", "iso8859-7", "iso8859-8",
        "iso8859-10", "iso8859-13", "iso8859-14", "iso8859-15", "iso8859-16", "cp866", "cp874", "cp932",
        "cp949", "cp1250", "cp1251", "cp1252", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp1258",
        "koi8-r", "koi8-u", "mac-roman", "mac-cyrillic", "gb18030", "big5hkscs", "euc_jp", "iso2022_jp")}}


class Text(NamedTuple):
    """The text of a file."""

    text: str
    pages: int | None = None  # None: its format has none
    lacks: str | None = None  # what of the file is not in it


def text_of_bytes(data: bytes) -> str | None:
    """The text that bytes are: in UTF-16 (told by its mark or its zeros), UTF-8, or else Windows' Latin-1.
    None: they are none."""
    encoding = utf16_of(data)
    tries = [encoding] if encoding else []
    for each in (*tries, "utf-8", "cp1252"):
        with suppress(UnicodeDecodeError):
            text = data.decode(each).removeprefix("\ufeff")
            if not (BINARY_1252 if each == "cp1252" else BINARY).search(text):
                return text
    return None


def utf16_of(data: bytes) -> str:
    """The UTF-16 that bytes seem to be, by their mark. Without one most characters must be ASCII: every
    second byte is zero then. "": it is another encoding."""
    start = data[:LOOKED_AT]
    even = start[::2].count(0)
    odd = start[1::2].count(0)
    if data.startswith(BOM_UTF16_LE) or odd > len(start) / 4 and not even:
        return "utf-16-le"
    if data.startswith(BOM_UTF16_BE) or even > len(start) / 4 and not odd:
        return "utf-16-be"
    return ""


def html_of_bytes(data: bytes) -> str:
    """HTML as text: by its mark or zeros, else as it says itself, else in UTF-8 or Windows' Latin-1."""
    if data.startswith(BOM_UTF8):
        return data.decode("utf-8-sig", "replace")
    if encoding := utf16_of(data) or declared_in(data[:DECLARED_IN]):
        return data.decode(encoding, "replace").removeprefix("\ufeff")
    with suppress(UnicodeDecodeError):
        return data.decode("utf-8")
    return data.decode("cp1252", "replace")


def declared_in(start: bytes) -> str:
    """The encoding that the start of an HTML file declares; "" if it declares none that is known."""
    for label in DECLARATION.findall(start):
        with suppress(LookupError):
            if encoding := DECLARED.get(lookup(label.decode("ascii", "replace")).name):
                return encoding
    return ""


def is_html(text: str, name: str) -> bool:
    """Is a text HTML, by how it begins or by the name of its file?"""
    if re.search(r"(?i)\.x?html?$", name):
        return True
    rest = text[:LOOKED_AT].lstrip()
    if rest.startswith("<?xml"):
        rest = rest.partition(">")[2].lstrip()
    while rest.startswith("<!--"):
        rest = rest.partition("-->")[2].lstrip()
    return bool(re.match(r"(?i)<(!doctype html|html|head|body)\b", rest))


def plain_text(data: bytes, name: str) -> Text | None:
    """The text of a file that is one; None if it must be extracted, or is none."""
    begins = data[:LOOKED_AT]
    if begins.startswith((b"PK\3\4", b"\xd0\xcf\x11\xe0")) or is_pdf(begins):
        return None
    text = text_of_bytes(data)
    if text is None or is_html(text, name):
        return None
    return readable(text)


def is_pdf(begins: bytes) -> bool:
    """Does a file that begins like this say that it is a PDF? It may say so behind other lines or bytes, but
    not within a line of text."""
    return bool(PDF.search(begins[:1024]))


def readable(text: str) -> Text:
    """A text without control characters, as far as it is read."""
    lacks = None
    if len(text) > LIMITS.extracted_characters:
        lacks = f"only the first {LIMITS.extracted_characters:,} of {len(text):,} characters"
    text = text[:LIMITS.extracted_characters].replace("\r\n", "\n").replace("\r", "\n")
    return Text(UNTEXT.sub(" ", text), None, lacks)
