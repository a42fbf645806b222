"""Section 10: processes, pipes, supervision. Real worker processes with a tiny real nanochat model."""

import asyncio
import json
import os
import sys

import psutil
import pytest

import chat_server
from chat_server import (Accepted, EngineFailure, Finished, LocalPool, Message, Overloaded, Piece, Request, RequestError,
                         SamplingParams, Settings)
from pools import DYING, all_ready, collect, idle

pytestmark = pytest.mark.timeout(120)


def settings_for(nanochat_fixtures, generation="gen5", **changes):
    return Settings(model=str(nanochat_fixtures / generation), dtype="float32", **({"kv_cache_memory": 8 << 20} | changes))


@pytest.fixture
async def start_pool(nanochat_fixtures):
    """A function that starts a ready LocalPool; every pool is closed at the end, and its processes must be gone."""
    pools = []

    async def start(**changes):
        pool = LocalPool(settings_for(nanochat_fixtures, **changes), worker_command=DYING)
        pools.append(pool)
        await pool.start()
        await pool.wait_ready()
        await all_ready(pool)
        return pool

    yield start
    for pool in pools:
        pids = [worker.process.pid for worker in pool.workers if worker.process]
        await pool.close()
        assert not any(psutil.pid_exists(pid) for pid in pids)


def greedy(name, max_tokens=40, text="hello", **changes):
    return Request(name, messages=(Message("user", text),), sampling=SamplingParams(temperature=0.0),
                   max_tokens=max_tokens, **changes)


async def test_an_answer_through_a_worker_equals_upstreams(start_pool, nanochat_fixtures):
    oracle = json.loads((nanochat_fixtures / "gen5/oracle.json").read_text())["cases"][0]
    pool = await start_pool()
    request = Request("a", messages=tuple(Message(**m) for m in oracle["messages"]), ignore_eos=True,
                      sampling=SamplingParams(temperature=0.0), max_tokens=len(oracle["greedy"]))
    events = [event async for event in pool.answer(request)]
    assert isinstance(events[0], Accepted) and events[0].prompt_tokens == len(oracle["prompt_ids"])
    assert [t for event in events if isinstance(event, Piece) for t in event.tokens] == oracle["greedy"]
    assert events[-1].reason == "length" and events[-1].stop_reason == "max_tokens"
    await idle(pool)


async def test_many_answers_at_once_equal_the_same_answers_alone(start_pool):
    pool = await start_pool()
    names = [f"question {i}" for i in range(12)]
    alone = [await collect(pool, greedy(name, text=name)) for name in names]
    together = await asyncio.gather(*(collect(pool, greedy(name, text=name)) for name in names))
    assert [a[1] for a in alone] == [t[1] for t in together]
    await idle(pool)


@pytest.mark.parametrize("pieces_before_leaving", [0, 1, 5])
async def test_a_reader_who_leaves_frees_everything(start_pool, pieces_before_leaving):
    pool = await start_pool(max_batch=2)
    streams = [pool.answer(greedy(f"r{i}", max_tokens=400, ignore_eos=True)) for i in range(5)]
    for stream in streams:
        assert isinstance(await anext(stream), Accepted)
    for _ in range(pieces_before_leaving):
        await anext(streams[0])
    for stream in streams:          # two are in the batch, three are queued
        await stream.aclose()
    await idle(pool)
    assert (await collect(pool, greedy("after")))[2].completion_tokens > 0


async def test_a_killed_worker_costs_a_pause_and_not_a_word(start_pool):
    pool = await start_pool(num_workers=2)
    undisturbed = await collect(pool, greedy("a", max_tokens=120, ignore_eos=True))

    def kill(piece, count):
        if count == 7:
            pool.jobs["b"].worker.process.kill()

    assert (await collect(pool, greedy("b", max_tokens=120, ignore_eos=True), on_piece=kill))[:2] == undisturbed[:2]
    assert pool.jobs == {}


async def test_a_request_that_kills_every_worker_is_given_up(start_pool):
    pool = await start_pool()
    pool.MAX_FAILOVERS = 1
    with pytest.raises(EngineFailure, match="workers died"):
        await collect(pool, greedy("a", max_tokens=400, ignore_eos=True),
                      on_piece=lambda piece, count: pool.workers[0].process.kill())
    assert pool.jobs == {}


async def test_an_idle_model_leaves_memory_and_comes_back_for_the_next_request(start_pool):
    pool = await start_pool(idle_unload=0.01)
    (worker,) = pool.workers
    before, pid = await collect(pool, greedy("a")), worker.process.pid
    while worker.state != "unloaded" or worker.process.poll() is None:
        pool.health(), pool.stats()             # polls do not keep it loaded
        await asyncio.sleep(0.02)
    assert not psutil.pid_exists(pid) and pool.ready and pool.health()[0] == 200
    after, also = await asyncio.gather(collect(pool, greedy("b")), collect(pool, greedy("c")))
    assert after[:2] == also[:2] == before[:2]
    assert worker.restarts == 0 and worker.crashes_in_row == 0 and worker.process.pid != pid


async def test_a_running_answer_keeps_the_model_loaded(start_pool):
    pool = await start_pool(idle_unload=0.01)
    stream = pool.answer(greedy("a", max_tokens=400, ignore_eos=True))
    await anext(stream)
    pool.used_s = 0.0
    pool._unload_when_idle()
    assert pool.workers[0].state == "ready" and not pool.asleep
    await stream.aclose()


async def test_a_full_queue_refuses_and_says_when_to_come_back(start_pool):
    pool = await start_pool(max_batch=1, max_queue=1)
    running, queued = (pool.answer(greedy(name, max_tokens=400, ignore_eos=True)) for name in ("running", "queued"))
    await anext(running), await anext(running), await anext(queued)
    assert pool.stats()["queue_depth"] == 1
    with pytest.raises(Overloaded) as refused:
        await anext(pool.answer(greedy("third")))
    assert refused.value.retry_after_s > 0
    await running.aclose()
    assert isinstance(await anext(queued), Piece)
    await queued.aclose()
    await idle(pool)


async def test_draining_refuses_newcomers_and_finishes_what_runs(start_pool):
    pool = await start_pool()
    running = pool.answer(greedy("running", max_tokens=30, ignore_eos=True))
    await anext(running)
    drained = asyncio.create_task(pool.drain(60))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await anext(pool.answer(greedy("late")))
    assert pool.health()[0] == 503 and pool.health()[1]["status"] == "draining"
    events = [event async for event in running]
    assert isinstance(events[-1], Finished)
    assert await drained


async def test_closing_the_pool_ends_streams_with_an_error_and_not_a_fake_finish(start_pool):
    pool = await start_pool()
    stream = pool.answer(greedy("a", max_tokens=400, ignore_eos=True))
    await anext(stream), await anext(stream)
    await pool.close()
    with pytest.raises(EngineFailure, match="shutting down"):
        async for event in stream:
            assert isinstance(event, Piece)


async def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(start_pool):
    pool = await start_pool(context_length=64)
    with pytest.raises(RequestError, match=r"has [\d,]+ tokens and the context holds 64") as refused:
        await collect(pool, Request("a", prompts=(tuple([5] * 64),)))
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")
    _, tokens, last = await collect(pool, Request("b", prompts=(tuple([5] * 60),), ignore_eos=True))
    assert len(tokens) == 4 and last.reason == "length"


@pytest.mark.parametrize("wrong, name", [
    (dict(prompts=((5, 100_000),)), "prompt"), (dict(prompts=((5, -1),)), "prompt"),
    (dict(prompts=((5,),), stop_token_ids=(284,)), "stop_token_ids"),
    (dict(prompts=((5,),), sampling=SamplingParams(logit_bias=((3, 1.0), (999, 1.0)))), "logit_bias")])
async def test_token_ids_that_the_model_does_not_have_are_refused(start_pool, wrong, name):
    pool = await start_pool()
    with pytest.raises(RequestError, match="this model's are 0 to 283") as refused:
        await collect(pool, Request("a", **wrong))
    assert refused.value.param == name


async def test_two_requests_with_one_id_are_refused(start_pool):
    pool = await start_pool()
    first = pool.answer(greedy("same", max_tokens=400, ignore_eos=True))
    await anext(first)
    with pytest.raises(RequestError) as refused:
        await anext(pool.answer(greedy("same")))
    assert refused.value.status == 409
    await first.aclose()


async def test_replicas_share_the_load_and_conversations_stay_where_their_prefix_is(start_pool):
    pool = await start_pool(num_workers=2)
    both = [pool.answer(greedy(f"r{i}", max_tokens=400, ignore_eos=True)) for i in range(2)]
    for stream in both:
        await anext(stream)
    assert [len(worker.jobs) for worker in pool.workers] == [1, 1]
    for stream in both:
        await stream.aclose()
    prompt = tuple(range(100, 240))
    last = [(await collect(pool, Request(f"c{i}", prompts=(prompt,), max_tokens=2, ignore_eos=True)))[2] for i in range(4)]
    assert len({finished.gpu for finished in last}) == 1
    assert [finished.cached_tokens for finished in last] == [0, 128, 128, 128]


async def test_a_worker_that_cannot_start_is_reported_and_not_retried_for_ever(nanochat_fixtures):
    pool = LocalPool(settings_for(nanochat_fixtures), worker_command=(sys.executable, "-c", "raise SystemExit(3)"))
    await pool.start()
    with pytest.raises(EngineFailure, match="exit status 3"):
        await pool.wait_ready()
    await pool.close()


async def test_a_broken_checkpoint_is_a_config_error_from_the_worker(nanochat_fixtures, tmp_path):
    import shutil
    shutil.copytree(nanochat_fixtures / "gen5", tmp_path / "base")
    model = next((tmp_path / "base").glob("*/d4/model_*.pt"))
    model.write_bytes(model.read_bytes()[:1000])
    pool = LocalPool(Settings(model=str(tmp_path / "base")))
    await pool.start()
    with pytest.raises(chat_server.ConfigError, match=model.name):
        await pool.wait_ready()
    await pool.close()


async def test_a_step_that_fails_fails_its_requests_and_the_worker_goes_on(start_pool, monkeypatch):
    pool = await start_pool()
    monkeypatch.setattr(chat_server, "checked_ids", lambda *request: None)
    with pytest.raises(EngineFailure, match="failed while computing"):      # an id outside the vocabulary
        await collect(pool, Request("bad", prompts=((10**9,),), max_tokens=5))
    pid = pool.workers[0].process.pid
    assert (await collect(pool, greedy("good")))[2].completion_tokens > 0
    assert pool.workers[0].process.pid == pid
    await idle(pool)


def test_threads_follow_physical_cores_affinity_and_quota(tmp_path):
    for cpu, siblings in enumerate(("0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7")):
        folder = tmp_path / f"cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    assert chat_server.physical_cores(range(8), tmp_path) == 4
    assert chat_server.physical_cores((0, 4), tmp_path) == 1
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert chat_server.cpu_quota(tmp_path) == 2.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert chat_server.cpu_quota(tmp_path) == float("inf")
    assert 1 <= chat_server.threads_per_worker(1) <= os.cpu_count()
    assert chat_server.threads_per_worker(1000) == 1


@pytest.mark.parametrize("changes, message", [
    ({"num_gpus": "2"}, "--num-gpus 2 needs CUDA"), ({"num_gpus": "many"}, "--num-gpus many"),
    ({"num_gpus": "0"}, "--num-gpus 0"), ({"device_type": "cuda"}, "no CUDA device"),
])
def test_more_gpus_than_there_are_is_a_config_error(changes, message, monkeypatch):
    monkeypatch.setattr(chat_server, "cuda_device_count", lambda: 0)
    with pytest.raises(chat_server.ConfigError, match=message):
        chat_server.choose_devices(Settings(**changes))


def test_replicas_on_gpus_are_counted_without_torch(monkeypatch):
    monkeypatch.setattr(chat_server, "cuda_device_count", lambda: 8)
    assert chat_server.choose_devices(Settings(num_gpus="auto")) == [f"cuda:{gpu}" for gpu in range(8)]
    assert chat_server.choose_devices(Settings(num_gpus="3")) == ["cuda:0", "cuda:1", "cuda:2"]
    assert chat_server.choose_devices(Settings(device_type="cpu", num_workers=2)) == ["cpu", "cpu"]
    with pytest.raises(chat_server.ConfigError, match="has 8 CUDA"):
        chat_server.choose_devices(Settings(num_gpus="9"))


def test_sizes_are_parsed_with_suffixes_and_nonsense_is_refused():
    assert [chat_server.parse_bytes(text) for text in ("65536", "512M", "1.5G", "2gib")] == [65536, 512 << 20, 3 << 29, 2 << 30]
    for text in ("", "lots", "-1G", "1X"):
        with pytest.raises(ValueError):
            chat_server.parse_bytes(text)
