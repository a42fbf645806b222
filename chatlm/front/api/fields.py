"""Fields of request bodies: their types, checks, error texts and JSON schema."""

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
        return object_matches(schema, value)
    return not is_number(value) or schema.get("minimum", value) <= value <= schema.get("maximum", value)


def object_matches(schema: Mapping, value: dict) -> bool:
    """Do the number, names and values of an object's members match?"""
    if len(value) > schema.get("maxProperties", len(value)):
        return False
    if not set(schema.get("required", ())) <= value.keys():
        return False
    properties = schema.get("properties", {})
    others = schema.get("additionalProperties", {})
    pattern = schema.get("propertyNames", {}).get("pattern", "")
    return all(re.search(pattern, name) and matches(properties.get(name, others), member)
               for name, member in value.items())


def without_nulls(schema: Mapping, value: Any) -> Any:
    """A value without the members that are null where a schema names them and lets them be absent."""
    if isinstance(value, list):
        items = schema.get("items", {})
        return [without_nulls(items, item) for item in value] if items else value
    if not isinstance(value, dict):
        return value
    for option in schema.get("anyOf", ()):
        value = without_nulls(option, value)
    properties = schema.get("properties", {})
    required = schema.get("required", ())
    return {name: without_nulls(properties.get(name, {}), member) for name, member in value.items()
            if member is not None or name not in properties or name in required}


def all_match(schema: Mapping, values: list) -> bool:
    if schema is A_TOKEN or schema is TEXT_OR_TOKEN:  # fast path: such lists are long
        return all(type(value) is int and 0 <= value < 2**31
                   or type(value) is str and schema is TEXT_OR_TOKEN for value in values)
    return all(matches(schema, value) for value in values)


class FieldType(NamedTuple):
    """What a field may hold. Its check, its error texts and its entry in /openapi.json all come from here."""

    allowed: str                                         # in words, for error texts
    schema: dict
    convert: Callable[[Any], Any] = lambda value: value  # turns a value that matches the schema into ours
    details: dict = {}                                   # more schema; readers check it with better errors


# Does a field have no effect on the answer, given the body that was read and its model? (idle.py)
Idle = Callable[["ParsedBody", "Known"], bool]
NO_IDLE: Mapping[str, Idle] = types.MappingProxyType({})
ABSENT: Any = object()


class Field(NamedTuple):
    """One field of a request body. A value of null means that it is absent, also of what is in it."""

    name: str
    type: FieldType
    doc: str
    low: float = -math.inf
    high: float = math.inf
    clamp: bool = False  # out of range: use the nearest bound instead of refusing
    required: bool = False
    means: str = ""      # the field of Chat Completions with the same meaning, if its name is another
    fills: str = ""      # "params" or "request": which object gets the value, under the name that it means
    group: str = ""      # fields of one group are treated alike by their readers
    idle: Mapping[str, Idle] = NO_IDLE  # member -> when it has no effect; "": the field itself
    cleared: Any = ABSENT  # of an update: if set, null has this effect, which takes the value away
    repeated: Any = ABSENT  # if set, the response repeats the field; this is its value if it is absent

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
        """Its entry in /openapi.json."""
        or_null = [] if self.required else [{"type": "null"}]
        return {"description": self.doc, "anyOf": [self.schema | self.type.details, *or_null]}

    @property
    def bounds(self) -> str:
        """Its range in words, exact to the last digit."""
        low, high = map(bound_in_words, (self.low, self.high))
        return f" from {low} to {high}" if self.high < math.inf else f" of at least {low}"

    def read(self, value):
        """The value as the program uses it. Raises RequestError if it is not allowed."""
        schema = self.schema
        if not matches(schema, value):
            value = without_nulls(schema, value)
        if not matches(schema, value):
            bounds = self.bounds if "minimum" in schema else ""
            raise bad_value(self.name, value, self.type.allowed + bounds)
        if self.clamp:
            value = min(max(value, self.low), self.high)
        return self.type.convert(value)


def bound_in_words(bound: float) -> str:
    return str(int(bound)) if bound < math.inf and bound % 1 == 0 else f"{bound:g}"


def refused_field(reason: str) -> FieldType:
    """The type of a field that no request may have."""
    return FieldType(f"left out: {reason}", {"enum": [None]})


def as_count(value: float) -> int:
    """A whole number. Beyond 2**53 the exact value makes no difference to any answer."""
    return min(int(value), 2**53)


def as_list(value) -> list:
    """A list, in which strings are whole Unicode. A single string becomes a list of one."""
    values = [value] if is_text(value) else value
    return [whole_unicode(part) if is_text(part) else part for part in values]


def as_prompts(value) -> tuple[str | tuple[int, ...], ...]:
    """Texts and lists of token ids. A single one of either becomes a tuple of one."""
    are_ids = bool(value) and type(value[0]) is int
    prompts = [value] if are_ids else as_list(value)
    return tuple(prompt if is_text(prompt) else tuple(prompt) for prompt in prompts)


class ToolChoice(NamedTuple):
    """Whether the model calls functions, and which ones it may call."""

    mode: str = "auto"                           # or none, required
    names: tuple[str | None, ...] | None = None  # None: all
    parallel: bool | None = None                 # may a required call be several? None: it does not say


def tool_name(tool: dict) -> str | None:
    return tool["name"] if "name" in tool else tool.get("function", {}).get("name")


def read_choice(value: str | dict, inside: str = "") -> ToolChoice:
    """Read tool_choice, as any API has it. Choosing a tool that is ignored (see ParsedBody.ignored_tools) is
    no choice.

    inside: the member that has allowed_tools; "": they are the object itself."""
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


def flat_functions_among(tools: Seq[dict], types: Seq[str | None], schema: str,
                         param: str = "tools") -> tuple[tuple[dict, ...], tuple[str, ...]]:
    """The functions among tools, in the form of Chat Completions, and the types of the other tools.

    types: those of functions. schema: the member that has a function's parameters. param: where they are."""
    functions = []
    others = []
    for index, tool in enumerate(tools):
        if tool.get("type") not in types:
            others.append(str(tool["type"]))
            continue
        members = {"name": tool.get("name"), "description": tool.get("description"),
                   "parameters": tool.get(schema), "strict": tool.get("strict") or None}
        function = {"type": "function", "function": known_members(members)}
        if not matches(A_FUNCTION, function):
            raise bad_value(f"{param}[{index}]", tool, f"an object with a name and {schema}, an object")
        if tool.get("defer_loading") is True:
            function["defer_loading"] = True
        functions.append(function)
    return tuple(functions), header_words(others)


def known_members(value: Mapping) -> dict:
    """An object without the members that are null."""
    return {name: member for name, member in value.items() if member is not None}


def functions_among(tools: Seq[dict]) -> tuple[tuple[dict, ...], tuple[str, ...]]:
    """The functions among tools of Chat Completions, and the types of the other tools."""
    functions = []
    others = []
    for index, tool in enumerate(tools):
        if matches(A_FUNCTION, tool):
            functions.append(known_members(tool) | {"function": known_members(tool["function"])})
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
    """The tools that may be called. Raises RequestError if the choice names others, or if it requires a call
    and there are none."""
    known = {tool["function"]["name"] for tool in tools}
    for name in choice.names or ():
        if name not in known:
            raise invalid("tool_choice", f"tool_choice names {shown(name)}, which is not in tools")
    names = known if choice.names is None else {*choice.names}
    allowed = tuple(tool for tool in tools if tool["function"]["name"] in names)
    if choice.mode == "required" and not allowed:
        raise invalid("tool_choice", "tool_choice requires a call, but there are no tools")
    return allowed


def names_in(fields: Iterable[Field], group: str) -> tuple[str, ...]:
    """The names of the fields of a group."""
    return tuple(field.name for field in fields if field.group == group)


def without(fields: Iterable[Field], *others: Field) -> tuple[Field, ...]:
    """The fields, except those that have the name of one of the others."""
    names = {field.name for field in others}
    return tuple(field for field in fields if field.name not in names)


def value_at(body: Mapping, path: str):
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


A_TEXT, TEXT_OR_NULL = {"type": "string"}, {"type": ["string", "null"]}
A_TOKEN = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
TEXT_OR_TOKEN = {"anyOf": [A_TEXT, A_TOKEN]}
SOME_OBJECTS = list_schema(object_schema([], type=TEXT_OR_NULL))  # of a list of tools
A_FUNCTION = object_schema(
    ["function"], function=object_schema(["name"], name=A_TEXT, parameters={"type": ["object", "null"]}))


def json_object(raw: bytes | bytearray) -> dict:
    """Parse a body. Raises RequestError if it is no JSON object."""
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
    """The values of the fields that are set, checked, by the names that they mean. Unknown fields are
    ignored."""
    if missing := [field.name for field in fields if body.get(field.name) is None and field.required
                   and not (field.name in body and field.cleared is not ABSENT)]:
        raise RequestError(f"{missing[0]} is missing", code="missing_required_parameter", param=missing[0])
    cleared = {field.means or field.name: field.cleared for field in fields
               if field.cleared is not ABSENT and field.name in body}
    return cleared | {field.means or field.name: field.read(body[field.name])
                      for field in fields if body.get(field.name) is not None}


def within_limit(what: str, count: int, limit: int, param: str):
    """Raise RequestError if the count is above the limit."""
    if count > limit:
        raise RequestError(f"{what}: {count} given, at most {limit} allowed",
                           code="limit_exceeded", param=param)
