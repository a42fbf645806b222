"""Pools of real workers, and pools whose workers a test plays itself, for tests that look inside."""

import asyncio
from types import SimpleNamespace

import psutil
import pytest

from chatlm.common.config import ModelEntry, Settings
from chatlm.common.messages.protocol import ModelCard
from chatlm.common.messages.requests import Finished, Message, Piece, SamplingParams
from chatlm.common.processes.start import PROCESS_COMMAND
from chatlm.front.admission.prompts import PromptMaker
from chatlm.front.pool.shared_resources import SharedResources
from chatlm.front.pool.local_devices import LocalDevices
from chatlm.front.pool.many import many_models
from chatlm.front.pool.memory import OwnMemory
from chatlm.front.pool.pool import WorkerPool, make_pool
from chatlm.front.pool.prefixes import Prefixes
from chatlm.front.pool.worker import Worker, WorkerState
from answers import asked
from fake_pool import Letters
from forked import DYING


def tiny_settings(nanochat_fixtures, generation="gen5", **changes):
    """Settings for a pool of tiny real nanochat models, in float32 so that answers are equal wherever they are computed."""
    return Settings(**{"model": str(nanochat_fixtures / generation), "dtype": "float32", "kv_cache_memory": 8 << 20} | changes)


@pytest.fixture
async def started():
    """A function that starts a WorkerPool, or a Catalogue; at the end all are closed, and their processes must be gone."""
    pools = []

    async def start(pool, wait=True):
        pools.append(pool)
        await pool.start()
        if wait:
            await pool.wait_ready()
        return pool

    yield start
    for pool in pools:
        parts = [model.pool for model in pool.registry.models if model.pool] if hasattr(pool, "registry") else [pool]
        pids = [worker.process.pid for part in parts for worker in part.workers if worker.process]
        await pool.close()
        assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.fixture
async def one_and_two(nanochat_fixtures, started):
    """A catalogue of two tiny models, "one" and "two"."""
    choices = tuple(ModelEntry(str(nanochat_fixtures / generation), name) for generation, name in (("gen5", "one"), ("gen4", "two")))
    return await started(many_models(Settings(several=choices, dtype="float32", kv_cache_memory=4 << 20), DYING))


@pytest.fixture
def start_pool(nanochat_fixtures, started):
    """A function that starts a WorkerPool of tiny models."""
    async def start(worker_command=DYING, wait=True, **changes):
        pool = await started(make_pool(tiny_settings(nanochat_fixtures, **changes), worker_command=worker_command), wait)
        if wait:
            await all_ready(pool)
        return pool

    return start


class PlayedWorker(Worker):
    """A worker without a process: the test sees what it is sent, and says what comes back."""

    def __init__(self, pool):
        super().__init__(pool.settings, pool.placement, 0)
        self.pool, self.sent = pool, []
        self.become(WorkerState.READY)

    def send(self, message):
        self.sent.append(message)


def played_pool(worker_class=PlayedWorker, memory=OwnMemory, shared=None, **settings):
    """A WorkerPool with one played worker and a context of 64 letters. memory, shared: see WorkerPool."""
    settings = Settings(**settings)
    shared = shared or SharedResources(Prefixes(settings))
    pool = WorkerPool(settings, LocalDevices(settings, PROCESS_COMMAND, prefixes=shared.prefixes), shared, memory)
    pool.workers[:] = [worker_class(pool)]
    pool.supervisor.revision.note_card(ModelCard(None, "fake", 64, (), {}, False))
    pool.admission.prompts = PromptMaker(Letters(), 64)
    pool.supervisor.revision.note_opened()
    pool.supervisor.became_ready.set()
    return pool


def greedy(name, max_tokens=40, text="hello", **changes):
    return asked(name, messages=(Message("user", text),), sampling=SamplingParams(temperature=0.0),
                   max_tokens=max_tokens, **changes)


def work_of(job):
    """What a worker's engine gets for a job, through the messages that cross the pipe."""
    from chatlm.worker.inbox import Inbox
    works = []
    inbox = Inbox(SimpleNamespace(add=works.append))
    for message in job.messages(None):
        inbox.obey(message)
    return works[0]


async def all_ready(pool):
    while any(worker.state != "ready" for worker in pool.workers):      # wait_ready returns when one is ready
        await asyncio.sleep(0.02)


async def collect(pool, request, on_piece=lambda piece, count: None):
    """(text, tokens, Finished) of one answer; on_piece gets each piece and the number of tokens so far."""
    text, tokens, last = "", [], None
    async for last in pool.answer(request):
        if isinstance(last, Piece):
            text, tokens = text + last.text, [*tokens, *last.tokens]
            on_piece(last, len(tokens))
    assert isinstance(last, Finished) and last.usage.completion_tokens == len(tokens)
    return text, tokens, last


async def idle(pool):
    """Assert that nothing runs, and that after one more answer of each worker no page is in use."""
    await all_ready(pool)
    assert not pool.dispatcher.jobs and not len(pool.dispatcher.pending)
    probes = [asked(f"probe {worker.gpu}", prompts=((1, 2, 3),), max_tokens=1, ignore_eos=True) for worker in pool.workers]
    ends = await asyncio.gather(*(collect(pool, probe) for probe in probes))
    assert {done.gpu for _, _, done in ends} == {worker.gpu for worker in pool.workers}
    for worker in pool.workers:
        assert worker.gauges["running"] == worker.gauges["queued"] == worker.gauges["kv_pages_used"] == 0
