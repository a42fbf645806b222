"""Requests to OpenAI's routes of a real server, that succeed or must fail."""

import json
import urllib.error
import urllib.request

import pytest

# what the default model's template adds itself, and the server in its place does not
TEMPLATE_SYSTEM = {"role": "system", "content": "You are a helpful AI assistant named SmolLM, trained by Hugging Face"}
HI = [{"role": "user", "content": "What is the capital of Japan?"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def call(url, path, body=None, method=None):
    """(status, headers, body as JSON or text) of one request."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"}, method=method)
    try:
        response = urllib.request.urlopen(request, timeout=120)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        text = response.read().decode()
        return response.status, response.headers, json.loads(text) if "json" in response.headers["Content-Type"] else text


def ask(url, path=CHAT, **changes):
    """The JSON answer to a short greedy request with `changes`, which must succeed."""
    base = {"temperature": 0, "max_tokens": 12} | ({"messages": HI} if path == CHAT else {"prompt": "The capital of Japan is"})
    status, _, body = call(url, path, base | changes)
    assert status == 200, body
    return body


def refused(url, path=CHAT, **changes):
    """(status, error) of a request that must fail."""
    base = {"max_tokens": 4} | ({"messages": HI} if path == CHAT else {"prompt": "Hi"})
    status, _, body = call(url, path, base | changes)
    assert status >= 400 and set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}, body
    return status, body["error"]


def need_exact(url):
    """For tests of answers that are equal only where logits are."""
    if not call(url, "/stats")[2]["row_invariant"]:
        pytest.skip("the reference ops are not row-invariant")
