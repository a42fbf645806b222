"""The table of dialects, and a further one: a file and a row."""

import asyncio
import json
import os
import re
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

import toy_dialect
import toy_row
from annex_place import Place
from chatlm.common import config, program
from chatlm.common.config import ApiKey, Settings
from chatlm.common.errors import RequestError
from chatlm.front.api import spoken
from chatlm.front.api.additions import AddedField
from chatlm.front.api.spoken import DIALECTS, all_paths, fields_of, path_of_form, rows_by_path
from chatlm.front.api.tables import PARAMS_NAMES, REQUEST_NAMES
from fake_pool import FakePool
from patching import patch
from real_server import SCRIPT, post, server
from toy_annex import FREE, WORDS

LARGE = "x" * 100_000
SUPPORT = Path(toy_row.__file__).parent


@pytest.fixture
def toy(monkeypatch):
    """The toy's row, in a program that speaks it too."""
    row = toy_row.toy_row()
    monkeypatch.setattr(spoken, "DIALECTS", (*DIALECTS, row))
    rows_by_path.cache_clear()
    yield row
    monkeypatch.undo()
    rows_by_path.cache_clear()


async def asked(place, path, body, method="POST"):
    """(status, type, text) of a response."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with place.client.request(method, place.url + path, data=data) as response:
        return response.status, response.content_type, await response.text()


# the table

@pytest.mark.parametrize("row", DIALECTS, ids=lambda row: next(iter(row.places)))
def test_a_row_has_the_paths_of_its_dialect(row):
    assert {*row.places} == {*row.dialect.forms}
    for place in row.places.values():
        assert place.with_model in ("", *all_paths())


def test_no_path_is_of_two_dialects():
    paths = [path for row in DIALECTS for path in row.places]
    assert len(paths) == len(set(paths)) == len(all_paths())


@pytest.mark.parametrize("path", all_paths())
def test_a_field_that_fills_a_request_has_a_name_that_it_has(path):
    for field in fields_of(path):
        names = {"": (field.means or field.name,), "params": PARAMS_NAMES, "request": REQUEST_NAMES}
        assert (field.means or field.name) in names[field.fills], field.name


def test_a_body_with_a_model_counts_as_one_of_another_api():
    assert path_of_form("/chat/completions", names_model=True) == "/v1/chat/completions"
    for path in all_paths():
        assert path_of_form(path, names_model=False) == path
        assert path_of_form(path, names_model=True) == path or path == "/chat/completions"
    assert path_of_form("/extract", names_model=True) == "/extract"        # no dialect reads it


# a further dialect

async def test_a_toy_answers_and_streams(toy):
    async with Place() as place:
        assert await asked(place, "/toy/say", {"say": "Hi"}) == (
            200, "application/json", '{"model": "fake-model", "said": "Hello, world!"}')
        assert await asked(place, "/toy/say", {"say": "Hi", "lines": True, "loud": True}) == (
            200, "text/x-toy", '+"HELLO"\n+", "\n+"WORLD!"\n.stop\n')
        assert await asked(place, "/toy/count", {"say": "four"}) == (
            200, "application/json", '{"tokens": 4}')
        assert await asked(place, "/toy/say/", {"say": "Hi", "zz": LARGE, "most": 7}) == (
            200, "application/json", '{"model": "fake-model", "said": "Hello, world!"}')
        requests = place.pool.requests
        assert [each.max_tokens for each in requests] == [None, None, 7]
        tasks = [task[1] for task in place.pool.sandboxes["bodies"].tasks]
        assert tasks == ["open", "read"]                        # the large one alone


async def test_a_toy_names_what_has_no_effect(toy):
    async with Place() as place:
        _, headers, _ = await place.post("/toy/say", {"say": "Hi", "loud": True, "zz": 1, "lines": None})
        assert headers["X-Ignored-Fields"] == "zz, loud"
        _, headers, _ = await place.post("/toy/say", {"say": "Hi", "loud": True, "lines": True})
        assert "X-Ignored-Fields" not in headers


@pytest.mark.parametrize("body, about, words", [
    ({}, "say", "say is missing"), ({"say": 3}, "say", "say must be a string, not 3"),
    ({"say": "Hi", "most": 100}, "most", "most must be an integer from 1 to 99, not 100"),
    ({"say": "Hi", "who": "nobody"}, "model", "The model `nobody` does not exist"),
    ({"say": "Hi", "most": 100, "zz": LARGE}, "most", "most must be an integer from 1 to 99, not 100"),
    (b"{", None, "the body is not valid JSON"), (b"[]", None, "the body must be a JSON object"),
    (b'{"say": "' + b"x" * (33 << 20) + b'"}', None, "Request entity too large")])
async def test_a_toy_refuses_in_its_own_words(toy, body, about, words):
    async with Place() as place:
        status, _, text = await asked(place, "/toy/say", body)
        said = json.loads(text)
        assert status in (400, 404, 413) and said["oops"].startswith(words) and said["about"] == about
        assert said.keys() == {"oops", "about", "id"} and not place.pool.requests


async def test_what_is_not_there_is_refused_in_a_toy_s_words(toy):
    async with Place() as place:
        for method, path, status in (("GET", "/toy/say", 405), ("PUT", "/toy/count", 405),
                                     ("POST", "/toy/nothing", 404), ("GET", "/toy", 404)):
            got, _, text = await asked(place, path, b"", method)
            assert got == status and path in json.loads(text)["oops"]


async def test_a_key_is_asked_for_in_a_toy_s_words(toy):
    async with Place(settings=Settings(keys=(ApiKey.hashed("secret", "me"),))) as place:
        status, _, text = await asked(place, "/toy/say", {"say": "Hi"})
        assert status == 401 and "API key" in json.loads(text)["oops"]


@pytest.mark.parametrize("pieces, last", [
    (("a", RequestError("the toy broke")), '!"the toy broke"\n'), (("a", "b"), ".stop\n")])
async def test_a_silent_stream_of_a_toy_is_kept_alive(toy, monkeypatch, pieces, last):
    patch(monkeypatch, config, "PING_S", 0.01)
    gate = asyncio.Event()
    async with Place(pool=FakePool(pieces, gate=gate)) as place:
        async with place.client.post(f"{place.url}/toy/say", json={"say": "Hi", "lines": True}) as response:
            assert await response.content.readexactly(4) == b"~\n~\n"
            gate.set()
            text = (await response.content.read()).decode()
    assert [line for line in text.splitlines(True) if line != "~\n"][0] == '+"a"\n' and text.endswith(last)


async def test_a_toy_is_described(toy):
    async with Place() as place:
        described = json.loads((await place.get("/openapi.json"))[1])["paths"]
    operation = described["/toy/say"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert operation["summary"] == "the toy's answer" and schema["required"] == ["say"]
    assert [*schema["properties"]] == [field.name for field in toy_dialect.TOY_FIELDS]
    assert "/toy/count" in described and "/v1/messages" in described


async def test_an_annex_adds_a_field_to_a_toy_s_bodies(toy):
    annex = replace(FREE, fields=(AddedField(WORDS, ("/toy/say",)),))
    async with Place(annex) as place:
        for more in ({}, {"zz": LARGE}):
            assert (await place.post("/toy/say", {"say": "Hi", "toy": "Be nice"} | more))[0] == 200
            assert place.sent[-1] == [("system", "Be nice"), ("user", "Hi")]
        status, _, body = await place.post("/v1/completions", {"prompt": "Hi", "toy": "Be nice"})
        assert status == 400 and "/v1/completions has no such field, unlike /toy/say" in str(body)
        described = json.loads((await place.get("/openapi.json"))[1])["paths"]
    assert "words that the toy puts" in json.dumps(described["/toy/say"])
    assert "words that the toy puts" not in json.dumps(described["/v1/completions"])


def test_two_dialects_cannot_have_one_path(toy, monkeypatch):
    monkeypatch.setattr(spoken, "DIALECTS", (*spoken.DIALECTS, toy_row.toy_row()))
    with pytest.raises(ValueError, match="two rows are the route POST /toy/say"):
        Place()


@pytest.mark.skipif(sys.platform != "linux", reason="as for other real servers with a sitecustomize")
def test_a_real_server_and_its_sandbox_speak_a_toy(default_model_path, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import toy_row\ntoy_row.speak_toy()\n")
    paths = os.pathsep.join(map(str, (tmp_path, SCRIPT.parent, SUPPORT)))
    # the default model, whose answers always have words
    with server(default_model_path, env=os.environ | {"PYTHONPATH": paths}) as (_, url):
        for more in ({}, {"zz": LARGE}):
            answer = json.load(post(url + "/toy/say", {"say": "Hello", "most": 3} | more))
            assert answer.keys() == {"model", "said"} and answer["said"]
        lines = post(url + "/toy/say", {"say": "Hello", "most": 3, "lines": True}).read().decode()
        assert re.fullmatch(r'(\+".+"\n)+\.length\n', lines)
        described = json.load(urllib.request.urlopen(url + "/openapi.json", timeout=60))
        assert "/toy/say" in described["paths"]
