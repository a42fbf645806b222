"""No large body, and nothing as large that comes of one, is read or written as JSON in the front's event
loop: sandboxes do that, once for
each model."""

import json
import os
import threading

import pytest

from chatlm.common.config import LIMITS
from chatlm.common.messages.protocol import SANDBOX_PIPE
from chatlm.common.messages.wire import Pipe
from fake_pool import frames, serving
from pools import one_and_two as models     # noqa: F401  a fixture
from spoken_paths import BODY_FIELDS

HI = [{"role": "user", "content": "hello"}]
BODIES = {  # of each route; what makes one large comes to it
    "/chat/completions": {"messages": HI, "max_tokens": 2},
    "/v1/chat/completions": {"messages": HI, "max_tokens": 2},
    "/v1/completions": {"prompt": "hello", "max_tokens": 2},
    "/infill": {"input_prefix": "hello", "input_suffix": "", "n_predict": 2},
    "/v1/embeddings": {"input": "hello"}, "/v1/responses": {"input": "hello", "max_output_tokens": 2},
    "/v1/responses/input_tokens": {"input": "hello"},
    "/v1/messages": {"messages": HI, "max_tokens": 2}, "/v1/messages/count_tokens": {"messages": HI},
    "/api/chat": {"messages": HI, "options": {"num_predict": 2}},
    "/api/generate": {"prompt": "hello", "options": {"num_predict": 2}}, "/api/embed": {"input": "hello"},
    "/api/embeddings": {"prompt": "hello"}, "/embed": {"inputs": "hello"},
    **dict.fromkeys(("/v1/rerank", "/rerank", "/v2/rerank", "/reranking", "/v1/reranking"),
                    {"query": "hello", "documents": ["hello"]}),
    **dict.fromkeys(("/v1/score", "/score"), {"text_1": "hello", "text_2": "hello"}),
    "/api/show": {}, "/tokenize": {"content": "hello"}, "/detokenize": {"tokens": [1, 2]},
    "/apply-template": {"messages": HI},
    "/models/load": {}, "/models/unload": {},
    "/v1/compare": {"messages": HI, "max_tokens": 2, "ignore_eos": True,
                    "variants": [{"model": name} for name in ("one", "two") * 4]}}
BODIES |= {f"/api/v0/{name}": BODIES[f"/v1/{name}"]
           for name in ("chat/completions", "completions", "embeddings")}
# routes of other models
UNABLE = ("/infill", "/v1/rerank", "/rerank", "/v2/rerank", "/reranking", "/v1/reranking", "/v1/score",
          "/score")
MANY = {"query": "hello " * 20_000, "documents": ["hello"] * 20_000, "text_1": "hello " * 20_000,
        "text_2": ["hello"] * 20_000, "inputs": "hello " * 20_000,
        "messages": HI * 30_001, "prompt": "hello " * 20_000, "input": "hello " * 20_000,
        "content": "hello " * 20_000, "tokens": [1] * 40_000}


@pytest.fixture
def parsed_here(monkeypatch):
    """What this process reads or writes as JSON in its event loop that is larger than a body may be: (bytes,
    its beginning)."""
    here, found, loads, packed = os.getpid(), [], json.loads, Pipe.packed

    def note(data):
        is_here = os.getpid() == here and threading.current_thread() is threading.main_thread()
        if is_here and len(data) > LIMITS.inline_bytes:
            found.append((len(data), data[:80]))

    def noted_loads(data, **options):
        note(data)
        return loads(data, **options)

    def noted_packed(pipe, message):
        data = packed(pipe, message)
        note(data if pipe is SANDBOX_PIPE and not hasattr(message, "RAW") else b"")
        return data

    monkeypatch.setattr(json, "loads", noted_loads)
    monkeypatch.setattr(Pipe, "packed", noted_packed)
    return found


def test_each_route_with_a_body_is_tried_here():
    assert set(BODIES) == set(BODY_FIELDS)


async def test_no_large_body_is_parsed_on_the_event_loop(models, client, parsed_here):
    """Every route, with padding that no reader wants, and with much of what it reads."""
    async with serving(models, models.settings) as url:
        for route, body in BODIES.items():
            large = [body | {"model": "two", "padding": ["x"] * 20_000}]
            large += [body | {"model": "two", name: MANY[name]} for name in body if name in MANY]
            for number, asked in enumerate(large):
                data = json.dumps(asked).encode()
                async with client.post(url + route, data=data) as response:
                    text = await response.read()
                    assert (response.status == 200 or (number or route in UNABLE)
                            and response.status == 400), (route, response.status, text[:500])
                    assert len(data) > LIMITS.inline_bytes and not parsed_here, (route, parsed_here)
                    if route != "/v1/compare" or number:
                        continue
                    assert response.headers["X-Ignored-Fields"] == "padding"
                    assert [end["finish_reason"] for end in frames(text)[-1]["answers"]] == ["length"] * 8
