"""Pools of real workers, for tests that look inside."""

import asyncio
import sys
from pathlib import Path

from types import SimpleNamespace

import chat_server
from chat_server import Finished, Piece, Request

DYING = (sys.executable, str(Path(__file__).with_name("dying_worker.py")))      # walks its KV cache after every step


def work_of(job):
    """What a worker's engine is given for a job, through the messages that cross the pipe."""
    works = []
    inbox = chat_server.Inbox(SimpleNamespace(add=works.append))
    for message in job.messages(None):
        inbox.obey(message)
    return works[0]


async def all_ready(pool):
    while any(worker.state != "ready" for worker in pool.workers):      # wait_ready is content with one
        await asyncio.sleep(0.02)


async def collect(pool, request, on_piece=lambda piece, count: None):
    """(text, tokens, Finished) of one answer; on_piece is told each piece and how many tokens there are with it."""
    text, tokens, last = "", [], None
    async for last in pool.answer(request):
        if isinstance(last, Piece):
            text, tokens = text + last.text, [*tokens, *last.tokens]
            on_piece(last, len(tokens))
    assert isinstance(last, Finished) and last.completion_tokens == len(tokens)
    return text, tokens, last


async def idle(pool):
    """Nothing runs anywhere, and after one more answer of each worker no page is held."""
    await all_ready(pool)
    assert not pool.jobs and not len(pool.pending)
    probes = [Request(f"probe {worker.gpu}", prompts=((1, 2, 3),), max_tokens=1, ignore_eos=True) for worker in pool.workers]
    ends = await asyncio.gather(*(collect(pool, probe) for probe in probes))
    assert {done.gpu for _, _, done in ends} == {worker.gpu for worker in pool.workers}
    for worker in pool.workers:
        assert worker.gauges["running"] == worker.gauges["queued"] == worker.gauges["kv_pages_used"] == 0
