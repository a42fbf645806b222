"""Files that drafts come from, which go or change while a model is served: answers go on without drafts, and the operator is told."""

import asyncio
import os
import shutil
from dataclasses import replace
from random import Random

import pytest

from chatlm.common.config import ModelEntry, Settings
from chatlm.common.errors import ConfigError
from chatlm.front.pool.many import many_models
from chatlm.front.pool.pool import make_pool
from asking import ask, served, text_of
from families import make_model, save
from forked import DYING
from nightly import by_day

pytestmark = pytest.mark.timeout(120)
TINY = {"dtype": "float32", "kv_cache_memory": 8 << 20, "max_batch": 8, "prefix_memory": 0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two trainings of a tiny llama."""
    root = tmp_path_factory.mktemp("trained")
    return [save(make_model("llama3.1", seed), root / str(seed)) for seed in range(2)]


@pytest.fixture
def model(trained, tmp_path):
    return shutil.copytree(trained[0], tmp_path / "tiny-llama")


@pytest.fixture
def draft(trained, tmp_path):
    return shutil.copytree(trained[0], tmp_path / "tiny-draft")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "manual.txt"
    path.write_text("hello hello hello " * 40)
    return path


@pytest.fixture
def start(model, draft, text, started, tmp_path, monkeypatch):
    """A function that starts a server of the tiny model with a draft model and a text, whose workers die when a request says so."""
    monkeypatch.setenv("STRUCK", str(tmp_path))

    async def start(**changes):
        settings = Settings(**{"model": str(model), "draft_model": str(draft), "draft_text": (str(text),)} | TINY | changes)
        return await started(make_pool(settings, DYING))

    return start


async def stats_of(client, url):
    async with client.get(url + "/stats") as response:
        return await response.json()


def removed(draft, text, trained):
    shutil.rmtree(draft)
    text.unlink()


def cut(draft, text, trained):
    weights = draft / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    text.write_text("")


def garbage(draft, text, trained):
    (draft / "config.json").write_bytes(os.urandom(500))
    text.write_bytes(bytes(range(128, 256)))


def other_tokenizer(draft, text, trained):
    tokenizer = (draft / "tokenizer.json").read_text()
    (draft / "tokenizer.json").write_text(tokenizer.replace('"hello"', '"olleh"').replace('"a"', '"å"'))
    text.unlink()


def pipes(draft, text, trained):
    """Whoever opens one waits for a writer."""
    for path in (draft / "model.safetensors", text):
        path.unlink()
        os.mkfifo(path)


CHANGES = removed, cut, garbage, other_tokenizer, pipes


@pytest.mark.parametrize("change", by_day(CHANGES, removed, cut))
async def test_a_worker_without_its_draft_files_answers(
        change, start, draft, text, trained, client, caplog):
    """It says so."""
    pool = await start()
    async with served(pool) as url:
        before = await text_of(client, url)
        assert (await stats_of(client, url))["workers"][0]["without"] == []
        change(draft, text, trained)
        assert await text_of(client, url, struck="kill-decode-1") == before
        assert await text_of(client, url) == before
        [worker] = (await stats_of(client, url))["workers"]
        assert worker["restarts"] == 1
        assert [reason.split()[0].strip(":") for reason in worker["without"]] == ["--draft-text", "--draft-model"]
        assert str(draft.parent) not in str(worker["without"])
        assert await text_of(client, url, struck="kill-decode-2") == before
    said = [record.getMessage() for record in caplog.records if "--draft" in record.getMessage()]
    assert len(said) == 1 and "starts without" in said[0]


def another_training(draft, text, trained):
    shutil.copy(trained[1] / "model.safetensors", draft / "new")
    (draft / "new").rename(draft / "model.safetensors")
    text.write_text("good bye " * 100)


def noise(draft, text, trained):
    """Its header stays whole, and all of its weights are the same number."""
    weights = draft / "model.safetensors"
    with open(weights, "r+b") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        file.seek(begin)
        file.write(b"\x3c" * (weights.stat().st_size - begin))


@pytest.mark.parametrize("change", by_day([another_training, noise], another_training))
async def test_a_worker_drafts_with_the_files_it_finds(change, start, draft, text, trained, client, tmp_path):
    """It takes those that are there when it starts, and answers stay the same."""
    (tmp_path / "draft-always").touch()
    pool = await start()
    async with served(pool) as url:
        before = await text_of(client, url)
        warm = await text_of(client, url, temperature=1, seed=7)
        change(draft, text, trained)
        assert await text_of(client, url, struck="kill-decode-1") == before
        assert await text_of(client, url, temperature=1, seed=7) == warm
        [worker] = (await stats_of(client, url))["workers"]
        assert worker["restarts"] == 1 and worker["without"] == [] and worker["drafted_model"] > 0


async def test_a_draft_that_kills_a_worker_is_left_out(start, model, client, tmp_path, caplog):
    """No message tells why: it is tried without."""
    pool = await start()
    async with served(pool) as url:
        before = await text_of(client, url)
        (tmp_path / "kill-draft").touch()
        assert await text_of(client, url, struck="kill-decode-1") == before
        [worker] = (await stats_of(client, url))["workers"]
        assert worker["restarts"] == 2 and worker["crashes_in_row"] == 0 and worker["problem"] == ""
        assert worker["without"] == [f"{flag}: the process before this one could not start (killed by SIGKILL, as the system does when memory runs out)"
                                     for flag in ("--draft-text", "--draft-model")]


async def test_a_failed_worker_drafts_once_it_can(start, client):
    """It has said why it could not start."""
    pool = await start()
    [worker] = pool.workers
    settings = pool.placement.settings
    pool.placement.settings = replace(settings, kv_cache_memory=1)
    worker.process.kill()
    while not worker.cannot_start:
        await asyncio.sleep(0.02)
    pool.placement.settings = settings
    while worker.state != "ready":
        await asyncio.sleep(0.02)
    assert worker.without == ()


@pytest.mark.parametrize("ranks", by_day([1, 2], 1))
async def test_a_draft_model_without_memory_is_left_out(ranks, start, draft, trained, client):
    """The file was replaced by that of a model that is larger."""
    pool = await start(tensor_parallel_size=ranks)
    async with served(pool) as url:
        before = await text_of(client, url)
        shutil.rmtree(draft)
        save(make_model("llama3.1", 0, max_position_embeddings=1024, num_hidden_layers=60, num_key_value_heads=4), draft)
        pool.placement.settings = replace(pool.placement.settings, kv_cache_memory=600_000)
        assert await text_of(client, url, struck="kill-decode-1") == before
        [worker] = (await stats_of(client, url))["workers"]
        assert worker["restarts"] == 1 and len(worker["without"]) == 1 and "KV cache" in worker["without"][0]


async def test_a_first_start_fails_on_a_useless_draft(start, draft, text):
    """A flag names what cannot draft."""
    with pytest.raises(ConfigError, match="no model at"):
        await start(draft_model=str(draft) + "-none")
    with pytest.raises(ConfigError, match="--draft-text .*: No such file"):
        await start(draft_text=(str(text) + "-none",))


async def test_later_starts_go_on_without_drafts_too(start, draft, text, trained, client):
    """They are a second replica, and a model that is loaded again."""
    pool = await start(num_workers=2, idle_unload=0.01)
    async with served(pool) as url:
        before = await text_of(client, url)
        while not pool.supervisor.asleep:
            await asyncio.sleep(0.02)
        removed(draft, text, trained)
        assert await text_of(client, url) == before
        assert [len(worker["without"]) for worker in (await stats_of(client, url))["workers"] if worker["state"] == "ready"] in ([2], [2, 2])


@pytest.fixture
async def several(model, draft, text, trained, started, tmp_path, monkeypatch):
    monkeypatch.setenv("STRUCK", str(tmp_path))
    choices = ModelEntry(str(model), "one"), ModelEntry(str(trained[1]), "two")
    return await started(many_models(Settings(several=choices, draft_model=str(draft), draft_text=(str(text),), **TINY), DYING))


@pytest.mark.parametrize("change", by_day([removed, another_training], another_training))
async def test_a_changed_draft_is_left_out_of_many_models(
        change, several, draft, text, trained, client):
    """Its memory was measured with the old files."""
    async with served(several) as url:
        before, other = await text_of(client, url, "one"), await text_of(client, url, "two")
        assert [worker["without"] for worker in (await stats_of(client, url))["workers"]] == [[], []]
        assert await text_of(client, url, "one", "kill-decode-0") == before     # the files are the same
        assert [worker["without"] for worker in (await stats_of(client, url))["workers"]] == [[], []]
        change(draft, text, trained)
        assert await text_of(client, url, "one", "kill-decode-1") == before
        async with client.post(url + "/models/unload", json={"model": "two"}) as response:
            assert response.status == 200
        assert await text_of(client, url, "two") == other
        workers = (await stats_of(client, url))["workers"]
        expected = ["--draft-text", "--draft-model"] if change is removed else ["model.safetensors was changed"]
        for worker in workers:
            assert len(worker["without"]) == len(expected) and all(word in reason for word, reason in zip(expected, worker["without"])), workers


async def test_a_model_of_several_loses_its_draft(several, model, draft, text, trained, client):
    """It is read again without it and served."""
    async with served(several) as url:
        before, other = await text_of(client, url, "one"), await text_of(client, url, "two")
        removed(draft, text, trained)
        shutil.copy(trained[1] / "model.safetensors", model / "new")
        (model / "new").rename(model / "model.safetensors")
        async with client.post(url + "/models/unload", json={"model": "one"}) as response:
            assert response.status == 200
        async with asyncio.timeout(60):
            while (answer := await ask(client, url, "one"))[0] == 503:
                await asyncio.sleep(0.05)
        assert answer[1]["choices"][0]["message"]["content"] == other != before
        shutil.copytree(trained[0], draft)   # it is back, and has no room: the memory was measured without it
        assert await text_of(client, url, "one", "kill-decode-1") == other
        [worker] = [worker for worker in (await stats_of(client, url))["workers"] if worker["model"] == "one"]
        assert any("tiny-draft has come since the memory was measured" in reason for reason in worker["without"]), worker


@pytest.mark.slow
async def test_a_draft_model_changes_no_answer(start, draft, trained, client, tmp_path):
    """Something happens to it while workers die."""
    (tmp_path / "draft-always").touch()
    random, whole = Random(5), shutil.copytree(draft, tmp_path / "whole")
    pool = await start(num_workers=2)
    async with served(pool) as url:
        cold = await text_of(client, url)
        warm = await text_of(client, url, temperature=1, seed=3, max_tokens=60)
        for number in range(25):
            shutil.rmtree(draft, ignore_errors=True)
            what = random.choice(["removed", "back", "cut", "garbage", "other"])
            if what != "removed":
                shutil.copytree(trained[1] if what == "other" else whole, draft)
            if what == "cut":
                os.truncate(draft / "model.safetensors", random.randrange(10, 600_000))
            elif what == "garbage":
                (draft / random.choice(["config.json", "tokenizer.json", "model.safetensors"])).write_bytes(random.randbytes(900))
            found = await asyncio.gather(text_of(client, url, struck=f"kill-decode-{number}"), text_of(client, url, temperature=1, seed=3, max_tokens=60))
            assert found == [cold, warm], (number, what)
