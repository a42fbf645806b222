"""null, at any depth of a body, is as if the member were absent; nothing that is empty or of a strange type ends with anything but an answer or a RequestError."""

import copy
from dataclasses import replace

import pytest

from chatlm.common.errors import ChatServerError
from sent_bodies import BASE, OTHERS, SCHEMA, STRANGE, VALUES, lacking, members_of, nulled, parsed, replaced, sent
from spoken_paths import BODY_FIELDS

CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
CHAT = [{"role": "system", "content": "Be brief.", "name": "x"}, {"role": "user", "name": "me", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": "Well", "reasoning_content": "Hm", "refusal": "no", "audio": {"id": "x"}, "tool_calls": [CALL], "function_call": None}, {"role": "tool", "tool_call_id": "call_1", "content": "5"}]
BLOCKS = [{"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral", "ttl": "5m"}, "citations": []}, {"type": "document", "title": "t", "context": "c", "source": {"type": "text", "media_type": "text/plain", "data": "words"}, "citations": {"enabled": True}}]},
          {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm", "signature": "x"}, {"type": "tool_use", "id": "t1", "name": "add", "input": {}}]}, {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "is_error": False, "content": [{"type": "text", "text": "5"}]}]}]
ITEMS = [{"type": "message", "id": "msg_1", "status": "completed", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}, {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm"}], "content": [{"type": "reasoning_text", "text": "Hm"}], "encrypted_content": "x", "status": "completed"},
         {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Well", "annotations": [], "logprobs": []}]}, {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "add", "arguments": "{}", "status": "completed"}, {"type": "function_call_output", "id": "fco_1", "call_id": "c", "output": "5", "status": "completed"}]
RICH = {  # values with more members than those of test_ignored
    ("/v1/chat/completions", "messages"): CHAT, ("/chat/completions", "messages"): CHAT[:2], ("/v1/messages", "messages"): BLOCKS, ("/v1/messages", "system"): [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}], ("/v1/responses", "input"): ITEMS,
    ("/v1/chat/completions", "tools"): [{"type": "function", "function": {"name": "add", "description": "d", "strict": False, "parameters": SCHEMA}}], ("/v1/responses", "tools"): [{"type": "function", "name": "add", "description": "d", "strict": False, "parameters": SCHEMA}],
    ("/v1/messages", "tools"): [{"type": "custom", "name": "add", "description": "d", "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}}], ("/v1/messages", "thinking"): {"type": "enabled", "budget_tokens": 1024}, ("/v1/messages", "tool_choice"): {"type": "auto", "disable_parallel_tool_use": False},
    ("/v1/chat/completions", "stream_options"): {"include_usage": True, "include_obfuscation": False}, ("/v1/responses", "reasoning"): {"effort": "low", "summary": "auto", "generate_summary": "auto"}, ("/v1/responses", "text"): {"format": {"type": "text"}, "verbosity": "low"},
    ("/v1/chat/completions", "response_format"): {"type": "json_schema", "json_schema": {"name": "n", "description": "d", "strict": True, "schema": SCHEMA}}, ("/api/chat", "messages"): [{"role": "user", "content": "Hi", "images": [], "thinking": "x", "tool_calls": []}], ("/api/chat", "options"): {"temperature": 0.5, "stop": ["x"], "seed": 1, "num_predict": 3}}

def outcome(route, body):
    """What becomes of a body: what is read, or that it is refused."""
    try:
        read, ignored = parsed(route, copy.deepcopy(body))
        return (replace(read, repeated=b"") if route == "/v1/responses" else read), ignored     # which says what was sent
    except ChatServerError as error:
        return getattr(error, "status", type(error))


FIELDS = [(route, field.name) for route, fields in BODY_FIELDS.items() for field in fields]


def bodies(route, name):
    if (route, name) in RICH:
        return sent(route, name)[1] | {name: RICH[route, name]} if name in VALUES or (route, name) in OTHERS else BASE[route] | {name: RICH[route, name]}
    return sent(route, name)[1] if name in VALUES or (route, name) in OTHERS else BASE[route]


@pytest.mark.parametrize("route, name", [each for each in FIELDS if each[1] in VALUES or each in RICH or each in OTHERS])
def test_null_is_as_if_absent_at_any_depth(route, name):
    body = bodies(route, name)
    different = []
    for path in members_of(body):
        null, without = (outcome(route, change(body, path)) for change in (nulled, lacking))
        if null != without and path != ("seed",):       # without one, each request draws its own
            different.append((path, null, without))
    assert different == []


@pytest.mark.parametrize("route", BODY_FIELDS)
def test_whatever_a_field_has_is_read_or_refused(route):
    """And so whatever a member of it has."""
    for name in (field.name for field in BODY_FIELDS[route]):
        for value in STRANGE:
            outcome(route, BASE[route] | {name: value})
        body = bodies(route, name)
        for path in members_of(body.get(name), (name,)):
            for value in STRANGE:
                outcome(route, replaced(body, path, value))
