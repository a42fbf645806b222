"""Files and documents that the user sends with a question."""

from __future__ import annotations

import re
from pathlib import Path

from chatlm.common.config import LIMITS
from chatlm.common.files import read_small
from chatlm.front.admission.admission import Admission


def read_user_file(name: str) -> str:
    """The text of a file. ValueError if it has none, ConfigError if it cannot be read."""
    if not name:
        raise ValueError("the file name is missing")
    try:
        return read_small(Path(name).expanduser()).decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not a text file") from None


def is_document(name: str) -> bool:
    return bool(re.search(r"(?i)\.(pdf|docx|pptx|xlsx|epub|x?html?)$", name))


async def document_text(name: str) -> tuple[str, str]:
    """A document's text, read in a sandbox, and a line about it: its size, and what the text lacks.
    RequestError if it has no text or cannot be read, ConfigError if it is no file."""
    path = Path(name).expanduser()
    data = read_small(path)
    if len(data) > LIMITS.document_bytes:
        raise ValueError(f"{name} has {len(data):,} bytes; at most {LIMITS.document_bytes:,} are read")
    admission = Admission(lambda request_id, client, low: None)
    try:
        text, pages, cut = await admission.extract("", path.name, "", data)
    finally:
        await admission.close()
    about = f"{path.name}: " + (f"{pages:,} page{'s' * (pages != 1)}, " if pages else "")
    return text, f"{about}{len(text):,} characters" + (f"; incomplete: {cut}" if cut else "")
