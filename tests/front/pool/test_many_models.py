"""Many models behind one URL: real tiny models, one after another or together, within a limit of memory."""

import asyncio
import json
import random
import shutil
from contextlib import asynccontextmanager

import pytest

import chat_server
from chatlm.common.config import ApiKey, ModelEntry, Settings
from chatlm.common.errors import ConfigError
from chatlm.front import serve
from chatlm.front.pool.local_devices import LocalDevices
from chatlm.front.pool.many import FolderWatch, many_models
from chatlm.front.pool.pool import make_pool
from chatlm.front.pool.residency import Residency
from chatlm.front.pool.worker import Worker, WorkerState
from fake_pool import frames, serving
from forked import DYING

TINY = {"dtype": "float32", "kv_cache_memory": 4 << 20, "max_batch": 8}
MIB = 1 << 20


def choices(nanochat_fixtures, *generations):
    return tuple(ModelEntry(str(nanochat_fixtures / name), name) for name in generations)


@pytest.fixture
def start_models(nanochat_fixtures, started):
    """A function that starts a catalogue of several models."""
    async def start(*generations, command=DYING, **changes):
        return await started(many_models(Settings(**{"several": choices(nanochat_fixtures, *generations)} | TINY | changes), command))

    return start


@asynccontextmanager
async def served(models):
    async with serving(models, models.settings) as url:
        yield url


async def ask(client, url, model, text="hello", headers=None, **changes):
    body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12, **changes}
    async with client.post(url + "/v1/chat/completions", json=body, headers=headers) as response:
        return response.status, await response.json()


def content(answer):
    status, body = answer
    assert status == 200, body
    return body["choices"][0]["message"]["content"]


async def alone(client, model, texts, **changes):
    """What a server of this model alone answers to each text."""
    settings = Settings(model=str(model), **TINY, **changes)
    pool = make_pool(settings, DYING)
    await pool.start()
    try:
        await pool.wait_ready()
        async with serving(pool, settings) as url:
            return {text: content(await ask(client, url, "", text)) for text in texts}
    finally:
        await pool.close()


async def listed(client, url, **headers):
    async with client.get(url + "/v1/models", headers=headers) as response:
        return {model["id"]: model for model in (await response.json())["data"]}


async def test_each_model_answers_as_alone(start_models, nanochat_fixtures, client, monkeypatch):
    """The memory holds one of them. Meanwhile their requests wait in the queue, and hear how far the model is."""
    monkeypatch.setattr(Residency, "STAY_LOADS", 0.2)
    models = await start_models("gen1", "gen5", models_memory=230 * MIB, prefix_memory=0)
    async with served(models) as url:
        before = await listed(client, url)
        assert [(model["state"], model["context_length"] > 0, model["type"]) for model in before.values()] == [("unloaded", True, "chat")] * 2
        assert [model["default"] for model in before.values()] == [True, False]
        texts = ["hello", "what is two plus two"]
        answers = await asyncio.gather(*(ask(client, url, name, text) for text in texts for name in ("gen1", "gen5")))
        got = dict(zip([(text, name) for text in texts for name in ("gen1", "gen5")], map(content, answers)))
        async with client.get(url + "/stats") as response:
            stats = await response.json()
        assert stats["models_bytes"] <= stats["models_memory"] == 230 * MIB
        assert sorted(model["state"] for model in stats["models"]) == ["ready", "unloaded"]
        assert stats["total_workers"] == len(stats["workers"]) == 2 and len({worker["gpu_id"] for worker in stats["workers"]}) == 2
        async with client.get(url + "/api/ps") as response:
            assert len((await response.json())["models"]) == 1
        gone = next(model["id"] for model in stats["models"] if model["state"] == "unloaded")
        body = {"model": gone, "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 12}
        async with client.post(url + "/v1/chat/completions", json=body | {"stream": True, "progress": True}) as response:
            events = frames(await response.read())
        loading = [event["progress"]["loading"] for event in events[:-1] if "loading" in event.get("progress", {})]
        assert loading and loading[0]["model"] == gone and 0 <= loading[0]["fraction"] <= 1
        async with client.post(url + "/tokenize", json={"model": "gen5", "content": "hello"}) as one, \
                client.post(url + "/tokenize", json={"model": "gen1", "content": "hello"}) as other:
            assert one.status == other.status == 200
    expected = await alone(client, nanochat_fixtures / "gen5", texts)   # all families: the twelve at night
    assert {text: got[text, "gen5"] for text in texts} == expected


async def test_an_idle_model_s_turn_ends_early(start_models, client, monkeypatch):
    """Else the third answer would take a thousand times as long as a load."""
    monkeypatch.setattr(Residency, "STAY_LOADS", 1000.0)
    models = await start_models("gen1", "gen5", models_memory=230 * MIB, prefix_memory=0)
    async with served(models) as url, asyncio.timeout(60):
        for name in ("gen1", "gen5", "gen1", "gen5"):
            assert content(await ask(client, url, name))
            assert models.source.residency.used <= models.source.residency.budget


async def test_requests_without_pause_are_answered_together(start_models, client):
    """Four clients of each model ask it three times; each model is loaded once for all of them."""
    models = await start_models("gen1", "gen5", models_memory=230 * MIB, prefix_memory=0)
    answered = []   # models, in the order of their answers

    async def ask_again(url, name):
        for _ in range(3):
            assert content(await ask(client, url, name))
            answered.append(name)

    async with served(models) as url, asyncio.timeout(60):
        await asyncio.gather(*(ask_again(url, name) for name in ("gen1", "gen5") * 4))
    assert len(answered) == 24 and answered == sorted(answered, key=answered.index)


async def test_two_models_share_the_kv_pages_of_one(start_models, client, nanochat_fixtures, monkeypatch):
    """They stay loaded and answer as before."""
    monkeypatch.setattr(Residency, "STAY_LOADS", 0.0)
    models = await start_models("gen1", "gen5", models_memory=10 * MIB << 10, prefix_memory=0)     # so that what is emptied is gone
    sizes = {name: models.find(name).bytes for name in ("gen1", "gen5")}
    models.source.residency.budget = sum(sizes.values()) - min(models.find(name).pool.memory.cache for name in sizes) // 2
    async with served(models) as url:
        found, pids = {}, {}
        for name in ("gen1", "gen5", "gen1"):
            answer = await ask(client, url, name, "what is two plus two? " * 10)
            models.find(name).model.pool.supervisor.load_s = 0.0   # its time is over at once
            assert found.setdefault(name, content(answer)) == content(answer)
            [worker] = models.find(name).model.pool.workers
            assert pids.setdefault(name, worker.process.pid) == worker.process.pid
            assert answer[1]["usage"].get("prompt_tokens_details", {}).get("cached_tokens", 0) == 0
            assert models.source.residency.used <= models.source.residency.budget
        states = await listed(client, url)
        assert [states[name]["state"] for name in sizes] == ["ready"] * 2 and states["gen5"]["bytes"] < sizes["gen5"]
        assert states["gen1"]["bytes"] == sizes["gen1"]


async def test_a_name_or_alias_finds_its_model(start_models, nanochat_fixtures, client):
    """Defaults do too; keys decide who sees and loads what."""
    keys = (ApiKey.hashed("all", "owner"), ApiKey.hashed("some", "bob", ("gen3", "small")), ApiKey.hashed("none", "eve", ("other",)))
    several = (ModelEntry(str(nanochat_fixtures / "gen1"), "first"), ModelEntry(str(nanochat_fixtures / "gen2"), "chief", ("chief-2", "chief-3", "chief-4"), default=True),
               ModelEntry(str(nanochat_fixtures / "gen3"), "gen3", ("small", "gpt-4o")))
    models = await start_models(several=several, keys=keys)
    whole, some, none = ({"Authorization": f"Bearer {key}"} for key in ("all", "some", "none"))
    async with served(models) as url:
        large = "x" * 70_000
        for name, model in (("", "chief"), ("default", "chief"), ("gpt-4o", "gen3"), ("small:latest", "gen3"), ("first", "first")):
            assert (await ask(client, url, name, headers=whole, ignored=large))[1]["model"] == model
        status, body = await ask(client, url, "chef", headers=whole)
        assert (status, body["error"]["code"]) == (404, "model_not_found") and 'did you mean "chief"' in body["error"]["message"]
        status, body = await ask(client, url, "chie", headers=whole)
        assert status == 404 and body["error"]["message"].endswith('did you mean "chief" or "chief-2" or "chief-3"?')
        assert (await ask(client, url, "", headers=some))[1]["model"] == "gen3"
        for name in ("first", "chief", str(nanochat_fixtures / "gen1")):
            for more in {}, {"ignored": large}:
                status, body = await ask(client, url, name, headers=some, **more)
                assert status == 404 and "first" not in body["error"]["message"].replace(f"`{name}`", "")
        assert (await ask(client, url, "", headers=none))[0] == 404
        assert [*await listed(client, url, **some)] == ["gen3"] and len(await listed(client, url, **whole)) == 3 and not await listed(client, url, **none)
        async with client.get(url + "/stats", headers=some) as response:
            stats = await response.json()
        assert [model["id"] for model in stats["models"]] == ["gen3"] and stats["total_workers"] == 1
        async with client.get(url + "/v1/models/first", headers=some) as hidden, client.get(url + "/v1/models/first", headers=whole) as seen:
            assert (hidden.status, seen.status) == (404, 200)
        for headers, status in ((some, 403), (whole, 200)):
            async with client.post(url + "/models/unload", json={"model": "gen3"}, headers=headers) as response:
                assert response.status == status
        while models.find("gen3").state != "unloaded":
            await asyncio.sleep(0.02)
        async with client.post(url + "/models/load", json={"model": "small"}, headers=whole) as response:
            assert (await response.json())["success"] is True
        while models.find("gen3").state != "ready":
            await asyncio.sleep(0.02)


async def test_a_broken_file_says_why_and_new_ones_show(start_models, nanochat_fixtures, client, tmp_path, monkeypatch):
    """A broken file among good ones says why and new files are seen."""
    monkeypatch.setattr(FolderWatch, "WATCH_S", 0.1)
    (tmp_path / "models" / "broken").mkdir(parents=True)
    (tmp_path / "models" / "broken" / "model.gguf").write_bytes(b"GGUF" + bytes(40))
    (tmp_path / "models" / "no.gguf").write_bytes(b"nothing")
    shutil.copytree(nanochat_fixtures / "gen5", tmp_path / "models" / "gen5")
    models = await start_models(several=(), models=str(tmp_path / "models"))
    async with served(models) as url:
        found = await listed(client, url)
        assert {name: model["state"] for name, model in found.items()} == {"model": "failed", "nanochat-d4-sft": "unloaded", "no": "failed"}
        assert "GGUF" in found["no"]["reason"] and str(tmp_path) not in json.dumps(found)
        status, body = await ask(client, url, "no")
        assert status == 503 and body["error"]["code"] == "model_failed" and str(tmp_path) not in body["error"]["message"]
        assert content(await ask(client, url, "")) == content(await ask(client, url, "d4@latest"))
        shutil.copytree(nanochat_fixtures / "gen3", tmp_path / "later")
        (tmp_path / "later").rename(tmp_path / "models" / "later")
        while "nanochat-d4-rl" not in (names := [*await listed(client, url)]):
            await asyncio.sleep(0.05)
        assert content(await ask(client, url, "nanochat-d4-rl")) and len(names) == 4
        shutil.rmtree(tmp_path / "models" / "broken")
        while "model" in await listed(client, url):
            await asyncio.sleep(0.05)


async def test_a_request_before_all_headers_comes_again(nanochat_fixtures, started, client, tmp_path, monkeypatch, caplog):
    """Its model has not failed. What has failed is said once, when the server starts."""
    (tmp_path / "bad.gguf").write_bytes(b"garbage, which is no model")
    several = (*choices(nanochat_fixtures, "gen1"), ModelEntry(str(tmp_path / "bad.gguf"), "bad"))
    models, read = many_models(Settings(several=several, **TINY), DYING), asyncio.Event()

    async def open_later(model, original=models.source.opener.open):
        await read.wait()
        return await original(model)

    monkeypatch.setattr(models.source.opener, "open", open_later)
    await started(models, wait=False)
    async with serving(models, models.settings) as url:
        while not models.registry.models:
            await asyncio.sleep(0.01)
        async with client.post(url + "/v1/chat/completions", json={"model": "gen1", "messages": [{"role": "user", "content": "hello"}]}) as response:
            error = (await response.json())["error"]
            assert (response.status, response.headers["Retry-After"], error["code"]) == (503, "3", "overloaded") and "are being read" in error["message"]
        assert (await listed(client, url))["gen1"]["state"] == "loading"
        read.set()
        await models.wait_ready()
        assert content(await ask(client, url, "gen1"))
    shown = [*caplog.messages, *models.describe()]
    assert len([line for line in shown if "garb" in line]) == 1 and "  bad: cannot be served (see above)" in shown


async def test_early_requests_load_only_what_fits(nanochat_fixtures, started, client, monkeypatch):
    """The third model is opened late. Two others have been opened, and are asked for: they take turns as later."""
    monkeypatch.setattr(Residency, "STAY_LOADS", 0.0)
    names = "gen1", "gen5", "gen3"
    several = choices(nanochat_fixtures, *names)
    models = many_models(Settings(several=several, models_memory=230 * MIB, prefix_memory=0, **TINY), DYING)
    read, beside = asyncio.Event(), []

    async def open_later(model, original=models.source.opener.open):
        if model.name == "gen3":
            await read.wait()
        return await original(model)

    async def start_worker(placement, worker, original=LocalDevices.open):
        beside.append([model.name for model in models.registry.models
                       if model.pool and model.pool.placement is not placement and not model.pool.supervisor.has_ended])
        return await original(placement, worker)

    monkeypatch.setattr(models.source.opener, "open", open_later)
    monkeypatch.setattr(LocalDevices, "open", start_worker)
    await started(models, wait=False)
    async with serving(models, models.settings) as url:
        while len(models.registry.models) < 3 or not all(model.pool for model in models.registry.models[:2]):
            await asyncio.sleep(0.01)
        asked = [asyncio.create_task(ask(client, url, name)) for name in names[:2]]
        while not all(models.find(name).pool.dispatcher.jobs for name in names[:2]):
            await asyncio.sleep(0.01)
        read.set()
        await models.wait_ready()
        for answer in [*await asyncio.gather(*asked), await ask(client, url, "gen3")]:
            assert content(answer)
    assert beside == [[], [], []]
    assert models.source.residency.used <= models.source.residency.budget


async def outcome(**settings):
    models = many_models(Settings(**TINY | settings), DYING)
    await models.start()
    try:
        await models.wait_ready()
    finally:
        await models.close()


async def test_what_cannot_be_served_ends_the_start(nanochat_fixtures, tmp_path):
    """The reason is one line."""
    one, other = choices(nanochat_fixtures, "gen1", "gen2")
    (tmp_path / "empty").mkdir()
    bad = [(dict(models=str(tmp_path / "empty")), "contains no GGUF file"), (dict(models=str(tmp_path / "none")), "there is no such folder"),
           (dict(several=(one, ModelEntry(other.path, "gen1"))), "two models have the name gen1"),
           (dict(several=(one, ModelEntry(other.path, "b", ("gen1",)))), "two models have the name gen1"),
           (dict(several=(one, ModelEntry(str(tmp_path / "missing")))), "no model at"),
           (dict(several=(one, other), models_memory=MIB, prefix_memory=0), r"needs [\d.]+ MB, and all models together may take 1.0 MB \(--models-memory\)"),
           (dict(several=(ModelEntry(one.path, "a", pin=True), ModelEntry(other.path, "b", pin=True)), models_memory=300 * MIB, prefix_memory=0), "pinned models")]
    for settings, words in bad:
        with pytest.raises(ConfigError, match=words) as error:
            await outcome(**settings)
        assert "\n" not in str(error.value)
    for settings, words in ((dict(ray_address="auto"), "--ray-address"), (dict(served_model_name=("x",)), "--served-model-name")):
        with pytest.raises(ConfigError, match=words):
            many_models(Settings(several=(one, other), **settings))


@pytest.mark.slow
async def test_a_failing_worker_fails_its_model_alone(start_models, nanochat_fixtures, client, tmp_path):
    """Its files are whole when the server starts, and later not."""
    folder = shutil.copytree(nanochat_fixtures / "gen5", tmp_path / "gen5")
    several = (*choices(nanochat_fixtures, "gen1"), ModelEntry(str(folder), "late"))
    models = await start_models(several=several)
    [weights] = folder.rglob("model_*.pt")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:len(whole) // 2])
    async with served(models) as url:
        status, body = await ask(client, url, "late")
        assert status == 503 and "have changed" in body["error"]["message"]
        while (message := (await ask(client, url, "late"))[1]["error"]["message"]).endswith("since it was found"):
            await asyncio.sleep(0.02)  # the first of these requests makes it be read again
        assert "cannot be served" in message and str(tmp_path) not in message
        assert models.find("late").state == "failed" and content(await ask(client, url, "gen1"))
        assert (await ask(client, url, "late"))[0] == 503
        weights.write_bytes(whole)
        models.source.RETRY_S = 0.0
        await ask(client, url, "late")
        while models.find("late").state == "failed":
            await asyncio.sleep(0.02)
        assert content(await ask(client, url, "late"))


@pytest.mark.slow
async def test_replicas_of_several_models_take_turns(start_models, nanochat_fixtures, client, monkeypatch):
    """A model leaves with all its replicas; the one that has more is counted so."""
    monkeypatch.setattr(Residency, "STAY_LOADS", 0.2)
    paths = {"two": nanochat_fixtures / "gen1", "one": nanochat_fixtures / "gen5", "most": nanochat_fixtures / "gen2"}
    replicas = {"two": None, "one": 1, "most": 3}
    several = tuple(ModelEntry(str(path), name, replicas=replicas[name]) for name, path in paths.items())
    expected = {name: await alone(client, path, ["hello"]) for name, path in paths.items()}
    models, assigned = await start_models(several=several, num_workers=2, models_memory=700 * MIB, prefix_memory=0), set()
    monkeypatch.setattr(Worker, "assign", lambda worker, job, assign=Worker.assign: (assigned.add(worker.gpu), assign(worker, job)))
    sizes = [models.find(name).bytes for name in ("one", "two", "most")]
    assert [round(size / sizes[0]) for size in sizes] == [1, 2, 3] and sum(sizes[1:]) > 700 * MIB
    async with served(models) as url:
        for name in ("two", "most", "one", "two"):
            workers = models.find(name).model.pool.workers
            assert content(await ask(client, url, name)) == expected[name]["hello"]
            while any(worker.state is not WorkerState.READY for worker in workers):
                await asyncio.sleep(0.02)
            assigned.clear()
            _, body = await ask(client, url, name, n=3)      # the second and third follow the first one's first token
            assert {choice["message"]["content"] for choice in body["choices"]} == {*expected[name].values()}
            assert assigned == {worker.gpu for worker in workers}
            workers[0].kill()
            assert content(await ask(client, url, name)) == expected[name]["hello"]
            assert models.source.residency.used <= 700 * MIB
    numbers = [worker.gpu for model in models.registry.models for worker in model.pool.workers]
    assert len(numbers) == len({*numbers}) == 6


@pytest.mark.slow
async def test_models_of_several_ranks_answer_as_alone(start_models, nanochat_fixtures, client, monkeypatch):
    """The KV pages of one would suffice, but its ranks cannot give them back alone."""
    monkeypatch.setattr(Residency, "STAY_LOADS", 0.0)
    models = await start_models("gen1", "gen5", tensor_parallel_size=2, models_memory=900 * MIB, prefix_memory=0)
    one, other = (models.find(name).model for name in ("gen1", "gen5"))
    assert all(400 * MIB < model.bytes < 450 * MIB for model in (one, other))
    models.source.residency.budget = one.bytes + other.bytes - one.pool.memory.cache // 2
    async with served(models) as url:
        found = {}
        for model in (one, other):
            found[model.name] = content(await ask(client, url, model.name))
            model.pool.supervisor.load_s = 0.0      # its time is over at once
        assert (one.state, one.pool.memory.empties, other.state) == ("unloaded", False, "ready")
    for name, answer in found.items():
        assert await alone(client, nanochat_fixtures / name, ["hello"], tensor_parallel_size=2) == {"hello": answer}


@pytest.mark.slow
async def test_twelve_models_lose_no_answer(
        start_models, nanochat_fixtures, client, tmp_path, monkeypatch):
    """There are random traffic, little memory and killed workers."""
    from families import make_model, save
    from generations import GENERATIONS
    monkeypatch.setattr(Residency, "STAY_LOADS", 1.0)
    paths = {name: nanochat_fixtures / name for name in GENERATIONS}
    for name in ("llama3.2", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "smollm3"):
        paths[name] = save(make_model(name), tmp_path / name)
    texts, drawn = ["hello", "a b c", "what is two plus two"], random.Random(38)
    expected = {name: await alone(client, path, texts) for name, path in paths.items()}
    models = await start_models(several=tuple(ModelEntry(str(path), name) for name, path in paths.items()), models_memory=800 * MIB, prefix_memory=80 * MIB)
    ended = asyncio.Event()
    most = kills = 0

    def assign_and_kill(worker, job, assign=Worker.assign):
        nonlocal kills
        assign(worker, job)
        if not any(held.failovers for held in worker.jobs.values()) and (not kills or drawn.random() < 0.2):
            worker.kill()
            kills += 1

    async def watch_memory():
        nonlocal most
        while not ended.is_set():
            most = max(most, models.source.residency.used)
            await asyncio.sleep(0.1)

    async def talk(url):
        for _ in range(6):
            name, text = drawn.choice([*paths]), drawn.choice(texts)
            assert content(await ask(client, url, name, text)) == expected[name][text], (name, text)

    monkeypatch.setattr(Worker, "assign", assign_and_kill)
    async with served(models) as url:
        watching = asyncio.ensure_future(watch_memory())
        await asyncio.wait_for(asyncio.gather(*(talk(url) for _ in range(6))), 400)
        ended.set()
        await watching
        assert 0 < most <= 800 * MIB and kills
        assert {model["state"] for model in (await listed(client, url)).values()} <= {"ready", "loading", "unloaded"}


def test_the_script_serves_many_named_models(monkeypatch):
    made = []
    monkeypatch.setattr(serve, "many_models", lambda settings, **more: made.append(settings) or (_ for _ in ()).throw(ConfigError("seen")))
    assert chat_server.main(["serve", "a", "b", "--port", "0"]) == 2 and [choice.path for choice in made[0].several] == ["a", "b"]
