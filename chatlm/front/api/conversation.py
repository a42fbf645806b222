"""Messages of five APIs, as ours."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence as Seq
from contextlib import suppress
from dataclasses import replace

from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError, bad_value, invalid, shown
from chatlm.common.jsontext import is_text, whole_unicode
from chatlm.common.messages.requests import Message
from chatlm.front.admission.prompts import turn_starts
from chatlm.front.api.fields import A_FUNCTION, Field, list_schema, matches, no_tools, within_limit
from chatlm.front.api.field_types import NATIVE_ROLES, OPENAI_ROLES, SWITCH, TEXT, TEXT_PARTS
from chatlm.front.api.tables import TEMPLATE_OPTIONS


def named_messages(messages: list, roles: Seq[str]) -> Iterator[tuple[str, str, dict]]:
    """Yield (name for errors, role, message) for each message; `roles` are the allowed ones."""
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
        yield name, role, message


def template_options(values: Mapping) -> dict:
    """The TEMPLATE_OPTIONS of a body whose messages are checked. RequestError if they do not go together."""
    *earlier, last = values["messages"]
    for index, message in enumerate(earlier):
        if message.get("prefix"):
            param = f"messages[{index}].prefix"
            raise invalid(param, f"{param}: only the last message can be continued")
    chosen = {each.name: values[each.name] for each in TEMPLATE_OPTIONS if each.name in values}
    param = "continue_final_message"
    if last.get("prefix") is not None:
        param = f"messages[{len(earlier)}].prefix"
        chosen["continue_final_message"] = Field(param, SWITCH, "").read(last["prefix"])
    if not chosen.get("continue_final_message"):
        return chosen
    reason = ("add_generation_prompt begins a new answer: leave it out or send false"
              if chosen.get("add_generation_prompt") else
              f"the last message must be the assistant's, not of role {last['role']}"
              if last["role"] != "assistant" else
              "the last message calls functions, so it is complete" if last.get("tool_calls") else "")
    if reason:
        raise invalid(param, f"{param}: {reason}")
    return chosen


def native_messages(messages: list, truncate: bool = False) -> tuple[tuple[Message, ...], int]:
    """Messages within the native API's limits, and how many of the oldest were dropped to fit."""
    within_limit("messages", len(messages), LIMITS.truncated_messages if truncate else LIMITS.messages,
                 "messages")
    named = list(named_messages(messages, NATIVE_ROLES))
    kept, parsed = newest_turns(named) if truncate else named, []
    within_limit("messages", len(kept), LIMITS.messages, "messages")
    for name, role, message in kept:
        content = Field(f"{name}.content", TEXT, "").read(message.get("content"))
        if role != "assistant":
            within_limit(f"characters in {name}", len(content), LIMITS.message_characters, f"{name}.content")
        parsed.append(Message(role, content, reasoning_before(message, name) or None))
    size = sum(len(m.content) + sum(map(len, (m.more or {}).values())) for m in parsed)
    within_limit("characters in all messages", size, LIMITS.total_characters, "messages")
    return tuple(parsed), len(named) - len(kept)


def newest_turns(named: list[tuple[str, str, dict]]) -> list[tuple[str, str, dict]]:
    """The system messages, the last turn, and as many turns before it as native_messages allows."""
    def size(role: str, message: dict) -> float:
        length = len(content) if is_text(content := message.get("content")) else 0
        return length if role in ("assistant", "system") or length <= LIMITS.message_characters else math.inf

    fixed = [size(role, message) for _, role, message in named if role == "system"]
    count, characters, first = len(fixed), sum(fixed), len(named)
    for start in reversed(turn_starts([role for _, role, _ in named])):
        turn = [size(role, message) for _, role, message in named[start:first] if role != "system"]
        count, characters = count + len(turn), characters + sum(turn)
        if first < len(named) and (count > LIMITS.messages or characters > LIMITS.total_characters):
            break
        first = start
    return [each for index, each in enumerate(named) if index >= first or each[1] == "system"]


def openai_messages(messages: list, with_tools: bool = False) -> tuple[Message, ...]:
    roles = OPENAI_ROLES + ["tool", "function"] * with_tools
    return chat_messages(named_messages(messages, roles), with_tools)


def chat_messages(named: Iterable[tuple[str, str, dict]], with_tools: bool) -> tuple[Message, ...]:
    """Messages of Chat Completions, each with its name for errors and its role."""
    parsed = []
    for name, role, message in named:
        if role == "tool" and not with_tools:
            raise no_tools(name)
        calls, more = message.get("tool_calls"), {}
        if not calls and role == "assistant" and message.get("function_call"):
            calls = [{"function": message["function_call"]}]
        if calls and not with_tools:
            raise no_tools(f"{name}.tool_calls")
        if with_tools:
            more = {key: message[key] for key in ("name", "tool_call_id") if is_text(message.get(key))}
        role = {"developer": "system", "function": "tool"}.get(role, role)
        if calls:
            more["tool_calls"] = called_before(calls, f"{name}.tool_calls")
        more |= reasoning_before(message, name)
        content = content_text(message.get("content"), f"{name}.content")
        parsed.append(Message(role, content, more or None))
    return tuple(parsed)


def reasoning_before(message: dict, name: str) -> dict[str, str]:
    """What the assistant thought before this message, which clients send under either name."""
    for key in ("reasoning_content", "reasoning"):
        if message.get("role") == "assistant" and message.get(key):
            return {"reasoning_content": Field(f"{name}.{key}", TEXT, "").read(message[key])}
    return {}


def response_messages(values: Mapping) -> Iterator[tuple[str, str, dict]]:
    """`instructions` and `input` of a response as messages of Chat Completions (see chat_messages)."""
    if "instructions" in values:
        yield "instructions", "system", {"content": values["instructions"]}
    items = values.get("input", "")
    for index, item in enumerate([{"role": "user", "content": items}] if is_text(items) else items):
        name = f"input[{index}]" if items is not item else "input"
        if not isinstance(item, dict):
            raise bad_value(name, item, "an object with a type or a role")
        kind = item.get("type") or ("message" if "role" in item or "id" not in item else "item_reference")
        if kind == "message":
            if item.get("role") not in OPENAI_ROLES:
                raise bad_value(f"{name}.role", item.get("role"), f"one of {', '.join(OPENAI_ROLES)}")
            yield name, item["role"], {"content": item.get("content")}
        elif kind == "function_call":
            call = {"id": item.get("call_id"), "function": item}
            yield name, "assistant", {"tool_calls": [call]}
        elif kind == "function_call_output":
            yield name, "tool", {"tool_call_id": item.get("call_id"), "content": item.get("output")}
        elif kind == "reasoning":
            thought = item.get("content") or item.get("summary")
            yield name, "assistant", {"reasoning_content": content_text(thought, f"{name}.content")}
        else:
            raise RequestError(
                f"{name} is of type {shown(kind)}; this server keeps no answers and reads items of type "
                "message, function_call, function_call_output and reasoning",
                code="unsupported_item", param=name)


def joined_turns(messages: Iterable[Message]) -> tuple[Message, ...]:
    """One message for each turn of the assistant, whose reasoning, text and calls are items of their own, and
    one for the system messages that begin the conversation; an empty question if there is none."""
    turns: list[Message] = []
    for message in messages:
        last = turns[-1] if turns and turns[-1].role == message.role else Message("", "")
        before, more = last.more or {}, message.more or {}
        if last.role == "system" and len(turns) == 1:
            turns[-1] = replace(last, content=f"{last.content}\n\n{message.content}")
        elif last.role == "assistant" and not (message.content and (last.content or "tool_calls" in before)):
            calls = [*before.get("tool_calls", ()), *more.get("tool_calls", ())]
            more = {**before, **more, **({"tool_calls": calls} if calls else {})}
            turns[-1] = Message(last.role, last.content + message.content, more or None)
        else:
            turns.append(message)
    if [turn.role for turn in turns] in ([], ["system"]):
        turns.append(Message("user", ""))
    return tuple(turns)


BILLING = "x-anthropic-billing-header:"  # a block that changes each time: no prefix would be cached


def anthropic_messages(values: Mapping) -> Iterator[tuple[str, str, dict]]:
    """`system` and `messages` of Anthropic's API as messages of Chat Completions (see chat_messages)."""
    system = values.get("system", "")
    if not is_text(system):
        system = [block for block in system if not str(block.get("text")).startswith(BILLING)]
    if system:
        yield "system", "system", {"content": system}
    for name, role, message in named_messages(values["messages"], NATIVE_ROLES):
        if not isinstance(message.get("content"), list):
            yield name, role, {"content": message.get("content")}
            continue
        said: dict[str, list] = {"text": [], "thinking": [], "tool_use": [], "tool_result": []}
        for index, block in enumerate(message["content"]):
            kind = block.get("type") if isinstance(block, dict) else None
            if kind == "redacted_thinking":
                continue
            # anything else is refused as text parts are
            kind = kind if is_text(kind) and kind in said else "text"
            said[kind].append((f"{name}.content[{index}]", block))
        for place, block in said["tool_result"]:
            yield place, "tool", {"tool_call_id": block.get("tool_use_id"), "content": block.get("content")}
        calls = [{"id": block.get("id"), "function": {**block, "arguments": block.get("input")}}
                 for _, block in said["tool_use"]]
        thoughts = "".join(content_text(block.get("thinking"), place) for place, block in said["thinking"])
        texts = [{"type": "text", "text": part_text(block, place)} for place, block in said["text"]]
        if texts or calls or thoughts or not said["tool_result"]:
            yield name, role, {"content": texts, **({"tool_calls": calls} if calls else {}),
                               **({"reasoning_content": thoughts} if thoughts else {})}


def called_before(calls, name: str) -> list[dict]:
    """The assistant's earlier calls as templates expect them: arguments as an object."""
    if not matches(list_schema(A_FUNCTION), calls):
        raise bad_value(name, calls, "a list of calls, each with a function")
    read = []
    for call in calls:
        arguments = call["function"].get("arguments") or {}
        with suppress(ValueError, TypeError, RecursionError):
            arguments = json.loads(arguments)
        named_call = {"id": str(call["id"])} if call.get("id") else {}
        read.append({**named_call, "type": "function",
                     "function": {"name": call["function"]["name"], "arguments": arguments}})
    return read


def content_text(content, name: str) -> str:
    """One string from a string, null or a list of text parts."""
    if isinstance(content, list):
        return "\n".join(part_text(part, f"{name}[{index}]") for index, part in enumerate(content))
    if content is not None and not is_text(content):
        raise bad_value(name, content, "a string, null or a list of parts")
    return whole_unicode(content or "")


def part_text(part, name: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in TEXT_PARTS:
        raise RequestError(f"{name} must be a text part, not {shown(kind or part)}: "
                           "this model reads text only",
                           code="unsupported_content", param=name)
    text = part.get("refusal" if kind == "refusal" else "text")
    if text is not None and not is_text(text):
        raise bad_value(f"{name}.text", text, "a string")
    return whole_unicode(text or "")
