"""Takes pictures out of request bodies before anything else reads these, in whichever form they came.

A part of a message that was a picture is {"type": "image", "picture": [width, height, digest]} afterwards,
and so is each of Ollama's `images`. So nothing that copies, logs or keeps messages handles megabytes of
base64."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping, Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.common.client_words import too_large
from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError, bad_value, shown
from chatlm.common.jsontext import is_text
from chatlm.common.messages.requests import Picture
from chatlm.front.api.fields import within_limit

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import KeptItem
    from chatlm.common.messages.requests import Request

FORM = "a data URI such as data:image/png;base64,... or base64 alone"


def picture_bytes(value: Any, name: str) -> bytes:
    """The bytes of a picture file. Raises RequestError for anything but a data URI or base64, since this
    server fetches no URL and opens no file that a client names."""
    if not is_text(value) or not value:
        raise bad_value(name, value, FORM)
    head, comma, data = value.partition(",") if value[:5].lower() == "data:" else ("", "", value)
    if head and not (comma and head.lower().endswith(";base64")):
        raise bad_value(name, value[:100], FORM)
    scheme = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]{0,20}):", value[:40])
    if scheme and not head:
        kind = "fetches no URLs" if scheme[1].lower() in ("http", "https") else "reads no files"
        raise RequestError(f"{name} is {shown(value[:100])}: this server {kind}; send the image itself, as "
                           f"{FORM}", code="unsupported_image_url", param=name)
    if len(data) > LIMITS.picture_bytes * 4 // 3 + 1024:
        raise too_large(LIMITS.picture_bytes, name, "image_too_large", name)
    data = re.sub(r"\s+", "", data).translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")
    try:
        return base64.b64decode(data + "=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(f"{name} is not base64", param=name) from None


def sent_in(part: Any, name: str) -> tuple[Any, str] | None:
    """The picture that a part has, as it was sent, and its name for errors; None if it is no picture."""
    if is_text(part):  # Ollama's
        return part, name
    kind = part.get("type")
    value = part.get("image_url")
    if kind in ("image_url", "input_image"):
        if value is None and part.get("file_id"):
            raise RequestError(f"{name}.file_id: this server keeps no pictures; send {FORM}, in image_url",
                               code="unsupported_content", param=f"{name}.file_id")
        return (value.get("url"), f"{name}.image_url.url") if isinstance(value, dict) else (
            value, f"{name}.image_url")
    if kind != "image":
        return None
    source = part.get("source")
    if not isinstance(source, dict):
        raise bad_value(f"{name}.source", source, "an object with type base64, media_type and data")
    if source.get("type") in ("base64", "url"):
        member = {"base64": "data", "url": "url"}[source["type"]]
        return source.get(member), f"{name}.source.{member}"
    raise bad_value(f"{name}.source.type", source.get("type"), "base64")


class Lifted(NamedTuple):
    """A picture's file, as it was sent."""

    name: str  # for errors
    data: bytes


@dataclass
class Lift:
    """The pictures that were taken out of a body, up to the first that cannot be used."""

    files: list[Lifted] = field(default_factory=list)
    first: str = ""                      # the name of its first picture; "" if it has none
    problem: RequestError | None = None  # what is wrong with the first that cannot be used

    @property
    def is_empty(self) -> bool:
        """Has the body no picture, and nothing that is meant to be one?"""
        return not self.first and self.problem is None

    def check(self, refusal: str):
        """Raise RequestError if the body has a picture that the model, or anyone, cannot use. refusal: why
        the model cannot see; "": it can. That comes before what is wrong with a file."""
        if refusal and self.first:
            raise RequestError(f"{self.first}: {refusal}", code="unsupported_content", param=self.first)
        if self.problem:
            raise self.problem


def lift_pictures(body: dict, before: list | None = None) -> Lift:
    """Take the picture files out of a body, and put their indexes in their places. before: the items that
    the body continues; their pictures are taken out too."""
    lift = Lift()
    try:
        for place, index, part, name in places(body, before):
            sent = sent_in(part, name)
            if sent is None:
                continue
            value, name = sent
            lift.first = lift.first or name
            within_limit("images", len(lift.files) + 1, LIMITS.pictures, name)
            place[index] = {"type": "image", "picture": len(lift.files)}
            lift.files.append(Lifted(name, picture_bytes(value, name)))
    except RequestError as error:
        lift.problem = error
    return lift


def fill_in(body: dict, pictures: Seq[Picture], before: list | None = None):
    """Replace the index of each lifted picture by its size and digest."""
    for place, index, part, _ in places(body, before) if pictures else ():
        if isinstance(part, dict) and part.get("type") == "image":
            picture = pictures[part["picture"]]
            place[index] = {"type": "image",
                            "picture": [picture.width, picture.height, picture.digest.hex()]}


SIGNATURES = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}


def picture_kind(data: bytes | bytearray) -> str | None:
    """What stands after image/ in a picture's media type, by its first bytes; None: it is none of these."""
    return next((kind for begin, kind in SIGNATURES.items() if data.startswith(begin)), None)


def with_files(items: Seq[KeptItem], files: Mapping[bytes, bytes]) -> tuple[KeptItem, ...]:
    """Items to keep, with their pictures in them again, as a client sends them. files: by digest."""
    return tuple(with_own_files(item, files) if b'"picture"' in item.body else item for item in items)


def with_own_files(item: KeptItem, files: Mapping[bytes, bytes]) -> KeptItem:
    body = json.loads(item.body)
    for place, index, part, _ in places({"input": [body]}):
        picture = picture_in(part)
        if picture:
            data = files[picture.digest]
            kind = picture_kind(data) or "*"
            place[index] = {"type": "input_image", "detail": "auto",
                            "image_url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}
    return item._replace(body=json.dumps(body).encode())


def picture_in(part: Any) -> Picture | None:
    """The picture of a part that `fill_in` has filled, without its pixels; None if it is no picture."""
    if not (isinstance(part, dict) and part.get("type") == "image"):
        return None
    match part.get("picture"):
        case [int(width), int(height), str(digest)] if re.fullmatch("[0-9a-f]{32}", digest):
            return Picture(width, height, b"", bytes.fromhex(digest))
    return None


def with_pixels(request: Request, pictures: Seq[Picture]) -> Request:
    """A request with the pixels of its pictures. Raises RequestError for a picture that is not among these:
    a client can write what `fill_in` does, where no picture belongs."""
    if not pictures and not request.pictures and not any(
            message.pictures for message in request.messages or ()):
        return request
    by_digest = {picture.digest: picture for picture in pictures}

    def whole(some: Seq[Picture]) -> tuple[Picture, ...]:
        if any(picture.digest not in by_digest for picture in some):
            raise RequestError("a part of type image is not among the pictures of the messages",
                               code="unsupported_content", param="messages")
        return tuple(by_digest[picture.digest] for picture in some)

    messages = request.messages and tuple(
        replace(message, pictures=whole(message.pictures)) if message.pictures else message
        for message in request.messages)
    return replace(request, messages=messages, pictures=whole(request.pictures))


def places(body: dict, before: list | None = None) -> Iterator[tuple[list, int, Any, str]]:
    """Find whatever may be a picture in a body, or in the items that it continues. Yields (list, index in it,
    part, name for errors)."""
    yield from ollama_images(body, "")
    for member, messages in (("messages", body.get("messages")), ("before_input", before),
                             ("input", body.get("input"))):
        for index, message in enumerate(messages if isinstance(messages, list) else ()):
            if isinstance(message, dict):
                name = f"{member}[{index}]"
                yield from ollama_images(message, f"{name}.")
                for inner in ("content", "output"):
                    yield from content_parts(message.get(inner), f"{name}.{inner}")


def ollama_images(holder: dict, name: str) -> Iterator[tuple[list, int, Any, str]]:
    images: Any = holder.get("images")
    for index, image in enumerate(images if isinstance(images, list) else ()):
        if not isinstance(image, (str, dict)):
            raise bad_value(f"{name}images[{index}]", image, "base64")
        yield images, index, image, f"{name}images[{index}]"


def content_parts(content: Any, name: str) -> Iterator[tuple[list, int, Any, str]]:
    for index, part in enumerate(content if isinstance(content, list) else ()):
        if isinstance(part, dict):
            yield content, index, part, f"{name}[{index}]"
            inner = f"{name}[{index}]"
            source = part.get("source")
            if part.get("type") == "tool_result":
                yield from content_parts(part.get("content"), f"{inner}.content")
            if part.get("type") == "document" and isinstance(source, dict):
                yield from content_parts(source.get("content"), f"{inner}.source.content")
