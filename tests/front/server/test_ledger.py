"""Who used what: /v1/usage equals the sum of what clients were told, by key, model, day and lane; and what keys may."""

import asyncio
import contextlib
import json
import random
import signal
import sqlite3
import subprocess
import sys
import urllib.request
from collections import Counter
from types import SimpleNamespace

import aiohttp
import pytest

from chatlm.common.config import ApiKey, Settings, read_api_keys
from chatlm.common.errors import ConfigError, Overloaded
from chatlm.common.messages.requests import Accepted, Delta, Finished, Piece, Usage
from chatlm.front.annexes.usage.routes import UsageRoutes, days_of
from chatlm.front.api.answer_state import AnswerState
from chatlm.front.front import create_app
from chatlm.front.server import access, budgets, connections, ledger, usage_writer
from chatlm.front.server.ledger import Amount, Ledger, UsageRow
from chatlm.front.server.watching import watched
from chatlm.front.store.store import Store
from answers import asked, said
from fake_pool import FakePool, catalogue_of, conversation, frames, serving
from nightly import by_day
from pools import played_pool
from real_server import server

ALICE, BOB, ROOT = ApiKey.hashed("a", "alice"), ApiKey.hashed("b", "bob"), ApiKey.hashed("r", "root", role="admin")
TEXT = (Delta("text", "a"),)


@contextlib.asynccontextmanager
async def kept(pool, settings, path):
    """`serving` with a database."""
    store = Store(path)
    store.open()
    with access.listen_on("127.0.0.1", 0) as listener:
        app = create_app(catalogue_of(pool, settings), settings, store)
        async with connections.serving(app, listener):
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextlib.asynccontextmanager
async def client_of(url):
    async with aiohttp.ClientSession(url) as session:
        async def call(path, key=None, body=None):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            async with session.request("POST" if body is not None else "GET", path, json=body, headers=headers) as response:
                return response, await response.read()
        yield call


async def usage(call, key=None, query=""):
    response, body = await call("/v1/usage" + query, key)
    assert response.status == 200, body
    return json.loads(body)


def told(body):
    """What a response or a stream says was used."""
    if body.startswith(b"data:"):
        return next(frame["usage"] for frame in frames(body) if isinstance(frame, dict) and frame.get("usage"))
    return json.loads(body)["usage"]


async def test_a_key_sees_its_own_use_and_an_admin_all():
    total, by_key = Counter(), {"a": Counter(), "b": Counter()}
    async with serving(FakePool(), Settings(keys=(ALICE, BOB, ROOT))) as url, client_of(url) as call:
        for key, more in (("a", {}), ("a", {"stream": True, "stream_options": {"include_usage": True}}), ("b", {"n": 3}),
                          ("b", {"priority": "low"}), ("a", {"n": 2, "stream": True, "stream_options": {"include_usage": True}})):
            _, body = await call("/v1/chat/completions", key, conversation() | more)
            found = told(body)
            for counter in (total, by_key[key]):
                counter.update(requests=1, prompt=found["prompt_tokens"], generated=found["completion_tokens"],
                               cached=found["prompt_tokens_details"]["cached_tokens"])
        for key, counter in [("r", total), *by_key.items()]:
            answer = await usage(call, key)
            assert {name: answer["total"][field] for name, field in (
                ("requests", "requests"), ("prompt", "prompt_tokens"), ("generated", "completion_tokens"), ("cached", "cached_tokens"))} == counter
            assert answer["key"] == {"a": "alice", "b": "bob", "r": None}[key]
            assert {row["key"] for row in answer["data"]} == {"a": {"alice"}, "b": {"bob"}, "r": {"alice", "bob"}}[key]
        rows = (await usage(call, "b"))["data"]
        assert sorted((row["background"], row["requests"], row["model"], row["day"]) for row in rows) == [
            (False, 1, "fake-model", ledger.today()), (True, 1, "fake-model", ledger.today())]
        assert (await call("/v1/usage"))[0].status == 401 and (await call("/usage"))[0].status == 200
        _, metrics = await call("/metrics", "a")
        assert b'chat_server_usage_requests_total{background="true"} 1.0' in metrics and b"alice" not in metrics
        assert f'chat_server_usage_completion_tokens_total{{background="false"}} {total["generated"] - 3}.0'.encode() in metrics


async def test_all_apis_texts_and_comparisons_count(monkeypatch):
    async with serving(FakePool()) as url, client_of(url) as call:
        said_so = Counter()
        _, body = await call("/v1/messages", None, conversation() | {"max_tokens": 50})
        counts = json.loads(body)["usage"]
        said_so.update(prompt=counts["input_tokens"] + counts["cache_read_input_tokens"], generated=counts["output_tokens"])
        _, body = await call("/v1/responses", None, {"input": "hello"})
        said_so.update(prompt=json.loads(body)["usage"]["input_tokens"], generated=json.loads(body)["usage"]["output_tokens"])
        _, body = await call("/api/chat", None, conversation() | {"stream": False})
        said_so.update(prompt=json.loads(body)["prompt_eval_count"], generated=json.loads(body)["eval_count"])
        _, body = await call("/v1/completions", None, {"prompt": ["a", "b"], "n": 2})
        said_so.update(prompt=told(body)["prompt_tokens"], generated=told(body)["completion_tokens"])
        assert told(body) | {"prompt_tokens": 14, "completion_tokens": 12} == told(body)
        _, body = await call("/chat/completions", None, conversation())
        said_so.update(prompt=7, generated=3)
        total = (await usage(call))["total"]
        assert (total["requests"], total["prompt_tokens"], total["completion_tokens"]) == (5, said_so["prompt"], said_so["generated"])
        assert (await usage(call))["key"] == "" and (await usage(call))["since"]


async def test_a_vanished_client_pays_what_was_sent():
    """One that waits for the whole answer pays nothing."""
    room = asyncio.Semaphore(5)
    pool = FakePool(["a"] * 100, gate=SimpleNamespace(wait=room.acquire))
    async with serving(pool) as url, aiohttp.ClientSession(url) as session, client_of(url) as call:
        response, got = await session.post("/chat/completions", json=conversation()), b""
        while got.count(b'"token"') < 5:
            got += await response.content.readany()
        response.close()
        await pool.until_open(0)
        total = (await usage(call))["total"]
        assert (total["requests"], total["prompt_tokens"], total["completion_tokens"]) == (1, 7, 5)
        whole = asyncio.ensure_future(session.post("/v1/chat/completions", json=conversation()))
        await pool.until_open(1)
        for _ in range(5):
            room.release()
        while not room.locked():
            await asyncio.sleep(0)
        whole.cancel()
        await pool.until_open(0)
        assert (await usage(call))["total"] == total | {"requests": 2}


async def test_pieces_count_once_the_next_is_asked_for():
    async def events():
        yield Accepted(7)
        for number in range(3):
            yield Piece((1, 2), TEXT, spent_s=0.5 * (number + 1))
        yield Finished("stop", "eos", Usage(7, 6, 3, compute_s=2.0), 0.0, 0.0, None, 0)

    for read, expected in ((1, Amount()), (2, Amount(1)), (3, Amount(1, 7, 0, 2, 0.5)), (5, Amount(1, 7, 0, 6, 1.5)), (6, Amount(1, 7, 3, 6, 2.0))):
        charge = Ledger(Settings()).charge(asked("x", prompts=((1,),)), "m")
        stream = watched(events(), AnswerState(asked()), [charge])
        for _ in range(read):
            await anext(stream, None)
        await stream.aclose()
        assert charge.amount == expected, read


async def test_tokens_count_once_their_text_is_sent():
    """Half a character, or what may become a stop string: a client that is cut off before has never got them."""
    pieces = Piece((1, 2), TEXT, spent_s=1.0), Piece((3,), spent_s=2.0), Piece((4, 5), spent_s=3.0), Piece((6,), TEXT, spent_s=4.0), Piece((7,))

    async def events(count, ends):
        yield Accepted(7)
        for piece in pieces[:count]:
            yield piece
        if ends:
            yield Finished("stop", "eos", Usage(7, 8, compute_s=9.0), 0.0, 0.0, None, 0)

    for count, ends, expected in ((1, False, Amount(1, 7, 0, 2, 1.0)), (3, False, Amount(1, 7, 0, 2, 1.0)), (4, False, Amount(1, 7, 0, 6, 4.0)),
                                  (5, False, Amount(1, 7, 0, 6, 4.0)), (5, True, Amount(1, 7, 0, 8, 9.0))):
        charge = Ledger(Settings()).charge(asked("x", prompts=((1,),)), "m")
        async for _ in watched(events(count, ends), AnswerState(asked()), [charge]):
            pass
        assert charge.amount == expected, (count, ends)


async def test_choices_of_one_prompt_share_its_charge():
    """They do so also if only some have ended."""
    charge = Ledger(Settings()).charge(asked("x", prompts=((1,), (2,)), n=2), "m")
    charge.begun, charge.ended = True, {1: Usage(5, 2, 1), 2: Usage(6, 3, 4)}
    charge.drawn[0] += 7
    assert charge.amount == Amount(1, 11, 4, 12)


async def test_usage_outlasts_restarts(tmp_path, monkeypatch):
    """A day ends at midnight UTC."""
    settings = Settings(keys=(ALICE, ROOT))
    clock = SimpleNamespace(time=lambda: 1_700_000_000.0)        # 2023-11-14, 22:13:20
    monkeypatch.setattr(ledger, "time", clock)
    for number in range(3):
        async with kept(FakePool(), settings, tmp_path / "store.db") as url, client_of(url) as call:
            await call("/v1/chat/completions", "a", conversation())
            answer = await usage(call, "r", "?from=2023-11-01&to=2023-12-01")
            assert answer["total"]["requests"] == 2 * number + 1 and answer["kept"] == "in the database"
            clock.time = lambda: 1_700_006_400.0 + 1            # after midnight
            await call("/v1/chat/completions", "a", conversation())
            clock.time = lambda: 1_700_006_400.0 - 1            # a clock that goes back
    async with kept(FakePool(), settings, tmp_path / "store.db") as url, client_of(url) as call:
        answer = await usage(call, "a", "?from=2023-11-14&to=2023-11-15")
        assert [(row["day"], row["requests"], row["completion_tokens"]) for row in answer["data"]] == [("2023-11-15", 3, 9), ("2023-11-14", 3, 9)]
        assert (await usage(call, "a", "?from=2023-11-15&to=2023-11-15"))["total"]["requests"] == 3
    rows = sqlite3.connect(tmp_path / "store.db").execute("SELECT * FROM usage ORDER BY day").fetchall()
    assert rows == [("2023-11-14", "alice", "fake-model", 0, 3, 21, 9, 9, 0.0), ("2023-11-15", "alice", "fake-model", 0, 3, 21, 9, 9, 0.0)]


@pytest.mark.parametrize("query, words", [("from=x", "from must be a day"), ("to=20231114", "to must be a day"), ("from=2023-02-30", "from must be a day"),
                                          ("from=2023-11-15&to=2023-11-14", "is after"), ("from=", "from must be a day"), ("to=%00", "to must be a day")])
async def test_a_day_that_is_none_is_400(query, words):
    async with serving(FakePool()) as url, client_of(url) as call:
        response, body = await call("/v1/usage?" + query)
        assert response.status == 400 and words in json.loads(body)["error"]["message"]


def test_the_first_and_the_last_day_are_allowed():
    assert days_of("0001-01-01", "9999-12-31") == ("0001-01-01", "9999-12-31")
    assert days_of(None, "0001-01-02") == ("0001-01-01", "0001-01-02") and days_of("9999-12-31", None) == ("9999-12-31", "9999-12-31")


async def test_usage_the_database_refuses_comes_later(tmp_path, monkeypatch):
    """What it refuses is written later."""
    monkeypatch.setattr(usage_writer, "RETRY_S", 0.0)
    refusals = [Overloaded("the disk is full")] * 3

    class Full(Store):
        async def run(self, function, *more, **named):
            if refusals and getattr(function, "func", None) is usage_writer.write:
                raise refusals.pop()
            return await super().run(function, *more, **named)

    store = Full(tmp_path / "store.db")
    store.open()
    book = Ledger(Settings(), writer=usage_writer.UsageWriter(store))
    await book.open()
    for number in range(5):
        charge = book.charge(asked("x", prompts=((1,),)), "m\udcff")        # of a file's name
        charge.begun, charge.ended = True, {0: Usage(1, number)}
        book.settle(charge)
        await asyncio.sleep(0)
    while refusals:
        await asyncio.sleep(0.001)
    await book.close()
    [(row, amount)] = await UsageRoutes(book, store).between("2000-01-01", "3000-01-01", None, "a")
    await store.close()
    assert row == UsageRow(ledger.today(), "", "m?", False) and amount == Amount(5, 5, 0, 10)


async def test_without_a_database_memory_is_bounded(monkeypatch):
    for module in (ledger, budgets):
        monkeypatch.setattr(module, "MOST_ROWS", 10)
    clock = SimpleNamespace(time=lambda: 0.0)
    monkeypatch.setattr(ledger, "time", clock)
    book = Ledger(Settings(), budgets.Budgets([ALICE._replace(tokens_per_day=5)]))
    for day in range(100):
        clock.time = lambda day=day: 86_400.0 * day
        charge = book.charge(asked("x", prompts=((1,),)), "m")
        charge.begun, charge.ended = True, {0: Usage(1, 1)}
        book.settle(charge)
    assert len(book.rows) == len(book.budgets.used) == 10 and book.totals[False].requests == 100
    assert min(book.rows).day == "1970-04-01"


# budgets and roles

def keys_of(tmp_path, *lines):
    path = tmp_path / "keys"
    path.write_text("\n".join(lines))
    path.chmod(0o600)
    return read_api_keys((), str(path))


def test_the_fields_of_a_key_are_read(tmp_path):
    found = keys_of(tmp_path, "# keys", "alice: a tokens-per-day=1000", "bob: b:c=  models=x, y z tokens-per-day=0 over-budget=refuse", "r role=admin",
                    "c over-budget=background tokens-per-day=5")
    assert [(key.name, key.models, key.tokens_per_day, key.refused, key.admin) for key in found] == [
        ("alice", (), 1000, False, False), ("bob", ("x", "y z"), 0, True, False), ("line-4", (), None, False, True), ("line-5", (), 5, False, False)]
    assert found[1].digest == ApiKey.hashed("b:c=", "").digest


OWNER = "owner= must be a name of at most 64 letters, digits and . _ @ -"
UNSEEN = "line 1: the key's name has characters that cannot be shown"
# lines of a file of keys, the last of which is wrong by itself or contradicts another: what the message has
WRONG_KEYS = [
    (["bob: SECRET tokens-per-day=many"], "tokens-per-day= must be a whole number"),
    (["bob: SECRET tokens-per-day=-1"], "tokens-per-day= must be a whole number"),
    (["bob: SECRET tokens-per-day="], "tokens-per-day= must be"),
    (["bob: SECRET tokens-per-day=1 tokens-per-day=2"], "has tokens-per-day= twice"),
    (["bob: SECRET role=root"], "role= must be admin"),
    (["bob: SECRET rol=admin"], 'there is no field "rol" of a key'),
    (["bob: SECRET over-budget=refuse"], "over-budget= needs tokens-per-day="),
    (["bob: SECRET tokens-per-day=1 over-budget=later"], "over-budget= must be refuse or background"),
    (["bob: SECRET models="], "models= must be"),
    (["bob: SECRET models=,"], "models= must be"),
    *((["bob: SECRET owner=" + owner], OWNER) for owner in ("", "a b", "-a", "a/b", "ä", "x" * 65, "a'b")),
    *(([f"{name}: SECRET"], UNSEEN) for name in ("a\x1b[31m", "a\x00b", "a\x7f", "\u202eevil")),
    (["--knowledge: SECRET"], "the key's name, --knowledge, is what"),
    (["bob: SECRET tokens-per-day=5", "bob: b"], 'the key\'s name, "bob", is also that of --api-key-file'),
    (["bob: SECRET models=x,y", "carol: c", "bob: b models=x"], "another models="),
    (["bob: SECRET role=admin", "bob: b"], "another role="),
    (["bob: SECRET tokens-per-day=5", "bob: b tokens-per-day=5 over-budget=refuse"], "another over-budget="),
    (["bob: SECRET owner=ann", "bob: b owner=bob"], "another owner="),
    (["SECRET", "line-1: b role=admin"], "line 2: the key's name"),
    (["SECRET", "SECRET role=admin"], "line 2: the key is that of --api-key-file"),
    (["bob: SECRET", "carol: SECRET"], 'where it has the name "bob"'),
    (["bob: SECRET", "carol: SECRET tokens-per-day=1"], "another tokens-per-day="),
]


@pytest.mark.parametrize("lines, words", WRONG_KEYS)
def test_what_a_file_of_keys_cannot_say_is_named_without_the_key(tmp_path, lines, words):
    """In one line, with that of the file."""
    with pytest.raises(ConfigError) as error:
        keys_of(tmp_path, *lines)
    message = str(error.value)
    assert words in message and f"line {len(lines)}" in message and "SECRET" not in message and "\n" not in message


def test_a_flag_s_key_lifts_no_limit_of_the_file(tmp_path):
    """A key of the command line does not lift the limits that the file gives it."""
    (tmp_path / "keys").write_text("bob: SECRET tokens-per-day=5")
    (tmp_path / "keys").chmod(0o600)
    with pytest.raises(ConfigError, match="line 1: the key is that of --api-key number 1, with another tokens-per-day="):
        read_api_keys(["SECRET"], str(tmp_path / "keys"))


def test_one_name_may_have_several_keys(tmp_path):
    """The keys have the same fields."""
    found = keys_of(tmp_path, "bob: a models=x,y tokens-per-day=5", "bob: b tokens-per-day=5 models=y,x", "c", "c")
    assert [key.name for key in found] == ["bob", "bob", "line-3", "line-4"]


async def test_over_its_budget_a_key_waits_or_is_refused(tmp_path, monkeypatch):
    """It waits in the background, or is refused until midnight."""
    keys = keys_of(tmp_path, "alice: a tokens-per-day=20", "bob: b tokens-per-day=20 over-budget=refuse", "carol: c")
    clock = SimpleNamespace(time=lambda: 1_700_000_000.0)
    monkeypatch.setattr(ledger, "time", clock)
    pool, settings = FakePool(), Settings(keys=keys)
    async with kept(pool, settings, tmp_path / "store.db") as url, client_of(url) as call:
        for key in "abc":
            for _ in range(2):
                response, _ = await call("/v1/chat/completions", key, conversation())
                assert response.status == 200 and "X-Over-Budget" not in response.headers
        assert (await usage(call, "a"))["budget"] == {"tokens_per_day": 20, "used_today": 20, "reserved": 0, "over_budget": "background", "renewed_in_s": 6400}
        assert "budget" not in await usage(call, "c")
    async with kept(pool, settings, tmp_path / "store.db") as url, client_of(url) as call:      # after a restart too
        for path in ("/v1/chat/completions", "/v1/messages", "/chat/completions"):
            body = conversation() | {"max_tokens": 9}
            response, _ = await call(path, "a", body)
            assert response.status == 200 and response.headers["X-Over-Budget"] == "background; renewed in 6400 s" and pool.requests[-1].low_priority
            response, text = await call(path, "b", body)
            assert response.status == 429 and response.headers["Retry-After"] == "6400" and b"midnight UTC. Please try again in 6400s." in text
            response, _ = await call(path, "c", body)
            assert response.status == 200 and not pool.requests[-1].low_priority
        clock.time = lambda: 1_700_006_400.0
        response, _ = await call("/v1/chat/completions", "b", conversation())
        assert response.status == 200


async def test_running_answers_take_from_the_budget(tmp_path):
    """Many answers at once do not pass it."""
    keys, gate = keys_of(tmp_path, "alice: a tokens-per-day=1000", "bob: b tokens-per-day=1000 over-budget=refuse"), asyncio.Event()
    pool, settings = FakePool(gate=gate), Settings(keys=keys)
    async with serving(pool, settings) as url, client_of(url) as call:
        # a prompt has 7 tokens, 256 are assumed; only one of a request's answers may pass the budget
        for key, body, fit, reserved in (("a", {"max_tokens": 400}, 3, 3 * 407), ("a", {}, 4, 4 * 263), ("b", {"max_tokens": 200, "n": 2}, 2, 2 * 407), ("b", {"max_tokens": 200}, 5, 5 * 207)):
            gate.clear()
            first = asyncio.gather(*(call("/v1/chat/completions", key, conversation() | body) for _ in range(fit)))
            await pool.until_open(fit)
            assert (await usage(call, key))["budget"]["reserved"] == reserved
            more = asyncio.ensure_future(call("/v1/chat/completions", key, conversation() | body))
            if key == "b":
                response, text = await more
                assert response.status == 429 and response.headers["Retry-After"] == "5" and b"may use all that is left" in text
            else:
                await pool.until_open(fit + 1)
            gate.set()
            assert all("X-Over-Budget" not in response.headers for response, _ in await first)
            assert key == "b" or (await more)[0].headers["X-Over-Budget"].startswith("background")
            assert (await usage(call, key))["budget"]["reserved"] == 0
            response, _ = await call("/v1/chat/completions", key, conversation() | body)
            assert response.status == 200 and "X-Over-Budget" not in response.headers


async def test_answers_too_long_together_name_the_rest(tmp_path, monkeypatch):
    """A request whose answers do not fit together says what is left."""
    monkeypatch.setattr(ledger, "time", SimpleNamespace(time=lambda: 1_700_000_000.0))
    keys = keys_of(tmp_path, "bob: b tokens-per-day=1000 over-budget=refuse")
    pool = FakePool()
    async with serving(pool, Settings(keys=keys)) as url, client_of(url) as call:
        response, text = await call("/v1/chat/completions", "b", conversation() | {"max_tokens": 300, "n": 5})
        assert response.status == 429 and response.headers["Retry-After"] == "6400"
        assert b"has 1,000 of its 1,000 tokens of today (UTC) left, and this request may take 1,200 besides its longest answer" in text
        response, text = await call("/v1/compare", "b", conversation() | {"max_tokens": 300, "variants": [{}] * 5})
        assert response.status == 429 and b"may take 1,200 besides" in text
        response, _ = await call("/v1/completions", "b", {"prompt": "x", "max_tokens": 3})
        assert response.status == 200 and len(pool.requests) == 1
        assert (await usage(call, "b"))["budget"]["reserved"] == 0


async def test_a_comparison_is_reserved_whole(tmp_path):
    """It is reserved before any of its answers begins."""
    keys, gate = keys_of(tmp_path, "bob: b tokens-per-day=2000 over-budget=refuse"), asyncio.Event()
    pool = FakePool(gate=gate)
    async with serving(pool, Settings(keys=keys)) as url, client_of(url) as call:
        body = conversation() | {"max_tokens": 300, "variants": [{}] * 4}
        both = [asyncio.ensure_future(call("/v1/compare", "b", body)) for _ in range(5)]
        await pool.until_open(4)
        assert (await usage(call, "b"))["budget"]["reserved"] == 4 * 307
        refused = await first_ended(both, 4)
        assert all(response.status == 429 and response.headers["Retry-After"] == "5" for response, _ in refused)
        gate.set()
        statuses = sorted(response.status for response, _ in await asyncio.gather(*both))
        assert statuses == [200, 429, 429, 429, 429]
        found = await usage(call, "b")
        assert found["budget"] == found["budget"] | {"used_today": 4 * 10, "reserved": 0}


async def test_a_prompt_beyond_the_budget_costs_nothing(tmp_path):
    """Prompts that do not fit into what is left are refused before they cost anything."""
    keys = keys_of(tmp_path, "bob: b tokens-per-day=12 over-budget=refuse", "alice: a tokens-per-day=12")
    pool = FakePool()
    async with serving(pool, Settings(keys=keys)) as url, client_of(url) as call:
        for stream in (False, True):
            for key, last in (("b", 429), ("a", 200)):
                response, _ = await call("/v1/completions", key, {"prompt": "x", "max_tokens": 3, "stream": stream})
                assert response.status == (last if stream else 200)
        _, text = await call("/v1/completions", "b", {"prompt": "x", "max_tokens": 3})
        assert b"has 2 of its 12 tokens of today (UTC) left, and this request may take 7 besides its longest answer" in text
        assert (await usage(call, "b"))["budget"] | {"renewed_in_s": 0} == {"tokens_per_day": 12, "used_today": 10, "reserved": 0, "over_budget": "refuse", "renewed_in_s": 0}
        assert (await usage(call, "b"))["total"]["requests"] == 1 and pool.open == 0


async def first_ended(tasks, count):
    while sum(task.done() for task in tasks) < count:
        await asyncio.wait([task for task in tasks if not task.done()], return_when=asyncio.FIRST_COMPLETED)
    return [task.result() for task in tasks if task.done()]


async def test_an_uncapped_answer_ends_with_the_budget(tmp_path):
    """Of a key that is refused then; one that goes on in the background has all of its answer."""
    keys = keys_of(tmp_path, "alice: a tokens-per-day=1000", "bob: b tokens-per-day=1000 over-budget=refuse")
    pool = FakePool(["a"] * 3000)
    async with serving(pool, Settings(keys=keys)) as url, client_of(url) as call:
        for key, n, most in (("b", 3, 1000 + 3 * 256), ("a", 1, 3007)):
            _, body = await call("/v1/completions", key, {"prompt": "x", "n": n})
            found = json.loads(body)
            assert {choice["finish_reason"] for choice in found["choices"]} == {"length" if key == "b" else "stop"}
            spent = found["usage"]["total_tokens"]
            assert spent == (await usage(call, key))["budget"]["used_today"] and 1000 <= spent <= most
            assert (await usage(call, key))["budget"]["reserved"] == 0
        response, _ = await call("/v1/completions", "b", {"prompt": "x"})
        assert response.status == 429


async def test_an_uncapped_answer_reserves_256_more(tmp_path):
    """It reserves what it has and the next 256 tokens."""
    room = asyncio.Semaphore(0)
    pool = FakePool(["a"] * 600, gate=SimpleNamespace(wait=room.acquire))
    keys = keys_of(tmp_path, "alice: a tokens-per-day=100000")
    async with serving(pool, Settings(keys=keys)) as url, aiohttp.ClientSession(url) as session, client_of(url) as call:
        async with session.post("/v1/completions", json={"prompt": "x", "stream": True}, headers={"Authorization": "Bearer a"}) as response:
            got = 0
            for total, reserved in ((1, 256), (255, 256), (256, 512), (511, 512), (513, 768)):
                for _ in range(total - got):
                    room.release()
                while got < total:
                    got += (await response.content.readuntil(b"\n\n")).count(b'"text": "a"')
                while not room.locked():
                    await asyncio.sleep(0)
                assert (await usage(call, "a"))["budget"]["reserved"] == 7 + reserved, total


@pytest.mark.parametrize("seed", by_day(range(12), *range(5)))
async def test_the_sum_of_charges_is_what_was_computed(seed):
    """Requests of all kinds at once: a budget is passed at most by the tokens of one answer, and the 256 of each without max_tokens."""
    dice = random.Random(seed)
    budget = dice.randrange(100, 6000)
    keys = (ApiKey.hashed("a", "alice", tokens_per_day=budget, refused=True), ApiKey.hashed("b", "bob", tokens_per_day=budget), BOB._replace(name="carol", digest=ApiKey.hashed("c", "").digest))
    pool = FakePool(["a"] * dice.randrange(1, 900))
    yielded, answer = Counter(), pool.answer

    async def counted(request):
        async for event in answer(request):
            if isinstance(event, Piece):
                yielded[request.client] += len(event.tokens)
            await asyncio.sleep(0)
            yield event
    pool.answer = counted
    told_tokens, statuses = Counter(), Counter()
    async with serving(pool, Settings(keys=keys)) as url, client_of(url) as call:
        async def one():
            key, most = dice.choice("aab"), dice.choice((None, len(pool.pieces)))
            limit = {} if most is None else {"max_tokens": most}
            kind = dice.randrange(4)
            if kind == 0:
                response, body = await call("/v1/compare", key, conversation() | {"variants": [{}] * dice.randrange(2, 5)} | ({"max_tokens": most or 256}))
                found = [frame["usage"] for frame in frames(body) if isinstance(frame, dict) and frame.get("usage")] if response.status == 200 else []
            elif kind == 1:
                response, body = await call("/v1/completions", key, {"prompt": ["x"] * dice.randrange(1, 4), "n": dice.randrange(1, 4)} | limit)
                found = [told(body)] if response.status == 200 else []
            else:
                response, body = await call("/v1/chat/completions", key, conversation() | limit | {"n": dice.randrange(1, 3), "stream": kind == 2, "stream_options": {"include_usage": True}}
                                            if kind == 2 else conversation() | limit)
                found = [told(body)] if response.status == 200 else []
            statuses[response.status] += 1
            assert response.status in (200, 429), body
            told_tokens[key, "completion"] += sum(usage["completion_tokens"] for usage in found)
            told_tokens[key, "prompt"] += sum(usage["prompt_tokens"] for usage in found)

        async def client():
            for _ in range(6):
                await one()
        await asyncio.gather(*(client() for _ in range(4)))
        for key, name in (("a", "alice"), ("b", "bob")):
            found = await usage(call, key)
            total = found["total"]
            assert (total["prompt_tokens"], total["completion_tokens"]) == (told_tokens[key, "prompt"], told_tokens[key, "completion"])
            assert total["completion_tokens"] == yielded[name] and found["budget"]["reserved"] == 0
            if key == "a":      # at most 4 requests of 9 answers run at once
                assert found["budget"]["used_today"] <= budget + len(pool.pieces) + 256 * 4 * 9
    assert statuses[200]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_cut_completion_charges_begun_prompts(stream):
    """Of several prompts it charges those whose answers began."""
    room = asyncio.Semaphore(0)
    pool = FakePool(["a"] * 4, gate=SimpleNamespace(wait=room.acquire))
    async with serving(pool) as url, aiohttp.ClientSession(url) as session, client_of(url) as call:
        asking = asyncio.ensure_future(session.post("/v1/completions", json={"prompt": ["x", "y", "z"], "stream": stream}))
        await pool.until_open(1)
        for _ in range(6):      # all of the first, half of the second
            room.release()
        if stream:
            response, got = await asking, b""
            while got.count(b'"text": "a"') < 6:
                got += await response.content.readany()
            response.close()
        else:
            while not room.locked():
                await asyncio.sleep(0)
            asking.cancel()
        await pool.until_open(0)
        total = (await usage(call))["total"]
        assert (total["requests"], total["prompt_tokens"], total["completion_tokens"]) == ((1, 14, 6) if stream else (1, 0, 0))


async def test_models_of_a_key_are_all_that_it_sees():
    bound = ApiKey.hashed("a", "alice", ("other",))
    async with serving(FakePool(), Settings(keys=(bound, BOB))) as url, client_of(url) as call:
        _, body = await call("/v1/models", "a")
        assert json.loads(body)["data"] == []
        response, body = await call("/v1/chat/completions", "a", conversation() | {"model": "fake-model"})
        missing, other = await call("/v1/chat/completions", "b", conversation() | {"model": "nothing"})
        assert response.status == 404 and json.loads(body)["error"]["code"] == json.loads(other)["error"]["code"]


@pytest.mark.parametrize("roles", [True, False])
async def test_operators_need_their_role(roles):
    """This holds where any key has one."""
    async with serving(FakePool(), Settings(keys=(ALICE, ROOT) if roles else (ALICE,))) as url, client_of(url) as call:
        for path in ("/models/unload", "/models/load", "/models/download", "/models/delete"):
            response, body = await call(path, "a", {"model": "fake-model"})
            assert (response.status == 403 and json.loads(body)["error"]["code"] == "not_admin") == roles, body
            if roles:
                response, body = await call(path, "r", {"model": "fake-model"})
                assert b"not_admin" not in body


# workers and fronts that die

async def test_workers_that_die_change_no_account(start_pool, tmp_path, monkeypatch):
    monkeypatch.setenv("STRUCK", str(tmp_path))
    pool = await start_pool(prefill_chunk=16, stream_interval=0.0, num_workers=2)
    dice, total = random.Random(4), Counter()
    async with serving(pool, Settings(keys=(ALICE, BOB, ROOT))) as url, aiohttp.ClientSession(url) as session, client_of(url) as call:
        async def one(number):
            # one at a time: answers whose workers die too often fail
            moment = "calm" if number % 4 else dice.choice(("kill-decode", "kill-queued", "kill-prefill"))
            stream, count = dice.random() < 0.5, dice.randrange(1, 4)
            body = {"prompt": "The sea is " * dice.randrange(1, 9), "max_tokens": 40, "ignore_eos": True, "n": count, "stream": stream, "seed": number,
                    "priority": dice.choice(("low", "normal")), **({"stream_options": {"include_usage": True}} if stream else {})}
            headers = {"Authorization": f"Bearer {dice.choice('ab')}", "X-Request-Id": f"{moment}-{number}"}
            async with session.post("/v1/completions", json=body, headers=headers) as response:
                got = await response.read()
            if response.status == 200 and (not stream or b'"usage": {' in got):
                found = told(got)
                total.update(requests=1, prompt_tokens=found["prompt_tokens"], completion_tokens=found["completion_tokens"],
                             cached_tokens=found["prompt_tokens_details"]["cached_tokens"])
            else:
                pytest.fail(f"{response.status} {got[:300]}")
        for start in range(0, 12, 4):
            await asyncio.gather(*(one(number) for number in range(start, start + 4)))
        answer = await usage(call, "r")
        assert {name: answer["total"][name] for name in total} == total
        assert answer["total"]["compute_s"] > 0 and any(path.name.startswith("kill") for path in tmp_path.iterdir())
        assert len(answer["data"]) >= 3


async def test_a_budget_that_ends_an_answer_frees_rows(tmp_path, nanochat_fixtures):
    """The answer is charged what it had."""
    (tmp_path / "keys").write_text("bob: b tokens-per-day=400 over-budget=refuse\nroot: r role=admin\n")
    (tmp_path / "keys").chmod(0o600)
    with server(nanochat_fixtures / "gen5", "--dtype", "float32", "--api-key-file", tmp_path / "keys") as (_, url):
        async with client_of(url) as call:
            _, body = await call("/v1/completions", "b", {"prompt": "The sea", "n": 2, "ignore_eos": True, "logprobs": 1})
            found = json.loads(body)
            total = found["usage"]["total_tokens"]
            assert [choice["finish_reason"] for choice in found["choices"]] == ["length"] * 2 and 400 <= total <= 400 + 3 * 256
            assert sum(len(choice["logprobs"]["tokens"]) for choice in found["choices"]) == found["usage"]["completion_tokens"]
            budget = (await usage(call, "b"))["budget"]
            assert (budget["used_today"], budget["reserved"]) == (total, 0)
            assert (await call("/v1/completions", "b", {"prompt": "x"}))[0].status == 429
            _, body = await call("/v1/completions", "r", {"prompt": "The sea", "max_tokens": 5, "ignore_eos": True})
            assert json.loads(body)["usage"]["completion_tokens"] == 5
            while (await stats_of(call))["busy_workers"]:
                await asyncio.sleep(0.01)
            assert (await stats_of(call))["queue_depth"] == 0


async def stats_of(call):
    return json.loads((await call("/stats", "r"))[1])


@pytest.mark.slow
def test_a_killed_front_has_charged_only_what_it_sent(tmp_path, nanochat_fixtures):
    """kill -9 while clients stream: what the database has is at most what they got, and all that ended some time before."""
    sent, whole = 0, 0
    for attempt in range(3):
        arguments = (nanochat_fixtures / "gen5", "--dtype", "float32", "--database", tmp_path / "store.db")
        with server(*arguments) as (process, url):
            script = ("import json,sys,urllib.request\n"
                      "while True:\n"
                      f"  body = json.dumps({{'prompt': 'The sea', 'max_tokens': 30, 'ignore_eos': True, 'stream': True, 'return_token_ids': True}}).encode()\n"
                      f"  for line in urllib.request.urlopen(urllib.request.Request({url!r} + '/v1/completions', body, {{'Content-Type': 'application/json'}})):\n"
                      "    if line.startswith(b'data: {'):\n"
                      "      [print(len(c.get('token_ids') or ()), c.get('finish_reason') or '-', flush=True) for c in json.loads(line[6:])['choices']]\n")
            clients = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                       for _ in range(3)]
            lines = []
            while sum(line.endswith("length\n") for line in lines) < 10:
                lines.append(clients[0].stdout.readline())
            process.send_signal(signal.SIGKILL)
            process.wait()
        for client in clients:
            lines += client.stdout.readlines()
            client.wait()
            client.stdout.close()
        sent += sum(int(line.split()[0]) for line in lines)
        whole += sum(line.endswith("length\n") for line in lines)
        database = sqlite3.connect(tmp_path / "store.db")
        requests, written = database.execute("SELECT SUM(requests), SUM(completion_tokens) FROM usage").fetchone()
        database.close()
        assert written <= sent and requests <= whole and requests >= 8 * (attempt + 1)
