"""OpenResponses (specification of 2026-04-24): the requests of its suite over HTTP, whose answers have every required member.

Its suite has 17 tests. Here are those that need no socket, no compaction, no picture and no free call; a call is asked for by tool_choice."""

import json
import re

import pytest

from openai_routes import call

RESPONSES, COUNT = "/v1/responses", "/v1/responses/input_tokens"
NUMBER, TEXT, FLAG, LIST, OBJECT, NOTHING = (int, float), str, bool, list, dict, type(None)
RESPONSE = {  # the members that a response must have, and what each may be
    "id": TEXT, "object": TEXT, "created_at": int, "completed_at": (int, NOTHING), "status": TEXT, "incomplete_details": (OBJECT, NOTHING), "model": TEXT,
    "previous_response_id": (TEXT, NOTHING), "instructions": (TEXT, NOTHING), "output": LIST, "error": (OBJECT, NOTHING), "tools": LIST, "tool_choice": (TEXT, OBJECT),
    "truncation": TEXT, "parallel_tool_calls": FLAG, "text": OBJECT, "top_p": NUMBER, "presence_penalty": NUMBER, "frequency_penalty": NUMBER, "top_logprobs": int,
    "temperature": NUMBER, "reasoning": (OBJECT, NOTHING), "usage": (OBJECT, NOTHING), "max_output_tokens": (int, NOTHING), "max_tool_calls": (int, NOTHING), "store": FLAG,
    "background": FLAG, "service_tier": TEXT, "metadata": OBJECT, "safety_identifier": (TEXT, NOTHING), "prompt_cache_key": (TEXT, NOTHING)}
FUNCTION = {"type": TEXT, "name": TEXT, "description": (TEXT, NOTHING), "parameters": (OBJECT, NOTHING), "strict": (FLAG, NOTHING)}
ITEMS = {
    "message": {"id": TEXT, "status": TEXT, "role": TEXT, "content": LIST}, "reasoning": {"id": TEXT, "summary": LIST},
    "function_call": {"id": TEXT, "call_id": TEXT, "name": TEXT, "arguments": TEXT, "status": TEXT}}
USAGE = {"input_tokens": int, "output_tokens": int, "total_tokens": int, "input_tokens_details": OBJECT, "output_tokens_details": OBJECT}
PLACE = {"item_id": TEXT, "output_index": int}
PART = PLACE | {"content_index": int}
EVENTS = {
    **{f"response.{moment}": {"response": OBJECT} for moment in ("created", "in_progress", "completed", "incomplete", "failed", "queued")},
    **{f"response.output_item.{moment}": {"output_index": int, "item": OBJECT} for moment in ("added", "done")},
    **{f"response.content_part.{moment}": PART | {"part": OBJECT} for moment in ("added", "done")},
    "response.output_text.delta": PART | {"delta": TEXT}, "response.output_text.done": PART | {"text": TEXT},
    "response.function_call_arguments.delta": PLACE | {"delta": TEXT}, "response.function_call_arguments.done": PLACE | {"arguments": TEXT}}
WEATHER = {"type": "function", "name": "get_weather", "description": "Get the current weather for a location", "parameters": {
    "type": "object", "properties": {"location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"}}, "required": ["location"]}}


def check(members, value, where=""):
    for name, kinds in members.items():
        assert name in value, f"{where} has no {name}: {value}"
        assert isinstance(value[name], kinds), f"{where}.{name} is {value[name]!r}"
        assert isinstance(value[name], bool) <= (kinds is FLAG or isinstance(kinds, tuple) and FLAG in kinds), f"{where}.{name}"


def check_response(response):
    check(RESPONSE, response, "response")
    assert response["object"] == "response" and response["service_tier"] == "default"
    check({"effort": (TEXT, NOTHING), "summary": (TEXT, NOTHING)}, response["reasoning"], "reasoning")
    check({"format": OBJECT}, response["text"], "text")
    for tool in response["tools"]:
        check(FUNCTION, tool, "tool")
    for item in response["output"]:
        check(ITEMS[item["type"]], item, item["type"])
        for part in item.get("content", ()):
            check({"text": TEXT, "annotations": LIST, "logprobs": LIST} if part["type"] == "output_text" else {"text": TEXT}, part, "part")
    if response["usage"]:
        check(USAGE, response["usage"], "usage")
        assert isinstance(response["usage"]["input_tokens_details"]["cached_tokens"], int) and isinstance(response["usage"]["output_tokens_details"]["reasoning_tokens"], int)
    return response


def user(text):
    return {"type": "message", "role": "user", "content": text}


def assistant(text, **more):
    return {"type": "message", "role": "assistant", "content": text, **more}


SUITE = {
    "basic-response": [user("Say hello in exactly 3 words.")], "streaming-response": [user("Count from 1 to 5.")],
    "system-prompt": [{"type": "message", "role": "system", "content": "You are a pirate. Always respond in pirate speak."}, user("Say hello.")],
    "multi-turn": [user("My name is Alice."), assistant("Hello Alice! Nice to meet you. How can I help you today?"), user("What is my name?")],
    "assistant-phase": [assistant("I should answer with the saved number.", phase="commentary"), assistant("The number is four.", phase="final_answer"), user("Repeat only the number.")]}


@pytest.fixture(scope="module")
def url(default_url):
    return default_url


def asked(url, input, **more):
    status, _, response = call(url, RESPONSES, {"input": input, "temperature": 0, "max_output_tokens": 64, **more})
    assert status == 200, response
    return response


def streamed(url, input, **more):
    status, _, text = call(url, RESPONSES, {"input": input, "temperature": 0, "max_output_tokens": 64, "stream": True, **more})
    assert status == 200, text
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


@pytest.mark.parametrize("name", SUITE)
def test_a_request_of_the_suite_gets_a_whole_response(url, name):
    response = check_response(asked(url, SUITE[name]))
    assert response["output"] and (response["completed_at"] is None) == (response["status"] == "incomplete")
    if response["status"] == "completed":
        assert response["created_at"] <= response["completed_at"] <= response["created_at"] + 600
    for event in (sent := streamed(url, SUITE[name])):
        check({"sequence_number": int, **EVENTS[event["type"]]}, event, event["type"])
        if "response" in event:
            assert (check_response(event["response"])["completed_at"] is None) == (event["type"] != "response.completed")
    assert [event["sequence_number"] for event in sent] == list(range(len(sent)))


@pytest.mark.parametrize("name", [*SUITE][:2])
def test_it_ends_by_itself(url, name):
    assert asked(url, SUITE[name], max_output_tokens=200)["status"] == "completed"


def test_a_call_has_its_members(url):
    """And the tools come back with the members that were not sent."""
    tools = [WEATHER, {"type": "function", "name": "bare"}, {"type": "web_search"}]
    choice = {"type": "function", "name": "get_weather"}
    response = asked(url, [user("What's the weather like in San Francisco?")], tools=tools[:2], tool_choice=choice)
    [item] = check_response(response)["output"]
    assert item["type"] == "function_call" and re.fullmatch(r"\{.*\}", item["arguments"])
    assert response["tools"] == [WEATHER | {"strict": None}, {"type": "function", "name": "bare", "description": None, "parameters": None, "strict": None}]
    assert asked(url, "Hi", tools=[*tools, WEATHER | {"strict": True}], tool_choice="none")["tools"][2:] == [{"type": "web_search"}, WEATHER | {"strict": True}]
    kinds = [event["type"] for event in streamed(url, "Hi", tools=[WEATHER], tool_choice=choice)]
    assert {"response.function_call_arguments.delta", "response.function_call_arguments.done"} <= {*kinds}


def test_what_was_sent_comes_back(url):
    sent = {"presence_penalty": 0.5, "frequency_penalty": -0.25, "safety_identifier": "me", "prompt_cache_key": "a key", "metadata": {"a": "b"}}
    response = asked(url, "Hi", **sent, service_tier="flex", reasoning={"effort": "low"}, text={"verbosity": "low"})
    assert {name: response[name] for name in sent} == sent and response["service_tier"] == "default"
    assert response["reasoning"] == {"effort": "low", "summary": None} and response["text"] == {"verbosity": "low", "format": {"type": "text"}}


def test_phases_change_nothing_in_the_prompt(url):
    without = [{name: value for name, value in item.items() if name != "phase"} for item in SUITE["assistant-phase"]]
    assert asked(url, without)["usage"]["input_tokens"] == asked(url, SUITE["assistant-phase"])["usage"]["input_tokens"]


def test_a_prewarmed_prompt_is_in_the_cache(url):
    """Nothing is written, and the request that begins with it finds it."""
    text = "Once upon a time there was a very long prompt that nobody had computed. " * 8
    response = check_response(asked(url, [user(text)], prompt_cache_options={"prewarm": True}))
    assert (response["status"], response["output"], response["usage"]["output_tokens"]) == ("completed", [], 0)
    kinds = [event["type"] for event in streamed(url, [user(text)], prompt_cache_options={"prewarm": True})]
    assert kinds == ["response.created", "response.in_progress", "response.completed"]
    used = asked(url, [user(text), assistant("Yes."), user("Go on.")])["usage"]
    assert used["input_tokens_details"]["cached_tokens"] >= response["usage"]["input_tokens"] - 32
    status, _, error = call(url, RESPONSES, {"input": "Hi", "prompt_cache_options": {"prewarm": "maybe"}})
    assert status == 400 and error["error"]["param"] == "prompt_cache_options.prewarm"


# counting


def counted(url, **body):
    status, _, answer = call(url, COUNT, body)
    assert status == 200 and answer == {"object": "response.input_tokens", "input_tokens": answer["input_tokens"]}, answer
    return answer["input_tokens"]


BODIES = [
    {"input": "Hi"}, {"input": [user("Hi"), assistant("Yes?"), user("Go.")], "instructions": "Be brief."},
    {"input": "Hi", "tools": [WEATHER]}, {"input": "Hi", "tools": [WEATHER], "tool_choice": "none"}, {"input": "Hi", "tools": [WEATHER], "tool_choice": "required"},
    {"input": [{"type": "additional_tools", "role": "developer", "tools": [WEATHER]}, user("Hi")], "tools": [{"type": "tool_search", "execution": "client"}]},
    {"input": "Hi", "reasoning": {"effort": "none"}}, {"input": "x" * 70_000, "truncation": "auto"}, {"input": [user("long " * 3000), assistant("Yes."), user("Go.")], "truncation": "auto"}]


@pytest.mark.parametrize("body", BODIES)
def test_a_count_is_that_of_the_response(url, body):
    status, _, response = call(url, RESPONSES, {**body, "max_output_tokens": 1})
    if status == 200:
        assert counted(url, **body, personality="friendly") == response["usage"]["input_tokens"]
    else:
        assert call(url, COUNT, body)[0] == status and call(url, COUNT, body)[2] == response


def test_nothing_is_required_to_count(url):
    assert counted(url) == counted(url, input="") > 0
    assert counted(url, instructions="Be brief. " * 9) > counted(url)


@pytest.mark.parametrize("body, status, param", [
    ({"input": 5}, 400, "input"), ({"input": [{"type": "strange"}]}, 400, "input[0]"), ({"input": "Hi", "tools": [{"type": "function"}]}, 400, "tools[0]"), ({"model": "other"}, 404, "model"),
    ({"input": "Hi", "tool_choice": "required"}, 400, "tool_choice"), ({"previous_response_id": "resp_1"}, 404, "previous_response_id")])
def test_errors_of_a_count_are_those_of_the_response(url, body, status, param):
    got, _, error = call(url, COUNT, body)
    assert (got, error["error"]["param"]) == (status, param)
    assert call(url, RESPONSES, body)[2] == error


def test_what_is_too_long_is_not_counted(url):
    status, _, error = call(url, COUNT, {"input": "word " * 20_000})
    assert status == 400 and error["error"]["code"] == "context_length_exceeded"
