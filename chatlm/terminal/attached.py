"""Files, documents and pictures that the user sends with a question."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from chatlm.common.config import LIMITS
from chatlm.common.files import read_small
from chatlm.common.messages.requests import Message
from chatlm.front.admission.admission import Admission, SharedAdmission
from chatlm.front.api.picture_parts import picture_bytes
from chatlm.front.api.picture_files import detect_format
from chatlm.front.documents.texts import text_of_bytes

if TYPE_CHECKING:
    from chatlm.front.pool.pool import WorkerPool


def read_user_file(name: str) -> str:
    """The text of a file. ValueError if it has none, ConfigError if it cannot be read."""
    if not name:
        raise ValueError("the file name is missing")
    text = text_of_bytes(read_small(Path(name).expanduser()))
    if text is None:
        raise ValueError(f"{name} is not a text file")
    return text.replace("\r\n", "\n")


def is_document(name: str) -> bool:
    return bool(re.search(r"(?i)\.(pdf|docx|pptx|xlsx|od[tsp]|epub|x?html?)$", name))


async def document_text(name: str) -> tuple[str, str]:
    """A document's text, read in a sandbox, and a line about it: its size, and what the text lacks.
    RequestError if it has no text or cannot be read, ConfigError if it is no file."""
    path = Path(name).expanduser()
    data = read_small(path)
    if len(data) > LIMITS.document_bytes:
        raise ValueError(f"{name} has {len(data):,} bytes; at most {LIMITS.document_bytes:,} are read")
    shared = SharedAdmission()
    admission = Admission(lambda request_id, client, low, goes_on: None, shared)
    try:
        text, pages, cut = await admission.extract("", path.name, "", data)
    finally:
        await shared.close()
    about = f"{path.name}: " + (f"{pages:,} page{'s' * (pages != 1)}, " if pages else "")
    return text, f"{about}{len(text):,} characters" + (f"; incomplete: {cut}" if cut else "")


def is_picture(name: str) -> bool:
    return bool(re.search(r"(?i)\.(png|jpe?g|webp|gif)$", name))


def picture_file(name: str) -> dict[str, str]:
    """A picture as a message of the page's export format has it: its name, and the file as a data URI.
    RequestError if it is no picture, ConfigError if it cannot be read."""
    data = read_small(Path(name).expanduser())
    if len(data) > LIMITS.picture_bytes:
        raise ValueError(f"{name} has {len(data):,} bytes; at most {LIMITS.picture_bytes:,} are read")
    kind = f"data:image/{detect_format(data).lower()};base64,"
    return {"name": Path(name).name, "picture": kind + base64.b64encode(data).decode()}


async def decoded(messages: Seq[Message], pool: WorkerPool) -> tuple[Message, ...]:
    """Messages whose pictures, the data URIs in their `more`, were read in a sandbox: these come first."""
    found = list[Message]()
    for message in messages:
        more = dict(message.more or {})
        pictures = tuple([await pool.admission.decode_picture(picture_bytes(uri, "image"), "")
                          for uri in more.pop("pictures", ())])
        parts = (*range(len(pictures)), message.content) if pictures else ()
        found.append(replace(message, more=more or None, pictures=pictures, parts=parts))
    return tuple(found)
