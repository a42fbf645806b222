"""Tools of types that no model has here, in Chat Completions and what shares its form: left out of the
prompt, and named in a header."""

import pytest

from chatlm.common.config import Settings
from chatlm.common.errors import RequestError
from chatlm.common.messages.protocol import Known
from chatlm.front.api.reading import read_answer
from openai_routes import call, need_exact

CHAT, OLLAMA, RESPONSES = "/v1/chat/completions", "/api/chat", "/v1/responses"
HI = {"role": "user", "content": "What is the capital of Japan?"}
ADD = {"type": "function",
       "function": {"name": "add",
                    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}},
                                   "required": ["a"]}}}
PATCH = {"type": "custom", "custom": {"name": "patch", "format": {"type": "text"}}}
SEARCH = {"type": "web_search_20990101", "name": "search"}
KNOWN = Known(Settings(seed=1), "tagged")


@pytest.fixture(scope="module")
def url(default_url):
    return default_url


def asked(url, path=CHAT, most=30, **changes):
    drawn = {"options": {"temperature": 0, "num_predict": most},
             "stream": False} if path == OLLAMA else {"temperature": 0, "max_tokens": most}
    return call(url, path, {"messages": [HI], **drawn, **changes})


def answer(body):
    return body.get("message") or body["choices"][0]["message"]


@pytest.mark.parametrize("path", [CHAT, OLLAMA])
def test_custom_tools_are_left_out_and_named(url, path):
    """They are not in the prompt."""
    need_exact(url)
    for tools, functions in (([PATCH, SEARCH], []), ([PATCH, ADD, SEARCH, PATCH], [ADD])):
        for padding in ("", "x" * 100_000):
            status, headers, body = asked(url, path, 8, tools=tools, padding=padding)
            assert status == 200 and headers["X-Ignored-Tools"] == "custom, web_search_20990101", body
            assert answer(body)["content"] == answer(asked(url, path, 8, tools=functions)[2])["content"]
    assert "X-Ignored-Tools" not in asked(url, path, 8, tools=[ADD])[1]
    body = {"messages": [HI], "tools": [PATCH, ADD]}
    assert call(url, "/apply-template", body)[2] == call(url, "/apply-template", body | {"tools": [ADD]})[2]


def test_a_choice_of_a_custom_tool_is_none(url):
    """A required call is one of a function."""
    for choice in ({"type": "custom", "custom": {"name": "patch"}}, {"type": "web_search"}):
        body = {"messages": [HI], "tools": [PATCH, ADD], "tool_choice": choice}
        assert read_answer(CHAT, body, KNOWN).request == read_answer(
            CHAT, {"messages": [HI], "tools": [ADD]}, KNOWN).request
    status, headers, body = asked(url, tools=[PATCH, ADD], tool_choice="required")
    assert (answer(body)["tool_calls"][0]["function"]["name"] == "add"
            and headers["X-Ignored-Tools"] == "custom")
    status, _, body = asked(url, tools=[PATCH], tool_choice="required")
    assert status == 400 and "no tools" in body["error"]["message"]
    status, _, body = asked(url, tools=[PATCH],
                            tool_choice={"type": "function", "function": {"name": "patch"}})
    assert status == 400 and "not in tools" in body["error"]["message"]


def test_allowed_tools_may_name_custom_ones():
    """They may in both of OpenAI's APIs."""
    allowed = [{"type": "custom", "name": "patch", "custom": {"name": "patch"}},
               {"type": "mcp", "server_label": "x"}]
    for path, tools, wrap, function in (
            (CHAT, [PATCH, ADD], lambda tools: {"allowed_tools": {"mode": "auto", "tools": tools}},
             {"type": "function", "function": {"name": "add"}}),
            (RESPONSES, [{"type": "custom", "name": "patch"}, {"type": "function", **ADD["function"]}],
             lambda tools: {"mode": "auto", "tools": tools},
             {"type": "function", "name": "add"})):
        body = ({"input": "Hi"} if path == RESPONSES else {"messages": [HI]}) | {"tools": tools}
        names = [read_answer(path, body | {"tool_choice": {"type": "allowed_tools", **wrap(chosen)}},
                             KNOWN).request.params.tool_names
                 for chosen in ([*allowed, function], allowed)]
        assert names == [("add",), ()]


@pytest.mark.parametrize("tool, named", [
    ({"type": "function"}, "tools[1]"), ({"type": "function", "name": "add", "parameters": {}}, "tools[1]"),
    ({"type": "function", "function": {}}, "tools[1]"),
    ({"type": "function", "function": {"name": "x", "parameters": 5}}, "tools[1]"), ({}, "tools"),
    ({"type": 5}, "tools"), ("x", "tools"), ({"type": None}, "tools")])
def test_a_broken_function_is_no_other_tool(tool, named):
    for path in (CHAT, OLLAMA):
        with pytest.raises(RequestError) as caught:
            read_answer(path, {"messages": [HI], "tools": [PATCH, tool]}, KNOWN)
        assert caught.value.status == 400 and caught.value.param == named


def test_earlier_custom_calls_are_skipped_and_named(url):
    """Their results are skipped with them."""
    need_exact(url)
    custom = {"id": "c1", "type": "custom", "custom": {"name": "patch", "input": "*** Begin"}}
    function = {"id": "f1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    results = [{"role": "tool", "tool_call_id": name, "content": name} for name in ("c1", "f1")]
    history = [HI, {"role": "assistant", "content": "Hm.", "tool_calls": [custom, function]}, *results, HI]
    without = [HI, {"role": "assistant", "content": "Hm.", "tool_calls": [function]}, results[1], HI]
    _, headers, wanted = asked(url, messages=without, tools=[ADD])
    assert "X-Ignored-Tools" not in headers
    for padding in ("", "x" * 100_000):
        status, headers, body = asked(url, messages=history, tools=[ADD], padding=padding)
        assert (status == 200 and headers["X-Ignored-Tools"] == "custom"
                and answer(body)["content"] == answer(wanted)["content"])
        assert body["usage"]["prompt_tokens"] == wanted["usage"]["prompt_tokens"]
    alone = [HI, {"role": "assistant", "content": None, "tool_calls": [custom]}, results[0], HI]
    assert asked(url, messages=alone)[0] == 200
    for call_ in ({"type": "custom"}, {"type": "strange", "id": "x"}, 5):
        status, _, body = asked(url, messages=[HI, {"role": "assistant", "tool_calls": [call_]}, HI])
        assert status == (200 if call_ == {"type": "custom"} else 400), body


def test_many_custom_tools_take_no_longer():
    """A body of 64 KB is read on the event loop: nothing compares each call with each other."""
    calls = [{"type": "custom", "id": str(number)} for number in range(200_000)]
    messages = [HI, {"role": "assistant", "tool_calls": calls},
                *({"role": "tool", "tool_call_id": str(number), "content": "x"} for number in range(1000)),
                HI]
    assert len(read_answer(CHAT, {"messages": messages}, KNOWN).request.messages) == 3
