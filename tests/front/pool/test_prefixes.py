"""Prefixes outlive workers, in memory, and servers, in a store: pools of real workers."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import urllib.request

import pytest

from chatlm.common.config import ApiKey, Settings, store_place
from chatlm.common.errors import ConfigError
from chatlm.common.messages.requests import Message, SamplingParams
from chatlm.common.segments import check_folder, segment_paths
from chatlm.front.pool.prefixes import STAGING_BYTES, Prefixes, memory_for
from chatlm.front.pool.worker import State
from answers import asked
from pools import all_ready, collect, idle
from real_server import SCRIPT, ask, get, post, server

TEXT = "The sea rises and falls twice a day, and nobody who lives beside it forgets that. " * 6


def work(name, **changes):
    return asked(name, messages=(Message("user", TEXT),), sampling=SamplingParams(temperature=0.0), max_tokens=8, **changes)


async def answer(pool, name, **changes):
    text, _, done = await collect(pool, work(name, **changes))
    return text, done.usage.cached_tokens


async def test_a_prefix_outlives_unloading_and_the_death_of_its_worker(start_pool):
    pool = await start_pool()
    text, before = await answer(pool, "first")
    assert before == 0
    pool.supervisor.unload()
    again, cached = await answer(pool, "after unloading")
    assert again == text and cached > 200
    pool.workers[0].kill()
    while pool.workers[0].state is State.READY:
        await asyncio.sleep(0.01)
    again, cached = await answer(pool, "after its death")
    await idle(pool)
    assert again == text and cached > 200 and pool.workers[0].gauges["restored_tokens"] == cached
    assert pool.stats()["prefixes"]["memory_bytes"] > 0 and any("outlive" in line for line in pool.describe())


async def test_another_replica_reads_what_a_dead_one_has_kept(start_pool):
    pool = await start_pool(num_workers=2)
    text, _ = await answer(pool, "first")
    [worker] = [worker for worker in pool.workers if worker.prefixes]
    other = pool.workers[1 - pool.workers.index(worker)]
    worker.kill()
    while worker.state is State.READY:
        await asyncio.sleep(0.01)
    again, cached = await answer(pool, "elsewhere")
    await idle(pool)
    assert again == text and cached > 200 and other.gauges["restored_tokens"] == cached


async def test_a_server_restores_what_one_before_has_stored_for_the_same_owner_alone(start_pool, tmp_path):
    pool = await start_pool(prefix_store=str(tmp_path / "store"), prefix_memory=0)
    text, _ = await answer(pool, "first", owner="alice")
    await pool.close()
    assert oct((tmp_path / "store").stat().st_mode)[-3:] == "700" and len(segment_paths(tmp_path / "store")) == 1
    for owner, found in (("bob", False), ("alice", True), ("", False)):
        pool = await start_pool(prefix_store=f"{tmp_path / 'store'}:1G")
        again, cached = await answer(pool, f"again {owner}", owner=owner)
        assert again == text and (cached > 200) == found
        await pool.close()


async def test_without_memory_for_prefixes_nothing_is_kept(start_pool):
    pool = await start_pool(prefix_memory=0)
    await answer(pool, "first")
    pool.supervisor.unload()
    assert (await answer(pool, "after unloading"))[1] == 0 and not any("outlive" in line for line in pool.describe())


def test_how_much_memory_prefixes_get():
    assert memory_for(Settings(prefix_memory=5 << 20)) == 5 << 20 and memory_for(Settings(command="chat")) == 0
    assert memory_for(Settings(prefix_memory=0, prefix_store="x")) == STAGING_BYTES and memory_for(Settings(ray_address="auto")) == 0
    assert 0 < memory_for(Settings()) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 10
    assert [store_place(text)[1] for text in ("a:b", "a:2G", "a:b:1G")] == [10 << 30, 2 << 30, 1 << 30]
    assert [str(store_place(text)[0]) for text in ("a:b", "a:2G", "a:b:1G")] == ["a:b", "a", "a:b"]


def test_a_folder_that_cannot_be_trusted_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--prefix-store .*file: it is not a folder"):
        Prefixes(Settings(prefix_store=str(tmp_path / "file")))
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert check_folder(tmp_path / "open").stat().st_mode & 0o777 == 0o700      # it was empty
    (tmp_path / "open/letter.txt").touch()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ConfigError, match="other users may write into the folder"):
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


def test_a_server_that_ends_stores_its_prefixes_and_the_command_store_lists_them(nanochat_fixtures, tmp_path):
    flags = nanochat_fixtures / "gen5", "--dtype", "float32", "--prefix-store", f"{tmp_path}:100M"
    with server(*flags) as (process, url):
        first = answered(url, long_question())
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    listing = subprocess.run([sys.executable, SCRIPT, "store", tmp_path], capture_output=True, text=True, check=True).stdout
    assert "1 segments" in listing and " tokens in " in listing and "nanochat-d4-sft" in listing
    with server(*flags) as (process, url):
        again = answered(url, long_question())
        metrics = dict(line.split() for line in get_text(f"{url}/metrics").splitlines() if line.startswith("chat_server_") and "{" not in line)
        assert again[0] == first[0] and again[1] > 200 == first[1] + 200
        assert float(metrics["chat_server_restored_tokens_total"]) == again[1] and "chat_server_stored_pages_total" in metrics
        assert get(f"{url}/stats")["prefixes"]["memory_limit"] > 0
    for words, status in ((["store", str(tmp_path), "--prune", "0"], 0), (["store", str(tmp_path / "none")], 2), (["store"], 2)):
        assert subprocess.run([sys.executable, SCRIPT, *words], capture_output=True).returncode == status
    assert segment_paths(tmp_path) == []


def get_text(url):
    return urllib.request.urlopen(url, timeout=30).read().decode()


@pytest.mark.slow
def test_servers_killed_at_random_moments_leave_a_store_that_is_right(nanochat_fixtures, tmp_path):
    dice, flags = random.Random(5), (nanochat_fixtures / "gen5", "--dtype", "float32", "--prefix-store", tmp_path)
    with server(*flags, "--prefix-memory", "0") as (_, url):
        expected = {number: answered(url, long_question(number))[0] for number in range(12)}
    restored = 0
    for written in (True, False, True, False, False, True):     # is the store waited for, or does it just begin?
        with server(*flags) as (process, url):
            for number in dice.sample(range(12), 6):
                text, cached = answered(url, long_question(number))
                assert text == expected[number]
                restored += cached > 200
            [worker] = get(f"{url}/stats")["workers"]
            victim = dice.choice([process.pid, worker["pid"]])
            while written and not sum(path.stat().st_size for path in segment_paths(tmp_path)) > 1 << 19:
                process.poll()
            os.kill(victim, signal.SIGKILL)
    assert restored
