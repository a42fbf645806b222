"""A request's trip through the front, without back and forth: what is asked once, and what may change meanwhile."""

import asyncio
import json

import aiohttp
import pytest

from chatlm.common.config import LIMITS, ApiKey, Settings
from chatlm.common.errors import Overloaded
from chatlm.common.messages.requests import Message
from chatlm.front.intake.intake import Intake
from chatlm.front.pool.dispatcher import Dispatcher
from chatlm.front.server import budgets
from answers import asked
from fake_pool import FakePool, conversation, serving
from patching import patch
from pools import played_pool


def request(name, client="a"):
    return asked(name, messages=(Message("user", "x"),), client=client, max_tokens=8)


@pytest.fixture
def counted(monkeypatch):
    """A function that counts the calls of a method, or the reads of a property."""
    def count(owner, name):
        calls = []
        method = owner.__dict__[name]
        if isinstance(method, property):
            monkeypatch.setattr(owner, name, property(lambda self: calls.append(name) or method.fget(self)))
        else:
            monkeypatch.setattr(owner, name, lambda *some, **more: calls.append(name) or method(*some, **more))
        return calls

    return count


def held_back(pool, monkeypatch):
    """The prompts of a pool are made once this event is set."""
    gate, make = asyncio.Event(), pool.admission.prompts.admit

    async def admit(request):
        await gate.wait()
        return await make(request)

    monkeypatch.setattr(pool.admission.prompts, "admit", admit)
    return gate


async def under_way(pool, name, client="a"):
    """The first event of an answer, once its prompt is being made."""
    first = asyncio.ensure_future(anext(pool.answer(request(name, client))))
    while name not in pool.admission.preparing:
        await asyncio.sleep(0)
    return first


async def test_the_place_of_a_request_is_looked_for_once(counted):
    looks = counted(Dispatcher, "check_capacity")
    pool = played_pool()
    await anext(pool.answer(request("x")))
    assert len(looks) == 1 and [*pool.dispatcher.requests] == ["x"]


async def test_who_has_a_place_keeps_it_while_its_prompt_is_made(monkeypatch):
    """Others come meanwhile, one from each client: more than the queue is meant for."""
    pool = played_pool(max_batch=1, max_queue=4)
    gate = held_back(pool, monkeypatch)
    first = [await under_way(pool, f"a{number}", "a") for number in range(5)]
    with pytest.raises(Overloaded, match="already waiting"):
        await anext(pool.answer(request("a5")))
    monkeypatch.setattr(Dispatcher, "_may_exceed_queue", lambda *more: True)
    others = [await under_way(pool, client, client) for client in "bcd"]
    monkeypatch.undo()
    gate.set()
    assert len(await asyncio.gather(*first, *others)) == 8
    assert not pool.admission.preparing


@pytest.mark.parametrize("what", ["drains", "serves nothing"])
async def test_what_ends_while_a_prompt_is_made_refuses_it(what, monkeypatch):
    pool = played_pool()
    gate = held_back(pool, monkeypatch)
    first = await under_way(pool, "x")
    if what == "drains":
        pool.draining = True
    else:
        pool.dispatcher.end(Overloaded("no more"))
    gate.set()
    with pytest.raises(Overloaded, match="shutting down|no more"):
        await first
    assert not pool.dispatcher.jobs and not pool.admission.preparing


async def test_a_small_body_without_pictures_asks_about_them_once(counted):
    """Whether it has any: not what any model here can see."""
    sees, blind = counted(Intake, "may_see"), counted(Intake, "why_blind")
    text = json.dumps(conversation() | {"ignored": "x" * LIMITS.inline_bytes}).encode()

    async def chunks():
        yield text

    async with serving(FakePool()) as url, aiohttp.ClientSession(url) as session:
        for path in ("/chat/completions", "/v1/chat/completions", "/v1/messages"):
            async with session.post(path, json=conversation() | {"max_tokens": 3}) as response:
                assert response.status == 200, await response.text()
        assert sees == blind == []
        for body in (text, chunks()):                    # how large may it be?
            kind = {"Content-Type": "application/json"}
            async with session.post("/v1/chat/completions", data=body, headers=kind) as response:
                assert response.status == 200
        assert len(sees) == 2 and blind == []
        part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        pictured = {"messages": [{"role": "user", "content": [part]}]}
        async with session.post("/v1/chat/completions", json=pictured) as response:
            assert response.status == 400 and "cannot see images" in await response.text()
        assert len(sees) == 2 and len(blind) == 1


async def test_only_keys_with_budgets_have_claims():
    estimates = []
    make = budgets.prompt_estimate
    keys = ApiKey.hashed("a", "alice"), ApiKey.hashed("b", "bob", tokens_per_day=1000)
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch(monkeypatch, budgets, "prompt_estimate",
              lambda request: estimates.append(request.client) or make(request))
        async with serving(FakePool(), Settings(keys=keys)) as url, aiohttp.ClientSession(url) as session:
            for key in "ab":
                headers = {"Authorization": f"Bearer {key}"}
                async with session.post("/v1/chat/completions", json=conversation(), headers=headers) as response:
                    assert response.status == 200
    assert estimates == ["bob"]
