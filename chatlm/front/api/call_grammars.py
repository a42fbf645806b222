"""Grammars for calls of functions, and the types of their parameters."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence as Seq
from contextlib import suppress
from typing import TYPE_CHECKING

from chatlm.common.config import LIMITS
from chatlm.common.errors import error_text, shown
from chatlm.common.jsontext import JSON_TYPES, as_json
from chatlm.common.text.formats import A_MARKER, CALL_FORMATS, MARKS, CallFormat
from chatlm.common.text.grammar import lark_grammar, schema_grammar, unusable_schema
from chatlm.common.text.patterns import check_patterns, in_slashes
from chatlm.common.text.schema_rules import (
    JSON_TERMINALS, MOST_ITEMS, SchemaRules, literal, text_rule)
from chatlm.common.text.schemas import (
    SchemaForms, has_other_keys, keys_among, members_of, schemas_of_declared, schemas_of_key,
    types_among, types_of)

if TYPE_CHECKING:
    from chatlm.common.text.schemas import Form


A_PART = re.compile(rf"{A_MARKER.pattern}|(\{{\w+\}})")


def as_rule(text: str, loose_lines: bool = False, **parts: str) -> str:
    """The text of a call as part of a grammar's rule. Its markers become special tokens, and each {name} of
    `parts` becomes that part of the grammar. With `loose_lines` the model may leave out line breaks."""
    pattern = A_PART.pattern + (r"|(\n)" if loose_lines else "")
    symbols = []
    for word in filter(None, re.split(pattern, text)):
        if word in MARKS:
            symbols.append(f"<[{word}]>")
        elif word[1:-1] in parts:
            symbols.append(parts[word[1:-1]])
        elif loose_lines and word == "\n":
            symbols.append(literal(word) + "?")
        else:
            symbols.append(literal(word))
    return " ".join(symbols)


def parameters_schema(function: Mapping) -> Mapping:
    """The schema of a function's parameters. A function without one has no parameters."""
    parameters = function.get("parameters")
    return {"properties": {}} if parameters is None else parameters


def parameter_types(tool: dict, steps: Iterator | None = None) -> dict[str, str]:
    """Parameter -> its JSON types; "" stands for all parameters that the schema does not name. The types are
    "" if the schema does not say them, or if no `steps` (see SchemaForms) are left."""
    types = {}
    with suppress(ValueError, LookupError, RecursionError):
        schemas = SchemaForms(parameters_schema(tool["function"]), steps)
        for form in schemas.forms_of(schemas.root):
            names = [*keys_among(form), *([None] if members_of(form, ["additionalProperties"]) else [])]
            for name in names if "object" in types_among(form) else ():
                if len(name or "") > LIMITS.parameter_characters:
                    continue
                known = types.setdefault(name or "", set())
                try:
                    known |= types_of(schemas.forms(schemas_of_key(form, name)))
                except (ValueError, LookupError, RecursionError):
                    known |= JSON_TYPES.keys()
    return {name: " ".join(sorted(known)) if len(known) < len(JSON_TYPES) else ""
            for name, known in types.items()}


class TagRules:
    """The rules of a grammar for a function's arguments, in a format that writes each parameter in tags, such
    as `<parameter=NAME>VALUE</parameter>`.

    A schema may allow several forms of objects. Each form is a sequence of parameters, the required and the
    optional ones in order, and after them any number of others if it allows others."""

    ALLOWED_NAME = rf"(?!\s)[^<>\n]{{1,{LIMITS.parameter_characters}}}(?<!\s)"

    def __init__(self, rule: str, root: Mapping, call_format: CallFormat):
        """rule: the name of the rule that matches all arguments. root: the schema of the parameters."""
        assert call_format.tags
        start, end, loose_lines = call_format.tags
        after = ""
        marker = A_MARKER.match(end)
        if marker:
            after = end[marker.end():]
            end = marker[0]
        self.rule = rule
        self.root = root
        self.rules = SchemaRules(rule.replace("arguments", "s"), root)
        self.sign = as_rule(end)                         # ends a value
        self.ends = (end.strip(), call_format.marks[1])  # no string has one of these in it
        head, middle = start.split("{name}")
        self.head = as_rule(head, loose_lines)
        self.middle = as_rule(middle, loose_lines)
        self.tail = as_rule(after, loose_lines)

    def lines(self) -> Iterator[str]:
        """The lines of the grammar, one by one: there may be too many of them (see tag_grammar)."""
        choices = []
        for form in self.rules.schemas.forms_of(self.root):
            known = self.rules.possible_keys(form) if "object" in types_among(form) else None
            if known is None:
                continue
            sequence = []
            other_names = self.rules.other_names(form)
            for name, is_required in known.items():
                parameter = f"{self.rule}_{len(choices)}_{len(sequence)}"
                yield from self._known_parameter(parameter, name, form)
                sequence.append(parameter + ("" if is_required else "?"))
            if other_names and has_other_keys(form):
                parameter = f"{self.rule}_{len(choices)}_{len(sequence)}"
                yield from self._other_parameter(parameter, known, other_names, form)
                sequence.append(parameter + f"{{0,{MOST_ITEMS}}}")
            choices.append(" ".join(sequence) or json.dumps(""))
        if not choices:
            raise ValueError("no object fits them")
        check_patterns(self.rules.patterns)
        yield f"{self.rule}: {' | '.join(choices)}"
        yield from self.rules.lines

    def _known_parameter(self, parameter: str, name: str, form: Form) -> Iterator[str]:
        if not re.fullmatch(self.ALLOWED_NAME, name):
            raise unusable_schema(
                f"this model's calls cannot have a parameter {shown(name)}; a name has 1 to "
                f"{LIMITS.parameter_characters} characters, no <, > or line break, no space at its ends",
                "tools")
        yield from self._parameter(parameter, as_json(name), name, schemas_of_declared(form, name))

    def _other_parameter(self, parameter: str, known: Iterable[str], other_names: str,
                         form: Form) -> Iterator[str]:
        """A parameter with any name except the known ones."""
        terminal = f"{parameter.upper()}_NAME"
        known_names = "|".join(in_slashes(re.escape(name)) for name in known)
        most = LIMITS.parameter_characters - 2
        yield (rf"{terminal}: /[^<>\s]([^<>\n]{{0,{most}}}[^<>\s])?/ & ~/({known_names})/"
               f" & ({other_names})")
        yield from self._parameter(parameter, terminal, None, schemas_of_key(form, None))

    def _parameter(self, parameter: str, written_name: str, name: str | None, schemas: Seq) -> Iterator[str]:
        """The rule `parameter`: a name, and a value that fits the schemas."""
        values = []
        for value, *lines in self._values(f"{parameter}v", schemas):
            values.append(value)
            yield from lines
        if not values:
            raise ValueError(f"no value fits {shown(name)}")
        yield f"{parameter}: {self.head} {written_name} {self.middle} ({' | '.join(values)}) {self.tail}"

    def _values(self, rule: str, schemas: Seq) -> Iterator[tuple[str, ...]]:
        """Up to two rules for the values that fit these schemas, one for strings and one for all others.
        Yields the name and then the lines of each."""
        forms = self.rules.schemas.forms(schemas)
        types = types_of(forms)
        if len(types) == len(JSON_TYPES):
            types = {"string"}
        texts = [text for form in forms if (text := self.rules.text_terminal(form))]
        if texts:
            alternatives = " | ".join(f"({text})" for text in texts)
            yield (f"{rule}t", *text_rule(f"{rule}t", alternatives, self.sign, self.ends))
        others = sorted(types - {"string"})
        value = self.rules.rule({"type": others}, *schemas) if others else ""
        if value:
            yield rule, f"{rule}: {value} {self.sign}"


def tag_grammar(start: str, functions: Seq[Mapping], call_format: CallFormat) -> str:
    """The same as schema_grammar, for arguments in tags."""
    lines = [start, JSON_TERMINALS]
    characters = 0
    try:
        for index, function in enumerate(functions):
            for line in TagRules(f"arguments{index}", parameters_schema(function), call_format).lines():
                lines.append(line)
                characters += len(line)
                if characters > LIMITS.grammar_characters:  # a $ref repeats all parameters
                    return lark_grammar("\n".join(lines), "tools")
    except RecursionError:
        raise unusable_schema("it is nested too deeply", "tools") from None
    except (ValueError, LookupError) as error:
        raise unusable_schema("parameters must be properties of one object, each with a schema: "
                              + error_text(error), "tools") from None
    return lark_grammar("\n".join(lines), "tools")


def arguments_schema(function: Mapping) -> dict:
    """The schema of a function's arguments. They are an object, even if the schema does not say so."""
    parameters = parameters_schema(function)
    return {**parameters, "type": parameters.get("type") or "object"}


def tool_grammar(tools: Seq[dict], tool_format: str, parallel: bool) -> str:
    """A grammar that allows only calls of the tools: one call, or with `parallel` up to MOST_ITEMS."""
    functions = [tool["function"] for tool in tools]
    call_format = CALL_FORMATS[tool_format]
    as_part = functools.partial(as_rule, loose_lines=bool(call_format.tags and call_format.tags.loose_lines))
    before, of_one, after = re.split(r"(?s)(\{(?:name|quoted)\}.*\{arguments\})", call_format.call)
    of_any = " | ".join(as_part(
        of_one, name=literal(function["name"]), quoted=literal(as_json(function["name"])), digit="/[0-9]/",
        arguments=f"arguments{index}") for index, function in enumerate(functions))
    count = "call"
    if parallel and call_format.between is not None:
        count = f"call ({as_rule(call_format.between)} call){{0,{MOST_ITEMS - 1}}}"
    start = (f"start: {as_rule(call_format.calls, calls=count)}\n"
             f"call: {as_part(before)} ({of_any}) {as_part(after)}")
    if call_format.tags:
        return tag_grammar(start, functions, call_format)
    return schema_grammar({f"arguments{index}": arguments_schema(function)
                           for index, function in enumerate(functions)}, "tools", start, call_format.notation)


def call_grammar(function: Mapping, tool_format: str) -> str:
    """A grammar for the arguments of one call and for what ends them."""
    start = 'start: (" " | "\\n")? arguments0'
    call_format = CALL_FORMATS[tool_format]
    if call_format.typed:
        start += " " + as_rule(call_format.around_arguments[1].strip() or call_format.marks[1])
    if call_format.tags:
        return tag_grammar(start, [function], call_format)
    return schema_grammar({"arguments0": arguments_schema(function)}, "tools", start, call_format.notation)
