"""Converts the messages of five APIs to ours."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence as Seq
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError, bad_value, invalid, shown
from chatlm.common.jsontext import as_json, is_text, whole_unicode
from chatlm.common.messages.requests import Message
from chatlm.common.text.calculations import calculations_of, moved, text_in, with_calls
from chatlm.front.admission.prompts import turn_starts
from chatlm.front.api.calculations import is_nanochats, read_nanochat_parts, with_calculations
from chatlm.front.api.fields import A_FUNCTION, Field, list_schema, matches, no_tools, within_limit
from chatlm.front.api.passages import passage_parts
from chatlm.front.api.picture_parts import picture_in
from chatlm.front.api.field_types import NATIVE_ROLES, OPENAI_ROLES, SWITCH, TEXT, TEXT_PARTS, thinking
from chatlm.front.api.tables import SWITCHES, TEMPLATE_OPTIONS


class SentMessage(NamedTuple):
    """A message of a body, whose other fields are those of Chat Completions unless an API is named."""

    name: str  # for errors
    role: str
    fields: dict


def sent_messages(messages: list, roles: Seq[str]) -> Iterator[SentMessage]:
    """The messages of any API; `roles` are the allowed ones."""
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
    """The TEMPLATE_OPTIONS of a body whose messages were checked. RequestError if they contradict."""
    *earlier, last = values["messages"]
    for index, message in enumerate(earlier):
        if message.get("prefix"):
            param = f"messages[{index}].prefix"
            raise invalid(param, f"{param}: only the last message can be continued")
    chosen = {option.name: values[option.name] for option in TEMPLATE_OPTIONS
              if option not in SWITCHES and values.get(option.name, "") != ""}
    if switched := whether_to_think(values):
        chosen["chat_template_kwargs"] = {**switched, **chosen.get("chat_template_kwargs", {})}
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


def whether_to_think(values: Mapping) -> dict[str, bool]:
    """The variables of the template that the SWITCHES of a body mean. RequestError if it says otherwise
    elsewhere."""
    asked = {switch.name: values[switch.name] for switch in SWITCHES if values.get(switch.name) is not None}
    if not asked:
        return {}
    (first, thinks), *_ = asked.items()
    inside = values.get("chat_template_kwargs", {})
    asked |= {f"chat_template_kwargs.{name}": inside[name] for name in ("enable_thinking", "thinking")
              if isinstance(inside.get(name), bool)}
    for name, other in asked.items():
        if other != thinks:
            raise invalid(name, f"{first} and {name} say whether the model thinks, and they differ")
    return thinking(thinks)["chat_template_kwargs"]


def native_messages(messages: list, truncate: bool = False) -> tuple[tuple[Message, ...], int]:
    """Messages within the native API's limits, and how many of the oldest were dropped to fit."""
    within_limit("messages", len(messages), LIMITS.truncated_messages if truncate else LIMITS.messages,
                 "messages")
    sent = list(sent_messages(messages, NATIVE_ROLES))
    parsed = []
    kept = newest_turns(sent) if truncate else sent
    within_limit("messages", len(kept), LIMITS.messages, "messages")
    for name, role, fields in kept:
        if not isinstance(content := fields.get("content"), list):
            content = Field(f"{name}.content", TEXT, "").read(content)
        more = earlier_reasoning(role, fields, name)
        message = said_message(role, {**fields, "content": content}, more, name)
        if role != "assistant":
            within_limit(f"characters in {name}", len(message.content), LIMITS.message_characters,
                         f"{name}.content")
        parsed.append(message)
    size = sum(len(message.content) + len((message.more or {}).get("reasoning_content", ""))
               + len(text_in(calculations_of(message))) for message in parsed)
    within_limit("characters in all messages", size, LIMITS.total_characters, "messages")
    return tuple(parsed), len(sent) - len(kept)


def newest_turns(sent: list[SentMessage]) -> list[SentMessage]:
    """The system messages, the last turn, and as many turns before it as native_messages allows."""
    def size(message: SentMessage) -> float:
        length = len(content) if isinstance(content := message.fields.get("content"), str) else 0
        limited = message.role not in ("assistant", "system")
        return math.inf if limited and length > LIMITS.message_characters else length

    fixed = [size(message) for message in sent if message.role == "system"]
    count = len(fixed)
    characters = sum(fixed)
    first = len(sent)
    for start in reversed(turn_starts([message.role for message in sent])):
        turn = [size(message) for message in sent[start:first] if message.role != "system"]
        count = count + len(turn)
        characters = characters + sum(turn)
        if first < len(sent) and (count > LIMITS.messages or characters > LIMITS.total_characters):
            break
        first = start
    return [message for index, message in enumerate(sent) if index >= first or message.role == "system"]


def openai_messages(messages: list, with_tools: bool = False) -> tuple[Message, ...]:
    roles = [*OPENAI_ROLES, "tool", "function"] if with_tools else OPENAI_ROLES
    return chat_messages(without_custom_calls(sent_messages(messages, roles)), with_tools)


def is_custom(call) -> bool:
    """Is this call, in a message of Chat Completions, of no function?"""
    return type_of(call) == "custom" and "function" not in call


def custom_calls(message) -> list[dict]:
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    return [*filter(is_custom, calls)] if isinstance(calls, list) else []


def without_custom_calls(sent: Iterable[SentMessage]) -> Iterator[SentMessage]:
    """The messages without such calls and their results."""
    skipped = set()
    for name, role, fields in sent:
        if others := custom_calls(fields):
            skipped |= {call["id"] for call in others if is_text(call.get("id"))}
            fields = {**fields, "tool_calls": [*itertools.filterfalse(is_custom, fields["tool_calls"])]}
        asked = fields.get("tool_call_id")
        if role != "tool" or not is_text(asked) or asked not in skipped:
            yield SentMessage(name, role, fields)


def chat_messages(sent: Iterable[SentMessage], with_tools: bool) -> tuple[Message, ...]:
    parsed = []
    for name, role, fields in sent:
        if role == "tool" and not with_tools:
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
        parsed.append(said_message(role, fields, more, name))
    return tuple(parsed)


def earlier_reasoning(role: str, fields: Mapping, name: str) -> dict[str, str]:
    """What the assistant thought before this message, which clients send under either name."""
    for key in ("reasoning_content", "reasoning"):
        if role == "assistant" and fields.get(key):
            return {"reasoning_content": Field(f"{name}.{key}", TEXT, "").read(fields[key])}
    return {}


# Calls of tools that no model has here, their results, and what goes with them: a conversation that another
# server had may have some, and goes on without them.
OTHER_ITEMS = frozenset((
    "additional_tools", "apply_patch_call", "apply_patch_call_output", "code_interpreter_call",
    "computer_call", "computer_call_output", "custom_tool_call", "custom_tool_call_output",
    "file_search_call", "image_generation_call", "local_shell_call", "local_shell_call_output",
    "mcp_approval_request", "mcp_approval_response", "mcp_call", "mcp_list_tools", "program",
    "program_output", "shell_call", "shell_call_output", "tool_search_call", "tool_search_output",
    "web_search_call"))
OTHER_BLOCKS = frozenset((
    "bash_code_execution_tool_result", "code_execution_tool_result", "mcp_tool_result", "mcp_tool_use",
    "server_tool_use", "text_editor_code_execution_tool_result", "tool_search_tool_result",
    "web_fetch_tool_result", "web_search_tool_result"))


def type_of(item) -> str:
    """The type of an item or a block; "" if it has none."""
    named = item.get("type") if isinstance(item, dict) else None
    return named if is_text(named) else ""


def other_types(items, others: Collection[str]) -> tuple[str, ...]:
    """Those of `others` that are among a list of items or blocks, each once."""
    found = filter(others.__contains__, map(type_of, items if isinstance(items, list) else ()))
    return tuple(dict.fromkeys(found))


def without_others(items: Iterable, others: Collection[str]) -> Iterator:
    return (item for item in items if type_of(item) not in others)


def response_messages(values: Mapping, earlier: Seq = ()) -> Iterator[SentMessage]:
    """`instructions` and `input` of a response as messages of Chat Completions. earlier: the items of what it
    continues."""
    if "instructions" in values:
        yield SentMessage("instructions", "system", {"content": values["instructions"]})
    items = values.get("input", "")
    new = [{"role": "user", "content": items}] if is_text(items) else items
    for index, item in enumerate([*earlier, *new], -len(earlier)):
        name = "before_input" if index < 0 else "input" if is_text(items) else f"input[{index}]"
        if not isinstance(item, dict):
            raise bad_value(name, item, "an object with a type or a role")
        item_type = item.get("type") or (
            "message" if "role" in item or "id" not in item else "item_reference")
        if item_type == "message":
            if item.get("role") not in OPENAI_ROLES:
                raise bad_value(f"{name}.role", item.get("role"), f"one of {', '.join(OPENAI_ROLES)}")
            yield SentMessage(name, item["role"], {"content": item.get("content")})
        elif item_type == "function_call":
            yield SentMessage(name, "assistant", {"tool_calls": [
                {"id": item.get("call_id"), "function": item}]})
        elif item_type == "function_call_output":
            yield SentMessage(name, "tool", {
                "tool_call_id": item.get("call_id"), "content": item.get("output")})
        elif item_type == "reasoning":
            thought = content_text(item.get("content") or item.get("summary"), f"{name}.content")
            yield SentMessage(name, "assistant", {"reasoning_content": thought})
        elif not is_text(item_type) or item_type not in OTHER_ITEMS:
            raise RequestError(
                f"{name} is of type {shown(item_type)}; this server reads items of type "
                "message, function_call, function_call_output and reasoning",
                code="unsupported_item", param=name)


def continued_ids(body: Mapping) -> tuple[str, str]:
    """What a body continues: previous_response_id, and the id of a conversation; "" if neither."""
    conversation = body.get("conversation")
    if isinstance(conversation, dict):
        conversation = conversation.get("id")
    previous = body.get("previous_response_id")
    return previous if is_text(previous) else "", conversation if is_text(conversation) else ""


def joined_turns(messages: Iterable[Message]) -> tuple[Message, ...]:
    """One message for each turn of the assistant, whose reasoning, text and calls are separate items, and one
    for the system messages at the beginning. An empty question if there are no messages."""
    turns: list[Message] = []
    for message in messages:
        last = turns[-1] if turns and turns[-1].role == message.role else Message("", "")
        before = last.more or {}
        more = message.more or {}
        if last.role == "system" and len(turns) == 1:
            turns[-1] = replace(last, content=f"{last.content}\n\n{message.content}")
        elif last.role == "assistant" and not (message.content and (last.content or "tool_calls" in before)):
            calls = [*before.get("tool_calls", ()), *more.get("tool_calls", ())]
            calculated = [*calculations_of(last), *moved(calculations_of(message), len(last.content))]
            more = {**before, **more, **({"tool_calls": calls} if calls else {})}
            more = with_calls(more, calculated)
            turns[-1] = Message(last.role, last.content + message.content, more or None)
        else:
            turns.append(message)
    if [turn.role for turn in turns] in ([], ["system"]):
        turns.append(Message("user", ""))
    return tuple(turns)


def as_parts(block, name: str) -> list:
    """A block of Anthropic's as parts of Chat Completions: one, unless it is a document or search result."""
    return passage_parts(block, name) if type_of(block) in ("document", "search_result") else [block]


def result_content(content, name: str):
    """What a tool returned, as a content of Chat Completions."""
    if not isinstance(content, list):
        return content
    return [part for index, block in enumerate(content) for part in as_parts(block, f"{name}[{index}]")]


BILLING = "x-anthropic-billing-header:"  # a block that changes each time: no prefix would be cached


def anthropic_messages(values: Mapping) -> Iterator[SentMessage]:
    """`system` and `messages` of Anthropic's API as messages of Chat Completions."""
    system = values.get("system", "")
    if not is_text(system):
        system = [block for block in system if not str(block.get("text")).startswith(BILLING)]
    if system:
        yield SentMessage("system", "system", {"content": system})
    for name, role, fields in sent_messages(values["messages"], NATIVE_ROLES):
        if not isinstance(fields.get("content"), list):
            yield SentMessage(name, role, {"content": fields.get("content")})
            continue
        blocks: dict[str, list[tuple[str, dict]]] = {  # with their names for errors, by type
            "text": [], "thinking": [], "tool_use": [], "tool_result": []}
        for index, block in enumerate(fields["content"]):
            block_type = block.get("type") if isinstance(block, dict) else None
            if block_type == "redacted_thinking" or type_of(block) in OTHER_BLOCKS:
                continue
            # anything else is refused as text parts are
            block_type = block_type if is_text(block_type) and block_type in blocks else "text"
            blocks[block_type].append((f"{name}.content[{index}]", block))
        for block_name, block in blocks["tool_result"]:
            yield SentMessage(block_name, "tool", {
                "tool_call_id": block.get("tool_use_id"),
                "content": result_content(block.get("content"), f"{block_name}.content")})
        calls = [{"id": block.get("id"), "function": {**block, "arguments": block.get("input")}}
                 for _, block in blocks["tool_use"]]
        thoughts = "".join(content_text(block.get("thinking"), block_name)
                           for block_name, block in blocks["thinking"])
        texts = [part if picture_in(part) else {"type": "text", "text": part_text(part, block_name),
                                                "calculator": part.get("calculator")}
                 for block_name, block in blocks["text"] for part in as_parts(block, block_name)]
        if texts or calls or thoughts or not blocks["tool_result"]:
            yield SentMessage(name, role, {"content": texts, **({"tool_calls": calls} if calls else {}),
                                           **({"reasoning_content": thoughts} if thoughts else {})})


def earlier_calls(calls, name: str) -> list[dict]:
    """The assistant's earlier calls, whose arguments are an object, or text where they are none."""
    if not matches(list_schema(A_FUNCTION), calls):
        raise bad_value(name, calls, "a list of calls, each with a function")
    read = []
    for call in calls:
        function = {"name": call["function"]["name"],
                    "arguments": earlier_arguments(call["function"].get("arguments"))}
        call_id = {"id": str(call["id"])} if call.get("id") else {}
        read.append({**call_id, "type": "function", "function": function})
    return read


def earlier_arguments(sent: Any) -> dict | str:
    """Arguments of an earlier call. Nothing is an object without members. What is no object, such as the
    arguments of a call that a token limit cut, stays the text that it is."""
    text = sent if is_text(sent) else ""
    if text.strip():
        with suppress(ValueError, RecursionError):
            sent = json.loads(text)
    if sent is None or is_text(sent) and not text.strip():
        return {}
    if isinstance(sent, dict):
        return sent
    return whole_unicode(text) or as_json(sent)


def said_message(role: str, fields: Mapping, more: Mapping, name: str) -> Message:
    """A message of Chat Completions, with the calls of the calculator in it if it is the assistant's."""
    content = fields.get("content")
    if role != "assistant":
        return message_of(role, content, more, f"{name}.content")
    if isinstance(content, list) and is_nanochats(content):
        text, calls = read_nanochat_parts(content, f"{name}.content")
        return Message(role, text, with_calls(more, calls))
    return with_calculations(message_of(role, content, more, f"{name}.content"), fields, name)


def message_of(role: str, content, more: Mapping, name: str) -> Message:
    """A message whose content is a string, null, or a list of texts and pictures."""
    pictures = [*map(picture_in, content)] if isinstance(content, list) else []
    if not any(pictures):
        return Message(role, content_text(content, name), more or None)
    shown = []
    parts = list[str | int]()
    for index, (part, picture) in enumerate(zip(content, pictures)):
        parts.append(part_text(part, f"{name}[{index}]") if picture is None else len(shown))
        shown += [picture] if picture else []
    text = "".join(part for part in parts if isinstance(part, str))
    return Message(role, text, more or None, tuple(shown), tuple(parts))


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
