"""Too little context or memory: a request is refused, shortened, preempted or failed, and the server goes
on."""

import asyncio
import threading
from dataclasses import replace

import aiohttp
import pytest

from chatlm.common.config import PAGE_SIZE
from chatlm.common.errors import RequestError
from chatlm.common.messages.requests import Finished, Message, SamplingParams
from chatlm.front.admission.prompts import PromptMaker
from answers import asked
from fake_pool import FakePool, conversation, frames, serving
from pools import collect, idle

pytestmark = pytest.mark.timeout(120)


def talk(*turns, system=None):
    """Alternating user and assistant messages; a character is a token, so lengths can be counted."""
    messages = [Message("user" if index % 2 == 0 else "assistant", text) for index, text in enumerate(turns)]
    return tuple([Message("system", system)] * bool(system) + messages)


def tokens_of(pool, messages):
    return len(pool.tokenizer.render(messages))


async def test_a_too_long_conversation_is_refused_or_cut(start_pool):
    """The error has both numbers; else the oldest turns go."""
    pool = await start_pool(context_length=128)
    messages = talk("q" * 40, "a" * 30, "r" * 40, "b" * 20, "last?", system="Rule!")
    greedy = SamplingParams(temperature=0.0)
    with pytest.raises(RequestError, match=f"is 128 tokens. However, your messages resulted in {tokens_of(pool, messages)} tokens") as refused:
        await collect(pool, asked("a", messages, sampling=greedy))
    assert refused.value.code == "context_length_exceeded"
    _, tokens, done = await collect(pool, asked("b", messages, sampling=greedy, max_tokens=8, truncate=True))
    kept = (messages[0], *messages[3:])
    assert done.dropped_messages == 2 and done.usage.prompt_tokens == tokens_of(pool, kept)
    assert tokens == (await collect(pool, asked("c", kept, sampling=greedy, max_tokens=8)))[1]


TRUNCATIONS = (         # turns, max_tokens, messages that must be dropped for a context of 128
    (["q" * 20, "a" * 20, "last?"], 8, 0),                  # fits
    (["q" * 60, "a" * 40, "last?"], 8, 0),                  # with room for max_tokens
    (["q" * 60, "a" * 40, "last?"], None, 2),               # ... but not for a quarter of the context
    (["q" * 30, "a" * 30, "r" * 30, "b" * 30, "last?"], 8, 2),
    (["q" * 30, "a" * 30, "r" * 30, "b" * 30, "s" * 30, "c" * 30, "last?"], 8, 4),
    (["q" * 300, "a" * 2, "r", "b", "last?"], 8, 2),
    (["q", "a" * 2, "r", "b" * 300, "last?"], 8, 4),
    # the last message leaves less room than that, but is never dropped
    (["q", "a" * 2, "r" * 100, "b", "l" * 100], 100, 4),
)


async def test_whole_turns_go_and_no_more_than_needed(start_pool):
    pool = await start_pool(context_length=128)
    for number, (turns, max_tokens, dropped) in enumerate(TRUNCATIONS):
        _, _, done = await collect(pool, asked(f"a{number}", talk(*turns), max_tokens=max_tokens, truncate=True))
        assert (done.dropped_messages, done.usage.prompt_tokens) == (dropped, tokens_of(pool, talk(*turns)[dropped:])), turns


async def test_a_last_message_too_long_alone_is_refused(start_pool):
    """Even dropping turns does not help."""
    pool = await start_pool(context_length=128)
    messages = talk("q" * 30, "a" * 30, "l" * 200)
    with pytest.raises(RequestError, match=f"is 128 tokens. However, your messages resulted in {tokens_of(pool, messages[2:])} tokens"):
        await collect(pool, asked("a", messages, truncate=True))
    with pytest.raises(RequestError, match="context length is 128 tokens"):
        await collect(pool, asked("b", prompts=("x" * 200,), truncate=True))       # there are no turns


@pytest.mark.parametrize("truncate", [False, True])
async def test_too_many_messages_never_reach_the_template(start_pool, monkeypatch, truncate):
    """They are more than the context has tokens."""
    pool = await start_pool(context_length=128)
    monkeypatch.setattr(pool.tokenizer, "render", None)
    with pytest.raises(RequestError, match="is 128 tokens. However, your messages resulted in at least 129 tokens") as refused:
        await collect(pool, asked("a", talk(*[""] * 129), truncate=truncate))
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")


async def test_short_messages_are_rendered_off_the_loop(start_pool, monkeypatch):
    """There are many of them."""
    pool = await start_pool()
    threads, render = [], pool.tokenizer.render

    def watched(messages, tools=(), options=None):
        threads.append(threading.current_thread() is threading.main_thread())
        return render(messages)

    monkeypatch.setattr(pool.tokenizer, "render", watched)
    for number, turns in enumerate(([""], [""] * 101)):
        await collect(pool, asked(f"a{number}", talk(*turns), max_tokens=1))
    assert threads == [True, False]


async def test_what_was_dropped_is_said_in_the_answer():
    class Dropping(FakePool):
        async def answer(self, request):
            async for event in super().answer(request):
                dropped = 2 * request.truncate
                yield replace(event, dropped_messages=dropped) if isinstance(event, Finished) else event

    async with serving(Dropping()) as url, aiohttp.ClientSession() as client:
        for truncate, said in (("oldest", 2), ("none", None), (None, None)):
            body = conversation() | {"truncate": truncate}
            native = frames(await (await client.post(url + "/chat/completions", json=body)).read())[-1]
            whole = await (await client.post(url + "/v1/chat/completions", json=body)).json()
            chunks = frames(await (await client.post(url + "/v1/chat/completions", json=body | {"stream": True})).read())
            assert [each["timings"].get("dropped_messages") for each in (native, whole, chunks[-2])] == [said] * 3
        assert (await client.post(url + "/chat/completions", json=conversation() | {"truncate": "newest"})).status == 400


def spoken(*turns, system=None):
    """The messages of a body of the native API; turns are texts, or numbers of characters."""
    texts = ["x" * turn if isinstance(turn, int) else turn for turn in turns]
    return [{"role": message.role, "content": message.content} for message in talk(*texts, system=system)]


NATIVE_TRUNCATIONS = (      # system message, turns, the messages that are dropped
    (None, [10, 9000, "last?"], 0),                         # an answer may be long
    (None, [9000, 10, 10, 10, "last?"], 2),                 # a question may not
    # ... and none in the middle is dropped, since a conversation has no holes
    ("Rule!", [10, 10, 9000, 10, 10, 10, "last?"], 4),
    (None, [8000, 10, 8000, 16000, "last?"], 2),            # 32,015 characters in all
    (None, [10, 33000, "last?"], 2),
    (None, [10, 31985, "last?"], 0), ("Rule!", [10, 31980, "last?"], 0),
    (None, [10, 31986, "last?"], 2), ("Rule!", [10, 31981, "last?"], 2),
    (None, [1] * 499, 0), ("Rule!", [1] * 499, 0), (None, [1] * 501, 2), ("Rule!", [1] * 501, 2),
    (None, [1] * 502, 2), ("Rule!", [1] * 502, 4), (None, [1] * 1001, 502),
)


@pytest.mark.parametrize("system, turns, dropped", NATIVE_TRUNCATIONS, ids=range(len(NATIVE_TRUNCATIONS)))
async def test_native_limits_hold_for_truncated_chats(system, turns, dropped):
    """They hold for what truncation leaves."""
    messages = spoken(*turns, system=system)
    async with serving(pool := FakePool()) as url, aiohttp.ClientSession() as client:
        response = await client.post(url + "/chat/completions", json={"messages": messages, "truncate": "oldest"})
        assert response.status == 200, await response.text()
    kept = [{"role": message.role, "content": message.content} for message in pool.requests[0].messages]
    assert kept == messages[:len(messages) - len(turns)] + messages[len(messages) - len(turns) + dropped:]
    assert pool.requests[0].dropped_messages == dropped


async def test_system_and_last_turn_are_never_truncated():
    system = {"role": "system", "content": "Rule!"}
    between = [*spoken("q", 33000), system, *spoken("last?", "I think")]
    async with serving(pool := FakePool()) as url, aiohttp.ClientSession() as client:
        async def refusal(messages, truncate="oldest"):
            response = await client.post(url + "/chat/completions", json={"messages": messages, "truncate": truncate})
            return "" if response.status == 200 else (await response.json())["detail"]

        assert await refusal(between) == ""
        assert [message.content for message in pool.requests[-1].messages] == ["Rule!", "last?", "I think"]
        for messages, said in (
                (spoken("q", "a", 8001), "messages[2]: 8001 given, at most 8000"),
                (spoken("q", "a", "last?", system="r" * 8001), "messages[0]: 8001 given, at most 8000"),
                (spoken("q", "a", "last?", 32000), "characters in all messages: 32005 given, at most 32000"),
                ([system] * 500 + spoken("q", "a", "last?"), "messages: 501 given, at most 500"),
                (spoken(*[""] * 10001), "messages: 10001 given, at most 10000"),
                ([{"role": "robot", "content": ""}, *spoken(*[""] * 600)], "messages[0].role must be one of")):
            assert said in await refusal(messages)
        assert "messages: 501 given, at most 500" in await refusal(spoken(*[""] * 501), "none")


async def test_limits_and_context_say_their_cuts_together(start_pool):
    """What the limits drop and what the context drops is said together."""
    pool = await start_pool(context_length=128)
    async with serving(pool) as url, aiohttp.ClientSession() as client:
        body = {"messages": spoken(9000, 10, 60, 40, "last?"), "truncate": "oldest", "temperature": 0, "max_tokens": 8}
        said = frames(await (await client.post(url + "/chat/completions", json=body)).read())[-1]
        assert said["timings"]["dropped_messages"] == 2 and said["usage"]["prompt_tokens"] > 100
        body["messages"] = spoken(9000, 10, 160, 40, "last?")
        said = frames(await (await client.post(url + "/chat/completions", json=body)).read())[-1]
        assert said["timings"]["dropped_messages"] == 4


async def test_with_little_kv_memory_answers_are_as_alone(start_pool):
    """There is hardly any, and load."""
    roomy = await start_pool()
    pool = await start_pool(kv_cache_memory=18 * 16_384, max_batch=8)
    assert pool.context_length == 18 * PAGE_SIZE
    requests = [asked(f"r{i}", prompts=(tuple(range(i, 120 + 10 * i)),), max_tokens=60 + 5 * i, ignore_eos=True,
                        sampling=SamplingParams(temperature=0.9, seed=i)) for i in range(8)]
    alone = [await collect(roomy, request) for request in requests]
    vanishing = [asyncio.ensure_future(leave_after(pool, replace(request, id=f"v{i}"), 3 * i))
                 for i, request in enumerate(requests)]
    together = await asyncio.gather(*(collect(pool, request) for request in requests))
    await asyncio.gather(*vanishing)
    assert [each[:2] for each in together] == [each[:2] for each in alone]
    with pytest.raises(RequestError, match="is 288 tokens. However, your prompt resulted in 288 tokens, which leaves no room"):
        await collect(pool, asked("too long", prompts=(tuple([5] * 288),)))
    await idle(pool)
    assert pool.workers[0].gauges["preemptions"] > 0 and pool.workers[0].restarts == 0


async def leave_after(pool, request, pieces):
    stream = pool.answer(request)
    for _ in range(pieces + 1):
        await anext(stream)
    await stream.aclose()


async def test_memory_lost_in_a_step_costs_few_requests(start_pool):
    """It costs no worker."""
    pool = await start_pool()
    requests = [asked(f"crowd-{i}", prompts=((5, 6, i),), max_tokens=30, ignore_eos=True) for i in range(5)]
    got = await asyncio.gather(*(collect(pool, request) for request in requests), return_exceptions=True)
    failed = [each for each in got if isinstance(each, Exception)]
    assert len(failed) <= 2 and all("MemoryError" in str(each) for each in failed)      # three fit at once
    assert [len(each[1]) for each in got if each not in failed] == [30] * (5 - len(failed))
    assert pool.workers[0].restarts == 0 and pool.workers[0].state == "ready"
    await idle(pool)


async def test_a_vast_text_is_refused_untokenized(start_pool, monkeypatch):
    """It is far beyond the context; not all of it is tokenized."""
    pool = await start_pool(context_length=128)
    taken, encode = [], pool.tokenizer.encode
    monkeypatch.setattr(pool.tokenizer, "encode", lambda text: taken.append(len(text)) or encode(text))
    long = "why? " * 1_000_000
    for request in (asked("a", talk(long)), asked("b", talk("q", "a", long), truncate=True), asked("c", None, (long,))):
        with pytest.raises(RequestError, match="is 128 tokens. However, your .* resulted in more than .* tokens") as refused:
            await collect(pool, request)
        assert refused.value.code == "context_length_exceeded" and refused.value.param == ("prompt" if request.prompts else "messages")
    _, _, done = await collect(pool, asked("d", talk(long, "a", "last?"), max_tokens=8, truncate=True))
    assert done.dropped_messages == 2
    assert max(taken) == PromptMaker.SLICE_CHARACTERS and sum(taken) < 10 * PromptMaker.SLICE_CHARACTERS
