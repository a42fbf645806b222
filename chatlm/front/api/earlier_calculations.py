"""Reads the calls of nanochat's calculator in messages that clients send back.

See common/text/calculations.py for what such a call is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from chatlm.common.errors import bad_value
from chatlm.common.jsontext import is_text, whole_unicode
from chatlm.common.messages.requests import Message
from chatlm.common.text.calculations import STRAY_MARKS, moved, with_calls


A_CALL = 'an object with "start", and with texts or null as "expression" and "result"'
# nanochat's own types of parts in an assistant's content -> the member of a call that the part is
NANOCHAT_PARTS = {"python": "expression", "python_output": "result"}


def read_calculations(sent: Any, text: str, name: str) -> list[dict]:
    """The calls beside a text. Raises RequestError for calls that cannot stand in it."""
    if sent is None:
        return []
    if not isinstance(sent, list):
        raise bad_value(name, sent, "a list of calls of the calculator")
    calls = list[dict]()
    before = 0
    for index, call in enumerate(sent):
        place = f"{name}[{index}]"
        if not isinstance(call, dict):
            raise bad_value(place, call, A_CALL)
        start = call.get("start")
        if type(start) is not int or not before <= start <= len(text):
            raise bad_value(f"{place}.start", start,
                            f"an integer from {before} to {len(text)}, the characters of the text")
        calls.append({"start": start, **read_calculation(call, place)})
        before = start
    return calls


def read_calculation(call: Mapping, name: str) -> dict:
    """The checked members of a call, except its start."""
    stray = call.get("stray")
    if stray is not None:
        if not is_text(stray) or stray not in STRAY_MARKS:
            raise bad_value(f"{name}.stray", stray, f"one of {', '.join(STRAY_MARKS)}")
        return {"stray": stray}
    parts = {}
    for part in ("expression", "result"):
        said = call.get(part)
        if said is not None and not is_text(said):
            raise bad_value(f"{name}.{part}", said, "a string or null")
        parts[part] = said if said is None else whole_unicode(said)
    if parts["expression"] is None and parts["result"] is None:
        raise bad_value(name, call, A_CALL)
    cut = call.get("cut")
    if cut is not None and not isinstance(cut, bool):
        raise bad_value(f"{name}.cut", cut, "true or false")
    return parts | ({"cut": True} if cut else {})


def is_nanochats(content: list) -> bool:
    """Does a content have parts of the types in nanochat's own conversations?"""
    types = [part.get("type") for part in content if isinstance(part, dict)]
    return any(is_text(each) and each in NANOCHAT_PARTS for each in types)


def read_nanochat_parts(content: list, name: str) -> tuple[str, list[dict]]:
    """The text and the calls of such a content. Its texts follow each other without a line break."""
    text = ""
    calls = list[dict]()
    for index, part in enumerate(content):
        place = f"{name}[{index}]"
        kind, said = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
        if not is_text(said) or not is_text(kind) or kind not in ("text", *NANOCHAT_PARTS):
            raise bad_value(place, part, "a part of type text, python or python_output with a text")
        said = whole_unicode(said)
        if kind == "text":
            text += said
            continue
        last = calls[-1] if calls else {}
        if kind == "python_output" and index and content[index - 1].get("type") == "python":
            last["result"] = said
        else:
            calls.append({"start": len(text), "expression": None, "result": None, NANOCHAT_PARTS[kind]: said})
    return text, calls


def calls_in_parts(content: Any, name: str) -> list[dict]:
    """The calls beside the texts of a content's parts. Each text will stand on lines of its own."""
    calls = list[dict]()
    begin = 0
    for index, part in enumerate(content if isinstance(content, list) else ()):
        text = part.get("text") if isinstance(part, dict) else None
        text = text if is_text(text) else ""
        if isinstance(part, dict) and part.get("calculator") is not None:
            own = read_calculations(part["calculator"], whole_unicode(text), f"{name}[{index}].calculator")
            calls += moved(own, begin)
        begin += len(whole_unicode(text)) + 1
    return calls


def with_calculations(message: Message, fields: Mapping, name: str) -> Message:
    """A message of the assistant with its calls, which were beside it or beside the parts of its content."""
    if fields.get("calculator") is not None:
        calls = read_calculations(fields["calculator"], message.content, f"{name}.calculator")
    else:
        calls = calls_in_parts(fields.get("content"), f"{name}.content")
    return replace(message, more=with_calls(message.more or {}, calls) or None) if calls else message


def with_names_read(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages of a request with `skip_special_tokens: false`. If the names of the calculator's tokens
    are in a text of the assistant, they are read as these tokens, unless its calls stand beside the text."""
    read = []
    for message in messages:
        more = message.more or {}
        if message.role == "assistant" and "calculator" not in more:
            message = replace(message, more={**more, "special_tokens": True})
        read.append(message)
    return tuple(read)
