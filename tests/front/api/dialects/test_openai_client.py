"""The real `openai` package against the real routes, over a pool without a model."""

import asyncio
import threading

import openai
import pytest
import pytest_asyncio

from chatlm.common.errors import EngineFailure, Overloaded, RequestError
from chatlm.common.messages.requests import PromptScores, TokenLogprob
from answers import said
from fake_pool import FakePool, Letters, serving

HI = [{"role": "user", "content": "Hi"}]


@pytest_asyncio.fixture
async def pool():
    yield FakePool()


@pytest_asyncio.fixture
async def client(pool):
    async with serving(pool) as url, openai.AsyncOpenAI(
        base_url=url + "/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_a_completion_parses(client):
    answer = await client.chat.completions.create(model="fake-model", messages=HI, seed=3, temperature=0)
    assert (answer.choices[0].message.content, answer.choices[0].message.role) == (
        "Hello, world!", "assistant")
    assert (answer.choices[0].finish_reason, answer.usage.total_tokens) == ("stop", 10)
    assert answer.usage.prompt_tokens_details.cached_tokens == 3 and answer.seed == 3


async def test_a_stream_parses_and_has_usage_when_asked(client):
    stream = await client.chat.completions.create(
        model="fake-model", messages=HI, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks
                   if chunk.choices) == "Hello, world!"
    assert [chunk.choices[0].delta.role for chunk in chunks
            if chunk.choices] == ["assistant"] + [None] * (len(chunks) - 2)
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage.completion_tokens == 3 and chunks[-2].choices[0].finish_reason == "stop"


async def test_the_stream_helper_accumulates_the_answer(client):
    async with client.chat.completions.stream(model="fake-model", messages=HI) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "Hello, world!"


async def test_extra_parameters_pass(client, pool):
    await client.chat.completions.create(model="fake-model", messages=HI, max_completion_tokens=4, stop=["x"],
                                         extra_body={"ignore_eos": True, "top_k": 5})
    request = pool.requests[0]
    assert (request.max_tokens, request.params.stop, request.params.ignore_eos,
            request.params.sampling.top_k) == (4, ("x",), True, 5)


async def test_choices_and_logprobs_parse_everywhere(client, pool):
    """They parse in streams and whole."""
    entry = TokenLogprob(72, -0.5, ((72, -0.5), (105, -1.25)))
    pool.pieces = [said("H", tokens=(72,), logprobs=(entry,)),
                   said("i", tokens=(105,), logprobs=(TokenLogprob(105, -2.0),))]
    wanted = dict(model="fake-model", messages=HI, n=2, logprobs=True, top_logprobs=2)
    answer = await client.chat.completions.create(**wanted)
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [(0, "Hi"), (1, "Hi")]
    first, second = answer.choices[1].logprobs.content
    assert (first.token, first.logprob, first.bytes) == ("H", -0.5, [72]) and second.top_logprobs == []
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("H", -0.5), ("i", -1.25)]
    assert answer.usage.prompt_tokens == 7 and answer.usage.completion_tokens == 4
    chunks = [chunk async for chunk in await client.chat.completions.create(stream=True, **wanted)]
    streamed = [(choice.index, entry.token) for chunk in chunks for choice in chunk.choices if choice.logprobs
                for entry in choice.logprobs.content]
    assert sorted(streamed) == [(0, "H"), (0, "i"), (1, "H"), (1, "i")]


async def test_text_completions_parse_with_logprobs(client, pool):
    """They have an echo."""
    scores = (TokenLogprob(79, None), TokenLogprob(240, -1.0, ((240, -1.0),)))
    pool.pieces = [PromptScores(scores[:1]), PromptScores(scores[1:]),
                   said("!", tokens=(33,), logprobs=(TokenLogprob(33, -0.25),))]
    answer = await client.completions.create(
        model="fake-model", prompt=["Oh", [79, 240]], echo=True, logprobs=1, max_tokens=1)
    assert [choice.text for choice in answer.choices] == ["Oh!", "O\ufffd!"]
    found = answer.choices[1].logprobs
    assert found.tokens == ["O", "bytes:\\xf0", "!"] and found.token_logprobs == [None, -1.0, -0.25]
    assert (found.top_logprobs == [None, {"bytes:\\xf0": -1.0}, {"!": -0.25}]
            and found.text_offset == [0, 1, 1])
    chunks = [chunk async for chunk in await client.completions.create(model="", prompt="Oh", stream=True)]
    assert ("".join(chunk.choices[0].text for chunk in chunks) == "!"
            and chunks[-1].choices[0].finish_reason == "stop")


async def test_the_stream_helper_accumulates_tool_calls(client, pool):
    pool.tokenizer = Letters()
    pool.tokenizer.tool_format = "tagged"
    pool.pieces = ["Sure.", '<tool_call>{"name": "f", ', '"arguments": {"x"', ": ", "1}", "}</tool_call>"]
    tools = [{"type": "function",
              "function": {"name": "f",
                           "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}}]
    async with client.chat.completions.stream(model="fake-model", messages=HI, tools=tools) as stream:
        final = await stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments, call.type) == ("f", '{"x": 1}', "function")
    assert final.choices[0].finish_reason == "tool_calls" and final.choices[0].message.content == "Sure."
    again = await client.chat.completions.create(model="fake-model", tools=tools, messages=[
        *HI, final.choices[0].message.to_dict(), {"role": "tool", "tool_call_id": call.id, "content": "2"}])
    assert (again.choices[0].finish_reason == "tool_calls"
            and pool.requests[-1].messages[1].more["tool_calls"][0]["id"] == call.id)


async def test_models_list_and_retrieve(client):
    models = [model async for model in client.models.list()]
    assert [model.id for model in models] == ["fake-model"]
    assert (await client.models.retrieve("fake-model")).created == models[0].created


@pytest.mark.parametrize("error, raised", [
    (RequestError("too long", code="context_length_exceeded"), openai.BadRequestError),
    (Overloaded("slow down", status=429), openai.RateLimitError),
    (EngineFailure("broken"), openai.InternalServerError)])
async def test_refusals_are_the_package_s_own_errors(client, pool, error, raised):
    pool.refuse = error
    with pytest.raises(raised) as caught:
        await client.chat.completions.create(model="fake-model", messages=HI, stream=True)
    assert caught.value.code == error.code and caught.value.body["message"] == str(error)


async def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="gpt-4", messages=HI)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_an_error_in_the_stream_is_raised(client, pool):
    """It is not swallowed."""
    pool.pieces = ["Hel", EngineFailure("a worker died")]
    stream = await client.chat.completions.create(model="fake-model", messages=HI, stream=True)
    texts = []
    with pytest.raises(openai.APIError, match="a worker died"):
        async for chunk in stream:
            texts.append(chunk.choices[0].delta.content)
    assert texts == ["", "Hel"]


async def test_closing_a_stream_ends_the_work(client, pool):
    pool.gate = asyncio.Event()
    stream = await client.chat.completions.create(model="fake-model", messages=HI, stream=True)
    await pool.until_open(1)
    await stream.close()
    await pool.until_open(0)


def test_the_synchronous_client_works_too():
    ready, leave, address = threading.Event(), asyncio.Event(), []

    async def serve():
        async with serving(FakePool()) as url:
            address.extend([url, asyncio.get_running_loop()])
            ready.set()
            await leave.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(20)
        with openai.OpenAI(base_url=address[0] + "/v1", api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(model="", messages=HI)
            pieces = [chunk.choices[0].delta.content or ""
                      for chunk in client.chat.completions.create(model="default", messages=HI, stream=True)]
        assert whole.choices[0].message.content == "".join(pieces) == "Hello, world!"
    finally:
        address[1].call_soon_threadsafe(leave.set)
        thread.join()
