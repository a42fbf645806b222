"""Readers of request bodies, one for each route. For a route that answers, it returns a `ParsedBody`."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence as Seq
from dataclasses import replace
from typing import Any, TYPE_CHECKING

from chatlm.common.config import DEFAULT_MAX_TOKENS, LIMITS, Settings
from chatlm.common.errors import Overloaded, RequestError, bad_value, invalid
from chatlm.common.jsontext import dump, is_text
from chatlm.common.messages.protocol import ParsedBody
from chatlm.common.messages.requests import (
    NEW_DOCUMENT, SAMPLING_NAMES, AnswerParams, Infill, Message, Request, SamplingParams, sampling_defaults)
from chatlm.common.messages.tool_rounds import ToolPlan
from chatlm.common.messages.wire import as_plain_json
from chatlm.common.text.formats import CALL_FORMATS, knows_of_thinking, thoughts_of
from chatlm.front.api.message_readers import (
    OTHER_BLOCKS, OTHER_ITEMS, SentMessage, anthropic_messages, chat_messages, custom_calls, joined_turns,
    message_from, native_messages, openai_messages, other_types, response_messages, sent_messages,
    template_options, without_others)
from chatlm.front.api.earlier_calculations import with_names_read
from chatlm.front.api.fields import (
    ABSENT, ToolChoice, allowed_tools, flat_functions_among, functions_among, header_words, names_in,
    no_tools, parse_fields, value_at, within_limit)
from chatlm.front.api.field_types import (
    OPENAI_ROLES, one_constraint, thinking_budget, thinking_of_member, turned_off)
from chatlm.front.api.ignored import ignored_fields, unread

from chatlm.front.api.kept_items import kept_items
from chatlm.front.api.mcp_messages import MCP_BLOCKS, TOOLSET, choice_among, tools_of_message
from chatlm.front.api.mcp_tools import (
    MCP_ITEMS, NO_TOOLS, McpHistory, McpTools, own_entries, refuse_in_batches)
from chatlm.front.api.retrieval_readers import RETRIEVAL_READERS, check_route
from chatlm.front.api.tables import (
    BODY_FIELDS, COMPARE_FIELDS, COMPLETION_FIELDS, CONTINUES, COUNTED_FIELDS, DRAWING_FIELDS, DRAWN,
    INFILL_FIELDS, LOOSE_ENDS, MANAGED_FIELDS, MESSAGES_FIELDS, NATIVE_FIELDS, OLLAMA_CHAT_FIELDS,
    OLLAMA_GENERATE_FIELDS, OLLAMA_OPTIONS, OLLAMA_SHOW_FIELDS, OPENAI_FIELDS, PARAMS_NAMES, REQUEST_NAMES,
    RESPONSES_FIELDS, SAMPLING_FIELDS, SOME, VARIANT_FIELDS, WHO)
from chatlm.front.api.tokenization import apply_template, conversation_tokens, detokenize, tokenize

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import Known

    from chatlm.front.admission.prompts import PromptMaker
    from chatlm.front.api.fields import Field


# what several APIs share

def parse_answer(body: dict, fields: Seq[Field], known: Known) -> dict:
    """Check the fields of a body with a conversation to answer.

    If it turns thinking off and the template has no switch for that, the budget of thinking becomes 0."""
    values = parse_fields(body, fields)
    budget = thinking_budget(body, fields)
    if not budget:
        off = turned_off(body, fields)
        if off and thoughts_of(known.template) and not knows_of_thinking(known.template):
            budget = {off: 0}
    return values | {"budget": budget}


def sampling_params(values: Mapping, settings: Settings) -> SamplingParams:
    """The request's values, else the defaults. The seed is random if none is set."""
    seed = settings.seed if settings.seed is not None else secrets.randbits(53)  # exact in JavaScript
    chosen: dict[str, Any] = {"seed": seed} | {
        name: value for name, (value, _) in sampling_defaults(settings).items()}
    if values.get("temperature", chosen["temperature"]) == 0:
        for name in names_in(SAMPLING_FIELDS, DRAWN):
            chosen.pop(name, None)
    return SamplingParams(**chosen | pick(values, *SAMPLING_NAMES))


def make_request(values: Mapping, settings: Settings, params: AnswerParams = AnswerParams(),
                 **source) -> Request:
    """A Request from the fields that every generating route has, plus `params` and `source`."""
    if "messages" in source:
        params, options = with_thinking_budget(params, values.get("budget", {}), settings,
                                               source.get("max_tokens"))
        source["template_options"] = {**source.get("template_options", {}), **options}
        if not values.get("skip_special_tokens", True):
            source["messages"] = with_names_read(source["messages"])
    check_stops(values.get("stop", ()))
    params = replace(params, sampling=sampling_params(values, settings), chat="messages" in source,
                     **pick(values, *PARAMS_NAMES))
    return Request(params=params, low_priority=values.get("priority", False),
                   **pick(values, *REQUEST_NAMES), **source)


def check_stops(stops: Seq[str]):
    """Raise RequestError for stop strings that are too long together."""
    size = sum(map(len, stops))
    if size > LIMITS.stop_characters:
        raise invalid("stop", f"the stop strings have {size:,} characters together; at most "
                              f"{LIMITS.stop_characters:,} are allowed")


def with_thinking_budget(params: AnswerParams, chosen: Mapping[str, int], settings: Settings,
                         max_tokens: int | None = None) -> tuple[AnswerParams, dict[str, int]]:
    """The parameters with a budget of thinking, and the template options that say it. chosen: the request's
    budget (see thinking_budget); if it is empty, the server's budget counts. Raises RequestError if the
    request's is above `max_tokens`."""
    budget = settings.reasoning_budget
    for name, budget in chosen.items():
        if budget > (max_tokens or budget):
            raise bad_value(name, budget, f"an integer from 0 to {max_tokens}, the most tokens of the answer")
    options = {"thinking_budget": budget} if budget >= 0 else {}
    return replace(params, last_thought=settings.reasoning_budget_message, **options), options


def pick(values: Mapping, *names: str) -> dict:
    return {name: values[name] for name in names if name in values}


def openai_request(values: Mapping, settings: Settings, params: AnswerParams, **source) -> Request:
    """A Request from the fields that all routes except nanochat's share."""
    cap = values.get("max_tokens", settings.max_tokens)
    if params.grammar:  # it alone decides whether the answer may go on
        values = {name: value for name, value in values.items() if name not in LOOSE_ENDS}
    return make_request(values, settings, params, max_tokens=None if cap == -1 else cap, **source)


def parse_openai_request(values: Mapping, settings: Settings, tool_format: str | None = None,
                         messages: tuple[Message, ...] | None = None,
                         operators: Mapping[str, bool] = NO_TOOLS) -> Request:
    """The checked OPENAI_FIELDS as a Request; its tools are functions.

    tool_format: how the model writes calls; None: it cannot. messages: other APIs have already parsed them
    and their template options; None: they are among the fields. operators: as in McpTools."""
    logprobs = values.get("logprobs", False)
    top = values.get("top_logprobs", 0)
    if top and not logprobs:
        raise invalid("top_logprobs", "top_logprobs needs logprobs: true")
    choice = values.get("tool_choice", ToolChoice())
    required = choice.mode == "required"
    tools = callable_tools(values.get("tools", ()), choice, tool_format)
    grammar, param = one_constraint(values)
    parallel = choice.parallel
    if parallel is None:
        parallel = values.get("parallel_tool_calls", not required)
    calls = required_grammar(tools, operators, tool_format or "", parallel) if required else ""
    if calls:
        grammar = calls
        param = "tools"
    options = values.get("template_options", {})
    if messages is None:
        messages = openai_messages(values["messages"], tool_format is not None)
        options = template_options(values)
    functions = [tool["function"] for tool in tools]
    strict = ()
    if not grammar and any(map(is_strict, functions)):
        strict = strict_grammars(functions, tool_format or "")
        param = "tools"
    names = tuple(function["name"] for function in functions)
    types = types_of_parameters(tools, names, tool_format)
    params = AnswerParams(grammar=grammar, grammar_param=param, logprobs=top if logprobs else None,
                          tool_names=names, tool_types=types, call_grammars=strict,
                          tool_schemas=() if grammar else schemas_of_loose_calls(functions, tool_format),
                          parallel_calls=bool(calls) or parallel)
    return openai_request(values, settings, params, messages=messages, template_options=options, tools=tools)


def callable_tools(tools: Seq[dict], choice: ToolChoice, tool_format: str | None) -> tuple[dict, ...]:
    """The tools that the model may call. Raises RequestError if it cannot call any."""
    if choice.mode == "none":
        return ()
    if tool_format is None:
        if tools:
            raise no_tools("tools")
        if choice.mode == "required":
            raise no_tools("tool_choice")
    return allowed_tools(tools, choice)


def required_grammar(tools: Seq[dict], operators: Mapping[str, bool], tool_format: str,
                     parallel: bool) -> str:
    """A grammar that allows only calls of the tools. An operator's tool never makes it fail: if its
    parameters can't be enforced, it may have any arguments. If the grammar is still too large, only the
    body's own functions are required; without any, the grammar is ""."""
    from chatlm.front.api.call_grammars import tool_grammar
    loose = [name for name, is_enforced in operators.items() if not is_enforced]
    try:
        return tool_grammar([*with_any_arguments(tools, loose)], tool_format, parallel)
    except RequestError:
        own = [tool for tool in tools if tool["function"]["name"] not in operators]
        if len(own) == len(tools):
            raise
        return tool_grammar(own, tool_format, parallel) if own else ""


def with_any_arguments(tools: Seq[dict], names: Collection[str]) -> Iterator[dict]:
    """The tools, those with these names without what they say of their parameters."""
    for tool in tools:
        function = tool["function"]
        yield {**tool, "function": {**function, "parameters": {}}} if function["name"] in names else tool


def is_strict(function: Mapping) -> bool:
    return function.get("strict") is True


def strict_grammars(functions: Seq[Mapping], tool_format: str) -> tuple[str, ...]:
    """What the arguments of each function must match; "" for one that is not strict."""
    from chatlm.common.text.grammar import unusable_schema
    from chatlm.front.api.call_grammars import call_grammar
    grammars = tuple(call_grammar(function, tool_format) if is_strict(function) else ""
                     for function in functions)
    if sum(map(len, grammars)) > 16 * LIMITS.grammar_characters:
        raise unusable_schema("the parameters of all strict functions are too long", "tools")
    return grammars


def types_of_parameters(tools: Seq[dict], names: Seq[str], tool_format: str | None) -> tuple[dict, ...]:
    """The JSON types of each function's parameters, if calls in this format do not show them. Raises
    RequestError for names that are too long together."""
    types = ()
    if tools and tool_format and CALL_FORMATS[tool_format].typed:
        from chatlm.front.api.call_grammars import parameter_types
        steps = iter(range(8192))  # of 11 us: a small schema can say much
        types = tuple(parameter_types(tool, steps) for tool in tools)
    size = len(as_plain_json((names, types)))
    if size > LIMITS.tool_name_bytes:
        raise invalid("tools", f"the names of all functions and parameters in tools take {size:,} bytes, "
                               f"at most {LIMITS.tool_name_bytes:,} are allowed")
    return types


def schemas_of_loose_calls(functions: Seq[dict], tool_format: str | None) -> tuple[str, ...]:
    """The schemas of the functions' parameters, if the model may write calls as plain JSON: they tell them
    from other JSON. One that is very large is left out: any object fits then."""
    if not functions or not tool_format or not CALL_FORMATS[tool_format].loose:
        return ()
    from chatlm.front.api.call_grammars import parameters_schema
    texts = [as_plain_json(parameters_schema(function)) for function in functions]
    return tuple(text if len(text) <= LIMITS.grammar_characters else "" for text in texts)


def without_lone_top(values: Mapping) -> dict:
    """The values for an API in which `top_logprobs` alone asks for nothing: Ollama's and Responses."""
    if values.get("logprobs"):
        return {**values}
    return {name: value for name, value in values.items() if name != "top_logprobs"}


def with_infill_ends(values: Mapping, known: Known, param: str | None = None) -> dict:
    """The values of a body that fills in a gap. What the model writes after a gap is added to its
    `stop_token_ids`. Raises RequestError, about the field `param`, if the model has no tokens for gaps."""
    if known.infill is None:
        raise Overloaded("the model is still loading", retry_after_s=2)
    missing = known.infill.missing
    if missing:
        names = ", ".join(missing[:-1]) + " and " * (len(missing) > 1) + missing[-1]
        raise RequestError(f"this model cannot fill in the middle: its tokenizer has no {names} "
                           f"token{'s' * (len(missing) > 1)}", code="infill_not_supported", param=param)
    own = values.get("stop_token_ids", ())
    return {**values, "stop_token_ids": own if values.get("ignore_eos") else (*own, *known.infill.ends)}


def parsed_body(api: str, values: Mapping, known: Known, request: Request, details: Mapping | None = None,
                ignored_tools: tuple[str, ...] = ()) -> ParsedBody:
    return ParsedBody(
        request, stream=values.get("stream", False), echo=values.get("echo", False), api=api,
        include_usage=values.get("stream_options", {}).get("include_usage") is True,
        token_ids=values.get("return_token_ids", False), details=details or {}, ignored_tools=ignored_tools)


# nanochat, OpenAI and llama-server

def read_native_body(body: dict, known: Known) -> ParsedBody:
    """nanochat's body. One that names a model comes from an OpenAI client whose base URL lacks /v1."""
    if body.get("model") is not None:
        return read_chat_body(body, known)
    values = parse_answer(body, NATIVE_FIELDS, known)
    settings = known.settings
    messages, dropped = native_messages(values["messages"], values.get("truncate", False))
    return ParsedBody(make_request(
        values, settings, messages=messages, dropped_messages=dropped,
        template_options=template_options(values),
        max_tokens=values.get("max_tokens", settings.max_tokens or DEFAULT_MAX_TOKENS)))


def read_chat_body(body: dict, known: Known) -> ParsedBody:
    values = parse_answer(body, OPENAI_FIELDS, known)
    if body.get("functions") and known.tool_format is None:
        raise no_tools("functions")
    values["tools"], ignored = functions_among(values.get("tools", ()))
    request = parse_openai_request(values, known.settings, known.tool_format)
    if any(map(custom_calls, values["messages"])):
        ignored = tuple(dict.fromkeys((*ignored, "custom")))
    parsed = scored_body("functions" if body.get("functions") else "chat", values, known, request)
    return replace(parsed, ignored_tools=ignored)


def read_completion_body(body: dict, known: Known) -> ParsedBody:
    values = parse_fields(body, COMPLETION_FIELDS)
    n = values.get("n", 1)
    logprobs = values.get("logprobs")
    suffix = values.get("suffix")
    prompts = values.get("prompt", ("",) if suffix else (NEW_DOCUMENT,))
    if values.get("best_of", n) != n:
        raise RequestError("best_of must equal n", code="unsupported_best_of", param="best_of")
    within_limit("answers (prompts times n)", len(prompts) * n, LIMITS.choices, "prompt")
    grammar, param = one_constraint(values)
    params = AnswerParams(grammar=grammar, grammar_param=param, logprobs=logprobs,
                          prompt_logprobs=logprobs if values.get("echo") else None)
    infill = None
    if suffix:
        if params.prompt_logprobs is not None:
            raise invalid("echo", "echo and logprobs exclude each other where there is a suffix, since the "
                                  "model reads the suffix before the answer")
        values = with_infill_ends(values, known, "suffix")
        infill = Infill((suffix,))
    request = openai_request(values, known.settings, params, prompts=prompts, infill=infill)
    return scored_body("completion", values, known, request)


def scored_body(api: str, values: Mapping, known: Known, request: Request) -> ParsedBody:
    """A body of OpenAI's with vLLM's `logprob_token_ids` and `prompt_logprobs`, if it has them."""
    params = request.params
    token_ids = values.get("logprob_token_ids", ())
    if token_ids:
        if params.logprobs is None:
            raise invalid("logprob_token_ids", "logprob_token_ids needs logprobs")
        params = replace(params, logprob_ids=token_ids)
    top = values.get("prompt_logprobs")
    starts = values.get("prompt_logprobs_start", ())
    if starts:
        name = "prompt_logprobs_start"
        count = len(request.prompts)
        if top is None or params.prompt_logprobs is not None:
            raise invalid(name, f"{name} needs prompt_logprobs, and excludes logprobs of an echo")
        if len(starts) == 1:
            starts *= count
        if len(starts) != count:
            raise invalid(name, f"{name} has {len(starts)} numbers, but there are {count} prompts")
    details = {}
    if top is not None:
        for name in ("stream", "suffix"):
            if values.get(name):
                raise invalid("prompt_logprobs", f"prompt_logprobs and {name} exclude each other")
        params = replace(params, prompt_logprobs=max(top, params.prompt_logprobs or 0))
        details = {"prompt_logprobs": top}
    return parsed_body(api, values, known, replace(request, params=params, score_from=starts), details)


def read_infill_body(body: dict, known: Known) -> ParsedBody:
    """llama-server's body. Its `prompt` continues the text before the gap."""
    values = with_infill_ends(parse_fields(body, INFILL_FIELDS), known)
    grammar, param = one_constraint(values)
    params = AnswerParams(grammar=grammar, grammar_param=param, logprobs=values.get("logprobs") or None)
    infill = Infill(tuple(values["input_suffix"]), tuple(values["input_prefix"]),
                    values.get("input_extra", ()), cut=True)
    prompts = (values.get("prompt", ""),)
    request = openai_request(values, known.settings, params, prompts=prompts, infill=infill)
    return parsed_body("infill", values, known, request,
                       {"response_fields": values.get("response_fields", ())})


# OpenAI's Responses

def repeated_json(body: Mapping) -> bytes:
    """The members of a body that its response repeats in several events, encoded once for all of them."""
    repeated = {field.name: field.repeated for field in RESPONSES_FIELDS if field.repeated is not ABSENT}
    try:
        texts = {name: dump(value if body.get(name) is None else body[name])
                 for name, value in repeated.items()}
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


def read_responses_body(body: dict, known: Known, before: Seq | None = None,
                        offered: Seq[Mapping] | None = None) -> ParsedBody:
    """before: the items that the body continues. offered: the tools of the servers that it names, as far as
    its client may have them; None: nothing is run for it."""
    values = without_lone_top(parse_answer(body, RESPONSES_FIELDS, known))
    if "input" not in values and not any(values.get(name) for name in CHAINED):
        raise RequestError('One of "input", "prompt", "previous_response_id" or "conversation" must be '
                           "provided.", code="missing_required_parameter", param="input")
    details = kept_details(values, known)
    sent = values.get("tools", ())
    tools, ignored = flat_functions_among(sent, ["function", None], "parameters")
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
        history = McpHistory(before or (), values.get("input"))
        served = MCP_ITEMS | {tool["type"] for tool in own} | ({"mcp"} if has_servers else set())
        ignored = tuple(name for name in ignored if name not in served)
        tools = mcp.beside(tools)
        values["tool_choice"] = mcp.choice(body.get("tool_choice"), values.get("tool_choice", ToolChoice()))
    messages = joined_turns(chat_messages(
        response_messages(values, before or (), history), known.tool_format is not None))
    values["tools"] = tools
    request = parse_openai_request(values, known.settings, known.tool_format, messages, mcp.operators)
    parsed = parsed_body("responses", values, known, request, details, ignored)
    kept = kept_items(input_items(values, runs_tools)) if details.get("store") else ()
    plan = None
    if history and (offered is not None or history.approved):
        plan = tool_plan(values, known, mcp, history, messages)
    return replace(parsed, repeated=repeated_json(body), kept=kept, plan=plan)


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
                    later_params(values, known, messages))


def later_params(values: Mapping, known: Known, messages: tuple[Message, ...]) -> AnswerParams | None:
    """The parameters of the rounds after the first; None if they are the same. A call is required once, not
    in each round."""
    choice = values.get("tool_choice", ToolChoice())
    if choice.mode != "required":
        return None
    values = {**values, "tool_choice": choice._replace(mode="auto")}
    return parse_openai_request(values, known.settings, known.tool_format, messages).params


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


def input_items(values: Mapping, runs_tools: bool = False) -> list:
    """The input of a response as items. runs_tools: does the server run tools, and so understand their
    items?"""
    items = values.get("input", "")
    if is_text(items):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": items}]}]
    others = OTHER_ITEMS - MCP_ITEMS | {"mcp_list_tools"} if runs_tools else OTHER_ITEMS
    return [*without_others(items, others)]


# Anthropic's Messages

def read_messages_body(body: dict, known: Known, offered: Seq[Mapping] | None = None) -> ParsedBody:
    """offered: the tools of the servers that it names, as far as its client may have them; None: nothing is
    run for it."""
    values = parse_answer(body, MESSAGES_FIELDS, known)
    messages, mcp, ignored = anthropic_prompt(values, known, offered)
    options = anthropic_options(messages, body, values)
    values |= {"template_options": options, "response_format": one_format(values)}
    request = parse_openai_request(values, known.settings, known.tool_format, messages, mcp.operators)
    thinks = value_at(body, "thinking.type") in ("enabled", "adaptive")
    parsed = parsed_body("messages", values, known, request, {"thinking": thinks}, ignored)
    if not mcp.planned:
        return parsed
    later = later_params(values, known, messages)
    return replace(parsed, plan=ToolPlan(tuple(mcp.planned), later=later, pauses=True))


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
    own = own_entries(values.get("tools", ()), offered)
    has_servers = known.settings.mcp_config is not None
    messages = chat_messages(anthropic_messages(values, has_servers or bool(own)),
                             known.tool_format is not None)
    tools, ignored = flat_functions_among(values.get("tools", ()), [None, "custom"], "input_schema")
    for message in values["messages"]:
        ignored += other_types(message.get("content"), OTHER_BLOCKS)
    mcp = McpTools(own, offered or ())
    if has_servers:
        mcp = tools_of_message(values, offered)
        ignored = tuple(name for name in ignored if name != TOOLSET)
    if has_servers or own:
        served = MCP_BLOCKS | {tool["type"] for tool in own}
        ignored = tuple(name for name in ignored if name not in served)
    if "tool_choice" in values:
        values["tool_choice"] = choice_among(mcp, tools, values["tool_choice"])
    values["tools"] = mcp.beside(tools)
    return messages, mcp, tuple(dict.fromkeys(ignored))


def anthropic_options(messages: Seq[Message], body: Mapping, values: Mapping) -> dict:
    """The template options. In this API, a last message of the assistant is one to continue."""
    last = messages[-1]
    is_open = last.role == "assistant" and last.content and "tool_calls" not in (last.more or {})
    continues = {"continue_final_message": True} if is_open else {}
    effort = thinking_of_member("output_config.effort", value_at(body, "output_config.effort"))
    return {**continues, **effort, **values.get("template_options", {})}


async def count_tokens(body: dict, prompts: PromptMaker, client: str, known: Known,
                       offered: Seq[Mapping] | None) -> bytes:
    values = parse_fields(body, COUNTED_FIELDS)
    messages, _, _ = anthropic_prompt(values, known, offered)
    tools = values["tools"]
    if values.get("tool_choice", ToolChoice()).mode == "none":
        tools = ()
    if tools and not known.tool_format:
        raise no_tools("tools")
    options = anthropic_options(messages, body, values)
    if budget := thinking_budget(body, COUNTED_FIELDS):
        options["thinking_budget"] = max(budget.values())
    ids = await conversation_tokens(prompts, messages, tools, client, options)
    return dump({"input_tokens": len(ids)})


# Ollama

def read_ollama_chat(body: dict, known: Known) -> ParsedBody:
    values = parse_answer(body, OLLAMA_CHAT_FIELDS, known)
    values.setdefault("truncate", True)
    sent = sent_messages(values["messages"], [*OPENAI_ROLES, "tool"]) if values.get("messages") else ()
    messages = chat_messages(map(from_ollama, sent), known.tool_format is not None)
    return ollama_body("ollama chat", values, known, messages=messages)


def from_ollama(message: SentMessage) -> SentMessage:
    """A message of Ollama's as one of Chat Completions."""
    fields = message.fields
    return message._replace(fields={
        "name": fields.get("tool_name"), "reasoning_content": fields.get("thinking"),
        "calculator": fields.get("calculator"),
        "content": with_images(fields.get("content"), fields.get("images")),
        "tool_calls": fields.get("tool_calls")})


def with_images(content, images):
    """Ollama's content as parts, if it has images, which come first; else as it is."""
    if not isinstance(images, list | None):
        raise bad_value("images", images, "a list of images in base64")
    return [*images, {"type": "text", "text": content or ""}] if images else content


def read_ollama_generate(body: dict, known: Known) -> ParsedBody:
    api = "ollama generate"
    values = parse_answer(body, OLLAMA_GENERATE_FIELDS, known)
    prompt = values.get("prompt", "")
    suffix = values.get("suffix")
    if suffix:
        values = with_infill_ends(values, known, "suffix")
        return ollama_body(api, values, known, prompts=(prompt,), infill=Infill((suffix,)))
    if prompt and (values.get("raw", False) or not known.chats):
        return ollama_body(api, values, known, prompts=(prompt,))
    system = (Message("system", values["system"]),) if "system" in values else ()
    question = message_from("user", with_images(prompt, values.get("images")), {}, "images")
    messages = (*system, question) if prompt or question.pictures else ()
    return ollama_body(api, values, known, messages=messages)


def ollama_body(api: str, values: dict, known: Known, **source) -> ParsedBody:
    values = {"stream": True} | values | parse_fields(values.get("options", {}), OLLAMA_OPTIONS)
    values = without_lone_top(values)
    values["tools"], ignored = functions_among(values.get("tools", ()))
    if "prompts" in source:
        grammar, param = values.get("response_format", ("", ""))
        logprobs = values.get("top_logprobs", 0) if values.get("logprobs") else None
        params = AnswerParams(grammar=grammar, grammar_param=param, logprobs=logprobs)
        request = openai_request(values, known.settings, params, **source)
    else:
        messages = source["messages"] or (Message("user", ""),)
        request = parse_openai_request(values, known.settings, known.tool_format, messages)
    nothing = {"done_reason": "load"} if source.get("messages") == () else None
    return parsed_body(api, values, known, request, nothing, ignored)


async def read_ollama_show(body: dict, prompts: PromptMaker, client: str = "") -> bytes:
    """The model's name. A very long name is cut: its start is just as unknown."""
    return parse_fields(body, OLLAMA_SHOW_FIELDS).get("model", "")[:1000].encode()


# models and comparisons

async def read_managed(body: dict, prompts: PromptMaker, client: str = "") -> bytes:
    """Nothing: the body only names the model to load or unload."""
    parse_fields(body, MANAGED_FIELDS)
    return b""


async def read_compare(body: dict, prompts: PromptMaker | None = None, client: str = "") -> bytes:
    """Who answers a body of /v1/compare, as JSON. `variants` has an object for each answer; its `step`, or
    its `model` and `adapter`, choose the model. `seed` is for the answers that have none of their own.

    The questions are read later by `read_variants`, for each model."""
    values = parse_fields(body, COMPARE_FIELDS)
    thinking_budget(body, COMPARE_FIELDS)
    if "prompt" in values and "messages" in values:
        raise invalid("prompt", "prompt and messages exclude each other: the models continue a text, or "
                                "answer a conversation")
    if "prompt" not in values and "messages" not in values:
        raise RequestError("messages is missing, or prompt, a text to continue",
                           code="missing_required_parameter", param="messages")
    chosen = [name for name in names_in(COMPARE_FIELDS, SOME) if name in values]
    if len(chosen) != 1:
        raise invalid(chosen[1] if chosen else "models", "one of models, steps and variants must say who "
                      f"answers, and {' and '.join(chosen) or 'none of them'} is here")
    variants = [dict(variant) for variant in values.get("variants", ())]
    for index, variant in enumerate(variants):
        parse_fields({f"variants[{index}].{name}": value for name, value in variant.items()},
                     [field._replace(name=f"variants[{index}].{field.name}") for field in VARIANT_FIELDS])
    variants = variants or [{"model": name} for name in values.get("models", ())]
    variants = variants or [{"step": step} for step in values.get("steps", ())]
    seed = sampling_params(values, Settings()).seed
    return dump({"seed": seed, "variants": list(map(who_answers, variants))})


def who_answers(variant: Mapping) -> dict:
    """The fields of a variant that choose its model. A very long name is cut: its start is as unknown."""
    who = pick(variant, *names_in(VARIANT_FIELDS, WHO))
    return {name: value[:1000] if is_text(value) else value for name, value in who.items()}


def read_variants(body: dict, indices: Seq[int], seed: int, known: Known) -> list[ParsedBody]:
    """The questions of a body of /v1/compare to one model, which gives the answers with these `indices`.
    They share the messages, which are read once. Log-probabilities are requested to show how likely a token
    was that differs."""
    values: dict[str, Any] = {"seed": seed, **parse_answer(body, COMPARE_FIELDS, known)}
    text = values.get("prompt")
    messages = ()
    if text is None:
        messages = openai_messages(values["messages"], known.tool_format is not None)
        values["template_options"] = template_options(values)
    variants = values.get("variants", ())
    read = []
    for index in indices:
        own = values | parse_fields(variants[index] if variants else {}, DRAWING_FIELDS)
        if text is None:
            request = parse_openai_request(own, known.settings, known.tool_format, messages)
        else:
            request = openai_request(own, known.settings, AnswerParams(), prompts=(text,))
        read.append(ParsedBody(replace(request, params=replace(request.params, logprobs=0)), api="chat"))
    return read


# The reader of each route's body. It makes a ParsedBody for handle_answer, and a text for other routes.
ANSWER_READERS: dict[str, Callable[..., ParsedBody]] = {
    "/chat/completions": read_native_body,
    **dict.fromkeys(("/v1/chat/completions", "/api/v0/chat/completions"), read_chat_body),
    **dict.fromkeys(("/v1/completions", "/api/v0/completions"), read_completion_body),
    "/infill": read_infill_body,
    "/v1/responses": read_responses_body,
    "/v1/messages": read_messages_body,
    "/api/chat": read_ollama_chat,
    "/api/generate": read_ollama_generate,
    **RETRIEVAL_READERS,
}
COUNTING = "/v1/messages/count_tokens"
TEXT_READERS: dict[str, Callable] = {
    COUNTING: count_tokens,
    "/tokenize": tokenize,
    "/detokenize": detokenize,
    "/apply-template": apply_template,
    "/api/show": read_ollama_show,
    "/models/load": read_managed,
    "/models/unload": read_managed,
    "/v1/compare": read_compare,
}


def read_answer(route: str, body: dict, known: Known, before: Seq | None = None,
                offered: Seq[Mapping] | None = None) -> ParsedBody:
    """Read the body of a route that answers. before: the items that a response continues; None: it continues
    nothing. offered: the tools that the server may run for it; None: it runs none."""
    check_route(route, known)
    if before is None and offered is None:
        parsed = ANSWER_READERS[route](body, known)
    elif route == "/v1/messages":
        parsed = read_messages_body(body, known, offered)
    else:
        parsed = read_responses_body(body, known, before, offered)
    return replace(parsed, ignored_fields=ignored_fields(route, body, parsed, known))


async def read_text(route: str, body: dict, known: Known, prompts: PromptMaker, client: str = "",
                    offered: Seq[Mapping] | None = None) -> bytes:
    """Read the body of any other route. Returns a line with the fields that have no effect, followed by what
    the route's reader returns. offered: as for `read_answer`."""
    ignored = [*unread(body, BODY_FIELDS[route])]
    if route == COUNTING:
        text = await count_tokens(body, prompts, client, known, offered)
        if body.get("mcp_servers") and known.settings.mcp_config is None:
            ignored.append("mcp_servers")
    else:
        text = await TEXT_READERS[route](body, prompts, client)
    return b"%s\n%s" % (", ".join(header_words(ignored)).encode(), text)
