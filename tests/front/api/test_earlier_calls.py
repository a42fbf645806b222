"""Earlier calls and their results through every API, on a server with the default model and another family's chat template."""

import json
import shutil

import pytest

from nightly import by_day
from real_server import post, server
from sick_models import rewritten

# Calls in pairs of names and values, as Qwen3-Coder's and GLM's template write them; results of calls are lost, as with Hunyuan's
TEMPLATE = """{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}Call with <tool_call><function=name><parameter=name><|im_end|>\n{% endif %}
{%- for m in messages if m.role != 'tool' %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}
<tool_call>\n<function={{ c.function.name }}>\n{% for name, value in c.function.arguments | items %}<parameter={{ name }}>\n{{ value }}\n</parameter>\n{% endfor %}</function>\n</tool_call>
{%- endfor %}{{ '\n<tool_responses>' if m.tool_responses is defined }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"""
WEATHER = {"name": "weather", "description": "Weather of a city", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "why": {"type": "string"}}, "required": ["city", "why"]}}
ARGUMENTS = {"an object": '{"city": "Rome"}', "null": None, "null as text": "null", "nothing": "", "text": "Rome please", "a number": 7, "a list": ["Rome"],
             "cut": '{"city": "Rome', "false": False}


@pytest.fixture(scope="module")
def running(default_model_path, tmp_path_factory):
    """The URL of a server, and its log."""
    path, log = tmp_path_factory.mktemp("model") / "model.gguf", []
    shutil.copy(default_model_path, path)
    rewritten(path, {"tokenizer.chat_template": TEMPLATE})
    with server("serve", path, f"--database={path.parent}/store.db", log=log) as (_, url):
        yield url, log


def chat(arguments):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return "/v1/chat/completions", {"max_tokens": 1, "messages": [
        {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "Rain."}]}


def functions(arguments):
    return "/v1/chat/completions", {"max_tokens": 1, "messages": [
        {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": arguments}},
        {"role": "function", "name": "weather", "content": "Rain."}]}


def responses(arguments):
    return "/v1/responses", {"max_output_tokens": 16, "input": [
        {"role": "user", "content": "Weather?"}, {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": arguments},
        {"type": "function_call_output", "call_id": "c1", "output": "Rain."}]}


def messages(arguments):
    return "/v1/messages", {"max_tokens": 1, "messages": [
        {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "weather", "input": arguments}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "Rain."}]}]}


def ollama(arguments):
    return "/api/chat", {"stream": False, "options": {"num_predict": 1}, "messages": [
        {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": arguments}}]},
        {"role": "tool", "tool_name": "weather", "content": "Rain."}]}


def answered(url, path, body):
    with post(url + path, body) as response:
        return json.load(response)


def prompt_tokens(body):
    usage = body.get("usage", body)
    name = next(name for name in ("prompt_tokens", "input_tokens", "prompt_eval_count") if name in usage)
    return usage[name] + usage.get("cache_read_input_tokens", 0) + usage.get("cache_creation_input_tokens", 0)


@pytest.mark.parametrize("what", by_day([*ARGUMENTS], "an object", "null", "a number", "cut"))
@pytest.mark.parametrize("api", [chat, functions, responses, messages, ollama])
def test_every_api_reads_earlier_arguments_alike(running, api, what):
    url, _ = running
    path, body = chat(ARGUMENTS[what])
    prompt = answered(url, "/apply-template", {"messages": body["messages"]})["prompt"]
    shown = "" if what in ("null", "null as text", "nothing") else "7" if what == "a number" else "false" if what == "false" else "Rome"
    assert prompt.count("Rain.") == 1 and "<tool_response>\nRain.\n</tool_response>" in prompt and shown in prompt.partition("weather")[2]
    assert prompt_tokens(answered(url, *api(ARGUMENTS[what]))) == prompt_tokens(answered(url, path, body))


def test_the_log_names_results_a_template_loses(running):
    assert "".join(running[1]).count("the model's chat template: it loses results of calls, which are shown as messages of the user") == 1


@pytest.mark.parametrize("most", [18, 24, 30, 40])
def test_a_call_cut_by_max_tokens_goes_back(running, most):
    """It is one of the server's own."""
    url, _ = running
    _, body = chat("{}")
    del body["messages"][1:]
    tools = [{"type": "function", "function": WEATHER}]
    said = answered(url, "/v1/chat/completions", body | {"max_tokens": most, "tools": tools, "tool_choice": "required", "temperature": 0})["choices"][0]
    assert said["finish_reason"] == "length"
    calls = said["message"]["tool_calls"]
    with pytest.raises(ValueError):
        json.loads(calls[0]["function"]["arguments"])
    body["messages"] += [said["message"], {"role": "tool", "tool_call_id": calls[0]["id"], "content": "Rain."}]
    assert answered(url, "/v1/chat/completions", body)["choices"] and answered(url, "/v1/chat/completions", body | {"tools": tools})["choices"]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/api/chat"])
def test_other_apis_read_their_cut_calls_back(running, path):
    url, _ = running
    asked = {"role": "user", "content": "Weather?"}
    if path == "/v1/responses":
        tools = {"tools": [{"type": "function", **WEATHER}]}
        first = answered(url, path, {"input": [asked], "max_output_tokens": 24, "tool_choice": "required", "temperature": 0} | tools)
        (call,) = [item for item in first["output"] if item["type"] == "function_call"]
        assert first["status"] == "incomplete" and not call["arguments"].endswith("}")
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "Rain."}
        for more in ({"input": [asked, *first["output"], result]}, {"input": [result], "previous_response_id": first["id"]}):
            assert answered(url, path, more | {"max_output_tokens": 16})["output"] is not None
        return
    if path == "/v1/messages":  # in their APIs arguments are an object
        first = answered(url, path, {"messages": [asked], "max_tokens": 24, "temperature": 0, "tool_choice": {"type": "any"},
                                     "tools": [{"name": "weather", "input_schema": WEATHER["parameters"]}]})
        (call,) = [block for block in first["content"] if block["type"] == "tool_use"]
        results = [{"type": "tool_result", "tool_use_id": call["id"], "content": "Rain."}, {"type": "text", "text": "Go on."}]
        assert answered(url, path, {"max_tokens": 1, "messages": [asked, {"role": "assistant", "content": first["content"]}, {"role": "user", "content": results}]})["content"]
        return
    first = answered(url, path, {"messages": [asked], "stream": False, "options": {"num_predict": 24, "temperature": 0}, "tools": [{"type": "function", "function": WEATHER}]})
    results = [{"role": "tool", "tool_name": "weather", "content": "Rain."}]
    assert answered(url, path, {"messages": [asked, first["message"], *results], "stream": False, "options": {"num_predict": 1}})["message"]


@pytest.mark.parametrize("arguments", ["null", "7", '{"city": "Rome'])
def test_a_continued_response_has_the_same_call(running, arguments):
    """It is in the prompt."""
    url, _ = running
    _, body = responses(json.loads(arguments) if len(arguments) < 5 else arguments)
    whole = prompt_tokens(answered(url, "/v1/responses", body))
    first = answered(url, "/v1/conversations", {"items": body["input"]})
    assert prompt_tokens(answered(url, "/v1/responses", {"input": [], "conversation": first["id"], "max_output_tokens": 16})) == whole
