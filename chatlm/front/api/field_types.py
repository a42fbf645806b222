"""The types of fields that the APIs share, including the fields that ask for a grammar."""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import partial

from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError, bad_value, invalid, error_text, printable
from chatlm.common.jsontext import is_number, is_text, whole_unicode
from chatlm.common.text.calculations import STRAY_MARKS
from chatlm.common.text.grammar import json_grammar, lark_grammar, require_llguidance
from chatlm.common.text.patterns import check_regex, in_slashes
from chatlm.front.api.fields import (
    A_FUNCTION, A_TEXT, A_TOKEN, TEXT_OR_NULL, TEXT_OR_TOKEN, Field, FieldType, as_count, as_list, as_prompts,
    known_members, list_schema, matches, object_schema, read_choice, refused_field, value_at)


RESPONSE_FORMATS = ("text", "json_object", "json_schema", "json", "regex")


def response_grammar(value: dict, param: str = "response_format") -> tuple[str, str]:
    """The grammar of a response format, and the field that asks for it. Plain text, and an object without
    members, have no grammar: ""."""
    format_type = value.get("type")
    if format_type == "text" or not value:
        return "", param
    if format_type not in RESPONSE_FORMATS:
        raise bad_value(param, format_type, "an object of type text, json_object, json_schema or regex")
    if format_type == "regex":
        regex = value.get("value", value.get("regex"))
        if not is_text(regex):
            raise bad_value(param, value, "an object of type regex whose value is a regular expression")
        return other_grammar(regex, "regex", param)
    schema = format_schema(value, param)
    if schema is None and format_type == "json_object" and value.get("json_schema") is None:
        schema = {"type": "object"}
    if not isinstance(schema, (dict, bool)):
        raise RequestError(f"{param} needs a schema that is an object, true or false",
                           code="invalid_json_schema", param=param)
    return json_grammar(schema, param), param


def format_schema(value: dict, param: str):
    """The schema in a response format; None if there is none. Raises RequestError if there are two that
    differ.

    OpenAI has it in json_schema, llama-server in schema. TGI has it in value, and huggingface_hub moves
    OpenAI's there."""
    schemas = {}
    openai = value.get("json_schema")
    if isinstance(openai, dict):
        schemas["json_schema.schema"] = openai.get("schema")
    schemas["schema"] = value.get("schema")
    tgi = value.get("value")
    if isinstance(tgi, dict) and "schema" in tgi and "type" not in tgi:
        schemas["value.schema"] = tgi["schema"]
    else:
        schemas["value"] = tgi
    schemas = {name: schema for name, schema in schemas.items() if schema is not None}
    (first, schema), *others = schemas.items() or [("", None)]
    for name, other in others:
        if other != schema:
            raise invalid(param, f"the schemas {first} and {name} of {param} exclude each other")
    return schema


def nested_grammar(value: dict, param: str) -> tuple[str, str]:
    """The response_grammar of a field that has the format in its member `format`."""
    form = value.get("format")
    if form is not None and not isinstance(form, dict):
        raise bad_value(param, form, "an object whose format is an object")
    return response_grammar(known_members(form or {}) or {"type": "text"}, param)


GBNF_CHARACTERS = 16_384  # converted here, in 2 us a character
GBNF_RULE = re.compile(r"^\s*[A-Za-z0-9_-]+\s*::=", re.MULTILINE)  # a rule of Lark begins `name:`


def other_grammar(value, language: str, param: str) -> tuple[str, str]:
    """The grammar of a constraint of vLLM's or llama-server's, and the field that asks for it."""
    grammar = ""
    require_llguidance(param)
    try:
        if language == "json":
            return json_grammar(json.loads(value) if is_text(value) else value, param), param
        if language == "choice":
            grammar = "start: " + " | ".join(json.dumps(whole_unicode(choice)) for choice in value)
        elif language == "regex":
            check_regex(whole_unicode(value))
            grammar = f"start: /{in_slashes(whole_unicode(value))}/"
        elif not GBNF_RULE.search(value):
            grammar = whole_unicode(value)
        elif len(value) <= GBNF_CHARACTERS:
            convert = importlib.import_module("llguidance.gbnf_to_lark").gbnf_to_lark
            grammar = convert(whole_unicode(value)).removeprefix("%llguidance {}")
        else:
            raise ValueError(f"{len(value):,} characters, at most {GBNF_CHARACTERS:,} are allowed")
    except RequestError:
        raise
    except Exception as error:  # a library's own, for a grammar or schema that does not parse
        raise RequestError(f"{param} cannot be used: {printable(error_text(error))[:300]}",
                           code="invalid_grammar", param=param) from None
    return lark_grammar(grammar, param), param


def structured_outputs(value: dict) -> tuple[str, str]:
    """The grammar of vLLM's structured_outputs, an object with one constraint."""
    constraints = {name: constraint for name, constraint in value.items()
                   if constraint is not None and constraint is not False}
    types = {field.name.removeprefix("guided_"): field.type for field in CONSTRAINT_FIELDS[:4]}
    (language, constraint), *others = constraints.items() or [("", None)]
    if language == "json_object" and constraint is True and not others:
        language = "json"
        constraint = {"type": "object"}
    if others or language not in types or not matches(types[language].schema, constraint):
        raise bad_value("structured_outputs", value, "an object with one of json, regex, choice, grammar and "
                                                     "json_object: true")
    return other_grammar(constraint, language, "structured_outputs")


def one_constraint(values: Mapping) -> tuple[str, str]:
    """The grammar that a request asks for, and the field that asks for it. Raises RequestError if two fields
    ask for different grammars. Two may ask for the same one, as guidance's client does."""
    fields = ("response_format", *(field.name for field in CONSTRAINT_FIELDS))
    grammars = [values[name] for name in fields if name in values and values[name][0]]
    (grammar, first), *others = grammars or [("", "")]
    for other, second in others:
        if other != grammar:
            raise invalid(second, f"{first} and {second} exclude each other: they ask for different answers")
    return grammar, first


TEXT_PARTS = ["text", "input_text", "output_text", "refusal", "reasoning_text", "summary_text"]
A_PICTURE = {
    "description": "an image: image_url or input_image with a data URI, image with base64",
    **object_schema(["type"], type={"enum": ["image_url", "input_image", "image"]},
                    image_url={"anyOf": [A_TEXT, object_schema(["url"], url=A_TEXT)]},
                    source=object_schema(["type", "data"], type={"enum": ["base64"]}, data=A_TEXT))}
A_PART = object_schema(["type"], type={"enum": TEXT_PARTS}, text=TEXT_OR_NULL, refusal=TEXT_OR_NULL)
CALCULATOR = {
    "description": "calls of nanochat's calculator in an assistant's text, as in answers",
    **list_schema(object_schema(["start"], start=A_TOKEN, expression=TEXT_OR_NULL, result=TEXT_OR_NULL,
                                cut={"type": "boolean"}, stray={"enum": [*STRAY_MARKS]}))}
A_NANOCHAT_PART = {
    "description": "a part of an assistant's content, as nanochat has it",
    **object_schema(["type", "text"], type={"enum": ["text", "python", "python_output"]}, text=A_TEXT)}
NATIVE_ROLES = ["system", "user", "assistant"]
OPENAI_ROLES = ["system", "developer", "user", "assistant"]  # also tool, if the model's template has tools

NUMBER = FieldType("a finite number", {"type": "number"}, float)
INTEGER = FieldType("an integer", {"type": "integer"}, as_count)
SEED = INTEGER._replace(convert=lambda value: int(value) % 2**64)  # OpenAI's seeds may be negative
TOP_K = INTEGER._replace(convert=lambda value: max(0, int(value)))
CAP = FieldType("a positive integer, or -1 for no cap",
                {"anyOf": [{"enum": [-1]}, {"type": "integer", "minimum": 1}]}, as_count)
SWITCH = FieldType("true or false", {"enum": [True, False, "true", "false", "True", "False"]},
                   lambda value: str(value).lower() == "true")
TEXT = FieldType("a string", A_TEXT, whole_unicode)
LIST = FieldType("a list", {"type": "array"})
OBJECT = FieldType("an object", {"type": "object"})


def object_of(*members: str) -> FieldType:
    """An object with these members; others are ignored."""
    return OBJECT._replace(details={"properties": dict.fromkeys(members, {})})


METADATA = FieldType(  # OpenAI's limits
    "an object of at most 16 names of up to 64 characters, each with a string of at most 512", {
        "type": "object", "maxProperties": 16, "propertyNames": {"pattern": r"^[\s\S]{0,64}$"},
        "additionalProperties": {"type": "string", "maxLength": 512}})
LOGPROBS_OF_TEXT = "message.output_text.logprobs"  # all that `include` may ask for here
INCLUDE = FieldType("a list of strings", list_schema(A_TEXT), lambda value: LOGPROBS_OF_TEXT in value)
TOKENS = FieldType(f"a list of at most {LIMITS.tokenized_characters:,} token ids",
                   list_schema(A_TOKEN, maxItems=LIMITS.tokenized_characters), tuple)
STOP_TOKENS = FieldType(f"a list of at most {LIMITS.stop_tokens:,} token ids",
                        list_schema(A_TOKEN, maxItems=LIMITS.stop_tokens), tuple)
STOP_TEXT = {"type": "string", "maxLength": LIMITS.stop_characters}


def stop_strings(most: int) -> FieldType:
    return FieldType(
        f"a string or a list of at most {most} strings, with at most {LIMITS.stop_characters:,} "
        "characters together",
        {"anyOf": [STOP_TEXT, list_schema(STOP_TEXT, maxItems=most)]},
        lambda value: tuple(stop for stop in as_list(value) if stop))


STOP = stop_strings(LIMITS.more_stop_strings)
FOUR_STOPS = stop_strings(LIMITS.stop_strings)  # on OpenAI's routes
MIXED = FieldType(f"a string, or a list of at most {LIMITS.tokenized_characters:,} strings and token ids",
                  {"anyOf": [A_TEXT, list_schema(TEXT_OR_TOKEN, maxItems=LIMITS.tokenized_characters)]},
                  as_list)
SOME_TOKENS = list_schema(A_TOKEN, maxItems=LIMITS.prompt_tokens)


def texts_or_tokens(fewest: int, most: int) -> FieldType:
    """A text, token ids, or a list of at most `most` of these, each with at least `fewest` token ids."""
    several = list_schema({"anyOf": [A_TEXT, SOME_TOKENS | {"minItems": fewest}]}, minItems=1, maxItems=most)
    return FieldType(
        f"a string, a list of at most {LIMITS.prompt_tokens:,} token ids, "
        f"or a list of at most {most:,} of these",
        {"anyOf": [A_TEXT, SOME_TOKENS | {"minItems": 1}, several]}, as_prompts)


PROMPTS = texts_or_tokens(1, LIMITS.choices)  # 1: no token ids would mean a new document
INPUTS = texts_or_tokens(0, LIMITS.embeddings)
EFFORTS = ["none", "minimal", "low", "medium", "high", "xhigh", "max"]  # of all APIs
EFFORT = FieldType(", ".join(EFFORTS) + " or a number of tokens, at least 0",
                   {"anyOf": [{"enum": EFFORTS}, {"type": "integer", "minimum": 0}]},
                   lambda value: value if is_text(value) else "")  # see thinking_budget
PRIORITY = FieldType('"low", "normal" or an integer (above 0 means low)',  # vLLM takes numbers
                     {"anyOf": [{"enum": ["low", "normal"]}, {"type": "integer"}]},
                     lambda value: value == "low" or value != "normal" and value > 0)
LOGIT_BIAS = FieldType(f"an object of at most {LIMITS.biases:,} token ids and biases from -100 to 100", {
    "type": "object", "maxProperties": LIMITS.biases, "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"},
    "additionalProperties": {"type": ["number", "null"], "minimum": -100, "maximum": 100}},
    lambda value: tuple((int(token), float(bias)) for token, bias in value.items() if bias is not None))
A_NAME = object_schema(["name"], name=A_TEXT)
OTHER_TOOLS = ["custom", "mcp", "web_search", "web_search_preview", "file_search", "computer_use_preview",
               "image_generation", "code_interpreter", "shell", "apply_patch", "namespace", "tool_search"]
TOOLS = FieldType('a list of {"type": "function", "function": {"name", "description", "parameters"}}',
                  list_schema({"anyOf": [A_FUNCTION, object_schema(["type"], type=A_TEXT)]}), tuple)
FUNCTIONS = FieldType('a list of {"name", "description", "parameters"}',
                      list_schema(A_FUNCTION["properties"]["function"]),
                      lambda value: tuple({"type": "function", "function": known_members(function)}
                                          for function in value))
FUNCTION_CALL = FieldType('"auto", "none" or {"name"}',
                          {"anyOf": [{"enum": ["auto", "none"]}, A_NAME]},
                          lambda value: read_choice(value if is_text(value) else {"name": value["name"]}))
MODES = {"enum": ["auto", "none", "required"]}
A_TOOL_NAME = {"type": "object", "properties": {"name": A_TEXT, "function": A_NAME}}
ALLOWED_TOOLS = object_schema(["mode", "tools"], type={"enum": ["allowed_tools"]}, mode=MODES,
                              tools=list_schema(A_TOOL_NAME))
TOOL_CHOICE = FieldType(
    '"auto", "none", "required", {"type": "function", "function": {"name"}} or '
    '{"type": "allowed_tools", "allowed_tools": {"mode", "tools"}}', {"anyOf": [
        MODES, object_schema(["function"], type={"enum": ["function"]}, function=A_NAME),
        object_schema(["type", "allowed_tools"], type={"enum": ["allowed_tools"]},
                      allowed_tools=ALLOWED_TOOLS),
        object_schema(["type"], type={"enum": OTHER_TOOLS})]}, partial(read_choice, inside="allowed_tools"))
FLAT_CHOICE = FieldType(
    '"auto", "none", "required", {"type": "function", "name"} or {"type": "allowed_tools", "mode", "tools"}',
    {"anyOf": [MODES, object_schema(["type", "name"], type={"enum": ["function"]}, name=A_TEXT),
               object_schema(["type", "mode", "tools"], **ALLOWED_TOOLS["properties"],
                             allowed_tools={"enum": [None]}),
               object_schema(["type"], type={"enum": OTHER_TOOLS})]}, read_choice)
MESSAGES_CHOICE = FieldType(
    "an object of type auto, any or none, or of type tool with a name", {"anyOf": [
        object_schema(["type"], type={"enum": ["auto", "any", "none"]}),
        object_schema(["type", "name"], type={"enum": ["tool"]}, name=A_TEXT)]}, read_choice)



def ollama_grammar(value: str | dict) -> tuple[str, str]:
    """The grammar of Ollama's `format`: "", "json" or a JSON schema."""
    if value == "":
        return "", "format"
    schema = {"type": "object"} if is_text(value) else value
    return json_grammar(schema, "format"), "format"


OLLAMA_FORMAT = FieldType('"json" or a JSON schema', {"anyOf": [{"enum": ["", "json"]}, {"type": "object"}]},
                          ollama_grammar)
SYSTEM = FieldType("a text or a list of text blocks", {"anyOf": [A_TEXT, list_schema({"type": "object"})]})
NATIVE_MESSAGES = LIST._replace(details=list_schema(
    object_schema(["role", "content"], role={"enum": NATIVE_ROLES}, calculator=CALCULATOR, content={
        "anyOf": [A_TEXT, list_schema({"anyOf": [A_PART, A_PICTURE, A_NANOCHAT_PART]})]}), minItems=1))
OPENAI_MESSAGES = LIST._replace(details=list_schema(
    object_schema(
        ["role"], role={"enum": [*OPENAI_ROLES, "tool", "function"]}, calculator=CALCULATOR,
        content={"anyOf": [TEXT_OR_NULL, list_schema({"anyOf": [A_PART, A_PICTURE, A_NANOCHAT_PART]})]}),
    minItems=1))


def constraint(name: str, language: str, allowed: str, schema: dict, doc: str = "") -> Field:
    convert = partial(other_grammar, language=language, param=name)
    return Field(name, FieldType(allowed, schema, convert), doc or f"the answer matches {allowed}")


LLAMA_SERVERS = "of llama-server"  # a group
CONSTRAINT_FIELDS = (  # vLLM's and llama-server's; a request may have one of them
    constraint("guided_json", "json", "a JSON schema", {"anyOf": [{"type": "object"}, A_TEXT]}),
    constraint("guided_regex", "regex", "a regular expression", A_TEXT),
    constraint("guided_choice", "choice", "a list of 1 to 1,000 strings",
               list_schema(A_TEXT, minItems=1, maxItems=1000), "the answer is one of these strings"),
    constraint("guided_grammar", "grammar", "a grammar in Lark or GBNF", A_TEXT),
    constraint("grammar", "grammar", "a grammar in GBNF or Lark", A_TEXT)._replace(group=LLAMA_SERVERS),
    constraint("json_schema", "json", "a JSON schema", {"type": "object"})._replace(group=LLAMA_SERVERS),
    Field("structured_outputs", OBJECT._replace(convert=structured_outputs),
          "one of json, regex, choice, grammar and json_object"),
    *(Field(name, refused_field("answers cannot be held to it"), "refused") for name in (
        "guided_whitespace_pattern", "structural_tag", "regex", "ebnf")),
)


# `thinking` in Messages, and in Chat Completions on servers whose models have it
WHETHER_TO_THINK = {"enum": ["enabled", "adaptive", "disabled"]}
A_BUDGET = {"type": ["integer", "null"], "minimum": 0}
THINKING = FieldType(
    "an object of type enabled, adaptive or disabled", object_schema(["type"], type=WHETHER_TO_THINK),
    lambda value: thinking(value["type"] != "disabled"),
    object_schema(["type"], type=WHETHER_TO_THINK, budget_tokens=A_BUDGET))
# the same at the top level of Chat Completions -> whether the model thinks; None: it decides
THINKS = {"enabled": True, "adaptive": True, "auto": None, "disabled": False}
TOP_LEVEL_THINKING = FieldType(
    "an object of type enabled, adaptive, auto or disabled, or true or false",
    {"anyOf": [{"enum": [True, False]},
               object_schema(["type"], type={"enum": [*THINKS]})]},
    lambda value: value if isinstance(value, bool) else THINKS[value["type"]],
    {"properties": {"type": {}, "budget_tokens": A_BUDGET}})


def thinking(effort) -> dict:
    """The template options for an effort, or for a switch that is on or off. None leaves it to the
    template."""
    if isinstance(effort, bool):
        return {"chat_template_kwargs": {"enable_thinking": effort, "thinking": effort}}
    return {"reasoning_effort": effort} if effort in EFFORTS else {}


def thinking_of_member(name: str, effort) -> dict:
    """The same for an effort in an object, whose path in the body is `name`. Raises RequestError for one that
    is unknown."""
    return {} if effort is None else thinking(Field(name, EFFORT, "").read(effort))


# the places in a body that may limit how many tokens the model thinks; at the latter a number is a limit
BUDGETS = ("thinking_budget", "chat_template_kwargs.thinking_budget", "reasoning.max_tokens",
           "thinking.budget_tokens")
EFFORT_BUDGETS = "reasoning_effort", "reasoning.effort", "output_config.effort", "think"


def thinking_budget(body: Mapping, fields: Iterable[Field]) -> dict[str, int]:
    """The limit of tokens for thinking, under the name of the field that sets it; {} if there is none.
    Raises RequestError if two fields differ."""
    known = {field.name for field in fields}
    chosen = {}
    for path in (*BUDGETS, *EFFORT_BUDGETS):
        value = value_at(body, path) if path.partition(".")[0] in known else None
        if value is not None and (path in BUDGETS or is_number(value)):
            chosen[path] = Field(path, INTEGER, "", 0, math.inf).read(value)
    (first, budget), *others = chosen.items() or [("", 0)]
    for name, other in others:
        if other != budget:
            raise invalid(name, f"{first} is {budget:,} and {name} is {other:,}: a request has one budget")
    return {first: budget} if first else {}


# the places in a body that may turn thinking off -> the values that do
SWITCHED_OFF = {
    "enable_thinking": [False, "false", "False"], "thinking": [False], "thinking.type": ["disabled"],
    "think": [False], "reasoning_effort": ["none"], "reasoning.effort": ["none"]}


def turned_off(body: Mapping, fields: Iterable[Field]) -> str:
    """The field with which a body turns thinking off; "" if it does not."""
    known = {field.name for field in fields}
    for path, values in SWITCHED_OFF.items():
        if path.partition(".")[0] in known and matches({"enum": values}, value_at(body, path)):
            return path
    return ""
