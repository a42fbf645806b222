"""Any JSON value in any place of a body is read or refused, and never breaks a reader."""

import copy
import json

import pytest

from chatlm.common.config import Settings
from chatlm.common.errors import RequestError
from chatlm.common.messages.protocol import Known
from chatlm.common.messages.requests import Embedder, InfillTokens, Picture
from chatlm.front.admission.prompts import PromptMaker
from chatlm.front.api.batch_lines import lasting_body, read_line
from chatlm.front.api.fields import parse_fields
from chatlm.front.api.dialects.own import read_variants
from chatlm.front.api.reading import read_answer, read_text
from chatlm.front.intake.envelope import make_envelope, open_body
from fake_pool import Letters
from spoken_paths import ANSWERS, BODY_FIELDS, TEXTS

ODD = [
    None,
    True,
    -1,
    10**30,
    1.5,
    "",
    "x",
    "\ud800",
    "mcp_call",
    [],
    [[]],
    [1],
    {},
    {"a": 1},
    ["x"],
    [{}],
    {"type": []},
    {"type": {}},
]
LEAST_ODD = [[], {}, [[1]], {"a": [1]}, 7, None, "x"]
SCHEMA = {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]}
FUNCTION = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
PIXEL = "data:image/png;base64,iVBORw0KGgo="
OFFERED = [
    {
        "name": "fake__add",
        "description": "adds",
        "parameters": SCHEMA,
        "label": "fake",
        "tool": "add",
        "strict": True,
        "read_only": True,
        "ask": False,
        "digest": "0123456789abcdef",
    }
]
CHAT = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "s"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "t"}, {"type": "image_url", "image_url": {"url": PIXEL}}],
        },
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "r"},
        {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "5"},
        {"role": "user", "content": "u", "name": "me"},
    ],
    "tools": [
        FUNCTION,
        {
            "type": "custom",
            "custom": {
                "name": "c",
                "format": {"type": "grammar", "grammar": {"syntax": "regex", "definition": "a"}},
            },
        },
    ],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
    "stop": ["a"],
    "logit_bias": {"1": 2},
    "stream_options": {"include_usage": True},
    "logprobs": True,
    "top_logprobs": 1,
    "metadata": {"a": "b"},
    "chat_template_kwargs": {"enable_thinking": True},
    "reasoning_effort": "low",
    "n": 1,
}
ITEMS = [
    {
        "type": "message",
        "role": "user",
        "content": [{"type": "input_text", "text": "t"}, {"type": "input_image", "image_url": PIXEL}],
    },
    {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [{"type": "summary_text", "text": "s"}],
        "content": [{"type": "reasoning_text", "text": "r"}],
    },
    {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "5"},
    {"type": "mcp_list_tools", "id": "mcpl_1", "server_label": "fake", "tools": [{"name": "add"}]},
    {
        "type": "mcp_call",
        "id": "mcp_1",
        "server_label": "fake",
        "name": "add",
        "arguments": "{}",
        "output": None,
        "error": {"type": "e", "content": [{"type": "text", "text": "t"}], "message": "m"},
        "approval_request_id": "mcpr_0",
    },
    {
        "type": "mcp_approval_request",
        "id": "mcpr_1",
        "server_label": "fake",
        "name": "add",
        "arguments": "{}",
    },
    {"type": "mcp_approval_response", "approval_request_id": "mcpr_1", "approve": False, "reason": "r"},
    {"type": "item_reference", "id": "msg_1"},
    {
        "role": "assistant",
        "content": [{"type": "output_text", "text": "o", "annotations": [], "logprobs": []}],
    },
]
RESPONSE = {
    "model": "m",
    "input": ITEMS,
    "tools": [
        {
            "type": "mcp",
            "server_label": "fake",
            "allowed_tools": {"tool_names": ["add"], "read_only": True},
            "require_approval": {"never": {"tool_names": ["add"]}, "always": {}},
        },
        {"type": "function", "name": "f", "parameters": SCHEMA, "strict": True},
        {"type": "custom", "name": "c", "format": {"type": "text"}},
        {"type": "web_search"},
    ],
    "tool_choice": {
        "type": "allowed_tools",
        "mode": "auto",
        "tools": [{"type": "mcp", "server_label": "fake", "name": "add"}],
    },
    "text": {"format": {"type": "text"}},
    "reasoning": {"effort": "low"},
    "include": ["message.output_text.logprobs"],
    "conversation": {"id": "conv_1"},
    "metadata": {"a": "b"},
    "max_tool_calls": 2,
}
LATER = {"type": "function", "name": "later", "parameters": SCHEMA, "defer_loading": True}
FOUND = {
    "model": "m",
    "input": [
        {"type": "tool_search_call", "call_id": "c1", "execution": "client", "arguments": {"q": "x"}},
        {"type": "tool_search_output", "call_id": "c1", "execution": "client", "tools": [LATER]},
        {"type": "additional_tools", "role": "developer", "tools": [LATER, {"type": "namespace"}]},
        {"role": "assistant", "content": "a", "phase": "commentary"},
        {"role": "user", "content": "u"},
    ],
    "tools": [{"type": "tool_search", "execution": "client", "description": "d", "parameters": SCHEMA}, LATER],
    "tool_choice": {"type": "tool_search"},
    "prompt_cache_key": "k",
    "safety_identifier": "s",
    "prompt_cache_options": {"mode": "explicit", "prewarm": True},
}
FOUND_MESSAGE = {
    "model": "m",
    "max_tokens": 9,
    "messages": [
        {"role": "user", "content": "u"},
        {
            "role": "system",
            "content": [
                {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "later"}},
                {"type": "tool_removal", "tool": {"type": "mcp_tool_reference", "server_name": "fake", "name": "add"}},
                {
                    "type": "tool_addition",
                    "tool": {"type": "tool_definition", "definition": {"name": "g", "input_schema": SCHEMA}},
                },
            ],
            "clear_at": "next_user_message",
        },
        {
            "role": "assistant",
            "content": [
                {"type": "server_tool_use", "id": "s1", "name": "tool_search_tool_regex", "input": {}},
                {
                    "type": "tool_search_tool_result",
                    "tool_use_id": "s1",
                    "content": {
                        "type": "tool_search_tool_search_result",
                        "tool_references": [{"type": "tool_reference", "tool_name": "later"}],
                    },
                },
                {"type": "tool_use", "id": "t1", "name": "f", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t1",
                    "content": [{"type": "tool_reference", "tool_name": "later"}, {"type": "text", "text": "t"}],
                }
            ],
        },
    ],
    "tools": [
        {"name": "f", "input_schema": SCHEMA},
        {"name": "later", "input_schema": SCHEMA, "defer_loading": True},
    ],
}
MESSAGE = {
    "model": "m",
    "max_tokens": 9,
    "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "t"},
                {
                    "type": "image",
                    "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="},
                },
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "t", "signature": "s"},
                {"type": "mcp_tool_use", "id": "u1", "name": "add", "server_name": "fake", "input": {"a": 1}},
                {
                    "type": "mcp_tool_result",
                    "tool_use_id": "u1",
                    "is_error": False,
                    "content": [{"type": "text", "text": "5"}],
                },
                {"type": "tool_use", "id": "t1", "name": "f", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "5"}]}
            ],
        },
    ],
    "tools": [
        {"name": "f", "input_schema": SCHEMA},
        {
            "type": "mcp_toolset",
            "mcp_server_name": "fake",
            "default_config": {"enabled": True},
            "configs": {"add": {"enabled": True}},
        },
    ],
    "mcp_servers": [{"type": "url", "name": "fake", "url": "", "authorization_token": None}],
    "tool_choice": {"type": "tool", "name": "f"},
    "thinking": {"type": "enabled", "budget_tokens": 2000},
    "stop_sequences": ["a"],
    "metadata": {"user_id": "u"},
}
OLLAMA = {
    "model": "m",
    "messages": [
        {"role": "user", "content": "u", "images": ["iVBORw0KGgo="]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": "5", "tool_name": "f"},
    ],
    "tools": [FUNCTION],
    "format": SCHEMA,
    "think": True,
    "options": {"temperature": 1, "stop": ["a"]},
}
BODIES = {
    "/v1/chat/completions": [
        CHAT,
        {
            "messages": [
                {"role": "user", "content": "u"},
                {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
                {"role": "function", "name": "f", "content": "5"},
            ],
            "functions": [FUNCTION["function"]],
            "function_call": {"name": "f"},
        },
    ],
    "/chat/completions": [{"messages": [{"role": "user", "content": "u"}], "temperature": 1}],
    "/v1/completions": [
        {
            "prompt": [[1, 2], [3]],
            "logit_bias": {"1": 1},
            "stop": ["a"],
            "stream_options": {"include_usage": True},
        },
        {"prompt": ["a"], "suffix": "b"},
    ],
    "/v1/responses": [RESPONSE, FOUND],
    "/v1/responses/input_tokens": [RESPONSE, FOUND],
    "/v1/messages": [MESSAGE, FOUND_MESSAGE],
    "/v1/messages/count_tokens": [MESSAGE],
    "/api/chat": [OLLAMA],
    "/api/generate": [
        {
            "model": "m",
            "prompt": "p",
            "images": ["iVBORw0KGgo="],
            "options": {"stop": ["a"]},
            "format": SCHEMA,
            "context": [1],
        }
    ],
    "/infill": [
        {
            "input_prefix": "a",
            "input_suffix": "b",
            "input_extra": [{"filename": "f", "text": "t"}],
            "prompt": "p",
        }
    ],
    "/v1/embeddings": [{"input": ["a", [1, 2]], "encoding_format": "float"}],
    "/api/embed": [{"model": "m", "input": ["a"], "options": {"x": 1}}],
    "/v1/rerank": [{"query": "q", "documents": ["d", {"text": "t"}]}],
    "/v1/score": [{"text_1": ["a"], "text_2": ["b"]}],
    "/tokenize": [CHAT, {"content": "x", "with_pieces": True}],
    "/detokenize": [{"tokens": [1]}],
    "/apply-template": [CHAT],
    "/v1/compare": [
        {
            "messages": [{"role": "user", "content": "u"}],
            "variants": [{"model": "m", "temperature": 1}, {"step": 3}],
        }
    ],
}


def places(value, path=()):
    """The paths of all values in a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in inner:
        yield from places(member, (*path, key))


def with_value(body, path, value):
    body = copy.deepcopy(body)
    place = body
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return body


def without_value(body, path):
    body = with_value(body, path, None)
    place = body
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return body


def odd_bodies(body, odd):
    for path in places(body):
        if path:
            yield without_value(body, path)
            for value in odd:
                yield with_value(body, path, value)


def known_for(route):
    embeds = any(word in route for word in ("embed", "rerank", "score"))
    kind = "rank" if "rerank" in route or "score" in route else "mean"
    return Known(
        Settings(mcp_config="x", database="y"),
        "tagged",
        embedder=Embedder(kind, 4, 64) if embeds else None,
        infill=InfillTokens(1, 2, 3),
    )


async def read(route, body):
    """All that happens to a body before a model gets it."""
    raw = json.dumps(body).encode()
    envelope = open_body(route, None, raw)
    fields = envelope.fields
    envelope.lift.check("")
    envelope.show([Picture(1, 1, b"", bytes(16))] * len(envelope.lift.files))
    known = known_for(route)
    if route in ANSWERS:
        parsed = read_answer(route, fields, known)
        if route in ("/v1/responses", "/v1/messages"):
            read_answer(route, json.loads(raw), known, [] if route == "/v1/responses" else None, OFFERED)
        return parsed
    if route == "/v1/compare":
        wanted = json.loads((await read_text(route, fields, known, None)).partition(b"\n")[2])
        return read_variants(fields, [*range(len(wanted["variants"]))], wanted["seed"], known)
    offered = OFFERED if "count" in route else None
    return await read_text(route, fields, known, PromptMaker(Letters(), 4096), offered=offered)


@pytest.mark.parametrize("route", BODIES)
async def test_odd_values_break_no_reader(route):
    count = 0
    for whole in BODIES[route]:
        for body in odd_bodies(whole, ODD if len(json.dumps(whole)) < 400 else LEAST_ODD + ODD[-2:]):
            count += 1
            try:
                await read(route, body)
            except RequestError:
                pass
            except Exception as error:
                raise AssertionError(
                    f"{type(error).__name__}: {error} for {json.dumps(body)[:2000]}"
                ) from error
    assert count > 20
    assert route in ANSWERS + TEXTS


@pytest.mark.parametrize("route", sorted(set(BODY_FIELDS) - set(BODIES)))
async def test_odd_values_break_no_check_of_fields(route):
    for field in BODY_FIELDS[route]:
        for value in ODD:
            try:
                parse_fields({field.name: value}, BODY_FIELDS[route])
                make_envelope({field.name: value}, "/v1/responses")
            except RequestError:
                pass


def test_odd_values_break_no_line_of_a_batch():
    line = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/responses",
        "body": RESPONSE | {"tools": [], "tool_choice": "auto", "conversation": None, "input": ITEMS[:4]},
    }
    for odd in odd_bodies(line, LEAST_ODD):
        try:
            read_line(1, json.dumps(odd).encode()).problem(known_for("/v1/responses"), "")
        except RequestError:
            pass
    for body in odd_bodies(
        {
            "choices": [{"logprobs": {"content": [{"drafted": True}]}}],
            "output": [{"content": [{"logprobs": [{}]}]}],
            "usage": {"x": {}},
        },
        LEAST_ODD,
    ):
        lasting_body(body, 7)
