"""Any file that a worker reads is lost or broken while it serves, and then its process dies: no request waits for ever, and the log names the cause."""

import asyncio
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from chatlm.common.config import ModelEntry, Settings
from chatlm.front.pool.many import many_models
from chatlm.front.pool.pool import make_pool
from asking import served
from families import make_model, save
from forked import DYING
from lora import random_adapter, shapes_of
from nightly import by_day
from sight_qwen import make_qwen, write_qwen

pytestmark = pytest.mark.timeout(170)
TINY = {"dtype": "float32", "kv_cache_memory": 8 << 20, "max_batch": 8}
WAIT_S = 30.0   # less than ServedRevision.PATIENCE_S


@dataclass
class Served:
    """What a server is started with, and the file that is lost."""

    settings: Settings
    lost: Path
    needed: bool = True     # does the model's worker need it to start?


def removed(path):
    path.unlink()


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def garbage(path):
    path.write_bytes(os.urandom(path.stat().st_size))


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def a_folder(path):
    path.unlink()
    path.mkdir()


CHANGES = removed, cut, garbage, a_pipe, a_folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny llama, another training of it, an adapter, and a model that sees, as a GGUF file with its mmproj."""
    root = tmp_path_factory.mktemp("files")
    for seed, name in enumerate(("model", "draft")):
        save(make_model("llama3.1", seed), root / name)
    layers, shapes = shapes_of(root / "model")
    random_adapter(root / "adapter", layers, shapes, 1, size=0.3)
    (root / "seeing").mkdir()
    write_qwen(root / "seeing", make_qwen("qwen3_vl"))
    (root / "manual.txt").write_text("hello hello hello " * 20)
    (root / "store").mkdir()
    return root


def with_(kind, root):
    model, draft, adapter, seeing = root / "model", root / "draft", root / "adapter", root / "seeing"
    plain = Settings(model=str(model), prefix_memory=0, **TINY)
    of_kind = {
        "weights": lambda: Served(plain, model / "model.safetensors"),
        "config": lambda: Served(plain, model / "config.json"),
        "tokenizer": lambda: Served(plain, model / "tokenizer.json"),
        "template": lambda: Served(plain, model / "chat_template.jinja", needed=False),
        "merged adapter": lambda: Served(Settings(model=str(model), lora=(str(adapter),), prefix_memory=0, **TINY), adapter / "adapter_model.safetensors"),
        "adapter": lambda: Served(Settings(model=str(model), adapter=(f"more={adapter}",), prefix_memory=0, **TINY), adapter / "adapter_model.safetensors", needed=False),
        "draft model": lambda: Served(Settings(model=str(model), draft_model=str(draft), prefix_memory=0, **TINY), draft / "model.safetensors", needed=False),
        "draft tokenizer": lambda: Served(Settings(model=str(model), draft_model=str(draft), prefix_memory=0, **TINY), draft / "tokenizer.json", needed=False),
        "draft text": lambda: Served(Settings(model=str(model), draft_text=(str(root / "manual.txt"),), prefix_memory=0, **TINY), root / "manual.txt", needed=False),
        "mmproj": lambda: Served(Settings(model=str(seeing / "tiny-F32.gguf"), mmproj=str(seeing / "mmproj-tiny-F32.gguf"), prefix_memory=0, **TINY), seeing / "mmproj-tiny-F32.gguf"),
        "mmproj beside": lambda: Served(Settings(model=str(seeing / "tiny-F32.gguf"), prefix_memory=0, **TINY), seeing / "mmproj-tiny-F32.gguf", needed=False),
        "prefix store": lambda: Served(Settings(model=str(model), prefix_store=str(root / "store"), prefix_memory=8 << 20, **TINY), root / "store" / "weights.json", needed=False)}
    return of_kind[kind]()


KINDS = ("weights", "config", "tokenizer", "template", "merged adapter", "adapter", "draft model", "draft tokenizer", "draft text", "mmproj", "mmproj beside",
         "prefix store")
OF_ONE = "adapter", "mmproj"    # flags of a server with one model


async def answer(client, url, struck="", model=""):
    """(status, text or error) of an answer; it must end."""
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 40, "ignore_eos": True}
    async with asyncio.timeout(WAIT_S):
        async with client.post(url + "/v1/chat/completions", json=body, headers={"X-Request-Id": struck} if struck else {}) as response:
            found = await response.json()
            return response.status, found["choices"][0]["message"]["content"] if response.status == 200 else found["error"]["message"]


@pytest.mark.parametrize("kind, change, several", by_day(
    [(kind, change, several) for kind in KINDS for change in CHANGES for several in (False, True) if not (several and kind in OF_ONE)],
    ("merged adapter", removed, True), ("mmproj", a_pipe, False)))
async def test_a_lost_file_ends_each_request_and_is_logged(
        kind, change, several, files, started, client, tmp_path, monkeypatch, caplog):
    """Its worker has died."""
    monkeypatch.setenv("STRUCK", str(tmp_path))
    root = shutil.copytree(files, tmp_path / "files")
    given = with_(kind, root)
    if several:
        one = ModelEntry(given.settings.model, "one", changes={"lora": given.settings.lora})
        two = ModelEntry(str(files / "draft"), "two")
        models = await started(many_models(replace(given.settings, model=None, lora=(), several=(one, two)), DYING))
    else:
        models = await started(make_pool(given.settings, DYING))
    async with served(models) as url:
        name = "one" if several else ""
        status, before = await answer(client, url, model=name)
        assert status == 200
        async with asyncio.timeout(WAIT_S):
            while not given.lost.exists():      # the store is written in a thread
                await asyncio.sleep(0.02)
        change(given.lost)
        ends = [await answer(client, url, "kill-decode-1", name)]
        ends += [await answer(client, url, model=name) for _ in range(2)]
        async with client.post(url + "/models/unload", json={"model": name} if name else {}):
            pass
        ends += [await answer(client, url, model=name) for _ in range(2)]
        if several:
            assert (await answer(client, url, model="two"))[0] == 200
    assert (tmp_path / "kill-decode-1").exists()
    for status, said in ends:
        assert status in (200, 500, 503) or "this model has no chat template" in said and kind == "template"
        assert str(tmp_path) not in said, said
        assert status != 200 or said == before or kind == "template", (status, said)
    if not given.needed:
        assert kind in ("mmproj beside", "template") or [status for status, _ in ends] == [200] * 5, ends
    elif ends[-1][0] != 200:
        assert given.lost.name in caplog.text or given.lost.parent.name in caplog.text, caplog.text
