"""A training run in small, and servers that watch it."""

import asyncio
import shutil

import pytest

from chatlm.common.config import Settings
from chatlm.front.pool.many import ManyModels
from chatlm.front.pool.watch import RunWatch
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
        return await started(ManyModels(Settings(**TINY | {"watch": str(folder)} | changes), DYING))

    return start


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def file_of(base, step):
    return base / "base_checkpoints" / "d2" / f"model_{step:06d}.pt"
