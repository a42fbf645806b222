"""EPUB: the chapters of a book in their order."""

from __future__ import annotations

import posixpath
import urllib.parse
from typing import Any

from chatlm.front.documents.archives import Archive, below
from chatlm.front.documents.document import Document, Reading, refusal
from chatlm.front.documents.markup import to_markdown
from chatlm.front.documents.texts import html_of_bytes

ENCRYPTION = "META-INF/encryption.xml"


def read_epub(data: bytes, reading: Reading) -> Document:
    archive = Archive(data)
    container = archive.xml("META-INF/container.xml")
    package = next(each.get("full-path", "") for each in below(container, "rootfile"))
    root = archive.xml(package)
    if root is None:
        raise ValueError(f"it has no part {package[:100]}")
    chapters = chapters_of(archive, package, root, reading)
    if archive.find(ENCRYPTION):
        locked = {archive.find(urllib.parse.unquote(each.get("URI", "")))
                  for each in archive.xml(ENCRYPTION).iter("{*}*")}
        if locked & {*chapters}:
            raise refusal("the EPUB is encrypted, as books with a copy protection are", "encrypted")
    texts = (to_markdown(html_of_bytes(archive.read(name)), reading, f"chapter {number}")
             for number, name in enumerate(chapters, 1))
    return Document(texts, len(chapters), "chapter")


def chapters_of(archive: Archive, package: str, root: Any, reading: Reading) -> list[str]:
    """The parts of a book in their order, each once: a book may name several places of one."""
    items = {each.get("id", ""): each.get("href", "") for each in below(root, "item")}
    chapters: dict[str, None] = {}
    for each in below(root, "itemref"):
        number = each.get("idref", "")
        href = items.get(number, "")
        if name := part_named(archive, package, href):
            chapters[name] = None
        else:
            reading.lacks("chapter", href or number)
    return [*chapters]


def part_named(archive: Archive, package: str, href: str) -> str:
    """The part that an address in a book's package names; "" if it is not here. A slash begins at the top of
    the archive, or, in the books of some programs, beside the package."""
    address = urllib.parse.urlsplit(href.replace("\\", "/"))
    folder = posixpath.dirname(package)
    for path in (urllib.parse.unquote(address.path), address.path):
        beside = posixpath.normpath(posixpath.join(folder, path.lstrip("/")))
        at_top = posixpath.normpath(path.lstrip("/"))
        for name in (at_top, beside) if path.startswith("/") else (beside, at_top):
            if path and (found := archive.find(name)):
                return found
    return ""
