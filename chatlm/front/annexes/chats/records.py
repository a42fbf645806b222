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
import unicodedata
from collections.abc import Callable, Mapping, Sequence as Seq
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

from chatlm.common.errors import RequestError, bad_value
from chatlm.common.jsontext import as_json, is_number, is_text, whole_unicode
from chatlm.common.text.calculations import STRAY_MARKS
from chatlm.front.annexes.chats.record_fields import Fields

AN_ID = re.compile(r"[0-9a-f]{32}")
A_FILE = re.compile(r"[0-9a-f]{64}")
A_PICTURE = re.compile(r"data:image/[a-z+.-]+;base64,[A-Za-z0-9+/=]+")
CHAT, NODE, PROJECT, PROMPT = "chat", "node", "project", "prompt"
KINDS = CHAT, NODE, PROJECT, PROMPT
ROLES = "user", "assistant"
RECORD_BYTES = 4 << 20   # of a record
LINE_BYTES = 64 << 10    # of a short text
DETAILS_BYTES = 512 << 10
TEXT_BYTES = 3 << 20     # of a message: a document of LIMITS.extracted_characters fits
MOST_PICTURES = 50       # of a message
LONGEST_WORD = 100       # characters of a word that a search looks for
PIECE = 1 << 15          # characters of a piece of a text that is searched


Check: TypeAlias = Callable[[Any], bool]


class Rule(NamedTuple):
    """What a field's value must be."""

    allowed: str  # in words
    fits: Check
    most_bytes: int = DETAILS_BYTES  # of its JSON


def is_id(value) -> bool:
    return is_text(value) and bool(AN_ID.fullmatch(value))


def is_count(value) -> bool:
    return type(value) is int and 0 <= value < 2**53


def is_integer(value) -> bool:
    return type(value) is int and abs(value) < 2**53


def is_time(value) -> bool:
    return is_number(value) and 0 < value < 8.64e15


def is_fact(value) -> bool:
    return value is None or isinstance(value, (str, bool)) or is_number(value)


def are_facts(value) -> bool:
    return isinstance(value, dict) and all(map(is_fact, value.values()))


def are_timings(value) -> bool:
    return isinstance(value, dict) and all(are_drafts(each) if name == "drafts" else is_fact(each)
                                           for name, each in value.items())


def are_drafts(value) -> bool:
    return isinstance(value, dict) and all(map(are_facts, value.values()))


def list_of(fits: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def may_lack(fits: Check) -> Check:
    return lambda value: value is None or fits(value)


def with_members(**members: Check) -> Check:
    """Is it an object whose members fit? It may have others."""
    return lambda value: isinstance(value, dict) and all(
        fits(value.get(name)) for name, fits in members.items())


is_call = with_members(
    id=is_text, name=is_text, arguments=is_text, result=may_lack(is_text), server=may_lack(is_text),
    tool=may_lack(is_text), about=may_lack(is_text), digest=may_lack(is_text), begun=may_lack(is_time),
    ms=may_lack(is_number), cut=may_lack(is_count),
    images=may_lack(list_of(with_members(mime_type=is_text, data=is_text))))
is_passage = with_members(
    index=is_count, vector_store_id=is_text, file_id=is_text, filename=is_text, page=may_lack(is_count),
    heading=may_lack(is_text), start=is_count)
is_knowledge = with_members(
    read=may_lack(is_count), of=may_lack(is_count), passages=may_lack(list_of(is_passage)),
    text=may_lack(is_text))
PARAMETERS = {"tools": list_of(with_members(function=lambda value: isinstance(value, dict))),
              "response_format": lambda value: isinstance(value, dict), "stop": list_of(is_text)}


def are_parameters(value) -> bool:
    return isinstance(value, dict) and all(
        each is None or PARAMETERS.get(name, is_fact)(each) for name, each in value.items())


def are_calculations(value) -> bool:
    """Are these calls of the calculator, as static/calculator.js has them, in the order of their places?"""
    return isinstance(value, list) and all(map(is_calculation, value)) and all(
        earlier["start"] <= later["start"] for earlier, later in pairwise(value))


def is_calculation(call) -> bool:
    if not isinstance(call, dict) or not is_count(call.get("start")):
        return False
    if "stray" in call:
        return call["stray"] in STRAY_MARKS
    written = [call.get("expression"), call.get("result")]
    return (all(each is None or is_text(each) for each in written) and any(map(is_text, written))
            and call.get("cut", True) is True)


def are_pictures(value) -> bool:
    return isinstance(value, list) and len(value) <= MOST_PICTURES and all(
        isinstance(each, dict) and is_text(each.get("name")) and is_shown(each) for each in value)


def is_shown(picture: Mapping) -> bool:
    """Has it its data, or the name of a file with it?"""
    if "file" in picture:
        name = picture["file"]
        return is_text(name) and bool(A_FILE.fullmatch(name)) and "picture" not in picture
    data = picture.get("picture")
    return is_text(data) and bool(A_PICTURE.fullmatch(data))


A_LINE = Rule("a string", is_text, LINE_BYTES)
A_TEXT = Rule("a string", is_text, TEXT_BYTES)
A_TIME = Rule("milliseconds since 1970", is_time)
A_SWITCH = Rule("true or false", lambda value: isinstance(value, bool))
A_NUMBER = Rule("a number", is_number)
AN_INTEGER = Rule("an integer", is_integer)
SOME_TIMINGS = Rule("an object of numbers, texts, true and false, and `drafts` with such an object for each "
                    "source of drafts", are_timings)
SOME_PARAMETERS = Rule("an object of parameters: numbers, texts, a list `stop` of texts, a list `tools` of "
                       "{function}, an object `response_format`", are_parameters)
SOME_IDS = Rule("a list of token ids", list_of(is_count))
AN_ID_RULE = Rule("32 hexadecimal digits", is_id)
A_ROLE = Rule('"user" or "assistant"', lambda value: value in ROLES)
SOME_CALLS = Rule("a list of {id, name, arguments, result}", list_of(is_call))
SOME_CALCULATIONS = Rule("a list of {start, expression, result}, in the order of `start`", are_calculations)
SOME_ATTACHMENTS = Rule("a list of {name, at, length}", list_of(with_members(
    name=is_text, at=is_count, length=is_count)))
A_STREAM = Rule("{id, next}", with_members(id=is_text, next=may_lack(is_number), begin=may_lack(is_count)))
SOME_PICTURES = Rule(f"a list of at most {MOST_PICTURES} of {{name, picture}}, a data URI of an image, or "
                     "{name, file}", are_pictures, RECORD_BYTES)
SOME_FILES = Rule("a list of {name, text}", list_of(with_members(name=is_text, text=is_text)), RECORD_BYTES)
SOME_KNOWLEDGE = Rule("{read, of, passages}, as answers have it", is_knowledge, TEXT_BYTES)
A_SEARCH = Rule("{max_num_results, score_threshold}", with_members(
    max_num_results=may_lack(is_count), score_threshold=may_lack(is_number)), LINE_BYTES)
SOME_TOOLS = Rule("a list of names", list_of(is_text), LINE_BYTES)
SOME_STORES = Rule("a list of {id, name}", list_of(with_members(id=is_text, name=is_text)))
# Those of static/fields.js: a page relies on what they are. A field that is not listed is not kept: `leaf`,
# where a device looks at, is its own
FIELDS: dict[str, dict[str, Rule]] = {
    CHAT: {"created": A_TIME, "updated": A_TIME, "title": A_LINE, "pinned": A_SWITCH, "system": A_TEXT,
           "parameters": SOME_PARAMETERS, "model": A_LINE, "inTurns": A_SWITCH, "project": AN_ID_RULE,
           "stores": SOME_STORES, "search": A_SEARCH},
    NODE: {"created": A_TIME, "conversation": AN_ID_RULE, "parent": AN_ID_RULE, "role": A_ROLE,
           "content": A_TEXT, "reasoning": A_TEXT, "model": A_LINE, "weights": A_LINE, "system": A_TEXT,
           "parameters": SOME_PARAMETERS, "seed": AN_INTEGER, "prefix": SOME_IDS, "ids": SOME_IDS,
           "thought": A_NUMBER, "remedy": A_LINE, "earlier": SOME_TIMINGS, "continued": A_SWITCH,
           "calls": SOME_CALLS, "calculator": SOME_CALCULATIONS, "timings": SOME_TIMINGS, "note": A_LINE,
           "error": A_LINE, "edited": A_SWITCH, "attachments": SOME_ATTACHMENTS, "pictures": SOME_PICTURES,
           "knowledge": SOME_KNOWLEDGE, "tools": SOME_TOOLS, "stream": A_STREAM, "ended": A_LINE,
           "response": A_LINE},
    PROJECT: {"created": A_TIME, "name": A_LINE, "prompt": A_TEXT, "files": SOME_FILES,
              "stores": SOME_STORES},
    PROMPT: {"created": A_TIME, "name": A_LINE, "text": A_TEXT, "starter": A_SWITCH},
}
NEEDED = {CHAT: ("created",), NODE: ("created", "conversation", "role", "content"),
          PROJECT: ("created", "name"), PROMPT: ("created", "name", "text")}
PLACE = "created", "conversation", "parent", "role"  # of a node, for ever


class Change(NamedTuple):
    """What a device asks for. Not a clock of its own, but `base` says what it knew."""

    kind: str
    id: str
    base: int                # the revision of the record that the device knew; 0: none
    patch: Fields | None     # None: delete it
    words: Seq[str] = ()     # the pieces of its text that is searched, if the patch has that


def change_of(kind: str, name: str, base: int, values: Mapping[str, Any]) -> Change:
    """A change that gives fields these values."""
    texts = {each: whole_unicode(as_json(value)) for each, value in values.items()}
    return Change(kind, name, base, Fields(texts), searched_pieces(kind, values))


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
    if value["patch"] is None:
        return Change(kind, value["id"], base, None)
    change = change_of(kind, value["id"], base, checked_patch(kind, value["patch"]))
    check_sizes(change)
    return change


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


def check_sizes(change: Change):
    """Raises RequestError for a patch with a field that is too large."""
    assert change.patch is not None
    for name, text in change.patch.texts.items():
        most = FIELDS[change.kind][name].most_bytes
        if len(text) > most or len(text.encode()) > most:
            raise RequestError(f"{name} may have {most:,} bytes", code="too_large", param=name)


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
ANSWER_TEXTS = "content", "reasoning"
OF_ANSWER = ("content", "reasoning", "ids", "calculator", "calls", "stream", "note", "error", "remedy")


def goes_as_far(body: Mapping, other: Mapping) -> bool:
    """Has one record of an answer all of the text that another has?"""
    return all((body.get(name) or "").startswith(other.get(name) or "") for name in ANSWER_TEXTS)


def is_same_end(body: Mapping, patch: Mapping) -> bool:
    """Do both say how one answer has ended? Two devices may have read it, and the server itself. One that
    goes on has a new stream."""
    return bool(patch.get("ended")) and patch["ended"] == body.get("ended") and not patch.get("stream")


def call_counts(body: Mapping) -> tuple[int, int]:
    """(calls, those that have results)."""
    calls = body.get("calls") or ()
    return len(calls), sum("result" in call for call in calls)


def joined_end(body: Mapping, patch: Fields) -> dict[str, str]:
    """What a patch that says how an answer has ended, of which as much is stored, adds: texts of fields."""
    added = {name: text for name, text in patch.texts.items() if name not in OF_ANSWER}
    if "calls" in patch and call_counts(patch) >= call_counts(body):
        added["calls"] = patch.texts["calls"]  # the reader's device has run them
    if "timings" in patch:
        added["timings"] = as_json({**(patch["timings"] or {}), **body.get("timings", {})})
    return added


def sibling_of(change: Change, content: str) -> str:
    """The id of the node that keeps an edit beside another one: the same whenever it is asked again."""
    return hashlib.blake2b(f"{change.id} {change.base} {content}".encode(), digest_size=16).hexdigest()


def folded(text: str) -> str:
    """A text as searches compare it, with as many characters as its form NFC has: the page folds alike
    (static/chats.js)."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFC", text).replace("İ", "i").lower().replace("ς", "σ")


def searched_pieces(kind: str, values: Mapping[str, Any]) -> list[str]:
    """What a search finds a record by, in pieces, so that looking at one takes no time. A word that begins
    near the end of one is also in the next."""
    name = {CHAT: "title", NODE: "content"}.get(kind, "")
    text = folded(whole_unicode(values.get(name) or ""))
    return [text[begin:begin + PIECE + LONGEST_WORD] for begin in range(0, len(text), PIECE)]
