"""What readers of several dialects share: from the checked fields of a body to a `Request`."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence as Seq
from dataclasses import replace
from typing import Any, TYPE_CHECKING

from chatlm.common.config import LIMITS, Settings
from chatlm.common.errors import Overloaded, RequestError, bad_value, invalid
from chatlm.common.messages.protocol import ParsedBody
from chatlm.common.messages.requests import (
    SAMPLING_NAMES, AnswerParams, Message, Request, SamplingParams, sampling_defaults)
from chatlm.common.messages.wire import as_plain_json
from chatlm.common.text.calculations import calculations_of, text_in
from chatlm.common.text.formats import CALL_FORMATS, knows_of_thinking, thoughts_of
from chatlm.common.text.grammar import unusable_schema
from chatlm.front.api.call_grammars import call_grammar, parameter_types, parameters_schema, tool_grammar
from chatlm.front.api.message_readers import openai_messages, template_options
from chatlm.front.api.earlier_calculations import with_names_read
from chatlm.front.api.fields import ToolChoice, names_in, parse_fields, within_limit
from chatlm.front.api.found_tools import Functions, KnownFunctions, chosen, with_chosen
from chatlm.front.api.field_types import one_constraint, thinking_budget, turned_off
from chatlm.front.api.mcp_tools import NO_TOOLS
from chatlm.front.api.tables import DRAWN, LOOSE_ENDS, PARAMS_NAMES, REQUEST_NAMES, SAMPLING_FIELDS

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import Known

    from chatlm.front.admission.prompts import PromptMaker
    from chatlm.front.api.fields import Field


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
    and their template options, and may have made their tools Functions; None: they are among the fields.
    operators: as in McpTools."""
    logprobs = values.get("logprobs", False)
    top = values.get("top_logprobs", 0)
    if top and not logprobs:
        raise invalid("top_logprobs", "top_logprobs needs logprobs: true")
    choice = values.get("tool_choice", ToolChoice())
    required = choice.mode == "required"
    functions = values.get("tools", ())
    options = values.get("template_options", {})
    if not isinstance(functions, Functions):
        known = KnownFunctions(functions)
        if messages is None:
            messages = openai_messages(values["messages"], tool_format is not None, known)
            options = template_options(values)
        functions = known.functions
    assert messages is not None
    functions = chosen(functions, choice, tool_format)
    tools = functions.able
    grammar, param = one_constraint(values)
    parallel = choice.parallel
    if parallel is None:
        parallel = values.get("parallel_tool_calls", not required)
    calls = required_grammar(tools, operators, tool_format or "", parallel) if required else ""
    if calls:
        grammar = calls
        param = "tools"
    offered = [tool["function"] for tool in tools]
    strict = ()
    if not grammar and any(map(is_strict, offered)):
        strict = strict_grammars(offered, tool_format or "")
        param = "tools"
    names = tuple(function["name"] for function in offered)
    types = types_of_parameters(tools, names, tool_format)
    params = AnswerParams(grammar=grammar, grammar_param=param, logprobs=top if logprobs else None,
                          tool_names=names, tool_types=types, call_grammars=strict,
                          tool_schemas=() if grammar else schemas_of_loose_calls(offered, tool_format),
                          parallel_calls=bool(calls) or parallel)
    return openai_request(values, settings, params, messages=with_chosen(messages, choice),
                          template_options=options, tools=tuple(functions.head))


def required_grammar(tools: Seq[dict], operators: Mapping[str, bool], tool_format: str,
                     parallel: bool) -> str:
    """A grammar that allows only calls of the tools. An operator's tool never makes it fail: if its
    parameters can't be enforced, it may have any arguments. If the grammar is still too large, only the
    body's own functions are required; without any, the grammar is ""."""
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
    grammars = list[str]()
    strict = sum(map(is_strict, functions))
    within_limit("strict functions", strict, LIMITS.strict_functions, "tools")
    left = 16 * LIMITS.grammar_characters
    for function in functions:
        grammars.append(call_grammar(function, tool_format) if is_strict(function) else "")
        left -= len(grammars[-1])
        if left < 0:
            raise unusable_schema("the parameters of all strict functions are too long", "tools")
    return tuple(grammars)


def types_of_parameters(tools: Seq[dict], names: Seq[str], tool_format: str | None) -> tuple[dict, ...]:
    """The JSON types of each function's parameters, if calls in this format do not show them. Raises
    RequestError for names that are too long together."""
    types = ()
    if tools and tool_format and CALL_FORMATS[tool_format].typed:
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


def parsed_body(kind: str, values: Mapping, known: Known, request: Request, details: Mapping | None = None,
                ignored_tools: tuple[str, ...] = ()) -> ParsedBody:
    return ParsedBody(
        request, stream=values.get("stream", False), echo=values.get("echo", False), kind=kind,
        include_usage=values.get("stream_options", {}).get("include_usage") is True,
        token_ids=values.get("return_token_ids", False), details=details or {}, ignored_tools=ignored_tools)


def later_params(values: Mapping, known: Known, messages: tuple[Message, ...]) -> AnswerParams | None:
    """The parameters of the rounds after the first; None if they are the same. A call is required once, not
    in each round."""
    choice = values.get("tool_choice", ToolChoice())
    if choice.mode != "required":
        return None
    values = {**values, "tool_choice": choice._replace(mode="auto")}
    return parse_openai_request(values, known.settings, known.tool_format, messages).params


async def conversation_tokens(prompts: PromptMaker, messages: Seq[Message], tools: Seq[dict], client: str,
                              options: Mapping) -> tuple[int, ...]:
    """The tokens of a conversation. Raises RequestError if it is too long to wait for."""
    size = sum(len(message.content) + len(text_in(calculations_of(message))) for message in messages)
    within_limit("characters in all messages", size, LIMITS.tokenized_characters, "messages")
    return await prompts.render(messages, tools, client, options)
