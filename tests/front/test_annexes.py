"""Annexes: rooms that a flag or a request opens, and what they hook into."""

import asyncio
import json
import zlib
from dataclasses import replace

import pytest

from annex_place import Place
from chatlm.common import program
from chatlm.front.annex import Annex
from chatlm.front.annexes.runs.row import RUNS
from chatlm.front.api.errors import OLLAMA
from chatlm.front.server.responses import json_response
from chatlm.front.server.routes import Route
from fake_pool import conversation
from patching import patch

ASKED = conversation("Hello") | {"stream": False}


class Toy:
    """A room of the tests. `did`: what happened to it."""

    def __init__(self, front):
        self.front, self.did = front, ["made"]

    async def start(self):
        self.did.append("started")

    async def close(self):
        self.did.append("closed")

    async def handle_look(self, http):
        return json_response({"did": self.did})

    def prepared(self, parsed):
        self.did.append("prepared")
        return replace(parsed, request=replace(parsed.request, max_tokens=3))

    def around(self, begin, ask):
        self.did.append(f"around {ask.model}, at most {ask.parsed.request.max_tokens}")
        return begin(ask)

    def metric_families(self, families):
        yield families.GaugeMetricFamily("toy_uses", "what it did", len(self.did))


ROWS: tuple[Route[Toy], ...] = (
    Route("GET", "/toy/{id}", OLLAMA, lambda toy, http: toy.handle_look(http), "what it did"),
)
TOY = Annex("toy", lambda: Toy, ROWS, start=lambda toy: toy.start(), close=lambda toy: toy.close())
HOOKED = replace(
    TOY, wanted=lambda front: True, joins=lambda parsed: parsed.kind == "chat",
    prepare=lambda toy, parsed: toy.prepared(parsed), around=lambda toy, begin, ask: toy.around(begin, ask),
    metrics=lambda toy, families: toy.metric_families(families))


async def test_the_first_request_opens_and_starts_a_room():
    async with Place(TOY) as place:
        assert "toy" not in place.front.rooms
        bodies = await asyncio.gather(*(place.get("/toy/1") for _ in range(8)))
        assert {status for status, _ in bodies} == {200}
        assert place.front.rooms["toy"].did == ["made", "started"]
        assert (await place.get("/toy"))[0] == 404 and "toy" in (await place.get("/openapi.json"))[1]
    assert place.front.rooms["toy"].did == ["made", "started", "closed"]


async def test_a_room_that_nobody_asks_for_is_never_made():
    async with Place(TOY) as place:
        assert (await place.get("/health"))[0] == 200
        async with place.client.post(f"{place.url}/toy/1") as response:
            assert response.status == 405 and "error" in await response.json()
    assert set(place.front.rooms) == set()


async def test_a_wanted_annex_has_its_hooks():
    async with Place(HOOKED) as place:
        toy = place.front.rooms["toy"]
        for path in ("/chat/completions", "/v1/chat/completions"):      # it joins the second
            async with place.client.post(place.url + path, json=ASKED) as response:
                assert response.status == 200, await response.text()
        name = place.catalogue.find("", ()).name
        assert toy.did == ["made", "started", "prepared", f"around {name}, at most 3"]
        assert "toy_uses 4.0" in (await place.get("/metrics"))[1]


async def test_hooks_of_an_annex_that_is_not_wanted_do_nothing():
    async with Place(replace(HOOKED, wanted=lambda front: False)) as place:
        async with place.client.post(f"{place.url}/v1/chat/completions", json=ASKED) as response:
            assert response.status == 200
    assert "toy" not in place.front.rooms


@pytest.mark.parametrize("error", [None, ImportError("cannot import name 'x'"), zlib.error("invalid data")])
async def test_a_room_of_another_program_is_not_opened(monkeypatch, error):
    """The files, or the bundle, were replaced while the server runs: what it imports now may not fit."""
    def broken():
        raise error

    annex = replace(TOY, load=broken) if error else TOY
    async with Place(annex) as place:
        with monkeypatch.context() as meanwhile:
            patch(meanwhile, program, "program_stamp", lambda: (0, 0))
            status, text = await place.get("/toy/1")
            assert status == 503 and "the program has changed since this server started: restart" in text
            assert (await place.get("/health"))[0] == 200
        assert (await place.get("/toy/1"))[0] == (500 if error else 200)


async def test_an_open_room_stays_open_though_the_program_changes(monkeypatch):
    async with Place() as place:
        assert json.loads((await place.get("/v1/runs"))[1])["data"] == []
        patch(monkeypatch, program, "program_stamp", lambda: (0, 0))
        assert (await place.get("/v1/runs"))[0] == 200 and RUNS.name in place.front.rooms
        assert (await place.get("/v1/batches"))[0] == 503
