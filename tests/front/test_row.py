"""The row of an annex is large enough: a toy uses fields, prompts, tools, tables and a command of its own."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import urllib.request
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

import toy_annex
from annex_place import Place
from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError
from chatlm.front.annex import Annex
from chatlm.front.annexes import ANNEXES
from chatlm.front.annexes.batches.row import BATCHES
from chatlm.front.api.additions import AddedField
from chatlm.front.api.field_types import TEXT
from chatlm.front.api.fields import Field
from chatlm.front.front import routes_with
from chatlm.front.pool.pool import make_pool
from chatlm.front.server.describe import openapi_document
from chatlm.front.store import quota
from chatlm.front.store.store import open_store
from fake_pool import conversation
from pools import tiny_settings
from real_server import post, server
from scripted_pool import ScriptedPool
from tool_rounds import calls
from toy_annex import FREE, TOY

ASKED = conversation("Hello") | {"stream": False}
RESPONSES = "/v1/responses"
CHAT = "/v1/chat/completions"
LARGE = "x" * 100_000         # a body with it is read in a sandbox
CALL = calls(("toy__echo", {"text": "ab"}))
TOOL = {"type": "echo", "times": 2}


# fields

@pytest.mark.parametrize("path", ["/chat/completions", CHAT, "/api/v0/chat/completions"])
@pytest.mark.parametrize("more", [{}, {"padding": LARGE}])
async def test_a_field_changes_the_prompt_of_bodies_that_have_it(path, more):
    async with Place(FREE) as place:
        status, headers, _ = await place.post(path, ASKED | more | {"toy": "Be brief."})
        assert status == 200 and "toy" not in headers.get("X-Ignored-Fields", "")
        assert place.sent == [[("system", "Be brief."), ("user", "Hello")]]
        assert place.pool.requests[0].max_tokens == 3
        assert place.front.rooms["toy"].did[:4] == ["made", "started", f"prompted of {path}", "prepared"]


@pytest.mark.parametrize("padding", ["", LARGE])
async def test_other_bodies_stay_as_they_are(padding):
    async with Place(FREE) as place:
        for more in ({}, {"toy": None}):
            assert (await place.post(CHAT, ASKED | {"padding": padding, **more}))[0] == 200
        for request in place.pool.requests:
            assert (request.prompt_ids is None) is (padding == "")       # a sandbox rendered the other
        assert place.front.rooms["toy"].did == ["made", "started"]


async def refused(place, path, body, wanted=400):
    status, _, answer = await place.post(path, body)
    assert status == wanted and not place.pool.requests, answer
    return str(answer)


@pytest.mark.parametrize("padding", ["", LARGE])
async def test_a_field_is_refused_where_it_does_not_apply(padding):
    async with Place(FREE) as place:
        for path, body in {
                "/v1/completions": {"prompt": "Hello"}, "/v1/messages": ASKED | {"max_tokens": 2},
                "/v1/embeddings": {"input": "Hello"}, "/api/chat": ASKED, "/tokenize": {"content": "Hello"},
                "/v1/messages/count_tokens": ASKED, "/v1/compare": ASKED | {"models": ["a", "b"]}}.items():
            words = await refused(place, path, body | {"toy": "Hi", "padding": padding})
            assert f"toy must be left out: {path} has no such field, unlike /chat/completions, " in words
            assert "toy" in words


async def test_a_field_of_an_annex_that_is_not_wanted_names_its_flag():
    async with Place(TOY) as place:
        words = await refused(place, CHAT, ASKED | {"toy": "Hi"}, 404)
        assert "toy must be left out: the server was started without --database" in words


async def test_a_field_is_checked_like_any_other():
    many = {"toy": "y" * 70_000}
    async with Place(FREE) as place:
        for path, body in ((CHAT, ASKED), ("/chat/completions", ASKED | {"padding": LARGE})):
            assert "toy must be a string, not 7" in await refused(place, path, body | {"toy": 7})
            words = await refused(place, path, body | many)
            assert "bytes of toy: 70017 given, at most 65536 allowed" in words
            assert "the toy does not say this" in await refused(place, path, body | {"toy": "unwanted"})


async def test_the_description_has_the_fields_of_annexes_too():
    paths = openapi_document(routes_with((*ANNEXES, TOY)), Settings())["paths"]
    fields = {path: next(iter(one.values())).get("requestBody", {}) for path, one in paths.items()}
    having = {path for path, body in fields.items() if '"toy"' in json.dumps(body)}
    assert having == {"/chat/completions", CHAT, "/api/v0/chat/completions", RESPONSES}
    async with Place(FREE) as place:
        assert json.loads((await place.get("/openapi.json"))[1])["paths"].keys() == paths.keys()


# tools

def after_call(place):
    """What the model is shown in the second round."""
    return [(role, content) for role, content in place.sent[1] if role == "tool"]


async def test_the_server_runs_a_tool_of_an_annex_for_a_response():
    async with Place(FREE, pool=ScriptedPool(CALL, "Done.")) as place:
        status, headers, body = await place.post(RESPONSES, {"input": "Say ab", "tools": [TOOL]})
        assert status == 200 and "X-Ignored-Tools" not in headers, body
        assert [item["type"] for item in body["output"]] == ["mcp_call", "message"]
        call = body["output"][0]
        assert (call["server_label"], call["name"], call["output"]) == ("toy", "echo", "abab")
        assert body["tools"] == [TOOL] and after_call(place) == [("tool", "abab")]
        [function] = [tool["function"] for tool in place.pool.requests[0].tools]
        assert (function["name"], function["description"]) == ("toy__echo", "Say it.")
        again = [{"role": "user", "content": "Say ab"}, *body["output"],
                 {"role": "user", "content": "And now?"}]
        status, _, body = await place.post(RESPONSES, {"input": again, "tools": [TOOL]})
        assert status == 200 and place.sent[2][2] == ("tool", "abab"), body


@pytest.mark.parametrize("padding", ["", LARGE])
async def test_the_server_runs_it_for_a_message_too(padding):
    asked = conversation("Say ab") | {"max_tokens": 100, "tools": [TOOL], "padding": padding}
    async with Place(FREE, pool=ScriptedPool(CALL, "Done.")) as place:
        status, headers, body = await place.post("/v1/messages", asked)
        assert status == 200 and "X-Ignored-Tools" not in headers, body
        assert [block["type"] for block in body["content"]] == ["mcp_tool_use", "mcp_tool_result", "text"]
        assert after_call(place) == [("tool", "abab")]
        _, counted = await place.get("/metrics")
        assert 'chat_server_tool_calls_total{outcome="ok",server="toy"} 1.0' in counted and "toy_uses" in counted
        _, _, with_tool = await place.post("/v1/messages/count_tokens", asked)
        _, _, without = await place.post("/v1/messages/count_tokens", asked | {"tools": []})
        assert with_tool["input_tokens"] >= without["input_tokens"]


async def test_what_a_tool_refuses_is_a_result():
    pool = ScriptedPool(calls(("toy__echo", {"text": "unsaid"})), "Done.")
    async with Place(FREE, pool=pool) as place:
        _, _, body = await place.post(RESPONSES, {"input": "Say it", "tools": [TOOL]})
        assert "The toy can't say that." in str(body["output"][0]) and body["status"] == "completed"


async def test_members_of_an_entry_are_checked():
    async with Place(FREE, pool=ScriptedPool(CALL)) as place:
        for path, body in ((RESPONSES, {"input": "Hi"}), ("/v1/messages", ASKED | {"max_tokens": 9})):
            words = await refused(place, path, body | {"tools": [{"type": "echo", "times": 9}]})
            assert "tools[0].times must be an integer from 1 to 3, not 9" in words


@pytest.mark.parametrize("annex, path", [(TOY, RESPONSES), (FREE, CHAT)])
async def test_elsewhere_its_type_is_ignored_and_named(annex, path):
    async with Place(annex, pool=ScriptedPool("Done.")) as place:
        status, headers, body = await place.post(
            path, ASKED | {"input": "Hi", "tools": [TOOL], "messages": ASKED["messages"]})
        assert status == 200 and headers["X-Ignored-Tools"] == "echo", body
        assert not place.pool.requests[0].tools


# a part of the worker's engine

TOY_WORKER = sys.executable, str(Path(toy_annex.__file__).with_name("toy_worker.py"))


@pytest.fixture
async def counting(nanochat_fixtures, started, monkeypatch):
    """A place whose workers have the part that the annex names."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    pool = await started(make_pool(tiny_settings(nanochat_fixtures), worker_command=TOY_WORKER))
    async with Place(FREE, pool=pool) as place:
        yield place


@pytest.mark.parametrize("more", [{}, {"padding": LARGE}, {"n": 2}])
async def test_a_field_reaches_the_part_of_the_engine_that_its_annex_names(counting, more):
    """What the part says reaches what watches the answer, and nobody else."""
    toy = await counting.front.opened(FREE)
    assert (await counting.post(CHAT, ASKED))[0] == 200 and not toy.counts
    status, _, body = await counting.post(CHAT, ASKED | more | {"toy": "Hi", "ignore_eos": True})
    assert status == 200 and "counter" not in str(body), body
    for choice in range(more.get("n", 1)):
        counts = [count for part, of, words, count in toy.counts if of == choice]
        assert counts == sorted(counts) and counts[-1] == 3     # the toy prepares answers of three tokens
    assert {(part, words) for part, _, words, _ in toy.counts} == {("counter", "Hi")}


async def test_what_a_part_refuses_is_said_to_the_client(counting):
    status, _, body = await counting.post(CHAT, ASKED | {"toy": "uncounted"})
    assert status == 500 and "the counter does not count this" in str(body)
    assert (await counting.post(CHAT, ASKED | {"toy": "Hi"}))[0] == 200


async def test_a_worker_without_the_part_says_so(nanochat_fixtures, started):
    pool = await started(make_pool(tiny_settings(nanochat_fixtures)))
    async with Place(FREE, pool=pool) as place:
        status, _, body = await place.post(CHAT, ASKED | {"toy": "Hi"})
        assert status == 500 and "this worker's engine has no part counter" in str(body)


# tables

def open_with(folder, tables):
    return open_store(Settings(database=str(folder / "a.db")), {"toy": tables})


async def test_tables_of_an_annex_come_step_by_step_and_count_for_their_owner(tmp_path):
    first, second = TOY.tables()
    add = "INSERT INTO toys (owner, text) VALUES ('ann', 'four')"
    store = await open_with(tmp_path, [first])
    await store.run(lambda db: db.execute(add))
    await store.close()
    store = await open_with(tmp_path, [first, second])
    assert await store.run(lambda db: quota.held_bytes(db, "ann")) == 516
    await store.run(lambda db: db.execute(add))
    assert await store.run(lambda db: quota.held_bytes(db, "ann")) == 2 * 516
    await store.run(lambda db: db.execute("DELETE FROM toys"))
    assert await store.run(lambda db: quota.held_bytes(db, "ann")) == 0
    await store.close()


async def test_a_newer_database_of_an_annex_is_left_as_it_is(tmp_path):
    await (await open_with(tmp_path, TOY.tables())).close()
    for known in (TOY.tables()[:1], ()):
        with pytest.raises(ConfigError, match="newer chat_server has made its tables of toy .version 2, this"):
            await open_with(tmp_path, known)
    await (await open_with(tmp_path, TOY.tables())).close()


async def test_a_step_that_fails_leaves_the_steps_before_it(tmp_path):
    first, _ = TOY.tables()
    with pytest.raises(ConfigError, match="no such table: nowhere"):
        await open_with(tmp_path, [first, "INSERT INTO nowhere VALUES (1);"])
    with closing(sqlite3.connect(tmp_path / "a.db")) as database:
        assert database.execute("SELECT annex, version FROM versions").fetchall() == [("toy", 1)]
        database.execute("SELECT * FROM toys")


# rows that cannot be

def joining(name, *forms, required=False):
    return replace(FREE, fields=(AddedField(Field(name, TEXT, "x", required=required), forms),))


OTHER = replace(FREE, name="other", routes=(), fields=(), tools=())


@pytest.mark.parametrize("annexes, why", [
    ([joining("toy", "/v1/nowhere")], "the field toy joins /v1/nowhere, which is no kind of body"),
    ([joining("messages", CHAT)], "the field messages joins /v1/chat/completions, which has a field of this"),
    ([joining("toy", CHAT, required=True)], "the field toy must not be required"),
    ([FREE, replace(OTHER, fields=FREE.fields)], "the field toy joins /chat/completions, which has a field of"),
    ([FREE, replace(OTHER, tools=FREE.tools)], "two annexes run tools of one type, among echo"),
    ([FREE, FREE], "two annexes are called toy"),
    ([FREE, replace(OTHER, routes=FREE.routes)], "two rows are the route GET /toy"),
    ([Annex("x", BATCHES.load, BATCHES.routes)], "two rows are the route POST /v1/batches"),
])
def test_a_row_that_cannot_be_is_refused_at_the_start(annexes, why):
    with pytest.raises(ValueError, match=why):
        [route.fields for route in Place(*annexes).front.routes]  # some is said where a dialect is asked


async def test_a_room_of_no_table_is_not_opened():
    async with Place() as place:
        with pytest.raises(ValueError, match="the annex toy is not among those of this server: batches, "):
            place.front.room(TOY)
        with pytest.raises(ValueError, match="the annex toy is not among"):
            await place.front.opened(TOY)


# all of it, in processes of its own

SCRIPT = Path(toy_annex.__file__)


@pytest.fixture
def environment():
    folders = [str(SCRIPT.parent), str(Path(__file__).resolve().parents[2])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(folders)}


def test_a_command_of_an_annex_runs(environment):
    def run(*words):
        return subprocess.run([sys.executable, str(SCRIPT), *words], env=environment, capture_output=True,
                              text=True, timeout=120)

    done = run("toy", "some", "words")
    assert (done.returncode, done.stdout) == (0, "some\nwords\n"), done.stderr
    done = run("toy")
    assert done.returncode == 2 and "chat_server: toy: WORDS are missing" in done.stderr


def test_a_real_server_runs_the_toy(nanochat_fixtures, environment, tmp_path):
    database = tmp_path / "a.db"
    words = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    for time in (1, 2):
        flags = "--database", database
        with server(nanochat_fixtures / "gen5", *flags, script=SCRIPT, env=environment) as (process, url):
            counts = [json.load(post(url + CHAT, words | more))["usage"]["prompt_tokens"]
                      for more in ({}, {"toy": "Be brief."}, {"toy": "Be brief.", "ignored": LARGE})]
            assert counts[0] != counts[1] == counts[2]    # it replaces the model's usual words
            shown = json.load(urllib.request.urlopen(url + "/toy", timeout=60))
            assert [text for _, text in shown["kept"]] == ["Be brief."] * 2 * time
            process.send_signal(signal.SIGTERM)
            process.wait(30)
    with closing(sqlite3.connect(database)) as connection, closing(sqlite3.connect(":memory:")) as copy:
        connection.backup(copy)
        assert copy.execute("SELECT COUNT(*) FROM toys").fetchone() == (4,)
