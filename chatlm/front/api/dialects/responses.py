"""OpenAI's Responses."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence as Seq
from dataclasses import replace
from functools import partial
from typing import Any, TYPE_CHECKING

from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError, bad_value, invalid
from chatlm.common.jsontext import dump, is_text
from chatlm.common.messages.protocol import KeptItem
from chatlm.common.messages.requests import Piece
from chatlm.common.messages.tool_rounds import ToolPlan
from chatlm.front.api import idle
from chatlm.front.api.approval_ids import approval_id
from chatlm.front.api.citations import Citations
from chatlm.front.api.dialect import Continuing, Dialect, Form, KeptAnswer, Terms, TextForm
from chatlm.front.api.encode import (
    BlockEncoder, calculator_member, frame, parsed_arguments, timings_body)
from chatlm.front.api.errors import response_error
from chatlm.front.api.field_types import (
    A_BUDGET, CAP, EFFORT, FLAT_CHOICE, INCLUDE, INTEGER, LOGPROBS_OF_TEXT, METADATA, OBJECT, SWITCH, TEXT,
    nested_grammar, object_of, thinking_of_member)
from chatlm.front.api.fields import (
    A_TEXT, ABSENT, Field, FieldType, ToolChoice, names_in, object_schema, refused_field)
from chatlm.front.api.found_tools import KnownFunctions, functions_of_response
from chatlm.front.api.kept_items import MADE, kept_items
from chatlm.front.api.logprobs import TokensOfText, entries
from chatlm.front.api.mcp_tools import (
    MCP_ITEMS, McpHistory, McpTools, id_of_approved_call, own_entries, refuse_in_batches,
    servers_of_response)
from chatlm.front.api.message_readers import chat_messages, other_types, without_others
from chatlm.front.api.readers import (
    later_params, parse_answer, parse_openai_request, parsed_body, without_lone_top)
from chatlm.front.api.response_items import (
    OTHER_ITEMS, SEARCH, chained, follow_references, joined_turns, response_messages)
from chatlm.front.api.tables import OPENAI_SAMPLING_FIELDS, PARALLEL, SOME_TOOLS
from chatlm.front.tools.rules import arguments_of

if TYPE_CHECKING:
    from chatlm.common.errors import ChatServerError
    from chatlm.common.messages.protocol import Known, ParsedBody
    from chatlm.common.messages.requests import Accepted, Event, Message, ToolsListed
    from chatlm.common.messages.tool_rounds import CallItem, PlannedTool
    from chatlm.front.api.answer_state import Part
    from chatlm.front.api.dialect import TextTerms
    from chatlm.front.api.encode import AnswerBlock


# fields

def is_prewarming(value: dict) -> bool:
    prewarm = value.get("prewarm")
    return prewarm is not None and Field("prompt_cache_options.prewarm", SWITCH, "").read(prewarm)


A_LABEL = FieldType("a string of at most 512 characters", {"type": "string", "maxLength": 512})
EFFORT_OR_NULL = {"anyOf": [*EFFORT.schema["anyOf"], {"type": "null"}]}
CONTINUES = "what a response continues"  # the name of a group
RESPONSES_FIELDS = (
    Field("input", FieldType("a text or a list of items", {"anyOf": [A_TEXT, {"type": "array"}]}),
          "a text, or a list of messages, calls, their outputs and reasoning"),
    Field("instructions", TEXT, "a system message before the input", repeated=None),
    *OPENAI_SAMPLING_FIELDS,
    Field("max_output_tokens", CAP, "most tokens of the answer; -1 = up to the context", means="max_tokens",
          repeated=None),
    SOME_TOOLS._replace(repeated=[]),
    Field("tool_choice", FLAT_CHOICE, "auto, none, required, or which of the functions", repeated="auto"),
    Field("reasoning", FieldType(OBJECT.allowed, OBJECT.schema,
                                 lambda value: thinking_of_member("reasoning.effort", value.get("effort")),
                                 object_schema([], effort=EFFORT_OR_NULL, max_tokens=A_BUDGET)),
          "`effort`: how much the model thinks, if its template supports that; `max_tokens`, or a number as "
          "effort: most tokens that it thinks", means="template_options",
          idle={"effort": idle.without_thinking, "max_tokens": idle.without_thoughts}, repeated={}),
    PARALLEL._replace(repeated=True),
    Field("max_tool_calls", INTEGER, "most calls of tools of type `mcp`, which the server runs; then the "
          "model answers without them", 1, 2**31 - 1, idle={"": idle.without_tool_rounds}, repeated=None),
    Field("text", object_of("format")._replace(convert=partial(nested_grammar, param="text")),
          "`format`: text, json_object or json_schema", means="response_format", repeated={}),
    Field("truncation", FieldType('"auto" or "disabled"', {"enum": ["auto", "disabled"]}, "auto".__eq__),
          "`auto` means `truncate: oldest`", means="truncate", repeated="disabled"),
    Field("include", INCLUDE, f"`{LOGPROBS_OF_TEXT}`: log-probabilities of the text's tokens",
          means="logprobs"),
    Field("top_logprobs", INTEGER, "with these: alternatives listed for each token", 0, 20,
          idle={"": idle.without_logprobs}),
    Field("metadata", METADATA, "comes back in the answer", repeated={}),
    Field("user", A_LABEL, "comes back in the answer", repeated=None),
    Field("safety_identifier", A_LABEL, "comes back in the answer", repeated=None),
    Field("prompt_cache_key", A_LABEL, "comes back in the answer: prefixes are found without it",
          repeated=None),
    Field("prompt_cache_options", object_of("prewarm")._replace(convert=is_prewarming),
          "`prewarm`: only compute the prompt, for requests that begin with it; the output is empty"),
    Field("store", SWITCH, "false: do not keep the answer; the default with --database is true",
          idle={"": idle.without_a_database}),
    Field("previous_response_id", TEXT, "with --database: the kept response that this one continues",
          group=CONTINUES),
    Field("conversation", FieldType("an id, or an object with one", {"anyOf": [
        A_TEXT, object_schema(["id"], id=A_TEXT)]}, lambda value: value if is_text(value) else value["id"]),
          "with --database: the conversation that this response continues, and is added to",
          group=CONTINUES),
    Field("prompt", refused_field("the server keeps no prompts"), "refused"),
    Field("background", SWITCH, "true, with --database: return at once; GET /v1/responses/{id} shows the "
          "answer, also before it has ended"),
)


COUNTED = ("input", "instructions", "model", "tools", "tool_choice", "reasoning", "truncation",
           "previous_response_id", "conversation")
COUNTED_FIELDS = tuple(field for field in RESPONSES_FIELDS if field.name in COUNTED)


# reading

WHOLE = {  # objects that come back -> the members that they have in any case
    "reasoning": {"effort": None, "summary": None}, "text": {"format": {"type": "text"}}}
FUNCTION_MEMBERS = {"type": "function", "description": None, "parameters": None, "strict": None}


def with_members(value: Mapping, members: Mapping) -> dict:
    """An object with its own members and, where it has none or null, these."""
    return {**value, **{name: usual for name, usual in members.items() if value.get(name) is None}}


SEARCH_TEXT = "Searches for more functions, which can be called once they were found."
SEARCH_PARAMETERS = {"type": "object", "required": ["query"], "properties": {
    "query": {"type": "string", "description": "what the functions should do"}}}


def repeated_json(body: Mapping) -> bytes:
    """The members of a body that its response repeats in several events, encoded once for all of them."""
    repeated = {field.name: field.repeated for field in RESPONSES_FIELDS if field.repeated is not ABSENT}
    repeated |= {name: body[name] for name in repeated if body.get(name) is not None}
    for name, members in WHOLE.items():
        repeated[name] = with_members(repeated[name], members)
    repeated["tools"] = [with_members(tool, FUNCTION_MEMBERS) if tool.get("type", "function") == "function"
                         else tool for tool in repeated["tools"]]
    try:
        texts = {name: dump(value) for name, value in repeated.items()}
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    size = sum(map(len, texts.values()))
    if size > LIMITS.repeated_bytes:
        name = max(texts, key=lambda name: len(texts[name]))
        raise RequestError(f"{name} is too large: what the response repeats of the request takes {size:,} "
                           f"bytes as JSON, at most {LIMITS.repeated_bytes:,} are allowed",
                           code="limit_exceeded", param=name)
    return b", ".join(b'"%s": %s' % (name.encode(), text) for name, text in texts.items())


CHAINED = names_in(RESPONSES_FIELDS, CONTINUES)


def read_response(body: dict, terms: Terms) -> ParsedBody:
    known, before, offered = terms
    values = without_lone_top(parse_answer(body, RESPONSES_FIELDS, known))
    prewarms = values.pop("prompt_cache_options", False)
    if prewarms:
        values["max_tokens"] = 0
    if "input" not in values and not any(values.get(name) for name in CHAINED):
        raise RequestError('One of "input", "prompt", "previous_response_id" or "conversation" must be '
                           "provided.", code="missing_required_parameter", param="input")
    details = kept_details(values, known)
    sent, searches = with_search(values.get("tools", ()))
    if searches:
        details["searches"] = True
    tools, ignored = functions_of_response(sent)
    ignored += other_types(values.get("input"), OTHER_ITEMS)
    own = own_entries(sent, offered)
    has_servers = known.settings.mcp_config is not None
    runs_tools = has_servers or bool(own)
    mcp = McpTools(sent if has_servers else own, offered or ())
    if mcp.labels and offered is None:
        raise refuse_in_batches()
    if (mcp.labels or own) and body.get("n", 1) not in (None, 1):
        raise bad_value("n", body["n"], "1 where the server runs tools: each answer would run them")
    history = None
    if runs_tools:
        history = McpHistory(before or (), values.get("input"), mcp.planned, known.native_tools)
        details |= included(body, history)
    functions = KnownFunctions(tools)
    functions.serve(mcp.functions, mcp.labels_of_tools)
    messages = joined_turns(chat_messages(
        response_messages(values, before or (), history), known.tool_format is not None, functions))
    ignored += tuple(functions.ignored)
    choice = choice_of_search(body.get("tool_choice"), values.get("tool_choice", ToolChoice()), searches)
    if history:
        served = MCP_ITEMS | {tool["type"] for tool in own} | ({"mcp"} if has_servers else set())
        ignored = tuple(name for name in ignored if name not in served | {*history.own})
        choice = mcp.choice(body.get("tool_choice"), choice)
        choice = mcp.called_first(choice, functions.functions.able, known.native_tools)
    values["tool_choice"] = choice
    values["tools"] = mcp.beside(functions.functions)
    ignored = tuple(dict.fromkeys(ignored))
    request = parse_openai_request(values, known.settings, known.tool_format, messages, mcp.operators)
    parsed = parsed_body("responses", values, known, request, details, ignored)
    own_items = [tool.item for tool in history.own.values() if tool.item] if history else []
    kept = ()
    if details.get("store"):
        kept = kept_items(input_items(values, runs_tools, own_items), own=own_items)
    plan = None
    if history and not prewarms and (offered is not None or history.approved):
        plan = tool_plan(values, known, mcp, history, messages)
    return replace(parsed, repeated=repeated_json(body), kept=kept, plan=plan)


def with_search(tools: Seq[dict]) -> tuple[list[dict], bool]:
    """Tools with the search for further tools as a function, if the client runs it, and whether it does."""
    searches = [index for index, tool in enumerate(tools)
                if tool.get("type") == SEARCH and tool.get("execution") == "client"]
    if not searches:
        return [*tools], False
    if len(searches) > 1:
        raise invalid(f"tools[{searches[1]}]", f"tools[{searches[1]}] is a second entry of the type {SEARCH}")
    for index, tool in enumerate(tools):
        if tool.get("type") in ("function", None) and tool.get("name") == SEARCH:
            raise invalid(f"tools[{index}]", f"tools[{index}] is a function with the name {SEARCH}, which "
                                             "the tool of this type has; call it otherwise")
    [index] = searches
    function = {"type": "function", "name": SEARCH, "description": tools[index].get("description"),
                "parameters": tools[index].get("parameters")}
    usual = {"description": SEARCH_TEXT, "parameters": SEARCH_PARAMETERS}
    function |= {name: value for name, value in usual.items() if function[name] is None}
    return [*tools[:index], function, *tools[index + 1:]], True


def choice_of_search(sent: Any, choice: ToolChoice, searches: bool) -> ToolChoice:
    """The tool choice of a body, which may choose the search that its client runs. sent: as it was sent."""
    if not searches or not isinstance(sent, dict):
        return choice
    if sent.get("type") == SEARCH:
        return ToolChoice("required", (SEARCH,), parallel=False)
    if sent.get("type") == "allowed_tools" and any(tool.get("type") == SEARCH for tool in sent["tools"]):
        return choice._replace(names=(*(choice.names or ()), SEARCH))
    return choice


def tool_plan(values: Mapping, known: Known, mcp: McpTools, history: McpHistory,
              messages: tuple[Message, ...]) -> ToolPlan:
    """What the server's own loop is asked for."""
    names = [tool.name for tool in mcp.planned]
    for call in history.approved:
        if call.name not in names:
            raise invalid("tools", f"tools: a call of {call.name} is approved, so its server must be among "
                          "them, and running")
    listed = tuple(label for label in mcp.labels if label not in history.listed)
    return ToolPlan(tuple(mcp.planned), listed, tuple(history.approved), values.get("max_tool_calls"),
                    later_params(values, known, messages), first=mcp.first)


def included(body: Mapping, history: McpHistory) -> dict:
    """The detail that says what of the items of the server's own tools was asked for."""
    names = includable(tool for tool in history.own.values())
    wanted = [name for name in body.get("include") or () if name in names]
    return {"include": wanted} if wanted else {}


def includable(tools: Iterable[PlannedTool]) -> set[str]:
    """What `include` may name of the items of tools."""
    items = [tool.item for tool in tools if tool.item]
    return {f"{item.type}.{member}" for item in items for member in item.asked_for}


def kept_details(values: Mapping, known: Known) -> dict:
    """What its encoder must know of a response that may be kept: whether it is, and what it continues.
    Raises RequestError if it continues something on a server that keeps no answers."""
    chained = [name for name in CHAINED if values.get(name)]
    in_background = {"background": True} if values.get("background") else {}
    if in_background and (known.settings.database is None or not values.get("store", True)):
        raise bad_value("background", True, "false where the answer is not kept, which needs --database and "
                        'no "store": false')
    if known.settings.database is None:
        if chained:
            raise bad_value(chained[0], values[chained[0]], "left out: the server keeps no answers, since it "
                            "was started without --database, so send the whole conversation as input")
        return {}
    if len(chained) == 2:
        raise invalid("conversation", "previous_response_id and conversation exclude each other")
    return {"store": values.get("store", True), **in_background, **{name: values[name] for name in chained}}


def input_items(values: Mapping, runs_tools: bool = False, own: Seq[CallItem] = ()) -> list:
    """The input of a response as items. runs_tools: does the server run tools, and so understand their
    items? own: those of tools that it has itself."""
    items = values.get("input", "")
    if is_text(items):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": items}]}]
    others = OTHER_ITEMS - MADE - {item.type for item in own}
    if runs_tools:
        others -= MCP_ITEMS
    return [*without_others(items, others)]


def idle_include(body: Mapping, parsed: ParsedBody, known: Known) -> Iterator[str]:
    """What of `include` this server cannot add."""
    known_names = {LOGPROBS_OF_TEXT} | includable(parsed.plan.tools if parsed.plan else ())
    for name in body.get("include") or ():
        if name not in known_names:
            yield f"include.{name}"


def alone(body: dict) -> dict:
    """A body as a line of a batch. Raises RequestError if it continues another answer."""
    for name in ("previous_response_id", "conversation"):
        if body.get(name):
            raise bad_value(name, body[name], "left out in a batch, whose lines stand alone")
    return body | {"stream": False, "store": False, "background": False}


async def count_input(body: dict, terms: TextTerms) -> bytes:
    """How many tokens the prompt of a response has. Nothing is kept."""
    counted = {field.name: body[field.name] for field in COUNTED_FIELDS
               if body.get(field.name) is not None}
    parsed = read_response({"input": "", **counted}, Terms(terms.known, terms.before, terms.offered))
    params = replace(parsed.request.params, client=terms.client)
    admitted = await terms.prompts.admit(replace(parsed.request, params=params))
    return dump({"object": "response.input_tokens", "input_tokens": sum(map(len, admitted.prompt_ids or ()))})


# the encoder

class ResponsesEncoder(BlockEncoder):
    """`/v1/responses`. Every block is an item. The only part of an item is the block's text, and a call has
    no part.

    Log-probabilities are kept as JSON. Where they belong, an item has a placeholder (`place_of_logprobs`)
    until `with_logprobs` replaces it."""

    # kind of block -> the item's type, the prefix of its id, the part's type, and the prefix of its events
    ITEMS = {"text": ("message", "msg_", "output_text", "response.output_text"),
             "reasoning": ("reasoning", "rs_", "reasoning_text", "response.reasoning_text"),
             "call": ("function_call", "fc_", "", "response.function_call_arguments"),
             "mcp": ("mcp_call", "mcp_", "", "response.mcp_call_arguments"),
             "approval": ("mcp_approval_request", "mcpr_", "", "response.mcp_call_arguments"),
             "list": ("mcp_list_tools", "mcpl_", "", "response.mcp_list_tools"),
             "search": ("tool_search_call", "tsc_", "", ""),
             "own": ("", "", "", "")}  # a call of a tool with items of its own: see CallItem
    has_own_items = True

    def __init__(self, *arguments):
        super().__init__(*arguments)
        sampling = self.request.params.sampling
        kept = self.parsed.details
        self.numbers = itertools.count()  # of events
        self.scored = self.request.params.logprobs is not None
        self.tokens = TokensOfText(self.tokenizer, self.request.params.skip_special_tokens)
        self.logprobs: dict[str, list[bytes]] = {}  # id of a block -> its log-probabilities, each in JSON
        self.logprob_bytes = 0                      # of all so far
        self.needs_a_block = self.request.max_tokens != 0  # else only the prompt was wanted
        self.head = {"id": "resp_" + self.request.id, "object": "response", "created_at": int(time.time()),
                     "model": self.model, "error": None, "incomplete_details": None,
                     "completed_at": None, "service_tier": "default",
                     "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed,
                     "presence_penalty": sampling.presence_penalty,
                     "frequency_penalty": sampling.frequency_penalty,
                     "top_logprobs": self.request.params.logprobs or 0,
                     "background": self.parsed.in_background,
                     "previous_response_id": kept.get("previous_response_id"),
                     "store": kept.get("store", False), "usage": None}
        if "conversation" in kept:
            self.head["conversation"] = {"id": kept["conversation"]}

    def kind_of(self, part: Part) -> str:
        if part.kind == "call" and part.name == SEARCH and self.parsed.details.get("searches"):
            return "search"
        return super().kind_of(part)

    @property
    def was_cut(self) -> bool:
        """Where only the prompt was wanted, nothing was."""
        return bool(self.choice.done and self.choice.done.reason == "length" and self.request.max_tokens != 0)

    def event(self, event_type: str, **fields) -> bytes:
        return self.with_logprobs(super().event(event_type, sequence_number=next(self.numbers), **fields))

    def with_logprobs(self, data: bytes) -> bytes:
        """JSON with log-probabilities in place of each `place_of_logprobs`. No text of an answer can look
        like one: its quotes are escaped."""
        for name, encoded in self.logprobs.items():
            data = data.replace(b'"logprobs": ["%s"]' % name.encode(),
                                b'"logprobs": [%s]' % b", ".join(encoded))
        return data

    def without_logprobs(self, data: bytes) -> bytes:
        """The same JSON as it is kept."""
        for name in self.logprobs:
            data = data.replace(b'"logprobs": ["%s"]' % name.encode(), b'"logprobs": []')
        return data

    def place_of_logprobs(self, block: AnswerBlock) -> list[str]:
        return [block.id] if block.id in self.logprobs else []

    def scores(self, block: AnswerBlock, text: str) -> bytes:
        """The log-probabilities of the tokens behind the next text of a block, in JSON.

        They are also kept for a whole answer, and for the last events of a stream. Four of those repeat all
        of them before the client has read any. So if there are many, the last events leave them out."""
        tokens = self.tokens.take(text) if self.scored else ()
        if not tokens or block.kind != "text":
            return b""
        encoded = [*map(dump, entries(tokens, self.request.params, self.tokenizer))]
        self.logprob_bytes += sum(map(len, encoded))
        if self.parsed.stream and self.logprob_bytes > LIMITS.repeated_bytes:
            self.logprobs.clear()
        else:
            self.logprobs.setdefault(block.id, []).extend(encoded)
        return b", ".join(encoded)

    def encode(self, event: Event) -> bytes:
        if self.scored and isinstance(event, Piece):
            self.tokens.add(event.logprobs)
        return super().encode(event)

    def collect(self, event: Event) -> int:
        before = self.logprob_bytes
        if self.scored and isinstance(event, Piece):
            self.tokens.add(event.logprobs)
            self._show_new_parts()
            for part, delta in zip(self.state.parts_of(event), event.deltas):
                block = self.block_of[part.index]
                if block and delta.text and delta.kind != "calculator":
                    self.scores(block, delta.text)
        return super().collect(event) + self.logprob_bytes - before

    def kept_answer(self, status: str = "", error: ChatServerError | None = None) -> KeptAnswer:
        """The response as it is kept, which is without log-probabilities. status: of one that has not ended;
        "": it has. error: why it failed."""
        fields = {"error": response_error(error)} if error else {}
        body = self.body(status, **fields) if status else self.whole()[1]
        items = [KeptItem(item.pop("id"), self.without_logprobs(dump(item)))
                 for item in map(self.item, self.blocks)]
        return KeptAnswer(items, self.without_logprobs(body))

    def body(self, status: str, **fields) -> bytes:
        """The response so far, with places for its log-probabilities."""
        body = self.head | {"status": status, "output": [*map(self.item, self.blocks)]} | fields
        return b"%s, %s}" % (dump(body)[:-1], self.parsed.repeated)

    def response_event(self, moment: str, response: bytes) -> bytes:
        event = dump({"type": f"response.{moment}", "sequence_number": next(self.numbers)})[:-1]
        return b'event: response.%s\ndata: %s, "response": %s}\n\n' % (
            moment.encode(), event, self.with_logprobs(response))

    def start(self, accepted: Accepted) -> bytes:
        return b"".join(self.response_event(moment, self.body("in_progress"))
                        for moment in ("created", "in_progress"))

    def item(self, block: AnswerBlock, begins: bool = False) -> dict:
        kind, prefix, _, _ = self.ITEMS[block.kind]
        if block.part.tool_list:
            return self.item_of_list(block, block.part.tool_list, begins)
        tool = block.part.tool
        if tool and tool.item:
            return self.item_of_own(block, tool.item, begins)
        if tool:
            return self.item_of_tool(block, tool, begins)
        status = "completed"
        if begins:
            status = "in_progress"
        elif block is self.blocks[-1] and self.was_cut:
            status = "incomplete"
        item = {"id": prefix + block.id, "type": kind, "status": status}
        if block.kind == "call":
            return item | {"call_id": "call_" + block.id, "name": block.part.name,
                           "arguments": "" if begins else block.text}
        if block.kind == "search":
            return item | {"call_id": "call_" + block.id, "execution": "client",
                           "arguments": {} if begins else parsed_arguments(block.text)}
        more = {"role": "assistant"} if block.kind == "text" else {"summary": []}
        return item | more | {"content": [] if begins else [self.part(block)]}

    def shown_kind(self, block: AnswerBlock) -> str:
        """The kind of a block as clients see it: nobody is asked about a call that can't be made."""
        cannot_be = block.kind == "approval" and block.part.is_closed and arguments_of(block.text) is None
        return "mcp" if cannot_be else block.kind

    def id_of(self, block: AnswerBlock) -> str:
        """The id of a block's item. The server knows that of an approval request again; that of an approved
        call is made from it."""
        tool = block.part.tool
        kind = self.shown_kind(block)
        if block.part.approval_id:
            return id_of_approved_call(block.part.approval_id)
        if tool and tool.item:
            return tool.item.prefix + block.id
        if kind == "approval" and tool and self.parsed.plan:
            return approval_id(self.parsed.plan.mark, block.id, tool.digest)
        return self.ITEMS[kind][1] + block.id

    def item_of_list(self, block: AnswerBlock, listed: ToolsListed, begins: bool) -> dict:
        error = {"error": listed.error} if listed.error else {}
        return {"id": self.id_of(block), "type": "mcp_list_tools", "server_label": listed.label,
                "tools": [] if begins else listed.tools, **error}

    def item_of_tool(self, block: AnswerBlock, tool: PlannedTool, begins: bool) -> dict:
        kind = self.shown_kind(block)
        item = {"id": self.id_of(block), "type": self.ITEMS[kind][0], "server_label": tool.label,
                "name": tool.tool, "arguments": "" if begins else block.text}
        if kind == "approval":
            return item
        result = block.result
        output = error = None
        status = "in_progress" if begins else "incomplete"
        if result and result.is_error:
            error = {"type": "mcp_tool_execution_error", "content": [{"type": "text", "text": result.text}]}
            status = "failed"
        elif result:
            output = result.text
            status = "completed"
        return item | {"status": status, "approval_request_id": block.part.approval_id or None,
                       "output": output, "error": error}

    def item_of_own(self, block: AnswerBlock, item: CallItem, begins: bool) -> dict:
        """The item of a call of a tool that has items of its own."""
        result = block.result
        status = "in_progress" if begins else "incomplete"
        if result:
            status = "failed" if result.is_error else "completed"
        shown = result.shown if result else {}
        asked_for = self.parsed.details.get("include", ())
        return {"id": self.id_of(block), "type": item.type, "status": status,
                **{name: shown.get(name, []) for name in item.members},
                **{name: shown.get(name) if f"{item.type}.{name}" in asked_for else None
                   for name in item.asked_for}}

    def part(self, block: AnswerBlock, begins: bool = False) -> dict:
        """The only part of an item. begins: as it begins, whatever the latest event has added already."""
        text = "" if begins else block.text
        more = {}
        if block.kind == "text":
            more = {"annotations": self.cited_in(block, text),
                    "logprobs": self.place_of_logprobs(block),
                    **calculator_member([] if begins else self.placed_calls(block, block.calculations))}
        return {"type": self.ITEMS[block.kind][2], "text": text, **more}

    def place(self, block: AnswerBlock) -> dict:
        part = {"content_index": 0} if self.ITEMS[block.kind][2] else {}
        return {"item_id": self.id_of(block), "output_index": block.index, **part}

    def item_event(self, moment: str, block: AnswerBlock, begins: bool = False) -> bytes:
        return self.event(f"response.output_item.{moment}", output_index=block.index,
                          item=self.item(block, begins))

    def open_block(self, block: AnswerBlock) -> bytes:
        # an approval comes whole: `close_block`
        return b"" if block.kind == "approval" else self.opening_events(block)

    def opening_events(self, block: AnswerBlock) -> bytes:
        item = self.item_event("added", block, begins=True)
        if self.shown_kind(block) == "mcp":
            return item + self.event("response.mcp_call.in_progress", **self.place(block))
        if block.part.tool and block.part.tool.item:
            return item + self.event(f"response.{block.part.tool.item.type}.in_progress", **self.place(block))
        if block.kind in ("call", "search"):
            return item
        part = self.part(block, begins=True)
        return item + self.event("response.content_part.added", **self.place(block), part=part)

    def grow_block(self, block: AnswerBlock, text: str, call: dict | None = None) -> bytes:
        if block.kind in ("approval", "own", "search"):
            self.scores(block, text)
            return b""
        if not block.frame:  # to dump a whole event takes 13 us, and 3 us to dump the text alone
            event = self.ITEMS[block.kind][3] + ".delta"
            fields = dump({"type": event, **self.place(block)})[:-1]
            block.frame = b"event: %s\ndata: %s, " % (event.encode(), fields)
        scores = self.scores(block, text) if text else b""
        logprobs = b'"logprobs": [%s], ' % scores if block.kind == "text" else b""
        more = b', "calculator": %s' % dump([call]) if call else b""
        grown = b'%s"sequence_number": %d, %s"delta": %s%s}\n\n' % (
            block.frame, next(self.numbers), logprobs, dump(text), more)
        return grown + self.cite(block, text) if block.part.sources and block.kind == "text" else grown

    def citations(self, block: AnswerBlock) -> Citations:
        """Finds what numbers in the text of a block cite."""
        return Citations(self.state.sources[:block.part.sources])

    def cited_in(self, block: AnswerBlock, text: str) -> list[dict]:
        """What is cited in the text of a block, or the beginning of that."""
        citations = self.citations(block)
        if block.part.sources:
            citations.add(text)
            if block.part.is_closed:
                citations.finish()
        return citations.found

    def cite(self, block: AnswerBlock, text: str, ends: bool = False) -> bytes:
        """The events for what the next text of a block cites. ends: nothing follows."""
        if block.citations is None:
            block.citations = self.citations(block)
        before = len(block.citations.found)
        block.citations.add(text)
        if ends:
            block.citations.finish()
        return b"".join(
            self.event("response.output_text.annotation.added", **self.place(block), annotation_index=index,
                       annotation=annotation)
            for index, annotation in enumerate(block.citations.found[before:], before))

    def close_block(self, block: AnswerBlock) -> bytes:
        kind = self.shown_kind(block)
        if kind == "approval":
            return self.item_event("added", block) + self.item_event("done", block)
        if kind == "search":
            return self.item_event("done", block)
        opening = self.opening_events(block) if block.kind == "approval" else b""
        return opening + self.closing_events(block, kind)

    def closing_events(self, block: AnswerBlock, kind: str) -> bytes:
        event = self.ITEMS[kind][3] + ".done"
        place = self.place(block)
        text = block.text
        if kind == "mcp":  # its item is done once it has its result
            return self.event(event, **place, arguments=text)
        if block.part.tool and block.part.tool.item:
            return self.event(f"response.{block.part.tool.item.type}.{block.part.tool.item.runs}", **place)
        if kind == "call":
            done = self.event(event, **place, name=block.part.name, arguments=text)
        else:
            logprobs = {"logprobs": self.place_of_logprobs(block)} if block.kind == "text" else {}
            cited = self.cite(block, "", ends=True) if block.part.sources and block.kind == "text" else b""
            done = cited + self.event(event, **place, text=text, **logprobs) + self.event(
                "response.content_part.done", **place, part=self.part(block))
        return done + self.item_event("done", block)

    def end_call(self, block: AnswerBlock) -> bytes:
        item = block.part.tool and block.part.tool.item
        if item:
            is_error = block.result and block.result.is_error  # of which the API has no event
            end = b"" if is_error else self.event(f"response.{item.type}.completed", **self.place(block))
            return end + self.item_event("done", block)
        moment = "failed" if block.result and block.result.is_error else "completed"
        return self.event(f"response.mcp_call.{moment}", **self.place(block)) + self.item_event("done", block)

    def list_tools(self, block: AnswerBlock) -> bytes:
        end = "failed" if block.part.tool_list and block.part.tool_list.error else "completed"
        frames = self.item_event("added", block, begins=True)
        for moment in ("in_progress", end):
            frames += self.event(f"response.mcp_list_tools.{moment}", **self.place(block))
        return frames + self.item_event("done", block)

    def whole(self) -> tuple[str, bytes]:
        """The response's status, and the whole response, with places for its log-probabilities."""
        count = self.usage()
        usage = {"input_tokens": count.prompt_tokens,
                 "input_tokens_details": {"cached_tokens": count.cached_tokens, "cache_write_tokens": 0},
                 "output_tokens": count.completion_tokens,
                 "output_tokens_details": {"reasoning_tokens": count.reasoning_tokens},
                 "total_tokens": count.prompt_tokens + count.completion_tokens}
        cut = {"incomplete_details": {"reason": "max_output_tokens"}} if self.was_cut else {}
        status = "incomplete" if cut else "completed"
        if not cut and self.head["completed_at"] is None:
            self.head["completed_at"] = int(time.time())
        return status, self.body(status, usage=usage, timings=timings_body(self.choice.done), **cut)

    def end(self) -> bytes:
        return self.response_event(*self.whole())

    def completion(self) -> Iterator[bytes]:
        yield self.with_logprobs(self.whole()[1])

    def failed(self, error: ChatServerError) -> bytes:
        return self.response_event("failed", self.body("failed", error=response_error(error)))

    @staticmethod
    def lone_failure(error: ChatServerError) -> bytes:
        return b"event: error\n" + frame({"type": "error", **response_error(error), "param": error.param})


CONTINUING = Continuing(chained, follow_references)
DIALECT = Dialect({
    "/v1/responses": Form(
        RESPONSES_FIELDS, read_response, ResponsesEncoder, idle=idle_include, servers=servers_of_response,
        continuing=CONTINUING, alone=alone, keep=ResponsesEncoder.kept_answer),
    "/v1/responses/input_tokens": TextForm(
        COUNTED_FIELDS, count_input, servers=servers_of_response, continuing=CONTINUING)})
