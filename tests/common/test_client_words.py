"""What clients do about an error follows from its text: the patterns here are theirs, as they were in November 2026."""

import re

import pytest

from chatlm.common import client_words
from chatlm.common.client_words import ANTHROPIC, OLLAMA, no_such_model, overloaded, quota_used, rate_limited, too_large, too_long
from chatlm.common.errors import RequestError
from chatlm.front.api.errors import anthropic_error, openai_error

CLAUDE_CODE = re.compile(r"prompt is too long[^0-9]*(\d+)\s*tokens?\s*>\s*(\d+)", re.IGNORECASE)
CODEX = re.compile(r"(?i)try again in\s*(\d+(?:\.\d+)?)\s*(s|ms|seconds?)")
OVERFLOW = {    # of OpenAI's routes: each of these clients has a pattern that must match
    "LiteLLM": ["exceed context limit", "this model's maximum context length is", "model's maximum context limit",
                "is longer than the model's context length", "input tokens exceed the configured limit"],
    "OpenHands": ["prompt is too long", "please reduce the length of", "exceeds the available context size", "context length exceeded"],
    "pi": [r"prompt is too long", r"exceeds the context window", r"reduce the length of the messages", r"maximum context length is \d+ tokens",
           r"context[_ ]length[_ ]exceeded", r"too many tokens"],
    "Cline": [r"context\s*(length|window)", r"input tokens exceed", r"too many tokens", r"maximum context"],
    "Roo Code": [r"\bcontext\s*(?:length|window)\b", r"maximum\s*(?:context\s*)?(?:length|tokens)", r"too\s*many\s*tokens"],
    "LangChain": ["context_length_exceeded"], "others": [r"max.*?(\d+) tokens.*?(\d+) "]}
OVERFLOW_OF_MESSAGES = {
    "LiteLLM": ["prompt is too long", "prompt: length"], "LangChain": ["prompt is too long"], "OpenHands": OVERFLOW["OpenHands"], "pi": OVERFLOW["pi"],
    "Roo Code": [r"prompt is too long", r"maximum.*tokens", r"exceeds.*context", r"token.*limit"]}


def matches(patterns, text):
    return [name for name, of_client in patterns.items() if not any(re.search(pattern, text, re.IGNORECASE) for pattern in of_client)] == []


@pytest.mark.parametrize("bound", ["", "more than ", "at least "])
@pytest.mark.parametrize("tokens, longest, limit", [(9031, 8192, 8192), (8192, 8192, 8191), (1_000_000, 512, 512)])
def test_clients_see_by_how_much_a_prompt_is_too_long(tokens, longest, limit, bound):
    error = too_long(tokens, longest, "messages", "messages", bound)
    assert matches(OVERFLOW, str(openai_error(error))) and str(error).startswith(f"This model's maximum context length is {longest} tokens. ")
    text = anthropic_error(error)["error"]["message"]
    assert CLAUDE_CODE.search(text).groups() == (str(tokens), str(limit)) and matches(OVERFLOW_OF_MESSAGES, text)
    assert (text == f"prompt is too long: {tokens} tokens > {limit} maximum") == (bound == "")
    assert f"{tokens} tokens" in error.said_to(OLLAMA) and "the input length exceeds the context length" in error.said_to(OLLAMA)


def test_a_conversation_too_large_to_count_is_too_long():
    error = client_words.too_large_to_count("what was said before is too large: at most 9 bytes are allowed", "messages")
    texts = {name: patterns for name, patterns in OVERFLOW.items() if name != "others"}      # which look for numbers of tokens
    assert matches(texts, str(openai_error(error))) and matches(OVERFLOW_OF_MESSAGES, error.said_to(ANTHROPIC))


def test_clients_see_how_long_to_wait():
    error = rate_limited("9 requests are already waiting (--max-queue)", 5)
    assert CODEX.search(str(error)).groups() == ("5", "s") and error.code == "rate_limit_exceeded" and (error.status, error.retry_after_s) == (429, 5)
    assert re.search(r"rate[\s_\-]*limit", str(error), re.IGNORECASE) and anthropic_error(error)["error"]["type"] == "rate_limit_error"
    used = quota_used("this API key has used its 9 tokens", 7200)
    assert "exceeded your current quota" in str(used) and used.code == "insufficient_quota" and used.status == 429


def test_clients_see_that_there_is_no_room():
    error = overloaded("too many large bodies are being read", 10)
    assert "overloaded" in str(error) and "Overloaded" in error.said_to(ANTHROPIC) and (error.status, error.retry_after_s) == (503, 10)
    assert anthropic_error(error)["error"]["type"] == "overloaded_error"


@pytest.mark.parametrize("name", ["gpt-4o", 'x"y', "x" * 5000, "", "a\nb", "\ud800"])
def test_clients_see_that_there_is_no_such_model(name):
    error = no_such_model(name, "does not exist", 'this server has "a"')
    assert error.code == "model_not_found" and re.match(r"The model `.*` does not exist; ", str(error)) and len(str(error)) < 200
    assert re.search(r"model '(.*)' not found", error.said_to(OLLAMA)) and error.said_to(ANTHROPIC).startswith("model: ")


def test_clients_see_that_a_key_is_missing_or_wrong():
    for error in (client_words.key_needed(), client_words.key_unknown()):
        assert "Incorrect API key provided" in str(error) and error.status == 401 and error.code == "invalid_api_key"
        assert "x-api-key" in error.said_to(ANTHROPIC) and error.said_to(OLLAMA).startswith("unauthorized")


def test_a_body_that_is_too_large_is_no_rate_limit():
    error = too_large(16 << 20)
    text = str(error)
    assert re.search(r"request.*exceeds.*maximum.*size", text, re.IGNORECASE) and "request entity too large" in text.lower()
    assert "Request too large" not in text and not re.search(r"rate[\s_\-]*limit|\b429\b", text, re.IGNORECASE)
    assert anthropic_error(error)["error"]["type"] == "request_too_large"


def test_other_errors_say_the_same_to_all():
    error = RequestError("temperature must be a finite number from 0 to 2, not 9")
    assert {error.said_to(api) for api in (ANTHROPIC, OLLAMA, "openai")} == {str(error)}
