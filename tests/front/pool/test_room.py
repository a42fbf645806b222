"""What can never fit in memory beside the pinned models is refused with both numbers, at any time: no request waits for it."""

import asyncio
import logging
import shutil
from dataclasses import replace

import pytest

import tiny_training
from chatlm.common.config import ModelEntry, Settings
from chatlm.common.errors import ConfigError
from chatlm.common.hub.adapter_folders import adapter_at
from chatlm.common.messages.protocol import AdapterLoaded, DropAdapter
from chatlm.front.evals.checkpoint_evaluator import CheckpointEvaluator
from chatlm.front.pool.many import FolderWatch, many_models
from chatlm.front.pool.residency import MemoryShare, Residency
from chatlm.front.pool.run_watch import RunWatch
from fake_pool import serving
from families import make_model, save
from forked import DYING
from lora import random_adapter
from pools import played_pool

TINY = {"dtype": "float32", "kv_cache_memory": 4 << 20, "max_batch": 8, "prefix_memory": 0, "nice": 0}
MIB = 1 << 20
BOTH = r"it needs [\d.]+ MB, and the pinned models leave [\d.]+ MB of --models-memory"


@pytest.fixture
def start_pinned(nanochat_fixtures, started, monkeypatch):
    """A function that starts a catalogue with a pinned model; the memory has no room for another one."""
    monkeypatch.setattr(FolderWatch, "WATCH_S", 0.05)
    monkeypatch.setattr(RunWatch, "WATCH_S", 0.05)

    async def start(*others, **changes):
        pinned = ModelEntry(str(nanochat_fixtures / "gen1"), "pinned", pin=True, default=True)
        return await started(many_models(Settings(several=(*others, pinned), models_memory=300 * MIB, **TINY | changes), DYING, CheckpointEvaluator))

    return start


async def ask(client, url, model, **changes):
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 4} | changes
    async with asyncio.timeout(60), client.post(url + "/v1/chat/completions", json=body) as response:
        return response.status, await response.json()


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_model_too_large_beside_a_pin_is_refused(start_pinned, nanochat_fixtures, client, caplog):
    """Each later try is refused too."""
    models = await start_pinned(ModelEntry(str(nanochat_fixtures / "gen5"), "other"))
    models.source.RETRY_S = 0.0
    async with serving(models, models.settings) as url:
        for _ in range(3):
            status, body = await ask(client, url, "other")
            assert status == 503 and "the pinned models leave" in body["error"]["message"]
            await until(lambda: models.registry.find("other").model.failed_s < float("inf"))
        assert (await ask(client, url, "pinned"))[0] == 200
        assert [place.name for place in models.source.residency.shares] == ["pinned"]
    assert len([line for line in caplog.messages if "other cannot be served" in line]) == 1


async def test_new_files_that_do_not_fit_are_refused(start_pinned, nanochat_fixtures, client, tmp_path, caplog):
    """A new checkpoint is too."""
    caplog.set_level(logging.INFO, logger="chat_server")
    (tmp_path / "models").mkdir()
    shutil.copytree(nanochat_fixtures / "gen1" / "tokenizer", tmp_path / "run" / "tokenizer")
    models = await start_pinned(models=str(tmp_path / "models"), watch=str(tmp_path / "run"))
    shutil.copytree(nanochat_fixtures / "gen5", tmp_path / "models" / "late")
    list(tiny_training.train(tmp_path / "run", 1, 1))
    async with serving(models, models.settings) as url:
        await until(lambda: len(models.registry.models) == 2 and "d2-base@1 is not served" in caplog.text)
        status, body = await ask(client, url, models.registry.models[-1].name)
        assert status == 503 and "the pinned models leave" in body["error"]["message"]
        assert (await ask(client, url, "d2-base@1"))[0] == 404
        assert (await ask(client, url, "pinned"))[0] == 200


@pytest.mark.parametrize("pinned", [False, True])
async def test_an_adapter_beyond_memory_is_refused(
        pinned, started, client, tmp_path, monkeypatch, caplog):
    """Below --models, of a base that is pinned or is not; the same for a new adapter."""
    monkeypatch.setattr(FolderWatch, "WATCH_S", 0.05)
    base = save(make_model("llama3.1"), tmp_path / "base")
    folder = random_adapter(tmp_path / "all" / "law", 1, {"self_attn.q_proj": (64, 64)}, base_model_name_or_path="base", size=0.3)
    choice = ModelEntry(str(base), "base", pin=pinned)
    models = await started(many_models(Settings(several=(choice,), models=str(folder.parent), **TINY), DYING))
    async with serving(models, models.settings) as url:
        assert (await ask(client, url, "law"))[0] == 200 == (await ask(client, url, "base"))[0]
        [place] = models.source.residency.shares
        models.source.residency.budget, size = place.size + (3 << 20), place.size
        old = place.pool.adapters.serving["law"]
        random_adapter(folder, 1, {"self_attn.q_proj": (64, 64)}, rank=8192, base_model_name_or_path="base")
        random_adapter(folder.parent / "late", 1, {"self_attn.q_proj": (64, 64)}, rank=8192, base_model_name_or_path="base")
        await until(lambda: "the adapter law" in caplog.text and "the adapter late" in caplog.text)
        assert (await ask(client, url, "law"))[0] == 200
        place.leave()       # it has to be loaded anew, and the files of the old version have gone
        assert (await ask(client, url, "base"))[0] == 200
        await until(lambda: old.problem)
        assert (await ask(client, url, "law"))[0] == 503 and (await ask(client, url, "late"))[0] == 404
        assert place.size == size and place.pool.adapters.serving["law"] is old
        lines = [line for line in caplog.messages if "the adapter la" in line and "is not served" in line]
        assert len(lines) == 2 and all("with its adapters" in line and "(--models-memory)" in line for line in lines), lines
        assert "its older version stays" in next(line for line in lines if "law" in line)
        random_adapter(folder, 1, {"self_attn.q_proj": (64, 64)}, rank=4, seed=9, base_model_name_or_path="base")
        await until(lambda: place.pool.adapters.serving["law"] is not old)      # a smaller one fits


def test_an_adapter_larger_than_it_seemed_is_refused(tmp_path, caplog):
    """The worker drops it; its older version goes on."""
    files = [adapter_at(random_adapter(tmp_path / name, 1, {"self_attn.q_proj": (64, 64)}), "law") for name in ("old", "new")]
    pool = played_pool()
    [worker], adapters, [old, new] = pool.workers, pool.adapters, files
    place = MemoryShare("base", pool, 10 << 20)
    residency = Residency(place.size + 3 * old.nbytes)
    residency.admit(place)
    adapters.ask_for_room(lambda more: residency.admit(place, more))
    for version, nbytes in ((old, 1000), (new, old.nbytes), (new, 4 * old.nbytes)):
        adapters.serve(version)
        [adapter] = [adapter for adapter in adapters.all.values() if not adapter.loaded]
        adapters.note(worker, AdapterLoaded(adapter.id, "", nbytes, "d"))
        fits = nbytes <= old.nbytes
        assert (adapters.serving["law"] is adapter) == fits
        adapters.drop_unused()
    assert "the adapter law cannot be served (its older version stays): with it the model does not fit: it needs" in caplog.text
    assert isinstance(worker.sent[-1], DropAdapter) and worker.sent[-1].id == adapter.id and place.size <= residency.budget


class Places:
    """Admitted models with a played pool each."""

    def __init__(self, budget):
        self.residency = Residency(budget)

    def place(self, name, size, **options):
        return MemoryShare(name, played_pool(), size, **options)

    def admit(self, name, size, **options):
        self.residency.admit(self.place(name, size, **options))


def test_every_admitted_model_fits_beside_the_pins():
    """They may come in any order."""
    places = Places(100)
    places.admit("a", 60, pinned=True)
    places.admit("b", 40)
    places.admit("c", 40)       # b and c take turns
    for name, size, options, words in (
            ("d", 41, {}, r"it needs 0.0 MB, and the pinned models leave 0.0 MB of --models-memory"),
            ("e", 41, {"pinned": True}, r"the pinned models \(a, e\) need 0.0 MB, and all models together may take"),
            ("f", 1, {"pinned": True}, r"it needs 0.0 MB and is pinned, which leaves 0.0 MB of --models-memory, and b needs 0.0 MB")):
        with pytest.raises(ConfigError, match=words):
            places.admit(name, size, **options)
    assert [place.name for place in places.residency.shares] == ["a", "b", "c"]


@pytest.mark.parametrize("grows, more, fits", [("a", 10, True), ("a", 11, False), ("b", 10, True), ("b", 11, False), ("c", 20, True), ("c", 21, False)])
def test_a_growing_pin_leaves_room_for_the_largest(grows, more, fits):
    """The largest other model has room."""
    places = Places(100)
    places.admit("a", 60, pinned=True)
    places.admit("b", 30)
    places.admit("c", 20)
    place = next(place for place in places.residency.shares if place.name == grows)
    if fits:
        places.residency.admit(place, more)
    else:
        with pytest.raises(ConfigError):
            places.residency.admit(place, more)
    assert len(places.residency.shares) == 3


async def test_a_late_pin_displaces_nothing(start_pinned, nanochat_fixtures, client, tmp_path):
    """It is tried again when its file is whole."""
    folder = shutil.copytree(nanochat_fixtures / "gen5", tmp_path / "gen5")
    [weights] = folder.rglob("model_*.pt")
    whole = weights.read_bytes()
    weights.write_bytes(b"garbage")
    models = await start_pinned(ModelEntry(str(folder), "late", pin=True))
    models.source.RETRY_S = 0.0
    weights.write_bytes(whole)
    async with serving(models, models.settings) as url:
        await ask(client, url, "late")
        await until(lambda: models.registry.find("late").model.failed_s < float("inf"))
        status, body = await ask(client, url, "late")
        assert status == 503 and "the pinned models (pinned, late) need" in body["error"]["message"]
        assert (await ask(client, url, "pinned"))[0] == 200
