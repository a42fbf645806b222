"""What coding agents send first (tests/fixtures/agents) gets whole answers of a real model."""

import json

import openai
import pytest

from agent_requests import agents, asked, check_whole, requests_of_agents

MOST = 60
pytestmark = pytest.mark.timeout(960)      # prompts of up to 5,000 tokens, whatever else runs


@pytest.mark.parametrize("name, request_", requests_of_agents())
def test_an_agents_request_is_answered(qwen_url, name, request_):
    status, _, answer = asked(qwen_url, request_, MOST)
    assert status == 200, answer
    if request_["body"]:
        check_whole(request_, answer)


def requests_to(path):
    return [pytest.param(each["body"], id=name) for name, _, requests in agents() for each in requests
            if each["path"] == path and each["body"].get("stream")]


@pytest.mark.parametrize("body", requests_to("/v1/chat/completions"))
def test_openais_package_reads_the_stream_of_a_chat(qwen_url, body):
    """Through its accumulator, which takes calls together too."""
    names = {tool["function"]["name"] for tool in body.get("tools", ())}
    client = openai.OpenAI(base_url=qwen_url + "/v1", api_key="none", max_retries=0)
    sent = {name: value for name, value in body.items() if name != "stream"}
    changes = {"max_tokens": MOST, "temperature": 0, "stream_options": {"include_usage": True}}
    with client.chat.completions.stream(**sent | changes) as stream:
        stream.until_done()
        whole = stream.get_final_completion()
    (choice,) = whole.choices
    assert whole.usage.completion_tokens > 0 and choice.finish_reason in ("stop", "tool_calls")
    assert choice.message.content or choice.message.tool_calls
    for made in choice.message.tool_calls or ():
        assert made.function.name in names and isinstance(json.loads(made.function.arguments), dict)


@pytest.mark.parametrize("body", requests_to("/v1/responses"))
def test_openais_package_reads_the_stream_of_a_response(qwen_url, body):
    client = openai.OpenAI(base_url=qwen_url + "/v1", api_key="none", max_retries=0)
    own = {name: value for name, value in body.items() if name not in ("model", "input", "stream")}
    own |= {"max_output_tokens": MOST, "temperature": 0}
    events = [*client.responses.create(model="default", input=body["input"], stream=True, extra_body=own)]
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert events[-1].response.output and events[-1].response.usage.output_tokens > 0
