"""The file in a multipart/form-data body."""

from __future__ import annotations

import re
import urllib.parse

from chatlm.common.errors import RequestError

# a parameter of a header: quoted, or not
PARAMETER = re.compile(rb""";\s*([\w!#$%&'*+.^`|~-]+)\s*=\s*("(?:[^"\\\r\n]|\\.)*"|[^;\r\n]*)""")
HEAD_BYTES = 1 << 16  # of the headers of a part
EXTENDED = re.compile(r"([\w-]+)'[\w-]*'(.*)")  # RFC 5987: charset'language'text


def part_of_form(body: bytes, boundary: str) -> tuple[bytes, str]:
    """The first file of a multipart/form-data body, and its name."""
    for part in (b"\r\n" + body).split(b"\r\n--" + boundary.encode())[1:]:
        head, found, data = part.partition(b"\r\n\r\n")
        if found and (name := file_name(head)) is not None:
            return data, name
    raise RequestError("the form has no file: send one, as curl -F file=@report.pdf does", param="file")


def file_name(head: bytes) -> str | None:
    """The name of a part's file, by the headers of the part: `filename="a.pdf"`, `filename=a.pdf` or
    `filename*=UTF-8''a.pdf`, which wins. None: the part is no file."""
    for line in head[:HEAD_BYTES].split(b"\r\n"):
        kind, _, value = line.partition(b":")
        if kind.strip().lower() != b"content-disposition":
            continue
        values = {name.lower(): text.strip() for name, text in PARAMETER.findall(value)}
        if b"filename*" in values and (name := extended(values[b"filename*"].decode("latin-1"))) is not None:
            return name
        if b"filename" in values:
            name = values[b"filename"].decode("utf-8", "replace")
            return name[1:-1] if name.startswith('"') else name
    return None


def extended(text: str) -> str | None:
    """The text of an extended parameter; None if it is none."""
    found = EXTENDED.fullmatch(text)
    if not found:
        return None
    try:
        return urllib.parse.unquote(found[2], found[1], "replace")
    except LookupError:
        return None
