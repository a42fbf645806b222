"""Anthropic's Messages, and how many tokens such a request has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence as Seq
from dataclasses import replace
from functools import partial
from typing import Any, TYPE_CHECKING

from chatlm.common.errors import bad_value, invalid
from chatlm.common.jsontext import dump, is_text
from chatlm.common.messages.requests import Message, Usage
from chatlm.common.messages.tool_rounds import ToolPlan
from chatlm.front.api import idle
from chatlm.front.api.dialect import Dialect, Form, TextForm
from chatlm.front.api.encode import BlockEncoder, calculator_member, frame, parsed_arguments
from chatlm.front.api.errors import anthropic_error
from chatlm.front.api.field_types import (
    CAP, LIST, MESSAGES_CHOICE, NATIVE_ROLES, STOP, SYSTEM, THINKING, nested_grammar, object_of,
    response_grammar, thinking_budget, thinking_of_member)
from chatlm.front.api.fields import (
    Field, FieldType, ToolChoice, list_schema, object_schema, parse_fields, value_at, without)
from chatlm.front.api.found_tools import (
    TOOL_PARTS, KnownFunctions, chosen, functions_of_message, with_chosen)
from chatlm.front.api.mcp_messages import (
    MCP_BLOCKS, TOOLSET, choice_among, parts_of, servers_of_message, tools_of_message)
from chatlm.front.api.mcp_tools import McpTools, own_entries
from chatlm.front.api.message_readers import (
    SentMessage, chat_messages, content_text, other_types, part_text, sent_messages, type_of)
from chatlm.front.api.message_searches import is_search, searches_apart
from chatlm.front.api.passages import passage_parts
from chatlm.front.api.picture_parts import picture_in
from chatlm.front.api.readers import (
    conversation_tokens, later_params, parse_answer, parse_openai_request, parsed_body)
from chatlm.front.api.tables import IDLE_THINKING, MODEL, SAMPLING_FIELDS, SOME_TOOLS

if TYPE_CHECKING:
    from chatlm.common.errors import ChatServerError
    from chatlm.common.messages.protocol import Known, ParsedBody
    from chatlm.common.messages.requests import Accepted
    from chatlm.front.api.answer_state import Part
    from chatlm.front.api.dialect import Terms, TextTerms
    from chatlm.front.api.encode import AnswerBlock


# fields

OUTPUT_CONFIG = Field("output_config", object_of("effort"), "`effort`: how much the model thinks",
                      idle={"effort": idle.without_thinking})
COUNTED_FIELDS = (
    Field("messages", LIST._replace(details=list_schema(object_schema(["role", "content"]), minItems=1)),
          "the conversation", required=True),
    Field("system", SYSTEM, "the system message, as a text or text blocks"),
    MODEL, SOME_TOOLS,
    Field("tool_choice", MESSAGES_CHOICE, "auto, any, none, or one of the tools"),
    Field("mcp_servers", FieldType("a list of objects", list_schema(object_schema([]))),
          "tool servers of --mcp-config, by `name`, whose tools the server runs",
          idle={"": idle.without_tool_rounds}),
    Field("thinking", THINKING, "whether the model thinks, if its template supports that; `budget_tokens`: "
          "most tokens that it thinks", means="template_options", idle=IDLE_THINKING),
    OUTPUT_CONFIG,
)
MESSAGES_FIELDS = (
    *without(COUNTED_FIELDS, OUTPUT_CONFIG),
    *without(SAMPLING_FIELDS, MODEL),
    Field("max_tokens", CAP, "most tokens of the answer; absent or -1 = up to the context"),
    Field("stop_sequences", STOP, "strings that end the answer", means="stop",
          idle={"": idle.in_required_calls}),
    OUTPUT_CONFIG._replace(
        type=object_of("format", "effort")._replace(convert=partial(nested_grammar, param="output_config")),
        doc="`format`: json_schema; `effort`: how much the model thinks", means="response_format"),
    Field("output_format", object_of("type", "schema")._replace(
        convert=partial(response_grammar, param="output_format")),
        "the older name of `output_config.format`"),
)


# messages

# Calls of tools that no model has here, with their results. A conversation that began on another server may
# have some. It continues without them.
OTHER_BLOCKS = frozenset((
    "bash_code_execution_tool_result", "code_execution_tool_result", "mcp_tool_result", "mcp_tool_use",
    "server_tool_use", "text_editor_code_execution_tool_result", "web_fetch_tool_result",
    "web_search_tool_result"))


def as_parts(block, name: str) -> list:
    """A block of Anthropic's as parts of Chat Completions. Only a document or a search result has several."""
    return passage_parts(block, name) if type_of(block) in ("document", "search_result") else [block]


def result_content(content, name: str):
    """What a tool returned, as a content of Chat Completions."""
    if not isinstance(content, list):
        return content
    return [part for index, block in enumerate(content) for part in as_parts(block, f"{name}[{index}]")]


BILLING = "x-anthropic-billing-header:"  # a block that changes each time: no prefix would be cached
NEXT_USER = "next_user_message"


def anthropic_messages(values: Mapping, runs_tools: bool = False) -> Iterator[SentMessage]:
    """`system` and `messages` of Anthropic's API as messages of Chat Completions. runs_tools: does the server
    run tools? If not, it leaves out calls that a server has run."""
    system = values.get("system", "")
    if not is_text(system):
        system = [block for block in system if not str(block.get("text")).startswith(BILLING)]
    if system:
        yield SentMessage("system", "system", {"content": system})
    for message in without_cleared(values["messages"]):
        content = message.fields.get("content")
        if not isinstance(content, list):
            yield message._replace(fields={"content": content})
            continue
        parts = searches_apart(message.role, content, message.name)
        if runs_tools:
            parts = [served._replace(first=part.first + served.first) for part in parts
                     for served in parts_of(part.role, part.blocks, message.name)]
        for role, blocks, first in parts:
            yield from block_messages(SentMessage(message.name, role, {"content": blocks}), first)


def without_cleared(messages: list) -> Iterator[SentMessage]:
    """The messages, without the texts of system messages that were only for the turn before a later message
    of the user."""
    sent = [*sent_messages(messages, NATIVE_ROLES)]
    last_user = max((index for index, message in enumerate(sent) if message.role == "user"), default=-1)
    for index, message in enumerate(sent):
        clear_at = message.fields.get("clear_at")
        if clear_at not in (None, "never", NEXT_USER) or clear_at and message.role != "system":
            raise bad_value(f"{message.name}.clear_at", clear_at,
                            f'"never" or "{NEXT_USER}", and only in a system message')
        if clear_at != NEXT_USER or index > last_user:
            yield message
            continue
        content = message.fields.get("content")
        changes = [block for block in (content if isinstance(content, list) else ())
                   if type_of(block) in TOOL_PARTS]
        if changes:
            yield message._replace(fields={"content": changes})


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
        fields["content"] += [block_part(part, name, message.role) for part in as_parts(block, name)]
    if blocks["tool_use"]:
        fields["tool_calls"] = [
            {"id": block.get("id"), "function": {**block, "arguments": block.get("input")}}
            for _, block in blocks["tool_use"]]
    thoughts = "".join(content_text(block.get("thinking"), name) for name, block in blocks["thinking"])
    if thoughts:
        fields["reasoning_content"] = thoughts
    if fields != {"content": []} or not blocks["tool_result"]:
        yield message._replace(fields=fields)


def block_part(part, name: str, role: str) -> dict:
    """A picture, or a change to the tools, as it is, or a text with its calculations."""
    if picture_in(part) or role == "system" and type_of(part) in TOOL_PARTS:
        return part
    return {"type": "text", "text": part_text(part, name), "calculator": part.get("calculator")}


# readers

def read_messages(body: dict, terms: Terms) -> ParsedBody:
    known = terms.known
    values = parse_answer(body, MESSAGES_FIELDS, known)
    messages, mcp, ignored = anthropic_prompt(values, known, terms.offered)
    options = anthropic_options(messages, body, values)
    values |= {"template_options": options, "response_format": one_format(values)}
    request = parse_openai_request(values, known.settings, known.tool_format, messages, mcp.operators)
    thinks = value_at(body, "thinking.type") in ("enabled", "adaptive")
    parsed = parsed_body("messages", values, known, request, {"thinking": thinks}, ignored)
    if not mcp.planned:
        return parsed
    later = later_params(values, known, messages)
    return replace(parsed, plan=ToolPlan(tuple(mcp.planned), later=later, pauses=True, first=mcp.first))


def one_format(values: Mapping) -> tuple[str, str]:
    """The grammar of a body's format under its newer or its older name. RequestError if they differ."""
    newer = values.get("response_format", ("", ""))
    older = values.get("output_format", ("", ""))
    if newer[0] and older[0] and newer[0] != older[0]:
        raise invalid("output_format", "output_format and output_config.format differ: an answer has one "
                                       "format")
    return newer if newer[0] else older


def anthropic_prompt(values: dict, known: Known, offered: Seq[Mapping] | None) -> tuple[
        tuple[Message, ...], McpTools, tuple[str, ...]]:
    """The messages, the tools that the server runs, and the types of the tools that are ignored. Of the
    values, `tools` become functions, and `tool_choice` names some of these."""
    sent = values.get("tools", ())
    own = own_entries(sent, offered)
    has_servers = known.settings.mcp_config is not None
    tools, ignored = functions_of_message(sent)
    mcp = tools_of_message(values, offered) if has_servers else McpTools(own, offered or ())
    functions = KnownFunctions(tools, (tool["name"] for tool in sent if is_text(tool.get("name"))),
                               functions_of_message)
    functions.serve(mcp.functions, mcp.labels_of_tools)
    messages = chat_messages(anthropic_messages(values, has_servers or bool(own)),
                             known.tool_format is not None, functions)
    for message in values["messages"]:
        ignored += other_blocks(message.get("content"))
    ignored += tuple(functions.ignored)
    if has_servers:
        ignored = tuple(name for name in ignored if name != TOOLSET)
    if has_servers or own:
        served = MCP_BLOCKS | {tool["type"] for tool in own}
        ignored = tuple(name for name in ignored if name not in served)
    able = functions.functions.able
    choice = choice_among(mcp, able, values.get("tool_choice", ToolChoice()))
    values["tool_choice"] = mcp.called_first(choice, able, known.native_tools)
    values["tools"] = mcp.beside(functions.functions)
    return messages, mcp, tuple(dict.fromkeys(ignored))


def other_blocks(content) -> tuple[str, ...]:
    """Which of OTHER_BLOCKS a content has, but for searches of tools."""
    blocks = content if isinstance(content, list) else ()
    return other_types([block for block in blocks if not is_search(block)], OTHER_BLOCKS)


def anthropic_options(messages: Seq[Message], body: Mapping, values: Mapping) -> dict:
    """The template options. In this API, a last message of the assistant is one to continue."""
    last = messages[-1]
    is_open = last.role == "assistant" and last.content and "tool_calls" not in (last.more or {})
    continues = {"continue_final_message": True} if is_open else {}
    effort = thinking_of_member("output_config.effort", value_at(body, "output_config.effort"))
    return {**continues, **effort, **values.get("template_options", {})}


async def count_tokens(body: dict, terms: TextTerms) -> bytes:
    known = terms.known
    values = parse_fields(body, COUNTED_FIELDS)
    messages, _, _ = anthropic_prompt(values, known, terms.offered)
    choice = values.get("tool_choice", ToolChoice())
    functions = chosen(values["tools"], choice, known.tool_format)
    messages = with_chosen(messages, choice)
    options = anthropic_options(messages, body, values)
    if budget := thinking_budget(body, COUNTED_FIELDS):
        options["thinking_budget"] = max(budget.values())
    ids = await conversation_tokens(terms.prompts, messages, functions.head, terms.client, options)
    return dump({"input_tokens": len(ids)})


def idle_servers(body: Mapping, known: Known) -> Iterator[str]:
    """What counts no tokens: a server without tool servers does not read their names."""
    if body.get("mcp_servers") and known.settings.mcp_config is None:
        yield "mcp_servers"


# the encoder

class MessagesEncoder(BlockEncoder):
    """`/v1/messages`, Anthropic's API."""

    ping = b'event: ping\ndata: {"type": "ping"}\n\n'
    # kind of block -> its type, the member that grows, the type of its deltas, and their member
    BLOCKS = {"text": ("text", "text", "text_delta", "text"),
              "reasoning": ("thinking", "thinking", "thinking_delta", "thinking"),
              "call": ("tool_use", "input", "input_json_delta", "partial_json"),
              "mcp": ("mcp_tool_use", "input", "input_json_delta", "partial_json"),
              "result": ("mcp_tool_result", "content", "", "")}
    REASONS = {"max_tokens": "max_tokens", "context_length": "model_context_window_exceeded"}

    def block_for(self, part: Part) -> AnswerBlock | None:
        last = self.shown_blocks[-1] if self.shown_blocks else None
        if last and last.kind == part.kind == "text":  # only thoughts are between them
            last.parts.append(part)
            return last
        return super().block_for(part)

    def kind_of(self, part: Part) -> str:
        """Leave out the thoughts, unless the request asks for thinking. Clients that do not ask for it take
        the first block of an answer as its text."""
        if part.kind == "reasoning" and not self.parsed.details.get("thinking"):
            return ""
        return part.kind if part.kind == "result" else super().kind_of(part)

    def message(self, content: list[dict], usage: dict, stop: Mapping) -> dict:
        return {"id": "msg_" + self.request.id, "type": "message", "role": "assistant", "model": self.model,
                "content": content, "stop_reason": None, "stop_sequence": None, **stop, "usage": usage,
                "seed": self.request.params.sampling.seed}

    @staticmethod
    def usage_body(usage: Usage) -> dict:
        return {"input_tokens": usage.prompt_tokens - usage.cached_tokens, "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": usage.cached_tokens, "output_tokens": usage.completion_tokens}

    def start(self, accepted: Accepted) -> bytes:
        usage = self.usage_body(Usage(accepted.prompt_tokens))
        return self.event("message_start", message=self.message([], usage, {}))

    def content(self, block: AnswerBlock, begins: bool = False) -> dict:
        """A block, or as it begins, whatever the latest event has added already."""
        text = "" if begins else block.text
        kind, member, _, _ = self.BLOCKS[block.kind]
        tool = block.part.tool
        call = {"id": "toolu_" + block.id, "name": block.part.name} if block.kind == "call" else {}
        if tool:
            call = {"id": "mcptoolu_" + block.id, "name": tool.tool, "server_name": tool.label}
        if block.result and block.kind == "result":
            return {"type": kind, "tool_use_id": "mcptoolu_" + block.id, "is_error": block.result.is_error,
                    member: [{"type": "text", "text": block.result.text}]}
        # nobody checks the signature, but clients send back no thinking without one
        signature = {"signature": block.id} if block.kind == "reasoning" else {}
        grown = parsed_arguments(text) if block.kind in ("call", "mcp") else text
        return {"type": kind, **call, member: grown, **signature,
                **calculator_member([] if begins else self.placed_calls(block, block.calculations))}

    def open_block(self, block: AnswerBlock) -> bytes:
        return self.event("content_block_start", index=block.index,
                          content_block=self.content(block, begins=True))

    def grow_block(self, block: AnswerBlock, text: str, call: dict | None = None) -> bytes:
        _, _, kind, member = self.BLOCKS[block.kind]
        return self.event("content_block_delta", index=block.index, delta={
            "type": kind, member: text, **calculator_member([call] if call else [])})

    def close_block(self, block: AnswerBlock) -> bytes:
        return self.event("content_block_stop", index=block.index)

    def end_call(self, block: AnswerBlock) -> bytes:
        """The block of a call's result, whole. It has no id of its own: `id` is that of the call's block."""
        result = self.blocks[-1]
        return self.open_block(result) + self.close_block(result)

    def stop(self) -> dict:
        done = self.choice.done
        if done.reason == "pause":
            return {"stop_reason": "pause_turn", "stop_sequence": None}
        if done.stop_reason in self.request.params.stop:
            return {"stop_reason": "stop_sequence", "stop_sequence": done.stop_reason}
        if done.reason == "length":
            reason = self.REASONS.get(done.stop_reason or "", "max_tokens")
        else:
            calls = [block.kind == "call" for block in self.blocks]
            # where the server runs tools, their results may follow a call of the client's own function
            reason = "tool_use" if calls[-1] or self.state.tools and any(calls) else "end_turn"
        return {"stop_reason": reason, "stop_sequence": None}

    def body(self) -> dict:
        return self.message([*map(self.content, self.blocks)], self.usage_body(self.usage()), self.stop())

    def end(self) -> bytes:
        usage = self.usage_body(self.usage())
        return self.event("message_delta", delta=self.stop(), usage=usage) + self.event("message_stop")

    @staticmethod
    def lone_failure(error: ChatServerError) -> bytes:
        return b"event: error\n" + frame(anthropic_error(error))


DIALECT = Dialect({
    "/v1/messages": Form(MESSAGES_FIELDS, read_messages, MessagesEncoder, servers=servers_of_message),
    "/v1/messages/count_tokens": TextForm(COUNTED_FIELDS, count_tokens, idle_servers, servers_of_message)})
