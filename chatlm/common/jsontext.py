"""JSON on one line, and the types of its values."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import TypeIs


# json.dumps makes an encoder per call: 2 us per token. Raises ValueError for NaN and infinities, which JSON
# does not have
strict_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def as_json(value) -> str:
    """JSON, as everything that leaves this process is written: NaN and infinities become null, as browsers
    write them. Many readers refuse a body that has one."""
    try:
        return strict_json(value)
    except ValueError:
        return strict_json(without_infinities(value))


def without_infinities(value):
    """A JSON value with null for what is no number in JSON, also among the keys of objects."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {without_infinities(name): without_infinities(member) for name, member in value.items()}
    return [*map(without_infinities, value)] if isinstance(value, (list, tuple)) else value


def read_json(text: str | bytes | bytearray):
    """The value of a JSON text. Raises ValueError also for what Python's reader lets through: NaN,
    infinities, and numbers that become one. RecursionError for what is nested too deeply."""
    return json.loads(text, parse_constant=refuse_number, parse_float=finite_number)


def refuse_number(text: str):
    raise ValueError(f"{text[:40]} is no number in JSON")


def finite_number(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else refuse_number(text)


def dump(value) -> bytes:
    """JSON on one line for any reader: some also break lines at U+0085, U+2028 and U+2029."""
    text = as_json(value)
    if text.isascii():
        return text.encode()
    for character, escaped in ("\x85", "\\u0085"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029"):
        text = text.replace(character, escaped)
    return text.encode("utf-8", "replace")


def whole_unicode(text: str) -> str:
    """Replace lone surrogates, which JSON allows but UTF-8 does not, with U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def may_have_member(text: bytes, name: str) -> bool:
    """Can JSON have a member of this name? It may also be spelled with escapes, such as \\u006d for m."""
    return b'"%s"' % name.encode() in text or b"\\u" in text


def is_number(value) -> bool:
    return type(value) is int or type(value) is float and math.isfinite(value)


def is_text(value) -> TypeIs[str]:
    return isinstance(value, str)


JSON_TYPES = {"null": lambda value: value is None, "boolean": lambda value: isinstance(value, bool),
              "string": is_text,
              "number": is_number, "integer": lambda value: is_number(value) and value % 1 == 0,
              "array": lambda value: isinstance(value, list), "object": lambda value: isinstance(value, dict)}
