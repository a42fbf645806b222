"""A folder of models that changes while it is served: steps that follow each other, files that are replaced, odd files."""

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from chatlm.common.config import Settings
from chatlm.common.errors import Overloaded, RequestError
from chatlm.common.hub.better import MEMORY_RATE, MemoryRate
from chatlm.common.hub.folder import find_models, folders_below
from chatlm.front.pool.many import FolderWatch, many_models
from chatlm.front.pool.preferred import by_preference
from fake_pool import serving
from forked import DYING
from tiny_gguf import LLAMA_NUMBERS, random_llama, write_gguf

TINY = {"dtype": "float32", "kv_cache_memory": 4 << 20, "max_batch": 8}


@pytest.fixture
def start_folder(started, tmp_path, monkeypatch):
    """A function that starts a catalogue of the folder `models`, which is looked at often."""
    monkeypatch.setattr(FolderWatch, "WATCH_S", 0.1)
    monkeypatch.setattr(MEMORY_RATE, "bytes_per_s", 20e9)  # measured while others work, it may make any model seem too slow
    (tmp_path / "models").mkdir()

    async def start(**changes):
        return await started(many_models(Settings(models=str(tmp_path / "models"), **TINY | changes), DYING))

    return start


async def ask(client, url, model, **changes):
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 4} | changes
    async with asyncio.timeout(60), client.post(url + "/v1/chat/completions", json=body) as response:
        return response.status, await response.json(), response.headers


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def write_tiny_gguf(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_gguf(path, random_llama(), LLAMA_NUMBERS)


def checkpoint(nanochat_fixtures, base, step):
    """The files of a further step of a nanochat base folder."""
    if not base.exists():
        shutil.copytree(nanochat_fixtures / "gen5", base)
    [folder] = (base / "chatsft_checkpoints").iterdir()
    for name in ("model", "meta"):
        [file, *_] = sorted(folder.glob(f"{name}_*"))
        if (copy := folder / f"{name}_{step:06d}{file.suffix}") != file:
            shutil.copy(file, copy)
    return folder / f"model_{step:06d}.pt"


async def test_latest_follows_the_steps_of_a_folder(start_folder, nanochat_fixtures, client, tmp_path):
    """So does the name without a step."""
    base = tmp_path / "models" / "base"
    shutil.copytree(nanochat_fixtures / "gen5", base)
    [first] = base.rglob("model_*.pt")
    step = int(first.stem[6:])
    models = await start_folder()
    names = lambda: {model.name: model.names for model in models.registry.models}
    async with serving(models, models.settings) as url:
        assert [*names()] == ["nanochat-d4-sft"] and models.describe()[0].startswith("1 model; ")
        assert (await ask(client, url, "d4@latest"))[1]["model"] == "nanochat-d4-sft"
        checkpoint(nanochat_fixtures, base, step + 1)
        await until(lambda: len(names()) == 2 and models.registry.find("d4@latest").model.entry.path.endswith(f"{step + 1:06d}.pt"))
        assert [*names()] == [f"nanochat-d4-sft@{step}", f"nanochat-d4-sft@{step + 1}"]
        large = "x" * 70_000        # read in a sandbox
        for name, end in (("d4@latest", step + 1), ("nanochat-d4-sft", step + 1), (f"d4@{step}", step), (f"nanochat-d4-sft@{step}", step)):
            for more in {}, {"ignored": large}:
                status, body, _ = await ask(client, url, name, **more)
                assert (status, body.get("model")) == (200, f"nanochat-d4-sft@{end}"), body
        broken = checkpoint(nanochat_fixtures, base, step + 2)
        broken.write_bytes(b"garbage")
        await until(lambda: len(names()) == 3)
        assert models.registry.find("d4@latest").name == f"nanochat-d4-sft@{step + 1}"      # which can answer
        models.find("d4@latest").model.unload()
        await until(lambda: models.find("d4@latest").state == "unloaded")
        Path(models.find("d4@latest").model.entry.path).unlink()
        await until(lambda: len(names()) == 2)
        await until(lambda: models.registry.find("d4@latest").name == f"nanochat-d4-sft@{step}")
        assert (await ask(client, url, "d4@latest"))[0] == 200


async def test_the_best_model_to_chat_with_answers_where_none_is_named(start_folder, nanochat_fixtures, base_checkpoint, default_model_path, default_embedder_path,
                                                                       client, tmp_path):
    """Not the first by name: here that is one for vectors, then a base model and a smaller one. A later one changes nothing."""
    folder = tmp_path / "models"
    shutil.copytree(default_embedder_path, folder / "a-vectors")
    shutil.copytree(base_checkpoint, folder / "b-base")
    shutil.copytree(nanochat_fixtures / "gen5", folder / "c-small")
    os.link(default_model_path, folder / "d-larger.gguf")
    models = await start_folder()
    assert [Path(model.entry.path).relative_to(folder).parts[0] for model in models.registry.models] == ["d-larger.gguf", "c-small", "b-base", "a-vectors"]
    async with serving(models, models.settings) as url:
        async def default():
            async with client.get(url + "/v1/models") as response:
                return [model["id"] for model in (await response.json())["data"] if model.get("default")]
        assert await default() == ["d-larger"] and (await ask(client, url, ""))[1]["model"] == "d-larger"
        os.link(default_model_path, folder / "a-later.gguf")
        await until(lambda: len(models.registry.models) == 5)
        assert await default() == ["d-larger"]
        (folder / "d-larger.gguf").unlink()
        models.find("d-larger").model.unload()
        await until(lambda: len(models.registry.models) == 4)
        assert (await ask(client, url, ""))[1]["model"] == models.find("").name == models.registry.models[0].name


@pytest.mark.parametrize("rate, first", [(0.0, "32b"), (600e9, "32b"), (40e9, "1b"), (2e9, "1b")])
async def test_a_model_that_is_too_slow_here_is_not_the_best(start_folder, tmp_path, rate, first):
    """By the size of what a token reads: 32, 16 and 1 GB."""
    folder = tmp_path / "models"
    for name in ("16b", "1b", "32b"):
        write_gguf(folder / f"{name}.gguf", random_llama(), LLAMA_NUMBERS)
    models = (await start_folder()).registry.models
    for model in models:
        model.pool.memory.own_size = int(Path(model.entry.path).stem[:-1]) << 30
    machine = MemoryRate()
    machine.bytes_per_s = rate
    ordered = [model.name for model in sorted(models, key=by_preference(machine))]
    assert ordered[0] == first
    if rate == 2e9:
        assert ordered == ["1b", "16b", "32b"]      # all are slow


async def test_a_replaced_file_stays_the_default(start_folder, nanochat_fixtures, client, tmp_path):
    """It is never unknown; nor is one that could not be read and now can."""
    for name in ("gen5", "gen3"):
        shutil.copytree(nanochat_fixtures / name, tmp_path / "models" / name)
    [weights] = (tmp_path / "models" / "gen5").rglob("model_*.pt")
    whole = weights.read_bytes()
    models = await start_folder()
    names = [model.name for model in models.registry.models]
    name = next(model.name for model in models.registry.models if model.entry.path == str(weights))
    async with serving(models, models.settings) as url:
        async def outcomes(settled):
            seen = []
            while True:
                status, body, headers = await ask(client, url, name)
                seen.append((status, headers.get("Retry-After"), body.get("error", {}).get("message")))
                if settled(models.registry.find(name).model):
                    return seen
                await asyncio.sleep(0.02)

        before = (await ask(client, url, name))[1]["choices"][0]["message"]["content"]
        for content in (whole[:1000], whole):
            old = models.registry.find(name).model
            old.unload()
            await until(lambda: old.state in ("unloaded", "failed"))
            weights.write_bytes(content)
            await until(lambda: old.pool is None and not old.reason)        # it has been seen
            stamp = old.stamp
            seen = await outcomes(lambda model: model is not old and model.stamp != stamp and (model.pool or model.reason))
            assert {status for status, _, _ in seen} <= {503, 200, 500}, seen
            assert all(after and "being read" in message for status, after, message in seen if status == 503 and "cannot be served" not in message), seen
            assert [model.name for model in models.registry.models] == names and models.find("").name == names[0]
        assert (await ask(client, url, name))[1]["choices"][0]["message"]["content"] == before


async def test_a_rewritten_step_is_waited_for(start_folder, nanochat_fixtures, client, tmp_path):
    """It was removed, and is being written anew."""
    base = tmp_path / "models" / "base"
    shutil.copytree(nanochat_fixtures / "gen5", base)
    paths = [checkpoint(nanochat_fixtures, base, step) for step in (651, 652)]
    models = await start_folder()
    async with serving(models, models.settings) as url:
        whole = paths[1].read_bytes()
        paths[1].unlink()
        await until(lambda: len(models.registry.models) == 2)
        assert (await ask(client, url, "d4@652"))[0] == 404           # a training may write it or not
        watch, = models.source.watches
        asked = asyncio.Event()

        async def write():
            """Without a pause: what has not changed between two looks counts as whole."""
            with open(paths[1], "wb", buffering=0) as file:
                file.write(whole[:len(whole) // 2])
                while not asked.is_set():
                    file.write(whole[file.tell():file.tell() + 1])
                    await asyncio.sleep(0.01)
                file.write(whole[file.tell():])

        writing = asyncio.ensure_future(write())
        await until(lambda: paths[1] in watch.scanner.there)
        for name in ("d4@652", "nanochat-d4-sft@652") * 2:
            status, body, headers = await ask(client, url, name)
            assert status == 503 and int(headers["Retry-After"]) > 0 and "being written" in body["error"]["message"]
        asked.set()
        await writing
        await until(lambda: len(models.registry.models) == 3)
        assert (await ask(client, url, "d4@652"))[0] == 200 and (await ask(client, url, "d4@653"))[0] == 404


async def test_a_key_learns_of_no_other_models(start_folder, nanochat_fixtures, tmp_path):
    """It may not use them; they are being written."""
    base = tmp_path / "models" / "base"
    shutil.copytree(nanochat_fixtures / "gen5", base)
    models = await start_folder()
    watch, = models.source.watches
    watch.is_coming = lambda name: True
    for bound, error in (((), Overloaded), (("d4@652",), Overloaded), (("d4@650",), RequestError)):
        with pytest.raises(error):
            models.find("d4@652", bound)


def odd_files(folder):
    """Links to nothing and to themselves, a FIFO, links in a circle and among many folders."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dangling.gguf").symlink_to(folder / "nothing")
    (folder / "itself.gguf").symlink_to(folder / "itself.gguf")
    (folder / "self").symlink_to(folder / "self")
    os.mkfifo(folder / "pipe.gguf")
    (folder / "folder.gguf").mkdir()
    many = [folder / "many" / f"{number}" for number in range(7)]
    for here in many:
        here.mkdir(parents=True)
    for here in many:
        for there in many:
            (here / f"to-{there.name}").symlink_to(there)
    (folder / "up").symlink_to(folder.parent)


def test_circular_links_end(tmp_path):
    """Folders that are linked are seen."""
    odd_files(tmp_path / "models")
    write_tiny_gguf(tmp_path / "elsewhere" / "inside" / "linked.gguf")
    (tmp_path / "models" / "link").symlink_to(tmp_path / "elsewhere")
    found = {files.entry.name: bool(files.stamp) for files in find_models(tmp_path / "models")}
    assert found == {"dangling": False, "itself": False, "pipe": False, "linked": True}
    places = [place for place, _ in folders_below(tmp_path / "models")]
    assert len(places) == len({*places}) < 300


async def test_odd_files_below_models_stop_nothing(start_folder, nanochat_fixtures, client, tmp_path, caplog):
    """Each is said once."""
    odd_files(tmp_path / "models")
    shutil.copytree(nanochat_fixtures / "gen5", tmp_path / "models" / "gen5")
    models = await start_folder()
    said = lambda words: [line for line in caplog.messages if words in line]
    async with serving(models, models.settings) as url:
        assert (await ask(client, url, ""))[0] == 200 and len(models.registry.models) == 1
        (tmp_path / "models" / "late.gguf").symlink_to(tmp_path / "none")
        await until(lambda: said("late.gguf"))
        (tmp_path / "models" / "late.gguf").unlink()
        write_tiny_gguf(tmp_path / "models" / "late.gguf")
        await until(lambda: len(models.registry.models) == 2)
        shutil.move(tmp_path / "models", tmp_path / "moved")
        await until(lambda: said("there is no such folder"))
        shutil.move(tmp_path / "moved", tmp_path / "models")
        (tmp_path / "models" / "gen5" / "later.gguf").symlink_to(tmp_path / "none")
        await until(lambda: said("later.gguf"))
    for words in ("dangling.gguf is a link to a missing file", "itself.gguf: Too many levels", "late.gguf is a link to a missing file",
                  "later.gguf is a link to a missing file", "pipe.gguf is not a regular file", "there is no such folder"):
        assert len(said(words)) == 1, (words, caplog.messages)


def test_a_signal_ends_a_search_of_the_folder(tmp_path, monkeypatch):
    """Its thread looks no further than the folder that it is at."""
    def stopped():
        raise InterruptedError

    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(InterruptedError):
        find_models(tmp_path, stopped)


@pytest.mark.skipif(os.name != "posix", reason="names of bytes")
async def test_a_name_that_is_no_text_can_be_asked_for(start_folder, client, tmp_path):
    """Control characters too, which would reach the terminal; and two such names stay apart."""
    write_tiny_gguf(tmp_path / "tiny.gguf")
    for name in (b"caf\xe9.gguf", b"caf\xe8.gguf", b"\x1b[31mred\xe2\x80\xaefdp.gguf", b"new\nline.gguf"):
        shutil.copy(tmp_path / "tiny.gguf", os.fsencode(tmp_path / "models") + b"/" + name)
    models = await start_folder()
    async with serving(models, models.settings) as url:
        async with client.get(url + "/v1/models") as response:
            names = [model["id"] for model in (await response.json())["data"]]
        assert len({*names}) == 4 and all(name.isprintable() and name.encode() for name in names), names
        for name in names:
            async with client.post(url + "/v1/completions", json={"model": name, "prompt": "hello", "max_tokens": 2}) as response:
                assert response.status == 200, (name, await response.json())
