"""Results of --watch's steps that outlive the server and the files of the steps."""

import asyncio
import json
import logging
import os
import random
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import tiny_training
from chatlm.common.config import ApiKey
from chatlm.front.evals import checkpoint_evaluator
from chatlm.front.evals.run_results import (
    SAMPLES, TEXT, WRITTEN, CheckpointResult, EvaluatedCheckpoint, RunResults, Score, result_in, text_result)
from chatlm.front.evals.scores import PoolScorer
from fake_pool import serving
from nightly import WHOLE, by_day
from real_server import get, server
from watched import all_known, asked, file_of, mounted, remove, run_folder, run_of, scalars_in, until, watching  # noqa: F401

RUN = "d2-base"


@contextmanager
def computing_nothing():
    """A server that computes a result fails."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        async def computed(*_, **__):
            raise AssertionError("it was computed again")

        monkeypatch.setattr(checkpoint_evaluator, "score_text", computed)
        monkeypatch.setattr(PoolScorer, "score", computed)
        monkeypatch.setattr(PoolScorer, "complete", computed)
        yield


def lines_in(tmp_path, name=f"run-{RUN}.jsonl"):
    return [json.loads(line) for line in (tmp_path / "results" / name).read_text().splitlines()]


async def test_scores_survive_a_restart(run_folder, watching, client, tmp_path):
    """They survive the removal of a step, and nothing is computed twice."""
    list(tiny_training.train(run_folder, 60, 20))
    meta, = run_folder.rglob("meta_000020.json")
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"val_bpb": 1.25}))
    flags = asked(tmp_path)
    models = await watching(run_folder, **flags)
    async with serving(models, models.settings) as url:
        await until(lambda: all_known(models, 3))
        before = (await run_of(client, url))[1]["steps"]
    await models.close()
    lines = lines_in(tmp_path)
    with computing_nothing():
        for gone in ((), (20,), (20, 60)):
            for step in gone:
                if file_of(run_folder, step).exists():
                    remove(run_folder, step)
            models = await watching(run_folder, **flags)
            async with serving(models, models.settings) as url:
                await until(lambda: all_known(models, 3 - len(gone)))
                steps = (await run_of(client, url))[1]["steps"]
                for was, now in zip(before, steps, strict=True):
                    expected = was | ({"state": "removed", "judged": False} if was["step"] in gone else {"state": "unloaded"})
                    assert {name: now[name] for name in was} == expected
                    assert now["metrics"]["bits_per_byte"] and "core_metric" in now["metrics"] and len(now["samples"]) == 2
                async with client.get(url + "/v1/models") as response:
                    assert [model["step"] for model in (await response.json())["data"]] == [step for step in (20, 40, 60) if step not in gone]
                if gone == (20,):       # another one is removed while the server runs
                    remove(run_folder, 60)
                    await until(lambda: len(models.registry.models) == 1)
                    steps = (await run_of(client, url))[1]["steps"]
                    assert [(step["step"], step["state"]) for step in steps] == [(20, "removed"), (40, "unloaded"), (60, "removed")]
                    assert [step["metrics"] for step in steps] == [step["metrics"] for step in before]
            await models.close()
    assert lines_in(tmp_path) == lines and steps[0]["metrics"]["val_bpb"] == 1.25


async def test_another_text_is_computed_again(run_folder, watching, client, tmp_path):
    """Other weights and another tokenizer are too."""
    list(tiny_training.train(run_folder, 40, 20))
    scores = []

    async def scored(text=tiny_training.TEXT):
        flags = asked(tmp_path, text)
        models = await watching(run_folder, watch_text=flags["watch_text"], results=flags["results"])
        await until(lambda: len(models.registry.models) == 2 and all(model.bits_per_byte for model in models.registry.models))
        scores.append([model.bits_per_byte for model in models.registry.models])
        async with serving(models, models.settings) as url:
            steps = (await run_of(client, url))[1]["steps"]
            assert [step["metrics"]["bits_per_byte"] for step in steps] == [round(score, 6) for score in scores[-1]]
        await models.close()
        return len([line for line in lines_in(tmp_path) if "text_digest" in line])

    assert await scored() == 2
    assert await scored("Another text. ") == 4
    assert scores[0] != scores[1]
    shutil.copy(file_of(run_folder, 20), file_of(run_folder, 40))
    assert await scored() == 5 and scores[2] == [scores[0][0]] * 2     # its meta file is another than that of step 20
    merges = run_folder / "tokenizer" / "tokenizer.pkl"
    os.utime(merges, (1e9, 1e9))
    if WHOLE:       # by day test_scores_survive_a_restart
        assert await scored() == 5 and scores[3] == scores[2]
    merges.write_bytes(merges.read_bytes() + b" ")
    assert await scored() == 7
    meta = file_of(run_folder, 20).with_name("meta_000020.json")
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"model_config": tiny_training.CONFIG | {"sequence_len": 64}}))
    assert await scored() == 8 and scores[-1][0] != scores[0][0]


async def test_a_renamed_run_is_not_computed_again(run_folder, watching, client, tmp_path):
    list(tiny_training.train(run_folder, 40, 20))
    flags = asked(tmp_path)
    models = await watching(run_folder, **flags)
    await until(lambda: all_known(models, 2))
    metrics = [model.metrics for model in models.registry.models]
    await models.close()
    file_of(run_folder, 20).parent.rename(run_folder / "base_checkpoints" / "d3")
    path, = (tmp_path / "results").glob(f"run-{RUN}.jsonl")
    lines = [line for line in lines_in(tmp_path) if "verdicts" not in line]     # as an earlier version left it
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with computing_nothing():
        models = await watching(run_folder, **flags)
        async with serving(models, models.settings) as url:
            await until(lambda: all_known(models, 2))
            assert [model.metrics for model in models.registry.models] == metrics
            async with client.get(url + "/v1/runs") as response:
                assert [lineage["id"] for lineage in (await response.json())["data"]] == ["d3"]
        await models.close()


async def test_broken_lines_stop_no_later_server(run_folder, watching, tmp_path):
    """It finds results of earlier versions."""
    list(tiny_training.train(run_folder, 20, 20))
    flags = asked(tmp_path)
    models = await watching(run_folder, **flags)
    await until(lambda: all_known(models, 1))
    samples = models.registry.models[0].samples
    await models.close()
    path = tmp_path / "results" / f"run-{RUN}.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"\n".join([b"\xff\xfe", b"[" * 100_000, b"{}", b"null", b'{"step": 1e999, "weights_digest": 3}', whole[:50], b""])
                     + whole + whole.splitlines()[-1][:40])
    with computing_nothing():
        models = await watching(run_folder, **flags)
        await until(lambda: all_known(models, 1))
        await models.close()
    # as earlier versions wrote them, under another name of the run: without the digests of all files
    old = [{"tag": "old", **{name: line[name] for name in line if name in ("step", "weights_digest", "samples")}}
           for line in lines_in_bytes(whole) if "samples" in line]
    path.unlink()
    (tmp_path / "results" / "run-old.jsonl").write_text(json.dumps(old[0]))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(PoolScorer, "complete", None)
        models = await watching(run_folder, watch_prompts=flags["watch_prompts"], results=flags["results"])
        await until(lambda: models.registry.models and models.registry.models[0].samples)
        assert models.registry.models[0].samples == samples
        await models.close()
    assert [line["samples"] for line in lines_in(tmp_path) if "samples" in line] == [[*samples]]      # it is the run's own now


def lines_in_bytes(data):
    return [json.loads(line) for line in data.splitlines()]


@pytest.mark.parametrize("options", by_day(["ro", "size=16k"], "size=16k"))
async def test_a_full_results_folder_costs_one_warning(
        run_folder, watching, client, tmp_path, caplog, monkeypatch, options):
    """So does a read-only one; it is written later."""
    list(tiny_training.train(run_folder, 40, 20))
    flags, folder = asked(tmp_path), tmp_path / "results"
    monkeypatch.setattr(RunResults, "AGAIN_S", 0.0)
    with mounted(folder, options):
        if options != "ro":     # 60 bytes of a line can be written
            (folder / f"run-{RUN}.jsonl").write_bytes(b"x" * 4035 + b"\n")
            with pytest.raises(OSError), open(folder / "filling", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        models = await watching(run_folder, **flags)
        async with serving(models, models.settings) as url:
            await until(lambda: all_known(models, 2))
            assert not models.source.watches[0].work.failed
            warnings = [line for line in caplog.messages if "results stay in memory" in line]
            assert len(warnings) == 1 and ("Read-only" in warnings[0] or "space" in warnings[0] or "only" in warnings[0])
            results = models.source.watches[0].work.results
            assert results.unwritten
            if options == "ro":
                subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
            else:
                subprocess.run(["mount", "-o", "remount,size=1m", folder], check=True)
            await until(lambda: not results.unwritten)
        await models.close()
        for path in folder.glob("*-4-*"):       # the items; what is left are the results
            path.unlink()
        with computing_nothing():
            models = await watching(run_folder, **flags)
            await until(lambda: all_known(models, 2))
            await models.close()


@pytest.mark.slow       # by day the test below, and test_a_line_after_one_that_was_cut_is_whole
async def test_two_servers_share_a_folder_of_results(run_folder, watching, tmp_path):
    list(tiny_training.train(run_folder, 40, 20))
    flags = asked(tmp_path)
    both = await asyncio.gather(watching(run_folder, **flags), watching(run_folder, **flags))
    await until(lambda: all(all_known(models, 2) for models in both))
    first, second = ([model.metrics for model in models.registry.models] for models in both)
    assert first == second
    for models in both:
        await models.close()
    of_kinds = {(line["step"], next(kind for kind in ("text_digest", "samples", "suite_digest") if kind in line)) for line in lines_in(tmp_path)}
    assert len(of_kinds) == 6
    with computing_nothing():
        models = await watching(run_folder, **flags)
        await until(lambda: all_known(models, 2))
        await models.close()


async def test_a_server_shows_what_another_has_found(run_folder, watching, tmp_path):
    """It computes nothing that is in the file by the time at which it would begin."""
    training = tiny_training.train(run_folder, 20, 20)
    flags = asked(tmp_path)
    waiting = await watching(run_folder, **flags)
    list(training)
    waiting.source.watches[0].work._may_load = lambda model: False
    await until(lambda: waiting.registry.models)
    models = await watching(run_folder, **flags)
    await until(lambda: all_known(models, 1))
    with computing_nothing():
        del waiting.source.watches[0].work._may_load
        await until(lambda: all_known(waiting, 1))


@pytest.mark.parametrize("count", by_day([20_000, 100_000], 20_000))
async def test_100_000_results_are_read_beside_the_loop(tmp_path, count):
    """It is the event loop."""
    step = EvaluatedCheckpoint("d2", "d2", "", 0, str(tmp_path / "d2"), 1.0, "0" * 64)
    with open(tmp_path / "run-d2.jsonl", "w") as file:
        for number in range(count):
            line = {"tag": "d2", "step": number, "weights_digest": f"{number:064}", "folder": step.folder, "saved_s": number + 1,
                    **text_result("text", Score(8.0, number + 1, 3)).fields}
            file.write(json.dumps(line) + "\n")
    results, turns = RunResults(tmp_path), 0
    loading = asyncio.ensure_future(results.load())
    while not loading.done():
        await asyncio.sleep(0.001)
        turns += 1
    results.asked[TEXT] = "text"
    assert turns > 20 and results.find(f"{count - 1:064}", TEXT, "text", "").score.bytes == count
    removed = results.removed(tmp_path, {}, set())
    assert len(removed) == count and removed[0]["model"] == f"d2@{count - 1}"
    size = (tmp_path / "run-d2.jsonl").stat().st_size
    await results.add(step._replace(step=count), text_result("text", Score(8.0, 1, 3)))
    assert results.read_to[tmp_path / "run-d2.jsonl"] == size       # it was not read again


async def test_a_line_after_one_that_was_cut_is_whole(tmp_path):
    step = EvaluatedCheckpoint("d2", "d2", "", 3, "/runs/d2", 1.0, "a" * 64)
    (tmp_path / "run-d2.jsonl").write_bytes(b'{"tag": "d2", "st')
    first, second = RunResults(tmp_path), RunResults(tmp_path)
    await first.load()
    await first.add(step, text_result("text", Score(8.0, 1, 3)))
    await second.load()
    assert second.find(step.digest, TEXT, "text", "").score == Score(8.0, 1, 3)
    assert (tmp_path / "run-d2.jsonl").read_bytes().startswith(b'{"tag": "d2", "st\n{')


@pytest.mark.parametrize("line", [
    b"", b"{", b"[]", b"3", b'"a"', b"{}", b'{"weights_digest": "a"}', b'{"weights_digest": "a", "step": true, "written": {}}', b'{"weights_digest": "", "step": 1, "written": {}}',
    b'{"weights_digest": "a", "step": 1}', b'{"weights_digest": "a", "step": 1, "written": [1]}', b'{"weights_digest": "a", "step": 1, "samples": [3]}',
    b'{"weights_digest": "a", "step": 1, "samples": [{"prompt": "a"}]}', b'{"weights_digest": "a", "step": 1, "samples": 3}',
    b'{"weights_digest": "a", "step": 1, "text_digest": "a", "bits": NaN, "bytes": 3, "tokens": 1}', b'{"weights_digest": "a", "step": 1, "text_digest": "a", "bits": 1, "bytes": 0, "tokens": 1}',
    b'{"weights_digest": "a", "step": 1, "suite_digest": "a", "max_per_task": 3}', b'{"weights_digest": "a", "step": 1, "suite_digest": "a", "max_per_task": 3, "centered_results": [3]}',
    b'{"weights_digest": "a", "step": 1, "suite_digest": "a", "max_per_task": 3, "centered_results": {}, "verdicts": 3}', b"\xff", b"[" * 100_000])
def test_a_line_without_a_result_is_no_result(line):
    assert result_in(line) is None


def test_numbers_that_are_none_are_left_out():
    line = b'{"weights_digest": "a", "step": 1, "written": {"a": NaN, "b": 1e999, "c": "3", "d": true, "e": 2}, "saved_s": Infinity, "folder": 3}'
    step, result = result_in(line)
    assert result.metrics == {"e": 2} and step.saved_s == 0.0 and step.folder == ""


async def known_steps(*steps):
    """The steps that are listed as removed, of lines in this order: (step, saved_s, digest)."""
    results = RunResults(None)
    for step, saved_s, digest in steps:
        await results.add(EvaluatedCheckpoint("d2", "d2", "", step, "/runs/d2", saved_s, digest), CheckpointResult(WRITTEN, metrics={"val_bpb": saved_s}))
    return [(step["step"], step["metrics"]["val_bpb"]) for step in results.removed(Path("/runs"), {}, {("/runs/d2", 900)})]


async def test_a_new_training_overtakes_later_old_steps():
    """A training that began again has overtaken the later steps of the one before."""
    first = [(step, step / 10, f"a{step}") for step in (100, 200, 300, 400)]
    assert sorted(await known_steps(*first)) == [(100, 10), (200, 20), (300, 30), (400, 40)]
    assert sorted(await known_steps(*first, (250, 50, "b"))) == [(100, 10), (200, 20), (250, 50)]       # it went on from 200
    assert sorted(await known_steps(*first, (200, 50, "b"), (300, 60, "c"))) == [(100, 10), (200, 50), (300, 60)]
    assert sorted(await known_steps((200, 50, "b"), *first)) == [(100, 10), (200, 50)]                  # whichever was seen first
    assert sorted(await known_steps(*first, (900, 50, "b"))) == [(100, 10), (200, 20), (300, 30), (400, 40)]     # 900 is there


async def test_another_folder_s_results_are_none_of_this():
    results = RunResults(None)
    for folder in ("/runs/d2", "/runs-of-others/d2", ""):
        await results.add(EvaluatedCheckpoint("d2", "d2", "", 3, folder, 1.0, "a" + folder), CheckpointResult(WRITTEN, metrics={"val_bpb": 1.0}))
    assert [step["weights_digest"] for step in results.removed(Path("/runs"), {}, set())] == ["a/runs/d2"]


async def test_of_other_flags_the_last_result_is_shown():
    """Of another text none is."""
    results = RunResults(None)
    results.asked |= {TEXT: "text", SAMPLES: "prompts"}
    step = EvaluatedCheckpoint("d2", "d2", "", 3, "/runs/d2", 1.0, "a")
    for text, made_by, bits in (("text", "float32", 8.0), ("text", "bfloat16", 16.0), ("other", "bfloat16", 24.0)):
        await results.add(step, text_result(text, Score(bits, 1, 3))._replace(made_by=made_by))
        await results.add(step, CheckpointResult(SAMPLES, "prompts" * (text == "text"), samples=({"prompt": "a", "text": made_by},), made_by=made_by))
    removed, = results.removed(Path("/runs"), {}, set())
    assert removed["metrics"] == {"bits_per_byte": 16.0} and removed["samples"] == [{"prompt": "a", "text": "bfloat16"}]
    assert results.find("a", TEXT, "text", "float32").score.bits == 8.0 and results.find("a", TEXT, "text", "float16") is None


@pytest.mark.parametrize("name", by_day(["pipe", "folder", "link"], "pipe"))
async def test_what_is_no_file_is_left_alone(run_folder, watching, tmp_path, caplog, name):
    """It lies in the folder of results."""
    list(tiny_training.train(run_folder, 20, 20))
    flags = asked(tmp_path)
    path = tmp_path / "results" / f"run-{RUN}.jsonl"
    path.parent.mkdir()
    {"pipe": os.mkfifo, "folder": os.mkdir, "link": lambda path: os.symlink("/dev/full", path)}[name](path)
    models = await watching(run_folder, **flags)
    await until(lambda: all_known(models, 1))
    await models.close()
    assert sum("results stay in memory" in line for line in caplog.messages) == 1


async def test_a_key_sees_only_its_removed_steps(run_folder, watching, client, tmp_path):
    """It might use them."""
    list(tiny_training.train(run_folder, 60, 20))
    for meta in run_folder.rglob("meta_*.json"):
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"val_bpb": 1.25}))
    keys = ApiKey.hashed("all-of-them", "a"), ApiKey.hashed("only-two", "b", ("d2-base@20", "d2-base@60"))
    models = await watching(run_folder, keys=keys)
    async with serving(models, models.settings) as url:
        await until(lambda: len(models.registry.models) == 3)
        for step in (20, 40):
            remove(run_folder, step)
        await until(lambda: len(models.registry.models) == 1)
        for key, steps in (("all-of-them", [20, 40, 60]), ("only-two", [20, 60])):
            status, body = await run_of(client, url, headers={"Authorization": f"Bearer {key}"})
            assert status == 200 and [step["step"] for step in body["steps"]] == steps
        remove(run_folder, 60)
        await until(lambda: not models.registry.models)
        status, body = await run_of(client, url, headers={"Authorization": "Bearer all-of-them"})
        assert status == 200 and [step["state"] for step in body["steps"]] == ["removed"] * 3


async def test_removed_steps_are_found_once_and_beside_the_loop(
        run_folder, watching, client, tmp_path, monkeypatch):
    """Looks at the runs, as the page makes them again and again, read no result twice."""
    list(tiny_training.train(run_folder, 60, 20))
    for meta in run_folder.rglob("meta_*.json"):
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"val_bpb": 1.25}))
    models = await watching(run_folder)
    plain = RunResults._removed
    threads = []

    def counted(results, known, name):
        threads.append(threading.current_thread())
        return plain(results, known, name)
    monkeypatch.setattr(RunResults, "_removed", counted)
    async with serving(models, models.settings) as url:
        await until(lambda: len(models.registry.models) == 3)
        remove(run_folder, 20)
        await until(lambda: len(models.registry.models) == 2)
        for _ in range(3):
            assert (await client.get(url + "/v1/runs")).status == 200
            status, body = await run_of(client, url)
            assert status == 200 and [step["state"] for step in body["steps"]][0] == "removed"
        assert len(threads) == 1 and threading.main_thread() not in threads
        remove(run_folder, 40)
        await until(lambda: len(models.registry.models) == 1)
        status, body = await run_of(client, url)
        assert [step["state"] for step in body["steps"]][:2] == ["removed"] * 2 and len(threads) == 3


async def test_without_a_home_results_stay_in_memory(run_folder, watching, tmp_path, caplog, monkeypatch):
    """A server that scores starts and says so."""
    list(tiny_training.train(run_folder, 20, 20))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file" / "state"))
    models = await watching(run_folder, **asked(tmp_path) | {"results": None})
    await until(lambda: all_known(models, 1))
    assert len([line for line in caplog.messages if "results stay in memory" in line]) == 1
    caplog.set_level(logging.INFO, logger="chat_server")


@pytest.mark.slow
def test_killed_servers_lose_and_double_no_line(nanochat_fixtures, tmp_path):
    """A checkpoint of nanochat's own code, and a command line each; the last server is killed by nobody."""
    shutil.copytree(nanochat_fixtures / "gen5", tmp_path / "base")
    flags = asked(tmp_path)
    words = ["--watch", tmp_path / "base", "--nice", 0, "--run-log", tmp_path / "log", "--results", flags["results"], "--dtype", "float32",
             "--watch-text", flags["watch_text"], "--watch-suite", flags["watch_suite"], "--watch-prompts", flags["watch_prompts"]]
    dice = random.Random(3)

    def whole_lines():
        path, = (tmp_path / "results").glob("run-*.jsonl")
        return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]

    for life_s in (*(dice.uniform(0, 1.5) for _ in range(6)), None):
        with server(*words) as (process, url):
            if life_s is not None:
                time.sleep(life_s)      # then `server` kills it
                continue
            deadline_s = time.monotonic() + 100
            while time.monotonic() < deadline_s:
                lineage, = get(url + "/v1/runs")["data"]
                step, = get(f"{url}/v1/runs/{lineage['id']}")["steps"]
                if step["judged"] and step["samples"] and "bits_per_byte" in step["metrics"]:
                    break
                time.sleep(0.1)
            lines = whole_lines()
        kinds = [kind for line in lines for kind in ("written", "text_digest", "samples", "suite_digest") if kind in line]
        assert sorted(kinds) == sorted({*kinds}) and {"text_digest", "samples", "suite_digest"} <= {*kinds}
    scalars = scalars_in(tmp_path / "log")[step["run"]]
    assert {*scalars} == {*step["metrics"]} and all(len(events) == 1 for events in scalars.values())
