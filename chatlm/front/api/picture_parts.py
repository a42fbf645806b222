"""Pictures in request bodies: taken out before anything else reads these, in whichever form they came.

A part of a message that was a picture then is {"type": "image", "picture": [width, height, digest]}, as is
each of Ollama's `images`. So megabytes of base64 pass through nothing that copies, logs or keeps messages."""

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


def file_of(value: Any, name: str) -> bytes:
    """The bytes of a picture file. RequestError for anything but a data URI or base64: this server fetches no
    URL and opens no file that a client names."""
    if not is_text(value) or not value:
        raise bad_value(name, value, FORM)
    head, comma, data = value.partition(",") if value[:5].lower() == "data:" else ("", "", value)
    if head and not (comma and head.lower().endswith(";base64")):
        raise bad_value(name, value[:100], FORM)
    if scheme := not head and re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]{0,20}):", value[:40]):
        kind = "fetches no URLs" if scheme[1].lower() in ("http", "https") else "reads no files"
        raise RequestError(f"{name} is {shown(value[:100])}: this server {kind}; send the image itself, as "
                           f"{FORM}", code="unsupported_image_url", param=name)
    if len(data) > LIMITS.picture_bytes * 4 // 3 + 1024:
        raise too_large(LIMITS.picture_bytes, name, "image_too_large", name)
    data = re.sub(r"\s+", "", data).translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")
    try:
        return base64.b64decode(data + "=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{name} is not base64: {error}", param=name) from None


def sent_in(part: Any, name: str) -> tuple[Any, str] | None:
    """What a part says of its picture, and the name of that for errors; None if it is no picture."""
    if is_text(part):   # Ollama's
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
    """The pictures of a body: their files, up to the first that cannot be used."""

    files: list[Lifted] = field(default_factory=list)
    first: str = ""                      # the name of its first picture; "" if it has none
    problem: RequestError | None = None  # what is wrong with the first that cannot be used

    def check(self, refusal: str):
        """RequestError for what is no picture file, and, with the reason `refusal` if there is one, for any
        picture: a model that cannot see says so before it finds fault with a file."""
        if refusal and self.first:
            raise RequestError(f"{self.first}: {refusal}", code="unsupported_content", param=self.first)
        if self.problem:
            raise self.problem


def lift_pictures(body: dict, before: list | None = None) -> Lift:
    """Take the files of its pictures out of a body, which gets their numbers in their places. before: the
    items that the body continues, which get them too."""
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
            lift.files.append(Lifted(name, file_of(value, name)))
    except RequestError as error:
        lift.problem = error
    return lift


def fill_in(body: dict, pictures: Seq[Picture], before: list | None = None):
    """Say of each picture that was lifted what it is: its size and its digest."""
    for place, index, part, _ in places(body, before) if pictures else ():
        if isinstance(part, dict) and part.get("type") == "image":
            picture = pictures[part["picture"]]
            place[index] = {"type": "image",
                            "picture": [picture.width, picture.height, picture.digest.hex()]}


SIGNATURES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}


def with_files(items: Seq[KeptItem], files: Mapping[bytes, bytes]) -> tuple[KeptItem, ...]:
    """Items that are kept, with the files of their pictures, by digest, as a client sends them."""
    return tuple(with_own_files(item, files) if b'"picture"' in item.body else item for item in items)


def with_own_files(item: KeptItem, files: Mapping[bytes, bytes]) -> KeptItem:
    found = json.loads(item.body)
    for place, index, part, _ in places({"input": [found]}):
        if shown_here := picture_in(part):
            data = files[shown_here.digest]
            kind = next((kind for begin, kind in SIGNATURES.items() if data.startswith(begin)), "*")
            place[index] = {"type": "input_image", "detail": "auto",
                            "image_url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}
    return item._replace(body=json.dumps(found).encode())


def picture_in(part: Any) -> Picture | None:
    """The picture of a part that `fill_in` filled, without its pixels; None if it is none."""
    if not (isinstance(part, dict) and part.get("type") == "image"):
        return None
    match part.get("picture"):
        case [int(width), int(height), str(digest)] if re.fullmatch("[0-9a-f]{32}", digest):
            return Picture(width, height, b"", bytes.fromhex(digest))
    return None


def with_pixels(request: Request, pictures: Seq[Picture]) -> Request:
    """A request that was read, with the pixels of its pictures."""
    of = {picture.digest: picture for picture in pictures}

    def whole(some: Seq[Picture]) -> tuple[Picture, ...]:
        if any(picture.digest not in of for picture in some):
            raise RequestError("a part of type image is not among the pictures of the messages",
                               code="unsupported_content", param="messages")
        return tuple(of[picture.digest] for picture in some)

    messages = request.messages and tuple(
        replace(message, pictures=whole(message.pictures)) if message.pictures else message
        for message in request.messages)
    return replace(request, messages=messages, pictures=whole(request.pictures))


def places(body: dict, before: list | None = None) -> Iterator[tuple[list, int, Any, str]]:
    """(list, index, part, name for errors) of whatever may be a picture in a body, or in what it
    continues."""
    yield from ollama_images(body, "")
    for member, messages in (("messages", body.get("messages")), ("before_input", before),
                             ("input", body.get("input"))):
        for index, message in enumerate(messages if isinstance(messages, list) else ()):
            if isinstance(message, dict):
                name = f"{member}[{index}]"
                yield from ollama_images(message, f"{name}.")
                for inner in ("content", "output"):
                    yield from parts_of(message.get(inner), f"{name}.{inner}")


def ollama_images(holder: dict, name: str) -> Iterator[tuple[list, int, Any, str]]:
    images: Any = holder.get("images")
    for index, image in enumerate(images if isinstance(images, list) else ()):
        if not isinstance(image, (str, dict)):
            raise bad_value(f"{name}images[{index}]", image, "base64")
        yield images, index, image, f"{name}images[{index}]"


def parts_of(content: Any, name: str) -> Iterator[tuple[list, int, Any, str]]:
    for index, part in enumerate(content if isinstance(content, list) else ()):
        if isinstance(part, dict):
            yield content, index, part, f"{name}[{index}]"
            inner = f"{name}[{index}]"
            source = part.get("source")
            if part.get("type") == "tool_result":
                yield from parts_of(part.get("content"), f"{inner}.content")
            if part.get("type") == "document" and isinstance(source, dict):
                yield from parts_of(source.get("content"), f"{inner}.source.content")
