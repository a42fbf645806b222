"""The items of responses and conversations, as messages, and as what a body refers to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence as Seq
from dataclasses import replace
from typing import Any, TYPE_CHECKING

from chatlm.common.errors import RequestError, bad_value, shown
from chatlm.common.jsontext import is_text
from chatlm.common.messages.requests import Message
from chatlm.common.text.calculations import calculations_of, shift_calls, with_calls
from chatlm.front.api.dialect import LONGEST_NAME, Chained, Reference
from chatlm.front.api.field_types import OPENAI_ROLES
from chatlm.front.api.fields import within_limit
from chatlm.front.api.found_tools import NOTHING_FOUND
from chatlm.front.api.message_readers import SentMessage, content_text

if TYPE_CHECKING:
    from chatlm.front.api.mcp_tools import McpHistory


MOST_REFERENCES = 4096  # of a body, to kept items
# Calls of tools that no model has here, with their results and what belongs to them. A conversation that
# began on another server may have some. It continues without them.
OTHER_ITEMS = frozenset((
    "apply_patch_call", "apply_patch_call_output", "code_interpreter_call", "computer_call",
    "computer_call_output", "custom_tool_call", "custom_tool_call_output", "file_search_call",
    "image_generation_call", "local_shell_call", "local_shell_call_output", "mcp_approval_request",
    "mcp_approval_response", "mcp_call", "mcp_list_tools", "program", "program_output", "shell_call",
    "shell_call_output", "web_search_call"))


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
    elif is_text(item_type) and item_type in READERS:
        yield READERS[item_type](item, name)
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
            f"message, function_call, function_call_output, reasoning, {', '.join(READERS)}",
            code="unsupported_item", param=name)


def read_search(item: Mapping, name: str) -> SentMessage:
    """The call of a search. Of one that another server ran, which has no call_id, the output comes next."""
    call = {"id": item.get("call_id"), "function": {"name": SEARCH, "arguments": item.get("arguments")}}
    return SentMessage(name, "assistant", {"tool_calls": [call]})


def read_found(item: Mapping, name: str) -> SentMessage:
    """What a search has found."""
    tools = item.get("tools")
    content = "" if tools else NOTHING_FOUND
    return SentMessage(name, "tool", {"tool_call_id": item.get("call_id"), "content": content},
                       [] if tools is None else tools)


def read_additional(item: Mapping, name: str) -> SentMessage:
    if item.get("role", "developer") != "developer":
        raise bad_value(f"{name}.role", item["role"], '"developer"')
    return SentMessage(name, "developer", {"content": ""}, item.get("tools", []))


SEARCH = "tool_search"  # the name of the function that a search with execution by the client is
READERS: Mapping[Any, Callable[[Mapping, str], SentMessage]] = {  # items about tools that are found later
    "tool_search_call": read_search, "tool_search_output": read_found, "additional_tools": read_additional}


def item_type_of(item: Mapping) -> Any:
    return item.get("type") or ("message" if "role" in item or "id" not in item else "item_reference")


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


def chained(body: Mapping) -> Chained:
    """What a body continues. Raises RequestError as `checked_references` says."""
    return Chained(*continued_ids(body), checked_references(body))


def checked_references(fields: Mapping) -> tuple[Reference, ...]:
    """The references in the input of a response. Raises RequestError for too many, and for two to one
    item."""
    references = (*references_in(fields),)
    within_limit("items of type item_reference", len(references), MOST_REFERENCES, "input")
    first: dict[str, int] = {}
    for index, name in references:
        before = first.setdefault(name, index)
        if before != index:
            raise RequestError(f"input[{index}] and input[{before}] refer to the same item, {shown(name)}",
                               code="invalid_value", param=f"input[{index}]")
    return tuple(reference._replace(id=reference.id[:LONGEST_NAME]) for reference in references)


def joined_turns(messages: Iterable[Message]) -> tuple[Message, ...]:
    """Join the messages that were separate items: the reasoning, text and calls of a turn of the assistant,
    and the system messages at the beginning. Without any question, add an empty one."""
    turns: list[Message] = []
    head: list[Message] = []  # the system messages at the beginning
    for message in messages:
        if message.role == "system" and not turns:
            head.append(message)
            continue
        last = turns[-1] if turns and turns[-1].role == message.role else None
        if last and last.role == "assistant" and continues_turn(message, last):
            turns[-1] = joined_answers(last, message)
        else:
            turns.append(message)
    if not turns:
        turns.append(Message("user", ""))
    return (*joined_systems(head), *turns)


def joined_systems(messages: Seq[Message]) -> list[Message]:
    """System messages as one, which makes known what each of them does."""
    if len(messages) < 2:
        return [*messages]
    tools = tuple(tool for message in messages for tool in message.tools)
    contents = [message.content for message in messages if message.content or not message.tools]
    return [replace(messages[0], content="\n\n".join(contents), tools=tools)]


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
