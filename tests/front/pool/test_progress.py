"""What a client is told before the first token: its place in the queue, and how much of its prompt was read."""

from chatlm.common.messages.requests import Finished, Message, Piece, PromptProgress
from answers import asked
from fake_pool import frames, serving

LONG = (Message("user", "word " * 60),)


async def events_of(pool, **more):
    return [event async for event in pool.answer(asked(messages=LONG, max_tokens=3, **more))]


async def test_a_prompt_is_read_step_by_step(start_pool):
    """Only who asks is told."""
    pool = await start_pool(prefill_chunk=16)
    asked, silent = await events_of(pool, id="a", progress=True), await events_of(pool, id="b")
    told = [event for event in asked if isinstance(event, PromptProgress)]
    done = [event.prompt_tokens_done for event in told if not event.queue_position]
    assert len(done) > 2 and done == sorted(set(done)) and 0 < done[-1] < told[0].prompt_tokens == asked[0].prompt_tokens
    first = next(index for index, event in enumerate(asked) if isinstance(event, Piece))
    assert all(asked.index(event) < first for event in told) and isinstance(asked[-1], Finished)
    assert not any(isinstance(event, PromptProgress) for event in silent)
    assert [piece.text for piece in asked if isinstance(piece, Piece)]


async def test_who_waits_is_told_the_queue_position(start_pool):
    pool = await start_pool(max_batch=1, prefill_chunk=16)
    holding = pool.answer(asked(id="first", messages=(Message("user", "Hi"),), max_tokens=10_000, ignore_eos=True))
    await anext(holding)
    await anext(holding)
    waiting = [pool.answer(asked(id=name, messages=LONG, max_tokens=3, client="c", progress=True)) for name in ("second", "third")]
    for events in waiting:
        await anext(events)
    assert [(await anext(events)).queue_position for events in waiting] == [1, 2]
    await holding.aclose()
    for events in waiting:
        rest = [event async for event in events]
        assert isinstance(rest[-1], Finished) and all(event.queue_position < 2 for event in rest if isinstance(event, PromptProgress))


async def test_a_short_prompt_s_length_is_told_first(start_pool, client):
    """It is told before the first token."""
    pool = await start_pool()
    async with serving(pool) as url:
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
        got = frames(await (await client.post(url + "/v1/chat/completions", json=body | {"progress": True})).read())
        without = frames(await (await client.post(url + "/v1/chat/completions", json=body)).read())
    told = [event["progress"] for event in got if "progress" in event]
    length = next(event["usage"]["prompt_tokens"] for event in got if event != "[DONE]" and event.get("usage"))
    assert told[-1]["prompt_tokens"] == length
    assert not any("progress" in event for event in without)


async def test_both_apis_show_progress(start_pool, client):
    """A whole answer does not."""
    pool = await start_pool(prefill_chunk=16)
    async with serving(pool) as url:
        for route, more in (("/chat/completions", {}), ("/v1/chat/completions", {"stream": True})):
            content = f"{route} " * 9                  # another for each: what is cached is not read
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 3, "progress": True, "ignore_eos": True}
            got = frames(await (await client.post(url + route, json=body | more)).read())
            told = [event for event in got if "progress" in event]
            assert len(told) > 2 and told[-1]["progress"]["prompt_tokens"] > told[-1]["progress"]["prompt_tokens_done"] > 0
            assert all(event.get("choices") == ([] if more else None) for event in told)
        whole = await (await client.post(url + "/v1/chat/completions", json=body)).json()
    assert whole["choices"][0]["finish_reason"] == "length" and "progress" not in whole
