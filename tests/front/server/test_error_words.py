"""A real server says its errors in the words of each API's clients."""

import http.client
import json
import re
import urllib.parse
import urllib.request
from contextlib import contextmanager

import pytest
from chatlm.common.config import LIMITS
from real_server import server
from tiny_gguf import LLAMA_NUMBERS, random_llama, small_gguf_metadata, write_gguf

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
KEY = "the-key"
CONTEXT = LLAMA_NUMBERS["llama.context_length"]
OPENAI = {
    "/v1/chat/completions": lambda text: {"messages": [{"role": "user", "content": text}]}, "/v1/completions": lambda text: {"prompt": text},
    "/v1/responses": lambda text: {"input": text}, "/chat/completions": lambda text: {"messages": [{"role": "user", "content": text}]}}
MESSAGES = {path: OPENAI["/v1/chat/completions"] for path in ("/v1/messages", "/v1/messages/count_tokens")}
OLLAMA = {"/api/chat": OPENAI["/v1/chat/completions"], "/api/generate": lambda text: {"prompt": text}}
CHATS = OPENAI | MESSAGES | OLLAMA
CLAUDE_CODE = r"^prompt is too long[^0-9]*(\d+)\s*tokens?\s*>\s*(\d+)"
OVERFLOW = re.compile(rf"^This model's maximum context length is {CONTEXT} tokens\. However, your (messages|prompt) resulted in (?:more than )?(\d+) tokens"
                      r".*\. Please reduce the length of the \1\.$")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    metadata = small_gguf_metadata("gpt-2") | {"tokenizer.chat_template": TEMPLATE}
    return write_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", random_llama(), LLAMA_NUMBERS, metadata)


@pytest.fixture(scope="module")
def url(model):
    with server(model, "--api-key", KEY, "--api-key", "another-key", "--max-concurrent-per-key", "1") as (_, url):
        yield url


def refused(url, path, body, key=KEY, headers=()):
    """(status, the error's text, its code) of a request that must be refused."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=60)
    connection.request("POST", path, json.dumps(body).encode(), {"Authorization": f"Bearer {key}"} | dict(headers))
    response = connection.getresponse()
    found = json.loads(response.read())
    connection.close()
    assert response.status >= 400, found
    error = found.get("error", {})
    error = error if isinstance(error, dict) else {"message": error}
    assert path not in MESSAGES or found["type"] == "error"
    return response.status, error.get("message") or found["detail"], error.get("code") or error.get("type")


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize("size", [CONTEXT, CONTEXT + 9, 2000, 100_000, 400_000])
def test_clients_know_the_error_of_a_long_prompt(url, path, size):
    """From one that leaves no room for an answer to bodies that another process reads."""
    if path.endswith("count_tokens") and size < 100_000:
        return      # it is counted
    if path == "/chat/completions":
        size = min(size, LIMITS.message_characters)
    status, said, code = refused(url, path, CHATS[path]("x" * size))
    assert status == 400
    if path in OPENAI:
        found = OVERFLOW.match(said)
        assert found and int(found[2]) >= CONTEXT and code == "context_length_exceeded", said
    elif path in MESSAGES:
        tokens, most = map(int, re.search(CLAUDE_CODE, said).groups())
        assert tokens > most >= CONTEXT - 1 and code == "invalid_request_error"
    else:
        assert said.startswith("the input length exceeds the context length: ")


@pytest.mark.parametrize("path", CHATS)
def test_clients_know_the_error_of_an_unknown_model(url, path):
    status, said, code = refused(url, path, CHATS[path]("hello") | {"model": "gpt-4o"})
    assert status == 404
    if path in OPENAI:
        assert (code, said) == ("model_not_found", 'The model `gpt-4o` does not exist; this server has "tiny"')
    elif path in MESSAGES:
        assert said.startswith("model: gpt-4o does not exist") and code == "not_found_error"
    else:
        assert re.match(r"model '(.*)' not found", said)[1] == "gpt-4o"


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize("key", ["", "wrong"])
def test_clients_know_the_error_of_a_wrong_key(url, path, key):
    """A missing key has it too."""
    status, said, code = refused(url, path, CHATS[path]("hello"), key=key)
    assert status == 401 and ("Incorrect API key provided" in said if path in OPENAI else "x-api-key" in said if path in MESSAGES else "unauthorized" in said)
    assert path in OLLAMA or code == {"/v1/messages": "authentication_error", "/v1/messages/count_tokens": "authentication_error"}.get(path, "invalid_api_key")


@pytest.mark.parametrize("path", CHATS)
def test_clients_know_the_error_of_a_large_body(url, path):
    status, said, code = refused(url, path, {}, headers={"Content-Length": str(17 << 20)})
    assert status == 413 and said == "Request entity too large: the body exceeds the maximum size of 16777216 bytes"
    assert path in OLLAMA or code == ("request_too_large" if path in MESSAGES else "request_entity_too_large")


@contextmanager
def an_endless_answer(url):
    """A stream of the key's that is open."""
    body = OPENAI["/v1/chat/completions"]("hello") | {"stream": True, "ignore_eos": True, "max_tokens": 100}
    request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(body | {"n": 60}).encode(), {"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=60) as response:
        response.readline()
        yield


@pytest.mark.parametrize("path", [path for path in CHATS if not path.endswith("count_tokens")])
def test_clients_know_the_error_of_many_requests(url, path):
    with an_endless_answer(url):
        status, said, code = refused(url, path, CHATS[path]("hello"))
    assert status == 429 and said == ("Rate limit reached: at most 1 of your requests may run at a time (--max-concurrent-per-key). "
                                      "Please try again in 1s.")
    assert path in OLLAMA or code == ("rate_limit_error" if path in MESSAGES else "rate_limit_exceeded")
