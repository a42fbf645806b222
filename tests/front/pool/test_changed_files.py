"""Files of a model that change while it is served: no answer goes on with others, and front and workers always have one version of them."""

import asyncio
import json
import os
import shutil

import pytest

from chatlm.common.config import ModelEntry, Settings
from chatlm.common.hub.adapter_folders import adapter_at
from chatlm.common.messages.protocol import AdapterLoaded
from chatlm.front.pool.pool_adapters import AdapterWatch
from chatlm.front.pool.many import many_models
from chatlm.front.pool.pool import make_pool
from asking import ask, served, text_of
from families import make_model, save
from forked import DYING
from lora import random_adapter, shapes_of
from nightly import by_day
from pools import all_ready, played_pool

pytestmark = pytest.mark.timeout(120)
TINY = {"dtype": "float32", "kv_cache_memory": 8 << 20, "max_batch": 8, "prefix_memory": 0}
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %} !"


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """Two trainings of a tiny llama."""
    root = tmp_path_factory.mktemp("versions")
    return [save(make_model("llama3.1", seed), root / str(seed)) for seed in range(2)]


@pytest.fixture
def model(versions, tmp_path):
    return shutil.copytree(versions[0], tmp_path / "tiny-llama")


@pytest.fixture
def start(model, started, tmp_path, monkeypatch):
    """A function that starts a server of the tiny model, whose workers die when a request says so."""
    monkeypatch.setenv("STRUCK", str(tmp_path))

    async def start(**changes):
        return await started(make_pool(Settings(**{"model": str(model)} | TINY | changes), DYING))

    return start


async def prompt_of(client, url):
    async with client.post(url + "/apply-template", json={"messages": [{"role": "user", "content": "hello"}]}) as response:
        return (await response.json())["prompt"]


async def digest_of(client, url):
    async with client.get(url + "/v1/models") as response:
        return response.status == 200 and (await response.json())["data"][0]["weights_digest"]


def by_rename(model, versions):
    shutil.copy(versions[1] / "model.safetensors", model / "new")
    (model / "new").rename(model / "model.safetensors")


def in_place(model, versions):
    data = (versions[1] / "model.safetensors").read_bytes()
    with open(model / "model.safetensors", "r+b") as file:
        file.write(data)


def touched(model, versions):
    os.utime(model / "model.safetensors")


def tokenizer(model, versions):
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (model / "tokenizer.json").write_text(json.dumps(content))


def template(model, versions):
    """In a file that was not there before."""
    (model / "chat_template.jinja").write_text(TEMPLATE)


WEIGHTS = by_rename, in_place


@pytest.mark.parametrize("change", by_day([by_rename, in_place, touched, tokenizer, template], in_place))
async def test_changed_files_end_a_dead_worker_s_answer(
        change, start, model, versions, client):
    """With an error; the next answer is of the new files."""
    pool = await start()
    async with served(pool) as url:
        before, digest, prompt = await text_of(client, url), await digest_of(client, url), await prompt_of(client, url)
        change(model, versions)
        assert await text_of(client, url) == before           # the old version is still in memory
        status, body = await ask(client, url, struck="kill-decode-1")
        assert status == 500 and "the model's files have changed since this answer began" in body["error"]["message"], body
        assert str(model) not in body["error"]["message"]
        after = await text_of(client, url)
        assert (after == before) == (change is touched) or change is tokenizer
        assert (await digest_of(client, url) == digest) == (change not in WEIGHTS)
        assert (await prompt_of(client, url) == prompt) == (change is not template)
        assert change is not template or await prompt_of(client, url) == "hello !"
        assert await text_of(client, url, struck="kill-decode-2") == after      # these do not change any more
    again = await start()
    async with served(again) as url:
        assert await text_of(client, url) == after


async def test_a_living_replica_keeps_the_old_files(start, model, versions, client):
    """It keeps them until it is idle."""
    pool = await start(num_workers=2)
    await all_ready(pool)
    async with served(pool) as url:
        before, digest = await text_of(client, url), await digest_of(client, url)
        in_place(model, versions)
        template(model, versions)
        long = asyncio.create_task(text_of(client, url, max_tokens=240))
        assert await text_of(client, url, struck="kill-decode-1") == before
        assert (await long).startswith(before)
        while await digest_of(client, url) in (digest, False):
            await asyncio.sleep(0.05)
        await all_ready(pool)
        texts = await asyncio.gather(*(text_of(client, url) for _ in range(4)))
        assert len({*texts}) == 1 and texts[0] != before and await prompt_of(client, url) == "hello !"
        assert {worker.state for worker in pool.workers} == {"ready"}


async def test_files_changed_while_unloaded_are_read(start, model, versions, client):
    """The next request has the new ones."""
    pool = await start(idle_unload=0.01)
    async with served(pool) as url:
        before = await text_of(client, url)
        while not pool.supervisor.asleep:
            await asyncio.sleep(0.02)
        by_rename(model, versions)
        template(model, versions)
        assert await text_of(client, url) != before and await prompt_of(client, url) == "hello !"


async def test_a_broken_new_version_is_refused(start, model, versions, client):
    """The error says why, until the version is whole."""
    pool = await start()
    async with served(pool) as url:
        digest = await digest_of(client, url)
        whole = (versions[1] / "model.safetensors").read_bytes()
        (model / "model.safetensors").write_bytes(whole[:-100])
        assert (await ask(client, url, struck="kill-decode-1"))[0] == 500
        status, body = await ask(client, url)
        assert status == 503 and "the new ones cannot be loaded: model.safetensors is truncated" in body["error"]["message"], body
        (model / "model.safetensors").write_bytes(whole)
        while (await ask(client, url))[0] != 200:
            await asyncio.sleep(0.05)
        assert await digest_of(client, url) != digest


async def test_a_broken_new_template_is_refused(start, model, versions, client):
    """The worker does not need it, and is ready; the front cannot render a prompt."""
    pool = await start()
    async with served(pool) as url:
        (model / "chat_template.jinja").write_text(TEMPLATE[:-6])
        assert (await ask(client, url, struck="kill-decode-1"))[0] == 500
        async with asyncio.timeout(20):
            status, body = await ask(client, url)
        assert status == 503 and "the new ones cannot be loaded: tiny-llama: the model's chat template does not parse" in body["error"]["message"], body
        (model / "chat_template.jinja").write_text(TEMPLATE)
        async with asyncio.timeout(30):
            while (await ask(client, url))[0] != 200:
                await asyncio.sleep(0.05)
        assert await prompt_of(client, url) == "hello !"


def adapter(model, folder, seed=0, **config):
    layers, shapes = shapes_of(model)
    return random_adapter(folder, layers, shapes, seed, size=0.3, **config)


async def test_a_merged_adapter_belongs_to_the_files(start, model, versions, client, tmp_path):
    """They are those of the model."""
    folder = adapter(model, tmp_path / "merged", 1)
    pool = await start(lora=(str(folder),))
    async with served(pool) as url:
        before = await text_of(client, url)
        adapter(model, folder, 2)
        status, body = await ask(client, url, struck="kill-decode-1")
        assert status == 500 and "have changed since" in body["error"]["message"], body
        assert await text_of(client, url) != before


@pytest.mark.parametrize("change", by_day([in_place, template], in_place))
async def test_one_of_several_models_is_opened_anew(change, started, start, model, versions, client):
    """Its files have changed; its answers end."""
    models = await started(many_models(Settings(several=(ModelEntry(str(model), "one"), ModelEntry(str(versions[1]), "two")), **TINY), DYING))
    async with served(models) as url:
        before, other = await text_of(client, url, "one"), await text_of(client, url, "two")
        digest = await digest_of(client, url)
        change(model, versions)
        status, body = await ask(client, url, "one", "kill-decode-1")
        assert status >= 500 and "changed" in body["error"]["message"] and str(model) not in body["error"]["message"], body
        assert await text_of(client, url, "two") == other
        while (answer := await ask(client, url, "one"))[0] == 503:
            await asyncio.sleep(0.05)
        after = answer[1]["choices"][0]["message"]["content"]
        assert after != before and (await digest_of(client, url) == digest) == (change is template)
        assert change is template or after == other


@pytest.mark.slow
async def test_changed_files_are_opened_anew_before_a_load(started, model, versions, client):
    """The model is one of several, and was unloaded."""
    models = await started(many_models(Settings(several=(ModelEntry(str(model), "one"), ModelEntry(str(versions[1]), "two")), **TINY), DYING))
    async with served(models) as url:
        before, other = await text_of(client, url, "one"), await text_of(client, url, "two")
        by_rename(model, versions)
        async with client.post(url + "/models/unload", json={"model": "one"}) as response:
            assert response.status == 200 and (await response.json())["state"] == "unloaded"
        async with asyncio.timeout(60):
            while (answer := await ask(client, url, "one"))[0] == 503:
                await asyncio.sleep(0.05)
        assert answer[1]["choices"][0]["message"]["content"] == other != before


async def test_a_model_without_files_refuses_at_once(started, model, versions, client):
    """It is one of several."""
    models = await started(many_models(Settings(several=(ModelEntry(str(model), "one"), ModelEntry(str(versions[1]), "two")), **TINY), DYING))
    async with served(models) as url:
        assert await text_of(client, url, "one")
        other = await text_of(client, url, "two")
        [worker] = models.find("one").model.pool.workers
        model.rename(model.with_name("away"))
        async with client.post(url + "/models/unload", json={"model": "one"}) as response:
            assert response.status == 200
        status, body = await ask(client, url, "one")
        assert status == 503 and "changed" in body["error"]["message"] and worker.restarts == 0, body
        assert await text_of(client, url, "two") == other


# adapters that are served beside the model

def adapter_by_rename(model, folder):
    new = adapter(model, folder.with_name("new"), 2)
    shutil.rmtree(folder)
    new.rename(folder)


def adapter_in_place(model, folder):
    new = adapter(model, folder.with_name("new"), 2)
    with open(folder / "adapter_model.safetensors", "r+b") as file:
        file.write((new / "adapter_model.safetensors").read_bytes())


def adapter_touched(model, folder):
    os.utime(folder / "adapter_model.safetensors")


def adapter_config(model, folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 3 * config["lora_alpha"]}))


@pytest.mark.parametrize("change", by_day([adapter_by_rename, adapter_in_place, adapter_touched, adapter_config], adapter_in_place))
async def test_a_changed_adapter_ends_its_dead_answer(
        change, start, model, client, tmp_path):
    """It ends with an error when its worker dies, and the base goes on."""
    folder = adapter(model, tmp_path / "ad0", 1)
    pool = await start(adapter=(f"ad0={folder}",))
    async with served(pool) as url:
        before, plain = await text_of(client, url, "ad0"), await text_of(client, url)
        change(model, folder)
        assert await text_of(client, url, "ad0") == before
        base = asyncio.create_task(text_of(client, url, max_tokens=200))
        status, body = await ask(client, url, "ad0", "kill-decode-1")
        assert status == 500 and "adapter's files have changed or been removed" in body["error"]["message"], body
        assert (await base).startswith(plain)
        after = await text_of(client, url, "ad0")
        assert (after == before) == (change is adapter_touched)
        assert await text_of(client, url, "ad0", "kill-decode-2") == after
    again = await start(adapter=(f"ad0={folder}",))
    async with served(again) as url:
        assert await text_of(client, url, "ad0") == after


async def test_an_old_adapter_s_answer_goes_on_elsewhere(start, model, client, tmp_path):
    """Another worker has the old version."""
    folder = adapter(model, tmp_path / "ad0", 1)
    pool = await start(adapter=(f"ad0={folder}",), num_workers=2)
    await all_ready(pool)
    async with served(pool) as url:
        while len(pool.adapters.serving["ad0"].loaded) < 2:
            await asyncio.sleep(0.02)
        before, old = await text_of(client, url, "ad0"), pool.adapters.serving["ad0"]
        adapter_by_rename(model, folder)
        assert await text_of(client, url, "ad0", "kill-decode-1") == before
        while pool.adapters.serving["ad0"] is old or len(pool.adapters.serving["ad0"].loaded) < 2:
            await asyncio.sleep(0.02)
        texts = await asyncio.gather(*(text_of(client, url, "ad0") for _ in range(4)))
        assert len({*texts}) == 1 and texts[0] != before
        while len(pool.adapters.all) > 1:       # nobody has the old one any more
            await asyncio.sleep(0.02)


async def test_a_broken_adapter_is_told_once(start, model, client, tmp_path, monkeypatch, caplog):
    """It is read again when it changes."""
    monkeypatch.setattr(AdapterWatch, "WATCH_S", 0.02)
    folder = adapter(model, tmp_path / "all" / "ad0", 1)
    pool = await start(adapter=(str(tmp_path / "all"),))
    lines = lambda: [record for record in caplog.records if "cannot be served" in record.getMessage()]
    looks, look = [], pool.adapters.watch.scanner.look
    monkeypatch.setattr(pool.adapters.watch.scanner, "look", lambda: (looks.append(1), look())[1])
    async with served(pool) as url:
        before = await text_of(client, url, "ad0")
        (folder / "adapter_config.json").write_text("")  # as a writer has it for a moment
        count = len(looks)
        while len(looks) < count + 3:
            assert await text_of(client, url, "ad0") == before
        (folder / "adapter_config.json").write_text("{")
        while not lines() or len(pool.adapters.all) > 1:
            await asyncio.sleep(0.02)
        count = len(looks)
        while len(looks) < count + 20:
            assert await text_of(client, url, "ad0") == before
        assert len(lines()) == 1 and "its older version stays" in lines()[0].getMessage() and len(pool.adapters.all) == 1
        pid = pool.workers[0].process.pid
        pool.workers[0].kill()
        while pool.workers[0].process.pid == pid or not pool.adapters.serving["ad0"].problem:
            await asyncio.sleep(0.02)
        status, body = await ask(client, url, "ad0")
        assert status == 503 and body["error"]["code"] == "model_failed" and len(lines()) == 2, body
        count = len(looks)
        while len(looks) < count + 20:
            await asyncio.sleep(0.02)
        assert len(lines()) == 2 and await text_of(client, url)
        adapter(model, folder, 2)
        while (answer := await ask(client, url, "ad0"))[0] == 503:
            await asyncio.sleep(0.02)
        assert answer[1]["choices"][0]["message"]["content"] != before


async def test_an_adapter_that_comes_back_is_served_again(start, model, client, tmp_path, monkeypatch):
    """Its folder had gone."""
    monkeypatch.setattr(AdapterWatch, "WATCH_S", 0.02)
    folder = adapter(model, tmp_path / "all" / "ad0", 1)
    pool = await start(adapter=(str(tmp_path / "all"),))
    async with served(pool) as url:
        before = await text_of(client, url, "ad0")
        folder.rename(tmp_path / "away")
        assert (await ask(client, url, "ad0", "kill-decode-1"))[0] in (200, 404, 500)
        while (await ask(client, url, "ad0"))[0] != 404:
            await asyncio.sleep(0.02)
        (tmp_path / "away").rename(folder)
        while (answer := await ask(client, url, "ad0"))[0] != 200:
            await asyncio.sleep(0.02)
        assert answer[1]["choices"][0]["message"]["content"] == before
        assert pool.workers[0].restarts <= 1, "a worker did not say what it knew, and was taken for a hung one"


async def test_a_request_keeps_its_adapter_s_version(start, model, client, tmp_path, monkeypatch):
    """Also if another takes its place, and the workers would forget it, while its prompt is rendered."""
    folder = adapter(model, tmp_path / "ad0", 1)
    pool = await start(adapter=(f"ad0={folder}",))
    may_render, rendering, admit = asyncio.Event(), asyncio.Event(), pool.admission.admit

    async def slow(request):
        rendering.set()
        await may_render.wait()
        return await admit(request)

    async with served(pool) as url:
        before, old = await text_of(client, url, "ad0"), pool.adapters.serving["ad0"]
        monkeypatch.setattr(pool.admission, "admit", slow)
        asked = asyncio.create_task(text_of(client, url, "ad0"))
        await rendering.wait()
        pool.adapters.serve(adapter_at(adapter(model, folder, 2), "ad0"))
        while pool.adapters.serving["ad0"] is old:
            await asyncio.sleep(0.02)
        pool.adapters.drop_unused()
        may_render.set()
        assert await asked == before != await text_of(client, url, "ad0")
        pool.adapters.drop_unused()
        assert [*pool.adapters.all.values()] == [pool.adapters.serving["ad0"]] and not pool.adapters.uses


async def test_a_server_is_ready_once_its_adapters_are(model, tmp_path):
    """A server is not ready before its adapters are."""
    folder = adapter(model, tmp_path / "ad0", 1)
    pool = played_pool(adapter=(f"ad0={folder}",))
    supervisor, [worker] = pool.supervisor, pool.workers
    supervisor.became_ready.clear()
    supervisor.handle(worker, AdapterLoaded("none of these"))
    assert not pool.ready and pool.health()[0] == 503 and pool.health()[1]["status"] == "loading"
    supervisor.handle(worker, AdapterLoaded(pool.adapters.serving["ad0"].id, "", 5, "00"))
    assert pool.ready and pool.health()[0] == 200
