"""The APIs that answer: the same conversation through each is the same request, and what holds for one holds
for all."""

import asyncio
import contextlib
import functools
import http.client
import json
import random
import re
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

import aiohttp
import psutil
import pytest
from hypothesis import HealthCheck, example, given, settings as hypothesis_settings, strategies as st

import odd_bodies
from chatlm import __version__
from chatlm.common import config
from chatlm.common.config import ApiKey, Settings
from chatlm.common.errors import EngineFailure, RequestError
from chatlm.common.messages.protocol import Known, ParsedBody
from chatlm.common.messages.requests import Delta, Message, PromptProgress, Request
from chatlm.common.messages.wire import as_plain_json, restorer
from chatlm.common.text.formats import MARKS, with_markers
from chatlm.common.text.grammar import check_grammar
from chatlm.common.text.history import with_generic_tools
from chatlm.common.text.load import open_tokenizer
from chatlm.common.text.reader import answer_reader
from chatlm.front.admission.prompts import PromptMaker
from chatlm.front.api.fields import json_object
from chatlm.front.api.message_readers import openai_messages
from chatlm.front.api.reading import read_answer
from chatlm.front.front import ROUTES, Front
from chatlm.front.server.describe import OLLAMA_VERSION, bare_id
from chatlm.worker.engine.grammar import Grammar
from annex_bodies import HUB_FIELDS, STORE_FIELDS
from answers import collected, encoded, said, thought
from fake_pool import FakePool, Letters, finished, serving
from openai_routes import TEMPLATE_SYSTEM
import nightly
from nightly import by_day
from patching import patch
from pools import played_pool
from real_server import get
from spoken_paths import ANSWERS, ENCODERS, TEXTS

HI = "What is the capital of Japan?"
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
BODIES = {  # what each API calls a question
    "/chat/completions": {"messages": [{"role": "user", "content": HI}]},
    CHAT: {"messages": [{"role": "user", "content": HI}]},
    "/v1/completions": {"prompt": HI},
    RESPONSES: {"input": HI},
    MESSAGES: {"messages": [{"role": "user", "content": HI}], "max_tokens": 500},
    "/api/chat": {"messages": [{"role": "user", "content": HI}], "stream": False},
    "/api/generate": {"prompt": HI, "stream": False},
}
EMBEDDINGS, OLLAMA_EMBED = "/v1/embeddings", "/api/embed"
WHOLE = {path: {"input": [HI, "Tokyo"]} for path in (EMBEDDINGS, OLLAMA_EMBED)} | {
    "/api/embeddings": {"prompt": HI}
}  # answered, but not streamed
GAPS = {"/infill": {"input_prefix": HI, "input_suffix": "Tokyo"}}  # not for the default model
ASKED = BODIES | GAPS
every_api = pytest.mark.parametrize("path", ASKED)
every_route = pytest.mark.parametrize("path", [*ASKED, *WHOLE])
KNOWN = Known(Settings(), "tagged")


def text_of(event):
    """The text that one event of any API adds."""
    if event.get("choices"):
        choice = event["choices"][0]
        return choice.get("text", choice.get("delta", {}).get("content")) or ""
    if event.get("type") == "response.output_text.delta":
        return event["delta"]
    if event.get("type") == "content_block_delta":
        return event["delta"].get("text", "")
    return (
        event.get("message", {}).get("content", event.get("token", event.get("response", "")))
        if "type" not in event
        else ""
    )


def whole_text(body):
    """The text of an answer that came whole."""
    if "choices" in body:
        return body["choices"][0].get("text", body["choices"][0].get("message", {}).get("content"))
    if "done" in body:
        return text_of(body)
    parts = body["output"][-1]["content"] if "output" in body else body["content"]
    return "".join(part.get("text", "") for part in parts)


def events_of(text):
    """The events of a stream's text; each that names its type does so in its data too."""
    found = [] if not text.startswith("{") else [json.loads(line) for line in text.splitlines()]
    for block in filter(None, text.split("\n\n") if not found else ()):
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        if lines.get("data", "[DONE]") != "[DONE]":
            found.append(json.loads(lines["data"]))
            assert lines.get("event", found[-1].get("type")) == found[-1].get("type")
    return found


async def ask(client, url, path, headers=None, **changes):
    """(status, headers, answer as text) of a request; Ollama has its own names for what `changes`."""
    if path in ("/api/chat", "/api/generate"):
        changes |= {
            "options": {
                "num_predict": changes.get("max_tokens"),
                **{
                    name: changes[name]
                    for name in ("temperature", "seed", "stop", "stop_on_repetition")
                    if name in changes
                },
            }
        }
    async with client.post(url + path, json=(ASKED | WHOLE)[path] | changes, headers=headers) as response:
        return response.status, response.headers, await response.text()


async def streamed(client, url, path, **changes):
    status, _, text = await ask(client, url, path, stream=True, **changes)
    assert status == 200, text
    return events_of(text)


def message_of(error, path):
    """The text of an error in the API's own form."""
    error = json.loads(error)
    if path.startswith("/api/"):
        return error["error"]
    if path == MESSAGES:
        assert error["type"] == "error" and error["request_id"] and set(error["error"]) == {"type", "message"}
    return error["error"]["message"]


# what holds for each


@every_api
async def test_headers_leave_before_text_on_every_route(client, path):
    """A reader that leaves ends the work."""
    pool = FakePool(gate=asyncio.Event())
    async with serving(pool) as url:
        response = await client.post(url + path, json=ASKED[path] | {"stream": True})
        assert response.status == 200 and response.headers["X-Accel-Buffering"] == "no"
        await pool.until_open(1)
        response.close()
        await pool.until_open(0)


@every_api
async def test_the_id_in_its_header_cancels_an_answer(client, path):
    pool = FakePool(gate=asyncio.Event())
    async with serving(pool) as url:
        async with client.post(url + path, json=ASKED[path] | {"stream": True}) as response:
            async with client.post(f"{url}/v1/cancel/{response.headers['X-Request-Id']}") as cancelled:
                assert cancelled.status == 200
            assert "cancelled" in await response.text()
        await pool.until_open(0)


@pytest.mark.parametrize(
    "route",
    [each for each in ROUTES if each.method not in ("GET", "HEAD")],
    ids=lambda route: f"{route.method} {route.path}",
)
async def test_no_route_reads_a_large_body_on_the_loop(client, route, monkeypatch):
    """A route that reads JSON at all reads it with the one reader, which sends large bodies to a sandbox."""
    pool, read, reads = FakePool(), [], route.path in ANSWERS + TEXTS
    sandbox = pool.sandboxes["bodies"]
    sandbox.refusal = RequestError("read elsewhere", status=418)

    async def document_in_sandbox(client, name, boundary, body):
        raise sandbox.refusal

    pool.extract = document_in_sandbox
    decode, payload = json.loads, json.dumps({"model": "default", "x": [1] * 40_000}).encode()
    monkeypatch.setattr(json, "loads", lambda text, **how: read.append(len(text)) or decode(text, **how))
    async with serving(pool) as url:
        for slash in "", "/":
            async with client.request(
                route.method, url + route.path.replace("{id}", "x") + slash, data=payload
            ) as response:
                small = (
                    route.fields and route.path not in STORE_FIELDS
                )  # these are not there without --database
                assert response.status == (
                    418 if reads or route.path == "/extract" else 413 if small else 404
                ), await response.text()
    assert [task[1:3] for task in sandbox.tasks] == [("open", route.path)] * 2 * reads and max(
        read, default=0
    ) < 1000
    assert bool(route.fields) == (
        reads
        or route.method == "POST"
        and route.path in (*HUB_FIELDS, *STORE_FIELDS)
        or route.path in HUB_FIELDS
    )


@pytest.mark.parametrize("size", [1, config.LIMITS.inline_bytes])
@pytest.mark.parametrize("route", ANSWERS + TEXTS)
async def test_no_route_finds_an_unknown_model(client, route, size):
    """An unknown model is not found whatever route a body comes to."""
    async with serving(FakePool()) as url:
        async with client.post(url + route, json={"model": "nope", "x": "x" * size}) as response:
            assert (
                response.status == 404
                and "nope" in await response.text()
                and "fake-model" in await response.text()
            )


def test_every_route_that_answers_is_tested():
    of_rankings = {
        "/v1/rerank",
        "/rerank",
        "/v2/rerank",
        "/reranking",
        "/v1/reranking",
        "/v1/score",
        "/score",
        "/embed",
    }  # test_retrieval_routes.py
    of_lm_studio = {
        "/api/v0/chat/completions",
        "/api/v0/completions",
        "/api/v0/embeddings",
    }  # test_discovery.py
    assert {*ASKED, *WHOLE} | of_rankings | of_lm_studio == {*ANSWERS}


@every_route
async def test_who_leaves_before_a_whole_answer_ends_it(client, path):
    """Who cancels it does too."""
    pool = FakePool(gate=asyncio.Event())
    async with serving(pool) as url:
        leaving = asyncio.create_task(ask(client, url, path, stream=False))
        await pool.until_open(1)
        leaving.cancel()
        await pool.until_open(0)
        cancelled = asyncio.create_task(ask(client, url, path, {"X-Request-Id": "mine"}, stream=False))
        await pool.until_open(1)
        async with client.post(f"{url}/v1/cancel/mine") as response:
            assert response.status == 200
        status, _, text = await cancelled
        assert "cancelled" in text and (status == 499 or path == "/chat/completions")  # which always streams
        await pool.until_open(0)


@pytest.mark.parametrize(
    "path, prefix",
    [(CHAT, "chatcmpl-"), ("/v1/completions", "cmpl-"), (RESPONSES, "resp_"), (MESSAGES, "msg_")],
)
async def test_an_answer_is_cancelled_by_its_request_s_id(client, path, prefix):
    """The answer has it."""
    async with serving(FakePool()) as url:
        _, headers, text = await ask(client, url, path)
        assert (
            json.loads(text)["id"]
            == prefix + headers["X-Request-Id"]
            == prefix + bare_id(json.loads(text)["id"])
        )


@pytest.mark.parametrize(
    "path", [path for path in ASKED if not path.startswith("/api/")]
)  # Ollama's have no events
async def test_a_stream_is_taken_up_again(client, path):
    async with serving(FakePool()) as url:
        async with client.post(
            url + path, json=ASKED[path] | {"stream": True, "resumable": True}
        ) as response:
            frames, name = (await response.text()).split("\n\n"), response.headers["X-Request-Id"]
        assert [frame.split("\n")[0] for frame in frames[:-1]] == [
            f"id: {number}" for number in range(len(frames) - 1)
        ]
        async with client.get(f"{url}/v1/streams/{name}", params={"from": 2}) as again:
            assert (await again.text()).split("\n\n") == frames[2:]


@every_route
async def test_keys_are_needed_and_name_who_takes_turns(client, path):
    pool = FakePool()
    async with serving(pool, Settings(keys=(ApiKey.hashed("secret", "alice"),))) as url:
        status, headers, text = await ask(client, url, path)
        assert (status, headers["WWW-Authenticate"]) == (401, "Bearer") and "API key" in message_of(
            text, path
        )
        for given in ({"Authorization": "Bearer secret"}, {"X-Api-Key": "secret"}, {"api-key": "secret"}):
            assert (await ask(client, url, path, given))[0] == 200
    [(name, owner)] = {(request.client, request.params.owner) for request in pool.requests}
    assert (
        name == "alice" and re.fullmatch("[0-9a-f]{32}", owner) and len(pool.requests) == 3
    )  # an owner of pages is the key, hashed


@every_route
async def test_a_draining_server_says_when_to_come_back(client, path):
    """It refuses the request."""
    pool = FakePool()
    pool.draining = True
    async with serving(pool) as url:
        status, headers, text = await ask(client, url, path)
    assert status == 503 and headers["Retry-After"] and "loading" in message_of(text, path)
    assert path != MESSAGES or json.loads(text)["error"]["type"] == "overloaded_error"


@every_api
async def test_a_failure_in_a_stream_is_its_last_event(client, path):
    async with serving(FakePool(["Hel", EngineFailure("a worker died")])) as url:
        *_, last = await streamed(client, url, path)
    error = last["response"]["error"] if path == RESPONSES else last["error"]
    assert "a worker died" in (error if path.startswith("/api/") else error["message"])
    assert path != RESPONSES or (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert path != MESSAGES or (last["type"], error["type"]) == ("error", "api_error")


OPENAIS = {CHAT, "/v1/completions", RESPONSES}


@every_api
async def test_only_openais_routes_limit_stop_strings(client, path):
    """Continue sends up to 14 to /api/generate and /infill."""
    pool = FakePool()
    four, many, one = list("abcd"), [f"<{number}>" for number in range(256)], ["y" * 4096]
    async with serving(pool) as url:
        for stops, allowed in (
            (four, True),
            (one, True),
            (many[:5], path not in OPENAIS),
            (many, path not in OPENAIS),
            ([*many, "more"], False),
            (["y" * 4097], False),
            (["y" * 4000, "z" * 97], False),
        ):
            status, _, text = await ask(client, url, path, stop=stops)
            assert (status == 200) == allowed, (len(stops), text)
            if allowed:
                assert pool.requests[-1].params.stop == tuple(stops)
            else:
                assert status == 400 and "4,096" in text and "stop" in text


async def test_messages_limit_their_stop_sequences_alike(client):
    """Their own name for stop strings has the same limit."""
    pool = FakePool()
    async with serving(pool) as url:
        assert (await ask(client, url, MESSAGES, stop_sequences=[f"<{number}>" for number in range(64)]))[
            0
        ] == 200
        assert len(pool.requests[-1].params.stop) == 64
        assert (await ask(client, url, MESSAGES, stop_sequences=["x"] * 257))[0] == 400


async def test_one_of_many_stop_strings_ends_an_answer(client, url):
    """The answer is a real one."""
    stops = [f"<|{number}|>" for number in range(13)]
    for path in (MESSAGES, "/api/chat", "/api/generate"):
        async with client.post(
            url + path,
            json=BODIES[path] | {
                "stream": False,
                "stop_sequences": [*stops, "Tok"],
                "max_tokens": 20,
                "options": {"stop": [*stops, "Tok"], "temperature": 0},
                "temperature": 0,
            },
        ) as response:
            text = whole_text(await response.json())
        assert text and "Tok" not in text and "The capital of Japan is Tok".startswith(text.rstrip()), text


@every_route
async def test_a_slash_at_a_path_s_end_changes_nothing(client, path):
    async with serving(FakePool()) as url:
        status, _, text = await ask(client, url, path)
        async with client.post(url + path + "/", json=(ASKED | WHOLE)[path]) as response:
            assert response.status == status == 200
        async with client.post(url + path + "/", json={"temperature": "hot"}) as response:
            wrong = await response.text()
            assert response.status == (200 if path in ("/api/chat", "/api/generate") else 400) and (
                "detail" in wrong
            ) == (path == "/chat/completions")


@pytest.mark.parametrize("path", WHOLE)
async def test_an_early_failure_is_the_answer_s_status(client, path):
    """It comes before a whole answer."""
    async with serving(FakePool([EngineFailure("a worker died")])) as url:
        status, _, text = await ask(client, url, path)
    assert status == 500 and "a worker died" in message_of(text, path)


@pytest.mark.parametrize("path", [path for path in ASKED if not path.startswith("/api/")])
async def test_progress_is_told_to_who_asks(client, path):
    class Slow(FakePool):
        async def answer(self, request):
            events = super().answer(request)
            yield await anext(events)
            yield PromptProgress(2, 40)
            async for event in events:
                yield event

    async with serving(Slow()) as url:
        told = [
            event["progress"]
            for event in await streamed(client, url, path, progress=True)
            if "progress" in event
        ]
        assert (await ask(client, url, path, stream=False))[0] == 200
    assert told == [{"queue_position": 2, "prompt_tokens": 40, "prompt_tokens_done": 0}]


@pytest.fixture
def url(default_url):
    return default_url


@pytest.fixture
def exact(url):
    if not get(url + "/stats")["row_invariant"]:
        pytest.skip("the reference ops are not row-invariant")


every_chat = pytest.mark.parametrize("path", [path for path in BODIES if path != "/v1/completions"])
DRAWN = {"temperature": 1, "seed": 12, "max_tokens": 40, "max_output_tokens": 40}


@pytest.mark.parametrize(
    "path",
    by_day([path for path in BODIES if path != "/v1/completions"], "/v1/chat/completions", "/v1/messages"),
)
async def test_one_seed_gives_the_same_text_everywhere(client, url, exact, path):
    """Whole, streamed and through a sandbox the same conversation has the same text."""
    wanted = whole_text(json.loads((await ask(client, url, CHAT, **DRAWN))[2]))
    assert len(wanted) > 10
    large = {"padding": "x" * (config.LIMITS.inline_bytes + 1)}
    for more in ({}, large):
        assert "".join(map(text_of, await streamed(client, url, path, **DRAWN, **more))) == wanted
        if path != "/chat/completions":
            assert whole_text(json.loads((await ask(client, url, path, **DRAWN, **more))[2])) == wanted


def test_without_a_template_ollama_continues_prompts():
    """Of a model without a chat template API generate continues the prompt."""
    body = {"prompt": "Once", "system": "Be brief."}
    for chats, prompts, ignored in ((False, ("Once",), ("system",)), (True, None, ())):
        parsed = read_answer("/api/generate", body, Known(Settings(), None, chats=chats))
        assert (parsed.request.prompts or None, parsed.ignored_fields) == (prompts, ignored)


@pytest.mark.slow
async def test_a_death_is_a_pause_in_each_api(client, url, exact):
    wanted = DRAWN | {"max_tokens": 120, "max_output_tokens": 120, "ignore_eos": True}
    bodies = {path: body | wanted | {"stream": True} for path, body in BODIES.items()}
    for path in ("/api/chat", "/api/generate"):
        story = json.loads(
            json.dumps(BODIES[path]).replace(HI, "Tell me a long story about a fox.")
        )  # no ignore_eos here
        bodies[path] = story | {"stream": True, "options": {"temperature": 0, "num_predict": 120}}
    inputs = {"input": [[(7 * i + j) % 5000 for j in range(100)] for i in range(8)]}

    async def embedded(path):
        async with client.post(url + path, json=inputs) as response:
            body = await response.json()
            return body.get("embeddings") or [each["embedding"] for each in body["data"]]

    async def begun(stack, path):
        response = await stack.enter_async_context(client.post(url + path, json=bodies[path]))
        return response, await response.content.readuntil(b"\n" if path.startswith("/api/") else b"\n\n")

    async with contextlib.AsyncExitStack() as stack:
        whole = {path: await begun(stack, path) for path in BODIES}
        for path, (response, begin) in whole.items():
            whole[path] = "".join(map(text_of, events_of((begin + await response.read()).decode())))
        assert min(map(len, whole.values())) > 200
        vectors, restarts = await embedded(EMBEDDINGS), get(url + "/stats")["workers"][0]["restarts"]
        streams = {path: await begun(stack, path) for path in BODIES}
        tasks = [asyncio.create_task(embedded(path)) for path in (EMBEDDINGS, OLLAMA_EMBED)]
        while get(url + "/stats")["workers"][0]["running"] <= len(streams):  # until an embedding runs
            await asyncio.sleep(0.01)
        psutil.Process(get(url + "/stats")["workers"][0]["pid"]).kill()
        assert not any(task.done() for task in tasks)
        for path, (response, begin) in streams.items():
            assert "".join(map(text_of, events_of((begin + await response.read()).decode()))) == whole[path]
        assert await asyncio.gather(*tasks) == [vectors, vectors]
    assert get(url + "/stats")["workers"][0]["restarts"] == restarts + 1 and len(vectors) == 8


async def test_too_many_answers_of_a_client_are_429(client):
    """They are more at a time than it may have, of a worker that never answers."""
    slow = BODIES[CHAT] | {"stream": True, "ignore_eos": True, "max_tokens": 4000}
    pool = played_pool(max_concurrent_per_key=9)
    pool.admission.prompts = PromptMaker(Letters(), 8192)
    async with contextlib.AsyncExitStack() as open_streams:
        url = await open_streams.enter_async_context(serving(pool, pool.settings))
        for _ in range(9):
            assert (await open_streams.enter_async_context(client.post(url + CHAT, json=slow))).status == 200
        for path in (*BODIES, *WHOLE):
            status, headers, text = await ask(client, url, path)
            assert status == 429 and headers["Retry-After"] and "9" in message_of(text, path), path
            assert path != MESSAGES or json.loads(text)["error"]["type"] == "rate_limit_error"


# the same request


CALLS = [{"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]
ADD = {
    "name": "add",
    "description": "adds",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
}


def test_a_conversation_with_calls_is_alike_in_all():
    """Results of calls too are the same in all three APIs."""
    chat = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "1?\n2?"},
            {"role": "assistant", "content": "Let me see.", "tool_calls": CALLS},
            {"role": "tool", "tool_call_id": "call_1", "content": "2"},
            {"role": "assistant", "content": "Two."},
            {"role": "user", "content": "Sure?"},
        ],
        "tools": [{"type": "function", "function": ADD | {"strict": True}}],
    }
    responses = {
        "instructions": "Be brief.",
        "input": [
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "1?"}, {"type": "input_text", "text": "2?"}],
            },
            {
                "type": "message",
                "role": "assistant",
                "id": "msg_1",
                "content": [{"type": "output_text", "text": "Let me see.", "annotations": []}],
            },
            {
                "type": "function_call",
                "id": "fc_1",
                "call_id": "call_1",
                "name": "add",
                "arguments": '{"a": 1}',
            },
            {"type": "function_call_output", "call_id": "call_1", "output": "2"},
            {"role": "assistant", "content": "Two."},
            {"role": "user", "content": "Sure?"},
        ],
        "tools": [
            {"type": "function", **ADD, "strict": True},
            {"type": "web_search"},
            {"type": "custom", "name": "patch"},
        ],
    }
    messages = {
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=1"},
            {"type": "text", "text": "Be brief."},
        ],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "1?", "cache_control": {"type": "ephemeral"}},
                    {"type": "text", "text": "2?"},
                ],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "Let me see."},
                    {"type": "tool_use", "id": "call_1", "name": "add", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "call_1",
                        "content": [{"type": "text", "text": "2"}],
                    }
                ],
            },
            {"role": "assistant", "content": "Two."},
            {"role": "user", "content": "Sure?"},
        ],
        "tools": [
            {"name": "add", "description": "adds", "input_schema": ADD["parameters"], "strict": True},
            {"type": "web_search_20250305", "name": "web_search"},
        ],
    }
    bodies = [
        read_answer(path, body | {"seed": 1}, KNOWN)
        for path, body in ((CHAT, chat), (RESPONSES, responses), (MESSAGES, messages))
    ]
    assert bodies[0].request == bodies[1].request == bodies[2].request
    assert len(bodies[0].request.messages) == 6 and bodies[0].request.params.tool_names == ("add",)
    assert [parsed.ignored_tools for parsed in bodies] == [
        (),
        ("web_search", "custom"),
        ("web_search_20250305",),
    ]


def test_every_api_reads_earlier_reasoning():
    """Clients send back what the assistant thought, under each API's own name."""
    question, again = ({"role": "user", "content": text} for text in ("1?", "2?"))
    spoken = {"role": "assistant", "content": "One."}
    bodies = (
        (CHAT, {"messages": [question, spoken | {"reasoning_content": "Hm."}, again]}),
        (
            RESPONSES,
            {
                "input": [
                    question,
                    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]},
                    spoken,
                    again,
                ]
            },
        ),
        (
            MESSAGES,
            {
                "messages": [
                    question,
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "thinking", "thinking": "Hm."},
                            {"type": "text", "text": "One."},
                        ],
                    },
                    again,
                ]
            },
        ),
        ("/api/chat", {"messages": [question, spoken | {"thinking": "Hm."}, again]}),
    )
    for path, body in bodies:
        assert [
            (message.content, message.more) for message in read_answer(path, body, KNOWN).request.messages
        ] == [("1?", None), ("One.", {"reasoning_content": "Hm."}), ("2?", None)], path


async def test_a_header_names_tools_of_other_types(client, caplog):
    caplog.set_level("INFO")
    tools = [{"type": "namespace", "name": "x"}, {"type": "web_search"}, {"type": "odd\r\ntype", "name": "y"}]
    async with serving(FakePool()) as url:
        for stream in (False, True):
            _, headers, _ = await ask(client, url, RESPONSES, tools=tools, stream=stream)
            assert headers["X-Ignored-Tools"] == "namespace, web_search, oddtype"
        assert "X-Ignored-Tools" not in (await ask(client, url, RESPONSES))[1]
    assert "namespace, web_search" in caplog.text


@pytest.mark.parametrize(
    "chat, responses, messages",
    [
        ("auto", "auto", {"type": "auto"}),
        ("none", "none", {"type": "none"}),
        ("required", "required", {"type": "any"}),
        (
            {"type": "function", "function": {"name": "b"}},
            {"type": "function", "name": "b"},
            {"type": "tool", "name": "b"},
        ),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "b"}}]},
            },
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "b"}]},
            None,
        ),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "b"}}],
                },
            },
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "b"}]},
            None,
        ),
    ],
)
def test_a_choice_of_tools_is_alike_in_all_three(chat, responses, messages):
    functions = [ADD | {"name": name} for name in "ab"]
    base = {"seed": 1}
    first = read_answer(
        CHAT,
        base | BODIES[CHAT] | {
            "tool_choice": chat,
            "tools": [{"type": "function", "function": each} for each in functions],
        },
        KNOWN,
    ).request
    second = read_answer(
        RESPONSES,
        base | BODIES[RESPONSES] | {
            "tool_choice": responses,
            "tools": [{"type": "function", **each} for each in functions],
        },
        KNOWN,
    ).request
    assert first == second
    named = not isinstance(chat, str)
    assert first.params.tool_names == (() if chat == "none" else ("b",) if named else ("a", "b"))
    assert bool(first.params.grammar) == (
        "required" in str(chat) or isinstance(chat, dict) and chat["type"] == "function"
    )
    if messages:
        third = read_answer(
            MESSAGES,
            base | {
                "messages": BODIES[CHAT]["messages"],
                "tool_choice": messages,
                "tools": [
                    {"name": each["name"], "description": "adds", "input_schema": each["parameters"]}
                    for each in functions
                ],
            },
            KNOWN,
        ).request
        assert third == first


def test_formats_and_parameters_are_alike_in_all():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    common = {"seed": 1, "temperature": 0.5, "top_p": 0.5}
    question = BODIES[CHAT]["messages"]
    first = read_answer(
        CHAT,
        common | {
            "messages": question,
            "max_completion_tokens": 9,
            "stop": ["x"],
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
        },
        KNOWN,
    ).request
    second = read_answer(
        RESPONSES,
        common | {
            "input": question,
            "max_output_tokens": 9,
            "stop": ["x"],
            "text": {
                "format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True},
                "verbosity": "low",
            },
        },
        KNOWN,
    ).request
    third = read_answer(
        MESSAGES,
        common | {
            "messages": question,
            "max_tokens": 9,
            "stop_sequences": ["x"],
            "output_config": {"format": {"type": "json_schema", "schema": schema}},
        },
        KNOWN,
    ).request
    alike = [replace(each, params=replace(each.params, grammar_param="")) for each in (first, second, third)]
    assert alike[0] == alike[1] == alike[2]
    assert [each.params.grammar_param for each in (first, second, third)] == [
        "response_format",
        "text",
        "output_config",
    ]
    assert read_answer(RESPONSES, {"input": "x", "truncation": "auto"}, KNOWN).request.truncate


@pytest.mark.parametrize("given", [{"input": ""}, {"input": []}, {"input": [], "instructions": "Be brief."}])
def test_an_empty_input_is_answered(given):
    messages = read_answer(RESPONSES, given, KNOWN).request.messages
    assert (messages[-1].role, messages[-1].content) == ("user", "")


ALLOWED = {"type": "allowed_tools", "mode": "auto", "tools": []}


@pytest.mark.parametrize(
    "path, body, named",
    [
        (RESPONSES, {"previous_response_id": "resp_1"}, "previous_response_id"),
        (RESPONSES, {"conversation": "conv_1"}, "conversation"),
        (RESPONSES, {"background": True}, "background"),
        (RESPONSES, {"prompt": {"id": "x"}}, "prompt"),
        (RESPONSES, {"input": 5}, "input"),
        (RESPONSES, {"input": [5]}, "input[0]"),
        (RESPONSES, {"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        (RESPONSES, {"input": [{"id": "msg_1"}]}, "item_reference"),
        (RESPONSES, {"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        (
            RESPONSES,
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
        ),
        (RESPONSES, {"input": [{"type": "function_call", "call_id": "1"}]}, "input[0].tool_calls"),
        (RESPONSES, {"tools": [{"type": "function"}]}, "tools[0]"),
        (RESPONSES, {"tools": ["x"]}, "tools"),
        (RESPONSES, {"tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        (RESPONSES, {"text": {"format": 5}}, "text"),
        (RESPONSES, {"text": {"format": {"type": "xml"}}}, "text"),
        (RESPONSES, {"max_output_tokens": 0}, "max_output_tokens"),
        (MESSAGES, {"messages": []}, "messages"),
        (MESSAGES, {"messages": [{"role": "alien"}]}, "messages[0].role"),
        (
            MESSAGES,
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages[0].content[0]",
        ),
        (MESSAGES, {"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        (
            MESSAGES,
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": 5}]}]},
            "messages[0].content[0]",
        ),
        (MESSAGES, {"system": 5}, "system"),
        (MESSAGES, {"system": [{"type": "image"}]}, "system"),
        (MESSAGES, {"max_tokens": "x"}, "max_tokens"),
        (MESSAGES, {"tools": [{"name": "x", "input_schema": 5}]}, "tools[0]"),
        (MESSAGES, {"tool_choice": "auto"}, "tool_choice"),
        (MESSAGES, {"stop_sequences": [5]}, "stop_sequences"),
        (MESSAGES, {"output_config": {"format": {"type": "json_schema"}}}, "output_config"),
        (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
        (CHAT, {"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        (
            RESPONSES,
            {"tool_choice": ALLOWED | {"allowed_tools": {}}},
            '{"type": "allowed_tools", "mode", "tools"}',
        ),
        (RESPONSES, {"tool_choice": ALLOWED | {"allowed_tools": "x"}}, "tool_choice"),
        (RESPONSES, {"tool_choice": ALLOWED | {"tools": [5]}}, "tool_choice"),
        (
            CHAT,
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "any", "tools": []}}},
            "tool_choice",
        ),
        (
            CHAT,
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": ["x"]}}},
            "tool_choice",
        ),
        (
            CHAT,
            {"functions": [{"name": "x"}], "function_call": {"name": "y", "type": {"any": 1}}},
            "tool_choice names \"y\"",
        ),
        (
            CHAT,
            {"functions": [{"name": "x"}], "function_call": {"name": "y", "type": "allowed_tools"}},
            "tool_choice names \"y\"",
        ),
        (
            CHAT,
            {"response_format": {"type": "json_object", "schema": {"minimum": float("inf")}}},
            "response_format cannot be enforced: minimum must be a finite number, not Infinity",
        ),
    ],
)
async def test_an_impossible_body_is_400_and_named(client, path, body, named):
    pool = FakePool()
    pool.tokenizer = Letters()
    pool.tokenizer.tool_format = "tagged"
    async with serving(pool) as url:
        for stream in (False, True):
            status, _, text = await ask(client, url, path, **body, stream=stream)
            assert status == 400 and named in message_of(text, path) and not pool.requests, text


@pytest.mark.parametrize(
    "field, value, bounds",
    [
        ("min_tokens", -1, "of at least 0"),
        ("seed", 2**64, "from -9223372036854775808 to 18446744073709551615"),
        ("temperature", 3, "from 0 to 2"),
        ("repetition_penalty", 0, "from 0.01 to 10"),
    ],
)
async def test_an_error_names_the_real_bound(client, field, value, bounds):
    async with serving(FakePool()) as url:
        assert bounds in message_of((await ask(client, url, CHAT, **{field: value}))[2], CHAT)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)
MEMBERS = [
    "type",
    "role",
    "content",
    "text",
    "name",
    "id",
    "call_id",
    "arguments",
    "output",
    "summary",
    "thinking",
    "input",
    "tool_use_id",
    "input_schema",
    "parameters",
    "tools",
    "mode",
    "function",
    "allowed_tools",
    "format",
    "schema",
    "disable_parallel_tool_use",
]
KINDS = [
    "message",
    "function_call",
    "function_call_output",
    "reasoning",
    "text",
    "tool_use",
    "tool_result",
    "thinking",
    "redacted_thinking",
    "function",
    "custom",
    "tool",
    "any",
    "auto",
    "allowed_tools",
    "json_schema",
    "user",
    "assistant",
    "system",
    "input_text",
    "required",
    "x",
]
items = st.recursive(
    json_values | st.sampled_from(KINDS),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(MEMBERS), inner | st.sampled_from(KINDS), max_size=5)
    ),
    max_leaves=25,
)


@hypothesis_settings(
    max_examples=150 if nightly.WHOLE else 10, deadline=None, suppress_health_check=list(HealthCheck)
)
@example(body={}, item={"type": "custom"})
@example(body={}, item={"type": "custom", "function": {}})
@given(
    body=st.dictionaries(
        st.sampled_from(
            [
                "input",
                "messages",
                "system",
                "tools",
                "tool_choice",
                "text",
                "output_config",
                "instructions",
                "metadata",
            ]
        ),
        items,
        max_size=4,
    ),
    item=items,
)
def test_nested_bodies_are_read_or_refused(body, item):
    """Neither reader fails on any item or block; what they read crosses the pipe to a sandbox unharmed."""
    for path in ANSWERS:
        for changed in (
            body,
            body | {"input": [item]},
            body | {"messages": [item]},
            body | {"messages": [{"role": "user", "content": [item]}]},
            body | {"tools": [item]},
        ):
            try:
                parsed = read_answer(path, changed, KNOWN)
            except RequestError as error:
                assert error.status == 400 and str(error)
            else:
                assert (
                    restorer(ParsedBody)(json.loads(as_plain_json(parsed))).request.params.sampling
                    == parsed.request.params.sampling
                )


class Marked(Letters):
    """Letters, and every marker as a special token."""

    vocab_size = 257 + len(MARKS)

    def __init__(self, tool_format, thoughts=None):
        super().__init__()
        self.tool_format, self.thoughts = tool_format, thoughts
        self.specials = {"<|stop|>": 256, **{name: number for number, name in enumerate(MARKS, 257)}}


@functools.cache
def tokenizers(tool_format):
    thoughts = ("<|message|>", "<|end|>") if tool_format == "harmony" else ("<think>", "</think>")
    plain = Letters()
    plain.tool_format = tool_format
    return plain, Marked(tool_format), Marked(tool_format, thoughts)


def follow(grammar, tokenizer, drawn):
    """Tokens drawn among those that the grammar allows: a worker must never find one that it does not
    take."""
    for _ in range(25):
        grammar.masks = Future()
        grammar.masks.set_result(grammar.compute_masks())
        token = int(drawn.choice(grammar.allowed(tokenizer.vocab_size).nonzero()[0]))
        assert grammar.feed(token), (token, grammar.source, grammar.matcher.get_error())
        if grammar.complete or token in tokenizer.stop_tokens:
            return


def read_check_and_follow(path, body, tool_format, drawn):
    """What the front, a sandbox and a worker do with a body, up to its first tokens. RequestError if it is
    refused."""
    parsed = read_answer(path, json_object(json.dumps(body).encode()), Known(Settings(), tool_format))
    request = restorer(ParsedBody)(json.loads(as_plain_json(parsed))).request
    encoder = ENCODERS[parsed.kind](parsed, "m", tokenizers(tool_format)[0])
    collected(encoder, finished(["a"]))
    assert json.loads(b"".join(encoder.completion()))
    with_generic_tools(request.messages or (Message("user", "x"),), request.tools)
    for source in filter(None, (request.params.grammar, *request.params.call_grammars)):
        check_grammar(source, request.params.grammar_param)
    for tokenizer in tokenizers(tool_format):
        reader = answer_reader(tokenizer, request.params, ())
        whole = [reader.grammar(request.params) if reader else request.params.grammar] * bool(
            request.params.grammar
        )
        for source in (
            *whole,
            *(with_markers(each, tokenizer.markers) for each in request.params.call_grammars if each),
        ):
            follow(Grammar(tokenizer, source), tokenizer, drawn)


def check_odd_body(asked, seed):
    (path, body), tool_format = asked
    try:
        read_check_and_follow(path, body, tool_format, random.Random(seed))
    except RequestError as error:
        assert error.status == 400 and error.param, error
        # what is wrong and what is allowed, not what Python says of it
        assert re.search(
            r"must be|needs|requires|names|not supported|cannot|excludes?|ha[sv]e", str(error)
        ) and not re.search(
            "object has no"
            " attribute|TypeError|AttributeError|KeyError|OverflowError|unhashable|subscriptable|surrogates",
            str(error),
        ), error


odd = given(asked=odd_bodies.asked, seed=st.integers(0, 2**32))
relaxed = partial(hypothesis_settings, deadline=None, suppress_health_check=list(HealthCheck))


IMPOSSIBLE = {"properties": {"n": {"type": "null"}, "a": {"pattern": "^a", "const": ""}}}


@relaxed(max_examples=60 if nightly.WHOLE else 30, derandomize=True)
@example(asked=(odd_bodies.required_call({"name": "f", "parameters": IMPOSSIBLE}), "glm tags"), seed=0)
@odd
def test_odd_tools_are_answered_or_refused_by_name(asked, seed):
    """So are odd formats, in every API and tool format."""
    check_odd_body(asked, seed)


@pytest.mark.slow
@pytest.mark.timeout(900)
@relaxed(max_examples=8_000)
@odd
def test_many_odd_tools_are_answered_or_refused(asked, seed):
    """Formats are too; a refusal names them."""
    check_odd_body(asked, seed)


@pytest.mark.parametrize(
    "examples", [30, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
async def test_no_odd_tools_or_formats_give_5xx(examples):
    pool = FakePool()
    pool.tokenizer = Letters()

    def post_all(port):
        @relaxed(max_examples=examples, derandomize=examples < 100)
        @example(
            asked=(
                (
                    "/v1/responses",
                    {
                        "input": "hi",
                        "tool_choice": {
                            "type": "allowed_tools",
                            "mode": "auto",
                            "tools": [],
                            "allowed_tools": {},
                        },
                    },
                ),
                "tagged",
            )
        )
        @example(
            asked=(
                odd_bodies.required_call(
                    {"name": "f", "parameters": {"properties": {"a": {"type": "string", "minLength": 1e999}}}}
                ),
                "qwen tags",
            )
        )
        @example(
            asked=(
                odd_bodies.required_call({"name": "f", "parameters": {"allOf": [{"properties": ["a"]}] * 2}}),
                "glm tags",
            )
        )
        @given(asked=odd_bodies.asked)
        def post(asked):
            (path, body), pool.tokenizer.tool_format = asked
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
                connection.request("POST", path, json.dumps(body))
                response = connection.getresponse()
                answer = response.read()
                assert response.status in (200, 400), answer

        post()

    async with serving(pool) as url:
        await asyncio.to_thread(post_all, int(url.rsplit(":", 1)[1]))


# answers


THOUGHT = [
    said(thought("Hm"), tokens=(1,)),
    said(thought("m"), tokens=(2,)),
    said("So", tokens=(3,)),
    said("!", tokens=(4,)),
    said(Delta("call", "", "add"), tokens=(5,)),
    said(Delta("call", '{"a": '), Delta("call", "1}"), tokens=(6,)),
    said(Delta("call", "{}", "add"), tokens=(7,)),
]


def test_what_one_piece_adds_comes_in_its_order():
    deltas = Delta("text", "a"), Delta("call", "{}", "add"), thought("b"), Delta("text", "c")
    for api in ("responses", "messages", "ollama chat"):
        encoder = ENCODERS[api](
            ParsedBody(Request("x", messages=()), kind=api, details={"thinking": True}), "fake"
        )
        encoded(encoder, said(*deltas))
        assert [(block.kind, block.text, block.part.name) for block in encoder.blocks] == [*deltas]
    native = encoded(ENCODERS["native"](ParsedBody(Request("x", messages=())), "fake"), said(*deltas)).decode()
    assert re.findall('"(token|reasoning)": "(.)"', native) == [
        ("token", "a"),
        ("reasoning", "b"),
        ("token", "c"),
    ]
    chunk = encoded(ENCODERS["chat"](ParsedBody(Request("x", messages=()), kind="chat"), "fake"), said(*deltas))
    delta = json.loads(chunk.removeprefix(b"data: "))["choices"][0]["delta"]
    assert (delta["content"], delta["reasoning"], delta["tool_calls"][0]["function"]["name"]) == (
        "ac",
        "b",
        "add",
    )


def calls_in(chunks):
    """(name, arguments) of the calls in a stream, put together as clients do that take one entry of a chunk
    for each index."""
    calls = {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        entries = choice["delta"].get("tool_calls") or []
        indices = [entry["index"] for entry in entries]
        assert len(set(indices)) == len(indices), entries
        for entry in entries:
            if entry["index"] in calls:
                assert entry.keys() == {"index", "function"} and entry["function"].keys() == {
                    "arguments"
                }, entry
            else:
                assert entry["id"] and entry["type"] == "function"
            name, arguments = calls.get(entry["index"]) or (entry["function"]["name"], "")
            calls[entry["index"]] = name, arguments + entry["function"]["arguments"]
    return list(calls.values())


@pytest.mark.parametrize(
    "parts",
    [
        ['{"city"', ': "Oslo"}'],
        ["", '{"city": "Oslo"}'],
        ["", "{", '"city"', ": ", '"Oslo"', "}"],
        ['{"city": "Oslo"}', ""],
    ],
)
@pytest.mark.parametrize("cut", range(5))
def test_a_chunk_has_one_entry_for_each_call(parts, cut):
    """However a step cuts a call: drafts and grammars add several tokens in one."""
    first, *rest = [Delta("call", part, "" if number else "look") for number, part in enumerate(parts)]
    second = Delta("call", "", "now"), Delta("call", "{", ""), Delta("call", "}", "")
    deltas = "Hm", first, *rest, *second, "Done"
    pieces = [piece for piece in (said(*deltas[: cut + 1]), said(*deltas[cut + 1 :])) if piece.deltas]
    for api in ("chat", "functions"):
        encoder = ENCODERS[api](ParsedBody(Request("x", messages=()), kind=api), "fake")
        stream = b"".join(encoded(encoder, piece) for piece in pieces)
        chunks = [json.loads(line.removeprefix("data: ")) for line in stream.decode().split("\n\n") if line]
        assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == "HmDone"
        if api == "chat":
            assert calls_in(chunks) == [("look", '{"city": "Oslo"}'), ("now", "{}")]
        else:  # which knows one call
            told = [
                chunk["choices"][0]["delta"]["function_call"]
                for chunk in chunks
                if "function_call" in chunk["choices"][0]["delta"]
            ]
            assert "".join(each.get("name", "") for each in told) == "look"
            assert "".join(each["arguments"] for each in told) == '{"city": "Oslo"}'


async def test_a_response_streams_the_documented_events(client):
    async with serving(FakePool(THOUGHT)) as url:
        events = await streamed(client, url, RESPONSES)
        whole = json.loads((await ask(client, url, RESPONSES))[2])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    item, part = ["output_item.added", "content_part.added"], ["content_part.done", "output_item.done"]
    call = "function_call_arguments"
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        *item,
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        *part,
        *item,
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        *part,
        item[0],
        f"{call}.delta",
        f"{call}.delta",
        f"{call}.done",
        part[1],
        item[0],
        f"{call}.delta",
        f"{call}.done",
        part[1],
        "completed",
    ]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert events[-1]["response"]["output"] == done and [each["status"] for each in done] == ["completed"] * 4
    assert [event["output_index"] for event in events if event["type"] == "response.output_item.added"] == [
        0,
        1,
        2,
        3,
    ]
    assert (
        done[0]["content"] == [{"type": "reasoning_text", "text": "Hmm"}]
        and done[1]["content"][0]["text"] == "So!"
    )
    assert [(each["name"], each["arguments"]) for each in done[2:]] == [("add", '{"a": 1}'), ("add", "{}")]
    strip = lambda found: [
        {name: value for name, value in each.items() if name not in ("id", "call_id")} for each in found
    ]  # noqa: E731
    assert (
        strip(whole["output"]) == strip(done)
        and whole["status"] == "completed"
        and events[0]["response"]["output"] == []
    )
    assert whole["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 14,
    }
    ids = {event["item_id"] for event in events if "item_id" in event}
    assert ids == {each["id"] for each in done}


async def test_a_message_streams_the_documented_events(client):
    async with serving(FakePool(THOUGHT)) as url:
        events = await streamed(client, url, MESSAGES, thinking={"type": "enabled"})
        whole = json.loads((await ask(client, url, MESSAGES, thinking={"type": "enabled"}))[2])
    start, delta, stop = "content_block_start", "content_block_delta", "content_block_stop"
    assert [event["type"] for event in events] == [
        "message_start",
        *[start, delta, delta, stop] * 3,
        start,
        delta,
        stop,
        "message_delta",
        "message_stop",
    ]
    assert [event["content_block"]["type"] for event in events if event["type"] == start] == [
        "thinking",
        "text",
        "tool_use",
        "tool_use",
    ]
    assert [event["delta"]["type"] for event in events if event["type"] == delta][::2] == [
        "thinking_delta",
        "text_delta",
        "input_json_delta",
        "input_json_delta",
    ]
    assert events[0]["message"]["usage"]["input_tokens"] == 7 and events[-2]["delta"] == {
        "stop_reason": "tool_use",
        "stop_sequence": None,
    }
    assert (
        events[-2]["usage"] == whole["usage"] == {
            "input_tokens": 4,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 3,
            "output_tokens": 7,
        }
    )
    assert [block["type"] for block in whole["content"]] == [
        "thinking",
        "text",
        "tool_use",
        "tool_use",
    ] and whole["content"][0]["thinking"] == "Hmm"
    assert [block["input"] for block in whole["content"][2:]] == [{"a": 1}, {}] and whole[
        "stop_reason"
    ] == "tool_use"


@pytest.mark.parametrize(
    "reason, stop_reason, status, stop",
    [
        ("stop", "eos", "completed", ("end_turn", None)),
        ("length", "max_tokens", "incomplete", ("max_tokens", None)),
        ("length", "context_length", "incomplete", ("model_context_window_exceeded", None)),
        ("stop", "END", "completed", ("stop_sequence", "END")),
    ],
)
async def test_each_api_says_how_an_answer_ended(client, reason, stop_reason, status, stop):
    async with serving(FakePool(["Hi"], reason=reason, stop_reason=stop_reason)) as url:
        last = (await streamed(client, url, RESPONSES, stop=["END"]))[-1]
        message = json.loads((await ask(client, url, MESSAGES, stop_sequences=["END"]))[2])
    assert (
        last["type"] == f"response.{status}"
        and last["response"]["status"] == last["response"]["output"][0]["status"] == status
    )
    assert last["response"]["incomplete_details"] == (
        {"reason": "max_output_tokens"} if status == "incomplete" else None
    )
    assert (message["stop_reason"], message["stop_sequence"]) == stop


async def test_an_answer_without_text_has_an_empty_part(client):
    async with serving(FakePool([])) as url:
        assert whole_text(json.loads((await ask(client, url, RESPONSES))[2])) == ""
        assert json.loads((await ask(client, url, MESSAGES))[2])["content"] == [{"type": "text", "text": ""}]


async def test_a_silent_stream_of_messages_has_own_pings(client, monkeypatch):
    patch(monkeypatch, config, "PING_S", 0.02)
    pool = FakePool(gate=asyncio.Event())
    async with serving(pool) as url:
        async with client.post(url + MESSAGES, json=BODIES[MESSAGES] | {"stream": True}) as response:
            while b"event: ping" not in await response.content.readline():
                pass
            assert await response.content.readline() == b'data: {"type": "ping"}\n'


TOLD = {  # what a legal client sends, and a response repeats
    "metadata": {
        "k" * 64: "v" * 512,
        **{f"key {number}": "line\u2028end \x85 \u00e9" for number in range(15)},
    },
    "user": "\U0001f600" * 512,
    "instructions": "Be brief.\u2029",
    "parallel_tool_calls": False,
    "truncation": "auto",
    "max_output_tokens": 9,
    "tools": [
        {
            "type": "function",
            "name": "f",
            "strict": True,
            "description": "d",
            "parameters": {"type": "object", "properties": {}},
        },
        {"type": "web_search", "user_location": {"type": "approximate", "city": "Paris"}},
    ],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
    "text": {
        "format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}},
        "verbosity": "low",
    },
    "reasoning": {"effort": "low", "summary": "auto"},
}


REPEATED = {  # what stands for absent fields
    "instructions": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "text": {"format": {"type": "text"}},
    "reasoning": {"effort": None, "summary": None},
    "truncation": "disabled",
    "max_output_tokens": None,
    "user": None,
}


@pytest.mark.parametrize("inline", [True, False])
async def test_a_response_repeats_what_it_was_asked(client, inline, monkeypatch):
    pool = FakePool(["{}"])
    pool.tokenizer = Letters()
    pool.tokenizer.tool_format = "tagged"
    body = BODIES[RESPONSES] | TOLD
    async with serving(pool) as url:
        if not inline:
            patch(monkeypatch, config, "LIMITS", replace(config.LIMITS, inline_bytes=0))
        for given, wanted in ((body, TOLD), (BODIES[RESPONSES], REPEATED)):
            async with client.post(url + RESPONSES, json=given) as response:
                whole = await response.json()
            async with client.post(url + RESPONSES, json=given | {"stream": True}) as response:
                events = events_of(await response.text())
            found = [whole, *[event["response"] for event in events if "response" in event]]
            assert len(found) == 4 and all({name: each[name] for name in wanted} == wanted for each in found)
            assert found[3]["status"] == "completed" and [event["sequence_number"] for event in events] == [
                *range(len(events))
            ]


@pytest.mark.parametrize(
    "name, value",
    [
        ("metadata", dict.fromkeys(map(str, range(17)), "")),
        ("metadata", {"k" * 65: ""}),
        ("metadata", {"k": "v" * 513}),
        ("metadata", {"k": 1}),
        ("metadata", {"k": ["v"]}),
        ("user", "u" * 513),
        ("user", ["u"]),
        ("user", {"u": "u"}),
        ("tools", [{"type": "function", "name": "f", "other": [[]] * 500}]),
        ("tools", [{"type": "mcp", "other": "\u2028" * 200}]),
        ("text", {"other": [{}] * 500}),
        ("reasoning", {"other": "\x85" * 200}),
        ("instructions", "i" * 1200),
        ("tool_choice", {"type": "function", "name": "f", "other": "x" * 1200}),
        ("tool_choice", {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}] * 100}),
    ],
)
async def test_what_a_response_repeats_is_bounded(client, name, value, monkeypatch):
    patch(monkeypatch, config, "LIMITS", replace(config.LIMITS, repeated_bytes=1000))
    pool = FakePool()
    pool.tokenizer = Letters()
    pool.tokenizer.tool_format = "tagged"
    body = BODIES[RESPONSES] | {"tools": [{"type": "function", "name": "f"}]} | {name: value}
    async with serving(pool) as url, client.post(url + RESPONSES, json=body) as response:
        error = (await response.json())["error"]
        assert (
            response.status == 400
            and error["param"] == name
            and name in error["message"]
            and not pool.requests
        )


async def test_a_stream_may_begin_with_a_large_event(client, monkeypatch):
    """A reader whom the first event alone would make too slow: what it sent itself does not count."""
    patch(monkeypatch, config, "LIMITS", replace(config.LIMITS, outbox_bytes=1000))
    monkeypatch.setattr(
        asyncio.selector_events._SelectorSocketTransport, "get_write_buffer_size", lambda self: 100_000
    )
    body = BODIES[RESPONSES] | {"stream": True}
    async with serving(FakePool()) as url:
        async with client.post(url + RESPONSES, json=body | {"instructions": "i" * 60_000}) as response:
            assert events_of(await response.text())[-1]["type"] == "response.completed"
        with pytest.raises(aiohttp.ClientError):
            async with client.post(url + RESPONSES, json=body) as response:
                await response.read()


async def test_a_body_with_a_model_is_openai_s(client):
    """A response is not kept."""
    async with serving(FakePool()) as url:
        for method in ("GET", "DELETE"):
            async with client.request(method, url + "/v1/responses/resp_1") as response:
                error = (await response.json())["error"]
                assert (
                    response.status == 404
                    and set(error) == {"message", "type", "param", "code"}
                    and "resp_1" in error["message"]
                )
        async with client.post(
            url + "/chat/completions", json=BODIES[CHAT] | {"model": "fake-model"}
        ) as response:
            assert (await response.json())["object"] == "chat.completion"
        for padding in ("", "x" * (config.LIMITS.inline_bytes + 1)):
            async with client.post(
                url + "/chat/completions", json={"model": "fake-model", "messages": [], "padding": padding}
            ) as response:
                assert response.status == 400 and "messages" in (await response.json())["error"]["message"]
            async with client.post(
                url + "/chat/completions",
                json={"messages": [{"role": "user", "content": '"model": 5' * 99}] * 501},
            ) as response:
                assert response.status == 400 and list(await response.json()) == ["detail"]
        async with client.head(url + "/") as response:
            assert response.status == 200
        async with client.get(url + "/v1/models") as response:
            assert (await response.json())["data"][0]["root"] == "fake-model"


async def test_count_tokens_counts_a_message_s_prompt(client):
    """Tokens of a message are counted as its prompt has them."""
    pool = FakePool()
    async with serving(pool) as url:
        for body in (BODIES[MESSAGES], BODIES[MESSAGES] | {"system": "Be brief."}):
            async with client.post(url + MESSAGES + "/count_tokens?beta=true", json=body) as response:
                counted = (await response.json())["input_tokens"]
            await client.post(url + MESSAGES + "?beta=true", json=body)
            assert counted == len(pool.tokenizer.render(pool.requests[-1].messages)) > 10


# tools where the template knows none, and those of older clients


async def test_older_clients_functions_are_tools(client):
    pool = FakePool(["Sure.", '<tool_call>{"name": "add", ', '"arguments": {"a"', ": 1}", "}</tool_call>"])
    pool.tokenizer = Letters()
    pool.tokenizer.tool_format = "tagged"
    legacy = {"functions": [ADD], "function_call": "auto"}
    async with serving(pool) as url:
        events = await streamed(client, url, CHAT, **legacy)
        (choice,) = json.loads((await ask(client, url, CHAT, **legacy))[2])["choices"]
        again = [
            *BODIES[CHAT]["messages"],
            choice["message"],
            {"role": "function", "name": "add", "content": "2"},
        ]
        assert (await ask(client, url, CHAT, messages=again, **legacy))[0] == 200
    assert (
        choice["message"]["function_call"] == {"name": "add", "arguments": '{"a": 1}'}
        and choice["finish_reason"] == "function_call"
    )
    told = [
        event["choices"][0]["delta"]["function_call"]
        for event in events
        if "function_call" in event["choices"][0]["delta"]
    ]
    assert told[0]["name"] == "add" and "".join(each["arguments"] for each in told) == '{"a": 1}'
    assert "tool_calls" not in json.dumps(events) + json.dumps(choice)
    assert [(m.role, m.more) for m in pool.requests[-1].messages[1:]] == [
        (
            "assistant",
            {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]},
        ),
        ("tool", {"name": "add"}),
    ]


def test_a_system_prompt_tells_a_template_of_tools(default_model_path):
    """The template knows none itself."""
    from engines import load

    tokenizer = open_tokenizer(load(default_model_path).text)
    assert tokenizer.tool_format == "tagged" and not tokenizer.native_tools
    tools = [{"type": "function", "function": ADD}]
    messages = openai_messages(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": None, "tool_calls": CALLS},
            {"role": "tool", "tool_call_id": "call_1", "content": "2"},
            {"role": "user", "content": "Well?"},
        ],
        True,
    )
    text = tokenizer.show(tokenizer.render(messages, tools))
    assert text.count('"name": "add"') == 2 and text.index("Be brief.") < text.index(
        '"description": "adds"'
    ) < text.index("1 + 1?")
    assert (
        '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
        in text
    )
    assert "<|im_start|>user\n<tool_response>\n2\n</tool_response>\nWell?<|im_end|>" in text
    plain = [Message("user", "Hi", {"name": "Ann"})]
    assert with_generic_tools(plain, ()) == plain
    first = with_generic_tools(plain, tools, has_system=False)
    assert len(first) == 1 and first[0].content.endswith("\n\nHi") and "adds" in first[0].content


async def test_a_model_without_a_tool_template_calls_tools(client, default_server):
    """A required call is made by the grammar; what was called can be told of in the next turn."""
    url, log = default_server
    strict = ADD | {"parameters": ADD["parameters"] | {"required": ["a"], "additionalProperties": False}}
    tools = [{"type": "function", "function": strict}]
    (model,) = get(url + "/v1/models")["data"]
    assert any(line.startswith("Tools: described in a system prompt") for line in log)
    assert model["tools"] == "generic" and model["capabilities"]["tools"] is True
    wanted = {
        "tools": tools,
        "tool_choice": {"type": "function", "function": {"name": "add"}},
        "temperature": 0,
    }
    (choice,) = json.loads((await ask(client, url, CHAT, **wanted))[2])["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert call["function"]["name"] == "add" and set(json.loads(call["function"]["arguments"])) == {"a"}
    cut = json.loads((await ask(client, url, CHAT, **wanted, max_tokens=12))[2])["choices"][0]
    assert cut["finish_reason"] == "length" and not cut["message"]["content"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "2"}
    later = await ask(
        client,
        url,
        CHAT,
        messages=[*BODIES[CHAT]["messages"], choice["message"], result],
        tools=tools,
        max_tokens=5,
    )
    assert later[0] == 200
    function = strict | {
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"]}
    }
    called = wanted | {"tools": [{"type": "function", "function": function}]}
    assert calls_in(await streamed(client, url, CHAT, **called)) == [("add", '{"city": "Oslo"}')]
    older = {"functions": [function], "function_call": {"name": "add"}, "temperature": 0}
    told = [
        event["choices"][0]["delta"].get("function_call") or {}
        for event in await streamed(client, url, CHAT, **older)
    ]
    assert "".join(each.get("arguments", "") for each in told) == '{"city": "Oslo"}'
    flat = [{"type": "function", **strict}]
    response = json.loads(
        (
            await ask(
                client,
                url,
                RESPONSES,
                tools=flat,
                tool_choice="required",
                parallel_tool_calls=False,
                temperature=0,
            )
        )[2]
    )
    assert [item["type"] for item in response["output"]][0] == "function_call" and json.loads(
        response["output"][0]["arguments"]
    ) is not None


# Ollama


async def test_ollama_s_answers_are_lines_of_json(client):
    async with serving(FakePool(THOUGHT)) as url:
        lines = await streamed(client, url, "/api/chat")
        assert [line["message"].get("thinking") for line in lines][:2] == ["Hm", "m"] and [
            line["done"] for line in lines
        ] == [False] * 6 + [True]
        assert lines[4]["message"]["tool_calls"] == [{"function": {"name": "add", "arguments": {"a": 1}}}]
        assert (lines[-1]["done_reason"], lines[-1]["prompt_eval_count"], lines[-1]["eval_count"]) == (
            "stop",
            7,
            7,
        )
        whole = json.loads((await ask(client, url, "/api/chat"))[2])
        assert (
            whole["message"]["content"] == "So!"
            and whole["message"]["thinking"] == "Hmm"
            and len(whole["message"]["tool_calls"]) == 2
        )
        async with client.post(url + "/api/chat", json=BODIES[CHAT]) as response:
            assert response.headers["Content-Type"] == "application/x-ndjson"
        for path in ("/api/chat", "/api/generate"):
            async with client.post(url + path, json={"model": "fake-model:latest"}) as response:
                assert (await response.json())["done_reason"] == "load"


async def test_ollama_s_bodies_are_requests(client):
    pool = FakePool()
    async with serving(pool) as url:
        options = {"temperature": 0.5, "num_predict": -2, "stop": "x", "repeat_penalty": 1.5, "num_ctx": 9}
        assert (await ask(client, url, "/api/generate"))[0] == 200
        for path, body in (
            ("/api/chat", {}),
            ("/api/generate", {"system": "Be brief."}),
            ("/api/generate", {"raw": True}),
            ("/api/chat", {"format": "json"}),
        ):
            async with client.post(url + path, json=BODIES[path] | body | {"options": options}) as response:
                assert response.status == 200, await response.text()
    for request in pool.requests[1:]:
        assert (
            request.params.sampling.temperature,
            request.params.sampling.repetition_penalty,
            request.max_tokens,
        ) == (0.5, 1.5, None)
    assert [m.role for m in pool.requests[2].messages] == ["system", "user"] and pool.requests[3].prompts == (
        HI,
    )
    assert (
        pool.requests[4].params.grammar
        and not pool.requests[1].params.grammar
        and pool.requests[1].params.stop == ("x",)
    )


async def test_ollama_s_api_tells_of_the_model(client):
    async with serving(FakePool()) as url:
        async with client.get(url + "/api/tags") as response:
            [model] = (await response.json())["models"]
            assert model["name"] == model["model"] == "fake-model:latest" and model["size"] == 98_000_000
        async with client.get(url + "/api/version") as response:
            assert await response.json() == {"version": OLLAMA_VERSION, "chat_server": __version__}
        async with client.get(url + "/api/ps") as response:
            assert await response.json() == {"models": []}  # it has no worker
        for body in ({"model": "fake-model"}, {"name": model["name"]}):
            async with client.post(url + "/api/show", json=body) as response:
                shown = await response.json()
                assert (
                    shown["details"] == model["details"] == {
                        "parent_model": "",
                        "format": "gguf",
                        "family": "llama",
                        "families": ["llama"],
                        "parameter_size": "134.52M",
                        "quantization_level": "Q4_1",
                    }
                )
                assert shown["model_info"] == {
                    "general.architecture": "llama",
                    "general.basename": "fake-model",
                    "general.parameter_count": 134_515_008,
                    "llama.context_length": 4096,
                    "llama.embedding_length": 576,
                    "llama.block_count": 30,
                }
                assert shown["capabilities"] == ["completion", "insert"] and re.search(
                    "^temperature +0.8$", shown["parameters"], re.MULTILINE
                )
        async with client.post(url + "/api/show", json={"model": "llama3"}) as response:
            assert response.status == 404 and "llama3" in (await response.json())["error"]


def test_each_api_asks_for_thinking_in_its_words():
    options = lambda path, **body: read_answer(path, body, KNOWN).request.template_options  # noqa: E731
    question = BODIES[CHAT]["messages"]
    assert options(RESPONSES, input="x", reasoning={"effort": "low", "summary": "auto"}) == {
        "reasoning_effort": "low"
    }
    assert options(CHAT, messages=question, reasoning_effort="low") == {"reasoning_effort": "low"}
    off = {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}}
    assert options(MESSAGES, messages=question, thinking={"type": "disabled"}) == off
    assert options("/api/chat", messages=question, think=False) == off
    assert options("/api/chat", messages=question, think="high") == {"reasoning_effort": "high"}
    assert options(MESSAGES, messages=question, output_config={"effort": "high"}) == {
        "reasoning_effort": "high"
    }
    assert options(MESSAGES, messages=question) == options(RESPONSES, input="x") == {}


THOUGHTS = {  # how each API says 100 tokens, with the name of the field
    "thinking_budget": (CHAT, lambda budget: {"thinking_budget": budget}),
    "reasoning_effort": (CHAT, lambda budget: {"reasoning_effort": budget}),
    "chat_template_kwargs.thinking_budget": (
        CHAT,
        lambda budget: {"chat_template_kwargs": {"thinking_budget": budget}},
    ),
    "reasoning.max_tokens": (RESPONSES, lambda budget: {"reasoning": {"max_tokens": budget}}),
    "reasoning.effort": (RESPONSES, lambda budget: {"reasoning": {"effort": budget}}),
    "thinking.budget_tokens": (
        MESSAGES,
        lambda budget: {"thinking": {"type": "enabled", "budget_tokens": budget}},
    ),
    "output_config.effort": (MESSAGES, lambda budget: {"output_config": {"effort": budget}}),
    "think": ("/api/chat", lambda budget: {"think": budget}),
    "think of a prompt": ("/api/generate", lambda budget: {"think": budget}),
    "native thinking_budget": ("/chat/completions", lambda budget: {"thinking_budget": budget}),
    "native reasoning_effort": ("/chat/completions", lambda budget: {"reasoning_effort": budget}),
}


def asked_of(path, settings=Settings(), **body):
    return read_answer(path, BODIES[path] | body, replace(KNOWN, settings=settings)).request


@pytest.mark.parametrize("name", THOUGHTS)
def test_each_api_has_a_budget_of_thinking(name):
    """It goes from 0 to max_tokens."""
    path, said_so = THOUGHTS[name]
    most = 500 if path != "/chat/completions" else 512
    cap = {
        "/api/chat": {"options": {"num_predict": 500}},
        "/api/generate": {"options": {"num_predict": 500}},
        RESPONSES: {"max_output_tokens": 500},
        "/chat/completions": {},
    }.get(path, {"max_tokens": 500})
    for budget in (0, 100, most):
        request = asked_of(path, **said_so(budget), **cap)
        assert (
            request.params.thinking_budget == request.template_options["thinking_budget"] == budget
            and request.max_tokens == most
        )
        assert "reasoning_effort" not in request.template_options
    wrong = [most + 1, -1, 1.5] + (
        [] if "effort" in name or name.startswith("think of") or name == "think" else [True, "10", [5]]
    )
    for budget in wrong:
        with pytest.raises(RequestError) as caught:
            asked_of(path, **said_so(budget), **cap)
        # a field that takes words too names all that it takes
        assert caught.value.status == 400 and name.split()[-1 if name.startswith("native") else 0].startswith(
            caught.value.param
        )
        assert caught.value.param in str(caught.value) and re.search(
            f"0 to {most}|at least 0", str(caught.value)
        )
    assert asked_of(path, **said_so(None)).params.thinking_budget is None


def test_two_budgets_that_differ_are_refused():
    """Equal ones are one."""
    for path, body, names in (
        (CHAT, {"thinking_budget": 5, "reasoning_effort": 6}, ("thinking_budget", "reasoning_effort")),
        (
            CHAT,
            {"chat_template_kwargs": {"thinking_budget": 1}, "reasoning_effort": 0},
            ("chat_template_kwargs.thinking_budget", "reasoning_effort"),
        ),
        (
            RESPONSES,
            {"reasoning": {"max_tokens": 5, "effort": 6}},
            ("reasoning.max_tokens", "reasoning.effort"),
        ),
        (
            MESSAGES,
            {"thinking": {"type": "enabled", "budget_tokens": 5}, "output_config": {"effort": 4}},
            ("thinking.budget_tokens", "output_config.effort"),
        ),
    ):
        with pytest.raises(RequestError) as caught:
            asked_of(path, **body)
        assert (
            caught.value.status == 400
            and caught.value.param == names[1]
            and all(name in str(caught.value) for name in names)
        )
    request = asked_of(
        CHAT, thinking_budget=5, reasoning_effort=5, chat_template_kwargs={"thinking_budget": 5, "x": 1}
    )
    assert request.params.thinking_budget == 5
    words = asked_of(CHAT, thinking_budget=5, reasoning_effort="high")
    assert words.params.thinking_budget == 5 and words.template_options == {
        "reasoning_effort": "high",
        "thinking_budget": 5,
    }
    assert (
        asked_of(CHAT, reasoning={"max_tokens": -1}, think=-5).params.thinking_budget is None
    )  # other APIs' fields


@pytest.mark.parametrize("path", BODIES)
def test_a_server_s_budget_is_the_default(path):
    """It is that of requests without one."""
    settings = Settings(reasoning_budget=7, reasoning_budget_message="Enough.")
    request = asked_of(path, settings, max_tokens=5)  # it may be more than the answer has
    assert (request.params.thinking_budget, request.params.last_thought) == (
        (7, "Enough.") if request.params.chat else (None, "")
    )
    if path == CHAT:
        assert asked_of(path, settings, thinking_budget=9).params.thinking_budget == 9
        assert asked_of(path, settings, thinking_budget=0).template_options == {"thinking_budget": 0}
        assert asked_of(path, Settings(reasoning_budget=0)).params.thinking_budget == 0


async def test_the_assistant_s_last_message_is_continued(client, url, exact):
    """Anthropic's prefill is continue_final_message."""
    messages = [*BODIES[CHAT]["messages"], {"role": "assistant", "content": "The capital of"}]
    prefilled = json.loads((await ask(client, url, MESSAGES, messages=messages, temperature=0))[2])
    assert whole_text(prefilled).strip() == "Japan is Tokyo."
    counted = await ask(client, url, MESSAGES, messages=messages)
    async with client.post(url + MESSAGES + "/count_tokens", json={"messages": messages}) as response:
        usage = json.loads(counted[2])["usage"]
        assert (await response.json())["input_tokens"] == usage["input_tokens"] + usage[
            "cache_read_input_tokens"
        ]


# answers that repeat themselves


SEA = [TEMPLATE_SYSTEM, {"role": "user", "content": "Write a poem about the sea."}]


@pytest.mark.parametrize(
    "path, body, ends",
    [
        (
            CHAT,
            {"max_tokens": 300},
            lambda reply: (
                reply["choices"][0]["finish_reason"],
                reply["choices"][0]["stop_reason"],
                reply["usage"]["completion_tokens"],
            ),
        ),
        # by day test_ignored.py shows that these read the field
        pytest.param(
            RESPONSES,
            {"max_output_tokens": 300, "input": SEA},
            lambda reply: (reply["status"], "repetition", reply["usage"]["output_tokens"]),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            MESSAGES,
            {"max_tokens": 300},
            lambda reply: (reply["stop_reason"], "repetition", reply["usage"]["output_tokens"]),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "/api/chat",
            {"max_tokens": 300, "stream": False},
            lambda reply: (reply["done_reason"], "repetition", reply["eval_count"]),
            marks=pytest.mark.slow,
        ),
    ],
)
async def test_a_repeating_answer_ends_in_every_api(client, url, path, body, ends):
    """What the default model writes at temperature 0 about the sea goes round in circles after 220 tokens."""
    asked = {} if "input" in body else {"messages": SEA}
    if path == MESSAGES:
        asked = {"system": TEMPLATE_SYSTEM["content"], "messages": SEA[1:]}
    asked |= {"temperature": 0} | body
    status, _, text = await ask(client, url, path, **asked, stop_on_repetition=True)
    reason, cause, count = ends(json.loads(text))
    assert reason in ("stop", "completed", "end_turn") and cause == "repetition" and 192 < count < 300, text
    status, _, text = await ask(client, url, path, **asked)
    assert ends(json.loads(text))[2] == 300, text


# constraints in the words of vLLM and llama-server


@pytest.mark.parametrize(
    "constraint, fits",
    [
        ({"guided_choice": ["Kyoto", 'Osa"ka']}, ["Kyoto", 'Osa"ka']),
        ({"structured_outputs": {"choice": ["Kyoto"]}}, ["Kyoto"]),
        ({"guided_regex": "[0-9]{3}/[a-c]"}, None),
        ({"structured_outputs": {"regex": "[0-9]{3}/[a-c]"}}, None),
        ({"grammar": 'root ::= "Kyoto" | "Osaka"'}, ["Kyoto", "Osaka"]),
        ({"guided_grammar": 'start: "Kyoto" | "Osaka"'}, ["Kyoto", "Osaka"]),
        ({"guided_json": '{"enum": ["Kyoto"]}'}, ['"Kyoto"']),
        ({"json_schema": {"enum": ["Kyoto"]}}, ['"Kyoto"']),
        ({"structured_outputs": {"json": {"enum": ["Kyoto"]}}}, ['"Kyoto"']),
        # Lark begins a rule without ::=, also one that is to be inlined
        ({"guided_grammar": '?start: "Kyoto" | "Osaka"'}, ["Kyoto", "Osaka"]),
        ({"grammar": '// a city, not ::=\n!start: CITY\nCITY: "Kyoto"'}, ["Kyoto"]),
        ({"grammar": 'start: "Kyoto ::= x"'}, ["Kyoto ::= x"]),
        ({"grammar": '  root ::= "a" | city\ncity ::= "Kyoto"'}, ["a", "Kyoto"]),
        # guidance says the same in two fields
        (
            {"guided_grammar": 'start: "Kyoto"', "structured_outputs": {"grammar": 'start: "Kyoto"'}},
            ["Kyoto"],
        ),
        (
            {
                "guided_json": {"enum": ["Kyoto"]},
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"enum": ["Kyoto"]}},
                },
            },
            ['"Kyoto"'],
        ),
        # TGI's formats, to which huggingface_hub turns OpenAI's
        *(
            ({"response_format": value}, ['"Kyoto"'])
            for value in (
                {"type": "json_object", "value": {"enum": ["Kyoto"]}},
                {"type": "json", "value": {"enum": ["Kyoto"]}},
                {"type": "json_schema", "value": {"name": "x", "schema": {"enum": ["Kyoto"]}}},
                {"type": "json_object", "json_schema": {"schema": {"enum": ["Kyoto"]}}},
                {"type": "json_object", "schema": {"enum": ["Kyoto"]}, "value": {"enum": ["Kyoto"]}},
            )
        ),
        ({"response_format": {"type": "regex", "value": "[0-9]{3}/[a-c]"}}, None),
    ],
)
async def test_a_constraint_is_kept_in_whatever_words(client, url, tiny_url, constraint, fits):
    if (
        "guided_choice" not in constraint and "guided_regex" not in constraint
    ):  # words are read before the model has its part
        url = tiny_url
    for path in (CHAT, "/v1/completions"):
        text = whole_text(
            json.loads((await ask(client, url, path, **constraint, temperature=1, seed=1, max_tokens=20))[2])
        )
        assert text in fits if fits else re.fullmatch("[0-9]{3}/[a-c]", text), text


@pytest.mark.parametrize(
    "constraint, named",
    [
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"grammar": "hello"}, "grammar"),
        ({"grammar": "root ::= ("}, "grammar"),
        ({"guided_json": "no json"}, "guided_json"),
        ({"guided_json": "[]"}, "guided_json"),
        ({"structured_outputs": {"x": 1}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": {}, "regex": "x"}}, "structured_outputs"),
        ({"guided_choice": ["x"], "guided_regex": "x"}, "guided_choice"),
        ({"json_schema": {}, "response_format": {"type": "json_object"}}, "json_schema"),
        *(
            ({"response_format": value}, "response_format")
            for value in (
                {"type": "json_object", "value": 5},
                {"type": "json_object", "json_schema": {"name": "x"}},
                {"type": "regex", "value": {}},
                {"type": "regex"},
                {"type": "regex", "value": "("},
                {"type": "json"},
                {"type": "json_object", "value": {"enum": [1]}, "schema": {"enum": [2]}},
                {"type": "json_schema", "json_schema": {"schema": {"enum": [1]}}, "value": {"enum": [2]}},
                {"type": "grammar", "value": "x"},
            )
        ),
        (
            {"guided_grammar": 'start: "a"', "structured_outputs": {"grammar": 'start: "b"'}},
            "structured_outputs",
        ),
        ({"guided_regex": "(ab"}, "the pattern \"(ab\" cannot be read: unclosed group"),
        ({"grammar": "root ::= " + "x " * 20_000}, "grammar"),
        ({"guided_grammar": "x" * 20_000}, "guided_grammar"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ({"regex": "[0-9]"}, "regex"),
        ({"ebnf": "root ::= 1"}, "ebnf"),
        ({"structural_tag": {}}, "structural_tag"),
    ],
)
async def test_a_constraint_that_cannot_be_kept_is_400(client, constraint, named):
    async with serving(FakePool()) as url:
        for path in (CHAT, "/v1/completions"):
            status, _, text = await ask(client, url, path, **constraint)
            error = json.loads(text)["error"]
            assert status == 400 and (named in error["message"] or named in error["param"]), text
