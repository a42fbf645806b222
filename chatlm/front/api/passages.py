"""Documents and search results in Anthropic's messages, as parts of Chat Completions."""

from __future__ import annotations

from collections.abc import Iterator

from chatlm.common.errors import RequestError, bad_value, shown
from chatlm.common.jsontext import is_text
from chatlm.front.api.fields import Field
from chatlm.front.api.field_types import TEXT
from chatlm.front.api.picture_parts import picture_in

SOURCES = "source must be an object of type text, with data, or of type content, with content"


def passage_parts(block: dict, name: str) -> list[dict]:
    """The parts of a block of type document or search_result: first its names, then its content. Raises
    RequestError for what is no text, such as a PDF."""
    if block["type"] == "search_result":
        heads = ("title", "source")
        content = block.get("content")
        where = f"{name}.content"
    else:
        heads = ("title", "context")
        content, where = document_content(block.get("source"), f"{name}.source")
    head = [Field(f"{name}.{member}", TEXT, "").read(block[member]) for member in heads
            if block.get(member) is not None]
    return [{"type": "text", "text": text} for text in head if text] + [*text_parts(content, where)]


def document_content(source, name: str) -> tuple[object, str]:
    """The content of a document, and its name for errors."""
    kind = source.get("type") if isinstance(source, dict) else None
    if kind == "text":
        return Field(f"{name}.data", TEXT, "").read(source.get("data")), f"{name}.data"
    if kind == "content":
        return source.get("content"), f"{name}.content"
    if kind in ("base64", "url", "file"):
        raise RequestError(f"{name} is of type {kind}, which is not read here: {SOURCES}. POST /extract "
                           "makes text of PDFs and other files", code="unsupported_content", param=name)
    raise bad_value(name, source, SOURCES.removeprefix("source must be "))


def text_parts(content, name: str) -> Iterator[dict]:
    if is_text(content):
        yield {"type": "text", "text": content}
        return
    if not isinstance(content, list):
        raise bad_value(name, content, "a string or a list of text blocks")
    for index, part in enumerate(content):
        if picture_in(part):
            yield part
            continue
        place = f"{name}[{index}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise RequestError(f"{place} must be a text or, in a document, an image, not "
                               f"{shown(kind or part)}", code="unsupported_content", param=place)
        yield {"type": "text", "text": Field(f"{place}.text", TEXT, "").read(part.get("text"))}
