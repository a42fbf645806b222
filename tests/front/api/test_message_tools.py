"""Messages with tools that the server runs, on the default model in a real server: exact, counted, continued, large."""

import pytest

from openai_routes import call, need_exact

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
SERVERS = {"mcp_servers": [{"type": "url", "name": "fake"}],
           "tools": [{"type": "mcp_toolset", "mcp_server_name": "fake", "default_config": {"enabled": False}, "configs": {"pick": {"enabled": True}}}]}
DRAWN = {"max_tokens": 60, "temperature": 0, "seed": 5}
HI = [{"role": "user", "content": "Pick a colour."}]


@pytest.fixture
def url(tools_server):
    return tools_server.url


def asked(url, messages=HI, choice="any", **more):
    status, _, answer = call(url, MESSAGES, {"messages": messages, "tool_choice": {"type": choice}, **SERVERS, **DRAWN, **more})
    assert status == 200, answer
    return answer


def counted(url, messages, **more):
    status, _, answer = call(url, COUNT, {"messages": messages, **SERVERS, **more})
    assert status == 200, answer
    return answer["input_tokens"]


def prompted(answer):
    return answer["usage"]["input_tokens"] + answer["usage"]["cache_read_input_tokens"]


def test_an_answer_goes_on_as_it_would_have(url):
    """What a paused answer sends back has the tokens that the next round would have had."""
    need_exact(url)
    whole = asked(url)
    use, result, said = whole["content"]
    assert (use["type"], use["name"], use["server_name"], said["type"]) == ("mcp_tool_use", "pick", "fake", "text")
    assert result["content"][0]["text"] == f"picked {use['input']['word']}" and result["tool_use_id"] == use["id"]
    paused = [*HI, {"role": "assistant", "content": [use, result]}]
    rest = asked(url, paused, "auto")
    assert rest["content"][0]["text"] == said["text"] and rest["stop_reason"] == whole["stop_reason"]
    assert prompted(rest) == counted(url, paused) and prompted(whole) == counted(url, HI) + prompted(rest)
    assert counted(url, HI) > counted(url, HI, mcp_servers=[], tools=[])


def test_large_bodies_and_many_tools_are_read_in_a_sandbox(url):
    large = [*HI, {"role": "user", "content": [{"type": "text", "text": ""}] * 3000}]
    answer = asked(url, large)
    assert [block["type"] for block in answer["content"][:2]] == ["mcp_tool_use", "mcp_tool_result"]
    later = [*large, {"role": "assistant", "content": answer["content"][:2]}]
    assert counted(url, large) + counted(url, later) == prompted(answer)
    many = {"mcp_servers": [{"type": "url", "name": "many"}], "tools": []}
    assert counted(url, HI, **many, tool_choice={"type": "none"}) == counted(url, HI, mcp_servers=[], tools=[])
    status, _, error = call(url, COUNT, {"messages": HI, **many})
    assert status == 400 and "prompt is too long" in error["error"]["message"]
    status, _, error = call(url, COUNT, {"messages": large, **SERVERS, "mcp_servers": [{"type": "url", "name": "fake", "url": "https://elsewhere.example"}]})
    assert status == 400 and "mcp_servers[0].url" in error["error"]["message"]
