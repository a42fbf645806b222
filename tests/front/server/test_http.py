"""The HTTP side, over a pool without a model: shapes, limits, streams, and clients that leave."""

import asyncio
import gzip
import json
import logging
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st

import chat_server
from aiohttp import web
from chatlm.common import config, program
from chatlm.common.config import LIMITS, Settings
from chatlm.common.errors import ConfigError, EngineFailure, Overloaded, RequestError
from chatlm.common.messages.protocol import Known
from chatlm.common.messages.requests import Accepted
from chatlm.common.program import page_files
from chatlm.front.api.dialects.openai import OPENAI_FIELDS
from chatlm.front.api.fields import parse_fields
from chatlm.front.api.readers import parse_openai_request
from chatlm.front.api.reading import read_answer
from chatlm.front.pool.catalogue import Catalogue
from chatlm.front.serve import announce, serve_forever
from chatlm.front.server import access
from chatlm.front.server.access import server_urls
from answers import said
from fake_pool import FakePool, conversation, frames, serving
from patching import patch

NATIVE, OPENAI = "/chat/completions", "/v1/chat/completions"


async def ask(client, url, body, **options):
    """(status, body) of a POST; a dict goes as JSON, bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with client.post(url, data=data, **options) as response:
        return response.status, await response.read()


# the native API


@pytest.mark.parametrize("path", [NATIVE, OPENAI])
async def test_stream_headers_keep_proxies_from_buffering(client, path):
    async with serving(FakePool()) as url:
        async with client.post(url + path, json=conversation() | {"stream": True}) as response:
            assert response.status == 200
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            assert response.headers["Cache-Control"] == "no-cache, no-transform"
            assert response.headers["X-Accel-Buffering"] == "no"
            assert "Content-Encoding" not in response.headers


async def test_the_native_stream_has_pieces_then_done(client):
    async with serving(FakePool(["Mach", "", "ine"])) as url:
        events = frames((await ask(client, url + NATIVE, conversation()))[1])
    assert events[:2] == [{"token": "Mach", "gpu": 0}, {"token": "ine", "gpu": 0}]
    assert events[2].pop("seed") >= 0
    assert events[2:] == [
        {
            "done": True,
            "finish_reason": "stop",
            "stop_reason": "eos",
            "gpu": 0,
            "usage": {"prompt_tokens": 7, "completion_tokens": 3, "cached_tokens": 3, "reasoning_tokens": 0},
            "timings": {
                "queue_ms": 0.2,
                "ttft_ms": 8.1,
                "tokens_per_second": 212.3,
                "drafted_tokens": 0,
                "accepted_tokens": 0,
            },
        }
    ]


async def test_every_line_reader_sees_one_line(client):
    """Text passes unharmed."""
    pieces = ["日本", "🎉", "a\u2028b\u2029c\x85d", 'quote " \\ \n\r\n data: x']
    async with serving(FakePool(pieces)) as url:
        status, body = await ask(client, url + NATIVE, conversation())
    assert [event["token"] for event in frames(body)[:-1]] == pieces
    assert all(
        line.startswith(("data: ", "")) and (not line or line.startswith("data: "))
        for line in body.decode().splitlines()
    )


async def test_headers_leave_before_the_first_piece(client):
    pool = FakePool(gate=asyncio.Event())
    async with serving(pool) as url:
        async with client.post(url + NATIVE, json=conversation()) as response:  # the gate is still closed
            assert response.status == 200
            pool.gate.set()
            assert frames(await response.read())[-1]["done"]


async def test_a_request_wins_over_operator_defaults(client):
    pool = FakePool()
    async with serving(pool, Settings(temperature=0.3, top_k=7, max_tokens=99)) as url:
        await ask(client, url + NATIVE, conversation())
        await ask(
            client,
            url + NATIVE,
            conversation() | {
                "temperature": 0,
                "top_k": 0,
                "max_tokens": 5,
                "seed": 11,
                "stop": "\n",
                "top_p": 0.5,
                "min_p": 0.1,
                "ignore_eos": True,
            },
        )
    first, second = pool.requests
    assert (
        first.params.sampling.temperature,
        first.params.sampling.top_k,
        first.max_tokens,
        first.params.stop,
    ) == (0.3, 7, 99, ())
    assert (second.params.sampling.temperature, second.params.sampling.top_k, second.max_tokens) == (
        0.0,
        0,
        5,
    )
    assert (second.params.sampling.seed, second.params.stop, second.params.ignore_eos) == (11, ("\n",), True)
    assert (second.params.sampling.top_p, second.params.sampling.min_p) == (0.5, 0.1)


async def test_null_and_unknown_fields_are_ignored(client):
    """Null means that a field is unset."""
    pool = FakePool()
    async with serving(pool) as url:
        nulls = dict.fromkeys(
            ["temperature", "max_tokens", "top_k", "top_p", "min_p", "seed", "stop", "ignore_eos"]
        )
        status, _ = await ask(client, url + NATIVE, conversation() | nulls | {"nonsense": {"a": [1]}})
    assert status == 200
    assert (pool.requests[0].params.sampling.temperature, pool.requests[0].max_tokens) == (0.8, 512)


async def test_requests_without_a_seed_differ(client):
    pool = FakePool()
    async with serving(pool) as url:
        for _ in range(2):
            await ask(client, url + NATIVE, conversation())
    seeds = [request.params.sampling.seed for request in pool.requests]
    assert seeds[0] != seeds[1] and max(seeds) < 2**53


@pytest.mark.parametrize(
    "field, given, used",
    [
        ("temperature", -1, 0),
        ("temperature", 99, 2),
        ("temperature", 10**300, 2),
        ("top_k", -5, 0),
        ("top_k", 1e9, 200),
        ("top_p", 7, 1),
        ("min_p", -0.5, 0),
    ],
)
async def test_finite_numbers_out_of_range_are_clamped(client, field, given, used):
    pool = FakePool()
    async with serving(pool) as url:
        status, _ = await ask(client, url + NATIVE, conversation() | {field: given})
    assert (status, getattr(pool.requests[0].params.sampling, field)) == (200, used)


@pytest.mark.parametrize("given, used", [(0, 1), (-3, 1), (10**30, 4096), (12.0, 12)])
async def test_max_tokens_is_clamped_to_1_to_4096(client, given, used):
    pool = FakePool()
    async with serving(pool) as url:
        status, _ = await ask(client, url + NATIVE, conversation() | {"max_tokens": given})
    assert (status, pool.requests[0].max_tokens) == (200, used)


@pytest.mark.parametrize("path", [NATIVE, OPENAI])
@pytest.mark.parametrize(
    "field, literal",
    [
        ("temperature", '"0.5"'),
        ("temperature", "true"),
        ("temperature", "NaN"),
        ("temperature", "1e999"),
        ("temperature", "-Infinity"),
        ("temperature", "[1]"),
        ("max_tokens", "1.5"),
        ("max_tokens", "NaN"),
        ("max_tokens", "false"),
        ("top_k", "Infinity"),
        ("top_k", "{}"),
        ("seed", '"x"'),
        ("seed", "0.5"),
        ("stop", "5"),
        ("stop", '["a", null]'),
        ("stop", json.dumps(["a"] * 257)),
        ("stop", json.dumps(["a" * 4000, "b" * 97])),
        ("ignore_eos", "1"),
        ("messages", '"hi"'),
        ("messages", "{}"),
        ("messages", "[]"),
        ("messages", "null"),
        ("messages", "[5]"),
        ("messages", '[{"role": "alien", "content": "x"}]'),
        ("messages", '[{"role": ["user"], "content": "x"}]'),
        ("messages", '[{"role": "user", "content": 5}]'),
        ("messages", '[{"content": "x"}]'),
    ],
)
async def test_wrong_types_and_values_are_400_and_named(client, path, field, literal):
    body = json.dumps(conversation())[:-1] + f', "{field}": {literal}}}'
    pool = FakePool()
    async with serving(pool) as url:
        status, answer = await ask(client, url + path, body.encode())
    answer = json.loads(answer)
    message = answer["detail"] if path == NATIVE else answer["error"]["message"]
    assert status == 400 and field in message and not pool.requests
    if literal in ("NaN", "true", "1.5", '"0.5"', "5"):
        assert literal in message


@pytest.mark.parametrize(
    "messages, numbers",
    [
        ([{"role": "user", "content": "a"}] * 501, ("501", "500")),
        ([{"role": "user", "content": "a" * 8001}], ("8001", "8000")),
        (
            [{"role": "user", "content": "a" * 8000}] * 4 + [{"role": "user", "content": "b"}],
            ("32001", "32000"),
        ),
    ],
)
async def test_native_limits_name_limit_and_value(client, messages, numbers):
    async with serving(FakePool()) as url:
        status, answer = await ask(client, url + NATIVE, {"messages": messages})
    assert status == 400
    assert list(json.loads(answer)) == ["detail"] and all(
        number in json.loads(answer)["detail"] for number in numbers
    )


@pytest.mark.parametrize(
    "messages", [[{"role": "user", "content": "a"}] * 500, [{"role": "user", "content": "😀" * 8000}] * 4]
)
async def test_the_native_limits_themselves_are_allowed(client, messages):
    pool = FakePool()
    pool.context_length = 1 << 20
    async with serving(pool) as url:
        assert (await ask(client, url + NATIVE, {"messages": messages}))[0] == 200


@pytest.mark.parametrize("path", [NATIVE, OPENAI])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe{}",
        b"no json",
        b"[]",
        b'"text"',
        b"null",
        b"5",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"{" + b"1" * 5000 + b"}",
        b'{"seed": ' + b"1" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "\\ud800',
        b"\x00\x01\x02",
        b"{} {}",
    ],
)
async def test_bytes_that_are_no_request_are_400(client, path, body):
    async with serving(FakePool()) as url:
        status, answer = await ask(client, url + path, body)
    assert status == 400
    assert json.loads(answer).get("detail") or json.loads(answer)["error"]["type"] == "invalid_request_error"


async def test_odd_but_usable_bodies_are_accepted(client):
    pool = FakePool()
    odd = (
        b'\xef\xbb\xbf{"messages": [], "messages": [{"role": "user", "content": "\\ud83d\\ude00 \\ud800!"}]}'
    )
    async with serving(pool) as url:
        assert (await ask(client, url + NATIVE, odd, headers={"Content-Type": "application/x-strange"}))[
            0
        ] == 200
        assert (
            await ask(client, url + OPENAI, odd, headers={"Content-Type": "text/plain; charset=latin-1"})
        )[0] == 200
    assert {request.messages[0].content for request in pool.requests} == {"😀 \ufffd!"}


@pytest.mark.parametrize("path", [NATIVE, OPENAI])
async def test_a_body_above_the_limit_is_413(client, path, monkeypatch):
    patch(monkeypatch, config, "LIMITS", replace(LIMITS, body_bytes=1000))

    async def pieces():
        for _ in range(40):
            yield b" " * 100

    async with serving(FakePool()) as url:
        status, answer = await ask(client, url + path, conversation("a" * 2000))
        async with client.post(url + path, data=pieces()) as response:  # chunked: no length is announced
            assert response.status == 413
    assert status == 413 and "1000" in json.loads(answer)["error"]["message"]


@hypothesis_settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    body=st.dictionaries(
        st.sampled_from([field.name for field in OPENAI_FIELDS] + ["x"]),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats()
            | st.text(st.characters(codec=None), max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["role", "content", "type", "text", "1", "include_usage"]),
                    inner,
                    max_size=3,
                )
            ),
            max_leaves=8,
        ),
    )
)
def test_no_json_object_breaks_the_parsers(body):
    for with_messages in (body, body | conversation()):
        raw = json.loads(json.dumps(with_messages))
        try:
            read_answer("/chat/completions", raw, Known(Settings(), "tagged"))
        except RequestError as error:
            assert error.status == 400 and str(error)
        try:
            values = parse_fields(raw, OPENAI_FIELDS)
            parse_openai_request(values, Settings(), "tagged")
        except RequestError as error:
            assert error.status == 400 and str(error)


# the OpenAI API


async def test_the_stream_has_exactly_openai_s_shape(client):
    async with serving(FakePool(["Hel", "", "lo"])) as url:
        status, body = await ask(client, url + OPENAI, conversation() | {"stream": True, "seed": 5})
    events = frames(body)
    assert events.pop() == "[DONE]"
    assert [event["choices"][0]["delta"] for event in events] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {},
    ]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, None, "stop"]
    assert events[-1]["choices"][0]["stop_reason"] == "eos" and events[-1]["timings"]["ttft_ms"] == 8.1
    heads = [
        {key: event[key] for key in ("id", "object", "created", "model", "system_fingerprint", "seed")}
        for event in events
    ]
    assert all(head == heads[0] for head in heads) and heads[0]["object"] == "chat.completion.chunk"
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", heads[0]["id"]) and heads[0]["seed"] == 5
    assert not any("usage" in event for event in events)


async def test_the_usage_chunk_comes_only_on_request(client):
    async with serving(FakePool()) as url:
        _, asked = await ask(
            client,
            url + OPENAI,
            conversation() | {"stream": "true", "stream_options": {"include_usage": True}},
        )
        _, refused = await ask(
            client,
            url + OPENAI,
            conversation() | {"stream": True, "stream_options": {"include_usage": False}},
        )
    *chunks, last, done = frames(asked)
    assert all(chunk["usage"] is None for chunk in chunks) and done == "[DONE]"
    assert last["choices"] == [] and last["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }
    assert b"usage" not in refused


async def test_the_whole_completion_has_openai_s_shape(client):
    async with serving(FakePool(reason="length", stop_reason="max_tokens")) as url:
        status, body = await ask(client, url + OPENAI, conversation() | {"seed": -1})
    body = json.loads(body)
    assert status == 200 and body["object"] == "chat.completion" and body["model"] == "fake-model"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello, world!", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": "max_tokens",
        }
    ]
    assert body["usage"]["total_tokens"] == 10 and body["usage"]["prompt_tokens_details"] == {
        "cached_tokens": 3
    }
    assert body["seed"] == 2**64 - 1 and isinstance(body["created"], int)


async def test_content_may_be_text_null_or_text_parts(client):
    """The role developer is system."""
    pool = FakePool()
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": "Hi", "name": None},
        {"role": "assistant", "content": None, "tool_calls": None},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": []},
    ]
    async with serving(pool) as url:
        assert (await ask(client, url + OPENAI, {"messages": messages}))[0] == 200
    assert [(m.role, m.content) for m in pool.requests[0].messages] == [
        ("system", "Be\nbrief"),
        ("user", "Hi"),
        ("assistant", ""),
        ("assistant", ""),
        ("user", ""),
    ]


@pytest.mark.parametrize(
    "body, code",
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools_not_supported"),
        ({"tool_choice": "required"}, "tools_not_supported"),
        ({"functions": [{"name": "f"}]}, "tools_not_supported"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "tools_not_supported"),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            "tools_not_supported",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "unsupported_content",
        ),
        ({"response_format": {"type": "xml"}}, "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "invalid_json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nope"}}}},
            "invalid_json_schema",
        ),
        ({"n": 0}, "invalid_value"),
        ({"n": 129}, "invalid_value"),
        ({"top_logprobs": 2}, "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value"),
        ({"logprobs": 5}, "invalid_value"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"$ref": "#"}},
                }
            },
            "invalid_json_schema",
        ),
        ({"temperature": 2.1}, "invalid_value"),
        ({"top_p": -0.1}, "invalid_value"),
        ({"max_tokens": 0}, "invalid_value"),
        ({"max_tokens": -2}, "invalid_value"),
        ({"presence_penalty": 3}, "invalid_value"),
        ({"logit_bias": {"x": 1}}, "invalid_value"),
        ({"logit_bias": {"1": 101}}, "invalid_value"),
        ({"stop_token_ids": [-1]}, "invalid_value"),
        ({"seed": 2**64}, "invalid_value"),
        ({"stop": ["x" * 4097]}, "invalid_value"),
        ({"stop": ["x" * 4000, "y" * 97]}, "invalid_value"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "invalid_value"),
        ({"stop_token_ids": [1] * 1001}, "invalid_value"),
        ({"logit_bias": {str(token): 1 for token in range(2**18 + 1)}}, "invalid_value"),
    ],
)
async def test_an_unsupported_parameter_is_400_and_named(client, body, code):
    """A parameter that is out of range is refused alike; the error has a code."""
    for stream in (False, True):  # before the first byte, so that a stream has a status too
        async with serving(FakePool()) as url:
            status, answer = await ask(client, url + OPENAI, conversation() | {"stream": stream} | body)
        error = json.loads(answer)["error"]
        assert (status, error["code"], error["type"]) == (400, code, "invalid_request_error")
        assert error["message"] and set(error) == {"message", "type", "param", "code"}
        assert re.split(r"[.\[]", error["param"])[0] in body


NAMES = [field.name for field in OPENAI_FIELDS if field.name != "messages"]


@pytest.mark.parametrize(
    "body",
    [
        dict.fromkeys([*NAMES, "functions", "metadata"]),
        {"stream": "True"},
        {"stream": "true"},
        {
            "store": True,
            "service_tier": "auto",
            "reasoning_effort": "low",
            "prediction": None,
            "extra": {"a": [1]},
            "top_a": 0.5,
        },
        {"tools": []},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
        {"tool_choice": "auto"},
        {"n": 1},
        {"response_format": {"type": "text"}},
        {"logprobs": False, "top_logprobs": 0},
        {"top_k": -1},
        {"user": "me", "store": True},
        {"parallel_tool_calls": True, "metadata": {}},
        {"stream_options": None},
        {"logit_bias": {}},
        {"stop": []},
        {"stop": ["", "x"]},
    ],
)
async def test_harmless_parameters_are_accepted(client, body):
    async with serving(FakePool()) as url:
        assert (await ask(client, url + OPENAI, conversation() | body))[0] == 200


@pytest.mark.parametrize(
    "settings, body, cap",
    [
        (Settings(), {}, None),
        (Settings(max_tokens=40), {}, 40),
        (Settings(max_tokens=40), {"max_tokens": -1}, None),
        (Settings(), {"max_tokens": 9}, 9),
        (Settings(), {"max_tokens": 9, "max_completion_tokens": 5}, 5),
        (Settings(), {"max_completion_tokens": 10**9}, 10**9),
        (Settings(max_tokens=40), {"max_tokens": None}, 40),
    ],
)
async def test_an_uncapped_answer_goes_up_to_the_context(client, settings, body, cap):
    pool = FakePool()
    async with serving(pool, settings) as url:
        assert (await ask(client, url + OPENAI, conversation() | body))[0] == 200
    assert pool.requests[0].max_tokens == cap


async def test_openai_parameters_reach_the_sampler(client):
    pool = FakePool()
    wanted = {
        "temperature": 1.5,
        "top_p": 0.25,
        "top_k": -1,
        "min_p": 0.5,
        "seed": 3,
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "repetition_penalty": 1.25,
    }
    body = wanted | {
        "logit_bias": {"7": -100, "8": 5, "9": None},
        "stop": ["a", "b"],
        "stop_token_ids": [4],
        "min_tokens": 2,
    }
    async with serving(pool, Settings(top_k=9)) as url:
        assert (await ask(client, url + OPENAI, conversation() | body))[0] == 200
    request = pool.requests[0]
    assert {name: getattr(request.params.sampling, name) for name in wanted} == wanted | {"top_k": 0}
    assert request.params.sampling.logit_bias == ((7, -100.0), (8, 5.0))
    assert (request.params.stop, request.params.stop_token_ids, request.params.min_tokens) == (
        ("a", "b"),
        (4,),
        2,
    )


async def test_the_openai_api_has_no_text_limits(client):
    async with serving(FakePool()) as url:
        assert (await ask(client, url + OPENAI, {"messages": [{"role": "user", "content": "a" * 70}] * 600}))[
            0
        ] == 200


@pytest.mark.parametrize(
    "name, status",
    [
        (None, 200),
        ("", 200),
        ("default", 200),
        ("owner/fake-model", 200),
        ("fake-model", 200),
        ("other", 200),
        ("a/alias", 200),
        ("alias", 200),
        ("gpt-4", 404),
    ],
)
async def test_the_model_is_known_by_its_names_only(client, name, status):
    pool = FakePool()
    pool.model_name = "owner/fake-model"
    async with serving(pool, Settings(served_model_name=("other", "a/alias"))) as url:
        got, body = await ask(client, url + OPENAI, conversation() | {"model": name})
    assert got == status
    if status == 404:
        assert json.loads(body)["error"]["code"] == "model_not_found"


async def test_models_lists_one_real_id(client):
    """Both paths show it."""
    async with serving(FakePool()) as url:
        lists = [await (await client.get(url + path)).json() for path in ("/v1/models", "/models")]
        one = await (await client.get(url + "/v1/models/fake-model")).json()
        missing = await client.get(url + "/v1/models/nothing/there")
    assert lists[0] == lists[1] == {"object": "list", "data": [one]}
    assert one["id"] == "fake-model" and one["context_length"] == 4096 and isinstance(one["created"], int)
    assert missing.status == 404


# errors


@pytest.mark.parametrize("path", [NATIVE, OPENAI])
@pytest.mark.parametrize(
    "error, status, code",
    [
        (
            RequestError("the prompt has 9 tokens, the context 8", code="context_length_exceeded"),
            400,
            "context_length_exceeded",
        ),
        (Overloaded("queue full", retry_after_s=7), 503, "overloaded"),
        (Overloaded("slow down", status=429), 429, "rate_limit_exceeded"),
        (EngineFailure("a worker died"), 500, "engine_failure"),
        (ZeroDivisionError("secret"), 500, "engine_failure"),
    ],
)
async def test_a_refusal_of_the_pool_is_a_real_status(client, path, error, status, code):
    """Streams have it too."""
    async with serving(FakePool(refuse=error)) as url:
        async with client.post(url + path, json=conversation() | {"stream": True}) as response:
            body = await response.json()
            assert response.status == status and response.content_type == "application/json"
            assert response.headers.get("Retry-After") == {"queue full": "7", "slow down": "1"}.get(
                str(error)
            )
    assert body["error"]["code"] == code and "secret" not in json.dumps(body)
    assert path == OPENAI or body["detail"] == body["error"]["message"]


@pytest.mark.parametrize("path", [NATIVE, OPENAI])
@pytest.mark.parametrize(
    "error", [EngineFailure("a worker died"), ZeroDivisionError("secret"), ConnectionResetError("pipe")]
)
async def test_a_late_error_is_one_frame_and_the_end(client, path, error):
    """It comes after the first byte."""
    async with serving(FakePool(["Hel", error])) as url:
        status, body = await ask(client, url + path, conversation() | {"stream": True})
    assert status == 200 and set(frames(body)[-1]) == {"error"} and b"secret" not in body
    assert frames(body)[-1]["error"]["type"] == "server_error"
    assert b'"done"' not in body and b"[DONE]" not in body and b'finish_reason": "' not in body


@pytest.mark.parametrize("path", [NATIVE, OPENAI])
async def test_an_answer_without_an_end_is_an_error(client, path):
    class Forgetful(FakePool):
        async def answer(self, request):
            yield Accepted(7)
            yield said("Hel", tokens=(1,))

    async with serving(Forgetful()) as url:
        _, body = await ask(client, url + path, conversation() | {"stream": True})
        assert frames(body)[-1]["error"]["message"] == "the answer ended early"
        assert path == NATIVE or (await ask(client, url + path, conversation()))[0] == 500


async def test_an_error_of_a_whole_completion_is_a_status(client):
    async with serving(FakePool(["Hel", EngineFailure("a worker died")])) as url:
        assert (await ask(client, url + OPENAI, conversation()))[0] == 500


async def test_404_and_405_have_the_shape_of_their_api(client):
    async with serving(FakePool()) as url:
        native, openai = await client.get(url + "/nothing"), await client.get(url + "/v1/nothing")
        wrong, wrong_openai = await client.get(url + NATIVE), await client.get(url + OPENAI)
        assert (native.status, openai.status, wrong.status, wrong_openai.status) == (404, 404, 405, 405)
        assert "/nothing" in (await native.json())["detail"] and wrong.headers["Allow"] == "POST"
        assert (await openai.json())["error"]["code"] == "not_found"
        assert (await wrong_openai.json())["error"]["type"] == "invalid_request_error"


async def test_a_browser_s_404_is_a_page_with_a_link(client):
    """The link leads to the chat."""
    browser = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    async with serving(FakePool(), Settings(prefix="/chat")) as url:
        missing = await client.get(url + "/a<b>/c", headers=browser)
        text = await missing.text()
        assert (missing.status, missing.content_type) == (
            404,
            "text/html",
        ) and "default-src" in missing.headers["Content-Security-Policy"]
        assert "There is no /a&lt;b&gt;/c here." in text and '<a href="/chat/">Open the chat</a>' in text
        assert (
            await client.get(url + "/nothing", headers={"Accept": "*/*"})
        ).content_type == "application/json"
        assert (await client.post(url + "/nothing", headers=browser)).content_type == "application/json"


# well-behaved streams


async def test_a_silent_stream_carries_pings(client, monkeypatch):
    patch(monkeypatch, config, "PING_S", 0.01)
    pool = FakePool(["one"], gate=asyncio.Event())
    async with serving(pool) as url:
        async with client.post(url + NATIVE, json=conversation()) as response:
            begin = await response.content.readexactly(len(b": ping\n\n") * 2)
            pool.gate.set()
            rest = await response.read()
    assert begin == b": ping\n\n" * 2
    assert frames(rest)[-1]["done"] and frames(rest)[0]["token"] == "one"


@pytest.mark.parametrize("path, stream", [(NATIVE, True), (OPENAI, True), (OPENAI, False)])
async def test_a_client_that_leaves_ends_its_work(path, stream):
    pool = FakePool(gate=asyncio.Event())
    async with serving(pool) as url:
        async with aiohttp.ClientSession() as leaving:
            task = asyncio.ensure_future(ask(leaving, url + path, conversation() | {"stream": stream}))
            await pool.until_open(1)
            task.cancel()
        await pool.until_open(0)  # the gate never opened
    assert len(pool.requests) == 1


async def test_a_client_that_leaves_midstream_ends_its_work():
    pool = FakePool(["x"] * 1000)
    pool.gate = asyncio.Event()
    async with serving(pool) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        body = json.dumps(conversation()).encode()
        writer.write(
            b"POST /chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.abort()
        await pool.until_open(0)


async def test_a_client_gone_before_headers_logs_no_error(client, caplog, monkeypatch):
    """A client that leaves just before the headers is no error in the log."""

    class Leaving(web.StreamResponse):
        async def prepare(self, http):
            http.transport.abort()
            return await super().prepare(http)

    class Quick(FakePool):
        # never waits, so the handler finds the closed connection before it is cancelled
        async def answer(self, request):
            yield Accepted(7)

    async with serving(Quick()) as url:
        monkeypatch.setattr(web, "StreamResponse", Leaving)
        with pytest.raises(aiohttp.ClientError):
            await ask(client, url + NATIVE, conversation())
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_reader_that_does_not_read_is_dropped(client, monkeypatch):
    """It does not slow others."""
    patch(monkeypatch, config, "LIMITS", replace(LIMITS, outbox_bytes=1 << 16))
    pool = FakePool(["x" * 10_000] * 5_000)  # 50 MB: more than any socket buffer
    async with serving(pool) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]), limit=1 << 16)
        body = json.dumps(conversation()).encode()
        writer.write(
            b"POST /chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        await pool.until_open(1)
        await pool.until_open(0)
        pool.pieces = ["fine"]
        assert (await ask(client, url + NATIVE, conversation()))[0] == 200
        writer.transport.abort()


@pytest.mark.parametrize("path", [NATIVE, OPENAI])
async def test_an_answer_is_cancelled_by_its_header_s_id(client, path):
    pool = FakePool(gate=asyncio.Event())
    async with serving(pool) as url:
        async with client.post(
            url + path, json=conversation() | {"stream": True}, headers={"X-Request-Id": "my id/1"}
        ) as response:
            assert response.headers["X-Request-Id"] == "myid1"
            cancel = await client.post(
                url + "/v1/cancel/" + ("chatcmpl-myid1" if path == OPENAI else "myid1")
            )
            assert (cancel.status, await cancel.json()) == (200, {"id": "myid1", "cancelled": True})
            assert frames(await response.read())[-1]["error"]["code"] == "cancelled"
        assert (await client.post(url + "/v1/cancel/myid1")).status == 404


@pytest.mark.parametrize(
    "path, body, answers",
    [
        ("/v1/compare", conversation() | {"variants": [{}, {"seed": 1}, {"seed": 2}]}, 3),
        (OPENAI, conversation() | {"n": 3, "stream": True}, 1),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2, "stream": True}, 1),
    ],
)
async def test_one_id_cancels_all_answers_of_a_request(client, path, body, answers):
    """It is the id of the response's header."""
    pool = FakePool(gate=asyncio.Event())
    async with serving(pool) as url:
        async with client.post(url + path, json=body) as response:
            request_id = response.headers["X-Request-Id"]
            await pool.until_open(answers)
            ended = await client.post(f"{url}/v1/cancel/{request_id}?reasoning=true")
            assert ended.status == 200 and len(pool.hurried) == answers
            cancelled = await client.post(f"{url}/v1/cancel/{request_id}")
            assert (cancelled.status, await cancelled.json()) == (200, {"id": request_id, "cancelled": True})
            last = frames(await response.read())[-1]
            assert {end["error"]["code"] for end in last.get("answers", [last])} == {"cancelled"}
        await pool.until_open(0)
        assert (await client.post(f"{url}/v1/cancel/{request_id}")).status == 404


async def test_one_answer_of_a_comparison_is_cancelled(client):
    """A client that leaves cancels all of them."""
    pool = FakePool(gate=asyncio.Event())
    body = conversation() | {"variants": [{}, {"seed": 1}]}
    async with serving(pool) as url:
        async with client.post(url + "/v1/compare", json=body, headers={"X-Request-Id": "mine"}) as response:
            for wrong in "mine-2", "mine-", "mine-" + "9" * 5000, "mine-01":
                assert (await client.post(f"{url}/v1/cancel/{wrong}")).status == 404
            assert (await client.post(f"{url}/v1/cancel/mine-1")).status == 200
            await pool.until_open(1)
            again = await client.post(
                url + "/v1/compare", json=body, headers={"X-Request-Id": "mine"}
            )  # its id is taken
            assert again.status == 200 and again.headers["X-Request-Id"] != "mine"
            again.close()
            await pool.until_open(1)
            pool.gate.set()
            first, second = frames(await response.read())[-1]["answers"]
            assert first["finish_reason"] == "stop" and second["error"]["code"] == "cancelled"
        pool.gate.clear()
        async with client.post(url + "/v1/compare", json=body) as response:
            await pool.until_open(2)
        await pool.until_open(0)


async def test_a_comparison_tells_no_more_of_a_fault(client):
    """Other routes tell clients as little."""
    async with serving(FakePool(["a ", KeyError("inside")])) as url:
        async with client.post(
            url + "/v1/compare", json=conversation() | {"variants": [{}, {"seed": 1}]}
        ) as response:
            text = await response.text()
        assert response.status == 200 and "KeyError" not in text and "inside" not in text
        assert {end["error"]["message"] for end in frames(text.encode())[-1]["answers"]} == {
            "The server had an error processing your request. Its log has the details"
        }


async def test_an_answer_stops_thinking_and_goes_on(client):
    pool = FakePool(gate=asyncio.Event())
    async with serving(pool) as url:
        now = url + "/v1/cancel/mine?reasoning="
        async with client.post(
            url + OPENAI, json=conversation() | {"stream": True}, headers={"X-Request-Id": "mine"}
        ) as response:
            ended = await client.post(now + "true")
            assert (ended.status, await ended.json()) == (200, {"id": "mine", "cancelled": "reasoning"})
            pool.thinking = False
            late = await client.post(now + "true")
            assert (late.status, (await late.json())["error"]["code"]) == (409, "not_thinking")
            wrong = await client.post(now + "1")
            assert (wrong.status, (await wrong.json())["error"]["param"]) == (
                400,
                "reasoning",
            ) and "true or false" in (await wrong.json())["error"]["message"]
            pool.gate.set()
            assert frames(await response.read())[-1] == "[DONE]"  # nothing of this has stopped it
        assert (await client.post(now + "true")).status == 404 and pool.hurried == ["mine", "mine"]


async def test_a_request_id_in_use_is_not_shared(client):
    pool = FakePool(gate=asyncio.Event())
    async with serving(pool) as url:
        async with (
            client.post(url + NATIVE, json=conversation(), headers={"X-Request-Id": "twice"}) as first,
            client.post(url + NATIVE, json=conversation(), headers={"X-Request-Id": "twice"}) as second,
        ):
            assert first.headers["X-Request-Id"] == "twice"
            assert re.fullmatch("[0-9a-f]{32}", second.headers["X-Request-Id"])


async def test_an_http2_upgrade_is_answered_over_http1():
    async with serving(FakePool(["hi"])) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        body = json.dumps(conversation()).encode()
        writer.write(
            b"POST /chat/completions HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings,"
            b" close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\nContent-Length: %d\r\n\r\n"
            % len(body)
            + body
        )
        answer = await asyncio.wait_for(reader.read(), 20)
        writer.close()
    assert answer.startswith(b"HTTP/1.1 200") and b'"done": true' in answer


async def test_an_http_1_0_stream_ends_its_connection():
    """The connection ends even if it was to be kept."""
    async with serving(FakePool(["hi"])) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        body = json.dumps(conversation()).encode()
        writer.write(
            b"POST /chat/completions HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: %d\r\n\r\n"
            % len(body)
            + body
        )
        head, _, answer = (await asyncio.wait_for(reader.read(), 20)).partition(b"\r\n\r\n")
        writer.close()
    assert b" 200 " in head and b"chunked" not in head.lower() and frames(answer)[-1]["done"]


async def test_a_connection_is_kept_after_a_stream(client):
    async with serving(FakePool(["hi"])) as url:
        ports = set()
        for _ in range(2):
            async with client.post(url + NATIVE, json=conversation()) as response:
                ports.add(response.connection.transport.get_extra_info("sockname"))
                await response.read()
    assert len(ports) == 1


# health, page, log


async def test_health_while_loading_is_503(client):
    """It says the stage."""
    pool = FakePool()
    pool.ready = False
    async with serving(pool) as url:
        health, ready, alive = [await client.get(url + path) for path in ("/health", "/readyz", "/livez")]
        assert (health.status, ready.status, alive.status) == (503, 503, 200)
        assert (await health.json())["loading"] == {"stage": "loading weights", "fraction": 0.5}
        assert await ready.json() == {"ready": False, "reason": "loading"}
        assert (await client.get(url + "/v1/models")).status == 503
        for name, said in (("fake-model", (503, "overloaded")), ("whatever", (404, "model_not_found"))):
            status, body = await ask(client, url + OPENAI, conversation() | {"model": name})
            assert (status, json.loads(body)["error"]["code"]) == said
        pool.ready = True
        assert ((await client.get(url + "/health")).status, (await client.get(url + "/readyz")).status) == (
            200,
            200,
        )
        assert (await (await client.get(url + "/stats")).json())["model"] == "fake-model"


async def test_scripts_and_styles_come_compressed():
    """They do so for those who take it."""
    import aiohttp

    async with serving(FakePool()) as url, aiohttp.ClientSession(auto_decompress=False) as client:
        whole = page_files()["chat.js"]
        for accepted, encoding in (("gzip, br", "gzip"), ("br", None), ("gzip;q=0", None), ("", None)):
            answer = await client.get(url + "/static/chat.js", headers={"Accept-Encoding": accepted})
            body = await answer.read()
            assert (
                answer.headers.get("Content-Encoding") == encoding
                and answer.headers["Vary"] == "Accept-Encoding"
            )
            assert (
                gzip.decompress(body) if encoding else body
            ) == whole and "javascript" in answer.content_type
            again = await client.get(
                url + "/static/chat.js",
                headers={"Accept-Encoding": accepted, "If-None-Match": answer.headers["ETag"]},
            )
            assert again.status == 304 and again.headers["ETag"] == answer.headers["ETag"]


async def test_the_page_has_a_base_and_a_strict_policy(client, tmp_path, monkeypatch):
    """Its files are fresh."""
    (tmp_path / "static").mkdir()
    (tmp_path / "static/index.html").write_text("<html><head></head></html>")
    (tmp_path / "static/chat.js").write_text("let a;")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "static/link").symlink_to(tmp_path / "secret")
    patch(monkeypatch, program, "program_root", lambda: tmp_path)
    async with serving(FakePool()) as url:
        page, script = await client.get(url + "/"), await client.get(url + "/static/chat.js")
        assert '<head>\n<base href="static/">' in await page.text() and page.content_type == "text/html"
        policy = page.headers["Content-Security-Policy"]
        assert (
            "default-src 'self'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        )
        assert page.headers["X-Content-Type-Options"] == "nosniff"
        assert "javascript" in script.content_type and script.headers["Cache-Control"] == "no-cache"
        for ranges in (
            "bytes=-0",
            "bytes=6-",
            "bytes=4-4",
            "lines=1",
        ):  # RFC 9110, 14.2: a server may ignore them
            part = await client.get(url + "/static/chat.js", headers={"Range": ranges})
            assert (part.status, await part.text()) == (200, "let a;"), ranges
        again = await client.get(url + "/static/chat.js", headers={"If-None-Match": script.headers["ETag"]})
        assert again.status == 304
        port = int(url.rsplit(":", 1)[1])
        for path in (
            "/static/../secret",
            "/static/%2e%2e/secret",
            "/static/..%2fsecret",
            "/static/link",
            "/static//etc/passwd",
            "/static/",
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            answer = await reader.read()
            assert (
                re.match(rb"HTTP/1.1 40[34] ", answer) and b"secret\n" not in answer.split(b"\r\n\r\n", 1)[1]
            ), path
            writer.close()


async def test_without_a_page_the_root_says_so(client, tmp_path, monkeypatch):
    patch(monkeypatch, program, "program_root", lambda: tmp_path)
    async with serving(FakePool()) as url:
        response = await client.get(url + "/")
        assert response.status == 200 and "static/" in await response.text()


async def test_the_log_has_a_line_per_request_and_no_text(client, caplog):
    with caplog.at_level(logging.INFO, logger="chat_server"):
        async with serving(FakePool()) as url:
            await ask(client, url + NATIVE, conversation("my secret question"))
            await client.get(url + "/no\n/such")
    lines = [record.getMessage() for record in caplog.records if record.name == "chat_server"]
    assert len(lines) == 2 and not any("secret" in line or "Hello" in line or "\n" in line for line in lines)
    assert re.match(r"POST /chat/completions 200 \d+ ms 7\+3 tokens stop", lines[0]) and " 404 " in lines[1]


async def test_an_operator_can_have_texts_logged(client, caplog):
    with caplog.at_level(logging.INFO, logger="chat_server"):
        async with serving(FakePool(), Settings(log_conversations=True)) as url:
            await ask(client, url + NATIVE, conversation("my question"))
    assert '["user", "my question"], ["assistant", "Hello, world!"]' in caplog.text


# start and stop


class Server:
    """`serve_forever` as a task, on a free port, with its output."""

    def __init__(self, pool, capsys, **settings):
        self.pool, self.capsys, self.text = pool, capsys, ""
        self.task = asyncio.ensure_future(
            serve_forever(
                Settings(host="127.0.0.1", port=0, **settings), Catalogue(Settings(**settings), pool)
            )
        )

    async def printed(self, pattern):
        """Wait until `pattern` has been printed; returns the match."""
        while not (found := re.search(pattern, self.text)):
            assert not self.task.done(), self.task
            await asyncio.sleep(0)
            captured = self.capsys.readouterr()
            self.text += captured.out + captured.err
        return found


async def test_the_server_listens_while_it_loads(client, capsys, monkeypatch):
    """It says when it is ready."""
    listeners, listen_on = [], access.listen_on
    patch(monkeypatch, access, "listen_on", lambda *at: listeners.append(listen_on(*at)) or listeners[-1])
    pool = FakePool()
    pool.loading = asyncio.Event()
    server = Server(pool, capsys)
    while not listeners:
        await asyncio.sleep(0)
    url = "http://127.0.0.1:%d" % listeners[0].getsockname()[1]
    async with client.get(url + "/health") as response:
        assert response.status == 503
    pool.loading.set()
    printed = await server.printed(
        r"(?s)Model: fake-model\nApplication startup complete\n  (http://127.0.0.1:\d+)\n"
    )
    assert printed[1] == url
    signal.raise_signal(signal.SIGTERM)
    assert await server.task == 0 and pool.closed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_lets_running_answers_finish(client, capsys, number):
    """New ones are refused."""
    pool = FakePool(["one"], gate=asyncio.Event())
    server = Server(pool, capsys)
    url = (await server.printed(r"  (http://\S+)\n"))[1]
    async with client.post(url + NATIVE, json=conversation()) as running:
        signal.raise_signal(number)
        await server.printed("second signal")
        status, body = await ask(client, url + NATIVE, conversation())
        assert status == 503
        pool.gate.set()
        assert frames(await running.read())[-1]["done"]
    assert await server.task == 0 and pool.closed


async def test_a_second_signal_stops_now(client, capsys):
    pool = FakePool(gate=asyncio.Event())
    server = Server(pool, capsys)
    url = (await server.printed(r"  (http://\S+)\n"))[1]
    async with client.post(url + NATIVE, json=conversation()):
        signal.raise_signal(signal.SIGINT)
        await server.printed("second signal")
        signal.raise_signal(signal.SIGINT)
        assert await server.task == 0  # the gate never opened
    assert pool.open == 0


async def test_a_failed_start_closes_the_pool(capsys):
    pool = FakePool()
    pool.failure = ConfigError("no such model")
    with pytest.raises(ConfigError, match="no such model"):
        await Server(pool, capsys).task
    assert pool.closed


async def test_a_warning_comes_only_with_a_reachable_port(capsys):
    """The network is warned about only when it can reach the port."""
    announce(FakePool(), Settings(host="0.0.0.0"), 8000)
    announce(FakePool(), Settings(host="127.0.0.1"), 8001)
    open_, closed = capsys.readouterr().out.split("8001")[0].split("Model:")[1:]
    assert "http://127.0.0.1:8000" in open_ and "Warning: anyone" in open_ and "Warning" not in closed


def test_a_busy_port_is_one_line_and_status_2():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = subprocess.run(
            [sys.executable, chat_server.__file__, "--host", "127.0.0.1", "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert run.returncode == 2 and run.stdout == ""
    assert re.fullmatch(rf"chat_server: port {port} on 127.0.0.1 is already in use; .*--port.*\n", run.stderr)


@pytest.mark.parametrize(
    "host, words",
    [
        ("no.such.host.invalid", "cannot listen on no.such.host.invalid"),
        ("192.0.2.77", "cannot listen on 192.0.2.77"),
        ("\u00e4" * 70 + ".x", "cannot listen on"),
        ("a..b", "cannot listen on a..b"),
    ],
)
def test_an_address_not_to_be_had_is_a_config_error(host, words):
    with pytest.raises(ConfigError, match=words):
        access.listen_on(host, 0)


def test_an_ipv6_address_is_printed_in_brackets():
    """The server listens on it."""
    if (
        not socket.has_ipv6
        or not Path("/proc/net/if_inet6").exists()
        or not Path("/proc/net/if_inet6").read_text()
    ):
        pytest.skip("this machine has no IPv6")
    with access.listen_on("::1", 0) as listener:
        assert listener.family == socket.AF_INET6
    assert server_urls("::1", 80) == ["http://[::1]:80"]


def test_the_front_needs_neither_torch_nor_numpy():
    code = f"""
import asyncio, sys
sys.path[:0] = [{str(Path(chat_server.__file__).parent)!r}, {str(Path(__file__).parents[2] / "support")!r}]
import chat_server, fake_pool, aiohttp
async def use():
    async with fake_pool.serving(fake_pool.FakePool()) as url, aiohttp.ClientSession() as client:
        for path in ("/chat/completions", "/v1/chat/completions"):
            async with client.post(url + path, json=fake_pool.conversation()) as response:
                assert response.status == 200, await response.text()
asyncio.run(use())
print([name for name in ("torch", "numpy") if name in sys.modules])
"""
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout
        == "[]\n"
    )
