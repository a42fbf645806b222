"""Fields of request bodies: types, checks, error texts, their JSON schema."""

from __future__ import annotations

import itertools
import json
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence as Seq
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.common.errors import RequestError, bad_value, invalid, shown
from chatlm.common.jsontext import JSON_TYPES, is_number, is_text, whole_unicode

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import Known, ParsedBody


def matches(schema: Mapping, value) -> bool:
    """Does a JSON value match a schema? Covers the part of JSON Schema that the tables of fields use."""
    if not schema:  # allows anything, at any depth
        return True
    types = schema.get("type", list(JSON_TYPES))
    if not any(JSON_TYPES[name](value) for name in ([types] if is_text(types) else types)):
        return False
    if "enum" in schema and not any(type(option) is type(value) and option == value
                                    for option in schema["enum"]):
        return False
    if "anyOf" in schema and not any(matches(option, value) for option in schema["anyOf"]):
        return False
    if is_text(value):
        return len(value) <= schema.get("maxLength", len(value))
    if isinstance(value, list):
        right_length = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return right_length and all_match(schema.get("items", {}), value)
    if isinstance(value, dict):
        known, names, others = (schema.get(key, {})
                                for key in ("properties", "propertyNames", "additionalProperties"))
        known_size = (len(value) <= schema.get("maxProperties", len(value))
                      and set(schema.get("required", ())) <= value.keys())
        return known_size and all(
            re.search(names.get("pattern", ""), name) and matches(known.get(name, others), member)
            for name, member in value.items())
    return not is_number(value) or schema.get("minimum", value) <= value <= schema.get("maximum", value)


def all_match(schema: Mapping, values: list) -> bool:
    if schema is A_TOKEN or schema is TEXT_OR_TOKEN:  # fast path: such lists are long
        return all(type(value) is int and 0 <= value < 2**31
                   or type(value) is str and schema is TEXT_OR_TOKEN for value in values)
    return all(matches(schema, value) for value in values)


class FieldType(NamedTuple):
    """What a field may hold: the source of its check, its error texts and its entry in /openapi.json."""

    allowed: str                                      # for error texts
    schema: dict
    convert: Callable[[Any], Any] = lambda value: value  # makes ours of a value that matches the schema
    details: dict = {}  # more schema, checked elsewhere with better errors


# Says of a body that was read, for a model, whether a field has no effect on the answer (idle.py)
Idle = Callable[["ParsedBody", "Known"], bool]
NO_IDLE: Mapping[str, Idle] = types.MappingProxyType({})
ABSENT: Any = object()


class Field(NamedTuple):
    """One field of a request body. null means absent."""

    name: str
    type: FieldType
    doc: str
    low: float = -math.inf
    high: float = math.inf
    clamp: bool = False  # out of range: use the nearest bound instead of refusing
    required: bool = False
    means: str = ""      # the field of Chat Completions that this one is called here
    fills: str = ""      # "params" or "request": the object that has its value, under the name that it means
    group: str = ""      # of fields that their readers treat alike
    idle: Mapping[str, Idle] = NO_IDLE  # when its members have no effect; "": it itself
    repeated: Any = ABSENT  # it comes back in the response; this is what comes where it is absent

    @property
    def schema(self) -> dict:
        bounds = {} if self.clamp or self.low == -math.inf else {"minimum": self.low, "maximum": self.high}
        return self.type.schema | {name: bound for name, bound in bounds.items() if bound < math.inf}

    @property
    def members(self) -> Mapping:
        """The members of an object that are read; empty if all are."""
        return (self.type.schema | self.type.details).get("properties", {})

    @property
    def described(self) -> dict:
        """For /openapi.json."""
        or_null = [] if self.required else [{"type": "null"}]
        return {"description": self.doc, "anyOf": [self.schema | self.type.details, *or_null]}

    @property
    def bounds(self) -> str:
        """In words, exact to the last digit."""
        low, high = (str(int(bound)) if bound < math.inf and bound % 1 == 0 else f"{bound:g}"
                     for bound in (self.low, self.high))
        return f" from {low} to {high}" if self.high < math.inf else f" of at least {low}"

    def read(self, value):
        schema = self.schema
        if not matches(schema, value):
            bounds = self.bounds if "minimum" in schema else ""
            raise bad_value(self.name, value, self.type.allowed + bounds)
        return self.type.convert(min(max(value, self.low), self.high) if self.clamp else value)


def refused(reason: str) -> FieldType:
    """A field that no request may have."""
    return FieldType(f"left out: {reason}", {"enum": [None]})


def as_count(value: float) -> int:
    """A whole number; beyond 2**53 the exact value makes no difference to any answer."""
    return min(int(value), 2**53)


def listed(value) -> list:
    """A single string becomes a list of one; strings become whole Unicode."""
    return [whole_unicode(part) if is_text(part) else part for part in ([value] if is_text(value) else value)]


def prompt_list(value) -> tuple[str | tuple[int, ...], ...]:
    """Like `listed`; a single list of token ids becomes a list of one too."""
    prompts = [value] if type(value[0] if value else "") is int else listed(value)
    return tuple(prompt if is_text(prompt) else tuple(prompt) for prompt in prompts)


class ToolChoice(NamedTuple):
    """Whether the model calls functions, and which it may."""

    mode: str = "auto"                    # or none, required
    names: tuple[str | None, ...] | None = None  # None: all
    parallel: bool | None = None          # several calls, if it requires calls? None: it does not say


def tool_name(tool: dict) -> str | None:
    return tool["name"] if "name" in tool else tool.get("function", {}).get("name")


def read_choice(value: str | dict, inside: str = "") -> ToolChoice:
    """tool_choice of any API, in which allowed_tools are the object itself or its member `inside`. To choose
    a tool that is ignored (see ParsedBody.ignored_tools) is no choice."""
    if is_text(value):
        return ToolChoice(value)
    choice_type = value.get("type", "function")
    if choice_type == "allowed_tools":
        allowed = value[inside] if inside else value
        functions = [tool for tool in allowed["tools"] if tool.get("type") in ("function", None)]
        return ToolChoice(allowed["mode"], tuple(filter(None, map(tool_name, functions))))
    if choice_type in ("function", "tool"):
        return ToolChoice("required", (tool_name(value),), parallel=False)
    mode = {"any": "required", "none": "none"}.get(choice_type, "auto")
    one_call = value.get("disable_parallel_tool_use")
    return ToolChoice(mode, parallel=None if one_call is None else one_call is False)


def known_tools(tools: Seq[dict], types: Seq[str | None],
                schema: str) -> tuple[tuple[dict, ...], tuple[str, ...]]:
    """The functions among tools, as Chat Completions has them, and the types of the others.

    Functions are of these `types`, and their parameters are in the member `schema`."""
    functions = []
    others = []
    for index, tool in enumerate(tools):
        if tool.get("type") not in types:
            others.append(str(tool["type"]))
            continue
        function = {"name": tool.get("name"), "description": tool.get("description"),
                    "parameters": tool.get(schema), "strict": tool.get("strict") or None}
        functions.append({"type": "function", "function": {
            name: value for name, value in function.items() if value is not None}})
        if not matches(A_FUNCTION, functions[-1]):
            raise bad_value(f"tools[{index}]", tool, f"an object with a name and {schema}, an object")
    return tuple(functions), header_words(others)


def names_in(fields: Iterable[Field], group: str) -> tuple[str, ...]:
    """The names of the fields of a group."""
    return tuple(field.name for field in fields if field.group == group)


def without(fields: Iterable[Field], *others: Field) -> tuple[Field, ...]:
    """Fields but for those with the names of others."""
    names = {field.name for field in others}
    return tuple(field for field in fields if field.name not in names)


def member_of(body: Mapping, path: str):
    """The value at a path like `reasoning.effort` in a body; None if there is none."""
    value = body
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def header_words(names: Iterable[str]) -> tuple[str, ...]:
    """Names chosen by clients, made safe for a header: each once, and not too many."""
    words = (re.sub(r"[^A-Za-z0-9_.-]", "", name[:200])[:60] for name in itertools.islice(names, 64))
    return tuple(dict.fromkeys(filter(None, words)))


def list_schema(items: Mapping, **limits: int) -> dict:
    return {"type": "array", "items": items, **limits}


def object_schema(required: Seq[str], **properties: dict) -> dict:
    return {"type": "object", "required": required, "properties": properties}


A_TEXT = {"type": "string"}
TEXT_OR_NULL = {"type": ["string", "null"]}
A_TOKEN = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
TEXT_OR_TOKEN = {"anyOf": [A_TEXT, A_TOKEN]}
A_FUNCTION = object_schema(
    ["function"], function=object_schema(["name"], name=A_TEXT, parameters={"type": ["object", "null"]}))


def json_object(raw: bytes | bytearray) -> dict:
    try:
        body = json.loads(raw.decode("utf-8-sig"))
    except RecursionError:
        raise RequestError("the body is not valid JSON: nested too deeply") from None
    except ValueError as error:  # not UTF-8, not JSON, or a number of 5,000 digits
        raise RequestError(f"the body is not valid JSON: {str(error).split(';')[0]}") from None
    if not isinstance(body, dict):
        raise RequestError(f"the body must be a JSON object, not {shown(body)}")
    return body


def parse_fields(body: dict, fields: Seq[Field]) -> dict:
    """The checked values of the fields that are set, by name; unknown fields are ignored."""
    if missing := [field.name for field in fields if field.required and body.get(field.name) is None]:
        raise RequestError(f"{missing[0]} is missing", code="missing_required_parameter", param=missing[0])
    return {field.means or field.name: field.read(body[field.name])
            for field in fields if body.get(field.name) is not None}


def within_limit(what: str, count: int, limit: int, param: str):
    if count > limit:
        raise RequestError(f"{what}: {count} given, at most {limit} allowed",
                           code="limit_exceeded", param=param)


def functions_among(tools: Seq[dict]) -> tuple[tuple[dict, ...], tuple[str, ...]]:
    """The functions among tools of Chat Completions, and the types of the others."""
    functions = []
    others = []
    for index, tool in enumerate(tools):
        if matches(A_FUNCTION, tool):
            functions.append(tool)
        elif tool["type"] == "function":
            raise bad_value(f"tools[{index}]", tool,
                            'an object with a function: {"name", "description", "parameters"}')
        else:
            others.append(tool["type"])
    return tuple(functions), header_words(others)


def no_tools(param: str) -> RequestError:
    return RequestError("this model cannot call functions: leave out tools, tool_choice and messages about "
                        "calls, or send tool_choice \"none\"",
                        code="tools_not_supported", param=param)


def allowed_tools(tools: Seq[dict], choice: ToolChoice) -> tuple[dict, ...]:
    """The tools that may be called; RequestError if the choice names others, or requires a call of none."""
    names = [tool["function"]["name"] for tool in tools]
    if strange := [name for name in choice.names or () if name not in names]:
        raise invalid("tool_choice", f"tool_choice names {shown(strange[0])}, which is not in tools")
    allowed = tuple(tool for tool, name in zip(tools, names) if choice.names is None or name in choice.names)
    if choice.mode == "required" and not allowed:
        raise invalid("tool_choice", "tool_choice requires a call, but there are no tools")
    return allowed
