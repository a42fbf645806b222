"""A training run in small, and servers that watch it."""

import asyncio
import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest

import tiny_training
from bundles import TASKS, write_bundle
from chatlm.common.config import Settings
from chatlm.front.evals.checkpoint_evaluator import CheckpointEvaluator
from chatlm.front.pool.many import many_models
from chatlm.front.pool.run_watch import RunWatch
from forked import DYING

TINY = {"dtype": "float32", "kv_cache_memory": 4 << 20, "max_batch": 8, "nice": 0}      # other tests take all cores


@pytest.fixture
def run_folder(nanochat_fixtures, tmp_path, monkeypatch):
    """A nanochat base folder that has a tokenizer and no checkpoint yet; it is looked at often."""
    monkeypatch.setattr(RunWatch, "WATCH_S", 0.1)
    shutil.copytree(nanochat_fixtures / "gen1" / "tokenizer", tmp_path / "base" / "tokenizer")
    return tmp_path / "base"


@pytest.fixture
def watching(started):
    """A function that starts a server of what is below --watch."""
    async def start(folder, **changes):
        return await started(many_models(Settings(**TINY | {"watch": str(folder)} | changes), DYING, CheckpointEvaluator))

    return start


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def file_of(base, step):
    return base / "base_checkpoints" / "d2" / f"model_{step:06d}.pt"


def remove(base, step):
    file_of(base, step).unlink()
    file_of(base, step).with_name(f"meta_{step:06}.json").unlink()


def all_known(models, count):
    known = models.registry.models
    return len(known) == count and all(model.judged and model.samples and model.bits_per_byte for model in known)


def asked(tmp_path, text=tiny_training.TEXT):
    """Flags that ask everything of each step."""
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "prompts.txt").write_text("the cat\nrain fell\n")
    bundle = tmp_path / "bundle"
    bundle = bundle if bundle.exists() else write_bundle(bundle, TASKS[:1] + TASKS[3:4])
    return dict(watch_text=str(tmp_path / "text.txt"), watch_suite=f"{bundle}:4", watch_prompts=str(tmp_path / "prompts.txt"),
                results=str(tmp_path / "results"))


async def run_of(client, url, name="d2-base", **request):
    async with client.get(f"{url}/v1/runs/{name}", **request) as response:
        return response.status, await response.json()


@contextmanager
def mounted(folder, options):
    """A small file system in a new folder."""
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True).returncode:
        pytest.skip("this user cannot mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def scalars_in(folder):
    """All scalars below a folder as tensorboard reads them: run -> name -> [(step, value, time)]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = {}
    for run in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
        found[str(run.relative_to(folder))] = {name: [(event.step, event.value, event.wall_time) for event in events.Scalars(name)]
                                               for name in events.Tags()["scalars"]}
    return found
