"""`/v1/embeddings` and Ollama's `/api/embed` over the default model: the `openai` package, bodies, bounds."""

import asyncio
import base64
import json
import urllib.error
from dataclasses import replace

import numpy as np
import openai
import pytest

from chatlm.common.config import LIMITS, Settings
from chatlm.common.errors import RequestError
from chatlm.common.messages.protocol import Known, ParsedBody
from chatlm.common.messages.requests import Embedding, Finished, Request
from chatlm.front.admission.prompts import PromptMaker
from chatlm.front.api.dialects import openai as openai_dialect
from chatlm.front.api.reading import read_answer
from answers import asked, collected, ending
from fake_pool import FakePool, Letters, serving
from patching import patch
from pools import played_pool
from real_server import get, post, server
from spoken_paths import ENCODERS
from tiny_gguf import LLAMA_NUMBERS, random_llama, small_gguf_metadata, write_gguf

TEXTS = ["The cat sat on the mat.", "A kitten rested on a rug.", "Stock markets fell sharply on Monday."]


@pytest.fixture(scope="module")
def url(default_url):
    return default_url


@pytest.fixture(scope="module")
def package(url):
    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)


def embedded(url, **body):
    return json.load(post(url + "/v1/embeddings", body))


def vector_of(answer, index=0):
    return np.array(answer["data"][index]["embedding"])


def test_the_openai_package_gets_unit_vectors(package, url):
    """It asks for base64 unless it is told otherwise, and makes lists of it."""
    answer = package.embeddings.create(model="default", input=TEXTS)
    vectors = np.array([each.embedding for each in answer.data])
    assert ([each.index for each in answer.data] == [0, 1, 2]
            and (answer.object, answer.data[0].object) == ("list", "embedding"))
    assert (np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6
            and answer.model == get(url + "/v1/models")["data"][0]["id"])
    cat, kitten, markets = vectors
    assert cat @ kitten > cat @ markets + 0.1 and kitten @ markets < 0.9
    tokens = sum(len(json.load(post(url + "/tokenize", {"content": text}))["tokens"]) for text in TEXTS)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == tokens
    for text, vector in zip(TEXTS, vectors):
        [alone] = package.embeddings.create(model="default", input=text, encoding_format="float").data
        assert np.abs(np.array(alone.embedding) - vector).max() < (1e-7
            if get(url + "/stats")["row_invariant"] else 1e-3)


def test_numbers_and_base64_are_the_same_floats(url):
    numbers, packed = (embedded(url, input=TEXTS[0], encoding_format=name)["data"][0]["embedding"]
                       for name in ("float", "base64"))
    assert np.array_equal(np.array(numbers, "<f4"), np.frombuffer(base64.b64decode(packed), "<f4"))


def test_texts_and_token_ids_are_the_same_input(url):
    """They come alone or in lists."""
    ids = json.load(post(url + "/tokenize", {"content": TEXTS[0]}))["tokens"]
    wanted = vector_of(embedded(url, input=TEXTS[0]))
    for given in (ids, [ids], [TEXTS[0]], [TEXTS[0], ids], [[1], ids]):
        assert np.abs(vector_of(embedded(url, input=given), -1) - wanted).max() < 1e-3


def test_last_is_the_last_token_s_state(url):
    ids = json.load(post(url + "/tokenize", {"content": TEXTS[0]}))["tokens"]
    mean, last = (vector_of(embedded(url, input=ids, pooling=pooling)) for pooling in ("mean", "last"))
    assert mean @ last < 0.99
    assert np.abs(vector_of(embedded(url, input=[ids[0]], pooling="last")) - vector_of(
        embedded(url, input=[ids[0]]))).max() < 1e-6


def test_ollama_s_route_has_the_same_vectors(url):
    answer = json.load(post(url + "/api/embed", {"model": "default", "input": TEXTS}))
    wanted = embedded(url, input=TEXTS)
    assert np.abs(np.array(answer["embeddings"]) - [
        each["embedding"] for each in wanted["data"]]).max() < 1e-3
    assert answer["prompt_eval_count"] == wanted["usage"]["prompt_tokens"] and answer["total_duration"] > 0
    older = json.load(post(url + "/api/embeddings", {"model": "default", "prompt": TEXTS[0]}))
    vector = np.array(older["embedding"])          # Ollama scales those of its older route to no length
    assert (older.keys() == {"embedding"}
            and np.abs(vector / np.linalg.norm(vector) - answer["embeddings"][0]).max() < 1e-3)
    assert abs(np.linalg.norm(vector) - 1) > 1e-2 and abs(np.linalg.norm(answer["embeddings"][0]) - 1) < 1e-6
    assert json.load(post(url + "/api/embeddings", {"model": "default", "prompt": ""})) == {"embedding": []}


def test_ollama_s_routes_tell_of_the_default_model(url):
    [model], [loaded] = (get(url + path)["models"] for path in ("/api/tags", "/api/ps"))
    assert model["name"] == loaded["name"] == "SmolLM2-135M-Instruct.Q4_1:latest" and model["size"] > 80e6
    assert model["details"] == {"parent_model": "", "format": "gguf", "family": "llama",
                                "families": ["llama"], "parameter_size": "134.52M",
                                "quantization_level": "Q4_1"}
    assert (loaded["size"] > 80e6 and loaded["size_vram"] == 0 and loaded["expires_at"] > "2100"
            and loaded["context_length"] == 8192)
    shown = json.load(post(url + "/api/show", {"model": model["name"]}))
    assert shown["model_info"]["general.parameter_count"] == 134_515_008 and "tools" in shown["capabilities"]
    assert json.load(
        post(url + "/v1/chat/completions",
             {"model": model["name"], "messages": [{"role": "user", "content": "Hi"}],
              "max_tokens": 2}))["choices"]


@pytest.mark.parametrize("path, field",
                         [("/v1/embeddings", "input"), ("/api/embed", "input"), ("/embed", "inputs")])
@pytest.mark.parametrize("padding", ["", "x" * LIMITS.inline_bytes])
def test_only_the_model_s_own_width_is_allowed(url, path, field, padding):
    """Clients of vector databases always say it. Small bodies are read in the front, large ones in a
    sandbox."""
    body = {field: TEXTS[0], "padding": padding}
    [vector] = vectors_in(json.load(post(url + path, body)))
    assert vectors_in(json.load(post(url + path, body | {"dimensions": len(vector)}))) == [vector]
    for wrong in (len(vector) - 1, len(vector) + 1, 1):
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(url + path, body | {"dimensions": wrong})
        words = f"dimensions must be left out or {len(vector)}: a chat model's"
        assert refused.value.code == 400 and words in refused.value.read().decode()


def vectors_in(answer):
    return answer if isinstance(answer, list) else answer.get("embeddings") or [
        each["embedding"] for each in answer["data"]]


def test_the_width_is_that_of_the_model(tmp_path):
    """Kernels may compute a wider one."""
    numbers = LLAMA_NUMBERS | {"llama.embedding_length": 72, "llama.feed_forward_length": 80}
    path = write_gguf(tmp_path / "odd.gguf", random_llama(numbers=numbers), numbers,
                      small_gguf_metadata("gpt-2"))
    with server(path) as (_, url):
        [vector] = vectors_in(embedded(url, input="hello", dimensions=72))
        assert len(vector) == 72
        with pytest.raises(urllib.error.HTTPError):
            embedded(url, input="hello", dimensions=80)


def test_a_large_body_goes_through_a_sandbox(url):
    texts = [f"number {number}" for number in range(200)]
    answer = embedded(url, input=texts, padding="x" * LIMITS.inline_bytes)
    assert [each["index"] for each in answer["data"]] == list(range(200))
    assert np.abs(vector_of(answer, 199) - vector_of(embedded(url, input=texts[199]))).max() < 1e-3
    assert get(url + "/stats")["workers"][0]["running"] == get(url + "/stats")["queue_depth"] == 0


@pytest.mark.parametrize("body, param, words", [
    ({}, "input", "missing"), ({"input": ""}, "input", "empty"), ({"input": []}, "input", "2,048"),
    ({"input": [[]]}, "input", "empty"),
    ({"input": ["a", ""]}, "input", "input[1] is empty"), ({"input": ["a"] * 2049}, "input", "at most 2,048"),
    ({"input": [1, "a"]}, "input", "token ids"), ({"input": [[300]]}, "input", "0 to 256"),
    ({"input": {"text": "a"}}, "input", "a string"),
    ({"input": "a" * 4097}, "input", "4096"), ({"input": ["a", [97] * 5000]}, "input", "4096"),
    ({"input": "a", "dimensions": 256}, "dimensions", "left out or 576"),
    ({"input": "a", "pooling": "max"}, "pooling", '"mean" or "last"'),
    ({"input": "a", "encoding_format": "int8"}, "encoding_format", '"base64"'),
    ({"input": "a", "model": "gpt-4"}, "model", "fake-model"),
])
async def test_an_impossible_input_is_refused_and_named(client, body, param, words):
    class Admitting(FakePool):
        async def answer(self, request):
            request = await self.prompts.admit(request)
            async for event in super().answer(request):
                yield event

    async with serving(Admitting()) as url, client.post(url + "/v1/embeddings", json=body) as response:
        error = (await response.json())["error"]
        assert (response.status == (404 if param == "model" else 400) and error["param"] == param
                and words in error["message"])


@pytest.mark.parametrize("text", ["abc" * 2000, "x" * (3 << 16), [97] * 5000])
async def test_ollama_s_truncate_cuts_the_end_of_an_input(client, text):
    """It is on by default; false refuses such an input, and so does /v1/embeddings, which does not know the
    field."""
    admitted = []

    class Admitting(FakePool):
        async def answer(self, request):
            admitted.append(await self.prompts.admit(request) if request.prompt_ids is None else request)
            async for event in super().answer(admitted[-1]):
                yield event

    start = tuple(text[:4096]) if isinstance(text, list) else tuple(FakePool.tokenizer.encode_prompt(
        text[:4096]))[:4096]
    async with serving(Admitting()) as url:
        for path, changes, status in (("/api/embed", {}, 200), ("/api/embed", {"truncate": True}, 200),
                                      ("/api/embed", {"truncate": False}, 400),
                                      ("/v1/embeddings", {"truncate": True}, 400)):
            async with client.post(url + path, json={"input": [text, "short"], **changes}) as response:
                assert response.status == status and (status == 200 or "4096" in await response.text())
        async with client.post(url + "/api/embed", json={"input": "a", "truncate": "oldest"}) as response:
            assert response.status == 400 and "truncate" in await response.text()
    assert (len(admitted) == 2
            and all(each.prompt_ids[0] == start and len(each.prompt_ids[1]) < 10 for each in admitted))


@pytest.mark.slow
def test_the_default_model_embeds_a_long_start(default_model_path):
    """It embeds the start of a long input."""
    with server(default_model_path, "--context-length", 256) as (_, url):
        ids = json.load(post(url + "/tokenize", {"content": "The river runs. " * 200}))["tokens"]
        cut, wanted = (json.load(post(url + "/api/embed", {"input": [given]})) for given in (ids, ids[:256]))
    assert len(ids) > 256 == cut["prompt_eval_count"]
    assert np.abs(np.array(cut["embeddings"]) - wanted["embeddings"]).max() < 1e-3


def test_a_whole_context_is_one_input(url):
    length = get(url + "/stats")["context_length"]
    maker = PromptMaker(FakePool.tokenizer, length)
    request = asked(pooling="mean")
    assert maker.answer_length(request, (1,) * length) == 0
    with pytest.raises(RequestError, match=f"{length + 1} tokens"):
        maker.answer_length(request, (1,) * (length + 1))


async def test_many_inputs_leave_room_in_the_queue():
    """At most LIMITS.choices of a request wait or run at a time."""
    pool = played_pool(max_batch=4)
    parsed = read_answer("/v1/embeddings", {"input": ["a"] * 1000}, Known(Settings(), None))
    events = pool.answer(
        replace(parsed.request, id="many", params=replace(parsed.request.params, client="a")))
    await anext(events)
    assert len(pool.dispatcher.jobs) == LIMITS.choices
    done = 0
    waiting = asyncio.create_task(anext(events))
    while done < 1000:
        for job in list(pool.workers[0].jobs.values()):
            pool.dispatcher.deliver(pool.workers[0], ending(job.worker_id, Embedding("AACAPw==")))
            for _ in range(2):
                event = await waiting
                waiting = asyncio.create_task(anext(events, None))
            done += isinstance(event, Finished)
            assert len(pool.dispatcher.jobs) <= LIMITS.choices
    assert await waiting is None and not pool.dispatcher.jobs and not len(pool.dispatcher.pending)


def test_an_encoder_makes_no_decoder(monkeypatch):
    """It makes vectors or scores; and one of chats makes a decoder only where it needs that."""
    def refuse(*arguments):
        raise AssertionError("a decoder was made")
    patch(monkeypatch, openai_dialect, "answer_decoder", refuse)
    for api in ("embeddings", "ollama embed", "ollama embeddings", "tei embed", "rerank", "llama rerank",
                "tei rerank", "score", "cosines"):
        encoder = ENCODERS[api](
            ParsedBody(Request("x", prompts=("a", "b")), kind=api, details={"encoding": "base64"}), "m",
            Letters())
        collected(encoder, Embedding("AACAPw==", choice=1))
    encoder = ENCODERS["completion"](ParsedBody(Request("x", prompts=("a",)), kind="completion"), "m", Letters())
    with pytest.raises(AssertionError, match="a decoder"):
        assert encoder.choices[0].decoder
