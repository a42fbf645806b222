"""How families of models mark reasoning and calls of functions."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence as Seq
from dataclasses import replace
from typing import TYPE_CHECKING

from chatlm.common.messages.requests import Message

if TYPE_CHECKING:
    from chatlm.common.messages.requests import TextSpec


# Markers of reasoning and calls in the formats below. Where one is a token of the vocabulary, a character of
# its own, a lone surrogate, stands for that token in the text of an answer: no decoded text has these, so the
# same marker spelled out in ordinary tokens stays text.
THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"),
            ("<|START_THINKING|>", "<|END_THINKING|>"))
DEEPSEEK = tuple(f"<｜tool▁{name}｜>" for name in (
    "call▁begin", "call▁end", "calls▁begin", "calls▁end"))
CALLS = {  # tool_format -> what begins a call, what ends it, what may enclose all calls
    **dict.fromkeys(("tagged", "qwen tags", "glm tags"), ("<tool_call>", "</tool_call>")),
    "seed tags": ("<seed:tool_call>", "</seed:tool_call>"), "json": ("<|python_tag|>", ""),
    "mistral": ("[TOOL_CALLS]", ""), "mistral name": ("[TOOL_CALLS]", ""),
    "deepseek fenced": DEEPSEEK, "deepseek": DEEPSEEK,
    "kimi": ("<|tool_call_begin|>", "<|tool_call_end|>",
             "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")}
IN_CALLS = ("[CALL_ID]", "[ARGS]", "<｜tool▁sep｜>", "<|tool_call_argument_begin|>",
            "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
TAGGED_ARGUMENTS = {  # tool_format -> a function's name, a parameter's, the end of its value, of all of them
    "qwen tags": ("<function={}>\n", "<parameter={}>\n", "\n</parameter>\n", "</function>\n"),
    "seed tags": ("<function={}>\n", "<parameter={}>", "</parameter>\n", "</function>\n"),
    "glm tags": ("{}\n", "<arg_key>{}</arg_key>\n<arg_value>", "</arg_value>\n", "")}
HARMONY = tuple(f"<|{name}|>" for name in (
    "start", "channel", "constrain", "message", "end", "return", "call"))
MARKS = {name: chr(0xd800 + index) for index, name in enumerate(dict.fromkeys(filter(None, (
    *itertools.chain(*THOUGHTS, *CALLS.values()), *IN_CALLS, *HARMONY))))}
A_MARK = re.compile("[\ud800-\udfff]")
A_MARKER = re.compile(f"({'|'.join(map(re.escape, sorted(MARKS, key=len, reverse=True)))})")


GENERIC_FORMAT = "tagged"  # of calls where the template knows no tools
GENERIC_TOOLS = """You can call functions. Each line here describes one of them:
{}

To call a function, write
<tool_call>
{{"name": "the function", "arguments": {{...}}}}
</tool_call>
You then get what it returns in <tool_response>. Where no function helps, answer in words."""


def with_generic_tools(messages: Seq[Message], tools: Seq[dict], has_system: bool = True) -> list[Message]:
    """A conversation for a template that knows no tools: the system message describes them (the first
    message, if the model has no system role), and calls and what they return are text in tags."""
    told: list[Message] = []
    for message in messages:
        role, content, more = message.role, message.content, {**(message.more or {})}
        for call in more.pop("tool_calls", ()):
            call = json.dumps(call["function"], ensure_ascii=False)
            content += f"{chr(10) * bool(content)}<tool_call>\n{call}\n</tool_call>"
        if role == "tool":
            role, content, more = "user", f"<tool_response>\n{content}\n</tool_response>", {}
        if role == "user" and told and told[-1].role == "user" and told[-1].content.endswith("response>"):
            content = told.pop().content + "\n" + content  # many templates want roles to alternate
        told.append(Message(role, content, more or None))
    if tools:
        prompt = GENERIC_TOOLS.format("\n".join(
            json.dumps(tool["function"], ensure_ascii=False) for tool in tools))
        if told[0].role == "system" or not has_system:
            parts = [told[0].content, prompt][::1 if told[0].role == "system" else -1]
            told[0] = replace(told[0], content="\n\n".join(parts).strip())
        else:
            told.insert(0, Message("system", prompt))
    return told


HARMONY_EFFORTS = {"none": "low", "minimal": "low", "xhigh": "high"}  # its template knows three


def tool_format_of(template: str) -> str | None:
    """How a chat template makes the model call functions; None if it does not support them.

    "tagged": <tool_call>{"name": ..., "arguments": ...}</tool_call> in the text (Hermes, Qwen);
    "json": the whole answer is such an object, or a list of them (Llama 3);
    "mistral": [TOOL_CALLS] and a list of them; "mistral name": [TOOL_CALLS]name[ARGS]{...};
    "deepseek": its markers around name, separator, {...} (V3.1); "deepseek fenced": function, separator,
    name and {...} as a block of code (V3, R1); "kimi": functions.name:0, a marker, {...};
    "qwen tags": <tool_call><function=name><parameter=key>value</parameter></function></tool_call>
    (Qwen3-Coder, Qwen3.5), "seed tags": nearly the same (Seed-OSS); "glm tags": <tool_call>name, then for
    each parameter <arg_key>key</arg_key><arg_value>value</arg_value> (GLM-4.5);
    "harmony": messages to the recipient functions.name (gpt-oss)."""
    if "<|channel|>" in template and "<|message|>" in template:
        return "harmony"
    if not re.search(r"{[{%][^{}%]*\btools\b", template):
        return None
    if "[TOOL_CALLS]" in template:
        return "mistral name" if "[ARGS]" in template else "mistral"
    if IN_CALLS[2] in template:
        return "deepseek fenced" if "```json" in template else "deepseek"
    if CALLS["kimi"][0] in template:
        return "kimi"
    if "<parameter=" in template:
        return "seed tags" if CALLS["seed tags"][0] in template else "qwen tags"
    return "glm tags" if "<arg_key>" in template else "tagged" if "<tool_call>" in template else "json"


def calls_of(spec: TextSpec) -> tuple[str | None, bool]:
    """How a model calls functions (see tool_format_of), and whether its template knows them."""
    native = tool_format_of(spec.chat_template or "")
    can_chat = spec.kind == "nanochat" or spec.chat_template
    return native or (GENERIC_FORMAT if can_chat else None), native is not None


def thoughts_of(template: str) -> tuple[str, str] | None:
    """What encloses the reasoning of a model with this chat template; None if it does not think."""
    if tool_format_of(template) == "harmony":
        return "<|message|>", "<|end|>"
    return next((each for each in THOUGHTS if each[1] in template), None)


def single_calls(dialogue: list[dict]) -> list[dict]:
    """The same conversation with one call in each message of the assistant, followed by its result."""
    results = {each["tool_call_id"]: each for each in dialogue if each.get("tool_call_id")}
    split, placed = [], set()
    for message in dialogue:
        first, *others = message.get("tool_calls", ()) or [None]
        if not others and id(message) not in placed:
            split.append(message)
        for call in (first, *others) if others else ():
            split.append({**(message if call is first else {"role": "assistant", "content": ""}),
                          "tool_calls": [call]})
            if result := results.get(call.get("id")):
                split.append(result)
                placed.add(id(result))
    return split


def template_of(default: str | None, with_tools: str | None) -> str | None:
    """One template that is `with_tools` for a chat with tools, where a model has such a second one."""
    if not isinstance(default, str) or not isinstance(with_tools, str):
        return default
    first, second = (text.removesuffix("\n") for text in (with_tools, default))
    return f"{{% if tools is not none +%}}{first}{{%+ else +%}}{second}{{%+ endif %}}"


A_REFERENCE = re.compile(rf"<\[{A_MARKER.pattern}\]>")


def with_markers(grammar: str, markers: Mapping[str, int]) -> str:
    """A grammar in which each <[marker]> is the token, or the text where the vocabulary has no such token."""
    # text that ends with a marker: a suffix is looked for in text alone
    grammar = re.sub(rf"\[suffix={A_REFERENCE.pattern}\]: (.*)", lambda found:
                     f": {found[2]} <[{found[1]}]>" if found[1] in markers else found[0], grammar)
    return A_REFERENCE.sub(lambda found: f"<[{markers[found[1]]}]>" if found[1] in markers
                           else json.dumps(found[1]), grammar)
