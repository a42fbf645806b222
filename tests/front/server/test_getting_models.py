"""Models that an operator gets over HTTP: who may, in what shapes, and what is served, deleted and resumed then."""

import asyncio
import json
import os
import signal
from dataclasses import replace

import pytest

import real_server
from chatlm.common.config import ApiKey, ModelEntry, Settings
from chatlm.common.hub.offers import hub_cache
from chatlm.front.pool import many
from chatlm.front.pool.downloads import Download
from chatlm.front.pool.many import many_models
from chatlm.front.pool.pool import make_pool
from fake_hub import fake_hub
from fake_pool import FakePool, frames, serving
from forked import DYING
from nightly import by_day
from tiny_gguf import LLAMA_NUMBERS, gguf_bytes, random_llama, small_gguf_metadata

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
TEXT = {**small_gguf_metadata("gpt-2"), "tokenizer.chat_template": TEMPLATE}
WIDE = LLAMA_NUMBERS | {"llama.feed_forward_length": 8192}
SMALL = gguf_bytes({**LLAMA_NUMBERS, **TEXT}, random_llama())
LARGE = gguf_bytes({**WIDE, **TEXT}, random_llama(numbers=WIDE))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    with fake_hub(org__large={"large.gguf": LARGE}, org__small={"small.gguf": SMALL}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        yield hub
        hub.released.set()


@pytest.fixture
async def models(nanochat_fixtures, started, monkeypatch):
    """A server of several models, one of which is here."""
    monkeypatch.setattr(many, "LEAVING_S", 0.1)
    settings = Settings(several=(ModelEntry(str(nanochat_fixtures / "gen5"), "here"),), dtype="float32", kv_cache_memory=4 << 20, max_batch=8)
    return await started(many_models(settings, DYING))


async def call(client, method, url, body=None, headers=None):
    async with client.request(method, url, json=body, headers=headers) as response:
        text = await response.text()
        return response.status, json.loads(text) if text else None


async def listed(client, url):
    return [model["id"] for model in (await call(client, "GET", url + "/v1/models"))[1]["data"]]


def question(model, **changes):
    return {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "temperature": 0, **changes}


ROUTES = [("GET", "/models/hub"), ("GET", "/models/hub/org/small"), ("GET", "/models/downloads"), ("POST", "/models/download"), ("POST", "/models/cancel"), ("POST", "/models/delete"),
          ("POST", "/api/pull"), ("DELETE", "/api/delete")]


@pytest.mark.parametrize("method, path", ROUTES)
async def test_only_an_operator_gets_and_deletes_models(client, hub, method, path):
    keys = ApiKey.hashed("some", "some", ("fake-model",)), ApiKey.hashed("whole", "whole")
    body = {"model": "org/small"}
    async with serving(FakePool()) as url:
        status, refusal = await call(client, method, url + path, body, {"X-Forwarded-For": "192.0.2.1"})
        assert status == 403 and "only this machine may download and delete models" in json.dumps(refusal)
        for headers in {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": "http://evil.test"}:
            status, refusal = await call(client, method, url + path, body, headers)
            assert status == 403 and "pages of this origin may not use the server" in json.dumps(refusal)
    async with serving(FakePool(), Settings(keys=keys)) as url:
        assert (await call(client, method, url + path, body))[0] == 401
        status, refusal = await call(client, method, url + path, body, {"Authorization": "Bearer some"})
        assert status == 403 and "limited to some models may not download and delete models" in json.dumps(refusal)
    async with serving(FakePool(), Settings(downloads=False)) as url:
        status, refusal = await call(client, method, url + path, body)
        assert status == 403 and "--no-downloads" in json.dumps(refusal)
    assert not hub.requests and not hub_cache().exists()


@pytest.mark.parametrize("method, path", ROUTES[3:])
@pytest.mark.parametrize("body, words", by_day([
    ({}, "model"), ({"model": 3}, "model must be"), ({"model": "../../x"}, "model must be the name of a model of the Hugging Face hub"), ({"model": "/etc/passwd"}, "model must be the name"),
    ({"model": "a/b:../c"}, "model must be the name"), ({"model": "a/b\u0000"}, "model must be the name"), ({"model": "file:///x"}, "model must be the name")], ({"model": "a/b:../c"}, "model must be the name")))
async def test_a_body_without_a_hub_model_is_refused(client, hub, method, path, body, words):
    async with serving(FakePool()) as url:
        status, refusal = await call(client, method, url + path, body)
        assert status == 400 and words in json.dumps(refusal) and not hub.requests


async def test_a_downloaded_model_is_served_and_removed(client, hub, models):
    async with serving(models, models.settings) as url:
        async with client.post(url + "/models/download", json={"model": "org/small", "stream": True, "odd": 1}) as response:
            assert response.headers["Content-Type"].startswith("text/event-stream") and response.headers["X-Ignored-Fields"] == "odd"
            states = frames(await response.read())
        assert states[0]["state"] == "waiting" and states[-1] == {"model": "org/small", "state": "done", "done": len(SMALL), "bytes": len(SMALL), "served": True}
        assert await listed(client, url) == ["here", "org/small"]
        status, answer = await call(client, "POST", url + "/v1/chat/completions", question("org/small"))
        assert status == 200 and answer["usage"]["completion_tokens"] == 4
        status, body = await call(client, "GET", url + "/models/hub?search=small")
        assert status == 200 and body["memory"] > 0 and body["disk"] > 0 and body["models_disk"] is None
        (kept,), (found,) = body["cached"], body["found"]
        assert kept["model"] == "org/small:small.gguf" and kept["complete"] and kept["served"] == "org/small" == found["model"]
        status, body = await call(client, "GET", url + "/models/hub/org/large")
        assert [(each["model"], each["fits"], each["problem"], each["served"]) for each in body["models"]] == [("org/large:large.gguf", True, "", "")]
        status, body = await call(client, "POST", url + "/models/delete", {"model": "org/small"})
        assert status == 200 and body["bytes"] >= len(SMALL)
        assert await listed(client, url) == ["here"] and not [*hub_cache().glob("models--*")]
        assert (await call(client, "POST", url + "/models/delete", {"model": "org/small"}))[0] == 404


async def test_a_deleted_model_ends_its_answer_first(client, hub, models):
    async with serving(models, models.settings) as url:
        await call(client, "POST", url + "/api/pull", {"model": "org/small", "stream": False})
        body = question("org/small", max_tokens=200, ignore_eos=True, stream=True)
        async with client.post(url + "/v1/chat/completions", json=body) as response:
            async for line in response.content:
                if line.startswith(b"data: ") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    break       # it is loaded
            assert (await call(client, "POST", url + "/models/delete", {"model": "org/small"}))[0] == 200
            assert not [*hub_cache().glob("models--*")] and await listed(client, url) == ["here"]
            assert (await call(client, "POST", url + "/v1/chat/completions", question("org/small")))[0] == 404
            assert b"[DONE]" in await response.read()
        while models.leaving:
            await asyncio.sleep(0.02)
        assert (await call(client, "POST", url + "/api/pull", {"model": "org/small", "stream": False}))[0] == 200
        assert (await call(client, "POST", url + "/v1/chat/completions", question("org/small")))[0] == 200


async def test_ollamas_clients_pull_and_delete(client, hub, models):
    hub.repositories["Qwen/Qwen3-0.6B"] = {"a-Q4_K_M.gguf": SMALL, "a-Q8_0.gguf": SMALL}
    async with serving(models, models.settings) as url:
        async with client.post(url + "/api/pull", json={"name": "qwen3:0.6b"}) as response:
            assert response.headers["Content-Type"] == "application/x-ndjson"
            lines = [json.loads(line) for line in (await response.text()).splitlines()]
        assert lines[0] == {"status": "pulling manifest"} and lines[-2:] == [{"status": "writing manifest"}, {"status": "success"}]
        pulled = [line for line in lines if "total" in line]
        assert pulled and all(line["total"] == len(SMALL) and 0 <= line["completed"] <= len(SMALL) and len(line["digest"]) == 71 for line in pulled)
        assert sorted(model["name"] for model in (await call(client, "GET", url + "/api/tags"))[1]["models"]) == ["Qwen/Qwen3-0.6B:latest", "here:latest"]
        assert (await call(client, "POST", url + "/api/chat", {"model": "qwen3:0.6b", "stream": False, "messages": [{"role": "user", "content": "hi"}], "options": {"num_predict": 2}}))[0] == 200
        assert await call(client, "POST", url + "/api/pull", {"model": "hf.co/Qwen/Qwen3-0.6B:Q8_0", "stream": False}) == (200, {"status": "success"})
        assert await call(client, "DELETE", url + "/api/delete", {"name": "qwen3:0.6b"}) == (200, None)
        assert (await call(client, "DELETE", url + "/api/delete", {"model": "qwen3:0.6b"})) == (404, {"error": "Qwen/Qwen3-0.6B is not in the cache"})
        assert await listed(client, url) == ["here"]
        async with client.post(url + "/api/pull", json={"model": "org/nothing"}) as response:
            assert "has no such model" in json.loads((await response.text()).splitlines()[-1])["error"]
        status, body = await call(client, "POST", url + "/api/pull", {"model": "org/nothing", "stream": False})
        assert status == 500 and "has no such model" in body["error"]


async def test_a_pull_ends_with_its_last_client(client, hub):
    """The next one continues it."""
    hub.held = {"large.gguf": 12 << 20}
    async with serving(FakePool()) as url:
        async with client.post(url + "/api/pull", json={"model": "org/large"}) as response:
            await response.content.readuntil(b'"completed": 10485760')
        async with client.get(url + "/models/downloads") as response:
            states = frames(await response.read())
        assert states[-1]["state"] == "cancelled"
        hub.released.set()
        assert (await call(client, "POST", url + "/api/pull", {"model": "org/large", "stream": False}))[0] == 200


async def test_a_server_of_one_model_says_how_to_add_more(client, hub):
    """A server of one model says how to serve another."""
    async with serving(FakePool()) as url:
        async with client.post(url + "/models/download", json={"model": "org/small", "stream": True}) as response:
            last = frames(await response.read())[-1]
        assert last["state"] == "done" and last["served"] is False and "python chat_server.py org/small" in last["note"]


async def test_a_download_can_be_followed_and_cancelled(client, hub):
    hub.held = {"large.gguf": 12 << 20}
    async with serving(FakePool()) as url:
        status, state = await call(client, "POST", url + "/models/download", {"model": "org/large"})
        assert status == 202 and state["state"] in Download.RUNNING
        async with client.get(url + "/models/downloads") as response:
            async for line in response.content:
                if b'"done": 10485760' in line:
                    break
            assert (await call(client, "POST", url + "/models/cancel", {"model": "org/large"})) == (200, {"model": "org/large", "state": "cancelled"})
            assert b'"state": "cancelled"' in (await response.content.read()).splitlines()[-2]
        assert (await call(client, "POST", url + "/models/cancel", {"model": "org/large"}))[0] == 404


async def test_a_model_of_the_command_line_is_not_deleted(client, hub, started, tmp_path):
    snapshot = hub_cache() / "models--org--mine" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "small.gguf").write_bytes(SMALL)
    settings = Settings(several=(ModelEntry(str(snapshot / "small.gguf"), "mine"),), kv_cache_memory=4 << 20)
    models = await started(many_models(settings, DYING))
    async with serving(models, settings) as url:
        for name in "org/mine", "org/mine:small.gguf":
            status, body = await call(client, "POST", url + "/models/delete", {"model": name})
            assert status == 409 and body["error"]["code"] == "model_in_use"
        assert (snapshot / "small.gguf").exists()


def in_the_cache(repository, **files):
    snapshot = hub_cache() / f"models--{repository.replace('/', '--')}" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    for name, data in files.items():
        (snapshot / name.replace("__", ".")).write_bytes(data)
    return snapshot


@pytest.mark.parametrize("several", [True, False])
async def test_what_serves_a_model_is_not_deleted(several, client, hub, started, nanochat_fixtures):
    """Its draft model, and the texts that it drafts from: its workers read them whenever they start."""
    drafts = in_the_cache("org/drafts", small__gguf=SMALL)
    texts = in_the_cache("org/texts", manual__txt=b"hello hello")
    in_the_cache("org/other", small__gguf=SMALL)
    target = in_the_cache("org/mine", small__gguf=SMALL) / "small.gguf"
    settings = Settings(draft_model=str(drafts / "small.gguf"), draft_text=(str(texts / "manual.txt"),), kv_cache_memory=8 << 20, max_batch=8)
    if several:
        models = await started(many_models(replace(settings, several=(ModelEntry(str(target), "mine"),)), DYING))
    else:
        models = await started(make_pool(replace(settings, model=str(target)), DYING))
    async with serving(models, models.settings) as url:
        for name in "org/drafts", "org/drafts:small.gguf", "org/texts":
            status, body = await call(client, "DELETE", url + "/api/delete", {"model": name})
            assert status == 409 and "is served with files of it" in str(body), body
        assert (await call(client, "DELETE", url + "/api/delete", {"model": "org/other"}))[0] == 200
    assert (drafts / "small.gguf").exists() and (texts / "manual.txt").exists() and not (hub_cache() / "models--org--other").exists()


async def test_a_model_that_never_loads_is_kept(client, hub, models):
    """The server says why it can never be loaded."""
    async with serving(models, models.settings) as url:
        models.source.residency.budget = models.registry.models[0].pool.memory.size
        async with client.post(url + "/models/download", json={"model": "org/large", "stream": True}) as response:
            last = frames(await response.read())[-1]
        assert last["state"] == "done" and not last["served"] and "it cannot be served" in last["note"] and str(hub_cache()) not in last["note"]
        assert await listed(client, url) == ["here"]
        status, body = await call(client, "POST", url + "/api/pull", {"model": "org/large", "stream": False})
        assert status == 500 and "it cannot be served" in body["error"]
        async with client.post(url + "/api/pull", json={"model": "org/large"}) as response:
            assert "it cannot be served" in json.loads((await response.text()).splitlines()[-1])["error"]
        shown = (await call(client, "GET", url + "/models/hub"))[1]["downloads"]
        assert shown and str(hub_cache()) not in json.dumps(shown)
        (kept,) = (await call(client, "GET", url + "/models/hub"))[1]["cached"]
        assert kept["complete"] and not kept["served"] and kept["fits"] is False


async def test_a_strange_search_is_refused(client, hub):
    async with serving(FakePool()) as url:
        assert (await call(client, "GET", url + "/models/hub?search=" + "x" * 201))[0] == 400
        assert (await call(client, "GET", url + "/models/hub?search=%1b"))[0] == 400
        hub.status = 501  # the library asks again after 500, for 23 seconds
        status, body = await call(client, "GET", url + "/models/hub?search=small")
        assert status == 400 and "HTTP status 501" in body["error"]["message"]


@pytest.mark.slow
def test_a_killed_server_s_download_is_continued(hub, tmp_path, nanochat_fixtures):
    """It ends with the server, and the next one continues it."""
    hub.held = {"large.gguf": 22 << 20}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CHAT_SERVER_")}
    flags = "--models", nanochat_fixtures / "gen5", "--kv-cache-memory", "4M"

    def part():
        return next(iter(hub_cache().glob("models--org--large/.chat_server.*")), None)

    with real_server.server(*flags, env=environment, forked="front") as (process, url):
        with real_server.post(url + "/models/download", {"model": "org/large", "stream": True}) as response:
            for line in response:
                if line.startswith(b"data: ") and json.loads(line[6:])["done"] > 11 << 20:
                    break
        (child,) = [each for each in real_server.psutil.Process(process.pid).children() if "hub" in each.cmdline()]
        process.send_signal(signal.SIGKILL)
        child.wait(30)
    kept = part().stat().st_size
    assert kept > 9 << 20
    hub.requests.clear()
    hub.released.set()
    with real_server.server(*flags, env=environment) as (process, url):
        with real_server.post(url + "/api/pull", {"model": "org/large", "stream": False}) as response:
            assert json.loads(response.read()) == {"status": "success"}
        assert f"bytes={kept}-" in [sent for *_, sent, _ in hub.requests] and not part()
        with real_server.post(url + "/v1/chat/completions", question("org/large")) as response:
            assert json.loads(response.read())["model"] == "org/large"
