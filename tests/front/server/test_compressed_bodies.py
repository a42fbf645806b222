"""Bodies that clients compress are read as if they had not, and one that inflates to more than a body may have costs no more than that."""

import asyncio
import gzip
import json
import random
import tracemalloc
import urllib.error
import urllib.request
import zlib
from dataclasses import replace

import pytest

from chatlm.common import config
from chatlm.common.config import LIMITS, ApiKey, Settings
from chatlm.common.errors import RequestError
from chatlm.front.front import create_app
from chatlm.front.pool.catalogue import Catalogue
from chatlm.front.server import access, connections, inflate, streams
from chatlm.front.store.store import open_store
from fake_pool import FakePool, SandboxHere, conversation, serving
from nightly import by_day
from patching import patch

NATIVE, OPENAI = "/chat/completions", "/v1/chat/completions"


def bare(data):
    """Deflate's data without zlib's header."""
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(data) + stream.flush()


def gzipped(data):
    """Without the time, which would make other ids of tests in each process."""
    return gzip.compress(data, mtime=0)


WAYS = [("gzip", gzipped), ("x-gzip", gzipped), ("GZIP", gzipped), ("identity, gzip", gzipped), ("deflate", zlib.compress), ("deflate", bare),
        ("", bytes), ("identity", bytes)]


async def ask(client, url, data, encoding, **headers):
    async with client.post(url, data=data, headers={"Content-Encoding": encoding, **headers}) as response:
        return response.status, response.headers, await response.text()


async def inflated(data, encoding="gzip", size=0):
    """The content of data that arrives `size` bytes at a time."""
    async def parts():
        for begin in range(0, len(data), size or len(data)):
            yield data[begin:begin + (size or len(data))]
    return [part async for part in inflate.inflated(parts(), encoding)]


@pytest.mark.parametrize("encoding, compressed", WAYS)
async def test_a_compressed_body_is_read_as_the_plain_one(client, encoding, compressed):
    pool = FakePool()
    pool.context_length = 1 << 20
    async with serving(pool) as url:
        for text in ("Hi", "x" * 300_000):          # the second is read in a sandbox
            status, _, answer = await ask(client, url + OPENAI, compressed(json.dumps(conversation(text)).encode()), encoding)
            assert status == 200, answer
            request = pool.requests[-1]
            ids = request.prompt_ids and request.prompt_ids[0] or pool.tokenizer.render(request.messages)
            assert bytes(ids) == f"user: {text}\n".encode()
        status, _, answer = await ask(client, url + "/extract", compressed(b"plain text"), encoding)
        assert status != 415


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, gzip", "deflate, gzip", "gzip, br", "x", "g" * 5000])
async def test_any_other_compression_is_415(client, encoding):
    """The error says which can be read."""
    async with serving(FakePool()) as url:
        for path in (NATIVE, OPENAI, "/v1/messages", "/api/chat", "/tokenize"):
            status, headers, answer = await ask(client, url + path, json.dumps(conversation()).encode(), encoding)
            assert (status, headers["Accept-Encoding"]) == (415, "gzip, deflate") and "gzip or deflate" in answer and encoding[:20] in answer, answer


async def test_two_encoding_headers_count_as_both(client):
    async with serving(FakePool()) as url:
        headers = [("Content-Encoding", "identity"), ("Content-Encoding", "gzip")]
        async with client.post(url + OPENAI, data=gzipped(json.dumps(conversation()).encode()), headers=headers) as response:
            assert response.status == 200, await response.text()
        async with client.post(url + OPENAI, data=gzipped(b"{}"), headers=[headers[1], headers[1]]) as response:
            assert response.status == 415


BODY = json.dumps(conversation()).encode()


@pytest.mark.parametrize("data, words", [
    (b"this is not gzip", "not valid gzip"), (BODY, "not valid gzip"), (gzipped(BODY)[:-1], "ends before"), (gzipped(BODY)[:12], "ends before"),
    (b"\x1f", "ends before"), (b"", "ends before"), (gzipped(BODY) + b"x", "more after the end"), (gzipped(BODY) * 2, "more after the end"),
    (gzipped(BODY)[:-8] + b"\0" * 8, "not valid gzip"), (gzipped(b"no json"), "not valid JSON")])
async def test_broken_compressed_data_is_400(client, data, words):
    """Data that is broken, cut off or goes on is refused, and the connection goes on."""
    async with serving(FakePool()) as url:
        for path in (NATIVE, OPENAI):
            status, _, answer = await ask(client, url + path, data, "gzip")
            assert status == 400 and words in answer, answer
            assert (await ask(client, url + path, BODY, "identity"))[0] == 200


@pytest.mark.parametrize("encoding, compressed", [each for each in WAYS if each[0] in ("gzip", "deflate")])
@pytest.mark.parametrize("length", [0, 1, inflate.SLICE_BYTES - 1, inflate.SLICE_BYTES, 2 * inflate.SLICE_BYTES, 3 * inflate.SLICE_BYTES + 1])
async def test_content_of_any_length_comes_in_slices(encoding, compressed, length):
    for content in (b"\0" * length, random.Random(length).randbytes(length)):
        for size in (0, 1 if length < 2 else 1000):
            parts = await inflated(compressed(content), encoding, size)
            assert b"".join(parts) == content and max(map(len, parts)) <= inflate.SLICE_BYTES
            with pytest.raises(RequestError, match="ends before"):
                await inflated(compressed(content)[:-1], encoding, size)
            with pytest.raises(RequestError, match="more after"):
                await inflated(compressed(content) + b"\0", encoding, size)


async def test_others_get_a_turn_after_each_slice():
    turns, done = 0, asyncio.Event()

    async def other():
        nonlocal turns
        while not done.is_set():
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    parts = await inflated(gzipped(b"\0" * 40 * inflate.SLICE_BYTES))
    done.set()
    await task
    assert turns >= len(parts) - 1 >= 39


def bomb(size, level=9):
    """So many spaces after a body, compressed a thousand times."""
    stream = zlib.compressobj(level, wbits=31)
    return b"".join([stream.compress(BODY), *(stream.compress(b" " * (1 << 20)) for _ in range(size >> 20)), stream.flush()])


@pytest.mark.parametrize("size", by_day([1 << 28, 1 << 30], 1 << 28))
async def test_a_body_that_inflates_too_far_is_413(client, size):
    """Up to a gigabyte in a megabyte: no more of it is inflated than the limit."""
    data = bomb(size)
    assert len(data) < 1_100_000
    pool = FakePool()
    async with serving(pool) as url:
        await ask(client, url + OPENAI, BODY, "identity")       # what is imported at the first request
        tracemalloc.start()
        try:
            for path in (NATIVE, OPENAI, "/v1/messages", "/v1/completions", "/tokenize", "/extract", "/models/load"):
                status, _, answer = await ask(client, url + path, data, "gzip")
                assert status == 413 and ("16777216" in answer or path == "/extract"), answer
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert most < 3 * LIMITS.document_bytes         # a bytearray that grows, and its copy
        assert (await ask(client, url + OPENAI, bomb(0), "gzip"))[0] == 200
    assert len(pool.requests) == 2


async def test_an_inflated_body_counts_as_what_it_is(client, monkeypatch):
    """Of a budget for two bodies a client has a quarter: room is taken for all that a compressed body may become, as for one without a length."""
    patch(monkeypatch, config, "LIMITS", replace(LIMITS, held_bytes=4 * LIMITS.body_bytes - 4))
    patch(monkeypatch, streams, "BODY_S", 0.5)
    async with serving(FakePool()) as url:
        status, _, answer = await ask(client, url + OPENAI, bomb(1 << 20), "gzip")
        assert status == 503 and "too many large bodies" in answer
        assert (await ask(client, url + OPENAI, gzipped(BODY), "gzip"))[0] == 200      # a small one holds nothing


async def test_a_body_once_read_holds_only_its_size(client, monkeypatch):
    """Room for all that a compressed body may become is taken while it arrives; others of its client go on while it is parsed."""
    patch(monkeypatch, config, "LIMITS", replace(LIMITS, held_bytes=4 * LIMITS.body_bytes + 4_000_000))      # a client's share: one body and a million bytes
    patch(monkeypatch, streams, "BODY_S", 0.5)
    parsing, go_on = asyncio.Event(), asyncio.Event()

    class Parsing(SandboxHere):
        async def perform(self, *arguments, **more):
            parsing.set()
            await go_on.wait()
            return await super().perform(*arguments, **more)

    body = gzipped(json.dumps(conversation() | {"padding": "x" * 100_000}).encode())
    pool = FakePool()
    pool.sandboxes["bodies"] = Parsing(pool)
    async with serving(pool) as url:
        first = asyncio.create_task(ask(client, url + OPENAI, body, "gzip"))
        await asyncio.wait_for(parsing.wait(), 20)
        second = asyncio.create_task(ask(client, url + OPENAI, body, "gzip"))
        parsing.clear()
        await asyncio.wait_for(parsing.wait(), 20)
        go_on.set()
        assert (await first)[0] == (await second)[0] == 200


async def test_a_compressed_form_with_a_file_is_refused(client, tmp_path):
    """A form with a file is not read compressed."""
    settings = Settings(database=tmp_path / "kept.db", keys=(ApiKey.hashed("k", "ann"),))
    store = await open_store(settings)
    with access.listen_on("127.0.0.1", 0) as listener:
        async with connections.serving(create_app(Catalogue(settings, FakePool()), settings, store), listener):
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            status, _, answer = await ask(client, url + "/v1/files", gzipped(b"--x--"), "gzip", **{
                "Content-Type": "multipart/form-data; boundary=x", "X-Api-Key": "k"})
            assert status == 415 and "must not be compressed" in answer


def test_the_real_server_answers_a_compressed_body(default_url):
    """It answers it as it does the plain one."""
    def post(data, **headers):
        request = urllib.request.Request(default_url + OPENAI, data, {"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    body = json.dumps(conversation("What is the capital of Japan?") | {"temperature": 0, "max_tokens": 8, "padding": "x" * 100_000}).encode()
    (_, plain), (_, compressed) = post(body), post(gzipped(body), **{"Content-Encoding": "gzip"})
    assert compressed["choices"][0]["message"] == plain["choices"][0]["message"]
    assert post(bomb(64 << 20), **{"Content-Encoding": "gzip"})[0] == 413
    assert post(b"x", **{"Content-Encoding": "zstd"})[0] == 415
