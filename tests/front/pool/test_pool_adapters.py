"""Adapters beside one model, through HTTP: their names, what is refused, folders that change, a worker that dies."""

import asyncio
import shutil
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from chatlm.common.config import ApiKey, ModelEntry, Settings
from chatlm.common.errors import ConfigError, shown
from chatlm.front.pool.pool_adapters import AdapterWatch
from chatlm.front.pool.many import FolderWatch, many_models
from chatlm.front.pool.pool import make_pool
from command_line import parse_command_line
from fake_pool import frames, serving
from families import make_model, save
from forked import DYING
from lora import random_adapter, shapes_of
from nightly import by_day

TINY = {"dtype": "float32", "kv_cache_memory": 8 << 20, "max_batch": 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny llama."""
    return save(make_model("llama3.1"), tmp_path_factory.mktemp("models") / "tiny-llama")


def adapter(base, folder, seed=0, **config):
    layers, shapes = shapes_of(base)
    return random_adapter(folder, layers, shapes, seed, size=0.3, **config)


@pytest.fixture
def start(base, started):
    """A function that starts a server of the tiny model with adapters."""
    async def start(*adapters, **changes):
        return await started(make_pool(Settings(model=str(base), adapter=adapters, **TINY | changes), DYING))

    return start


@asynccontextmanager
async def served(pool):
    async with serving(pool, pool.settings) as url:
        yield url


async def ask(client, url, model, text="hello", headers=None, route="/v1/chat/completions", **changes):
    body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 16, **changes}
    async with client.post(url + route, json=body, headers=headers) as response:
        return response.status, await response.json()


async def text_of(client, url, model, *more, **changes):
    status, body = await ask(client, url, model, *more, **changes)
    assert status == 200, body
    return body["choices"][0]["message"]["content"]


async def listed(client, url, headers=None):
    async with client.get(url + "/v1/models", headers=headers) as response:
        return {model["id"]: model for model in (await response.json())["data"]}


async def test_an_adapter_is_a_model_of_two_names(start, base, client, tmp_path):
    """Their answers differ, also from a base that has merged it at load only in its name; no name is unknown twice."""
    one, two = adapter(base, tmp_path / "one", 1), adapter(base, tmp_path / "two", 2)
    pool = await start(f"one={one}", f"two={two}")
    merged = make_pool(Settings(model=str(base), lora=(str(one),), **TINY), DYING)
    async with served(pool) as url:
        models = await listed(client, url)
        assert [*models] == ["tiny-llama", "one", "two"] and models["one"]["aliases"][0] == "tiny-llama@one"
        assert models["one"]["parent"] == "tiny-llama" and models["one"]["state"] == "ready" and models["one"]["bytes"] > 1000
        plain, first, second = await asyncio.gather(*(text_of(client, url, name) for name in ("", "one", "two")))
        assert len({plain, first, second}) == 3
        for name, text in (("tiny-llama", plain), ("default", plain), ("tiny-llama@one", first), ("one:latest", first), ("tiny-llama@two", second)):
            assert await text_of(client, url, name) == text, name
        async with client.get(url + "/v1/models/tiny-llama@two") as response:
            assert (await response.json())["id"] == "two"
        status, body = await ask(client, url, "three")
        assert status == 404 and body["error"]["code"] == "model_not_found"
        long = "word " * 20_000          # read in a sandbox, which has to know the name too
        status, body = await ask(client, url, "tiny-llama@one", long, max_tokens=1)
        assert status == 400 and body["error"]["code"] == "context_length_exceeded"
        status, body = await ask(client, url, "three", long)
        assert status == 404
        status, body = await ask(client, url, "two", route="/api/chat", stream=False)
        assert (status, body["model"]) == (200, "two")
        async with client.get(url + "/stats") as response:
            stats = await response.json()
        assert [model["id"] for model in stats["models"]] == ["tiny-llama", "one", "two"]
        assert stats["workers"][0]["adapter_bytes"] == models["one"]["bytes"] + models["two"]["bytes"]
    await merged.start()
    await merged.wait_ready()
    try:
        async with served(merged) as url:
            assert await text_of(client, url, "") == first
    finally:
        await merged.close()


async def test_a_comparison_names_adapters_of_one_base(start, base, client, tmp_path):
    """They are others than its own."""
    pool = await start(*(f"{name}={adapter(base, tmp_path / name, seed)}" for seed, name in enumerate(("one", "two"))))
    async with served(pool) as url:
        for model in ("one", "tiny-llama@one", "tiny-llama", ""):
            body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "variants": [{}, {"adapter": "one"}, {"adapter": "two"}]}
            async with client.post(url + "/v1/compare", json=body) as response:
                assert response.status == 200, await response.text()
                *_, end = frames(await response.read())
            assert [answer["model"] for answer in end["answers"]] == ["one" if "one" in model else "tiny-llama", "one", "two"]


async def test_a_key_may_be_bound_to_an_adapter(start, base, client, tmp_path):
    folder = adapter(base, tmp_path / "one")
    keys = ApiKey.hashed("all", "all"), ApiKey.hashed("bound", "bound", ("one",))
    pool = await start(f"one={folder}", keys=keys)
    async with served(pool) as url:
        bound, other = {"Authorization": "Bearer bound"}, {"Authorization": "Bearer all"}
        assert [*await listed(client, url, bound)] == ["one"]
        assert await text_of(client, url, "", headers=bound) == await text_of(client, url, "one", headers=other)
        status, _ = await ask(client, url, "tiny-llama", headers=bound)
        assert status == 404


async def test_shown_adapter_names_lack_their_base_s_path(start, base, client, tmp_path):
    """Which a request may use all the same."""
    folder = adapter(base, tmp_path / "one")
    keys = ApiKey.hashed("all", "all"), ApiKey.hashed("bound", "bound", ("one",))
    pool = await start(f"one={folder}", keys=keys, served_model_name=("llama", "small"))
    async with served(pool) as url:
        bound, other = {"Authorization": "Bearer bound"}, {"Authorization": "Bearer all"}
        assert (await listed(client, url, other))["one"]["aliases"] == ["tiny-llama@one", "llama@one", "small@one"]
        for headers in bound, other:
            for name in ("llama@on", f"{base}@on", "tiny", str(base.parent)):
                status, body = await ask(client, url, name, headers=headers)
                if status != 200:
                    assert status == 404 and str(base.parent) not in body["error"]["message"].replace(shown(name)[1:].removesuffix('"'), ""), body
            assert await text_of(client, url, f"{base}@one", headers=headers) == await text_of(client, url, "small@one", headers=headers)
            long = "word " * 20_000          # read in a sandbox
            assert (await ask(client, url, f"{base}@one", long, headers=headers, max_tokens=1))[1]["error"]["code"] == "context_length_exceeded"


async def test_an_adapter_s_answer_outlasts_its_worker(start, base, client, tmp_path, monkeypatch):
    struck = tmp_path / "struck"
    struck.mkdir()
    monkeypatch.setenv("STRUCK", str(struck))
    folder = adapter(base, tmp_path / "one")
    pool = await start(f"one={folder}", num_workers=2)
    async with served(pool) as url:
        whole = await text_of(client, url, "one", max_tokens=60, ignore_eos=True)
        asked = [text_of(client, url, name, max_tokens=60, ignore_eos=True, headers={"X-Request-Id": id})
                 for name, id in [("one", "kill-decode-1"), ("one", "beside-1"), ("", "beside-2"), ("one", "beside-3")]]
        texts = await asyncio.gather(*asked)
        assert [file.name for file in struck.iterdir()] == ["kill-decode-1"]
        assert texts[0] == texts[1] == texts[3] == whole != texts[2]
        shutil.rmtree(folder)
        pids = [worker.process.pid for worker in pool.workers]
        for worker in pool.workers:
            worker.kill()
        while not (pool.supervisor.ready and all(worker.process.pid not in pids and worker.state == "ready" for worker in pool.workers)):
            await asyncio.sleep(0.02)
        while not pool.adapters.serving["one"].problem:
            await asyncio.sleep(0.02)
        status, body = await ask(client, url, "one")
        assert status == 503 and body["error"]["code"] == "model_failed" and str(folder) not in body["error"]["message"], body
        assert await text_of(client, url, "") and (await listed(client, url))["one"]["state"] == "failed"


@pytest.mark.parametrize("sizes", by_day([{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], {"tensor_parallel_size": 2}), ids=lambda sizes: next(iter(sizes)))
async def test_ranks_give_each_adapter_the_same_text(sizes, start, base, client, tmp_path, monkeypatch):
    """It is the same alone, beside others and after a death."""
    monkeypatch.setenv("STRUCK", str(tmp_path))
    words = [f"{name}={adapter(base, tmp_path / name, seed)}" for seed, name in enumerate(("one", "two"))]
    pool = await start(*words, **sizes)
    async with served(pool) as url:
        names = ["one", "", "two"]
        alone = [await text_of(client, url, name, max_tokens=60, ignore_eos=True) for name in names]
        assert len({*alone}) == 3
        ids = [f"beside-{number}" for number in range(5)] + ["kill-decode-1"]
        together = [text_of(client, url, name, max_tokens=60, ignore_eos=True, headers={"X-Request-Id": id}) for name, id in zip(names * 2, ids)]
        assert await asyncio.gather(*together) == alone * 2
        assert pool.workers[0].restarts == 1


async def test_adapters_come_and_go_with_their_folders(start, base, client, tmp_path, monkeypatch, caplog):
    """They change with them too."""
    monkeypatch.setattr(AdapterWatch, "WATCH_S", 0.05)
    watched = tmp_path / "adapters"
    adapter(base, watched / "first", 1)
    (watched / "latest").mkdir(parents=True)
    pool = await start(str(watched))

    async def until(holds):
        while not holds():
            await asyncio.sleep(0.02)

    async with served(pool) as url:
        before = await text_of(client, url, "first")
        running = asyncio.create_task(text_of(client, url, "first", max_tokens=100, ignore_eos=True))
        old = pool.adapters.serving["first"]
        expected = await text_of(client, url, "first", max_tokens=100, ignore_eos=True)
        adapter(base, watched / "second", 2)
        adapter(base, watched / "12", 3)                            # a number is a checkpoint's
        await until(lambda: "second" in pool.adapters.serving and pool.adapters.serving["second"].loaded)
        assert [*await listed(client, url)] == ["tiny-llama", "first", "second"]
        adapter(base, watched / "first", 4)
        await until(lambda: pool.adapters.serving["first"] is not old)
        after = await text_of(client, url, "first")
        assert after != before and await running == expected
        (watched / "second" / "adapter_config.json").write_text("{")
        await until(lambda: "its older version stays" in caplog.text)
        assert await text_of(client, url, "second")
        shutil.rmtree(watched / "first")
        await until(lambda: "first" not in pool.adapters.serving)
        for name in ("first", "tiny-llama@first", "first:latest"):
            status, body = await ask(client, url, name)
            assert status == 404 and 'the adapter "first" is no longer served: its files were removed' in body["error"]["message"], body
        status, body = await ask(client, url, "other@first")
        assert status == 404 and "does not exist" in body["error"]["message"]
        await until(lambda: len(pool.adapters.all) == 1)            # the workers have forgotten the others
        bad = adapter(base, watched / "bad", 5, use_dora=True)
        await until(lambda: "bad" in pool.adapters.serving and pool.adapters.serving["bad"].problem)
        status, body = await ask(client, url, "bad")
        assert status == 503 and "use_dora is true" in body["error"]["message"] and str(bad) not in body["error"]["message"]
        assert await text_of(client, url, "tiny-llama")


@pytest.mark.parametrize("word, message", [
    ("latest={}", "may not be called \"latest\""), ("12={}", "neither `latest` nor a number"), ("a/b={}", "may not be called"),
    ("={}", "may not be called"), ("one=", "names no folder"), ("one={}/none", "there is no such folder"), ("one={}/file", "not a folder"),
    ("{}/good", "an adapter needs a name: good="), ("one={}", "there is no adapter_config.json with an adapter_model.safetensors")])
def test_a_wrong_adapter_flag_is_one_line(word, message, base, tmp_path):
    adapter(base, tmp_path / "good")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=message) as caught:
        make_pool(parse_command_line([str(base), "--adapter", word.format(tmp_path)], {}))
    assert "\n" not in str(caught.value)


async def test_an_unusable_adapter_ends_the_start(start, base, tmp_path):
    good = adapter(base, tmp_path / "good")
    for words, message in (
            ([f"one={good}", f"one={good}"], "has the name one too"), ([f"tiny-llama={good}"], "the model has the name tiny-llama"),
            ([f"one={random_adapter(tmp_path / 'other', 1, {'self_attn.q_proj': (64, 32)}, base_model_name_or_path='some/Qwen3-8B')}"],
             "of the shapes .* this adapter was made for .*Qwen3-8B"),
            ([f"good={good}", f"one={adapter(base, tmp_path / 'dora', use_dora=True)}"], "--adapter one: .*use_dora is true")):
        with pytest.raises(ConfigError, match=message):
            await start(*words)


def test_a_configuration_table_names_adapters(base, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text(f'model = "{base}"\n[adapter]\none = "/a"\ntwo = "/b"\n')
    assert parse_command_line(["--config", str(config)], {}).adapter == ("one=/a", "two=/b")
    config.write_text(f'[[models]]\npath = "{base}"\nadapter = {{one = "/a"}}\n')
    assert parse_command_line(["--config", str(config)], {}).several[0].changes["adapter"] == ("one=/a",)
    config.write_text(f'model = "{base}"\n[adapter]\n7 = "/a"\n')
    with pytest.raises(ConfigError, match="may not be called"):
        parse_command_line(["--config", str(config)], {})


async def test_of_several_models_each_has_its_adapters(base, client, tmp_path, monkeypatch):
    """By the name of the base in its config, or by its table; also those that appear below --models."""
    monkeypatch.setattr(FolderWatch, "WATCH_S", 0.05)
    folder = tmp_path / "all"
    shutil.copytree(base, folder / "red")
    shutil.copytree(base, folder / "blue")
    adapter(base, folder / "on-red", 1, base_model_name_or_path="somebody/red")
    models = many_models(Settings(models=str(folder), **TINY), DYING)
    await models.start()
    await models.wait_ready()
    try:
        async with served(models) as url:
            while "on-red" not in (names := await listed(client, url)):
                await asyncio.sleep(0.02)
            assert sorted(names) == ["blue", "on-red", "red"] and names["on-red"]["parent"] == "red"
            assert await text_of(client, url, "red@on-red") != await text_of(client, url, "red") == await text_of(client, url, "blue")
            assert (await ask(client, url, "blue@on-red"))[0] == 404
            places = {model.name: model.pool.memory for model in models.registry.models}
            names = await listed(client, url)
            assert places["red"].size == places["blue"].size + names["on-red"]["bytes"] and models.stats(models.registry.served_models())["models_bytes"] == sum(place.bytes for place in places.values())
            without_adapters = places["blue"].size
            adapter(base, folder / "on-blue", 1, base_model_name_or_path="blue")
            while "on-blue" not in await listed(client, url):
                await asyncio.sleep(0.02)
            assert await text_of(client, url, "on-blue") == await text_of(client, url, "on-red")
            shutil.rmtree(folder / "on-red")
            while places["red"].size != without_adapters:
                await asyncio.sleep(0.02)
            status, body = await ask(client, url, "on-red")
            assert status == 404 and 'the adapter "on-red" is no longer served' in body["error"]["message"], body
    finally:
        await models.close()
    choices = ModelEntry(str(folder / "red"), "red"), ModelEntry(str(folder / "blue"), "blue")
    tight = replace(choices[0], changes={"adapter": (f"one={folder / 'on-blue'}",)})
    models = many_models(Settings(several=(tight,), models_memory=without_adapters + 1, **TINY), DYING)
    await models.start()
    with pytest.raises(ConfigError, match=r"it needs .* with its adapters \(.*\(--models-memory\)"):
        await models.wait_ready()
    await models.close()
    for name, words in (("green", "matches none of the models"), ("", "matches none of the models")):
        other = adapter(base, tmp_path / "other", base_model_name_or_path=name)
        models = many_models(Settings(several=choices, adapter=(f"one={other}",), **TINY), DYING)
        await models.start()
        with pytest.raises(ConfigError, match=words):
            await models.wait_ready()
        await models.close()


