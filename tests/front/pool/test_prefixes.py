"""Prefixes outlive workers, in memory, and servers, in a store: pools of real workers."""

import asyncio
import json
import os
import random
import re
import signal
import urllib.request

import pytest

from chatlm.common.config import ApiKey, ModelEntry, Settings, store_place
from chatlm.common.errors import ConfigError
from chatlm.common.messages.requests import Message, SamplingParams
from chatlm.common.segments import check_folder, segment_paths
from chatlm.front.pool.opener import Opener
from chatlm.front.pool.residency import Residency
from chatlm.front.pool.prefixes import STAGING_BYTES, Prefixes, memory_for
from chatlm.front.pool.worker import WorkerState
from answers import asked
from fake_pool import serving
import families
from nightly import by_day
from pools import all_ready, collect, idle
from real_server import ask, get, post, server
from run_here import run_forked

TEXT = "The sea rises and falls twice a day, and nobody who lives beside it forgets that. " * 6


def work(name, **changes):
    return asked(name, messages=(Message("user", TEXT),), sampling=SamplingParams(temperature=0.0), max_tokens=8, **changes)


async def answer(pool, name, **changes):
    text, _, done = await collect(pool, work(name, **changes))
    return text, done.usage.cached_tokens


async def test_a_prefix_outlives_its_worker(start_pool):
    """It outlives unloading too."""
    pool = await start_pool(verbose=True)
    text, before = await answer(pool, "first")
    assert before == 0
    pool.supervisor.unload()
    again, cached = await answer(pool, "after unloading")
    assert again == text and cached > 200
    pool.workers[0].kill()
    while pool.workers[0].state is WorkerState.READY:
        await asyncio.sleep(0.01)
    again, cached = await answer(pool, "after its death")
    await idle(pool)
    assert again == text and cached > 200 and pool.workers[0].gauges["restored_tokens"] == cached
    assert pool.stats()["prefixes"]["memory_bytes"] > 0 and any("outlive" in line for line in pool.describe())


async def test_a_replica_reads_what_a_dead_one_kept(start_pool):
    pool = await start_pool(num_workers=2)
    text, _ = await answer(pool, "first")
    [worker] = [worker for worker in pool.workers if worker.prefixes]
    other = pool.workers[1 - pool.workers.index(worker)]
    worker.kill()
    while worker.state is WorkerState.READY:
        await asyncio.sleep(0.01)
    again, cached = await answer(pool, "elsewhere")
    await idle(pool)
    assert again == text and cached > 200 and other.gauges["restored_tokens"] == cached


async def test_a_second_model_drafts_after_a_restore(start_pool, tmp_path, nanochat_fixtures, monkeypatch):
    """It has no pages of the prompt, and computes it."""
    monkeypatch.setenv("STRUCK", str(tmp_path))
    (tmp_path / "draft-always").touch()
    pool = await start_pool(prefix_store=str(tmp_path / "store"), prefix_memory=0, drafts="none")
    text, _ = await answer(pool, "first")
    await pool.close()
    cached = 0
    for _ in range(5):      # a prompt does not wait for what a busy machine reads late
        if not cached:
            pool = await start_pool(prefix_store=str(tmp_path / "store"), draft_model=str(nanochat_fixtures / "gen5"), drafts="model", draft_memory=0)
            again, cached = await answer(pool, "again")
            await idle(pool)
            assert again == text and pool.workers[0].gauges["accepted_model"] > 0
            await pool.close()
    assert cached > 200


@pytest.mark.slow
async def test_a_server_restores_its_predecessor_s_store(start_pool, tmp_path):
    """The same owner alone has it."""
    pool = await start_pool(prefix_store=str(tmp_path / "store"), prefix_memory=0)
    text, _ = await answer(pool, "first", owner="alice")
    await pool.close()
    assert oct((tmp_path / "store").stat().st_mode)[-3:] == "700" and len(segment_paths(tmp_path / "store")) == 1
    for owner, found in (("bob", False), ("alice", True), ("", False)):
        restored = []
        while not restored or found and len(restored) < 5 and not any(restored):    # a prompt does not wait for what a busy machine reads late
            pool = await start_pool(prefix_store=f"{tmp_path / 'store'}:1G")
            again, cached = await answer(pool, f"again {owner}", owner=owner)
            assert again == text
            restored.append(cached > 200)
            await pool.close()
        assert any(restored) == found


async def test_a_server_restores_before_anybody_asks(start_pool, tmp_path):
    """A prompt then finds its pages like those of a server that has never ended, whoever it is of."""
    pool = await start_pool(prefix_store=str(tmp_path / "store"), prefix_memory=0)
    text, _ = await answer(pool, "first", owner="alice")
    await pool.close()
    pool = await start_pool(prefix_store=str(tmp_path / "store"), prefix_memory=0)
    while pool.workers[0].gauges["restored_tokens"] < 200:
        await asyncio.sleep(0.2)        # a worker restores nothing right after a request
        await collect(pool, asked("probe", prompts=((1, 2, 3),), max_tokens=1))
    restored = pool.workers[0].gauges["restored_tokens"]
    assert (await answer(pool, "of bob", owner="bob")) == (text, 0)
    again, cached = await answer(pool, "of alice", owner="alice")
    await idle(pool)
    assert again == text and cached > 200 and pool.workers[0].gauges["restored_tokens"] == restored


async def test_two_servers_use_one_folder_at_once(start_pool, tmp_path):
    one, other = [await start_pool(prefix_store=str(tmp_path), prefix_memory=0) for _ in range(2)]
    await answer(other, "before", owner="else")     # it has looked into the store, which was empty
    text, _ = await answer(one, "first")
    while not one.stats()["prefixes"]["stored_pages"]:
        await asyncio.sleep(0.02)
    again, cached = await answer(other, "at the other")
    assert again == text and cached > 200


FLAGS = {"dtype": {"dtype": "bfloat16"}, "kv": {"kv_cache_dtype": "bfloat16"}, "softcap": {"softcap": 9.0}, "quantize": {"quantize": "q8_0"},
         "arithmetic": {"arithmetic": "fine"}}


@pytest.mark.parametrize("name", by_day(FLAGS, "kv"))
async def test_other_flags_restore_nothing(start_pool, tmp_path, name):
    """Answers after the restart are those of no store."""
    changes, store = FLAGS[name], {"prefix_store": str(tmp_path), "prefix_memory": 0}

    async def once(**flags):
        pool = await start_pool(**flags)
        text, cached = await answer(pool, "once")
        await pool.close()
        return text, cached > 200

    async def restored(**flags):
        for _ in range(5):      # a prompt does not wait for what a busy machine reads late
            if (found := await once(**flags))[1]:
                break
        return found

    first, other = await once(**store), await once(**changes, prefix_memory=0)
    assert not first[1] and await once(**changes, **store) == other         # computed
    assert await restored(**changes, **store) == (other[0], True) and await restored(**store) == (first[0], True)


async def asked_by(start_pool, client, keys, questions, **flags):
    """Start a server, have the holders of keys ask the same, and end it: (text, cached tokens) of each."""
    pool, found = await start_pool(keys=keys, prefix_memory=0, **flags), []
    async with serving(pool, pool.settings) as url:
        for name in questions:
            async with client.post(f"{url}/v1/chat/completions", json=long_question(), headers={"Authorization": f"Bearer {name}"}) as response:
                body = await response.json()
                found.append((body["choices"][0]["message"]["content"], body["usage"]["prompt_tokens_details"]["cached_tokens"]))
    await pool.close()
    assert len({text for text, _ in found}) == 1
    return [cached > 200 for _, cached in found]


async def test_a_key_notices_no_other_key_s_prefixes(start_pool, client, tmp_path):
    """It does not read them either."""
    keys = tuple(ApiKey.hashed(name, name) for name in ("alice", "bob"))
    store = {"prefix_store": str(tmp_path / "store")}
    assert await asked_by(start_pool, client, keys, ["alice"], **store) == [False]
    assert await asked_by(start_pool, client, keys, ["bob", "alice", "bob"], **store) == [False, True, True]
    renamed = tuple(key._replace(name=f"the new {key.name}") for key in keys[:1])
    assert await asked_by(start_pool, client, renamed, ["alice"], **store) == [True]
    shared = {"prefix_store": str(tmp_path / "shared"), "share_prefixes": True}
    assert await asked_by(start_pool, client, keys, ["alice"], **shared) == [False]
    assert await asked_by(start_pool, client, keys, ["bob"], **shared) == [True]


async def test_pages_of_another_type_are_never_restored(start_pool, tmp_path):
    (folder := tmp_path / "model").mkdir()
    families.save(families.make_model("llama3.2"), folder)
    question, texts = dict(prompts=(tuple(range(20, 250)),), messages=None, sampling=SamplingParams(temperature=0.0), max_tokens=8, ignore_eos=True), {}
    for kind, found in (("q8_0", False), ("auto", False), ("q8_0", True)):
        pool = await start_pool(model=str(folder), prefix_store=str(tmp_path / "store"), kv_cache_dtype=kind)
        text, _, done = await collect(pool, asked(kind, **question))
        assert texts.setdefault(kind, text) == text and done.usage.cached_tokens == (224 if found else 0)
        assert ("; q8_0, " in " ".join(pool.describe())) == (kind == "q8_0")
        await pool.close()


async def test_without_prefix_memory_nothing_is_kept(start_pool):
    pool = await start_pool(prefix_memory=0, verbose=True)
    await answer(pool, "first")
    pool.supervisor.unload()
    assert (await answer(pool, "after unloading"))[1] == 0 and not any("outlive" in line for line in pool.describe())


def test_settings_say_how_much_prefixes_get():
    """They say how much memory."""
    assert memory_for(Settings(prefix_memory=5 << 20)) == 5 << 20 and memory_for(Settings(command="chat")) == 0
    assert memory_for(Settings(prefix_memory=0, prefix_store="x")) == STAGING_BYTES and memory_for(Settings(ray_address="auto")) == 0
    assert 0 < memory_for(Settings()) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 10
    assert [store_place(text)[1] for text in ("a:b", "a:2G", "a:b:1G")] == [10 << 30, 2 << 30, 1 << 30]
    assert [str(store_place(text)[0]) for text in ("a:b", "a:2G", "a:b:1G")] == ["a:b", "a", "a:b"]


def test_prefixes_count_in_models_memory(nanochat_fixtures):
    """The memory of prefixes is part of models memory."""
    several = ModelEntry(str(nanochat_fixtures / "gen1")), ModelEntry(str(nanochat_fixtures / "gen5"))
    for prefix_memory, kept in ((None, 10 << 20), (30 << 20, 30 << 20), (0, 0)):
        residency = Residency(0)
        opener = Opener(Settings(several=several, models_memory=100 << 20, prefix_memory=prefix_memory, device_type="cpu"), ["none"], residency)
        assert (opener.prefixes.bytes, residency.budget) == (kept, (100 << 20) - kept)
    with pytest.raises(ConfigError, match="--prefix-memory 209,715,200 is taken from --models-memory 104,857,600"):
        Opener(Settings(several=several, models_memory=100 << 20, prefix_memory=200 << 20), ["none"], Residency(0))


@pytest.mark.parametrize("flags, why", [
    ({"tensor_parallel_size": 2, "prefix_store": "/nowhere/x"}, "--prefix-store: prefixes .* several ranks"),
    ({"device_type": "mps", "prefix_memory": 5}, "--prefix-memory: prefixes .* a GPU"), ({"ray_address": "auto", "prefix_memory": 5}, "Ray"),
    ({"tensor_parallel_size": 2}, None)])
def test_useless_prefix_flags_log_why(flags, why, caplog):
    """Nothing can outlive a worker there; nobody is told who did not ask for it."""
    assert Prefixes(Settings(**flags)).bytes == 0
    assert [bool(re.search(why or "", record.getMessage())) for record in caplog.records] == [True] * bool(why)


def test_an_untrusted_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--prefix-store .*file: it is not a folder"):
        Prefixes(Settings(prefix_store=str(tmp_path / "file")))
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert check_folder(tmp_path / "open").stat().st_mode & 0o777 == 0o700      # it was empty
    (tmp_path / "open/letter.txt").touch()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ConfigError, match="other users can write to the folder"):
        check_folder(tmp_path / "open")
    if os.geteuid() == 0:
        os.chown(tmp_path / "open", 12345, -1)
        with pytest.raises(ConfigError, match="belongs to another user"):
            check_folder(tmp_path / "open")


def long_question(number=0):
    return ask(TEXT, max_tokens=8, model="default") | {"messages": [{"role": "user", "content": f"{number} {TEXT}"}]}


def answered(url, body):
    reply = json.load(post(f"{url}/v1/chat/completions", body))
    return reply["choices"][0]["message"]["content"], reply["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_server_stores_its_prefixes_at_its_end(nanochat_fixtures, tmp_path):
    """The command store lists them."""
    flags = nanochat_fixtures / "gen5", "--dtype", "float32", "--prefix-store", f"{tmp_path}:100M", "-v"
    with server(*flags, log=(log := [])) as (process, url):
        first = [answered(url, long_question(number)) for number in range(4)]
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert re.search(r"The model fits: .* \+ prefixes \d+\.\d\d GB = ", "".join(log))
    listing = run_forked("store", tmp_path).stdout
    assert "4 segments" in listing and " tokens in " in listing and "nanochat-d4-sft" in listing
    with server(*flags) as (process, url):
        again = [answered(url, long_question(number)) for number in range(4)]
        metrics = dict(line.split() for line in get_text(f"{url}/metrics").splitlines() if line.startswith("chat_server_") and "{" not in line)
        assert [text for text, _ in again] == [text for text, _ in first] and not any(cached for _, cached in first)
        # how much of a prompt is there before it is computed depends on how busy the machine is
        assert float(metrics["chat_server_restored_tokens_total"]) >= sum(cached for _, cached in again) >= max(cached for _, cached in again) > 200
        assert {f"chat_server_{name}" for name in (
            "restored_bytes_total", "kept_pages_total", "missed_pages_total", "stored_pages_total", "stored_bytes_total", "prefill_saved_seconds_total",
            "keeping_seconds_total", "prefix_memory_bytes")} <= metrics.keys()
        assert get(f"{url}/stats")["prefixes"]["memory_limit"] > 0
    for words, status in ((["store", str(tmp_path), "--prune", "0"], 0), (["store", str(tmp_path / "none")], 2), (["store"], 2)):
        assert run_forked(*words).returncode == status
    assert segment_paths(tmp_path) == []


def get_text(url):
    return urllib.request.urlopen(url, timeout=30).read().decode()


@pytest.mark.slow
@pytest.mark.timeout(600)       # seven servers
def test_killed_servers_leave_a_right_store(default_model_path, tmp_path):
    """The default model: reading what it takes a second to compute is worth it on any disk."""
    dice, expected = random.Random(5), {}
    for kv in ("auto", "q8_0"):
        with server("--prefix-memory", "0", "--kv-cache-dtype", kv) as (_, url):
            expected |= {(kv, number): answered(url, long_question(number))[0] for number in range(6)}
    for written in (True, False, True, True, False):     # is the store waited for, or does it just begin?
        kv = dice.choice(["auto", "auto", "q8_0"])
        with server("--prefix-store", tmp_path, "--kv-cache-dtype", kv) as (process, url):
            for number in dice.sample(range(6), 3):
                assert answered(url, long_question(number))[0] == expected[kv, number]
            [worker] = get(f"{url}/stats")["workers"]
            victim = dice.choice([process.pid, worker["pid"]])
            while written and not get(f"{url}/stats")["prefixes"]["stored_pages"]:
                process.poll()
            os.kill(victim, signal.SIGKILL)
        path = dice.choice(segment_paths(tmp_path) or [None])
        if path and dice.random() < 0.4 and path.stat().st_size:       # one that was only just begun has nothing to damage
            data = bytearray(path.read_bytes())
            data[dice.randrange(len(data))] ^= 1
            path.write_bytes(data[:dice.randrange(len(data) // 2, len(data))])
    with server("--prefix-store", tmp_path) as (process, url):      # the store goes on, whatever has become of it
        _, cached = answered(url, long_question(0))
        while cached <= 100 and not get(f"{url}/stats")["prefixes"]["stored_pages"]:
            assert process.poll() is None
    with server("--prefix-store", tmp_path) as (_, url):
        text, cached = answered(url, long_question(0))
        assert text == expected["auto", 0] and cached > 100
