"""Converts messages as Chat Completions has them to the program's own `Message`. Dialects first make such
messages of theirs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence as Seq
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from chatlm.common.errors import RequestError, bad_value, invalid, shown
from chatlm.common.jsontext import as_json, is_text, whole_unicode
from chatlm.common.messages.requests import Message
from chatlm.common.text.calculations import with_calls
from chatlm.front.api.earlier_calculations import is_nanochats, read_nanochat_parts, with_calculations
from chatlm.front.api.found_tools import KnownFunctions, taken_out
from chatlm.front.api.fields import A_FUNCTION, Field, list_schema, matches, no_tools
from chatlm.front.api.picture_parts import picture_in
from chatlm.front.api.field_types import OPENAI_ROLES, SWITCH, TEXT, TEXT_PARTS, thinking
from chatlm.front.api.tables import SWITCHES, TEMPLATE_OPTIONS


class SentMessage(NamedTuple):
    """A message of a body. Its fields are those of Chat Completions, unless a function names another API."""

    name: str  # for errors
    role: str
    fields: dict
    brings: Any = None  # tools that it brings, as its API has them; None: none


def sent_messages(messages: list, roles: Seq[str]) -> Iterator[SentMessage]:
    """The messages of any API, checked to be objects with one of these roles."""
    if not messages:
        raise bad_value("messages", messages, "a list of at least one message")
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, dict):
            raise bad_value(name, message, "an object with role and content")
        role = message.get("role")
        if role in ("tool", "function") and role not in roles:
            raise no_tools(f"{name}.role")
        if role not in roles:
            raise bad_value(f"{name}.role", role, f"one of {', '.join(roles)}")
        yield SentMessage(name, str(role), message)


def template_options(values: Mapping) -> dict:
    """The TEMPLATE_OPTIONS of a body whose messages were checked. Raises RequestError if they contradict."""
    *earlier, last = values["messages"]
    for index, message in enumerate(earlier):
        if message.get("prefix"):
            param = f"messages[{index}].prefix"
            raise invalid(param, f"{param}: only the last message can be continued")
    chosen = {option.name: values[option.name] for option in TEMPLATE_OPTIONS
              if option not in SWITCHES and values.get(option.name, "") != ""}
    switched = whether_to_think(values)
    if switched:
        chosen["chat_template_kwargs"] = {**switched, **chosen.get("chat_template_kwargs", {})}
    param = "continue_final_message"
    if last.get("prefix") is not None:
        param = f"messages[{len(earlier)}].prefix"
        chosen["continue_final_message"] = Field(param, SWITCH, "").read(last["prefix"])
    if chosen.get("continue_final_message"):
        check_continuable(last, chosen, param)
    return chosen


def check_continuable(message: Mapping, options: Mapping, param: str):
    """Raise RequestError if the last message of a conversation cannot be continued."""
    reason = ""
    if options.get("add_generation_prompt"):
        reason = "add_generation_prompt begins a new answer: leave it out or send false"
    elif message["role"] != "assistant":
        reason = f"the last message must be the assistant's, not of role {message['role']}"
    elif message.get("tool_calls"):
        reason = "the last message calls functions, so it is complete"
    if reason:
        raise invalid(param, f"{param}: {reason}")


def whether_to_think(values: Mapping) -> dict[str, bool]:
    """The template's variables for the SWITCHES of a body. Raises RequestError if another field of the body
    contradicts them."""
    switches = {switch.name: values[switch.name] for switch in SWITCHES
                if values.get(switch.name) is not None}
    if not switches:
        return {}
    (first, thinks), *_ = switches.items()
    variables = values.get("chat_template_kwargs", {})
    for name in ("enable_thinking", "thinking"):
        if isinstance(variables.get(name), bool):
            switches[f"chat_template_kwargs.{name}"] = variables[name]
    for name, other in switches.items():
        if other != thinks:
            raise invalid(name, f"{first} and {name} say whether the model thinks, and they differ")
    return thinking(thinks)["chat_template_kwargs"]


def openai_messages(messages: list, with_tools: bool = False,
                    known: KnownFunctions | None = None) -> tuple[Message, ...]:
    """The messages of Chat Completions. known: as for `chat_messages`."""
    roles = [*OPENAI_ROLES, "tool", "function"] if with_tools else OPENAI_ROLES
    return chat_messages(without_custom_calls(sent_messages(messages, roles)), with_tools, known)


def is_custom(call) -> bool:
    """Does this call, in a message of Chat Completions, call no function?"""
    return type_of(call) == "custom" and "function" not in call


def custom_calls(message) -> list[dict]:
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    return [*filter(is_custom, calls)] if isinstance(calls, list) else []


def without_custom_calls(sent: Iterable[SentMessage]) -> Iterator[SentMessage]:
    """The messages without custom calls and their results."""
    skipped = set()  # ids of calls
    for name, role, fields, _ in sent:
        if others := custom_calls(fields):
            skipped |= {call["id"] for call in others if is_text(call.get("id"))}
            fields = {**fields, "tool_calls": [*itertools.filterfalse(is_custom, fields["tool_calls"])]}
        call_id = fields.get("tool_call_id")
        if role != "tool" or not is_text(call_id) or call_id not in skipped:
            yield SentMessage(name, role, fields)


def chat_messages(sent: Iterable[SentMessage], with_tools: bool,
                  known: KnownFunctions | None = None) -> tuple[Message, ...]:
    """The messages as the program has them. with_tools: can the model call functions? known: is told which
    ones they make known."""
    known = known or KnownFunctions()
    parsed = []
    for name, role, fields, brings in sent:
        if role == "tool" and not with_tools:
            raise no_tools(name)
        content, tools = taken_out(fields.get("content"), role, known, f"{name}.content")
        if brings is not None:
            change = known.bring(brings, f"{name}.tools")
            tools += change.tools
            content = "\n".join(filter(None, (content, *change.texts)))
        if tools and not with_tools:
            raise no_tools(name)
        calls = fields.get("tool_calls")
        more = {}
        if not calls and role == "assistant" and fields.get("function_call"):
            calls = [{"function": fields["function_call"]}]
        if calls and not with_tools:
            raise no_tools(f"{name}.tool_calls")
        if with_tools:
            more = {key: fields[key] for key in ("name", "tool_call_id") if is_text(fields.get(key))}
            if role == "tool" and is_text(fields.get("tool_name")):  # Ollama's, where calls have no ids
                more.setdefault("name", fields["tool_name"])
        if calls:
            more["tool_calls"] = earlier_calls(calls, f"{name}.tool_calls")
        more |= earlier_reasoning(role, fields, name)
        role = {"developer": "system", "function": "tool"}.get(role, role)
        message = chat_message(role, {**fields, "content": content}, more, name)
        parsed.append(replace(message, tools=tuple(tools)) if tools else message)
    return tuple(parsed)


def earlier_reasoning(role: str, fields: Mapping, name: str) -> dict[str, str]:
    """What the assistant thought before this message. Clients send it under either name."""
    for key in ("reasoning_content", "reasoning"):
        if role == "assistant" and fields.get(key):
            return {"reasoning_content": Field(f"{name}.{key}", TEXT, "").read(fields[key])}
    return {}


def type_of(item) -> str:
    """The type of an item or a block; "" if it has none."""
    named = item.get("type") if isinstance(item, dict) else None
    return named if is_text(named) else ""


def other_types(items, others: Collection[str]) -> tuple[str, ...]:
    """Which of the types `others` a list of items or blocks has, each once."""
    types = map(type_of, items if isinstance(items, list) else ())
    return tuple(dict.fromkeys(filter(others.__contains__, types)))


def without_others(items: Iterable, others: Collection[str]) -> Iterator:
    return (item for item in items if type_of(item) not in others)


def earlier_calls(calls, name: str) -> list[dict]:
    """The assistant's earlier calls. Their arguments are an object, or a text if that is no object."""
    if not matches(list_schema(A_FUNCTION), calls):
        raise bad_value(name, calls, "a list of calls, each with a function")
    return [{**({"id": str(call["id"])} if call.get("id") else {}), "type": "function", "function": {
        "name": call["function"]["name"],
        "arguments": earlier_arguments(call["function"].get("arguments"))}} for call in calls]


def earlier_arguments(sent: Any) -> dict | str:
    """Arguments of an earlier call. None at all become an empty object. A text that is no object stays a
    text: a token limit may have cut it."""
    text = sent if is_text(sent) else ""
    if text.strip():
        with suppress(ValueError, RecursionError):
            sent = json.loads(text)
    if sent is None or is_text(sent) and not text.strip():
        return {}
    if isinstance(sent, dict):
        return sent
    return whole_unicode(text) or as_json(sent)


def chat_message(role: str, fields: Mapping, more: Mapping, name: str) -> Message:
    """A message of Chat Completions. One of the assistant keeps its calls of the calculator."""
    content = fields.get("content")
    if role != "assistant":
        return message_from(role, content, more, f"{name}.content")
    if isinstance(content, list) and is_nanochats(content):
        text, calls = read_nanochat_parts(content, f"{name}.content")
        return Message(role, text, with_calls(more, calls))
    return with_calculations(message_from(role, content, more, f"{name}.content"), fields, name)


def message_from(role: str, content, more: Mapping, name: str) -> Message:
    """A message whose content is a string, null, or a list of texts and pictures."""
    pictures = [*map(picture_in, content)] if isinstance(content, list) else []
    if not any(pictures):
        return Message(role, content_text(content, name), more or None)
    seen = []
    parts = list[str | int]()  # texts, and indexes of pictures
    for index, (part, picture) in enumerate(zip(content, pictures)):
        if picture:
            parts.append(len(seen))
            seen.append(picture)
        else:
            parts.append(part_text(part, f"{name}[{index}]"))
    text = "".join(part for part in parts if isinstance(part, str))
    return Message(role, text, more or None, tuple(seen), tuple(parts))


def content_text(content, name: str) -> str:
    """One string from a string, null or a list of text parts."""
    if isinstance(content, list):
        return "\n".join(part_text(part, f"{name}[{index}]") for index, part in enumerate(content))
    if content is not None and not is_text(content):
        raise bad_value(name, content, "a string, null or a list of parts")
    return whole_unicode(content or "")


def part_text(part, name: str) -> str:
    part_type = part.get("type") if isinstance(part, dict) else None
    if part_type not in TEXT_PARTS:
        raise RequestError(f"{name} must be a text or an image, not {shown(part_type or part)}",
                           code="unsupported_content", param=name)
    text = part.get("refusal" if part_type == "refusal" else "text")
    if text is not None and not is_text(text):
        raise bad_value(f"{name}.text", text, "a string")
    return whole_unicode(text or "")
