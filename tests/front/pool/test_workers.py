"""Processes, pipes, supervision. Real worker processes with a tiny real nanochat model."""

import argparse
import asyncio
import errno
import json
import os
import re
import sys

import psutil
import pytest

import patching
from chatlm.common import core
from chatlm.common.config import Settings, size
from chatlm.common.errors import ChatServerError, ConfigError, EngineFailure, Overloaded, RequestError, lack_of_memory
from chatlm.common.memory import cgroup_memory
from chatlm.common.messages.protocol import NO_GAUGES
from chatlm.common.messages.requests import Accepted, Finished, Message, Piece, SamplingParams
from chatlm.common.processes.start import cpu_quota, physical_cores, threads_per_worker
from chatlm.common.text import load
from chatlm.front.admission import prompts
from chatlm.front.pool import local_devices
from chatlm.front.pool.catalogue import Catalogue
from chatlm.front.pool.local_devices import choose_devices
from chatlm.front.pool.pool import make_pool
from chatlm.front.pool.worker import Worker
from answers import asked
from pools import collect, greedy, idle, played_pool, tiny_settings
from tiny_gguf import LLAMA_NUMBERS, gguf_bytes, random_llama, small_gguf_metadata

pytestmark = pytest.mark.timeout(120)


async def test_an_answer_of_a_worker_equals_upstreams(start_pool, nanochat_fixtures):
    oracle = json.loads((nanochat_fixtures / "gen5/oracle.json").read_text())["cases"][0]
    pool = await start_pool()
    request = asked("a", messages=tuple(Message(**m) for m in oracle["messages"]), ignore_eos=True,
                      sampling=SamplingParams(temperature=0.0), max_tokens=len(oracle["greedy"]))
    events = [event async for event in pool.answer(request)]
    assert isinstance(events[0], Accepted) and events[0].prompt_tokens == len(oracle["prompt_ids"])
    assert [t for event in events if isinstance(event, Piece) for t in event.tokens] == oracle["greedy"]
    assert events[-1].reason == "length" and events[-1].stop_reason == "max_tokens"
    await idle(pool)


async def test_many_answers_at_once_equal_those_alone(start_pool):
    pool = await start_pool()
    names = [f"question {i}" for i in range(12)]
    alone = [await collect(pool, greedy(name, text=name)) for name in names]
    together = await asyncio.gather(*(collect(pool, greedy(name, text=name)) for name in names))
    assert [a[1] for a in alone] == [t[1] for t in together]
    await idle(pool)


async def test_a_reader_who_leaves_frees_everything(start_pool):
    pool = await start_pool(max_batch=2)
    for pieces_before_leaving in (0, 1, 5):
        streams = [pool.answer(greedy(f"r{i}", max_tokens=400, ignore_eos=True)) for i in range(5)]
        for stream in streams:
            assert isinstance(await anext(stream), Accepted)
        for _ in range(pieces_before_leaving):
            await anext(streams[0])
        for stream in streams:          # two are in the batch, three are queued
            await stream.aclose()
        await idle(pool)
        assert (await collect(pool, greedy("after")))[2].usage.completion_tokens > 0


async def test_an_idle_model_unloads_and_comes_back(start_pool):
    """It comes back for the next request."""
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


async def test_an_operator_unloads_the_only_model(start_pool):
    """It ends its answers first, and a request brings it back."""
    pool = await start_pool()
    model, (worker,) = Catalogue(pool.settings, pool).registry.models[0], pool.workers
    before = await collect(pool, greedy("a"))
    model.unload()
    assert model.state == "unloaded" and worker.state == "unloaded"
    stream = pool.answer(greedy("b"))
    events = [await anext(stream)]
    while worker.state != "ready":
        await asyncio.sleep(0.02)
    model.unload(), model.unload()      # while it answers, or just before
    events += [event async for event in stream]
    assert isinstance(events[-1], Finished) and not pool.dispatcher.jobs
    while model.state != "unloaded" or pool.dispatcher.held:
        await asyncio.sleep(0.02)
    assert (await collect(pool, greedy("c")))[:2] == before[:2] and worker.restarts == 0


async def test_a_running_answer_keeps_the_model_loaded(start_pool):
    pool = await start_pool(idle_unload=0.01)
    stream = pool.answer(greedy("a", max_tokens=400, ignore_eos=True))
    await anext(stream)
    pool.dispatcher.use.last_s = 0.0
    pool.memory.unload_when_idle()
    assert pool.workers[0].state == "ready" and not pool.supervisor.asleep
    await stream.aclose()


async def test_a_full_queue_says_when_to_come_back(start_pool):
    """It refuses the request."""
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


async def test_draining_refuses_newcomers(start_pool):
    """It finishes what runs."""
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


async def test_closing_the_pool_ends_streams_with_an_error(start_pool):
    """It fakes no finish."""
    pool = await start_pool()
    stream = pool.answer(greedy("a", max_tokens=400, ignore_eos=True))
    await anext(stream), await anext(stream)
    await pool.close()
    with pytest.raises(Overloaded, match="shutting down") as ended:
        async for event in stream:
            assert isinstance(event, Piece)
    assert (ended.value.status, ended.value.retry_after_s) == (503, 10)


async def test_a_prompt_beyond_the_context_is_refused(start_pool):
    """The error has both numbers."""
    pool = await start_pool(context_length=64)
    with pytest.raises(RequestError, match=r"maximum context length is 64 tokens. However, your prompt resulted in \d+ tokens") as refused:
        await collect(pool, asked("a", prompts=(tuple([5] * 64),)))
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")
    _, tokens, last = await collect(pool, asked("b", prompts=(tuple([5] * 60),), ignore_eos=True))
    assert len(tokens) == 4 and last.reason == "length"


async def test_unknown_token_ids_are_refused(start_pool):
    """The model does not have them."""
    pool = await start_pool()
    for wrong, name in ((dict(prompts=((5, 100_000),)), "prompt"), (dict(prompts=((5, -1),)), "prompt"),
                        (dict(prompts=((5,),), stop_token_ids=(284,)), "stop_token_ids"),
                        (dict(prompts=((5,),), sampling=SamplingParams(logit_bias=((3, 1.0), (999, 1.0)))), "logit_bias")):
        with pytest.raises(RequestError, match="this model's ids are 0 to 283") as refused:
            await collect(pool, asked("a", **wrong))
        assert refused.value.param == name


def test_what_a_worker_s_processes_found_broken_is_added_up():
    """A worker that was killed may have found something; the next one begins at 0."""
    worker = played_pool().workers[0]
    for found in (2, 0, 1):
        worker.gauges = NO_GAUGES | {"broken_pages": found, "integrity_checks": 10, "kept_pages": 5}
        worker.forget_process()
    assert worker.stats()["broken_pages"] == 3 and worker.stats()["integrity_checks"] == 30 and worker.stats()["kept_pages"] == 0
    worker.gauges = NO_GAUGES | {"broken_pages": 4, "integrity_checks": 1}
    assert worker.stats()["broken_pages"] == 7 and worker.stats()["integrity_checks"] == 31


async def test_two_requests_with_one_id_are_refused(start_pool):
    pool = await start_pool()
    first = pool.answer(greedy("same", max_tokens=400, ignore_eos=True))
    await anext(first)
    with pytest.raises(RequestError) as refused:
        await anext(pool.answer(greedy("same")))
    assert refused.value.status == 409
    await first.aclose()


async def test_replicas_share_the_load(start_pool):
    """Conversations stay where their prefix is."""
    pool = await start_pool(num_workers=2)
    both = [pool.answer(greedy(f"r{i}", max_tokens=400, ignore_eos=True)) for i in range(2)]
    for stream in both:
        await anext(stream)
    assert [len(worker.jobs) for worker in pool.workers] == [1, 1]
    for stream in both:
        await stream.aclose()
    prompt = tuple(range(100, 240))
    last = [(await collect(pool, asked(f"c{i}", prompts=(prompt,), max_tokens=2, ignore_eos=True)))[2] for i in range(4)]
    assert len({finished.gpu for finished in last}) == 1
    assert [finished.usage.cached_tokens for finished in last] == [0, 128, 128, 128]


async def test_a_worker_that_cannot_start_is_reported(nanochat_fixtures):
    """It is not retried for ever."""
    pool = make_pool(tiny_settings(nanochat_fixtures), worker_command=(sys.executable, "-c", "raise SystemExit(3)"))
    await pool.start()
    with pytest.raises(EngineFailure, match="exit status 3"):
        await pool.wait_ready()
    await pool.close()


async def test_a_worker_s_broken_checkpoint_is_refused(nanochat_fixtures, tmp_path):
    """It is a config error."""
    import shutil
    shutil.copytree(nanochat_fixtures / "gen5", tmp_path / "base")
    model = next((tmp_path / "base").glob("*/d4/model_*.pt"))
    model.write_bytes(model.read_bytes()[:1000])
    pool = make_pool(Settings(model=str(tmp_path / "base")))
    await pool.start()
    with pytest.raises(ConfigError, match=model.name):
        await pool.wait_ready()
    await pool.close()


# how start-up ends


async def outcome_of_start(pool):
    """What wait_ready raises; None when the pool becomes ready."""
    try:
        await pool.start()
        await pool.wait_ready()
    except ChatServerError as error:
        return error
    finally:
        await pool.close()


@pytest.mark.parametrize("what, hi_is_taken", [("messages[0].content == 'hello'", True), ("true", False)])
async def test_a_template_may_refuse_the_trial_message(tmp_path, caplog, what, hi_is_taken):
    """It stops nothing."""
    template = "{% if " + what + " %}{{ raise_exception('not this') }}{% endif %}{{ messages[0].content }}"
    metadata = {**LLAMA_NUMBERS, **small_gguf_metadata("gpt-2"), "tokenizer.chat_template": template}
    (tmp_path / "tiny.gguf").write_bytes(gguf_bytes(metadata, random_llama()))
    pool = make_pool(Settings(model=str(tmp_path / "tiny.gguf"), kv_cache_memory=8 << 20))
    await pool.start()
    try:
        await pool.wait_ready()
        assert pool.health()[0] == 200
        (line,) = [record.getMessage() for record in caplog.records if "not this" in record.getMessage()]
        assert line.startswith("chats may be refused, as the message \"hello\" was: the model's chat template")
        raw = asked("a", prompts=("12",), max_tokens=2, ignore_eos=True)
        assert (await collect(pool, raw))[2].usage.completion_tokens == 2
        if hi_is_taken:
            assert (await collect(pool, greedy("b", 2, "hi", ignore_eos=True)))[2].usage.completion_tokens == 2
        else:
            with pytest.raises(RequestError, match="not this"):
                await collect(pool, greedy("b", 2, "hi"))
    finally:
        await pool.close()


@pytest.mark.parametrize("template, words", [
    ("{% for %}", "does not parse: line 1"), ("{{ messages | nonsense }}", "does not parse"),
    ("{% for a in b %}" * 25 + "{% endfor %}" * 25, "cannot be compiled: SyntaxError"),
    ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "")])
async def test_an_uncompilable_template_ends_start_up(tmp_path, template, words):
    metadata, path = {**LLAMA_NUMBERS, **small_gguf_metadata("gpt-2")}, tmp_path / "tiny.gguf"
    path.write_bytes(gguf_bytes(metadata | {"tokenizer.chat_template": template}, random_llama()))
    error = await outcome_of_start(make_pool(Settings(model=str(path), kv_cache_memory=8 << 20)))
    assert isinstance(error, ConfigError)
    assert str(error).startswith(f"{path}: the model's chat template {words}")


async def test_a_tokenizer_bad_in_the_front_ends_start_up(nanochat_fixtures, monkeypatch, caplog):
    """It opens in the worker."""
    patching.patch(monkeypatch, load, "open_tokenizer", lambda text: {}["nothing"])
    error = await outcome_of_start(make_pool(tiny_settings(nanochat_fixtures)))
    assert isinstance(error, EngineFailure) and str(error) == "opening the tokenizer failed: 'nothing'"
    (record,) = [record for record in caplog.records if "opening the tokenizer failed" in record.getMessage()]
    assert record.exc_info


@pytest.mark.parametrize("command, words", [
    (("/nowhere/python",), "running worker 0 failed: .*No such file.*/nowhere/python"),
    ((sys.executable, "-c", "import os; os.abort()"), r"it ended 2 times, .*killed by SIGABRT; [\d,]+ MiB"),
    ((sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"), "killed by SIGKILL, as the system does")])
async def test_a_worker_that_cannot_run_ends_start_up(nanochat_fixtures, command, words):
    """It says why."""
    error = await outcome_of_start(make_pool(tiny_settings(nanochat_fixtures), worker_command=command))
    assert isinstance(error, EngineFailure) and re.search(words, str(error))


@pytest.mark.slow
async def test_a_fault_in_the_watch_is_logged(start_pool, monkeypatch, caplog):
    """The watch goes on."""
    pool = await start_pool()
    (worker,) = pool.workers
    pid, faults, original = worker.process.pid, iter([ZeroDivisionError("a fault")]), worker.check_health

    def check_health():
        for fault in faults:
            raise fault
        original()

    monkeypatch.setattr(worker, "check_health", check_health)
    while "a fault" not in caplog.text:
        await asyncio.sleep(0.02)
    monkeypatch.setattr(Worker, "hung", property(lambda worker: worker.process.pid == pid))
    while worker.state != "ready" or worker.process.pid == pid:     # it was found, killed and replaced
        await asyncio.sleep(0.02)
    assert "watching the workers failed: a fault" in caplog.text and (await collect(pool, greedy("a")))[1]


async def test_a_fault_of_the_front_ends_a_worker(start_pool, monkeypatch, caplog):
    """The next one serves."""
    pool = await start_pool()
    (worker,) = pool.workers
    pid = worker.process.pid
    with monkeypatch.context() as patch:
        patch.setattr(pool.dispatcher, "deliver", lambda worker, pieces: {}["nothing"])
        while "running worker 0 failed: 'nothing'" not in caplog.text:
            await asyncio.sleep(0.02)
    while worker.state != "ready":
        await asyncio.sleep(0.02)
    assert not psutil.pid_exists(pid) and (await collect(pool, greedy("a")))[1]


def test_memory_left_is_the_narrowest_cgroup_s(tmp_path):
    assert cgroup_memory(tmp_path) == float("inf")
    for name, text in (("memory.max", "max"), ("memory.current", "5"), ("memory.stat", "anon 3\n")):
        (tmp_path / name).write_text(text + "\n")
    assert cgroup_memory(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 600\nfile 300\nshmem 50\ninactive_file 150\nactive_file 100")
    assert cgroup_memory(tmp_path) == 350
    old = tmp_path / "v1"
    old.mkdir()
    for name, text in (("limit", "2000"), ("usage", "1500")):
        (old / f"memory.{name}_in_bytes").write_text(text)
    (old / "memory.stat").write_text("active_file 2\ntotal_inactive_file 30\ntotal_active_file 40\n")
    assert cgroup_memory(old) == 570


@pytest.mark.parametrize("error", [
    MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory"), RuntimeError("std::bad_alloc"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.\nmore"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    RuntimeError("can't start new thread"), RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")])
def test_no_memory_is_one_line_with_advice(error):
    """It is, whoever says it."""
    text = str(lack_of_memory(error))
    assert text.startswith("not enough memory (") and "ulimit -v" in text and text.isprintable()


@pytest.mark.parametrize("error", [
    ValueError("x"), OSError(errno.ENOENT, "No such file"), ConfigError("out of memory")])
def test_other_errors_are_not_lack_of_memory(error):
    assert lack_of_memory(error) is None


async def test_a_failed_step_fails_its_requests(start_pool, monkeypatch):
    """The worker goes on."""
    pool = await start_pool()
    patching.patch(monkeypatch, prompts, "checked_ids", lambda ids, *request: tuple(ids))
    with pytest.raises(EngineFailure, match="failed while computing"):      # an id outside the vocabulary
        await collect(pool, asked("bad", prompts=((10**9,),), max_tokens=5))
    pid = pool.workers[0].process.pid
    assert (await collect(pool, greedy("good")))[2].usage.completion_tokens > 0
    assert pool.workers[0].process.pid == pid
    await idle(pool)


def test_threads_follow_cores_affinity_and_quota(tmp_path):
    """The cores are physical ones."""
    for cpu, siblings in enumerate(("0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7")):
        folder = tmp_path / f"cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    assert physical_cores(range(8), tmp_path) == 4
    assert physical_cores((0, 4), tmp_path) == 1
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert cpu_quota(tmp_path) == 2.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path) == float("inf")
    assert 1 <= threads_per_worker(1) <= os.cpu_count()
    assert threads_per_worker(1000) == 1


@pytest.fixture
def torch_there(monkeypatch):
    patching.patch(monkeypatch, core, "torch_installed", lambda: True)


@pytest.mark.parametrize("changes, message", [
    ({"num_gpus": "2"}, "--num-gpus 2, but no CUDA device .* --num-workers 2$"), ({"num_gpus": "many"}, "--num-gpus many"),
    ({"num_gpus": "0"}, "--num-gpus 0"), ({"num_gpus": "\u00b2"}, "--num-gpus \u00b2"),
    ({"num_gpus": "9" * 5000}, "--num-gpus 9"), ({"device_type": "cuda"}, "no CUDA device"),
])
def test_more_gpus_than_there_are_is_refused(changes, message, monkeypatch, torch_there):
    """It is a config error."""
    patching.patch(monkeypatch, local_devices, "cuda_device_count", lambda: 0)
    with pytest.raises(ConfigError, match=message):
        choose_devices(Settings(**changes))


@pytest.mark.parametrize("visible, count", [
    (None, 8), ("", 0), ("-1", 0), ("0,1", 2), (" 0 , 1", 2), ("0,9", 1), ("9", 0), ("0,-1,2", 1), ("0,,1", 1), ("GPU-5,GPU-6,GPU-7", 3), ("MIG-5", 1)])
def test_the_variable_tells_of_hidden_gpus(visible, count, monkeypatch, torch_there):
    """As the driver reads it: what follows an entry that is not there does not count."""
    patching.patch(monkeypatch, local_devices, "device_files", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local_devices.cuda_device_count() == count
    said = "this machine has 8 CUDA" if visible is None else f"CUDA_VISIBLE_DEVICES={visible} shows {count} of 8 GPU"
    with pytest.raises(ConfigError, match=f"--num-gpus 9, but {said}"):
        choose_devices(Settings(num_gpus="9"))
    if not count:
        with pytest.raises(ConfigError, match=f"--device-type cuda, but {said}"):
            choose_devices(Settings(device_type="cuda"))


def test_gpu_replicas_are_counted_without_torch(monkeypatch, torch_there):
    """It is not imported."""
    patching.patch(monkeypatch, local_devices, "cuda_device_count", lambda: 8)
    assert choose_devices(Settings(num_gpus="auto")) == [f"cuda:{gpu}" for gpu in range(8)]
    assert choose_devices(Settings(num_gpus="3")) == ["cuda:0", "cuda:1", "cuda:2"]
    assert choose_devices(Settings(device_type="cpu", num_workers=2)) == ["cpu", "cpu"]
    with pytest.raises(ConfigError, match="has 8 CUDA.*; at most --num-gpus 8$"):
        choose_devices(Settings(num_gpus="9"))


@pytest.mark.parametrize("changes", [{"num_gpus": "2"}, {"device_type": "cuda"}])
def test_without_torch_the_cpu_computes(changes, monkeypatch):
    """A wanted GPU is an error that says how to install it."""
    patching.patch(monkeypatch, core, "torch_installed", lambda: False)
    patching.patch(monkeypatch, core, "device_files", lambda: 8)
    assert choose_devices(Settings()) == choose_devices(Settings(num_gpus="auto")) == ["cpu"]
    with pytest.raises(ConfigError, match="but GPUs need the Python package torch; install with: .* -m pip install torch; "):
        choose_devices(Settings(**changes))


@pytest.mark.parametrize("there, devices", [(True, ["mps"]), (False, ["cpu"])])
def test_on_a_mac_installed_torch_computes(there, devices, monkeypatch):
    """On a mac torch computes where it is installed."""
    patching.patch(monkeypatch, core, "torch_installed", lambda: there)
    patching.patch(monkeypatch, core, "device_files", lambda: 0)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert choose_devices(Settings()) == devices


def test_sizes_have_suffixes():
    """Nonsense is refused."""
    assert [size(text) for text in ("65536", "512M", "1.5G", "2gib")] == [65536, 512 << 20, 3 << 29, 2 << 30]
    for text in ("", "lots", "-1G", "1X", "9" * 400, "8388608T"):
        with pytest.raises(argparse.ArgumentTypeError):
            size(text)
