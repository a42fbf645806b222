"""The records of chats: what kinds there are, which fields they have, and what a change makes of one.

A record belongs to an owner and has an id that a page made up. A change is a patch: fields with new values,
null for a field that goes; or null for a record that is deleted. It says which revision of the record it is
based on.

No clock of a device decides anything. Of a chat, a project and a prompt each field has the value that arrived
last. A node, one message, never changes its place; two edits of its content that knew nothing of each other
are both kept, the later one as its sibling. A deletion beats every later change, so what is deleted never
returns."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from chatlm.common.errors import bad_value
from chatlm.common.jsontext import is_number, is_text

AN_ID = re.compile(r"[0-9a-f]{32}")
A_FILE = re.compile(r"[0-9a-f]{64}")
CHAT, NODE, PROJECT, PROMPT = "chat", "node", "project", "prompt"
KINDS = CHAT, NODE, PROJECT, PROMPT
ROLES = "user", "assistant"


class Rule(NamedTuple):
    """What a field's value must be."""

    allowed: str  # in words
    fits: Callable[[Any], bool]


def is_id(value) -> bool:
    return is_text(value) and bool(AN_ID.fullmatch(value))


def are_calls(value) -> bool:
    return isinstance(value, list) and all(
        isinstance(call, dict) and all(is_text(call.get(name)) for name in ("id", "name", "arguments"))
        and is_text(call.get("result", "")) for call in value)


def are_pictures(value) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, dict) and is_text(each.get("name")) and is_shown(each) for each in value)


def is_shown(picture: Mapping) -> bool:
    """Has it its data, or the name of a file with it?"""
    if "file" in picture:
        name = picture["file"]
        return is_text(name) and bool(A_FILE.fullmatch(name)) and "picture" not in picture
    return is_text(picture.get("picture"))


def are_files(value) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, dict) and is_text(each.get("name")) and is_text(each.get("text")) for each in value)


def are_stores(value) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, dict) and is_text(each.get("id")) and is_text(each.get("name")) for each in value)


A_TEXT = Rule("a string", is_text)
A_TIME = Rule("milliseconds since 1970", lambda value: is_number(value) and 0 < value < 8.64e15)
A_SWITCH = Rule("true or false", lambda value: isinstance(value, bool))
AN_OBJECT = Rule("an object", lambda value: isinstance(value, dict))
ANYTHING = Rule("any value", lambda value: True)
A_LIST = Rule("a list", lambda value: isinstance(value, list))
AN_INTEGER = Rule("an integer", lambda value: type(value) is int)
SOME_IDS = Rule("a list of token ids", lambda value: isinstance(value, list)
                and all(type(each) is int and each >= 0 for each in value))
AN_ID_RULE = Rule("32 hexadecimal digits", is_id)
A_ROLE = Rule('"user" or "assistant"', lambda value: value in ROLES)
SOME_CALLS = Rule("a list of {id, name, arguments, result}", are_calls)
SOME_PICTURES = Rule("a list of {name, picture} or {name, file}", are_pictures)
SOME_FILES = Rule("a list of {name, text}", are_files)
SOME_STORES = Rule("a list of {id, name}", are_stores)
# Those of static/tree.js. A field that is not listed is not kept: `leaf`, where a device looks at, is its own
FIELDS: dict[str, dict[str, Rule]] = {
    CHAT: {"created": A_TIME, "updated": A_TIME, "title": A_TEXT, "pinned": A_SWITCH, "system": A_TEXT,
           "parameters": AN_OBJECT, "model": A_TEXT, "inTurns": A_SWITCH, "project": AN_ID_RULE,
           "stores": SOME_STORES},
    NODE: {"created": A_TIME, "conversation": AN_ID_RULE, "parent": AN_ID_RULE, "role": A_ROLE,
           "content": A_TEXT, "reasoning": A_TEXT, "model": A_TEXT, "weights": A_TEXT, "system": A_TEXT,
           "parameters": AN_OBJECT, "seed": AN_INTEGER, "prefix": SOME_IDS, "ids": SOME_IDS,
           "thought": ANYTHING, "remedy": ANYTHING, "earlier": AN_OBJECT, "continued": A_SWITCH,
           "calls": SOME_CALLS, "calculator": A_LIST, "timings": AN_OBJECT, "note": A_TEXT,
           "error": A_TEXT, "edited": A_SWITCH, "attachments": A_LIST, "pictures": SOME_PICTURES,
           "knowledge": AN_OBJECT, "stream": AN_OBJECT, "begin": AN_INTEGER, "ended": A_TEXT},
    PROJECT: {"created": A_TIME, "name": A_TEXT, "prompt": A_TEXT, "files": SOME_FILES,
              "stores": SOME_STORES},
    PROMPT: {"created": A_TIME, "name": A_TEXT, "text": A_TEXT, "starter": A_SWITCH},
}
NEEDED = {CHAT: ("created",), NODE: ("created", "conversation", "role", "content"),
          PROJECT: ("created", "name"), PROMPT: ("created", "name", "text")}
PLACE = "created", "conversation", "parent", "role"  # of a node, for ever


class Change(NamedTuple):
    """What a device asks for."""

    kind: str
    id: str
    base: int              # the revision of the record that the device knew; 0: none
    patch: dict | None     # None: delete it


def read_change(value) -> Change:
    """A change of a body, checked. Raises RequestError."""
    if not isinstance(value, dict):
        raise bad_value("change", value, "an object")
    kind = value.get("kind")
    if kind not in KINDS:
        raise bad_value("kind", kind, " or ".join(f'"{name}"' for name in KINDS))
    if not is_id(value.get("id")):
        raise bad_value("id", value.get("id"), AN_ID_RULE.allowed)
    base = value.get("base", 0)
    if type(base) is not int or not 0 <= base < 2**53:
        raise bad_value("base", base, "the revision of the record that you knew, 0 for none")
    if "patch" not in value or not isinstance(value["patch"], (dict, type(None))):
        raise bad_value("patch", value.get("patch"), "an object, or null to delete the record")
    patch = value["patch"]
    return Change(kind, value["id"], base, None if patch is None else checked_patch(kind, patch))


def checked_patch(kind: str, patch: Mapping) -> dict:
    """The fields of a patch that are kept. Raises RequestError for a value that does not fit its field."""
    checked = {}
    for name, rule in FIELDS[kind].items():
        if name not in patch:
            continue
        value = patch[name]
        if value is not None and not rule.fits(value):
            raise bad_value(name, value, rule.allowed)
        checked[name] = value
    return checked


def patched(body: Mapping, patch: Mapping) -> dict:
    """A record with a patch: null removes a field."""
    return {name: value for name, value in {**body, **patch}.items() if value is not None}


def missing_in(kind: str, body: Mapping) -> str:
    """The first field that a new record lacks; "": none."""
    return next((name for name in NEEDED[kind] if name not in body), "")


def moved_in(body: Mapping, patch: Mapping) -> str:
    """The first field of a node's place that a patch would change; "": none."""
    return next((name for name in PLACE if name in patch and patch[name] != body.get(name)), "")


def is_late(body: Mapping, patch: Mapping) -> bool:
    """Has what a patch says of an answer that grows been overtaken? By what is stored, or by its end."""
    stream = patch.get("stream")
    if not stream:
        return False
    if stream.get("id") == body.get("ended"):
        return True
    stored = body.get("stream") or {}
    return stored.get("id") == stream.get("id") and is_number(stored.get("next")) and (
        not is_number(stream.get("next")) or stream["next"] < stored["next"])


# What is said of an answer by whoever has read it
OF_ANSWER = ("content", "reasoning", "ids", "calculator", "calls", "stream", "note", "error", "remedy")


def goes_as_far(body: Mapping, other: Mapping) -> bool:
    """Has one record of an answer all of the text that another has?"""
    return all((body.get(name) or "").startswith(other.get(name) or "") for name in ("content", "reasoning"))


def is_same_end(body: Mapping, patch: Mapping) -> bool:
    """Do both say how one answer has ended? Two devices may have read it, and the server itself. One that
    goes on has a new stream."""
    return bool(patch.get("ended")) and patch["ended"] == body.get("ended") and not patch.get("stream")


def call_counts(body: Mapping) -> tuple[int, int]:
    """(calls, those that have results)."""
    calls = body.get("calls") or ()
    return len(calls), sum("result" in call for call in calls)


def joined_end(body: Mapping, patch: Mapping) -> dict:
    """A patch that says how an answer has ended, of which as much is stored: what it adds."""
    added = {name: value for name, value in patch.items() if name not in OF_ANSWER}
    if "calls" in patch and call_counts(patch) >= call_counts(body):
        added["calls"] = patch["calls"]  # the reader's device has run them
    if "timings" in patch:
        added["timings"] = {**(patch["timings"] or {}), **body.get("timings", {})}
    return added


def sibling_of(change: Change, content: str) -> str:
    """The id of the node that keeps an edit beside another one: the same whenever it is asked again."""
    return hashlib.blake2b(f"{change.id} {change.base} {content}".encode(), digest_size=16).hexdigest()


def searched_text(kind: str, body: Mapping) -> str:
    """What a search finds a record by, folded as the page folds it."""
    return body.get("title" if kind == CHAT else "content", "").lower() if kind in (CHAT, NODE) else ""
