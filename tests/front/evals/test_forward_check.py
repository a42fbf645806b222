"""--watch compares the loss that training wrote with its own before anything is evaluated, and says so where they differ."""

import json
import logging
import os
import shutil

import pytest

from bundles import write_bundle
from chatlm.front.evals.scores import PoolScorer
from chatlm.front.pool.run_watch import RunWatch
from fake_pool import serving
from trained_base import VAL_BPB, write_base
from watched import until, watching  # noqa: F401

pytest.importorskip("pyarrow")


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setattr(RunWatch, "WATCH_S", 0.1)
    monkeypatch.delenv("NANOCHAT_DATASET", raising=False)
    return tmp_path / "base"


def copied(model, step, **changes):
    """The checkpoint as another step of its run."""
    later = model.with_name(f"model_{step:06}.pt")
    meta = json.loads(model.with_name("meta_000650.json").read_text())
    later.with_name(f"meta_{step:06}.json").write_text(json.dumps(meta | {"step": step} | changes))
    shutil.copy(model, later)
    return later


async def get(client, url):
    async with client.get(url) as response:
        return await response.json()


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING and "val_bpb" in record.getMessage()]


async def test_our_own_forward_brings_no_warning(base, nanochat_fixtures, watching, client, caplog):
    """A checkpoint of it has its own val_bpb."""
    write_base(base, nanochat_fixtures)
    models = await watching(base)
    async with serving(models, models.settings) as url:
        await until(lambda: any(model.is_compared for model in models.registry.models))
        [step] = (await get(client, url + "/v1/runs/d4"))["steps"]
        assert step["metrics"]["own_val_bpb"] == pytest.approx(VAL_BPB, rel=1e-5) and step["metrics"]["val_bpb"] == VAL_BPB
        assert "warning" not in step and warnings(caplog) == []
        await until(lambda: models.registry.models[0].state == "unloaded")     # nobody else has asked for it


async def test_another_forward_is_said_once(base, nanochat_fixtures, watching, client, tmp_path, caplog,
                                                                                     monkeypatch):
    """The line names the step, and comes before its suite begins."""
    older = write_base(base, nanochat_fixtures, config={"window_pattern": "L"})
    os.utime(older, (1, 1))
    copied(older, 900)
    order, score = [], PoolScorer.score

    async def seen(self, prompts, starts, top):
        order.append("row" if len(prompts[0]) == 513 else "item")
        return await score(self, prompts, starts, top)

    monkeypatch.setattr(PoolScorer, "score", seen)
    models = await watching(base, watch_suite=f"{write_bundle(tmp_path / 'bundle')}:4", results=str(tmp_path / "results"))
    async with serving(models, models.settings) as url:
        await until(lambda: len(models.registry.models) == 2 and all(model.judged for model in models.registry.models))
        steps = (await get(client, url + "/v1/runs/d4"))["steps"]
        listed = {model["id"]: model for model in (await get(client, url + "/v1/models"))["data"]}
    assert order[:3] == ["row"] * 3 and order[3:6] == ["row"] * 3 and "row" not in order[6:]      # both steps, then suites
    assert len(steps) == 2
    for step in steps:
        assert step["warning"].startswith("this checkpoint was trained with another forward: val_bpb 9.4558 there, ")
        assert step["metrics"]["own_val_bpb"] != pytest.approx(VAL_BPB, rel=1e-4) and listed[step["model"]]["warning"] == step["warning"]
    assert len(warnings(caplog)) == 1 and "the checkpoint d4-base@900: this checkpoint was trained with another forward" in warnings(caplog)[0]


async def test_an_agreeing_step_speaks_for_older_ones(base, nanochat_fixtures, watching, caplog):
    """Later ones are compared too."""
    older = write_base(base, nanochat_fixtures)
    os.utime(older, (1, 1))
    copied(older, 900)
    models = await watching(base)
    of_step = lambda step: next((model for model in models.registry.models if model.step == step), None)
    await until(lambda: of_step(900) and of_step(900).is_compared and of_step(650))
    await until(lambda: of_step(900).state == "unloaded")
    copied(older, 950, val_bpb=9.0)
    await until(lambda: of_step(950) and of_step(950).is_compared)
    assert of_step(950).warning and not of_step(900).warning and not of_step(650).is_compared


@pytest.mark.parametrize("spoil, words", (
    (lambda shard: shard.write_bytes(b"PAR1"), "cannot read"), (lambda shard: shutil.rmtree(shard.parent), None),
    (lambda shard: shard.write_bytes(b""), "cannot read")))
async def test_a_bad_shard_is_said_once(base, nanochat_fixtures, watching, caplog, spoil, words):
    """It is gone or broken, and the step serves."""
    older = write_base(base, nanochat_fixtures)
    copied(older, 900)
    spoil(base / "base_data_climbmix" / "shard_06542.parquet")
    models = await watching(base)
    await until(lambda: len(models.registry.models) == 2 and all(model.is_compared or model.own_val_bpb for model in models.registry.models) or
                words is None and any(model.is_compared for model in models.registry.models))
    said = warnings(caplog)
    assert len(said) == (1 if words else 0) and all(words in line for line in said)
    assert all(not model.warning for model in models.registry.models)


async def test_a_shard_may_vanish_between_two_steps(base, nanochat_fixtures, watching, caplog):
    """That is no error."""
    older = write_base(base, nanochat_fixtures)
    models = await watching(base)
    await until(lambda: any(model.is_compared for model in models.registry.models))
    shutil.rmtree(base / "base_data_climbmix")
    copied(older, 900)
    await until(lambda: len(models.registry.models) == 2 and all(model.is_compared for model in models.registry.models))
    assert [model.own_val_bpb is None for model in models.registry.models] == [False, True] and warnings(caplog) == []


@pytest.mark.parametrize("flags, words", (({"quantize": "q4_0", "dtype": None}, "fewer bits"), ({"context_length": 256}, None)))
async def test_a_model_served_otherwise_is_not_suspected(base, nanochat_fixtures, watching, caplog, flags, words):
    """What is served otherwise than trained is not called another forward."""
    write_base(base, nanochat_fixtures)
    models = await watching(base, **flags)
    await until(lambda: any(model.is_compared for model in models.registry.models))
    assert not models.registry.models[0].warning
    assert all((words or "context is 256") in line for line in warnings(caplog))


@pytest.mark.parametrize("config, times", (({}, 1), ({"window_pattern": "L"}, 2)))
async def test_the_next_server_compares_what_disagreed(base, nanochat_fixtures, watching, client, tmp_path, monkeypatch, config, times):
    """It compares nothing else again, once the result is kept."""
    write_base(base, nanochat_fixtures, config=config)
    scored, score, kept = [], PoolScorer.score, tmp_path / "results" / "run-d4-base.jsonl"

    async def seen(self, prompts, starts, top):
        scored.append(len(prompts[0]))
        return await score(self, prompts, starts, top)

    monkeypatch.setattr(PoolScorer, "score", seen)
    for _ in range(2):
        models = await watching(base, results=str(tmp_path / "results"))
        async with serving(models, models.settings) as url:
            await until(lambda: any(model.is_compared for model in models.registry.models))
            [step] = (await get(client, url + "/v1/runs/d4"))["steps"]
            assert "own_val_bpb" in step["metrics"] and ("warning" in step) == bool(config)
            await until(lambda: "own_val_bpb" in kept.read_text())      # the page may show it before
        await models.close()
    assert scored == [513] * 3 * times
    [line] = [line for line in kept.read_text().splitlines() if "own_val_bpb" in line]
    assert json.loads(line)["forward"]["agrees"] == (not config)
