"""What a request imports that no other had needed before."""

import asyncio
import json
import threading
import urllib.error

import aiohttp
import pytest

from chatlm.common import program
from chatlm.common.errors import Overloaded
from chatlm.front.api.spoken import load_for, rows_by_path
from chatlm.front.late import Late
from fake_pool import FakePool, conversation, serving
from patching import patch
from real_server import copy_program, post, server

ANSWERS = {"/v1/messages": {"max_tokens": 5}, "/api/chat": {"stream": False}}


async def test_it_is_imported_in_a_thread_and_kept():
    threads = []
    late = Late(lambda: threads.append(threading.current_thread()) or [])
    first = await late.get()
    assert threads != [threading.current_thread()] and await late.get() is first is late.now()
    assert len(threads) == 1
    assert len({id(each) for each in await asyncio.gather(*(late.get() for _ in range(8)))}) == 1


@pytest.mark.parametrize("error", [None, ImportError("no x"), SyntaxError("half a file"), KeyError("x")])
async def test_what_may_not_fit_is_refused_and_not_kept(error, monkeypatch):
    def load():
        if error:
            raise error
        return "new"

    late = Late(load)
    with monkeypatch.context() as meanwhile:
        patch(meanwhile, program, "program_stamp", lambda: (0, 0))
        with pytest.raises(Overloaded, match="the program has changed since this server started"):
            await late.get()
    assert late.loaded is None
    if error:
        with pytest.raises(type(error)):
            await late.get()
    else:
        assert await late.get() == "new"


async def test_a_dialect_that_was_replaced_answers_503(monkeypatch):
    """APIs that were asked before go on."""
    for path in ANSWERS:
        monkeypatch.setattr(rows_by_path()[path].dialect, "loaded", None)
    await load_for("/v1/chat/completions")
    patch(monkeypatch, program, "program_stamp", lambda: (0, 0))
    pool = FakePool()
    async with serving(pool) as url, aiohttp.ClientSession(url) as session:
        for path, more in ANSWERS.items():
            async with session.post(path, json=conversation() | more) as response:
                assert response.status == 503 and "the program has changed" in await response.text()
        async with session.post("/v1/chat/completions", json=conversation()) as response:
            assert response.status == 200
    assert len(pool.requests) == 1 and pool.open == 0


def status_of(url, body, large):
    """(status, text) for a body that the front reads, or that a sandbox does."""
    try:
        return 200, post(url, conversation() | body | ({"zz": "z" * (1 << 20)} if large else {})).read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_a_sandbox_does_not_read_with_what_is_newer(nanochat_fixtures, tmp_path):
    """The front had a dialect before its file was replaced; its sandbox runs, and has not."""
    script = copy_program(tmp_path)
    with server(nanochat_fixtures / "gen5", script=script) as (_, url):
        assert status_of(url + "/v1/chat/completions", {"max_tokens": 2}, large=True)[0] == 200
        assert status_of(url + "/v1/messages", {"max_tokens": 2}, large=False)[0] == 200
        with open(script.parent / "chatlm/front/api/dialects/messages.py", "a") as file:
            file.write("\nNEWER = True\n")
        for _ in range(2):
            status, text = status_of(url + "/v1/messages", {"max_tokens": 2}, large=True)
            assert status == 503
            assert "the program has changed" in json.loads(text)["error"]["message"]
        for path in ("/v1/messages", "/v1/chat/completions"):  # these need no sandbox
            assert status_of(url + path, {"max_tokens": 2}, large=False)[0] == 200
