"""The system prompt that the server adds for the default model, where a conversation sends none."""

import json
import os

import pytest

import forked
from chatlm.common.config import Settings
from chatlm.terminal.evaluate import open_scorer
from chatlm.worker.weights.rules import DEFAULT_SYSTEM
from openai_routes import call
from real_server import SCRIPT

QUESTION = "What is the capital of France?"
ASK = [{"role": "user", "content": QUESTION}]
EXPLICIT = [{"role": "system", "content": DEFAULT_SYSTEM}, *ASK]


@pytest.fixture
def url(short_url):
    return short_url


def chat(url, messages):
    body = call(url, "/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 20})[2]
    return body["choices"][0]["message"]["content"], body["usage"]["prompt_tokens"]


def responses(url, messages):
    body = call(url, "/v1/responses", {"model": "default", "input": messages, "temperature": 0, "max_output_tokens": 20})[2]
    return body["output"][0]["content"][0]["text"], body["usage"]["input_tokens"]


def anthropic(url, messages):
    body = call(url, "/v1/messages", {"model": "default", "messages": messages, "temperature": 0, "max_tokens": 20})[2]
    usage = body["usage"]
    return body["content"][0]["text"], usage["input_tokens"] + usage["cache_read_input_tokens"]


def ollama(url, messages):
    body = call(url, "/api/chat", {"model": "default", "messages": messages, "stream": False,
                                   "options": {"temperature": 0, "num_predict": 20}})[2]
    return body["message"]["content"], body["prompt_eval_count"]


def native(url, messages):
    text = call(url, "/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 20})[2]
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    return "".join(event.get("token", "") for event in events), events[-1]["usage"]["prompt_tokens"]


@pytest.mark.parametrize("ask", [chat, responses, anthropic, ollama, native])
def test_every_api_adds_it(url, ask):
    """The first question that everybody asks is answered rightly, with the prompt that was chosen for it."""
    text, count = ask(url, ASK)
    assert text == "The capital of France is Paris."
    assert count == chat(url, EXPLICIT)[1]


def test_commands_add_it(url, tmp_path):
    text, count = chat(url, ASK)
    environment = dict(os.environ)
    generated = forked.run_command(SCRIPT, ["generate", "--prompt", QUESTION, "--temperature", "0", "-m", "20"], environment)
    assert generated.stdout.strip() == text
    (tmp_path / "in.jsonl").write_text(json.dumps({
        "custom_id": "a", "method": "POST", "url": "/v1/chat/completions",
        "body": {"model": "default", "messages": ASK, "temperature": 0, "max_tokens": 20}}) + "\n")
    forked.run_command(SCRIPT, ["batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")], environment)
    (line,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    body = line["response"]["body"]
    assert body["choices"][0]["message"]["content"] == text and body["usage"]["prompt_tokens"] == count


@pytest.mark.parametrize("remote", [False, True])
async def test_evaluations_add_it(url, default_model_path, remote):
    """The tokens that `eval` scores and continues are those of the conversation with the prompt, through --url too."""
    settings = Settings(url=url) if remote else Settings(model=str(default_model_path))
    async with open_scorer(settings) as (scorer, _):
        ids = await scorer.chat(QUESTION)
        answer = await scorer.answer(ids, 20)
    assert ids == call(url, "/tokenize", {"messages": EXPLICIT})[2]["tokens"]
    assert answer.startswith("The capital of France is Paris.")


def test_what_counts_and_renders_contains_it(url):
    count = chat(url, ASK)[1]
    shown = call(url, "/apply-template", {"messages": ASK})[2]["prompt"]
    assert shown == call(url, "/apply-template", {"messages": EXPLICIT})[2]["prompt"] and DEFAULT_SYSTEM in shown
    assert call(url, "/v1/messages/count_tokens", {"model": "default", "messages": ASK})[2]["input_tokens"] == count


def test_a_client_s_own_system_prompt_stays_alone(url):
    for role in ("system", "developer"):
        shown = call(url, "/apply-template", {"messages": [{"role": role, "content": "Be a pirate."}, *ASK]})[2]["prompt"]
        assert "Be a pirate." in shown and DEFAULT_SYSTEM not in shown
    empty = call(url, "/apply-template", {"messages": [{"role": "system", "content": ""}, *ASK]})[2]["prompt"]
    assert DEFAULT_SYSTEM not in empty and "<|im_start|>system\n<|im_end|>" in empty


def test_raw_prompts_get_none(url):
    tokens = call(url, "/tokenize", {"content": QUESTION})[2]["tokens"]
    completion = call(url, "/v1/completions", {"prompt": QUESTION, "max_tokens": 1})[2]
    assert completion["usage"]["prompt_tokens"] == len(tokens)


def test_the_server_says_what_it_adds(url):
    (model,) = call(url, "/v1/models")[2]["data"]
    assert model["system_prompt"] == DEFAULT_SYSTEM == call(url, "/stats")[2]["system_prompt"]
