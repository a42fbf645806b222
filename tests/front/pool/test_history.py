"""What clients and the operator see while the files of models, adapters and checkpoints come, change, break and go.

Each scene plays a history of a folder against a real server. After each step everything that is seen is written down: `/v1/models`, what
`/stats` says of models, answers and errors, and the lines of the log. `history.json` holds what it must be; a change that means to change
it writes the file anew: RECORD_HISTORY=1 pytest tests/front/pool/test_history.py
"""

import asyncio
import json
import logging
import os
import re
import shutil
from pathlib import Path

import pytest

import tiny_training
from chatlm.common.config import Settings
from chatlm.front.evals.checkpoint_evaluator import CheckpointEvaluator
from chatlm.front.pool.pool_adapters import AdapterWatch
from chatlm.front.pool.folder_watch import FolderWatch
from chatlm.front.pool.many import many_models
from chatlm.front.pool.residency import Residency
from chatlm.front.pool.run_watch import RunWatch
from fake_pool import serving
from families import as_gguf, make_model, save
from forked import DYING
from lora import random_adapter
from tiny_gguf import small_gguf_metadata

GOLDEN = Path(__file__).with_name("history.json")
TINY = {"dtype": "float32", "kv_cache_memory": 4 << 20, "max_batch": 8, "prefix_memory": 0}
SHOWN = ("id", "parent", "aliases", "default", "pinned", "state", "reason", "context_length", "run", "step", "type", "kind")


class History:
    """A server's life, step by step, and what was seen of it."""

    def __init__(self, client, url, folder, lines):
        self.client, self.url, self.folder, self.lines, self.steps = client, url, folder, lines, []

    def plain(self, text):
        """Without what differs from run to run."""
        text = text.replace(str(self.folder), "FOLDER")
        text = re.sub(r"\d[\d.,]* (ms|s|MB|GB|MiB|bytes)\b", r"N \1", text)
        return re.sub(r"\b(0x)?[0-9a-f]{16,}\b", "ID", text)

    async def models(self):
        async with self.client.get(self.url + "/v1/models") as response:
            return {model["id"]: model for model in (await response.json())["data"]}

    async def text(self, model):
        """The beginning of an answer, which tells versions apart."""
        body = {"model": model, "prompt": "hello", "temperature": 0, "max_tokens": 12}
        async with self.client.post(self.url + "/v1/completions", json=body) as response:
            return (await response.json())["choices"][0]["text"]

    async def ask(self, model):
        """Who answers, or why nobody does."""
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 8}
        async with self.client.post(self.url + "/v1/chat/completions", json=body) as response:
            answer = await response.json()
        if response.status == 200:
            return {"answered by": answer["model"]}
        return {"status": response.status, **{key: self.plain(str(answer["error"][key])) for key in ("message", "code", "param")}}

    async def step(self, name, condition=lambda models: True, asked=(), line=""):
        """Wait until what /v1/models says fulfils the condition and the log has such a line, ask, and write down what is seen."""
        async with asyncio.timeout(90):
            while not (condition(await self.models()) and any(line in each for each in self.lines)):
                await asyncio.sleep(0.02)
            answers = {model: await self.ask(model) for model in asked}
        models = [{key: model[key] for key in SHOWN if model.get(key) is not None} for model in (await self.models()).values()]
        async with self.client.get(self.url + "/stats") as response:
            stats = await response.json()
        known = [{key: self.plain(str(value)) for key, value in model.items() if key in SHOWN} for model in stats["models"]]
        lines, self.lines[:] = sorted({self.plain(each) for each in self.lines if not re.search(r"POST|GET", each)}), []
        self.steps.append({"step": name, "models": json.loads(self.plain(json.dumps(models))), "stats": known, "answers": answers, "log": lines})


@pytest.fixture
def history(monkeypatch, tmp_path, client, started, caplog):
    """A function that plays a scene against a server with these settings, and compares what was seen."""
    for watch in (FolderWatch, RunWatch, AdapterWatch):
        monkeypatch.setattr(watch, "WATCH_S", 0.1)
    monkeypatch.setattr(Residency, "STAY_LOADS", 0.1)
    monkeypatch.setattr(RunWatch, "LEAVE_S", 600.0)  # a busy machine may take long to the next step
    caplog.set_level(logging.INFO)

    async def play(name, scene, **settings):
        lines = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())
        logging.getLogger().addHandler(handler)
        try:
            models = await started(many_models(Settings(**TINY | settings), DYING, CheckpointEvaluator))
            async with serving(models, models.settings) as url:
                seen = History(client, url, tmp_path, lines)
                await scene(seen)
        finally:
            logging.getLogger().removeHandler(handler)
        golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        if os.environ.get("RECORD_HISTORY"):
            GOLDEN.write_text(json.dumps(golden | {name: seen.steps}, indent=1, ensure_ascii=False) + "\n")
        for found, expected in zip(seen.steps, json.loads(GOLDEN.read_text())[name], strict=True):
            assert found == expected, found["step"]

    return play


def adapter(base, folder, seed, **config):
    sizes = base.config
    shapes = {"mlp.up_proj": (sizes.intermediate_size, sizes.hidden_size)}
    return random_adapter(folder, sizes.num_hidden_layers, shapes, seed, size=0.3, **config)


def moved_in(source, target):
    """A file or folder appears whole."""
    shutil.copytree(source, part := target.with_name(".part")) if source.is_dir() else shutil.copyfile(source, part := target.with_name(".part"))
    os.replace(part, target)


async def test_any_history_of_a_folder_is_served_rightly(history, tmp_path):
    """The folder has models and adapters."""
    models, kept = tmp_path / "models", tmp_path / "kept"
    models.mkdir()
    kept.mkdir()
    base = make_model("llama3.1", seed=1)
    save(base, models / "base")
    words = small_gguf_metadata("gpt-2", **{"tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"})
    as_gguf(kept / "other", make_model("llama3.1", seed=2), metadata=words)
    moved_in(kept / "other", models / "other.gguf")

    async def scene(seen):
        await seen.step("two models", asked=("base", "other", "nobody"))
        adapter(base, kept / "ad", 1, base_model_name_or_path="somebody/base")
        moved_in(kept / "ad", models / "ad")
        await seen.step("an adapter comes", lambda found: "ad" in found, ("ad", "base@ad", "other@ad"))
        before = await seen.text("ad")
        adapter(base, models / "ad", 2, base_model_name_or_path="somebody/base")
        async with asyncio.timeout(60):
            while await seen.text("ad") == before:
                await asyncio.sleep(0.05)
        await seen.step("the adapter has a new version", asked=("ad",), line="the adapter ad:")
        (models / "ad" / "adapter_model.safetensors").write_bytes(b"broken")
        await seen.step("the adapter's next version is broken", asked=("ad",), line="its older version stays")
        shutil.rmtree(models / "ad")
        await seen.step("the adapter goes", lambda found: "ad" not in found, ("ad", "base"))
        adapter(base, models / "orphan", 1, base_model_name_or_path="somebody/unknown")
        await seen.step("an adapter of nobody", line="orphan")
        shutil.rmtree(models / "orphan")
        (models / "broken.gguf").write_bytes(b"garbage")
        await seen.step("a broken file", lambda found: "broken" in found, ("broken",))
        (models / "broken.gguf").unlink()
        await seen.step("the broken file goes", lambda found: "broken" not in found, ("broken",))
        moved_in(kept / "other", models / "third.gguf")
        await seen.step("a third model", lambda found: "third" in found, ("third",), line="new model")
        (models / "third.gguf").unlink()
        async with seen.client.post(seen.url + "/models/unload", json={"model": "third"}) as response:
            assert response.status == 200
        await seen.step("the third model goes", lambda found: "third" not in found, ("third",), line="the model third was removed")

    await history("models", scene, models=str(models))


async def test_any_history_of_a_watched_run_is_served(history, nanochat_fixtures, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(nanochat_fixtures / "gen1" / "tokenizer", base / "tokenizer")
    model = tiny_training.Model(tiny_training.CONFIG)

    async def scene(seen):
        await seen.step("nothing yet", asked=("", "d2-base@latest"))
        tiny_training.save(model, base / "base_checkpoints" / "d2", 10)
        await seen.step("the first step", lambda found: "d2-base@10" in found, ("d2-base@latest", "d2-base@10"), line="d2-base@latest is")
        with_meta = base / "base_checkpoints" / "d2" / "meta_000010.json"
        shutil.copyfile(base / "base_checkpoints" / "d2" / "model_000010.pt", base / "base_checkpoints" / "d2" / "model_000015.pt")
        await seen.step("a step without its meta", asked=("d2-base@15",), line="d2-base@15")
        shutil.copyfile(with_meta, with_meta.with_name("meta_000015.json"))
        await seen.step("it gets it", lambda found: "d2-base@15" in found, ("d2-base@latest",), line="d2-base@latest is")
        (base / "base_checkpoints" / "d2" / "model_000020.pt").write_bytes(b"broken")
        shutil.copyfile(with_meta, with_meta.with_name("meta_000020.json"))
        await seen.step("a broken step", asked=("d2-base@20", "d2-base@latest"), line="d2-base@20")
        (base / "base_checkpoints" / "d2" / "model_000010.pt").unlink()
        await seen.step("the first step goes", lambda found: "d2-base@10" not in found, ("d2-base@10", "d2-base@latest"), line="d2-base@10 was removed")

    (base / "base_checkpoints").mkdir()
    await history("watch", scene, watch=str(base))
