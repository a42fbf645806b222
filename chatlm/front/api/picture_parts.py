"""Pictures in request bodies: taken out of them before anything else is read, as each API sends them.

Afterwards a part of a message that was a picture is {"type": "image", "picture": N}, where N is its place among
the body's pictures, and Ollama's `images` are lists of such numbers. So megabytes of base64 pass through nothing
that copies, logs or keeps messages."""

from __future__ import annotations

import base64
import binascii
import json
import re
import struct
from collections.abc import Callable, Iterator, Sequence as Seq
from typing import Any

from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError, bad_value, shown
from chatlm.common.jsontext import is_text
from chatlm.front.api.fields import json_object, within_limit

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
        raise RequestError(f"{name} is {shown(value[:100])}: this server {kind}; send the image itself, as {FORM}",
                           code="unsupported_image_url", param=name)
    if len(data) > LIMITS.picture_bytes * 4 // 3 + 1024:
        raise RequestError(f"{name} has more than {LIMITS.picture_bytes >> 20} MiB", status=413,
                           code="image_too_large", param=name)
    data = re.sub(r"\s+", "", data).translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")
    try:
        return base64.b64decode(data + "=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{name} is not base64: {error}", param=name) from None


def sent_in(part: dict, name: str) -> tuple[Any, str] | None:
    """What a part says of its picture, and the name of that for errors; None if it is no picture."""
    kind, value = part.get("type"), part.get("image_url")
    if kind in ("image_url", "input_image"):
        if kind == "input_image" and value is None and part.get("file_id"):
            raise RequestError(f"{name}.file_id: this server keeps no pictures; send {FORM}, in image_url",
                               code="unsupported_content", param=f"{name}.file_id")
        return (value.get("url"), f"{name}.image_url.url") if isinstance(value, dict) else (
            value, f"{name}.image_url")
    if kind != "image":
        return None
    source = part.get("source")
    if not isinstance(source, dict):
        raise bad_value(f"{name}.source", source, "an object with type base64, media_type and data")
    if source.get("type") == "base64":
        return source.get("data"), f"{name}.source.data"
    if source.get("type") == "url":
        return source.get("url"), f"{name}.source.url"
    raise bad_value(f"{name}.source.type", source.get("type"), "base64")


class Lifted(list):
    """The files of a body's pictures, in order, each with its name for errors."""

    def add(self, value: Any, name: str) -> int:
        within_limit("images", len(self) + 1, LIMITS.pictures, name)
        self.append((name, file_of(value, name)))
        return len(self) - 1


def lift_pictures(body: dict, check: Callable[[str], None]) -> Lifted:
    """Take the pictures out of a body, as above. `check` gets the name of the first and may refuse it."""
    found = Lifted()
    for place, index, value, name in pictures_in(body):
        if not found:
            check(name)
        number = found.add(value, name)
        place[index] = number if is_text(place[index]) else {"type": "image", "picture": number}
    return found


def pictures_in(body: dict) -> Iterator[tuple[list, int, Any, str]]:
    """(list, index, what it says, name) of each picture."""
    yield from ollama_images(body, "")
    for member in ("messages", "input"):
        messages = body.get(member)
        for index, message in enumerate(messages if isinstance(messages, list) else ()):
            if isinstance(message, dict):
                name = f"{member}[{index}]"
                yield from ollama_images(message, f"{name}.")
                for inner in ("content", "output"):
                    yield from parts_of(message.get(inner), f"{name}.{inner}")


def ollama_images(holder: dict, name: str) -> Iterator[tuple[list, int, Any, str]]:
    images = holder.get("images")
    for index, image in enumerate(images if isinstance(images, list) else ()):
        if not is_text(image):
            raise bad_value(f"{name}images[{index}]", image, "base64")
        yield images, index, image, f"{name}images[{index}]"


def parts_of(content: Any, name: str) -> Iterator[tuple[list, int, Any, str]]:
    for index, part in enumerate(content if isinstance(content, list) else ()):
        if isinstance(part, dict):
            part_name = f"{name}[{index}]"
            if part.get("type") == "tool_result":
                yield from parts_of(part.get("content"), f"{part_name}.content")
            elif sent := sent_in(part, part_name):
                yield content, index, *sent


SIZE = struct.Struct("<I")


def packed_lift(body: dict, pictures: Seq[tuple[str, bytes]]) -> bytes:
    """A body and the pictures that were taken out of it, as one message of a sandbox."""
    sections = [json.dumps(body).encode(), json.dumps([name for name, _ in pictures]).encode(),
                *(data for _, data in pictures)]
    return b"".join(part for section in sections for part in (SIZE.pack(len(section)), section))


def unpacked_lift(data: bytes) -> tuple[bytes, list[tuple[str, bytes]]]:
    """The body, as JSON, and the pictures."""
    sections, begin = [], 0
    while begin < len(data):
        [size] = SIZE.unpack_from(data, begin)
        sections.append(data[begin + SIZE.size:begin + SIZE.size + size])
        begin += SIZE.size + size
    body, names, *files = sections
    return body, [*zip(json.loads(names), files)]


def lift_from(raw: bytes | bytearray, check: Callable[[str], None]) -> tuple[dict, Seq[tuple[str, bytes]]]:
    body = json_object(raw)
    return body, lift_pictures(body, check)
