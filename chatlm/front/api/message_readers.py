"""Converts the messages of five APIs to the program's own `Message`."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence as Seq
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError, bad_value, invalid, shown
from chatlm.common.jsontext import as_json, is_text, whole_unicode
from chatlm.common.messages.requests import Message
from chatlm.common.text.calculations import calculations_of, shift_calls, text_in, with_calls
from chatlm.front.admission.prompts import turn_starts
from chatlm.front.api.earlier_calculations import is_nanochats, read_nanochat_parts, with_calculations
from chatlm.front.api.fields import A_FUNCTION, Field, list_schema, matches, no_tools, within_limit
from chatlm.front.api.mcp_messages import parts_of
from chatlm.front.api.passages import passage_parts
from chatlm.front.api.picture_parts import picture_in
from chatlm.front.api.field_types import NATIVE_ROLES, OPENAI_ROLES, SWITCH, TEXT, TEXT_PARTS, thinking
from chatlm.front.api.tables import SWITCHES, TEMPLATE_OPTIONS

if TYPE_CHECKING:
    from chatlm.front.api.mcp_tools import McpHistory


class SentMessage(NamedTuple):
    """A message of a body. Its fields are those of Chat Completions, unless a function names another API."""

    name: str  # for errors
    role: str
    fields: dict


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


def native_messages(messages: list, truncate: bool = False) -> tuple[tuple[Message, ...], int]:
    """Messages within the native API's limits, and how many of the oldest were dropped to fit."""
    most = LIMITS.truncated_messages if truncate else LIMITS.messages
    within_limit("messages", len(messages), most, "messages")
    sent = list(sent_messages(messages, NATIVE_ROLES))
    newest = newest_turns(sent) if truncate else sent
    within_limit("messages", len(newest), LIMITS.messages, "messages")
    parsed = []
    for name, role, fields in newest:
        content = fields.get("content")
        if not isinstance(content, list):
            content = Field(f"{name}.content", TEXT, "").read(content)
        more = earlier_reasoning(role, fields, name)
        message = chat_message(role, {**fields, "content": content}, more, name)
        if role != "assistant":
            within_limit(f"characters in {name}", len(message.content), LIMITS.message_characters,
                         f"{name}.content")
        parsed.append(message)
    size = sum(map(characters_in, parsed))
    within_limit("characters in all messages", size, LIMITS.total_characters, "messages")
    return tuple(parsed), len(sent) - len(newest)


def characters_in(message: Message) -> int:
    """How many characters of a message the model reads: its text, its reasoning and its calculations."""
    reasoning = (message.more or {}).get("reasoning_content", "")
    return len(message.content) + len(reasoning) + len(text_in(calculations_of(message)))


def newest_turns(sent: list[SentMessage]) -> list[SentMessage]:
    """The system messages, the last turn, and as many turns before it as native_messages allows."""
    def size(message: SentMessage) -> float:
        content = message.fields.get("content")
        length = len(content) if isinstance(content, str) else 0
        limited = message.role not in ("assistant", "system")
        return math.inf if limited and length > LIMITS.message_characters else length

    fixed = [size(message) for message in sent if message.role == "system"]
    count = len(fixed)
    characters = sum(fixed)
    first = len(sent)
    for start in reversed(turn_starts([message.role for message in sent])):
        turn = [size(message) for message in sent[start:first] if message.role != "system"]
        count += len(turn)
        characters += sum(turn)
        if first < len(sent) and (count > LIMITS.messages or characters > LIMITS.total_characters):
            break
        first = start
    return [message for index, message in enumerate(sent) if index >= first or message.role == "system"]


def openai_messages(messages: list, with_tools: bool = False) -> tuple[Message, ...]:
    roles = [*OPENAI_ROLES, "tool", "function"] if with_tools else OPENAI_ROLES
    return chat_messages(without_custom_calls(sent_messages(messages, roles)), with_tools)


def is_custom(call) -> bool:
    """Does this call, in a message of Chat Completions, call no function?"""
    return type_of(call) == "custom" and "function" not in call


def custom_calls(message) -> list[dict]:
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    return [*filter(is_custom, calls)] if isinstance(calls, list) else []


def without_custom_calls(sent: Iterable[SentMessage]) -> Iterator[SentMessage]:
    """The messages without custom calls and their results."""
    skipped = set()  # ids of calls
    for name, role, fields in sent:
        if others := custom_calls(fields):
            skipped |= {call["id"] for call in others if is_text(call.get("id"))}
            fields = {**fields, "tool_calls": [*itertools.filterfalse(is_custom, fields["tool_calls"])]}
        call_id = fields.get("tool_call_id")
        if role != "tool" or not is_text(call_id) or call_id not in skipped:
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
        parsed.append(chat_message(role, fields, more, name))
    return tuple(parsed)


def earlier_reasoning(role: str, fields: Mapping, name: str) -> dict[str, str]:
    """What the assistant thought before this message. Clients send it under either name."""
    for key in ("reasoning_content", "reasoning"):
        if role == "assistant" and fields.get(key):
            return {"reasoning_content": Field(f"{name}.{key}", TEXT, "").read(fields[key])}
    return {}


# Calls of tools that no model has here, with their results and what belongs to them. A conversation that
# began on another server may have some. It continues without them.
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
    """Which of the types `others` a list of items or blocks has, each once."""
    types = map(type_of, items if isinstance(items, list) else ())
    return tuple(dict.fromkeys(filter(others.__contains__, types)))


def without_others(items: Iterable, others: Collection[str]) -> Iterator:
    return (item for item in items if type_of(item) not in others)


def response_messages(values: Mapping, earlier: Seq = (),
                      history: McpHistory | None = None) -> Iterator[SentMessage]:
    """`instructions` and `input` of a response as messages of Chat Completions. earlier: the items that it
    continues. history: of the calls that the server has run; None: it runs none, and leaves them out."""
    if "instructions" in values:
        yield SentMessage("instructions", "system", {"content": values["instructions"]})
    for item in earlier:
        for each in history.items(item) if history else (item,):
            yield from item_messages(each, "before_input")
    items = values.get("input", "")
    if is_text(items):
        yield SentMessage("input", "user", {"content": items})
        return
    for index, item in enumerate(items):
        for each in history.items(item) if history else (item,):
            yield from item_messages(each, f"input[{index}]")


def item_messages(item, name: str) -> Iterator[SentMessage]:
    """The message for an item of a response, if it has one."""
    if not isinstance(item, dict):
        raise bad_value(name, item, "an object with a type or a role")
    item_type = item_type_of(item)
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
    elif item_type == "item_reference":
        raise RequestError(
            f"{name}, an item_reference, names an item by its id, {shown(item.get('id'))}: only the input of "
            "/v1/responses can do that, on a server with --database, and no line of a batch; send the item "
            "itself", code="unsupported_item", param=name)
    elif not is_text(item_type) or item_type not in OTHER_ITEMS:
        raise RequestError(
            f"{name} is of type {shown(item_type)}; this server reads items of type "
            "message, function_call, function_call_output and reasoning",
            code="unsupported_item", param=name)


def item_type_of(item: Mapping) -> Any:
    return item.get("type") or ("message" if "role" in item or "id" not in item else "item_reference")


class Reference(NamedTuple):
    """An item of the input that stands for an item of a kept response."""

    index: int  # in the input
    id: str     # of the item that it stands for


def references_in(body: Mapping) -> Iterator[Reference]:
    """The references in the input of a response."""
    items = body.get("input")
    for index, item in enumerate(items if isinstance(items, list) else ()):
        if isinstance(item, dict) and item_type_of(item) == "item_reference" and is_text(item.get("id")):
            yield Reference(index, item["id"])


def follow_references(body: dict, items: Mapping[str, dict]):
    """Put the items that the input of a response refers to into it. items: by their ids."""
    for reference in [*references_in(body)]:
        body["input"][reference.index] = items[reference.id]


def continued_ids(body: Mapping) -> tuple[str, str]:
    """What a body continues: its previous_response_id and the id of its conversation; "" for none."""
    conversation = body.get("conversation")
    if isinstance(conversation, dict):
        conversation = conversation.get("id")
    response = body.get("previous_response_id")
    response, conversation = (name if is_text(name) else "" for name in (response, conversation))
    return response, conversation


def joined_turns(messages: Iterable[Message]) -> tuple[Message, ...]:
    """Join the messages that were separate items: the reasoning, text and calls of a turn of the assistant,
    and the system messages at the beginning. Without any question, add an empty one."""
    turns: list[Message] = []
    for message in messages:
        last = turns[-1] if turns and turns[-1].role == message.role else None
        if last and last.role == "system" and len(turns) == 1:
            turns[-1] = replace(last, content=f"{last.content}\n\n{message.content}")
        elif last and last.role == "assistant" and continues_turn(message, last):
            turns[-1] = joined_answers(last, message)
        else:
            turns.append(message)
    if [turn.role for turn in turns] in ([], ["system"]):
        turns.append(Message("user", ""))
    return tuple(turns)


def continues_turn(message: Message, last: Message) -> bool:
    """Does a message of the assistant belong to the turn of the one before it? A second text, or a text after
    a call, begins a new turn."""
    return not (message.content and (last.content or "tool_calls" in (last.more or {})))


def joined_answers(first: Message, second: Message) -> Message:
    """Two messages of the assistant as one."""
    before = first.more or {}
    after = second.more or {}
    more = {**before, **after}
    calls = [*before.get("tool_calls", ()), *after.get("tool_calls", ())]
    if calls:
        more["tool_calls"] = calls
    calculations = [*calculations_of(first), *shift_calls(calculations_of(second), len(first.content))]
    more = with_calls(more, calculations)
    return Message(first.role, first.content + second.content, more or None)


def as_parts(block, name: str) -> list:
    """A block of Anthropic's as parts of Chat Completions. Only a document or a search result has several."""
    return passage_parts(block, name) if type_of(block) in ("document", "search_result") else [block]


def result_content(content, name: str):
    """What a tool returned, as a content of Chat Completions."""
    if not isinstance(content, list):
        return content
    return [part for index, block in enumerate(content) for part in as_parts(block, f"{name}[{index}]")]


BILLING = "x-anthropic-billing-header:"  # a block that changes each time: no prefix would be cached


def anthropic_messages(values: Mapping, runs_tools: bool = False) -> Iterator[SentMessage]:
    """`system` and `messages` of Anthropic's API as messages of Chat Completions. runs_tools: does the server
    run tools? If not, it leaves out calls that a server has run."""
    system = values.get("system", "")
    if not is_text(system):
        system = [block for block in system if not str(block.get("text")).startswith(BILLING)]
    if system:
        yield SentMessage("system", "system", {"content": system})
    for message in sent_messages(values["messages"], NATIVE_ROLES):
        content = message.fields.get("content")
        if not isinstance(content, list):
            yield message._replace(fields={"content": content})
        elif not runs_tools:
            yield from block_messages(message)
        else:
            for role, blocks, first in parts_of(message.role, content, message.name):
                yield from block_messages(
                    SentMessage(message.name, role, {"content": blocks}), first)


def block_messages(message: SentMessage, first: int = 0) -> Iterator[SentMessage]:
    """A message of Anthropic's that is a list of blocks, as messages of Chat Completions: one for the result
    of each call, then one for all other blocks. first: the index of the first block, for errors."""
    blocks: dict[str, list[tuple[str, dict]]] = {  # type -> blocks, each with its name for errors
        "text": [], "thinking": [], "tool_use": [], "tool_result": []}
    for index, block in enumerate(message.fields["content"], first):
        block_type = type_of(block)
        if block_type == "redacted_thinking" or block_type in OTHER_BLOCKS:
            continue
        if block_type not in blocks:
            block_type = "text"  # part_text refuses it
        blocks[block_type].append((f"{message.name}.content[{index}]", block))
    for name, block in blocks["tool_result"]:
        yield SentMessage(name, "tool", {
            "tool_call_id": block.get("tool_use_id"),
            "content": result_content(block.get("content"), f"{name}.content")})
    fields: dict[str, Any] = {"content": []}
    for name, block in blocks["text"]:
        fields["content"] += [block_part(part, name) for part in as_parts(block, name)]
    if blocks["tool_use"]:
        fields["tool_calls"] = [
            {"id": block.get("id"), "function": {**block, "arguments": block.get("input")}}
            for _, block in blocks["tool_use"]]
    thoughts = "".join(content_text(block.get("thinking"), name) for name, block in blocks["thinking"])
    if thoughts:
        fields["reasoning_content"] = thoughts
    if fields != {"content": []} or not blocks["tool_result"]:
        yield message._replace(fields=fields)


def block_part(part, name: str) -> dict:
    """A picture as it is, or a text with its calculations."""
    if picture_in(part):
        return part
    return {"type": "text", "text": part_text(part, name), "calculator": part.get("calculator")}


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
