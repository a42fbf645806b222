"""The real `openai` package against the real routes, over a pool without a model."""

import asyncio
import threading

import openai
import pytest
import pytest_asyncio

from chat_server import EngineFailure, Overloaded, RequestError
from fake_pool import FakePool, serving

HI = [{"role": "user", "content": "Hi"}]


@pytest_asyncio.fixture
async def pool():
    yield FakePool()


@pytest_asyncio.fixture
async def client(pool):
    async with serving(pool) as url, openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_a_completion_parses(client):
    answer = await client.chat.completions.create(model="fake-model", messages=HI, seed=3, temperature=0)
    assert (answer.choices[0].message.content, answer.choices[0].message.role) == ("Hello, world!", "assistant")
    assert (answer.choices[0].finish_reason, answer.usage.total_tokens) == ("stop", 10)
    assert answer.usage.prompt_tokens_details.cached_tokens == 3 and answer.seed == 3


async def test_a_stream_parses_and_has_usage_when_asked(client):
    stream = await client.chat.completions.create(model="fake-model", messages=HI, stream=True,
                                                  stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello, world!"
    assert [chunk.choices[0].delta.role for chunk in chunks if chunk.choices] == ["assistant"] + [None] * (len(chunks) - 2)
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
    assert (request.max_tokens, request.stop, request.ignore_eos, request.sampling.top_k) == (4, ("x",), True, 5)


async def test_models_list_and_retrieve(client):
    models = [model async for model in client.models.list()]
    assert [model.id for model in models] == ["fake-model"]
    assert (await client.models.retrieve("fake-model")).created == models[0].created


@pytest.mark.parametrize("error, raised", [
    (RequestError("too long", code="context_length_exceeded"), openai.BadRequestError),
    (Overloaded("slow down", status=429), openai.RateLimitError), (EngineFailure("broken"), openai.InternalServerError)])
async def test_refusals_are_the_package_s_own_errors(client, pool, error, raised):
    pool.refuse = error
    with pytest.raises(raised) as caught:
        await client.chat.completions.create(model="fake-model", messages=HI, stream=True)
    assert caught.value.code == error.code and caught.value.body["message"] == error.message


async def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="gpt-4", messages=HI)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_an_error_in_the_stream_is_raised_not_swallowed(client, pool):
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
