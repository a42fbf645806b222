"""Embedders and rerankers beside a chat model: every route's format, what each model can do, cuts, limits,
clients that leave, workers that die."""

import asyncio
import functools
import json
import math
import os
import signal
import socket
import tempfile
import urllib.error
from pathlib import Path

import numpy as np
import openai
import pytest
from tokenizers import Tokenizer

import families
from chatlm.common.config import LIMITS
from chatlm.common.core import decode_core
from real_server import get, post, server
from retrieval import (
    END, PROMPTS, embedder_folder, gguf_of, last_state, make_qwen, reranker_folder, score, unit,
    write_qwen_tokenizer)

DOCUMENTS = ["the sea is deep", "a cat", "markets fell on Monday"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(the embedder, the reranker, the reranker's tokenizer, the folders of both and of a chat model) of
    transformers."""
    folder = tmp_path_factory.mktemp("models")
    embedder, reranker = make_qwen(), make_qwen("Qwen3ForCausalLM", seed=1, tie_word_embeddings=True)
    chat = families.save(families.make_model("qwen2.5"), folder / "chat")
    paths = chat, embedder_folder(folder / "embedder", embedder,
                                  sentence_bert_config={"max_seq_length": 100}), reranker_folder(
                                      folder, reranker)
    return embedder, reranker, Tokenizer.from_file(str(paths[2] / "tokenizer.json")), paths


@pytest.fixture(scope="module")
def running(models):
    with server("serve", *models[3], "--max-batch", 8, "--dtype", "float32") as (process, url):
        yield process, url


@pytest.fixture(scope="module")
def url(running):
    return running[1]


def asked(url, path, **body):
    return json.load(post(url + path, body))


def refused(url, path, **body):
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(url + path, body)
    error = json.load(caught.value)["error"]
    return (caught.value.code, error if isinstance(error, str) else error["message"],
            *([] if isinstance(error, str) else [error["param"]]))


def embedded(url, **body):
    return np.array(
        [each["embedding"] for each in asked(url, "/v1/embeddings", model="embedder", **body)["data"]])


def sigmoid(logit):
    return 1 / (1 + math.exp(-logit))


def ids_of(text):
    return tokenizer_of_embedders().encode(text).ids


@functools.cache
def tokenizer_of_embedders():
    """Names of special tokens in a text are text to it, as to the server."""
    with tempfile.TemporaryDirectory() as folder:
        made = write_qwen_tokenizer(Path(folder))
    made.encode_special_tokens = True
    return made


def expected(models, text):
    return unit(last_state(models[0], ids_of(text)))


def test_vectors_are_those_of_transformers(models, url):
    """They have the prompts of the folder and the end token."""
    for text in ("a cat", "yes and no <|endoftext|>"):
        assert embedded(url, input=text)[0] @ expected(models, text) > 0.99999
        for more in ({"prompt_name": "query"}, {"input_type": "query"}, {"input_type": "search_query"}):
            assert embedded(url, input=text, **more)[0] @ expected(models, PROMPTS["query"] + text) > 0.99999
        assert embedded(url, input=text, input_type="document")[0] @ expected(models, text) > 0.99999
    ids = ids_of("a cat")
    assert embedded(url, input=ids)[0] @ unit(last_state(models[0], ids)) > 0.99999 and ids[-1] == END


def test_the_openai_package_may_cut_vectors(models, url):
    """It cuts them where the model allows it."""
    package = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    answer = package.embeddings.create(model="embedder", input=DOCUMENTS, dimensions=40)
    for each, text in zip(answer.data, DOCUMENTS, strict=True):
        assert (np.array(each.embedding) @ unit(last_state(models[0], ids_of(text))[:40]) > 0.99999
                and len(each.embedding) == 40)
    assert answer.usage.prompt_tokens == sum(len(ids_of(text)) for text in DOCUMENTS)
    with pytest.raises(openai.BadRequestError, match="dimensions must be from 32 to 64, not 31"):
        package.embeddings.create(model="embedder", input="a", dimensions=31)


def test_other_apis_have_the_same_vectors(models, url):
    wanted = embedded(url, input=DOCUMENTS)
    assert np.abs(np.array(asked(url, "/embed", model="embedder", inputs=DOCUMENTS)) - wanted).max() < 1e-6
    assert np.abs(np.array(
        asked(url, "/api/embed", model="embedder", input=DOCUMENTS)["embeddings"]) - wanted).max() < 1e-6
    cut = np.array(asked(url, "/api/embed", model="embedder", input=DOCUMENTS, dimensions=32)["embeddings"])
    assert cut.shape == (3, 32) and np.abs(np.linalg.norm(cut, axis=1) - 1).max() < 1e-6
    for raw in (asked(url, "/embed", model="embedder", inputs=DOCUMENTS[0], normalize=False)[0],
                embedded(url, input=DOCUMENTS[0], embd_normalize=-1)[0]):
        assert np.abs(np.array(raw) - last_state(models[0], ids_of(DOCUMENTS[0]))).max() < 1e-4
    for empty in ([], ""):
        answer = asked(url, "/api/embed", model="embedder", input=empty)
        assert (answer["embeddings"] == [] and answer["prompt_eval_count"] == 0
                and answer["model"] == "embedder")


def test_a_too_long_text_is_refused_or_cut(models, url):
    """The error has both numbers; a cut comes before the end token."""
    text = "x" * 300
    status, message, param = refused(url, "/v1/embeddings", model="embedder", input=["a", text])
    assert (status, param) == (400, "input")
    assert "maximum context length is 100 tokens" in message
    assert "your input[1] resulted in 301 tokens" in message
    wanted = expected(models, "x" * 99)
    for path, name, more in (("/api/embed", "input", {}), ("/embed", "inputs", {}),
                             ("/embed", "inputs", {"truncate": True})):
        answer = asked(url, path, model="embedder", **{name: [text, "a"]}, **more)
        assert np.array((answer if path == "/embed" else answer["embeddings"])[0]) @ wanted > 0.99999
        status, message, *_ = refused(url, path, model="embedder", **{name: text}, truncate=False)
        assert status == 400 and "301" in message and "100" in message


def test_documents_rank_by_transformers_scores(models, url):
    """Each API has its own format."""
    _, reranker, tokenizer, _ = models
    raw = [score(reranker, tokenizer, "what is deep?", document)[0] for document in DOCUMENTS]
    order = sorted(range(3), key=lambda index: -raw[index])
    body = {"model": "Tiny-Qwen3-Reranker", "query": "what is deep?",
            "documents": [DOCUMENTS[0], {"text": DOCUMENTS[1]}, DOCUMENTS[2]]}
    for path in ("/v1/rerank", "/rerank", "/v2/rerank", "/reranking", "/v1/reranking"):
        answer = asked(url, path, **body)
        assert [each["index"] for each in answer["results"]] == order and answer["model"] == body["model"]
        assert max(abs(each["relevance_score"] - sigmoid(raw[each["index"]]))
                   for each in answer["results"]) < 1e-4
        count = sum(score(reranker, tokenizer, "what is deep?", document)[1] for document in DOCUMENTS)
        assert "document" not in answer["results"][0]
        assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == count
    best = asked(url, "/v1/rerank", **body, top_n=1, return_documents=True, use_activation=False)["results"]
    assert best == [
        {"index": order[0], "relevance_score": pytest.approx(raw[order[0]], abs=1e-4),
         "document": {"text": DOCUMENTS[order[0]]}}]
    tei = asked(url, "/rerank", model=body["model"], query=body["query"], texts=DOCUMENTS, raw_scores=True,
                return_text=True)
    assert [(each["index"], each["text"]) for each in tei] == [(index, DOCUMENTS[index]) for index in order]
    assert max(abs(each["score"] - raw[each["index"]]) for each in tei) < 1e-4
    told = score(reranker, tokenizer, "what is deep?", DOCUMENTS[0], "Find seas")[0]
    assert asked(url, "/v1/rerank", **body | {"documents": DOCUMENTS[:1]},
                 instruction="Find seas")["results"][0]["relevance_score"] == pytest.approx(
                     sigmoid(told), abs=1e-4)


def test_scores_take_one_with_many_or_pairs(models, url):
    """An embedder's scores are cosines."""
    _, reranker, tokenizer, _ = models
    for path in ("/v1/score", "/score"):
        one = asked(url, path, model="Tiny-Qwen3-Reranker", text_1="deep", text_2=DOCUMENTS)
        pairs = asked(url, path, model="Tiny-Qwen3-Reranker", queries=["deep", "sad", "deep"],
                      documents=DOCUMENTS)
        for answer, queries in ((one, ["deep"] * 3), (pairs, ["deep", "sad", "deep"])):
            assert [(each["index"], each["object"]) for each in answer["data"]] == [
                (index, "score") for index in range(3)]
            for each, query, document in zip(answer["data"], queries, DOCUMENTS):
                assert each["score"] == pytest.approx(
                    sigmoid(score(reranker, tokenizer, query, document)[0]), abs=1e-4)
        cosines = asked(url, path, model="embedder", text_1=DOCUMENTS[0], text_2=DOCUMENTS)["data"]
        assert [each["score"]
                for each in cosines] == pytest.approx(
                    [expected(models, DOCUMENTS[0]) @ expected(models, text) for text in DOCUMENTS], abs=1e-5)
        paired = asked(url, path, model="embedder", text_1=DOCUMENTS, text_2=DOCUMENTS[::-1])["data"]
        assert [each["score"]
                for each in paired] == pytest.approx(
                    [expected(models, a) @ expected(models, b) for a, b in zip(DOCUMENTS, DOCUMENTS[::-1])],
                    abs=1e-5)


def test_a_document_is_cut_and_the_query_never(models, url):
    """Jina, Cohere and TEI cut; vLLM and llama-server refuse."""
    _, reranker, tokenizer, _ = models
    empty = score(reranker, tokenizer, "q", "")[1]
    room, long = 512 - empty, "d" * 600
    wanted = sigmoid(score(reranker, tokenizer, "q", "d" * room)[0])
    body = {"model": "Tiny-Qwen3-Reranker", "query": "q"}
    assert asked(url, "/v1/rerank", **body,
                 documents=[long])["results"][0]["relevance_score"] == pytest.approx(wanted, abs=1e-4)
    assert asked(url, "/rerank", **body, texts=[long])[0]["score"] == pytest.approx(wanted, abs=1e-4)
    short = sigmoid(score(reranker, tokenizer, "q", "d" * 5)[0])
    assert asked(url, "/v2/rerank", **body, documents=[long],
                 max_tokens_per_doc=5)["results"][0]["relevance_score"] == pytest.approx(short, abs=1e-4)
    for path, more in (("/reranking", {"documents": [long]}),
                       ("/rerank", {"texts": [long], "truncate": False})):
        status, message, param = refused(url, path, **body, **more)
        assert (status, param) == (400, "documents")
        assert f"{empty + 600:,} tokens" in message and "length is 512 tokens" in message
    assert "length is 512 tokens" in refused(url, "/score", model=body["model"], text_1="q", text_2=long)[1]
    status, message, param = refused(url, "/v1/rerank", model=body["model"], query="q" * 600, documents=["a"])
    assert (status, param) == (400, "query") and "your query resulted in" in message


CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize("model, path, body, words", [
    ("embedder", "/v1/chat/completions", CHAT,
     "makes vectors of texts (/v1/embeddings, /api/embed, /v1/score); it cannot chat"),
    ("embedder", "/v1/completions", {"prompt": "a"}, "it cannot chat or continue texts"),
    ("embedder", "/v1/responses", {"input": "a"}, "it cannot chat"),
    ("embedder", "/chat/completions", CHAT, "it cannot chat"),
    ("embedder", "/infill", {"input_prefix": "a", "input_suffix": "b"}, "it cannot chat"),
    ("embedder", "/v1/compare", CHAT | {"models": ["embedder", "embedder"]}, "it cannot chat"),
    ("embedder", "/v1/rerank", {"query": "a", "documents": ["b"]}, "it cannot rank documents"),
    ("Tiny-Qwen3-Reranker", "/v1/chat/completions", CHAT,
     "ranks documents for a query (/v1/rerank, /v1/score); it cannot chat"),
    ("Tiny-Qwen3-Reranker", "/v1/embeddings", {"input": "a"}, "it makes no vectors"),
    ("Tiny-Qwen3-Reranker", "/embed", {"inputs": "a"}, "no vectors"),
    ("chat", "/v1/rerank", {"query": "a", "documents": ["b"]},
     "this model answers, and makes vectors of texts (/v1/embeddings); it cannot rank"),
    ("chat", "/v1/score", {"text_1": "a", "text_2": "b"},
     "it cannot rank documents, which takes a reranker")])
def test_a_model_s_400_says_what_it_can_do(url, model, path, body, words):
    """What a model cannot do is a 400 that says what it can."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(url + path, body | {"model": model})
    assert caught.value.code == 400 and words in caught.value.read().decode()


@pytest.mark.parametrize("path, body, words", [
    ("/v1/rerank", {"query": " \n", "documents": ["a"]}, "the query is empty"),
    ("/v1/rerank", {"documents": ["a"]}, "query is missing"),
    ("/v1/rerank", {"query": "a"}, "documents is missing"),
    ("/v1/rerank", {"query": "a", "documents": []}, "a list of 1 to 2,048"),
    ("/v1/rerank", {"query": "a", "documents": [5]}, 'strings or objects with a string "text"'),
    ("/v1/rerank", {"query": "a", "documents": [{"txt": "b"}]}, "objects with"),
    ("/v1/rerank", {"query": "a", "documents": ["a"] * 2049}, "a list of 1 to 2,048"),
    ("/v1/rerank", {"query": ["a"], "documents": ["b"]}, "query must be a string"),
    ("/v1/rerank", {"query": "a", "documents": ["b"], "texts": ["b"]}, "exclude each other"),
    ("/rerank", {"query": "a", "texts": [{"text": "b"}]}, "strings"),
    ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": 0}, "top_n must be an integer of at least 1"),
    ("/v1/rerank", {"query": "a", "documents": ["b"], "max_tokens_per_doc": -1}, "max_tokens_per_doc"),
    ("/v1/rerank", {"query": "q" * 3000, "documents": ["b"] * 2000},
     "the query is read again for each document, 6,000,000 characters in all"),
    ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1 has 2 texts and text_2 has 3"),
    ("/v1/score", {"text_1": "a"}, "text_2 is missing"),
    ("/v1/score", {"text_1": "a", "text_2": ["b", ""]}, "text_2[1] is empty")])
def test_bad_bodies_of_rerankers_are_named(url, path, body, words):
    """They are refused."""
    status, message, _ = refused(url, path, model="Tiny-Qwen3-Reranker", **body)
    assert status == 400 and words in message, message


@pytest.mark.parametrize("body, words", [
    ({"input": "a", "dimensions": 0}, "dimensions must be an integer of at least 1"),
    ({"input": "a", "dimensions": 65}, "from 32 to 64, not 65"),
    ({"input": "a", "dimensions": "32"}, "dimensions must be an integer"),
    ({"input": "a", "prompt_name": "nope\x07"}, 'one of "query", "document"'),
    ({"input": "a", "pooling": "mean"}, 'pooling must be "last", for which this model was trained'),
    ({"input": ["a"] * 2049}, "2,048"), ({"input": ["a", ""]}, "input[1] is empty"),
    ({"input": [["a"]]}, "input must be"), ({"input": ["x"] * 2048}, None),
    *(pytest.param({"input": input}, None, marks=pytest.mark.slow)
      for input in (["x" * 90] * 2048, [[1] * 99] * 2048))])
def test_bad_bodies_of_embedders_are_named(url, body, words):
    """They are refused."""
    if words is None:
        assert embedded(url, **body).shape == (2048, 64)
        return
    status, message, _ = refused(url, "/v1/embeddings", model="embedder", **body)
    assert status == 400 and words in message, message


def test_a_body_of_over_300_000_tokens_is_refused(url):
    for body, words in (
        ({"input": [[1] * 400] * 800},
         "input: 320,000 tokens given, at most 300,000 are allowed in one request"),
                        ({"input": ["word " * 80] * 800}, "input: 320,800 tokens given")):
        status, message, param = refused(url, "/v1/embeddings", model="chat", **body)
        assert (status, param) == (400, "input") and words in message
    status, message, param = refused(url, "/v1/rerank", model="Tiny-Qwen3-Reranker", query="q",
                                     documents=["d" * 200] * 1600)
    assert (status, param) == (400, "documents") and "documents: 320,000 tokens given" in message


def test_each_model_says_what_it_can(url):
    embedder, reranker, chat = (get(f"{url}/v1/models/{name}")
                                for name in ("embedder", "Tiny-Qwen3-Reranker", "chat"))
    assert ([name for name, can in embedder["capabilities"].items() if can] == ["embedding"]
            and embedder["type"] == "embedding")
    assert ([name for name, can in reranker["capabilities"].items() if can] == ["rerank"]
            and reranker["type"] == "rerank")
    assert (chat["capabilities"]["embedding"] and chat["capabilities"]["chat"]
            and not chat["capabilities"]["rerank"] and "embedder" not in chat)
    assert embedder["embedder"] == {"max_tokens": 100, "pooling": "last", "dimensions": 64,
                                    "least_dimensions": 32, "similarity": "cosine",
                                    "prompts": PROMPTS, "default_prompt": None}
    assert reranker["embedder"] == {"max_tokens": 512}
    assert asked(url, "/api/show", model="embedder")["capabilities"] == ["embedding"]
    assert asked(url, "/v1/chat/completions", model="chat", **CHAT, max_tokens=2)["choices"]
    assert len(asked(url, "/v1/embeddings", model="chat", input="a")["data"][0]["embedding"]) == 64


def test_a_vector_is_the_same_beside_anything(url):
    """It is beside other vectors and beside an answer."""
    texts = [f"text number {number} " * (number % 5 + 1) for number in range(60)]
    alone = [asked(url, "/v1/embeddings", model="embedder", input=text,
                   encoding_format="base64")["data"][0]["embedding"] for text in texts[::6]]
    together = asked(url, "/v1/embeddings", model="embedder", input=texts, encoding_format="base64")["data"]
    scores = asked(url, "/v1/rerank", model="Tiny-Qwen3-Reranker", query="q", documents=texts)["results"]
    lone = [asked(url, "/v1/rerank", model="Tiny-Qwen3-Reranker", query="q",
                  documents=[text])["results"][0]["relevance_score"] for text in texts[:5]]
    beside = [next(each["relevance_score"] for each in scores if each["index"] == index)
              for index in range(5)]
    if decode_core():
        assert [each["embedding"] for each in together][::6] == alone and beside == lone
    assert beside == pytest.approx(lone, abs=1e-5)


async def test_vectors_outlast_lost_clients_and_workers(running, client):
    """A request whose client vanishes ends; one whose worker dies is answered by the next worker, with the
    same vectors."""
    _, url = running
    texts = [f"text {number} " * 9 for number in range(300)]
    before = embedded(url, input=texts[:40])
    for _ in range(3):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as gone:
            body = json.dumps({"model": "embedder", "input": texts}).encode()
            gone.sendall(
                b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    asking = asyncio.create_task(asyncio.to_thread(embedded, url, input=texts))
    while not (alive := [worker["pid"] for worker in workers(url) if worker["running"]]):
        await asyncio.sleep(0.01)
    os.kill(alive[0], signal.SIGKILL)
    assert np.abs((await asking)[:40] - before).max() <= (0 if decode_core() else 1e-5)
    while any(worker["running"] for worker in workers(url)):        # those whose clients left
        await asyncio.sleep(0.05)


def workers(url):
    return [worker for worker in get(url + "/stats")["workers"] if worker["pid"]]


async def test_bodies_of_16_mb_go_to_a_sandbox(url, client):
    """They are read in it or refused."""
    def near(body, name):
        filler = (LIMITS.body_bytes - 1000 - len(json.dumps(body | {name: ""}))) * "x"
        return json.dumps(body | {name: filler})

    for path, body, name, statuses in (
            ("/v1/embeddings", {"model": "embedder"}, "input", {400}),
            ("/api/embed", {"model": "embedder"}, "input", {200}),
            ("/v1/rerank", {"model": "Tiny-Qwen3-Reranker", "documents": ["a"]}, "query", {400}),
            ("/v1/rerank", {"model": "Tiny-Qwen3-Reranker", "query": "a", "documents": ["b"]}, "instruction",
             {400}),
            ("/rerank", {"model": "Tiny-Qwen3-Reranker", "query": "a", "texts": ["b"]}, "padding", {200}),
            ("/v1/score", {"model": "embedder", "text_1": "a"}, "text_2", {400})):
        async with client.post(url + path, data=near(body, name),
                               headers={"Content-Type": "application/json"}) as response:
            assert response.status in statuses, await response.text()
    async with client.post(url + "/v1/rerank", data=b"x" * (LIMITS.body_bytes + 1)) as response:
        assert response.status == 413
    assert embedded(url, input="still here").shape == (1, 64)


def test_a_gguf_embedder_has_qwen_s_prompts(models, tmp_path):
    path = gguf_of(tmp_path / "emb.gguf", models[1],
                   **{"qwen3.pooling_type": 3, "general.name": "Qwen3 Embedding 0.6B"})
    log = []
    with server("serve", path, "--dtype", "float32", log=log) as (_, url):
        prompt = get(url + "/v1/models")["data"][0]["embedder"]["prompts"]["query"]
        answer = asked(url, "/v1/embeddings", input="a", prompt_name="query")
        assert np.array(answer["data"][0]["embedding"]) @ unit(
            last_state(models[1], ids_of(prompt + "a"))) > 0.9999
        assert answer["usage"]["prompt_tokens"] == len(ids_of(prompt + "a"))
    assert (any("It makes vectors of texts" in line for line in log)
            and not any("Sampling unless" in line for line in log))
