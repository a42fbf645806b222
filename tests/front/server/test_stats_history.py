"""The history of /stats: what it samples, that it stays small, and who sees it."""

import asyncio
import itertools

import pytest

from chatlm.common.config import ApiKey, Settings
from chatlm.front.server import history
from chatlm.front.server.history import MOST_SAMPLES, History, Sample, mean_of, percentiles
from chatlm.front.server.metrics import Metrics
from fake_pool import FakePool, serving


def sample(at, value=0.0, time=None):
    return Sample(float(at), *[value] * 5, *[time] * 4)


def test_too_many_samples_are_merged_in_pairs():
    kept = History(None, Metrics(None, None, None))
    now_s, week_s = 0.0, 7 * 86400
    while now_s < week_s:
        now_s += kept.interval_s
        kept.add(sample(now_s, now_s))
        assert len(kept.samples) <= MOST_SAMPLES
    times = [each.at for each in kept.samples]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert times[0] == history.FIRST_INTERVAL_S and times[-1] > week_s - kept.interval_s
    assert 0 < min(gaps) and max(gaps) <= 2 * kept.interval_s
    assert len(times) > MOST_SAMPLES / 3


def test_untimed_answers_do_not_count_in_a_mean():
    assert mean_of(sample(1, 2.0), sample(2, 4.0, 8.0)) == sample(1, 3.0, 8.0)
    assert mean_of(sample(1), sample(2)).ttft_ms is None


def test_percentiles_are_of_what_came_between_looks():
    """They are of what came between two looks."""
    before = [(0.1, 5.0), (0.2, 5.0), (float("inf"), 5.0)]
    assert percentiles(before, before) == [None, None] == percentiles([], [])
    median, high = percentiles([(0.1, 5.0), (0.2, 15.0), (float("inf"), 15.0)], before)
    assert 100 < median < high < 200
    assert percentiles([(0.1, 0.0), (float("inf"), 9.0)], []) == [100, 100]         # beyond the last bound


async def get(client, url, key=None):
    async with client.get(url + "/stats/history", headers={"Authorization": f"Bearer {key}"} if key else {}) as response:
        return response.status, await response.json()


async def until_sampled(client, url, key=None):
    while True:
        status, body = await get(client, url, key)
        if body["samples"]:
            return status, body
        await asyncio.sleep(0.01)


async def test_the_history_is_for_who_sees_all_models(client, monkeypatch):
    """It sends bounded rows."""
    monkeypatch.setattr(history, "FIRST_INTERVAL_S", 0.01)
    keys = ApiKey.hashed("some", "some", ("another-model",)), ApiKey.hashed("whole", "whole")
    async with serving(FakePool(), Settings(keys=keys)) as url:
        assert (await get(client, url))[0] == 401
        status, body = await until_sampled(client, url, "whole")
        assert status == 200 and len(body["fields"]) == len(body["samples"][0]) and body["fields"][0] == "at"
        assert body["samples"][0][0] >= body["since"]
        status, body = await get(client, url, "some")
        assert status == 200 and body["samples"] == []


async def test_no_task_is_left_when_the_server_ends(client, monkeypatch):
    monkeypatch.setattr(history, "FIRST_INTERVAL_S", 0.01)
    async with serving(FakePool()) as url:
        await until_sampled(client, url)
    assert not [task for task in asyncio.all_tasks() if "_watch" in repr(task.get_coro()) or "history" in repr(task.get_coro())]


async def test_an_answer_is_in_the_next_sample(client, monkeypatch):
    """It is seen in the sample's times."""
    pytest.importorskip("prometheus_client")
    monkeypatch.setattr(history, "FIRST_INTERVAL_S", 0.01)
    async with serving(FakePool()) as url:
        question = {"messages": [{"role": "user", "content": "a"}]}
        async with client.post(url + "/v1/chat/completions", json=question) as response:
            assert response.status == 200
        while True:
            _, body = await get(client, url)
            first = body["fields"].index("ttft_ms")
            if any(row[first] is not None for row in body["samples"]):
                break
            await asyncio.sleep(0.01)
