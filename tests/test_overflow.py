"""Contexts and memory that are too small: one request is refused, shortened, preempted or failed, never the server."""

import asyncio
import sys
import threading

import aiohttp
import pytest

import chat_server
from chat_server import Finished, LocalPool, Message, PAGE_SIZE, Piece, Request, RequestError, SamplingParams, Settings
from engines import load
from fake_pool import FakePool, conversation, frames, serving
from pools import DYING, idle

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
async def start_pool(nanochat_fixtures):
    pools = []

    async def start(worker_command=DYING, **changes):
        settings = Settings(model=str(nanochat_fixtures / "gen5"), dtype="float32", **changes)
        pools.append(pool := LocalPool(settings, worker_command=worker_command))
        await pool.start()
        await pool.wait_ready()
        return pool

    yield start
    for pool in pools:
        await pool.close()


async def answer(pool, request):
    """(text, tokens, Finished)"""
    text, tokens, last = "", [], None
    async for last in pool.answer(request):
        if isinstance(last, Piece):
            text, tokens = text + last.text, [*tokens, *last.tokens]
    assert isinstance(last, Finished)
    return text, tokens, last


def talk(*turns, system=None):
    """user, assistant, user ... of one character a token, so that lengths can be counted."""
    messages = [Message("user" if index % 2 == 0 else "assistant", text) for index, text in enumerate(turns)]
    return tuple([Message("system", system)] * bool(system) + messages)


def tokens_of(pool, messages):
    return len(pool.tokenizer.render(messages))


async def test_a_conversation_that_is_too_long_is_refused_with_both_numbers_or_loses_its_oldest_turns(start_pool):
    pool = await start_pool(context_length=128)
    messages = talk("q" * 40, "a" * 30, "r" * 40, "b" * 20, "last?", system="Rule!")
    greedy = SamplingParams(temperature=0.0)
    with pytest.raises(RequestError, match=f"has {tokens_of(pool, messages)} tokens and the context holds 128") as refused:
        await answer(pool, Request("a", messages, sampling=greedy))
    assert refused.value.code == "context_length_exceeded"
    _, tokens, done = await answer(pool, Request("b", messages, sampling=greedy, max_tokens=8, truncate=True))
    kept = (messages[0], *messages[3:])
    assert done.dropped_messages == 2 and done.prompt_tokens == tokens_of(pool, kept)
    assert tokens == (await answer(pool, Request("c", kept, sampling=greedy, max_tokens=8)))[1]


TRUNCATIONS = (         # turns, max_tokens, messages that must go from a context of 128
    (["q" * 20, "a" * 20, "last?"], 8, 0),                  # fits
    (["q" * 60, "a" * 40, "last?"], 8, 0),                  # with room for max_tokens
    (["q" * 60, "a" * 40, "last?"], None, 2),               # ... but not for a quarter of the context
    (["q" * 30, "a" * 30, "r" * 30, "b" * 30, "last?"], 8, 2),
    (["q" * 30, "a" * 30, "r" * 30, "b" * 30, "s" * 30, "c" * 30, "last?"], 8, 4),
    (["q" * 300, "a" * 2, "r", "b", "last?"], 8, 2),
    (["q", "a" * 2, "r", "b" * 300, "last?"], 8, 4),
    (["q", "a" * 2, "r" * 100, "b", "l" * 100], 100, 4),    # the last message leaves less room than that, and stays
)


async def test_whole_turns_go_and_no_more_than_needed(start_pool):
    pool = await start_pool(context_length=128)
    for number, (turns, max_tokens, dropped) in enumerate(TRUNCATIONS):
        _, _, done = await answer(pool, Request(f"a{number}", talk(*turns), max_tokens=max_tokens, truncate=True))
        assert (done.dropped_messages, done.prompt_tokens) == (dropped, tokens_of(pool, talk(*turns)[dropped:])), turns


async def test_a_last_message_that_is_too_long_alone_is_refused_even_so(start_pool):
    pool = await start_pool(context_length=128)
    messages = talk("q" * 30, "a" * 30, "l" * 200)
    with pytest.raises(RequestError, match=f"has {tokens_of(pool, messages[2:])} tokens and the context holds 128"):
        await answer(pool, Request("a", messages, truncate=True))
    with pytest.raises(RequestError, match="context holds 128"):
        await answer(pool, Request("b", prompts=("x" * 200,), truncate=True))       # there are no turns


@pytest.mark.parametrize("truncate", [False, True])
async def test_more_messages_than_the_context_has_tokens_never_reach_the_template(start_pool, monkeypatch, truncate):
    pool = await start_pool(context_length=128)
    monkeypatch.setattr(pool.tokenizer, "render", None)
    with pytest.raises(RequestError, match="has 129 messages and the context holds 128 tokens") as refused:
        await answer(pool, Request("a", talk(*[""] * 129), truncate=truncate))
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")


async def test_many_short_messages_and_tools_are_rendered_off_the_event_loop(start_pool, monkeypatch):
    pool = await start_pool()
    threads, render = [], pool.tokenizer.render

    def watched(messages, tools=()):
        threads.append(threading.current_thread() is threading.main_thread())
        return render(messages)

    monkeypatch.setattr(pool.tokenizer, "render", watched)
    for number, (turns, tools) in enumerate((([""], ()), ([""] * 101, ()), ([""], ({"type": "function"},)))):
        await answer(pool, Request(f"a{number}", talk(*turns), tools=tools, max_tokens=1))
    assert threads == [True, False, False]


async def test_what_was_dropped_is_said_in_the_answer():
    class Dropping(FakePool):
        async def answer(self, request):
            async for event in super().answer(request):
                dropped = 2 * request.truncate
                yield chat_server.replace(event, dropped_messages=dropped) if isinstance(event, Finished) else event

    async with serving(Dropping()) as url, aiohttp.ClientSession() as client:
        for truncate, said in (("oldest", 2), ("none", None), (None, None)):
            body = conversation() | {"truncate": truncate}
            native = frames(await (await client.post(url + "/chat/completions", json=body)).read())[-1]
            whole = await (await client.post(url + "/v1/chat/completions", json=body)).json()
            chunks = frames(await (await client.post(url + "/v1/chat/completions", json=body | {"stream": True})).read())
            assert [each["timings"].get("dropped_messages") for each in (native, whole, chunks[-2])] == [said] * 3
        assert (await client.post(url + "/chat/completions", json=conversation() | {"truncate": "newest"})).status == 400


async def test_with_hardly_any_kv_memory_every_answer_under_load_is_as_alone(start_pool, nanochat_fixtures):
    roomy = await start_pool(worker_command=(sys.executable, chat_server.__file__))         # many pages: slow to walk
    model = load(nanochat_fixtures / "gen5")
    pool = await start_pool(kv_cache_memory=20 * chat_server.Transformer.page_bytes(model.spec, model.dtype), max_batch=8)
    assert pool.context_length == 20 * PAGE_SIZE
    requests = [Request(f"r{i}", prompts=(tuple(range(i, 120 + 10 * i)),), max_tokens=60 + 5 * i, ignore_eos=True,
                        sampling=SamplingParams(temperature=0.9, seed=i)) for i in range(8)]
    alone = [await answer(roomy, request) for request in requests]
    vanishing = [asyncio.ensure_future(leave_after(pool, chat_server.replace(request, id=f"v{i}"), 3 * i))
                 for i, request in enumerate(requests)]
    together = await asyncio.gather(*(answer(pool, request) for request in requests))
    await asyncio.gather(*vanishing)
    assert [each[:2] for each in together] == [each[:2] for each in alone]
    with pytest.raises(RequestError, match="has 320 tokens and the context holds 320"):
        await answer(pool, Request("too long", prompts=(tuple([5] * 320),)))
    await idle(pool)
    assert pool.workers[0].gauges["preemptions"] > 0 and pool.workers[0].restarts == 0


async def leave_after(pool, request, pieces):
    stream = pool.answer(request)
    for _ in range(pieces + 1):
        await anext(stream)
    await stream.aclose()


async def test_memory_that_runs_out_in_a_step_costs_few_requests_and_no_worker(start_pool):
    pool = await start_pool()
    requests = [Request(f"crowd-{i}", prompts=((5, 6, i),), max_tokens=30, ignore_eos=True) for i in range(5)]
    got = await asyncio.gather(*(answer(pool, request) for request in requests), return_exceptions=True)
    failed = [each for each in got if isinstance(each, Exception)]
    assert len(failed) <= 2 and all("MemoryError" in str(each) for each in failed)      # three fit at once
    assert [len(each[1]) for each in got if each not in failed] == [30] * (5 - len(failed))
    assert pool.workers[0].restarts == 0 and pool.workers[0].state == "ready"
    await idle(pool)


async def test_a_text_far_beyond_the_context_is_refused_before_all_of_it_is_tokenized(start_pool, monkeypatch):
    pool = await start_pool(context_length=128)
    taken, encode = [], pool.tokenizer.encode
    monkeypatch.setattr(pool.tokenizer, "encode", lambda text: taken.append(len(text)) or encode(text))
    long = "why? " * 1_000_000
    for request in (Request("a", talk(long)), Request("b", talk("q", "a", long), truncate=True), Request("c", None, (long,))):
        with pytest.raises(RequestError, match="more than .* tokens and the context holds 128") as refused:
            await answer(pool, request)
        assert refused.value.code == "context_length_exceeded" and refused.value.param == ("prompt" if request.prompts else "messages")
    _, _, done = await answer(pool, Request("d", talk(long, "a", "last?"), max_tokens=8, truncate=True))
    assert done.dropped_messages == 2
    assert max(taken) == LocalPool.SLICE_CHARACTERS and sum(taken) < 10 * LocalPool.SLICE_CHARACTERS
