"""Calls of functions by Qwen2.5-Coder, whose markers are user-defined tokens and which writes loose JSON when it is free."""

import json
import sys

import aiohttp
import openai
import pytest

import fake_tools
from openai_routes import call
from real_server import server

WEATHER = {"name": "get_weather", "description": "Weather of a city", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}}, "required": ["city"]}}
ASK = "What is the weather in {}?"
CITIES = ["Paris", "Rome", "Oslo", "Lima"]


def chat_call(url, city, choice):
    status, _, body = call(url, "/v1/chat/completions", {
        "messages": [{"role": "user", "content": ASK.format(city)}], "temperature": 0, "max_tokens": 100,
        "tools": [{"type": "function", "function": WEATHER}], "tool_choice": choice})
    assert status == 200, body
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "tool_calls" and not choice["message"]["content"], body
    return [(made["function"]["name"], json.loads(made["function"]["arguments"])) for made in choice["message"]["tool_calls"]]


def responses_call(url, city, choice):
    status, _, body = call(url, "/v1/responses", {
        "model": "default", "input": ASK.format(city), "temperature": 0, "max_output_tokens": 100,
        "tools": [{"type": "function", **WEATHER}], "tool_choice": choice})
    assert status == 200, body
    return [(item["name"], json.loads(item["arguments"])) for item in body["output"] if item["type"] == "function_call"]


def messages_call(url, city, choice):
    tool = {"name": WEATHER["name"], "description": WEATHER["description"], "input_schema": WEATHER["parameters"]}
    status, _, body = call(url, "/v1/messages", {
        "model": "default", "messages": [{"role": "user", "content": ASK.format(city)}], "temperature": 0,
        "max_tokens": 100, "tools": [tool], "tool_choice": {"type": "any" if choice == "required" else choice}})
    assert status == 200 and body["stop_reason"] == "tool_use", body
    return [(block["name"], block["input"]) for block in body["content"] if block["type"] == "tool_use"]


def ollama_call(url, city, choice):
    """Ollama's API has no tool_choice."""
    status, _, body = call(url, "/api/chat", {
        "model": "default", "messages": [{"role": "user", "content": ASK.format(city)}], "stream": False,
        "options": {"temperature": 0, "num_predict": 100}, "tools": [{"type": "function", "function": WEATHER}]})
    assert status == 200, body
    return [(made["function"]["name"], made["function"]["arguments"]) for made in body["message"].get("tool_calls", [])]


@pytest.mark.parametrize("ask, choice", [
    (chat_call, "required"), (responses_call, "required"), (messages_call, "required"),
    (chat_call, "auto"), (responses_call, "auto"), (messages_call, "auto"), (ollama_call, "auto")])
def test_every_api_gets_the_call(qwen_url, ask, choice):
    """With drafts, which are on; several times, so that lookups have something to draft."""
    for city in CITIES:
        calls = ask(qwen_url, city, choice)
        assert [name for name, _ in calls] == ["get_weather"]
        assert calls[0][1]["city"].startswith(city)


def test_a_named_call_is_made_with_drafts_and_without(qwen_url, qwen):
    named = {"type": "function", "function": {"name": "get_weather"}}
    drafted = [chat_call(qwen_url, city, named) for city in CITIES * 2]
    with server(qwen, "--no-drafts") as (_, url):
        assert [chat_call(url, city, named) for city in CITIES] == drafted[:4] == drafted[4:]


def test_json_that_was_only_asked_for_stays_text(qwen_url):
    status, _, body = call(qwen_url, "/v1/chat/completions", {
        "messages": [{"role": "user", "content": "Write a JSON object with the keys name and arguments, nothing else."}],
        "temperature": 0, "max_tokens": 80, "tools": [{"type": "function", "function": WEATHER}]})
    message = body["choices"][0]["message"]
    assert status == 200 and "{" in message["content"] and not message.get("tool_calls")


def test_a_stream_shows_no_word_of_a_call_as_text(qwen_url):
    client = openai.OpenAI(base_url=qwen_url + "/v1", api_key="none")
    stream = client.chat.completions.create(
        model="default", stream=True, temperature=0, max_tokens=100,
        messages=[{"role": "user", "content": ASK.format("Paris")}], tools=[{"type": "function", "function": WEATHER}])
    choices = [chunk.choices[0] for chunk in stream if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == ""
    calls = [made for choice in choices for made in choice.delta.tool_calls or ()]
    assert calls[0].function.name == "get_weather" and choices[-1].finish_reason == "tool_calls"
    assert json.loads("".join(made.function.arguments for made in calls))["city"] == "Paris"


async def test_the_server_runs_a_tool_that_the_model_calls(qwen, tmp_path):
    """An MCP tool in a loop of Responses: the call is loose JSON, its result is in the answer."""
    config = tmp_path / "mcp.json"
    command = {"command": sys.executable, "args": [fake_tools.__file__], "alwaysAllow": ["add"]}
    config.write_text(json.dumps({"mcpServers": {"sums": command}}))
    with server(qwen, "--mcp-config", config) as (_, url):
        async with aiohttp.ClientSession() as http:
            body = {"model": "default", "input": "Add 20311 and 4027 with the tool.", "temperature": 0, "max_output_tokens": 120,
                    "tools": [{"type": "mcp", "server_label": "sums", "allowed_tools": ["add"], "require_approval": "never"}]}
            async with http.post(url + "/v1/responses", json=body) as response:
                answer = await response.json()
    made = [item for item in answer["output"] if item["type"] == "mcp_call"]
    assert made and json.loads(made[0]["arguments"]) == {"a": 20311, "b": 4027} and "24338" in made[0]["output"]
