"""A training run that can be talked to: a small real training writes checkpoints while the server watches."""

import asyncio
import json
import logging
import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

import tiny_training
from bundles import write_bundle
from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError
from chatlm.common.hub.run_checkpoints import find_steps
from chatlm.front.evals.checkpoint_evaluator import CheckpointEvaluator
from chatlm.front.pool.local_devices import check_nice
from chatlm.front.evals.bundle import read_suite
from chatlm.front.evals.answers_file import AnswersFile
from chatlm.front.evals.run import as_json, run_task
from chatlm.front.evals.scores import PoolScorer
from chatlm.front.pool.local_devices import niceness
from chatlm.front.pool.many import many_models
from chatlm.front.pool.pool import make_pool
from chatlm.front.pool.residency import Residency
from chatlm.front.pool.run_watch import RunWatch
from command_line import parse_command_line
from fake_pool import frames, serving
from forked import DYING
from nightly import by_day
from real_server import get, post, server
from watched import TINY, file_of, remove, run_folder, until, watching  # noqa: F401

MIB = 1 << 20


async def ask(client, url, model, text="hello", **changes):
    body = {"model": model, "messages": [{"role": "user", "content": text}], "seed": 5, "temperature": 1, "max_tokens": 24} | changes
    async with client.post(url + "/v1/chat/completions", json=body) as response:
        return response.status, await response.json()


async def alone(client, path, text="hello"):
    """What a server of this checkpoint alone answers."""
    settings = Settings(model=str(path), **TINY)
    pool = make_pool(settings, DYING)
    await pool.start()
    try:
        await pool.wait_ready()
        async with serving(pool, settings) as url:
            status, body = await ask(client, url, "", text)
            assert status == 200, body
            return body["choices"][0]["message"]["content"]
    finally:
        await pool.close()


async def swaps_under_load(run_folder, watching, client, count, talkers):
    models, ended, answers = await watching(run_folder), asyncio.Event(), []
    names = lambda: {name for model in models.registry.models for name in model.names}

    async def talk(url, number):
        while not ended.is_set():
            text = f"hello {number}"
            status, body = await ask(client, url, "d2-base@latest", text)
            assert status == 200, body
            answers.append((int(body["model"].removeprefix("d2-base@")), text, body["choices"][0]["message"]["content"]))
            await asyncio.sleep(0.05)       # they talk, and are no load

    async with serving(models, models.settings) as url:
        run = tiny_training.train(run_folder, 2 * count, 2)
        next(run)
        await until(lambda: "d2-base@latest" in names())
        talks = [asyncio.ensure_future(talk(url, number)) for number in range(talkers)]
        for step, _ in run:
            await until(lambda: models.registry.find("d2-base@latest").name == f"d2-base@{step}" or any(talk.done() for talk in talks))
            before = len(answers)
            await until(lambda: len(answers) >= before + 2 * talkers or any(talk.done() for talk in talks))
        ended.set()
        await asyncio.gather(*talks)
        async with client.get(url + "/v1/models") as response:
            listed = (await response.json())["data"]
    assert [model["id"] for model in listed] == [f"d2-base@{step}" for step in range(2, 2 * count + 1, 2)]
    assert [model["aliases"] for model in listed if model["step"] == 2 * count] == [["d2-base@latest", "d2@latest"]]
    seen = {(step, text): content for step, text, content in answers}
    assert all(seen[step, text] == content for step, text, content in answers)
    assert len({step for step, _ in seen}) == count and len({content for content in seen.values()}) > count
    for (step, text), content in seen.items():
        if text == "hello 0" and (step % 10 == 0 or step == 2 * count):
            assert await alone(client, file_of(run_folder, step), text) == content, step


async def test_five_swaps_of_checkpoints_lose_no_answer(run_folder, watching, client):
    """Each new one answers as alone."""
    await swaps_under_load(run_folder, watching, client, 5, 2)


@pytest.mark.slow
async def test_fifty_swaps_of_checkpoints_lose_no_answer(run_folder, watching, client):
    """Each new one answers as alone."""
    await swaps_under_load(run_folder, watching, client, 50, 6)


async def test_bad_checkpoints_are_told_once(
        run_folder, watching, client, caplog):
    """They are half written, broken, replaced and deleted; the others serve."""
    caplog.set_level(logging.INFO, logger="chat_server")
    list(tiny_training.train(run_folder, 4, 1))
    folder, whole = file_of(run_folder, 1).parent, file_of(run_folder, 1).read_bytes()
    file_of(run_folder, 5).write_bytes(whole[:len(whole) // 2])             # without its meta file, as while it is written
    file_of(run_folder, 6).write_bytes(whole[:len(whole) // 2])             # with it: it was cut
    shutil.copy(folder / "meta_000004.json", folder / "meta_000006.json")
    (folder / "model_000007.pt").symlink_to(file_of(run_folder, 1))
    shutil.copy(folder / "meta_000004.json", folder / "meta_000007.json")
    models = await watching(run_folder)
    known = lambda: {model.name for model in models.registry.models}
    lines = lambda word: [record.getMessage() for record in caplog.records if word in record.getMessage()]
    async with serving(models, models.settings) as url:
        await until(lambda: known() == {"d2-base@1", "d2-base@2", "d2-base@3", "d2-base@4"} and lines("model_000005") and lines("d2-base@6 is not served"))
        first, last = [(await ask(client, url, name))[1]["choices"][0]["message"]["content"] for name in ("d2-base@1", "d2-base@latest")]
        assert first != last
        # one that answers now is replaced by another, in place: the answer ends on the old one
        old = models.find("d2-base@4").model
        [worker] = old.pool.workers
        worker.process.send_signal(signal.SIGSTOP)      # or the answer might have ended before anybody looked
        long = asyncio.ensure_future(ask(client, url, "d2-base@4", max_tokens=100, ignore_eos=True))
        await until(lambda: old.pool.dispatcher.running)
        replaced = torch.load(file_of(run_folder, 1), weights_only=True)
        torch.save(replaced, file_of(run_folder, 4))
        worker.process.send_signal(signal.SIGCONT)
        await until(lambda: old not in models.registry.models and "d2-base@4" in known() and models.find("d2-base@latest").name == "d2-base@4")
        status, body = await long
        assert status == 200 and body["choices"][0]["message"]["content"].startswith(last[:8])
        assert (await ask(client, url, "d2-base@latest"))[1]["choices"][0]["message"]["content"] == first
        file_of(run_folder, 4).unlink()
        await until(lambda: models.registry.find("d2-base@latest").name == "d2-base@3")
        assert (await ask(client, url, "d2-base@4"))[0] == 404 and (await ask(client, url, "d2-base@latest"))[1]["model"] == "d2-base@3"
        file_of(run_folder, 5).write_bytes(whole)
        shutil.copy(folder / "meta_000004.json", folder / "meta_000005.json")
        await until(lambda: "d2-base@5" in known())
        assert (await ask(client, url, "d2-base@5"))[1]["choices"][0]["message"]["content"] == first
        shutil.rmtree(folder)
        await until(lambda: not known())
        status, body = await ask(client, url, "d2-base@5")
        assert status == 503 and "no complete checkpoint" in body["error"]["message"]
    assert len(lines("model_000005")) == len(lines("d2-base@6 is not served")) == 1
    assert "meta_000005.json is missing" in lines("model_000005")[0] and not lines("d2-base@7")
    assert len(lines("d2-base@4 was replaced")) == len(lines("d2-base@4 was removed")) == 1


async def test_health_says_what_an_empty_folder_waits_for(run_folder, watching, client):
    """It does not show the path."""
    models = await watching(run_folder)
    async with serving(models, models.settings) as url:
        async with client.get(url + "/health") as response:
            status, body = response.status, await response.json()
        assert status == 503 and body["status"] == "waiting"
        assert body["loading"] == {"stage": "waiting for the first checkpoint in base", "fraction": 0.0}
        async with client.get(url + "/readyz") as response:
            assert await response.json() == {"ready": False, "reason": "waiting"}
        list(tiny_training.train(run_folder, 2, 1))
        await until(lambda: models.registry.models)
        async with client.get(url + "/health") as response:
            assert response.status == 200 and "loading" not in await response.json()


async def test_a_worker_refuses_files_it_has_not_seen(run_folder, watching, client):
    """It dies while it answers, and its checkpoint was replaced meanwhile: the answer must not go on with other weights."""
    list(tiny_training.train(run_folder, 2, 1))
    models = await watching(run_folder)
    async with serving(models, models.settings) as url:
        await until(lambda: len(models.registry.models) == 2)
        model = models.find("d2-base@2").model
        assert (await ask(client, url, "d2-base@2"))[0] == 200
        model.pool.workers[0].process.send_signal(signal.SIGSTOP)      # or the answer might have ended before anybody looked
        asked = asyncio.ensure_future(ask(client, url, "d2-base@2", max_tokens=100, ignore_eos=True))
        await until(lambda: model.pool.dispatcher.running)
        shutil.copy(file_of(run_folder, 1), file_of(run_folder, 2))
        model.pool.workers[0].kill()
        status, body = await asked
        assert status == 503 and "have changed" in body["error"]["message"], body       # to be asked again: the new files are read meanwhile


def test_runs_are_found_four_folders_deep(tmp_path):
    """Links are not followed."""
    for folder, name in (("a/b/checkpoint-5", "model.safetensors"), ("a/b/c/d/checkpoint-6", "model.safetensors"),
                         ("a/b/c/checkpoint-4", "notes"), ("checkpoint-7", "x.safetensors"),
                         ("base_checkpoints/d4", "model_000010.pt"), ("other/d4", "model_000011.pt"), ("checkpoint-8", "notes")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).write_bytes(b"1")
    for folder in ("a/b/checkpoint-5", "checkpoint-7"):
        (tmp_path / folder / "config.json").write_text("{}")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "checkpoint-7")
    (tmp_path / "checkpoint-99").symlink_to(tmp_path / "checkpoint-7")
    for folder, names in (("checkpoint-20", ["config.json", "model-00001-of-00002.safetensors"]), ("checkpoint-21", ["adapter_config.json"]),
                          ("checkpoint-22", ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]),
                          ("checkpoint-23", ["adapter_config.json", "adapter_model.safetensors"])):
        (tmp_path / "parts" / folder).mkdir(parents=True)
        for name in names:
            (tmp_path / "parts" / folder / name).write_text("{}")
    found = {(str(step.run.relative_to(tmp_path)), step.step): step.missing for step in find_steps(tmp_path)}
    assert [found.pop(("parts", step)) for step in (20, 21, 22, 23)] == ["model-00002-of-00002.safetensors", "adapter_model.safetensors", "", ""]
    assert found == {("a/b", 5): "", ("a/b/c", 4): "config.json", (".", 7): "", (".", 8): "config.json", ("base_checkpoints/d4", 10): "meta_000010.json"}
    for path, words in ((tmp_path / "none", "no such folder"), (tmp_path / "checkpoint-8" / "notes", "not a folder")):
        with pytest.raises(ConfigError, match=f"--watch .*{words}"):
            find_steps(path)


async def test_an_overwritten_step_is_waited_for(run_folder, watching, client):
    """A training that starts again writes over the steps of the one before, for longer than a scan takes."""
    list(tiny_training.train(run_folder, 4, 1))
    models = await watching(run_folder)
    names = lambda: {name for model in models.registry.models for name in model.names}
    path, parts = file_of(run_folder, 4), []

    async def asked(name):
        async with client.post(url + "/v1/completions", json={"model": name, "prompt": "a", "max_tokens": 2}) as response:
            return response.status, response.headers.get("Retry-After"), await response.text()

    async with serving(models, models.settings) as url:
        await until(lambda: {"d2-base@1", "d2-base@2", "d2-base@3", "d2-base@4"} <= names())
        whole = file_of(run_folder, 1).read_bytes()
        with open(path, "wb") as file:
            for at in range(0, len(whole), len(whole) // 40):
                file.write(whole[at:at + len(whole) // 40])
                file.flush()
                status, later, text = await asked("d2-base@4")
                assert status in (200, 503) and (status == 200 or int(later) > 0), text
                parts.append(status)
                await asyncio.sleep(0.05)
        assert parts[-1] == 503
        async with client.get(url + "/v1/models/d2-base@4") as response:
            assert response.status in (200, 503)
        assert (await asked("d2-base@latest"))[0] == 200           # of the step before, while the newest is written
        assert (await asked("d2-base@9"))[0] == 404                # nobody writes it
        await until(lambda: "d2-base@4" in names())
        assert (await asked("d2-base@4"))[0] == 200
        # the only step of the run, and one that was never there
        for step in (1, 2, 3):
            file_of(run_folder, step).unlink()
        path.write_bytes(whole[:1000])
        shutil.copy(path, file_of(run_folder, 5))
        shutil.copy(path.with_name("meta_000004.json"), path.with_name("meta_000005.json"))
        await until(lambda: not names())
        for name in ("d2-base@4", "d2-base@5", "d2-base@latest"):
            status, later, text = await asked(name)
            assert status == 503 and int(later) > 0, text


async def test_a_refused_checkpoint_becomes_unknown(run_folder, watching, client):
    """That happens once nobody writes it."""
    list(tiny_training.train(run_folder, 2, 1))
    models = await watching(run_folder)
    async with serving(models, models.settings) as url:
        await until(lambda: len(models.registry.models) == 2)
        whole = file_of(run_folder, 2).read_bytes()
        file_of(run_folder, 2).write_bytes(whole[:1000])
        watch, = models.source.watches
        await until(lambda: watch.scanner.refused)
        status, body = await ask(client, url, "d2-base@2")
        assert status == 503 and "being written" in body["error"]["message"]     # the trainer may have paused
        os.utime(file_of(run_folder, 2), (1e9, 1e9))
        os.utime(file_of(run_folder, 2).with_name("meta_000002.json"), (1e9, 1e9))
        os.utime(run_folder / "tokenizer" / "tokenizer.pkl", (1e9, 1e9))
        deadline_s = time.monotonic() + 60
        while (found := await ask(client, url, "d2-base@2"))[0] == 503 and time.monotonic() < deadline_s:
            await asyncio.sleep(0.05)
        assert found[0] == 404 and "d2-base@1" in found[1]["error"]["message"]


async def test_files_that_are_put_back_are_read_again(run_folder, watching, client):
    """A worker finds other files than were seen; by the next scan they are the old ones."""
    list(tiny_training.train(run_folder, 2, 1))
    models = await watching(run_folder)
    async with serving(models, models.settings) as url:
        await until(lambda: len(models.registry.models) == 2)
        model, aside = models.find("d2-base@2").model, run_folder / "aside"
        before = (await ask(client, url, "d2-base@2"))[1]["choices"][0]["message"]["content"]
        watch, = models.source.watches
        seen = watch.scanner.find()
        watch.scanner.find = lambda: seen                  # no scan sees that the file is away
        file_of(run_folder, 2).rename(aside)
        model.pool.workers[0].kill()
        await until(lambda: model.pool is None or model not in models.registry.models)
        aside.rename(file_of(run_folder, 2))
        await until(lambda: any(other.name == "d2-base@2" and other is not model for other in models.registry.models))
        assert (await ask(client, url, "d2-base@2"))[1]["choices"][0]["message"]["content"] == before


async def test_two_stages_of_a_tag_have_names(run_folder, watching, client):
    """The last written is the default."""
    list(tiny_training.train(run_folder, 2, 1))
    shutil.copytree(run_folder / "base_checkpoints", run_folder / "chatsft_checkpoints")
    for file in (run_folder / "chatsft_checkpoints" / "d2").iterdir():
        os.utime(file, (1e9, 1e9))
    models = await watching(run_folder)
    async with serving(models, models.settings) as url:
        await until(lambda: len(models.registry.models) == 4)
        assert {model.name for model in models.registry.models} == {
            "d2-base@1", "d2-base@2", "d2-sft@1", "d2-sft@2"}
        assert (await ask(client, url, ""))[1]["model"] == "d2-base@2"
        assert (await ask(client, url, "d2-sft@latest", ignored="x" * 70_000))[1]["model"] == "d2-sft@2"


async def test_a_lineage_goes_on_to_its_next_stage(run_folder, watching, client):
    """It never goes back in silence."""
    list(tiny_training.train(run_folder, 2, 1))
    models = await watching(run_folder)
    async with serving(models, models.settings) as url:
        await until(lambda: len(models.registry.models) == 2)
        assert (await ask(client, url, "d2@latest"))[1]["model"] == "d2-base@2" == (await ask(client, url, "d2@2"))[1]["model"]
        shutil.copytree(run_folder / "base_checkpoints", run_folder / "chatrl_checkpoints")
        await until(lambda: len(models.registry.models) == 4 and models.find("d2@latest").name == "d2-rl@2")
        for name in ("d2@2", "d2@3"):       # which of the two stages?
            status, body = await ask(client, url, name)
            assert status == 404 and ("d2-base@2" in body["error"]["message"] or name == "d2@3")
        assert (await ask(client, url, "chatrl_checkpoints/d2@1"))[1]["model"] == "d2-rl@1"      # as an earlier version called it
        async with client.get(url + "/v1/runs") as response:
            [lineage] = (await response.json())["data"]
        assert lineage["id"] == "d2" and lineage["runs"] == [
            {"id": f"d2-{stage}", "stage": stage, "steps": 2, "latest": f"d2-{stage}@2"} for stage in ("base", "rl")]
        for name, steps in (("d2", ["d2-base@1", "d2-base@2", "d2-rl@1", "d2-rl@2"]), ("d2-rl", ["d2-rl@1", "d2-rl@2"])):
            async with client.get(f"{url}/v1/runs/{name}") as response:
                assert [step["model"] for step in (await response.json())["steps"]] == steps
        shutil.rmtree(run_folder / "chatrl_checkpoints")
        await until(lambda: len(models.registry.models) == 2)
        status, body = await ask(client, url, "d2@latest")
        assert status == 404 and "d2-base@latest" in body["error"]["message"]
        assert (await ask(client, url, "d2-base@latest"))[1]["model"] == "d2-base@2"


async def test_a_folder_named_as_a_stage_wins(run_folder, watching, client):
    list(tiny_training.train(run_folder, 1, 1))
    shutil.copytree(run_folder / "base_checkpoints" / "d2", run_folder / "base_checkpoints" / "d2-base")
    models = await watching(run_folder)
    async with serving(models, models.settings) as url:
        await until(lambda: len(models.registry.models) == 2)
        assert {model.name for model in models.registry.models} == {"base_checkpoints/d2@1", "d2-base-base@1"}
        assert (await ask(client, url, "d2-base@1"))[1]["model"] == "d2-base-base@1"


@pytest.mark.slow
async def test_old_steps_take_turns_in_small_memory(run_folder, watching, client, monkeypatch):
    """It holds one."""
    monkeypatch.setattr(Residency, "STAY_LOADS", 0.1)
    list(tiny_training.train(run_folder, 3, 1))
    models = await watching(run_folder, models_memory=230 * MIB, prefix_memory=0)
    async with serving(models, models.settings) as url:
        await until(lambda: len(models.registry.models) == 3)
        answers = await asyncio.gather(*(ask(client, url, f"d2-base@{step}") for step in (1, 2, 3)))
        assert [body["model"] for _, body in answers] == ["d2-base@1", "d2-base@2", "d2-base@3"]
        status, events = await compared(client, url, steps=[1, 2, 3])
        assert status == 200 and [end["finish_reason"] for end in events[-1]["answers"]] == ["length"] * 3
        assert models.source.residency.used <= 230 * MIB


async def compared(client, url, struck=None, **body):
    body = {"messages": [{"role": "user", "content": "hello"}], "temperature": 1, "seed": 5, "max_tokens": 24} | body
    async with client.post(url + "/v1/compare", json=body, headers={"X-Request-Id": struck} if struck else {}) as response:
        return response.status, frames(await response.read()) if response.status == 200 else await response.json()


async def test_steps_are_compared_with_the_same_noise(run_folder, watching, client, tmp_path, monkeypatch):
    """The answer says where each leaves the first."""
    (tmp_path / "struck").mkdir()
    monkeypatch.setenv("STRUCK", str(tmp_path / "struck"))
    list(tiny_training.train(run_folder, 6, 2))
    models = await watching(run_folder)
    async with serving(models, models.settings) as url:
        await until(lambda: len(models.registry.models) == 3)
        status, events = await compared(client, url, steps=[2, 4, "latest"])
        assert status == 200 and events[-1]["done"] is True
        texts = ["".join(event["token"] for event in events if event.get("index") == index and "token" in event) for index in range(3)]
        for index, step in enumerate((2, 4, 6)):
            answer = (await ask(client, url, f"d2-base@{step}", logprobs=True))[1]["choices"][0]
            assert answer["message"]["content"] == texts[index] and events[-1]["answers"][index]["model"] == f"d2-base@{step}"
            logprobs = [(token["bytes"], token["logprob"]) for token in answer["logprobs"]["content"]]
            if index == 0:
                first = logprobs
                continue
            [differs] = [event["differs"] for event in events if event.get("differs", {}).get("index") == index]
            at = next(at for at, pair in enumerate(zip(first, logprobs)) if pair[0][0] != pair[1][0])
            assert differs["model"] == f"d2-base@{step}" and differs["position"] == at
            assert differs["probabilities"] == pytest.approx([2.718281828459045 ** line[at][1] for line in (first, logprobs)])
        assert len({end["seed"] for end in events[-1]["answers"]}) == 1
        before = texts
        status, events = await compared(client, url, steps=[2, 4, "latest"], struck="kill-decode")
        assert status == 200 and len([*(tmp_path / "struck").iterdir()]) == 3       # each answer's worker died once
        texts = ["".join(event["token"] for event in events if event.get("index") == index and "token" in event) for index in range(3)]
        assert texts == before and [end["finish_reason"] for end in events[-1]["answers"]] == ["length"] * 3
        status, events = await compared(client, url, variants=[{"model": "d2-base@2"}, {"model": "d2-base@2"}, {"seed": 6}], model="d2-base@2")
        assert [event["differs"]["index"] for event in events if "differs" in event] == [2]
        body = {"messages": [{"role": "user", "content": "hello"}], "steps": [2, 4], "ignore_eos": True}
        async with client.post(url + "/v1/compare", json=body) as response:
            await response.content.readline()       # then the client leaves
        await until(lambda: not any(model.pool.dispatcher.jobs for model in models.registry.models))


async def test_bad_comparisons_are_refused_unstreamed(run_folder, watching, client):
    """What cannot be compared is refused before the stream."""
    list(tiny_training.train(run_folder, 2, 1))
    models = await watching(run_folder)
    async with serving(models, models.settings) as url:
        await until(lambda: len(models.registry.models) == 2)
        for body, words in (
                ({}, "one of models, steps and variants"), ({"models": ["d2-base@1"]}, "models must be a list of 2 to 8"), ({"models": []}, "2 to 8"),
                ({"variants": []}, "variants must be a list of 2 to 8"), ({"variants": [{}] * 9}, "2 to 8"), ({"steps": [1] * 9}, "2 to 8"), ({"variants": "d2-base@1"}, "2 to 8"),
                ({"variants": [{"model": "d2-base@1"}, {"model": 3}]}, "variants[1].model"), ({"models": ["d2-base@1", "d2-base@2"], "variants": [{}, {}]}, "models and variants is here"),
                ({"variants": [{}, {"max_tokens": 0}]}, "variants[1].max_tokens"), ({"models": ["d2-base@1"] * 9}, "2 to 8"),
                ({"models": ["d2-base@1", "d2-base@2"], "steps": [1, 2]}, "models and steps is here"), ({"steps": [1, "x"]}, "steps"),
                ({"models": ["d2-base@1", "d2-base@77"]}, "d2-base@77"), ({"steps": [1, 77]}, "d2-base@77"), ({"variants": [{}, {"temperature": 9}]}, r"variants[1].temperature"),
                ({"variants": [{}, {"adapter": "pirate"}]}, "pirate"), ({"variants": [{}, 3]}, "variants"),
                ({"steps": [1, 2], "messages": [{"role": "user", "content": "x" * 999}]}, "context")):
            status, answer = await compared(client, url, **body)
            assert status in (400, 404) and words in answer["error"]["message"], (body, answer)
        assert not any(model.pool.dispatcher.jobs for model in models.registry.models)


async def test_each_checkpoint_is_scored(run_folder, watching, client, tmp_path):
    """Metrics and stats have the number."""
    (tmp_path / "text.txt").write_text(tiny_training.TEXT * 3)
    list(tiny_training.train(run_folder, 60, 30))
    models = await watching(run_folder, watch_text=str(tmp_path / "text.txt"))
    async with serving(models, models.settings) as url:
        await until(lambda: len(models.registry.models) == 2 and all(model.bits_per_byte for model in models.registry.models))
        tokenizer = models.find("d2-base@30").model.pool.tokenizer
        ids = [tokenizer.spec.bos_token, *tokenizer.encode(tiny_training.TEXT * 3)]
        async with client.get(url + "/metrics") as response:
            text = await response.text()
        async with client.get(url + "/stats") as response:
            stats = {model["id"]: model for model in (await response.json())["models"]}
        for step in (30, 60):
            expected = tiny_training.bits_per_byte(tiny_training.load(file_of(run_folder, step)), ids, len(tiny_training.TEXT * 3))
            assert stats[f"d2-base@{step}"]["bits_per_byte"] == pytest.approx(expected, abs=2e-5) and stats[f"d2-base@{step}"]["run"] == "d2-base"
            assert f'chat_server_bits_per_byte{{model="d2-base@{step}"}} ' in text
        assert stats["d2-base@60"]["bits_per_byte"] != stats["d2-base@30"]["bits_per_byte"]
        await until(lambda: all(model.state == "unloaded" for model in models.registry.models))     # nobody else has asked for them


async def test_a_run_has_the_metrics_of_its_steps(run_folder, watching, client, tmp_path):
    """It has those that the training wrote too."""
    list(tiny_training.train(run_folder, 60, 30))
    for step, more in ((30, {"val_bpb": 1.25, "total_batch_size": 1000, "loop_state": {"min_val_bpb": 1.2, "total_training_time": 7}}),
                       (60, {"val_bpb": "low", "total_batch_size": True, "loop_state": [float("nan")]})):
        meta, = run_folder.rglob(f"meta_{step:06}.json")
        meta.write_text(json.dumps(json.loads(meta.read_text()) | more))
    models = await watching(run_folder)
    async with serving(models, models.settings) as url:
        await until(lambda: len(models.registry.models) == 2)
        async with client.get(url + "/v1/runs/d2") as response:
            run = await response.json()
        assert [(step["model"], step["step"], step["metrics"]) for step in run["steps"]] == [
            ("d2-base@30", 30, {"val_bpb": 1.25, "min_val_bpb": 1.2, "total_training_time": 7, "tokens": 30_000}), ("d2-base@60", 60, {})]
        assert all(step["weights_digest"] for step in run["steps"]) and run["id"] == "d2"
        async with client.get(url + "/metrics") as response:
            assert 'chat_server_checkpoint_metric{metric="val_bpb",model="d2-base@30"} 1.25\n' in await response.text()
        for name in ("d3", "d2/x", "%00", "d2-base@30", "x" * 5000):
            async with client.get(f"{url}/v1/runs/{name}") as response:
                assert response.status == 404 and len(await response.text()) < 500 and "d2" in (await response.json())["error"]["message"]


async def test_a_stale_val_bpb_is_marked(nanochat_fixtures, tmp_path, watching, client, monkeypatch):
    """A reward is read from a log that is written later."""
    monkeypatch.setattr(RunWatch, "WATCH_S", 0.1)
    shutil.copytree(nanochat_fixtures / "gen3", tmp_path / "base")
    folder = tmp_path / "base" / "chatrl_checkpoints" / "d4"
    shutil.copytree(folder, tmp_path / "base" / "base_checkpoints" / "d5")
    meta = tmp_path / "base" / "base_checkpoints" / "d5" / "meta_000030.json"
    training = {"val_bpb": 1.5, "user_config": {"depth": 4, "eval_every": 20, "save_every": 10, "num_iterations": 100},
                "loop_state": {"smooth_train_loss": 2.0, "min_val_bpb": 1.5}}
    meta.write_text(json.dumps(json.loads(meta.read_text()) | training))
    models = await watching(tmp_path / "base")
    async with serving(models, models.settings) as url:
        await until(lambda: len(models.registry.models) == 2)
        base, rl = sorted(models.registry.models, key=lambda model: "chatrl" in model.entry.path)
        assert base.metrics == {"val_bpb": 1.5, "min_val_bpb": 1.5, "train_loss": pytest.approx(2 / (1 - 0.9 ** 30))} and rl.metrics == {}
        async with client.get(url + "/v1/models") as response:
            listed = {model["id"]: model for model in (await response.json())["data"]}
        assert listed[base.name]["stale"] == ["val_bpb"] and "stale" not in listed[rl.name]
        for reward in (0.25, 0.5):      # a run that is begun again overwrites its log
            (folder / "chat_rl.log").write_text(f"Step 30/99 | Average reward: {reward} | Average sequence length: 30.00\n")
            await until(lambda: rl.metrics == {"reward": reward})
        (folder / "chat_rl.log").unlink()
        async with client.get(url + "/metrics") as response:
            assert f'chat_server_checkpoint_metric{{metric="reward",model="{rl.name}"}} 0.5\n' in await response.text()
        assert rl.metrics == {"reward": 0.5}


async def test_suites_are_done_once_for_each_step(run_folder, watching, client, tmp_path):
    """The newest first, beside a text to score; the numbers are those of `eval`, and lines in the run's file."""
    list(tiny_training.train(run_folder, 60, 30))
    (tmp_path / "text.txt").write_text(tiny_training.TEXT)
    (tmp_path / "prompts.txt").write_text("the cat\n\nrain fell\n")
    flags = dict(watch_text=str(tmp_path / "text.txt"), watch_suite=f"{write_bundle(tmp_path / 'bundle')}:8",
                 watch_prompts=str(tmp_path / "prompts.txt"), results=str(tmp_path / "results"))
    lines, verdicts = [], {}
    for _ in range(2):
        models = await watching(run_folder, **flags)
        async with serving(models, models.settings) as url:
            await until(lambda: len(models.registry.models) == 2 and all(model.judged and model.samples and model.bits_per_byte for model in models.registry.models))
            async with client.get(url + "/v1/runs/d2") as response:
                steps = (await response.json())["steps"]
            async with client.get(url + "/metrics") as response:
                metrics = await response.text()
            async with client.get(url + "/v1/runs/d2?before=30&after=60") as response:
                changed = (await response.json())["flips"]
            for wrong in ("?before=30", "?before=30&after=45", "?after=x", "?before=%00&after=60"):
                async with client.get(url + "/v1/runs/d2" + wrong) as response:
                    assert response.status == 400 and "30, 60" in (await response.json())["error"]["message"]
        lines.append((tmp_path / "results/run-d2-base.jsonl").read_text())
        for step, model in zip(steps, ("d2-base@30", "d2-base@60"), strict=True):
            assert [sample["prompt"] for sample in step["samples"]] == ["the cat", "rain fell"] and all(sample["text"] for sample in step["samples"])
            assert {"bits_per_byte", "core_metric", "core_standard_error", "centered_results/go on"} <= step["metrics"].keys()
            assert f'{{metric="core_metric",model="{model}"}} {step["metrics"]["core_metric"]}\n' in metrics
        await models.close()
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 6
    found = [json.loads(line) for line in lines[0].splitlines()]
    assert [line["step"] for line in found if "core_metric" in line] == [60, 30] == [line["step"] for line in found if "samples" in line]
    for line in found:
        if "core_metric" in line:
            assert line["core_metric"] == steps[line["step"] // 30 - 1]["metrics"]["core_metric"] and line["max_per_task"] == 8 and line["tag"] == "d2-base"
            pool = await started_alone(run_folder, line["step"])
            suite = read_suite(str(tmp_path / "bundle"))
            kept = AnswersFile(tmp_path, f"own-{line['step']}")
            results = [await run_task(PoolScorer(pool), task, 8, kept, lambda stage, fraction: None) for task in suite.tasks]
            await pool.close()
            assert as_json(suite, results)["results"] == line["results"]
            verdicts[line["step"]] = {(task.label, index): right for task, one in zip(suite.tasks, results) for index, right in enumerate(one.verdicts)}
    differ = {item for item, right in verdicts[60].items() if right != verdicts[30][item]}
    assert {(item["task"], item["item"]) for item in changed["items"]} == differ and len(differ) == changed["gained"] + changed["lost"] > 0
    for item in changed["items"]:
        assert item["correct"] == (verdicts[60][item["task"], item["item"]] == "1") and item["texts"] and item["chat"] is False


async def test_a_restarted_server_computes_nothing_again(run_folder, watching, client, tmp_path, monkeypatch):
    list(tiny_training.train(run_folder, 30, 30))
    (tmp_path / "prompts.txt").write_text("the cat")
    flags = dict(watch_suite=f"{write_bundle(tmp_path / 'bundle')}:4", watch_prompts=str(tmp_path / "prompts.txt"), results=str(tmp_path / "results"))
    found = []
    for _ in range(2):
        models = await watching(run_folder, **flags)
        async with serving(models, models.settings) as url:
            await until(lambda: len(models.registry.models) == 1 and all(model.judged and model.samples for model in models.registry.models))
            async with client.get(url + "/v1/runs/d2") as response:
                found.append((await response.json())["steps"][0])
        await models.close()

        async def asked_again(*_):
            raise AssertionError("the model was asked again")

        monkeypatch.setattr(PoolScorer, "score", asked_again)
        monkeypatch.setattr(PoolScorer, "complete", asked_again)
    assert found[0]["samples"] == found[1]["samples"] and found[0]["metrics"] == found[1]["metrics"]


async def started_alone(run_folder, step):
    pool = make_pool(Settings(**TINY | {"model": str(run_folder), "step": step}))
    await pool.start()
    await pool.wait_ready()
    return pool


@pytest.mark.parametrize("flag", by_day(["watch_suite", "watch_text"], "watch_suite"))
async def test_an_evaluation_steps_aside_for_a_question(run_folder, watching, client, tmp_path, flag):
    """It goes on after it."""
    list(tiny_training.train(run_folder, 30, 30))
    (tmp_path / "text.txt").write_text(tiny_training.TEXT * 20)
    asked_for = {"watch_suite": f"{write_bundle(tmp_path / 'bundle')}:8", "watch_text": str(tmp_path / "text.txt")}
    models = await watching(run_folder, **{flag: asked_for[flag]}, results=str(tmp_path / "results"),
                            stream_interval=0.0)         # a message for each step
    async with serving(models, models.settings) as url:
        await until(lambda: models.registry.models and any(model.pool.dispatcher.jobs for model in models.registry.models))
        model, = models.registry.models
        dispatcher, seen = model.pool.dispatcher, []
        deliver = dispatcher.deliver
        dispatcher.deliver = lambda worker, events: (seen.append({job.request.low_priority for job in worker.jobs.values()}), deliver(worker, events))
        status, answer = await ask(client, url, "d2-base@30", max_tokens=40, ignore_eos=True)
        assert status == 200 and answer["usage"]["completion_tokens"] == 40
        assert seen.count({False}) >= 30        # most steps had only the question
        await until(lambda: model.judged or model.bits_per_byte)
        if flag == "watch_suite":
            assert model.judged["core_metric"] is not None and len([*(tmp_path / "results").glob("d2-base@30-*.jsonl")]) == 1


@pytest.mark.parametrize("flag, value, words", [("watch_suite", "nothing", "--watch-suite nothing"), ("watch_suite", "BUNDLE:2", "needs 2 examples"),
                                                ("watch_prompts", "EMPTY", "--watch-prompts")])
async def test_an_unusable_suite_ends_the_start(run_folder, tmp_path, flag, value, words):
    """Unusable prompts do too."""
    list(tiny_training.train(run_folder, 30, 30))
    (tmp_path / "empty.txt").write_text("\n")
    value = value.replace("BUNDLE", str(write_bundle(tmp_path / "bundle"))).replace("EMPTY", str(tmp_path / "empty.txt"))
    with pytest.raises(ConfigError, match=words):
        RunWatch(many_models(Settings(**TINY | {"watch": str(run_folder), flag: value, "results": str(tmp_path)})).source, CheckpointEvaluator)


async def test_scoring_leaves_the_step_in_use_loaded(run_folder, watching, client, tmp_path, monkeypatch, caplog):
    """Memory holds one step; the others are scored once there is room."""
    monkeypatch.setattr(Residency, "STAY_LOADS", 0.1)
    caplog.set_level(logging.INFO, logger="chat_server")
    (tmp_path / "text.txt").write_text(tiny_training.TEXT * 3)
    training = tiny_training.train(run_folder, 3, 1)
    next(training)
    models = await watching(run_folder, watch_text=str(tmp_path / "text.txt"), models_memory=230 * MIB, prefix_memory=0)
    async with serving(models, models.settings) as url:
        await until(lambda: any("d2-base@latest" in model.names for model in models.registry.models))
        assert (await ask(client, url, "d2-base@latest"))[1]["model"] == "d2-base@1"
        await until(lambda: models.find("d2-base@1").model.bits_per_byte)      # by the worker that answers
        first = models.find("d2-base@1").model
        list(training)
        await until(lambda: models.find("d2-base@latest").name == "d2-base@3")
        assert (await ask(client, url, "d2-base@latest"))[1]["model"] == "d2-base@3"
        last = models.find("d2-base@3").model
        await until(lambda: last.bits_per_byte)
        assert last.state == "ready" and not models.find("d2-base@2").model.bits_per_byte
        models.source.residency.budget *= 2
        await until(lambda: models.find("d2-base@2").model.bits_per_byte and models.find("d2-base@2").state == "unloaded")
        assert last.state == "ready" and first.bits_per_byte
    assert [line.split()[0] for line in caplog.messages if "leaves memory" in line] == ["d2-base@1", "d2-base@2"]


def test_a_text_to_score_must_be_there(run_folder, tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name, words in (("none", "No such file"), ("empty", "the file is empty"), ("bytes", "UTF-8")):
        with pytest.raises(ConfigError, match=f"--watch-text .*{words}"):
            RunWatch(many_models(Settings(watch=str(run_folder), watch_text=str(tmp_path / name))).source, CheckpointEvaluator)


def test_the_small_training_is_nanochats_first(nanochat_fixtures):
    """Its own code against upstream's oracle."""
    base = nanochat_fixtures / "gen1"
    [path] = base.rglob("model_*.pt")
    for case in json.loads((base / "oracle.json").read_text())["cases"]:
        with torch.no_grad():
            logits = tiny_training.load(path)(torch.tensor(case["prompt_ids"]))[-1]
        assert torch.allclose(logits, torch.tensor(case["next_logits"]), atol=2e-3)


async def test_latest_stays_while_the_next_is_broken(run_folder, watching, client):
    """Its headers are right, and its weights are no numbers: that is seen when they are read, before the name goes to it."""
    list(tiny_training.train(run_folder, 2, 1))
    models = await watching(run_folder)
    async with serving(models, models.settings) as url:
        await until(lambda: len(models.registry.models) == 2)
        assert (await ask(client, url, "d2-base@latest"))[1]["model"] == "d2-base@2"
        broken = tiny_training.load(file_of(run_folder, 2))
        broken.w["lm_head.weight"][5, 5] = float("nan")
        tiny_training.save(broken, file_of(run_folder, 3).parent, 3)
        await until(lambda: any(model.state == "failed" for model in models.registry.models))
        status, body = await ask(client, url, "d2-base@3")
        assert status == 503 and "NaN" in body["error"]["message"]
        assert (await ask(client, url, "d2-base@latest"))[1]["model"] == "d2-base@2" and models.find("").name == "d2-base@2"


@pytest.mark.slow
async def test_checkpoints_of_a_trainer_are_watched(tmp_path, watching, client, monkeypatch):
    """Its own files replace nothing."""
    from families import make_model, save
    monkeypatch.setattr(RunWatch, "WATCH_S", 0.1)
    for step in (3, 10):
        save(make_model("llama3.2", seed=step), tmp_path / "my-run" / f"checkpoint-{step}")
    models = await watching(tmp_path)
    async with serving(models, models.settings) as url:
        await until(lambda: len(models.registry.models) == 2)
        texts = []
        for name, step in (("my-run@3", 3), ("my-run@latest", 10)):
            async with client.post(url + "/v1/completions", json={"model": name, "prompt": "hello", "temperature": 0, "max_tokens": 8}) as response:
                body = await response.json()
            assert body["model"] == f"my-run@{step}"
            texts.append(body["choices"][0]["text"])
        assert texts[0] != texts[1]
        known = [*models.registry.models]
        (tmp_path / "my-run" / "checkpoint-10" / "trainer_state.json").write_text("{}")
        save(make_model("llama3.2", seed=11), tmp_path / "my-run" / "checkpoint-11")
        await until(lambda: len(models.registry.models) == 3)
        assert models.registry.models[:2] == known


def test_workers_of_a_watch_yield_to_the_training(run_folder):
    """Workers are as nice as --nice says, and so are their sessions, among which Linux divides the processor first. The
    front, its sandboxes and the process that reads headers are as nice as the server was started: beside a training
    that takes all cores they would list nothing."""
    assert [niceness(Settings(device_type="cpu", **flags)) for flags in ({}, {"watch": "x"}, {"watch": "x", "nice": 3}, {"nice": 5})] == [None, 19, 3, 5]
    assert [niceness(Settings(command="embed", device_type="cpu", nice=nice)) for nice in (None, 0)] == [19, 0]
    list(tiny_training.train(run_folder, 1, 1))
    with server("--watch", run_folder, "--nice", 3, forked="front") as (process, url):
        while not get(url + "/v1/models")["data"]:
            time.sleep(0.05)
        json.load(post(url + "/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}))
        [worker] = get(url + "/stats")["workers"]
        others = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True) if child.pid != worker["pid"])]
        assert psutil.Process(worker["pid"]).nice() == 3 and Path(f"/proc/{worker['pid']}/autogroup").read_text().endswith("nice 3\n")
        assert {psutil.Process(pid).nice() for pid in others} == {psutil.Process().nice()}


def test_a_forbidden_niceness_ends_the_start(monkeypatch):
    """The system does not allow it."""
    def refused(which, who, nice):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "setpriority", refused)
    with pytest.raises(ConfigError, match="--nice -5: Permission denied; it is .* now, and only root may lower it"):
        check_nice(-5)
    check_nice(19)


@pytest.mark.slow
async def test_adapter_checkpoints_are_merged_into_the_base(tmp_path, watching, client, caplog):
    """They are of its training."""
    from families import make_model, save
    from lora import adapt
    base = save(make_model("llama3.2"), tmp_path / "base")
    for step in (5, 10):
        adapt(make_model("llama3.2"), tmp_path / "runs" / "my-run" / f"checkpoint-{step}", size=step / 20)
        config = tmp_path / "runs" / "my-run" / f"checkpoint-{step}" / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(base)}))
    shutil.copytree(config.parent, tmp_path / "runs" / "my-run" / "checkpoint-11")
    (tmp_path / "runs" / "my-run" / "checkpoint-11" / "adapter_config.json").write_text(config.read_text().replace(str(base), str(tmp_path / "none")))
    models = await watching(tmp_path / "runs")
    async with serving(models, models.settings) as url:
        await until(lambda: len(models.registry.models) == 2 and "my-run@11 is not served: no model at" in caplog.text)
        texts = {}
        for name in ("my-run@5", "my-run@latest"):
            async with client.post(url + "/v1/completions", json={"model": name, "prompt": "hello", "temperature": 0, "max_tokens": 8}) as response:
                texts[name] = (await response.json())["choices"][0]["text"]
    for step, name in ((5, "my-run@5"), (10, "my-run@latest")):
        settings = Settings(model=str(base), lora=(str(tmp_path / "runs" / "my-run" / f"checkpoint-{step}"),), **TINY)
        pool = make_pool(settings, DYING)
        await pool.start()
        await pool.wait_ready()
        async with serving(pool, settings) as url:
            async with client.post(url + "/v1/completions", json={"prompt": "hello", "temperature": 0, "max_tokens": 8}) as response:
                assert (await response.json())["choices"][0]["text"] == texts[name]
        await pool.close()
    assert texts["my-run@5"] != texts["my-run@latest"]


def copied(base, tag, step, stage="base", of=1):
    """A checkpoint of d2, as a step of another run."""
    folder = base / f"{stage}_checkpoints" / tag
    folder.mkdir(parents=True, exist_ok=True)
    for name, given in ((f"meta_{step:06}.json", f"meta_{of:06}.json"), (f"model_{step:06}.pt", f"model_{of:06}.pt")):
        shutil.copy(base / "base_checkpoints" / "d2" / given, folder / name)


@pytest.mark.parametrize("choice, first, later", [
    ({"model_tag": "d2"}, {"d2-base@1"}, {"d2-base@1", "d2-base@2", "d2-sft@5"}),
    ({"model_tag": "d4"}, {"d4-base@3"}, {"d4-base@3", "d4-base@4"}),
    ({"source": "sft"}, set(), {"d2-sft@5"}),
    ({"model_tag": "d4", "source": "sft"}, set(), set()),
    ({}, {"d2-base@1", "d4-base@3"}, {"d2-base@1", "d2-base@2", "d2-sft@5", "d4-base@3", "d4-base@4"})])
async def test_a_watched_tag_is_served_alone(run_folder, watching, client, caplog, choice, first, later):
    caplog.set_level(logging.INFO, logger="chat_server")
    list(tiny_training.train(run_folder, 1, 1))
    copied(run_folder, "d4", 3)
    models = await watching(run_folder, **choice)
    known = lambda: {model.name for model in models.registry.models}
    async with serving(models, models.settings) as url:
        await until(lambda: known() == first)
        for written in (("d4", 4), ("d2", 2), ("d2", 5, "chatsft")):        # the other tag gets a step too
            copied(run_folder, *written)
        [runs] = models.source.watches
        scanned = lambda: {step.step for step in [*runs.scanner.there.values(), *runs.left_out]}
        await until(lambda: known() == later and scanned() == {1, 2, 3, 4, 5})
        async with client.get(url + "/v1/runs") as response:
            runs = {run["id"] for lineage in (await response.json())["data"] for run in lineage["runs"]}
        assert runs == {name.partition("@")[0] for name in later}
        for name in later:
            assert (await ask(client, url, name, max_tokens=1))[0] == 200
        for name in {"d2-base@2", "d4-base@4"} - later:
            assert (await ask(client, url, name, max_tokens=1))[0] == (404 if later else 503)
    left_out = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(left_out) == bool(choice)


async def test_a_watched_folder_without_the_tag_says_which_it_has(run_folder, watching, caplog):
    caplog.set_level(logging.INFO, logger="chat_server")
    list(tiny_training.train(run_folder, 1, 1))
    await watching(run_folder, model_tag="d20")
    lines = [record.getMessage() for record in caplog.records]
    assert any(line.endswith("no complete checkpoint of -g d20 yet") for line in lines)
    assert "--watch serves only what fits -g d20; left out: d2-base" in lines


async def test_results_of_other_tags_are_not_those_of_removed_steps(run_folder, watching, tmp_path):
    """They are in the same file of results."""
    list(tiny_training.train(run_folder, 2, 1))
    copied(run_folder, "d4", 3, of=2)
    remove(run_folder, 2)
    meta = file_of(run_folder, 1).with_name("meta_000001.json")
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"val_bpb": 1.5}))
    results = str(tmp_path / "results.jsonl")
    models = await watching(run_folder, results=results)
    await until(lambda: {model.name for model in models.registry.models} == {"d2-base@1", "d4-base@3"})
    await models.close()
    models = await watching(run_folder, results=results, model_tag="d4")
    await until(lambda: {model.name for model in models.registry.models} == {"d4-base@3"})
    [runs] = models.source.watches
    assert await runs.removed_steps() == []


def test_runs_of_other_trainers_are_tagged_by_their_folders(tmp_path):
    for run in ("one", "two"):
        folder = tmp_path / run / "checkpoint-10"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"x")
    chosen = lambda **choice: [step.run.name for step in find_steps(tmp_path) if step.is_chosen(Settings(**choice))]
    assert chosen() == ["one", "two"] and chosen(model_tag="two") == ["two"]
    assert chosen(model_tag="three") == chosen(source="base") == []


def test_one_step_of_a_watched_run_is_refused():
    with pytest.raises(ConfigError, match="--watch serves every step of a run"):
        parse_command_line(["--watch", "x", "-s", "3"], {})
