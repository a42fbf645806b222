"""What a tool has answered, as text for a model, and pictures for one that sees."""

from __future__ import annotations

import base64
import re
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from chatlm.common.errors import ChatServerError
from chatlm.common.jsontext import strict_json, whole_unicode
from chatlm.front.tools.transport import ToolError

PICTURES = 8
Decode = Callable[[bytes], Awaitable[object]]
# of embedded files whose base64 is a text
TEXT_TYPES = r"text/|application/(json|xml|javascript|yaml|toml)\b|[^;]+\+(json|xml)\b"
PICTURE_TYPES = ("image/png", "image/jpeg", "image/gif", "image/webp")


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class ToolResult:
    """What a tool has returned."""

    text: str
    is_error: bool = False
    pictures: tuple[ToolPicture, ...] = ()
    cut: int = 0  # characters that are missing in the middle of the text
    ms: int = 0   # that the call took
    # of tools that the server itself runs, as of CallEnded
    shown: Mapping[str, Any] = field(default_factory=dict)
    cited: tuple[Mapping, ...] = ()

    @property
    def packed(self) -> dict[str, Any]:
        """As a sandbox sends it."""
        return {"text": self.text, "is_error": self.is_error, "cut": self.cut,
                "pictures": [[picture.mime_type, picture.data] for picture in self.pictures]}

    @classmethod
    def unpacked(cls, packed: Mapping[str, Any]) -> ToolResult:
        pictures = tuple(ToolPicture(*picture) for picture in packed["pictures"])
        return cls(packed["text"], packed["is_error"], pictures, packed["cut"])

    def at_most(self, characters: int) -> ToolResult:
        """The result with its text cut in the middle, where it says so to the model."""
        if len(self.text) <= characters:
            return self
        cut = len(self.text) - characters
        begin = self.text[:characters * 3 // 4]
        end = self.text[len(self.text) - (characters - len(begin)):]
        text = f"{begin}\n[{cut:,} characters are missing here: the result was too long]\n{end}"
        return replace(self, text=text, cut=cut)

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


def result_of_call(found: Any, characters: int) -> ToolResult:
    """The result of tools/call, with at most so many characters of text. Raises ToolError for what is none,
    and for servers that want to ask back."""
    if not isinstance(found, dict):
        raise ToolError("its answer to tools/call is not an object")
    if found.get("resultType", "complete") != "complete":
        raise ToolError("it wants to ask the user something, which this server does not support")
    content = found.get("content")
    texts = [content] if isinstance(content, str) else []
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
        texts.append(structured(found["structuredContent"]))
    text = whole_unicode("\n".join(texts))
    return ToolResult(text, found.get("isError") is True, tuple(pictures)).at_most(characters)


def structured(content: Any) -> str:
    try:
        return strict_json(content)
    except RecursionError:
        raise ToolError("its answer is nested too deeply", unknown_outcome=True) from None
    except ValueError:
        raise ToolError("its answer has NaN or Infinity, which JSON does not have",
                        unknown_outcome=True) from None


def picture_of(part: Mapping[str, Any]) -> ToolPicture | None:
    """The picture that a part of the content is, as an image or as an embedded file."""
    if part.get("type") == "image":
        return picture_in(part.get("data"), part.get("mimeType"))
    resource = part.get("resource")
    if part.get("type") == "resource" and isinstance(resource, dict):
        return picture_in(resource.get("blob"), resource.get("mimeType"))
    return None


def picture_in(data: Any, mime_type: Any) -> ToolPicture | None:
    mime_type = "image/jpeg" if mime_type == "image/jpg" else mime_type
    if not isinstance(data, str) or mime_type not in PICTURE_TYPES:
        return None
    if data.startswith("data:"):  # some servers write what a page would show
        data = data.partition(";base64,")[2]
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
        return f"[{brief(part.get('name', 'resource'))}: {brief(part.get('uri'))}]"
    if kind == "resource":
        resource = part.get("resource")
        return text_of_resource(resource if isinstance(resource, dict) else {})
    if kind in ("image", "audio"):
        return f"[{kind} of type {brief(part.get('mimeType'))}]"
    return f"[content of an unknown type: {brief(kind)[:40]}]"


def text_of_resource(resource: Mapping[str, Any]) -> str:
    """An embedded file: its text, also where it is sent as base64."""
    if isinstance(resource.get("text"), str):
        return resource["text"]
    mime_type = resource.get("mimeType")
    blob = resource.get("blob")
    if isinstance(mime_type, str) and isinstance(blob, str) and re.match(TEXT_TYPES, mime_type):
        with suppress(ValueError):
            return base64.b64decode(blob).decode("utf-8", "replace")
    return f"[{brief(resource.get('uri', 'a resource'))}, which is not text]"


def brief(value: Any) -> str:
    """What should be a short text, in words for a model."""
    if isinstance(value, str):
        return value[:2000]
    return "-" if value is None else type(value).__name__
