"""How model families mark reasoning and write function calls: a row of CALL_FORMATS each."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.jsontext import as_json
from chatlm.common.text.history import (
    as_gemma, as_harmony, calls_as_content, counted_ids, marked_for_gemma, marked_for_harmony,
    no_empty_content)
from chatlm.common.text.notations import GEMMA, PYTHON, Notation
from chatlm.common.text.schemas import SchemaForms, plain_schema

if TYPE_CHECKING:
    from chatlm.common.messages.requests import TextSpec


THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"),
            ("<|START_THINKING|>", "<|END_THINKING|>"), ("<|channel>", "<channel|>"),
            ("<|thought_start|>", "<|thought_end|>"))
# around the content, after the reasoning: ERNIE 4.5 Thinking, Granite 3.3
WRAPPERS = (("<response>", "</response>"),)
HEADINGS = {"<|channel>": "thought"}  # the first line of reasoning, after its marker
HARMONY = tuple(f"<|{name}|>" for name in (
    "start", "channel", "constrain", "message", "end", "return", "call"))
MUSE = tuple(f"<|{name}|>" for name in ("start", "message", "eom", "eot"))


class Tags(NamedTuple):
    """How arguments are written in tags: one parameter after the other, each with its {name} in its tag."""

    parameter: str             # before its value
    value_end: str             # after it
    loose_lines: bool = False  # models may omit line breaks; GLM-4.7 writes none

    def written(self, name: str, value) -> str:
        text = value if isinstance(value, str) else as_json(value)
        return self.parameter.replace("{name}", name) + text + self.value_end


def described(function: Mapping) -> Mapping:
    """A function with a description, which clients may omit."""
    return {"description": "", **function}


def typed(function: Mapping) -> Mapping:
    """A function whose parameters have types, however its schema expresses them."""
    if not (parameters := function.get("parameters")):
        return function
    return {**function, "parameters": {"type": "object", **plain_schema(parameters, SchemaForms(parameters))}}


@dataclass(frozen=True, kw_only=True)
class CallFormat:
    """How models of some families write function calls.

    The grammar that makes a model write calls is built from `call` and `calls`, in which {name}, {quoted},
    {arguments} and {digit} stand for the function's name, its name as a JSON string, its arguments, and any
    digit. The readers look for the markers, and understand more than that (see calls.py)."""

    template_has: tuple[str, ...] = ()  # a chat template with all of these has this format, if it has tools
    call: str = ""                      # one call as the family writes it
    calls: str = "{calls}"              # all calls of an answer
    between: str | None = None          # what separates two calls; None: there can be only one
    marks: tuple[str, ...] = ("", "")   # what begins a call, what ends it, what may enclose all calls
    inside: tuple[str, ...] = ()        # markers in a call
    name_end: str = ""                  # what comes after a name that is not in JSON
    untagged: bool = False              # calls may be the whole answer, with nothing before them
    loose: bool = False                 # some models end an answer with calls in plain JSON, fenced or not
    tags: Tags | None = None            # if the arguments are not JSON: each in a tag,
    notation: Notation | None = None    # or values in brackets
    thoughts: tuple[str, str] | None = None  # encloses reasoning, where all of an answer is in this format
    # what a peculiar template needs; see history.py
    history: Callable[[list[dict], str], None] = lambda dialogue, mark: None  # changes the conversation
    mend: Callable[[str, str], str] = lambda text, mark: text  # corrects the rendered conversation
    function: Callable[[Mapping], Mapping] = lambda function: function  # a function as the template reads it
    efforts: Mapping = field(default_factory=dict)  # its words for reasoning efforts that it does not know
    stops: tuple[str, ...] = ()  # the tokens that end an answer, if the model's files name wrong ones

    @property
    def markers(self) -> tuple[str, ...]:
        return tuple(filter(None, (*self.marks, *self.inside)))

    @property
    def typed(self) -> bool:
        """Whether the readers need the parameters' types and names."""
        return bool(self.tags or self.notation)

    @property
    def lead(self) -> str:
        """The text between the marker that begins a call and its name."""
        text = self.calls.replace("{calls}", self.call).partition(self.marks[0] or "{calls}")[2]
        return re.split(r'"|\{(?:name|quoted)\}', text)[0].strip()

    def written(self, calls: Seq[Mapping]) -> str:
        """Earlier calls, whose arguments are objects, as the family writes them."""
        between = "\n" if self.between is None else self.between
        return self.calls.replace("{calls}", between.join(map(self._written, calls)))

    def _written(self, call: Mapping) -> str:
        name = call["function"]["name"]
        arguments = call["function"]["arguments"]
        number = call.get("id", "").rpartition(":")[2]
        parts = {"name": name, "quoted": as_json(name), "digit": number, "arguments": as_json(arguments)}
        if self.notation:
            parts["arguments"] = self.notation.arguments(arguments)
        elif self.tags:
            parts["arguments"] = "".join(self.tags.written(*pair) for pair in arguments.items())
        return re.sub(r"\{(name|quoted|digit|arguments)\}", lambda place: parts[place[1]], self.call)

    @property
    def around_arguments(self) -> list[str]:
        """What is between the marker that begins a call and its arguments, and after them."""
        return self.call.removeprefix(self.marks[0]).removesuffix(self.marks[1]).split("{arguments}")


DEEPSEEK = CallFormat(
    template_has=("<｜tool▁sep｜>",),
    call="<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>",
    calls="<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>", between="",
    marks=("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    inside=("<｜tool▁sep｜>",), name_end="<｜tool▁sep｜>", history=no_empty_content)
MISTRAL = CallFormat(
    template_has=("[TOOL_CALLS]",), call='{"name": {quoted}, "arguments": {arguments}}',
    calls="[TOOL_CALLS][{calls}]", between=", ", marks=("[TOOL_CALLS]", ""), inside=("[CALL_ID]", "[ARGS]"))
QWEN_TAGS = CallFormat(
    template_has=("<parameter=",), between="\n", marks=("<tool_call>", "</tool_call>"),
    call="<tool_call>\n<function={name}>\n{arguments}</function>\n</tool_call>",
    tags=Tags("<parameter={name}>\n", "\n</parameter>\n"), efforts={"minimal": "low", "high": "xhigh"})
LFM2 = CallFormat(
    template_has=("<|tool_call_start|>",), call="{name}({arguments})", between=", ",
    calls="<|tool_call_start|>[{calls}]<|tool_call_end|>", marks=("<|tool_call_start|>", "<|tool_call_end|>"),
    notation=PYTHON)
MISTRAL_NAME = replace(
    MISTRAL, template_has=("[TOOL_CALLS]", "[ARGS]"), call="[TOOL_CALLS]{name}[ARGS]{arguments}",
    calls="{calls}", between="", name_end="[ARGS]")
CALL_FORMATS = {  # a template has the first one that fits
    # gpt-oss: messages to the recipient functions.name
    "harmony": CallFormat(
        template_has=("<|channel|>", "<|message|>"), inside=HARMONY, thoughts=("<|message|>", "<|end|>"),
        call="<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}",
        history=marked_for_harmony, mend=as_harmony, function=described,
        efforts={"none": "low", "minimal": "low", "xhigh": "high", "max": "high"},
        stops=("<|return|>", "<|call|>", "<|endoftext|>")),  # <|end|> ends a message, not the answer
    "muse": CallFormat(  # Muse Glimmer: messages to "self", "user" or a function
        template_has=("<|message|>", "<atem:invoke"), inside=MUSE, thoughts=("<|message|>", "<|eom|>"),
        call=' to={name}<|message|><atem:function_calls>\n<atem:invoke name="{name}">\n{arguments}'
             "</atem:invoke>\n</atem:function_calls>",
        between="<|eom|><|start|>assistant", marks=("<atem:function_calls>", "</atem:function_calls>"),
        tags=Tags('<atem:parameter name="{name}">', "</atem:parameter>\n"), function=described,
        stops=("<|eot|>", "<|end_of_text|>")),  # <|eom|> ends a message, not the answer
    "mistral settings": replace(  # Mistral Small 4, whose template knows two efforts
        MISTRAL_NAME, template_has=(*MISTRAL_NAME.template_has, "[MODEL_SETTINGS]"),
        efforts={"minimal": "none", **dict.fromkeys(("low", "medium", "xhigh", "max"), "high")}),
    "mistral name": MISTRAL_NAME,
    "mistral": MISTRAL,
    "deepseek fenced": replace(  # V3, R1
        DEEPSEEK, template_has=("<｜tool▁sep｜>", "```json"), name_end="```json",
        call="<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"),
    "deepseek": DEEPSEEK,  # V3.1
    "kimi": CallFormat(
        template_has=("<|tool_call_begin|>",),
        call="<|tool_call_begin|>functions.{name}:{digit}<|tool_call_argument_begin|>{arguments}"
             "<|tool_call_end|>",
        calls="<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|>", between="",
        marks=("<|tool_call_begin|>", "<|tool_call_end|>",
               "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        inside=("<|tool_call_argument_begin|>",), name_end="<|tool_call_argument_begin|>",
        history=counted_ids),
    "seed tags": replace(  # Seed-OSS
        QWEN_TAGS, template_has=("<parameter=", "<seed:tool_call>"),
        marks=("<seed:tool_call>", "</seed:tool_call>"),
        call="<seed:tool_call>\n<function={name}>\n{arguments}</function>\n</seed:tool_call>",
        tags=Tags("<parameter={name}>", "</parameter>\n")),
    "qwen tags": QWEN_TAGS,  # Qwen3-Coder, Qwen3.5; 3.8 knows efforts
    "glm tags": CallFormat(  # GLM-4.5
        template_has=("<arg_key>",), call="<tool_call>{name}\n{arguments}</tool_call>", between="\n",
        marks=("<tool_call>", "</tool_call>"),
        inside=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        tags=Tags("<arg_key>{name}</arg_key>\n<arg_value>", "</arg_value>\n", loose_lines=True)),
    "minicpm fenced": replace(  # MiniCPM 3
        LFM2, template_has=("<|tool_call_start|>", "```python"), between="\n",
        calls="<|tool_call_start|>\n```python\n{calls}\n```\n<|tool_call_end|>"),
    "lfm2": LFM2,
    # the first templates name the marker of the tools alone, and show no calls
    "lfm2 list": replace(LFM2, template_has=("<|tool_list_start|>",), history=calls_as_content),
    "gemma": CallFormat(  # Gemma 4; it begins the result of its calls itself
        template_has=("<|tool_call>",), call="<|tool_call>call:{name}{{arguments}}<tool_call|>", between="",
        marks=("<|tool_call>", "<tool_call|>"), inside=(GEMMA.quote,), notation=GEMMA,
        history=marked_for_gemma, mend=as_gemma, function=typed,
        stops=("<eos>", "<turn|>", "<|tool_response>")),
    "tagged": CallFormat(  # Hermes, Qwen; Qwen2.5-Coder writes loose calls
        template_has=("<tool_call>",), marks=("<tool_call>", "</tool_call>"), between="\n", loose=True,
        call='<tool_call>\n{"name": {quoted}, "arguments": {arguments}}\n</tool_call>'),
    "json": CallFormat(  # Llama 3
        marks=("<|python_tag|>", ""), untagged=True, call='{"name": {quoted}, "parameters": {arguments}}')}
NO_CALLS = CallFormat()  # for a model that cannot chat
GENERIC_FORMAT = "tagged"  # for templates without tools

# If a marker is a token of the vocabulary, a lone surrogate of its own stands for that token in an answer's
# text: no decoded text contains these, so the same marker spelled out in ordinary tokens stays text. They are
# the high surrogates; the low ones stand for calls of a calculator (see calculations.py).
MARKS = {name: chr(0xd800 + index) for index, name in enumerate(dict.fromkeys(itertools.chain(
    *THOUGHTS, *WRAPPERS, *(row.markers for row in CALL_FORMATS.values()))))}
MARKERS = {mark: name for name, mark in MARKS.items()}
A_MARK = re.compile("[\ud800-\udbff]")
A_MARKER = re.compile(f"({'|'.join(map(re.escape, sorted(MARKS, key=len, reverse=True)))})")


def tool_format_of(template: str) -> str | None:
    """The row of CALL_FORMATS for a chat template: how its model calls functions. None if it cannot."""
    has_tools = re.search(r"{[{%][^{}%]*\btools\b", template)
    for name, row in CALL_FORMATS.items():
        if (has_tools or row.thoughts) and all(sign in template for sign in row.template_has):
            return name
    return None


def calls_of(spec: TextSpec) -> tuple[str | None, bool]:
    """How a model calls functions (see tool_format_of), and whether its template supports them."""
    native = tool_format_of(spec.chat_template or "")
    can_chat = spec.kind == "nanochat" or spec.chat_template
    return native or (GENERIC_FORMAT if can_chat else None), native is not None


def thoughts_of(template: str) -> tuple[str, str] | None:
    """The markers around the reasoning of a model with this chat template; None if it does not think."""
    name = tool_format_of(template)
    if name and CALL_FORMATS[name].thoughts:
        return CALL_FORMATS[name].thoughts
    return next((thoughts for thoughts in THOUGHTS if thoughts[1] in template), None)


def wrapper_of(template: str) -> tuple[str, str]:
    """The markers around the content of a model with this chat template; empty if it has none."""
    if not thoughts_of(template):
        return "", ""
    return next((pair for pair in WRAPPERS if all(sign in template for sign in pair)), ("", ""))


def knows_of_thinking(template: str) -> bool:
    """Whether a chat template lets a client say if, or how much, the model thinks."""
    return re.search(r"\b(reasoning_effort|enable_thinking|thinking)\b", template) is not None


def template_of(default: str | None, with_tools: str | None) -> str | None:
    """One template from two, if a model has a second one, `with_tools`, for chats with tools."""
    if not isinstance(default, str) or not isinstance(with_tools, str):
        return default
    first, second = (text.removesuffix("\n") for text in (with_tools, default))
    return f"{{% if tools is not none +%}}{first}{{%+ else +%}}{second}{{%+ endif %}}"


A_REFERENCE = re.compile(rf"<\[{A_MARKER.pattern}\]>")


def with_markers(grammar: str, markers: Mapping[str, int]) -> str:
    """A grammar in which each <[marker]> is the token, or the text where the vocabulary has no such token."""
    def with_suffix(rule: re.Match) -> str:
        """A suffix is looked for in text, so a suffix that is a token becomes a token after the rule."""
        marker, text = rule.groups()
        return f": {text} <[{marker}]>" if marker in markers else rule[0]

    def token_or_text(reference: re.Match) -> str:
        marker = reference[1]
        return f"<[{markers[marker]}]>" if marker in markers else json.dumps(marker)

    grammar = re.sub(rf"\[suffix={A_REFERENCE.pattern}\]: (.*)", with_suffix, grammar)
    return A_REFERENCE.sub(token_or_text, grammar)
