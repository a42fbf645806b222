"""Calls of functions as grammars, and the types of their parameters."""

from __future__ import annotations

import functools
import itertools
import json
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence as Seq
from contextlib import suppress

from chatlm.common.config import LIMITS
from chatlm.common.errors import named, shown
from chatlm.common.jsontext import JSON_TYPES, as_json, is_text
from chatlm.common.text.formats import A_MARKER, CALL_FORMATS, MARKS, CallFormat
from chatlm.common.text.grammar import (
    JSON_STYLE, in_slashes, json_grammar, lark_grammar, schema_grammar, schema_json, unusable_schema)


A_PART = re.compile(rf"{A_MARKER.pattern}|(\{{\w+\}})")


def literal(text: str) -> str:
    """Text in a grammar; what with_markers would take for a marker is escaped."""
    return as_json(text).replace("<[", "\\u003c[")


def as_rule(text: str, loose_lines: bool = False, **parts: str) -> str:
    """Text of a call in a rule of a grammar, where its markers are markers, and `parts` of the grammar stand
    for {their names}. With `loose_lines` the model may leave out line breaks."""
    pattern = A_PART.pattern + (r"|(\n)" if loose_lines else "")
    return " ".join(f"<[{word}]>" if word in MARKS else parts[word[1:-1]] if word[1:-1] in parts
                    else literal(word) + ("?" if loose_lines and word == "\n" else "")
                    for word in re.split(pattern, text) if word)


def referred(pointer: str, root: Mapping):
    """The schema that a $ref leads to."""
    steps = (step.replace("~1", "/").replace("~0", "~") for step in pointer.split("/", 64)[1:])
    try:
        return functools.reduce(operator.getitem, steps, root)
    except (LookupError, TypeError):
        raise LookupError(f"$ref {shown(pointer)} leads nowhere") from None


KEYWORDS = {  # of JSON Schema, those that are read here: what each must be, and the check of that
    **dict.fromkeys(("allOf", "anyOf", "oneOf"), ("a list of schemas", JSON_TYPES["array"])),
    "enum": ("a list", JSON_TYPES["array"]),
    "type": (f"one of {', '.join(JSON_TYPES)}, or a list of these", lambda value: (
        is_text(value) and value in JSON_TYPES
        or isinstance(value, list) and len(value) <= 9
        and all(is_text(name) and name in JSON_TYPES for name in value))),
    "properties": ("an object of schemas", JSON_TYPES["object"]),
    "required": ("a list of strings", lambda value: isinstance(value, list) and all(map(is_text, value))),
    **dict.fromkeys(("minLength", "maxLength"), (
        "an integer of at least 0", lambda value: JSON_TYPES["integer"](value) and value >= 0)),
    **dict.fromkeys(("$ref", "pattern", "format"), ("a string", is_text))}


def keyword(schema: Mapping, name: str):
    """A schema's member; None if it is absent or null. ValueError if it is not what it must be."""
    allowed, is_right = KEYWORDS[name]
    if (value := schema.get(name)) is not None and not is_right(value):
        raise ValueError(f"{name} must be {allowed}, not {shown(value)}")
    return value


def named_types(schema: Mapping) -> Iterable[str]:
    """The JSON types that the schema itself names: all where it names none."""
    types = keyword(schema, "type")
    return JSON_TYPES if types is None else [types] if is_text(types) else types


def schema_object(schema) -> Mapping:
    """A schema that may be true (anything fits) or false as the object that says the same."""
    if not isinstance(schema, (dict, bool)):
        raise ValueError(f"a schema must be an object, true or false, not {shown(schema)}")
    return schema if isinstance(schema, dict) else {} if schema else {"type": []}


def choices_of(schema: Mapping, root: Mapping) -> list[list]:
    """Lists of schemas; a value of this schema must also fit one schema of each list. $refs are in `root`."""
    choices_of_all = [[member] for member in keyword(schema, "allOf") or ()]
    if pointer := keyword(schema, "$ref"):
        choices_of_all.append([referred(pointer, root)])
    return choices_of_all + [choices for name in ("anyOf", "oneOf") if (choices := keyword(schema, name))]


def listed_values(schema: Mapping) -> list | None:
    return [schema["const"]] if schema.get("enum") is None and "const" in schema else keyword(schema, "enum")


def spend(steps: Iterator, count: int):
    """Use up more steps: a large member of a schema costs as much as several schemas."""
    next(itertools.islice(steps, count, count), None)


def types_of(schema, root: Mapping, steps: Iterator) -> set[str]:
    """The JSON types that values of a schema have: all where it does not say, or no `steps` are left. Each
    schema on the way uses up one: a schema from anywhere must not cost much."""
    types = set(JSON_TYPES)
    if next(steps, None) is None:
        return types
    schema = schema_object(schema)
    own_types = set(named_types(schema))
    types &= own_types | ({"integer"} if "number" in own_types else set())
    if (values := listed_values(schema)) is not None:
        examples = {type(value): value for value in values[:64]}.values()
        types &= {name for name, is_of_type in JSON_TYPES.items() if any(map(is_of_type, examples))}
    for choices in choices_of(schema, root):
        types &= set().union(*(types_of(choice, root, steps) for choice in choices))
    return types


def objects_of(schema, root: Mapping, steps: Iterator) -> list[dict]:
    """What this schema says of objects' members, without $ref, allOf, anyOf and oneOf: an object must fit one
    of the results. LookupError if there are too many."""
    if next(steps, None) is None:
        raise LookupError("they refer to too many schemas")
    schema = schema_object(schema)
    if "object" not in named_types(schema):
        return []
    said = {"properties": keyword(schema, "properties"), "required": keyword(schema, "required"),
            "additionalProperties": schema.get("additionalProperties")}
    forms = [{name: value for name, value in said.items() if value is not None}]
    spend(steps, (len(said["properties"] or ()) + len(said["required"] or ())) // 100)
    for choices in choices_of(schema, root):
        more = [form for choice in choices for form in objects_of(choice, root, steps)]
        forms = [both_objects(*pair) for pair in itertools.islice(itertools.product(forms, more), 65)]
        for form in forms[1:]:
            if next(steps, None) is None or len(form["properties"]) > 64:
                raise LookupError("they have too many forms")
    return forms


def both_objects(first: Mapping, second: Mapping) -> dict:
    """What an object must be that fits both."""
    members = dict(first.get("properties", {}))
    for name, schema in second.get("properties", {}).items():
        members[name] = {"allOf": [members[name], schema]} if name in members else schema
    required = [*first.get("required", ()), *second.get("required", ())]
    return {**first, **second, "properties": members, "required": required}


def parameter_types(tool: dict, steps: Iterator = itertools.repeat(0)) -> dict[str, str]:
    """The JSON types of each of a function's parameters, and under "" of all others; "" where its schema does
    not say them, or no `steps` (see types_of) are left."""
    parameters, types = tool["function"].get("parameters") or {}, {}
    with suppress(ValueError, LookupError):
        for form in objects_of(parameters, parameters, itertools.islice(steps, 64)):
            others = {"": form["additionalProperties"]} if form.get("additionalProperties") else {}
            for name, schema in {**(form.get("properties") or {}), **others}.items():
                if len(name) > LIMITS.parameter_characters:
                    continue
                known = types.setdefault(name, set())
                try:
                    known |= types_of(schema, parameters, itertools.islice(steps, 64))
                except (ValueError, LookupError):
                    known |= JSON_TYPES.keys()
    return {name: " ".join(sorted(known)) if len(known) < len(JSON_TYPES) else ""
            for name, known in types.items()}


A_DAY = "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
A_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:([0-5][0-9]|60)(\.[0-9]+)?([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
A_LABEL = "[0-9A-Za-z]([0-9A-Za-z-]{0,61}[0-9A-Za-z])?"
A_HOST = rf"{A_LABEL}(\.{A_LABEL})*"
A_BYTE, A_WORD = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])", "[0-9A-Fa-f]{1,4}"
STRING_FORMATS = {  # those that JSON grammars know
    "date": A_DAY, "time": A_TIME, "date-time": f"{A_DAY}[Tt]{A_TIME}", "hostname": A_HOST,
    "duration": "P([0-9]+[YMWD])+(T([0-9]+[HMS])+)?|PT([0-9]+[HMS])+",
    "email": rf"[0-9A-Za-z!#$%&'*+/=?^_`{{|}}~.-]+@{A_HOST}",
    "ipv4": rf"({A_BYTE}\.){{3}}{A_BYTE}",
    "ipv6": "|".join((f"({A_WORD}:){{7}}({A_WORD}|:)", f":(:{A_WORD}){{7}}", *(
        f"({A_WORD}(:{A_WORD}){{0,{n}}})?::({A_WORD}(:{A_WORD}){{0,{5 - n}}})?" for n in range(6)))),
    "uuid": "[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
    "uri": r"[A-Za-z][0-9A-Za-z+.-]*:[0-9A-Za-z:/?#\[\]@!$&'()*+,;=%._~-]*", "unknown": "(?s:.*)"}


def text_terminal(schema, root: Mapping, steps: Iterator) -> str:
    """What a string of this schema may be where no quotes enclose it; "" if it can be no string."""
    if next(steps, None) is None:
        return "/(?s:.*)/"
    schema = schema_object(schema)
    if "string" not in named_types(schema):
        return ""
    allowed = [[text_terminal(choice, root, steps) for choice in choices]
               for choices in choices_of(schema, root)]
    if (values := listed_values(schema)) is not None:
        allowed.append([as_json(value) for value in values if is_text(value)])
        spend(steps, len(values) // 100)
    shortest, most = keyword(schema, "minLength"), keyword(schema, "maxLength")
    if shortest is not None or most is not None:
        allowed.append(["/(?s:.{%d,%s})/" % (shortest or 0, "" if most is None else int(most))])
    if pattern := in_slashes(keyword(schema, "pattern") or ""):  # is found anywhere in the text
        spend(steps, len(pattern) // 1000)
        if not (end := re.search(r"(?<!\\)(?:\\\\)*(\$?)\Z", pattern)):
            raise ValueError(f"the pattern {shown(pattern)} ends within an escape")
        first, last = "^" * (pattern[0] == "^"), end[1]
        inside = pattern.removeprefix(first).removesuffix(last) if "|" not in pattern else pattern
        allowed.append([f"/{'' if first else '(?s:.*)'}(?:{inside}){'' if last else '(?s:.*)'}/"])
    if (name := keyword(schema, "format")) is not None:
        if name not in STRING_FORMATS:
            raise ValueError(f"unknown format: {shown(name)}")
        allowed.append([f"/{in_slashes(STRING_FORMATS[name])}/"])
    choices = [" | ".join(filter(None, terminals)) for terminals in allowed]
    return f"({' & '.join(f'({choice})' for choice in choices) or '/(?s:.*)/'})" if all(choices) else ""


def value_rules(rule: str, schema, root: Mapping, sign: str, ends: Seq[str]) -> Iterator[tuple[str, ...]]:
    """A rule's name and its lines for the strings, and for the other values, of this schema; `sign` ends a
    value, and a string has none of `ends`."""
    types = types_of(schema, root, iter(range(64)))
    types = types if len(types) < len(JSON_TYPES) else {"string"}
    if "string" in types and (text := text_terminal(schema, root, iter(range(64)))):
        refused = "|".join(in_slashes(re.escape(end)) for end in ends)
        yield (f"{rule}t", f"{rule}t[suffix={sign}]: {rule.upper()}",
               f"{rule.upper()}: {text} & ~/(?s:.*)({refused})(?s:.*)/")
    if others := sorted(types - {"string"}):
        schema = {"type": others, "allOf": [schema], "x-guidance": JSON_STYLE}
        said = schema_json(schema)
        if '"$ref"' in said:
            moved = schema_json({**schema, "$defs": {"_": root}})
            said = moved.replace('"$ref": "#', '"$ref": "#/$defs/_')
        yield rule, f"{rule}: {rule}_value {sign}", f"{rule}_value: %json {said}"


def tag_rules(rule: str, root: Mapping, call_format: CallFormat) -> Iterator[str]:
    """Lines of a grammar in which `rule` is the arguments of a function with these parameters."""
    assert call_format.tags
    start, end, loose_lines = call_format.tags
    marker, choices = A_MARKER.match(end), []
    end, after = (marker[0], end[marker.end():]) if marker else (end, "")
    sign, ends = as_rule(end), (end.strip(), call_format.marks[1])
    allowed_name = rf"(?!\s)[^<>\n]{{1,{LIMITS.parameter_characters}}}(?<!\s)"
    head, middle, tail = (as_rule(text, loose_lines) for text in (*start.split("{name}"), after))
    for parameters in objects_of(root, root, iter(range(64))):
        required, wanted = dict.fromkeys(parameters.get("required", ()), {}), []
        known = {**required, **parameters.get("properties", {})}
        more = parameters.get("additionalProperties", False)
        for name, schema in [*known.items(), *[(None, more)] * (more is not False)]:
            parameter = f"{rule}_{len(choices)}_{len(wanted)}"
            if name is None:
                others = "|".join(in_slashes(re.escape(name)) for name in known)
                most = LIMITS.parameter_characters - 2
                yield rf"{parameter.upper()}_NAME: /[^<>\s]([^<>\n]{{0,{most}}}[^<>\s])?/ & ~/({others})/"
            elif not re.fullmatch(allowed_name, name):
                raise unusable_schema(
                    f"this model's calls cannot have a parameter {shown(name)}; a name has 1 to "
                    f"{LIMITS.parameter_characters} characters, no <, > or line break, no space at its ends",
                    "tools")
            written, often = (f"{parameter.upper()}_NAME", "*") if name is None else (
                as_json(name), "?" * (name not in required))
            wanted.append(parameter + often)
            values = []
            for value, *lines in value_rules(f"{parameter}v", schema, root, sign, ends):
                values.append(value)
                yield from lines
            if not values:
                raise ValueError(f"no value fits {shown(name)}")
            yield f"{parameter}: {head} {written} {middle} ({' | '.join(values)}) {tail}"
        choices.append(" ".join(wanted) or json.dumps(""))
    if not choices:
        raise ValueError("no object fits them")
    yield f"{rule}: {' | '.join(choices)}"


def tag_grammar(start: str, functions: Seq[Mapping], call_format: CallFormat) -> str:
    """The same as schema_grammar for arguments in tags."""
    lines, characters = [start], 0
    try:
        for index, function in enumerate(functions):
            for line in tag_rules(f"arguments{index}", function.get("parameters") or {}, call_format):
                lines.append(line)
                characters += len(line)
                if characters > LIMITS.grammar_characters:  # a $ref repeats all parameters
                    return lark_grammar("\n".join(lines), "tools")
    except RecursionError:
        raise unusable_schema("it is nested too deeply", "tools") from None
    except (ValueError, LookupError) as error:
        raise unusable_schema("parameters must be properties of one object, each with a schema: "
                              + named(error), "tools") from None
    return lark_grammar("\n".join(lines), "tools")


def arguments_schema(function: Mapping) -> dict:
    """A function's parameters; where they do not say so, they are an object too."""
    parameters = function.get("parameters") or {}
    return {**parameters, "type": parameters.get("type") or "object"}


def tool_grammar(tools: Seq[dict], tool_format: str, parallel: bool) -> str:
    """A grammar that allows only calls of the tools: one, or with `parallel` any number."""
    functions, call_format = [tool["function"] for tool in tools], CALL_FORMATS[tool_format]
    as_part = functools.partial(as_rule, loose_lines=bool(call_format.tags and call_format.tags.loose_lines))
    before, of_one, after = re.split(r"(?s)(\{(?:name|quoted)\}.*\{arguments\})", call_format.call)
    of_any = " | ".join(as_part(
        of_one, name=literal(function["name"]), quoted=literal(as_json(function["name"])), digit="/[0-9]/",
        arguments=f"arguments{index}") for index, function in enumerate(functions))
    count = f"call ({as_rule(call_format.between)} call)*" if (
        parallel and call_format.between is not None) else "call"
    start = (f"start: {as_rule(call_format.calls, calls=count)}\n"
             f"call: {as_part(before)} ({of_any}) {as_part(after)}")
    if call_format.tags:
        return tag_grammar(start, functions, call_format)
    # An $id of its own keeps "#" in a $ref pointing at the root of these parameters.
    return schema_grammar({f"arguments{index}": {**arguments_schema(function), "$id": f"urn:tool:{index}"}
                           for index, function in enumerate(functions)}, "tools", start)


def call_grammar(function: Mapping, tool_format: str) -> str:
    """A grammar for the arguments of one call, and what ends them."""
    start, call_format = 'start: (" " | "\\n")?', CALL_FORMATS[tool_format]
    if call_format.tags:
        end = as_rule(call_format.around_arguments[1].strip() or call_format.marks[1])
        return tag_grammar(f"{start} arguments0 {end}", [function], call_format)
    return json_grammar(arguments_schema(function), "tools", f"{start} object")
