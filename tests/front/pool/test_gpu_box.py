"""A box of GPUs of which some cannot be used: each says why in one line, and the others serve."""

import asyncio
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

import gpu_box_worker
from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError, EngineFailure
from chatlm.common.messages.protocol import ModelCard, WorkerConfig
from chatlm.common.messages.requests import ModelSource
from chatlm.front.pool import local_devices
from chatlm.front.pool.pool import make_pool
from chatlm.worker.memory_plan import MemoryPlan
from chatlm.worker.device import check_gpu, lack_of_gpu_memory
from chatlm.worker.device_use import DeviceUse
from forked import GPU_BOX
from patching import patch
from pools import collect, greedy, tiny_settings

BAD = {"busy": "cuda:{} cannot be used: CUDA error: all CUDA-capable devices are busy or unavailable",
       "lost": "cuda:{} cannot be used: CUDA error: unknown error", "missing": "cuda:{} is missing: the driver shows {} GPU(s)",
       "old": "cuda:{0} (GPU of cuda:{0}) is too old: its compute capability is 6.1, this torch needs 7.5"}


@pytest.fixture
def box(monkeypatch):
    """A function that fakes a box: a word for each GPU; `missing` ones are at the end."""
    def fake(*words):
        there = [word for word in words if word != "missing"]
        monkeypatch.setenv("GPU_BOX", json.dumps(there))
        patch(monkeypatch, local_devices, "cuda_device_count", lambda: len(words))
        monkeypatch.setattr(torch, "zeros", torch.zeros)        # fake_cuda replaces it
        monkeypatch.setattr(torch, "cuda", gpu_box_worker.fake_cuda(there))
        return [BAD[word].format(gpu, len(there)) if word in BAD else "" for gpu, word in enumerate(words)]
    return fake


async def until(condition):
    while not condition():
        await asyncio.sleep(0.02)


@pytest.mark.timeout(120)
async def test_unusable_gpus_say_so_and_others_serve(start_pool, box):
    problems = box("busy", "fine", "old", "missing")
    pool = await start_pool(GPU_BOX, wait=False, num_gpus="4")
    await pool.wait_ready()
    await until(lambda: sum(worker.state == "left out" for worker in pool.workers) == 3)
    stats = pool.stats()["workers"]
    assert [(worker["state"], worker["problem"]) for worker in stats] == [
        ("ready" if not problem else "left out", problem) for problem in problems]
    text, _, done = await collect(pool, greedy("one"))
    assert text and done.gpu == 1
    lines = pool.describe()
    assert [f"worker {gpu} (cuda:{gpu}) is left out: {problem}" for gpu, problem in enumerate(problems) if problem] == [
        line for line in lines if "left out" in line]
    assert stats[1]["utilization"] is None and stats[1]["batch_fill"] == 0 and "KV cache" in stats[1]["place"]
    assert pool.health()[0] == 200
    await until(lambda: not any(worker.process and psutil.pid_exists(worker.process.pid) for worker in pool.workers if worker.gpu != 1))


@pytest.mark.timeout(120)
async def test_a_box_without_a_usable_gpu_does_not_start(start_pool, box):
    """It says why."""
    problems = box("busy", "old")
    pool = await start_pool(GPU_BOX, wait=False, num_gpus="auto")
    with pytest.raises(ConfigError) as error:
        await pool.wait_ready()
    assert str(error.value) in problems


@pytest.mark.timeout(120)
async def test_a_prefill_without_gpu_memory_fails_alone(start_pool, box, capfd):
    """The flag is told."""
    box("fine")
    pool = await start_pool(GPU_BOX, kv_cache_memory=None)
    began = asyncio.Event()
    long = asyncio.create_task(collect(pool, greedy("long", 200, ignore_eos=True), lambda piece, count: began.set()))
    await began.wait()
    with pytest.raises(EngineFailure):
        await collect(pool, greedy("large"))
    _, tokens, _ = await long
    assert len(tokens) == 200 and pool.workers[0].restarts == 0
    # 8 GiB are lacking, and 1 % more: 0.90 - 0.1 - 0.01
    assert "needed; of its 85.90 GB 1.07 are free. --gpu-memory-utilization 0.79 would leave it free" in "".join(capfd.readouterr())


@pytest.mark.parametrize("words, why, visible, told", [
    ([], RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nUpdate it"), None,
     "cannot use cuda:1: The NVIDIA driver on your system is too old (found version 11040). Install"),
    ([], AssertionError("Torch not compiled with CUDA enabled"), None, "cannot use cuda:1: Torch not compiled with CUDA enabled. Install"),
    ([], RuntimeError("No CUDA GPUs are available"), "GPU-x", "cannot use cuda:1, with CUDA_VISIBLE_DEVICES=GPU-x: No CUDA GPUs are available. Install"),
    (["fine"], None, "MIG-a,MIG-b", "cuda:1 is missing: the driver shows 1 GPU(s), with CUDA_VISIBLE_DEVICES=MIG-a,MIG-b")])
def test_what_hides_a_gpu_is_named(box, monkeypatch, words, why, visible, told):
    box(*words)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible) if visible else monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def init():
        raise why
    torch.cuda.init, torch.cuda.is_available = init, lambda: bool(words)
    with pytest.raises(ConfigError) as error:
        check_gpu(torch.device("cuda:1"))
    assert told in str(error.value) and "\n" not in str(error.value)


def config(**changes):
    return WorkerConfig(Settings(**changes), ModelSource("gguf", Path("m.gguf"), "m", ""), "cuda:0", 1)


@pytest.mark.parametrize("changes, remedy", [
    ({}, "--gpu-memory-utilization 0.79 would"), ({"gpu_memory_utilization": 0.5}, "--gpu-memory-utilization 0.39 would"),
    ({"gpu_memory_utilization": 0.1}, "a larger GPU"), ({"kv_cache_memory": 20 << 30}, "--kv-cache-memory 11468M would"),
    ({"kv_cache_memory": 1 << 30}, "a larger GPU")])
def test_the_advice_names_a_flag_and_a_fitting_value(box, changes, remedy):
    """The flag is the one in force."""
    box("fine")
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has ...")
    assert remedy in str(lack_of_gpu_memory(error, config(**changes)))
    assert lack_of_gpu_memory(MemoryError("out of memory"), config()) is None


@pytest.mark.parametrize("changes, needed", [
    ({"gpu_memory_utilization": 0.3}, r"--gpu-memory-utilization 0\.99$"), ({"kv_cache_memory": 1}, r"--kv-cache-memory 1M$")])
def test_too_small_a_kv_cache_names_what_is_enough(box, nanochat_fixtures, changes, needed):
    box("fine")
    settings = tiny_settings(nanochat_fixtures, **{"kv_cache_memory": None} | changes)
    plan = MemoryPlan(settings, torch.device("cuda:0"), weights=0, activations=0, page_bytes=1 << 14, full=40, fewest=10)
    with pytest.raises(ConfigError, match=needed):
        plan.pages()


def test_one_of_several_gpus_is_told(box):
    """It is not where the number was given."""
    box("fine", "fine", "fine")
    for changes, told in (({}, True), ({"num_gpus": "1"}, False), ({"num_gpus": "auto"}, False), ({"device_type": "cpu"}, False)):
        pool = make_pool(Settings(**changes))
        pool.supervisor.revision.note_card(ModelCard(None, "m", 64, (), {}, False))
        pool.placement.source, pool.admission.prompts = config().source, SimpleNamespace(tokenizer=None)
        pool.settings = replace(pool.settings, command="chat")
        assert any(line == "One of 3 GPUs is used; --num-gpus auto uses all" for line in pool.describe()) is told


def test_utilization_is_the_driver_s(box, monkeypatch):
    """It goes by the GPU's own id; without the driver's library there is none."""
    box("fine", "fine")
    shares = {"GPU-uuid-0": 25, "GPU-uuid-1": 100}
    nvml = SimpleNamespace(nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
                           nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=shares[handle]))
    first, second = (torch.device(f"cuda:{gpu}") for gpu in (0, 1))
    for module, found in ((nvml, (0.25, 1.0)), (None, (None, None)), (SimpleNamespace(), (None, None))):
        monkeypatch.setitem(sys.modules, "pynvml", module)
        assert [DeviceUse(device).gauges() for device in (first, second)] == [
            {"memory_used": 79 << 30, "memory_total": 80 << 30, "utilization": share} for share in found]
    use = DeviceUse(torch.device("cpu"), (os.getpid(),)).gauges()
    assert 0 < use["memory_used"] < use["memory_total"] and use["utilization"] is None
