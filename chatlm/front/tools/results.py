"""What a tool has answered, as text for a model, and pictures for one that sees."""

from __future__ import annotations

import base64
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

from chatlm.common.errors import ChatServerError
from chatlm.common.jsontext import as_json, whole_unicode
from chatlm.common.records import record
from chatlm.front.tools.transport import ToolError

PICTURES = 8
Decode = Callable[[bytes], Awaitable[object]]
PICTURE_TYPES = ("image/png", "image/jpeg", "image/gif", "image/webp")


@record
class ToolPicture:
    """A picture that a tool has returned."""

    mime_type: str
    data: str  # base64

    @property
    def file(self) -> bytes:
        return base64.b64decode(self.data)

    @property
    def body(self) -> dict[str, str]:
        """As routes send it and chats keep it."""
        return {"mime_type": self.mime_type, "data": self.data}


@record
class ToolResult:
    """What a tool has returned."""

    text: str
    is_error: bool = False
    pictures: tuple[ToolPicture, ...] = ()
    cut: int = 0  # characters that are missing in the middle of the text
    ms: int = 0   # that the call took

    def at_most(self, characters: int) -> ToolResult:
        """The result with its text cut in the middle, where it says so to the model."""
        if len(self.text) <= characters:
            return self
        cut = len(self.text) - characters
        begin = self.text[:characters * 3 // 4]
        end = self.text[len(self.text) - (characters - len(begin)):]
        text = f"{begin}\n[{cut:,} characters are missing here: the result was too long]\n{end}"
        return ToolResult(text, self.is_error, self.pictures, cut)

    async def with_readable_pictures(self, decode: Decode) -> ToolResult:
        """The result without pictures that no model could be shown. Its text says why they are missing.

        decode: reads the file of a picture, as for a request; raises ChatServerError if that fails."""
        pictures = []
        text = self.text
        for number, picture in enumerate(self.pictures, 1):
            try:
                await decode(picture.file)
                pictures.append(picture)
            except ChatServerError as error:
                text += f"\n[picture {number} can't be read: {error}]"
        return replace(self, text=text, pictures=tuple(pictures))


def result_of_call(found: Any) -> ToolResult:
    """The result of tools/call. Raises ToolError for what is none, and for servers that want to ask back."""
    if not isinstance(found, dict):
        raise ToolError("its answer to tools/call is not an object")
    if found.get("resultType", "complete") != "complete":
        raise ToolError("it wants to ask the user something, which this server does not support")
    content = found.get("content")
    texts = []
    pictures = []
    for part in content if isinstance(content, list) else []:
        if not isinstance(part, dict):
            continue
        picture = picture_of(part)
        if picture and len(pictures) < PICTURES:
            pictures.append(picture)
            texts.append(f"[picture {len(pictures)}]")
        elif text := text_of_part(part):
            texts.append(text)
    if not texts and "structuredContent" in found:
        texts.append(as_json(found["structuredContent"]))
    text = "\n".join(texts)
    return ToolResult(whole_unicode(text), found.get("isError") is True, tuple(pictures))


def picture_of(part: Mapping[str, Any]) -> ToolPicture | None:
    data = part.get("data")
    mime_type = part.get("mimeType")
    if part.get("type") != "image" or not isinstance(data, str) or mime_type not in PICTURE_TYPES:
        return None
    data = "".join(data.split())
    is_base64 = re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", data) and len(data) % 4 == 0
    return ToolPicture(mime_type, data) if is_base64 else None


def text_of_part(part: Mapping[str, Any]) -> str:
    """A part of the content in words; parts that a model can't read are only named."""
    kind = part.get("type")
    if kind == "text":
        text = part.get("text")
        return text if isinstance(text, str) else ""
    if kind == "resource_link":
        return f"[{part.get('name', 'resource')}: {part.get('uri')}]"
    if kind == "resource":
        resource = part.get("resource")
        resource = resource if isinstance(resource, dict) else {}
        if isinstance(resource.get("text"), str):
            return resource["text"]
        return f"[{resource.get('uri', 'a resource')}, which is not text]"
    if kind in ("image", "audio"):
        return f"[{kind} of type {part.get('mimeType')}]"
    return f"[content of an unknown type: {str(kind)[:40]}]"
