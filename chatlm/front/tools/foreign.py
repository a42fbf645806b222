"""What a tool server may say to us: its messages, reduced to what is used here and held to limits.

These functions run in the event loop for small messages and in a sandbox for large ones (`reading`). What
they return is small or plain text, so nothing that a tool server nests or repeats reaches the event loop.
What is wrong with one tool costs that tool alone; the reason is said beside the list."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

from chatlm.common.jsontext import is_number, strict_json, whole_unicode
from chatlm.front.tools.results import result_of_call
from chatlm.front.tools.transport import Message, ToolError

TOOL_BYTES = 1 << 16     # of a tool: its name, its texts and its schema, as JSON
DEEPEST = 100            # objects and lists of a schema inside each other
TEXT_CHARACTERS = 2_000  # of an error's text
NAME_CHARACTERS = 200
TOO_LARGE = f"it has more than {TOOL_BYTES:,} bytes of texts and schema"
LEFT_OUT = 1_000         # tools of a page that are named with the reason why they are left out


class Unreadable(ToolError):
    """Nobody can say what a message is about, so whoever sent it can't be spoken with any more."""


def messages_in(data: bytes | bytearray, methods: Mapping[int, str], characters: int) -> list[Message]:
    """The messages of a JSON text: one, or a list, as revision 2025-03-26 has it; none if it is anything
    else.

    methods: of the requests whose responses are awaited, by their ids. characters: that the text of a result
    may have. Raises Unreadable for what only looks like a message."""
    try:
        value = json.loads(data)
    except RecursionError:
        raise Unreadable("it wrote a message that is nested too deeply to be read") from None
    except json.JSONDecodeError:
        return []
    except ValueError as error:  # bytes that are no text, or a number of 5,000 digits
        if isinstance(error, UnicodeError):
            return []
        raise Unreadable("it wrote a message with a number that is too long to be read") from None
    values = value if isinstance(value, list) else [value]
    read = (condensed(message, methods, characters) for message in values if isinstance(message, dict))
    return [message for message in read if message is not None]


def condensed(message: Message, methods: Mapping[int, str], characters: int) -> Message | None:
    """A message with only what is used of it. None for the response to a request that nobody awaits.

    A response has `result`, `error`, or, if it can't be used, `failed` with the reason."""
    if isinstance(method := message.get("method"), str):
        return heard(method, message)
    number = id_of(message.get("id"))
    if message.get("error") is not None:
        return {"id": number, "error": error_of(message["error"], characters)}
    read = READERS.get(methods.get(number, "")) if isinstance(number, int) else None
    if read is None:
        return None
    try:
        return {"id": number, "result": read(message.get("result"), characters)}
    except ToolError as error:
        return {"id": number, "failed": str(error), "unknown_outcome": error.unknown_outcome}


def id_of(value: Any) -> int | str | None:
    """The id of a message. Some servers answer number 1 as "1"."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 16:
        return int(value)
    if isinstance(value, str) and len(value) > NAME_CHARACTERS:
        return None
    return value if type(value) is int and abs(value) < 1 << 60 or isinstance(value, str) else None


def heard(method: str, message: Message) -> Message:
    """A notification, or a request, which keeps its id as it is."""
    params = message.get("params")
    params = params if isinstance(params, dict) else {}
    number = message.get("id")
    if type(number) is not int and not isinstance(number, str) or len(str(number)) > NAME_CHARACTERS:
        number = None
    kept: dict[str, Any] = {}
    for name in ("progressToken", "progress", "total"):
        if is_number(params.get(name)) and abs(params[name]) < 1 << 60:
            kept[name] = params[name]
    if isinstance(params.get("message"), str):
        kept["message"] = whole_unicode(params["message"][:500])
    return {"method": method[:NAME_CHARACTERS], "id": number, "params": kept}


def error_of(error: Any, characters: int) -> dict[str, Any]:
    """The `error` of a response, which may be anything."""
    if not isinstance(error, dict):
        return {"code": 0, "message": "an error that is not an object", "supported": []}
    code = error.get("code")
    text = error.get("message")
    if not isinstance(text, str):
        text = "an error without a text"
    most = min(TEXT_CHARACTERS, characters)
    if len(text) > most:
        text = text[:most] + "..."
    data = error.get("data")
    supported = data.get("supported") if isinstance(data, dict) else None
    return {"code": code if type(code) is int and abs(code) < 1 << 31 else 0, "message": whole_unicode(text),
            "supported": short_texts(supported)}


def short_texts(values: Any) -> list[str]:
    """The first texts of what should be a list of short ones."""
    return [value for value in (values if isinstance(values, list) else [])[:100]
            if isinstance(value, str) and len(value) < 100]


# results, by the method that was asked for

def discovery(found: Any, characters: int) -> dict[str, Any]:
    versions = found.get("supportedVersions") if isinstance(found, dict) else None
    return {"supportedVersions": short_texts(versions)}


def greeting(found: Any, characters: int) -> dict[str, Any]:
    version = found.get("protocolVersion") if isinstance(found, dict) else None
    return {"protocolVersion": version if isinstance(version, str) and len(version) < 100 else ""}


def page_of_tools(found: Any, characters: int) -> dict[str, Any]:
    """A page of tools/list. Each tool is a list, as `client.Tool.of` reads it; its schema is JSON text."""
    if not isinstance(found, dict) or not isinstance(found.get("tools"), list):
        raise ToolError("its answer to tools/list has no list of tools")
    tools = []
    left_out = []
    for described in found["tools"]:
        try:
            tools.append(read_tool(described))
        except ToolError as error:
            left_out.append([shown_name(described), str(error)])
    cursor = found.get("nextCursor")
    if cursor is not None and (type(cursor) not in (str, int) or len(str(cursor)) > 10_000):
        raise ToolError("its list of tools goes on with a cursor that is no text")
    ttl_ms = found.get("ttlMs")
    if not isinstance(ttl_ms, (int, float)) or not is_number(ttl_ms) or not 0 <= ttl_ms < 1 << 53:
        ttl_ms = 0
    return {"tools": tools, "left_out": left_out[:LEFT_OUT], "nextCursor": cursor, "ttlMs": ttl_ms}


def call(found: Any, characters: int) -> dict[str, Any]:
    return result_of_call(found, characters).packed


READERS: dict[str, Callable[[Any, int], Any]] = {
    "server/discover": discovery, "initialize": greeting, "tools/list": page_of_tools, "tools/call": call}


# tools

def shown_name(described: Any) -> str:
    name = described.get("name") if isinstance(described, dict) else None
    if not isinstance(name, str) or not name:
        return "a tool without a name"
    return ascii(name[:60])[1:-1] if not name.isprintable() else name[:60]


def read_tool(described: Any) -> list[Any]:
    """[name, title, description, schema as JSON, annotations] of a tool. Raises ToolError for what can't be
    offered, with the reason."""
    if not isinstance(described, dict):
        raise ToolError("it is no object")
    name = described.get("name")
    if not isinstance(name, str) or not name:
        raise ToolError("it has no name")
    if len(name) > NAME_CHARACTERS or not name.isprintable():
        raise ToolError(f"its name is longer than {NAME_CHARACTERS} characters, or has some that can't be "
                        "shown")
    parameters = described.get("inputSchema")
    parameters = usable(parameters) if isinstance(parameters, dict) else {"type": "object"}
    check_shape(parameters)
    if not has_usable_headers(parameters):
        raise ToolError("its schema names a header that no request can have")
    title = text_of(described, "title")
    description = text_of(described, "description")
    try:
        schema = whole_unicode(strict_json(parameters))
    except ValueError:
        raise ToolError("its schema has a number that JSON does not have") from None
    annotations = plain_members(described.get("annotations"))
    size = sum(len(text.encode()) for text in (name, title, description, schema, strict_json(annotations)))
    if size > TOOL_BYTES:
        raise ToolError(TOO_LARGE)
    return [name, title, description, schema, annotations]


def text_of(described: Mapping[str, Any], name: str) -> str:
    value = described.get(name)
    return whole_unicode(value) if isinstance(value, str) else ""


def plain_members(annotations: Any) -> dict[str, Any]:
    """The annotations that are texts, numbers or truths; no other is of use."""
    members = annotations.items() if isinstance(annotations, dict) else ()
    return {whole_unicode(name): whole_unicode(value) if isinstance(value, str) else value
            for name, value in members
            if value is None or isinstance(value, (str, bool)) or is_number(value)}


# members of a schema that some servers write as null, or as something else that no reader expects
EXPECTED = {"properties": dict, "required": list, "$defs": dict, "definitions": dict, "type": (str, list)}


def usable(parameters: dict[str, Any]) -> dict[str, Any]:
    """A schema of parameters without members of a wrong kind at its top."""
    if all(isinstance(parameters[name], kind) for name, kind in EXPECTED.items() if name in parameters):
        return parameters
    return {name: value for name, value in parameters.items()
            if name not in EXPECTED or isinstance(value, EXPECTED[name])}


def check_shape(schema: dict[str, Any]):
    """Raise ToolError for a schema that is nested too deeply, or has more in it than any that fits."""
    level: list[Any] = [schema]
    seen = 0
    for _ in range(DEEPEST + 1):
        level = [*chain.from_iterable(map(children, level))]
        seen += len(level)
        if not level:
            return
        if seen > TOOL_BYTES // 2:
            raise ToolError(TOO_LARGE)
    raise ToolError(f"its schema is nested more than {DEEPEST} deep")


def children(value: Any) -> Iterator[Any]:
    """The objects and lists in a value."""
    inside = value.values() if isinstance(value, dict) else value
    return (child for child in inside if isinstance(child, (dict, list)))


def header_properties(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters whose values a modern HTTP server also wants as headers, with the headers' names."""
    properties = parameters.get("properties")
    if not isinstance(properties, dict):
        return {}
    return {name: schema["x-mcp-header"] for name, schema in properties.items()
            if isinstance(schema, dict) and "x-mcp-header" in schema}


def has_usable_headers(parameters: Mapping[str, Any]) -> bool:
    return all(isinstance(header, str) and 0 < len(header) <= 100 and header.isascii()
               and header.replace("-", "a").isalnum()
               for header in header_properties(parameters).values())
