"""Batches take turns by key: whoever must wait holds nobody else up, and nothing turns in a loop meanwhile."""

import asyncio
import contextlib
import json
import math
import random
from types import SimpleNamespace

import aiohttp
import pytest

from chatlm.common.config import ApiKey, Settings
from chatlm.common.errors import Overloaded
from chatlm.front.annexes.batches import line_queue
from chatlm.front.annexes.batches.line_queue import LEAST_REST_S, LONGEST_REST_S, NEWCOMERS, LineQueue, WaitingLine
from chatlm.front.annexes.batches.row import BATCHES
from chatlm.front.front import create_app
from chatlm.front.pool.catalogue import Catalogue
from chatlm.front.server import access, connections, ledger
from chatlm.front.server.access import Owners
from chatlm.front.store import batches, file_rows
from chatlm.front.store.file_rows import LineRow
from chatlm.front.store.store import Store
from fake_pool import FakePool
from nightly import by_day


class Server:
    """A LineQueue over simulated time: a line takes a while, or is refused, as its client is told."""

    def __init__(self, seed):
        self.dice = random.Random(seed)
        self.now_s = 0.0
        self.room = {"": 8}
        self.blocked = {}                       # client -> when its budget is renewed
        self.concurrent = {}                    # client -> how many of its lines run at most
        self.refusing = {}                      # (client, batch) -> until when every line of it is refused
        self.stuck = set()                      # models without memory: their lines begin and never end
        self.turns = LineQueue(self.room.__getitem__, lambda client: max(self.blocked.get(client, 0) - self.now_s, 0), lambda: self.now_s)
        self.running = []                       # (end, lane, line, is it refused?)
        self.done, self.seen, self.attempts = [], 0, 0

    def begin(self):
        while taken := self.turns.take():
            self.attempts += 1
            lane, line = taken
            mine = sum(other.client == lane.client and not refused for _, other, _, refused in self.running)
            if mine >= self.concurrent.get(lane.client, math.inf) or self.refusing.get((lane.client, lane.batch), 0) > self.now_s:
                self.running.append((self.now_s + 0.001, lane, line, True))
            else:
                self.running.append((math.inf if lane.model in self.stuck else self.now_s + self.dice.uniform(0.1, 2.0), lane, line, False))

    def step(self):
        """To the next moment at which something happens; False if there is none."""
        self.begin()
        pause_s = self.turns.pause_s()
        moments = [end for end, *_ in self.running if end < math.inf] + ([] if pause_s is None else [self.now_s + pause_s])
        if not moments:
            return False
        assert pause_s is None or LEAST_REST_S <= pause_s <= LONGEST_REST_S
        self.now_s = min(moments)
        over = [one for one in self.running if one[0] <= self.now_s]
        self.running = [one for one in self.running if one[0] > self.now_s]
        for _, lane, line, refused in over:
            if refused:
                self.turns.put_back(lane, line, self.dice.choice((0, 1, 5, 100_000)))
            else:
                self.turns.end(lane)
                self.done.append((lane.client, lane.batch, line.number))
        return True

    def add(self, client, batch, model, count):
        for number in range(count):
            self.turns.add(client, batch, model, WaitingLine(number, 10))


@pytest.mark.parametrize("seed", range(40))
def test_every_unblocked_batch_ends(seed):
    """It does so whatever the others do."""
    server = Server(seed)
    dice = server.dice
    models = [f"m{number}" for number in range(dice.randrange(1, 4))]
    server.room |= {model: dice.randrange(1, 12) for model in models}
    server.stuck = {f"s{number}" for number in range(dice.randrange(3))}
    server.room |= dict.fromkeys(server.stuck, 8)
    free, lines = [], 0
    for number in range(dice.randrange(2, 9)):
        client = f"client {number}"
        kind = dice.choice(("free", "free", "budget", "concurrent", "refused", "no memory", "many"))
        kind = "free" if number == 0 else "no memory" if kind == "no memory" and server.stuck else kind.replace("no memory", "budget")
        if kind == "budget":
            server.blocked[client] = math.inf
        if kind == "concurrent":
            server.concurrent[client] = dice.randrange(1, 4)
        for batch in range(30 if kind == "many" else dice.randrange(1, 5)):
            count = dice.randrange(1, 60)
            if kind == "refused":
                server.refusing[client, f"batch {batch}"] = math.inf
            server.add(client, f"batch {batch}", dice.choice(sorted(server.stuck) if kind == "no memory" else models), count)
            if kind in ("free", "concurrent", "many"):
                free.append((client, f"batch {batch}", count))
                lines += count
    wanted = {(client, batch, number) for client, batch, count in free for number in range(count)}
    found = 0
    while found < len(wanted) and server.step():
        found += sum(one in wanted for one in server.done[server.seen:])
        server.seen = len(server.done)
    assert wanted <= set(server.done) and len(server.done) == len(set(server.done))
    # all of it is as fast as its slots: nothing waited for those that are blocked
    assert server.now_s < 100 + 2.0 * lines
    before = server.attempts
    for _ in range(100):
        server.step()
    # what is left is refused, or blocked: it is tried seldom, or not at all
    assert server.attempts - before <= (200 if server.refusing else 0)


def test_a_new_client_soon_has_its_turn():
    """A client that comes has its turn after at most one line of each other."""
    server = Server(1)
    server.room["m"] = 4
    for client in "abcde":
        for batch in range(20):
            server.add(client, f"{client}{batch}", "m", 50)
    for _ in range(50):
        server.step()
    server.add("late", "late 0", "m", 10)
    ended = len(server.done)
    while not any(client == "late" for client, *_ in server.done):
        server.step()
    assert len(server.done) - ended <= 4 + 2 * 5, "it waited longer than for those before it"


def test_a_client_begins_though_no_slot_is_free():
    """Another client has all of them for hours."""
    turns = LineQueue(lambda model: 4, lambda client: 0, lambda: 0.0)
    for number in range(50):
        turns.add("long", "b", "m", WaitingLine(number, 1))
    assert [turns.take() is not None for _ in range(5)] == [True] * 4 + [False]
    for client in range(20):
        for number in range(3):
            turns.add(f"new {client}", f"b{client}", "m", WaitingLine(number, 1))
    begun = []
    while taken := turns.take():
        begun.append(taken[0])
    assert len(begun) == NEWCOMERS == len({lane.client for lane in begun})
    done = 0
    while begun:        # all of theirs end; the long one's never do
        turns.end(begun.pop(0))
        done += 1
        if taken := turns.take():
            begun.append(taken[0])
    assert done == 20 * 3 and turns.of_model["m"] == 4


def test_new_batches_do_not_keep_another_client_out():
    """A client whose batches have one line each is always new; it takes its turn all the same."""
    server = Server(2)
    server.room["m"] = 1
    server.add("patient", "one", "m", 20)
    for number in range(100):
        server.add(f"new {number % 3}", f"batch {number}", "m", 1)
        server.step()
        for client, batch, _ in server.done:
            server.turns.remove(client, batch) if client != "patient" else None
    assert sum(client == "patient" for client, *_ in server.done) >= 10


def test_a_refused_line_does_not_hold_up_its_batch():
    """A line that needs more memory than there is."""
    server = Server(3)
    server.room["m"] = 4
    server.add("a", "b", "m", 100)
    refused = 0
    while len(server.done) < 99:
        server.begin()
        for one in [one for one in server.running if one[2].number == 0]:
            server.running.remove(one)
            server.turns.put_back(one[1], one[2], 10)
            refused += 1
        server.step()
    assert refused < 20 and server.now_s < 300


def test_after_a_refusal_lines_begin_one_by_one():
    """After a refusal one line tries and each that ends lets one more begin."""
    now_s = 0.0
    turns = LineQueue(lambda model: 10, lambda client: 0, lambda: now_s)
    for number in range(100):
        turns.add("a", "b", "m", WaitingLine(number, 1))
    taken = [turns.take() for _ in range(10)]
    assert turns.take() is None and turns.pause_s() is None
    for lane, line in taken:
        turns.put_back(lane, line, 5)
    assert turns.take() is None and turns.pause_s() == 5
    now_s = 5.0
    lane, line = turns.take()
    assert turns.take() is None
    turns.end(lane)
    assert [turns.take() is not None for _ in range(3)] == [True, True, False]


def test_a_removed_batch_begins_nothing():
    """Its lines that run still end."""
    turns = LineQueue(lambda model: 10, lambda client: 0, lambda: 0.0)
    for batch in "xy":
        for number in range(9):
            turns.add("a", batch, "m", WaitingLine(number, 1))
    taken = [turns.take() for _ in range(10)]
    turns.remove("a", "x")
    for lane, line in taken:
        turns.end(lane)
    assert {turns.take()[0].batch for _ in range(4)} == {"y"} and turns.take() is None
    turns.remove("a", "y")
    assert not turns.lanes and not turns.client_turn and turns.pause_s() is None


# the real worker on batches, with real routes and a real database

CHAT = "/v1/chat/completions"


class Place:
    """A server over a store, with pools that the test opens and closes."""

    def __init__(self, url, store, settings):
        self.url, self.store, self.settings = url, store, settings

    async def begun(self, client, model, count, max_tokens=5, n=1):
        """A batch of `count` lines, put into the store; returns its name."""
        def create(connection):
            owner = Owners(self.settings).of_texts(client)
            source = file_rows.create(connection, owner, "in.jsonl", "batch", 1)
            rows = [LineRow(number, json.dumps({
                "custom_id": str(number), "method": "POST", "url": CHAT, "body": {
                    "model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": max_tokens, "n": n}}).encode() + b"\n", str(number), CHAT, model)
                for number in range(1, count + 1)]
            file_rows.add_lines(connection, source.id, rows)
            connection.execute("UPDATE files SET state = 1 WHERE id = ?", (source.id,))
            return batches.create(connection, owner, client, file_rows.file_named(connection, source.name), CHAT, "24h", 1, 1 << 40, None, None).name
        name = await self.store.run(create)
        return name

    async def batch(self, name):
        return await self.store.run(lambda connection: batches.batch_named(connection, name))

    async def until(self, name, reached):
        while not reached(found := await self.batch(name)):
            await asyncio.sleep(0.01)
        return found

    async def lines(self, name):
        return await self.store.run(lambda connection: [text for text, in connection.execute(
            "SELECT text FROM lines WHERE file = ? ORDER BY number", (file_rows.file_named(connection, name).id,))])

    async def get(self, path, key, method="GET"):
        async with aiohttp.ClientSession(self.url) as session:
            async with session.request(method, path, headers={"Authorization": f"Bearer {key}"}) as response:
                return response.status, await response.json()

    async def post(self, path, key):
        return await self.get(path, key, "POST")


@contextlib.asynccontextmanager
async def place_of(path, settings, *pools):
    store = Store(path)
    store.open()
    with access.listen_on("127.0.0.1", 0) as listener:
        app = create_app(Catalogue(settings, *pools), settings, store)
        front = app.on_startup[-1].__self__
        async with connections.serving(app, listener):
            place = Place(f"http://127.0.0.1:{listener.getsockname()[1]}", store, settings)
            place.wake_up, place.memory = front.room(BATCHES).wake_up, front.bodies.intake.budget
            yield place


def pool_called(name, **more):
    pool = FakePool(**more)
    pool.model_name = name
    return pool


def key_called(name, **more):
    return ApiKey.hashed(name, name, **more)


@pytest.mark.parametrize("count", by_day([60, 300], 60))
async def test_waiting_batches_hold_no_other_key_up(tmp_path, count):
    """For a budget, for a queue, for a model that never gets memory: each has many batches of many lines."""
    broke = key_called("broke", tokens_per_day=0, refused=True)
    others = tuple(map(key_called, ("refused", "stuck", "free", "late")))
    settings, names = Settings(keys=(broke, *others)), {}
    held, full = pool_called("held", gate=asyncio.Event()), pool_called("full", refuse=Overloaded("full", retry_after_s=1000))
    async with place_of(tmp_path / "store.db", settings, pool_called("open"), held, full) as place:
        for client, model in (("broke", "open"), ("refused", "full"), ("stuck", "held"), ("free", "open")):
            names[client] = [await place.begun(client, model, count) for _ in range(3)]
        place.wake_up()
        for name in names["free"]:
            assert (await place.until(name, lambda batch: batch.status == "completed")).completed == count
        late = await place.begun("late", "open", 3)
        place.wake_up()
        await place.until(late, lambda batch: batch.status == "completed")
        for client in ("broke", "refused", "stuck"):
            for name in names[client]:
                assert (await place.batch(name))[9:13] == ("in_progress", count, 0, 0)
        assert not any(request.client == "broke" for request in place_requests(held, full)) and held.open <= 8
        # a waiting batch can be cancelled, in each of these ways
        for client in ("broke", "refused", "stuck"):
            status, body = await place.post(f"/v1/batches/{names[client][0]}/cancel", client)
            assert status == 200 and body["status"] in ("cancelling", "cancelled"), body
            await place.until(names[client][0], lambda batch: batch.status == "cancelled")
        # and what can go on again does
        held.gate.set()
        for name in names["stuck"][1:]:
            await place.until(name, lambda batch: batch.status == "completed")
    # after a restart with a budget and a queue with room the others do
    settings = Settings(keys=(key_called("broke", tokens_per_day=10**6, refused=True), *others))
    async with place_of(tmp_path / "store.db", settings, pool_called("open"), pool_called("held"), pool_called("full")) as place:
        for client in ("broke", "refused"):
            for name in names[client][1:]:
                assert (await place.until(name, lambda batch: batch.status == "completed")).completed == count


def place_requests(*pools):
    return [request for pool in pools for request in pool.requests]


async def test_waiting_batches_try_nothing_in_a_loop(tmp_path, monkeypatch):
    reads, line = [], batches.line

    def read(connection, batch, number):
        reads.append(batch.owner)
        return line(connection, batch, number)
    monkeypatch.setattr(batches, "line", read)
    settings = Settings(keys=(key_called("broke", tokens_per_day=0, refused=True), key_called("refused"), key_called("free")))
    full = pool_called("full", refuse=Overloaded("full", retry_after_s=1000))
    async with place_of(tmp_path / "store.db", settings, pool_called("open"), full) as place:
        for _ in range(20):
            await place.begun("broke", "open", 100)
            await place.begun("refused", "full", 100)
        free = await place.begun("free", "open", 500)
        place.wake_up()
        await place.until(free, lambda batch: batch.status == "completed")
    owner_of = Owners(settings).of_texts
    # a lane that is refused has tried with what had a slot; then it rests
    assert owner_of("broke") not in reads and reads.count(owner_of("refused")) <= 20 * 8


@pytest.mark.parametrize("max_tokens, n", [(None, 1), (600, 1), (600, 3)])
async def test_a_batch_passes_a_budget_by_one_answer(tmp_path, max_tokens, n):
    """An answer without max_tokens is not cut in a batch, whose files must not depend on the moment: it gives way, and is asked for again."""
    broke = key_called("broke", tokens_per_day=3000, refused=True)
    pool = pool_called("open", pieces=["a"] * 500)
    async with place_of(tmp_path / "store.db", Settings(keys=(broke,)), pool) as place:
        name = await place.begun("broke", "open", 100, max_tokens, n)
        place.wake_up()
        budget = {"used_today": 0, "reserved": 1}
        while budget["used_today"] < 3000 - (n - 1) * 600 - 7 or budget["reserved"]:
            _, found = await place.get("/v1/usage", "broke")
            budget = found["budget"]
        assert budget["used_today"] < 3000 + 500 and pool.open == 0
        batch = await place.batch(name)
        assert batch.completed * (7 + 500 * n) == budget["used_today"] and batch.failed == 0
        bodies = [json.loads(line)["response"]["body"] for line in await place.lines(batch.output)]
        assert {choice["finish_reason"] for body in bodies for choice in body["choices"]} == {"stop"}


async def test_after_midnight_a_batch_goes_on_by_itself(tmp_path, monkeypatch):
    """It is the batch of a key that has new tokens."""
    clock = SimpleNamespace(time=lambda: 1_700_000_000.0)       # 22:13:20
    monkeypatch.setattr(ledger, "time", clock)
    monkeypatch.setattr(line_queue, "LEAST_REST_S", 0.01)
    monkeypatch.setattr(line_queue, "LONGEST_REST_S", 0.01)
    settings = Settings(keys=(key_called("k", tokens_per_day=55, refused=True), key_called("free")))
    async with place_of(tmp_path / "store.db", settings, pool_called("open")) as place:
        name = await place.begun("k", "open", 10, 3)            # of ten tokens each
        place.wake_up()
        await place.until(name, lambda batch: batch.completed == 5)
        free = await place.begun("free", "open", 100)
        place.wake_up()
        await place.until(free, lambda batch: batch.status == "completed")
        assert (await place.batch(name)).completed == 5
        clock.time = lambda: 1_700_006_400.0
        assert (await place.until(name, lambda batch: batch.status == "completed")).completed == 10


async def test_a_batch_leaves_half_of_the_budget(tmp_path):
    """It leaves half of what is left to the other requests of its key."""
    pool = pool_called("open", gate=asyncio.Event())
    settings = Settings(keys=(key_called("k", tokens_per_day=3000, refused=True),))
    async with place_of(tmp_path / "store.db", settings, pool) as place:
        name = await place.begun("k", "open", 50, 300)
        place.wake_up()
        await pool.until_open(5)        # each takes 307 tokens
        async with aiohttp.ClientSession(place.url, headers={"Authorization": "Bearer k"}) as session:
            body = {"model": "open", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 300}
            asking = asyncio.ensure_future(session.post(CHAT, json=body))
            await pool.until_open(6)
            pool.gate.set()
            assert (await asking).status == 200
        assert (await place.until(name, lambda batch: batch.status == "completed")).completed == 50


async def test_an_answer_fits_whatever_the_others_take(tmp_path):
    """Those that fit alone are asked for again until they do; one that never does is an error each time."""
    settings = Settings(keys=(key_called("k"), key_called("l")))
    fits, large = pool_called("fits", pieces=["a" * 50_000] * 3), pool_called("large", pieces=["a" * 50_000] * 9)
    async with place_of(tmp_path / "store.db", settings, fits, large) as place:
        place.memory.per_client = 200_000        # what one client may hold: two answers of the one kind, none of the other
        names = [await place.begun("k", "fits", 30), await place.begun("k", "large", 3), await place.begun("l", "fits", 30)]
        place.wake_up()
        counts = [(batch.completed, batch.failed) for batch in [await place.until(name, lambda batch: batch.status == "completed") for name in names]]
        assert counts == [(30, 0), (0, 3), (30, 0)] and place.memory.used == 0
