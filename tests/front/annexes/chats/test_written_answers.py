"""Answers that the server writes into chats: nobody need read them."""

import asyncio
import contextlib
import json
import secrets
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from annex_place import Place
from answers import said, thought
from chatlm.common.config import ApiKey, LIMITS, Settings
from chatlm.common.errors import EngineFailure
from chatlm.common.messages.requests import Delta
from chatlm.front.annex import additions_of
from chatlm.front.annexes import ANNEXES
from chatlm.front.annexes.chats import growing, writing
from chatlm.front.annexes.chats.records import checked_patch
from chatlm.front.api.additions import Additions
from chatlm.front.api.encode import Encoder
from chatlm.front.serve import database_of
from chatlm.front.server import recordings
from chatlm.front.store import quota
from fake_pool import FakePool
from left_texts import Asking
from patching import patch
from spoken_paths import BODY_FIELDS

SPACE, OTHER = "A" * 22, "B" * 22
CHAT = "/v1/chat/completions"
CHAT_ID, QUESTION, NODE = (f"{number:032x}" for number in (1, 2, 3))
PLACE = {"id": CHAT_ID, "node": NODE, "parent": QUESTION}
FIXTURES = Path(__file__).parents[3] / "fixtures"
added_to = Additions(additions_of(ANNEXES)).of_route
WORDS = ["one ", "two ", "three ", "four ", "five"]


class Turnstile(asyncio.Semaphore):
    """A gate of FakePool that passes as many pieces as the test says."""

    def __init__(self):
        super().__init__(0)
        self.wait = self.acquire

    def admit(self, count):
        for _ in range(count):
            self.release()


class Devices(Asking):
    """Devices of an owner, each of which asks the server as it likes."""

    async def make_chat(self, who=SPACE, **growing_node):
        node = {"created": 2.0, "conversation": CHAT_ID, "role": "user", "content": "Count"}
        made = [{"kind": "chat", "id": CHAT_ID, "patch": {"created": 1.0, "title": "Numbers"}},
                {"kind": "node", "id": QUESTION, "patch": node}]
        if growing_node:
            answer = {**node, "parent": QUESTION, "role": "assistant", "content": "", **growing_node}
            made.append({"kind": "node", "id": NODE, "patch": answer})
        status, answer = await self(who, "/v1/chats/changes", {"changes": made})
        assert status == 200 and {row["state"] for row in answer["data"]} == {"stored"}, answer

    @asynccontextmanager
    async def answer(self, who=SPACE, place=PLACE, request_id="", **more):
        """A response whose answer the server writes; leaving the block closes the connection."""
        headers = self.headers_of(who) | ({"X-Request-Id": request_id} if request_id else {})
        body = {"messages": [{"role": "user", "content": "Count"}], "stream": True, "chat": place, **more}
        async with self.place.client.post(self.place.url + CHAT, json=body, headers=headers) as response:
            yield response

    async def refused(self, **more):
        async with self.answer(**more) as response:
            return response.status, (await response.json())["error"]

    async def node(self, who=SPACE, name=NODE):
        status, chat = await self(who, f"/v1/chats/{CHAT_ID}")
        assert status == 200, chat
        for node in chat["nodes"]:
            checked_patch("node", node)       # what the server writes fits, as what devices do
        return next((node for node in chat["nodes"] if node["id"] == name), None)

    async def until(self, says, who=SPACE):
        """The node once it is as a test wants it: a device waits for changes."""
        rev = 0
        while True:
            _, page = await self(who, f"/v1/chats/changes?after={rev}&wait=30")
            rev = page["rev"] or rev
            for row in page["data"]:
                if row["id"] == NODE and row["record"] and says(row["record"]):
                    return row["record"]


def has_ended(node):
    return "stream" not in node


def by_space(space):
    return {"X-Chat-Space": space} if space else {}


def by_key(key):
    return {"Authorization": f"Bearer {key}"}


@asynccontextmanager
async def devices(path, *keys, pieces=WORDS, gate=True):
    settings = Settings(keys=keys, database=str(path / "store.db"))
    store = await database_of(settings, ANNEXES)
    pool = FakePool(pieces)
    if gate:
        pool.gate = Turnstile()
    async with Place(pool=pool, settings=settings, store=store) as place:
        asking = Devices(place, by_key if keys else by_space)
        asking.pool, asking.store = pool, store
        yield asking
        if gate:
            pool.gate.admit(1000)


async def first_event(response):
    while not (await response.content.readline()).startswith(b"data: "):
        pass


async def test_the_answer_is_in_the_chat_though_its_client_has_left(tmp_path, monkeypatch):
    patch(monkeypatch, recordings, "GRACE_S", 0)
    async with devices(tmp_path) as ask:
        await ask.make_chat()
        async with ask.answer() as response:
            assert response.status == 200
            await first_event(response)
        ask.pool.gate.admit(len(WORDS))
        node = await ask.until(has_ended)
        assert (node["content"], node["role"], node["parent"]) == ("".join(WORDS), "assistant", QUESTION)
        assert node["ids"] == [1] * len(WORDS) and node["timings"]["finish_reason"] == "stop"
        assert node["model"] == "fake-model" and node["ended"] and "note" not in node
        _, chat = await ask(SPACE, f"/v1/chats/{CHAT_ID}")
        assert len(chat["nodes"]) == 2 and chat["updated"] > 1


@pytest.mark.parametrize("left_after", range(len(WORDS) + 1))
async def test_it_is_there_once_wherever_its_client_left(tmp_path, left_after):
    async with devices(tmp_path) as ask:
        await ask.make_chat()
        async with ask.answer() as response:
            ask.pool.gate.admit(left_after)
            for _ in range(left_after):
                await first_event(response)
        ask.pool.gate.admit(len(WORDS))
        assert (await ask.until(has_ended))["content"] == "".join(WORDS)


async def test_another_device_sees_it_grow_and_reads_on_where_the_node_ends(tmp_path, monkeypatch):
    patch(monkeypatch, writing, "GROWN_S", 0.0)
    async with devices(tmp_path) as ask:
        await ask.make_chat()
        async with ask.answer() as response:
            await first_event(response)
        ask.pool.gate.admit(3)
        node = await ask.until(lambda node: "two" in node["content"])
        stream = node["stream"]
        async with ask.place.client.get(f"{ask.place.url}/v1/streams/{stream['id']}?from={stream['next']}") as response:
            ask.pool.gate.admit(2)
            frames = [json.loads(line[6:]) for line in (await response.text()).split("\n")
                      if line.startswith("data: {")]
        said = "".join(frame["choices"][0]["delta"].get("content", "") for frame in frames if frame["choices"])
        assert node["content"] + said == "".join(WORDS)


async def test_an_answer_that_goes_on_grows_in_its_node(tmp_path):
    """With what it had, and the figures of both parts together; nobody need read it."""
    earlier = {"prompt_tokens": 9, "completion_tokens": 3, "tokens_per_second": 10.0, "ttft_ms": 50.0, "cached_tokens": 0}
    async with devices(tmp_path) as ask:
        stream = secrets.token_hex(16)
        await ask.make_chat(content="zero ", reasoning="Hm.", ids=[7, 8, 9], timings=earlier, ended="first",
                            calculator=[{"start": 1, "expression": "1", "result": "1"}])
        _, told = await ask(SPACE, "/v1/chats/changes", {"changes": [{"kind": "node", "id": NODE, "base": 99, "patch": {
            "content": "zero ", "ended": "first", "timings": None, "earlier": earlier, "continued": True,
            "stream": {"id": stream, "next": 0, "begin": 5}}}]})
        assert told["data"][0]["state"] == "stored"
        async with ask.answer(request_id=stream, continue_final_message=True, add_generation_prompt=False, messages=[
                {"role": "user", "content": "Count"}, {"role": "assistant", "content": "zero "}]) as response:
            assert response.status == 200, await response.text()
            await first_event(response)
        ask.pool.gate.admit(len(WORDS))
        node = await ask.until(has_ended)
        assert node["content"] == "zero " + "".join(WORDS) and node["reasoning"] == "Hm."
        assert node["ids"] == [7, 8, 9] + [1] * len(WORDS) and node["calculator"][0]["start"] == 1
        timings = node["timings"]
        assert timings["completion_tokens"] == 3 + len(WORDS) and timings["ttft_ms"] == 50.0 and "earlier" not in node
        assert timings["prompt_tokens"] >= 1 and timings["finish_reason"] == "stop"


async def test_further_answers_are_siblings(tmp_path):
    async with devices(tmp_path, gate=False) as ask:
        await ask.make_chat()
        async with ask.answer(n=3) as response:
            assert response.status == 200, await response.text()
            await response.read()
        await ask.until(has_ended)
        _, chat = await ask(SPACE, f"/v1/chats/{CHAT_ID}")
        made = [node for node in chat["nodes"] if node["role"] == "assistant"]
        assert [node["content"] for node in made] == ["".join(WORDS)] * 3
        assert {node["parent"] for node in made} == {QUESTION} and made[0]["id"] == NODE and len({node["id"] for node in made}) == 3
        assert all(node["timings"]["completion_tokens"] == len(WORDS) and "stream" not in node for node in made)


async def test_another_device_may_stop_it(tmp_path):
    async with devices(tmp_path) as ask:
        await ask.make_chat()
        async with ask.answer() as response:
            ask.pool.gate.admit(2)
            for _ in range(2):
                await first_event(response)
            stream = (await ask.node())["stream"]["id"]
            assert (await ask(SPACE, f"/v1/cancel/{stream}", method="POST"))[0] == 200
        node = await ask.until(has_ended)
        assert node["note"] == "stopped" and "".join(WORDS).startswith(node["content"])


async def test_keys_of_one_owner_follow_and_stop_it_and_no_other_key(tmp_path):
    keys = [ApiKey.hashed(name * 20, name, owner=owner) for name, owner in (("a", "ann"), ("b", "ann"), ("c", "bob"))]
    async with devices(tmp_path, *keys) as ask:
        await ask.make_chat("a" * 20)
        async with ask.answer("a" * 20) as response:
            await first_event(response)
        stream = (await ask.node("b" * 20))["stream"]["id"]
        assert (await ask("c" * 20, f"/v1/chats/{CHAT_ID}"))[0] == 404
        assert (await ask("c" * 20, f"/v1/cancel/{stream}", method="POST"))[0] == 404
        assert (await ask("c" * 20, f"/v1/streams/{stream}"))[0] == 404
        async with ask.place.client.get(f"{ask.place.url}/v1/streams/{stream}", headers=by_key("b" * 20)) as response:
            assert response.status == 200
        assert (await ask("b" * 20, f"/v1/cancel/{stream}", method="POST"))[0] == 200
        assert (await ask.until(has_ended, "b" * 20))["note"] == "stopped"


async def test_an_answer_without_a_chat_still_ends_when_its_client_leaves(tmp_path, monkeypatch):
    async with devices(tmp_path) as ask:
        async with ask.answer(place=None) as response:
            await first_event(response)
        await ask.pool.until_open(0)


async def test_where_it_cannot_be_written_it_is_refused(tmp_path):
    async with devices(tmp_path, gate=False) as ask:
        await ask.make_chat()
        for place, param in (({"id": NODE}, "chat.id"), ({"parent": NODE}, "chat.parent")):
            status, error = await ask.refused(place=PLACE | place)
            assert (status, error["code"], error["param"]) == (404, "not_found", param)
        status, error = await ask.refused(who=OTHER)
        assert (status, error["param"]) == (404, "chat.id")
        status, error = await ask.refused(who="")
        assert (status, error["code"]) == (400, "missing_space")
        status, error = await ask.refused(place=PLACE | {"node": QUESTION})
        assert (status, error["code"]) == (409, "other_node")
        for more, param in (({"place": {"id": CHAT_ID}}, "chat"), ({"place": PLACE | {"node": "x"}}, "chat.node"),
                            ({"place": "x"}, "chat"), ({"stream": False}, "chat"),
                            ({"request_id": "guessed"}, "X-Request-Id")):
            status, error = await ask.refused(**more)
            assert (status, error["param"]) == (400, param), error
        assert await ask.node() is None and ask.pool.open == 0


async def test_two_devices_do_not_answer_into_one_node(tmp_path):
    async with devices(tmp_path) as ask:
        first, second = secrets.token_hex(16), secrets.token_hex(16)
        await ask.make_chat(stream={"id": first, "next": 0})
        status, error = await ask.refused(request_id=second)
        assert (status, error["code"]) == (409, "other_answer")
        async with ask.answer(request_id=first) as response:
            assert response.status == 200
            status, error = await ask.refused(request_id=second)
            assert (status, error["code"]) == (409, "other_answer")
        ask.pool.gate.admit(len(WORDS))
        assert (await ask.until(has_ended))["content"] == "".join(WORDS)
        status, error = await ask.refused(request_id=first)
        assert (status, error["code"]) == (409, "other_answer")


async def test_of_two_who_say_how_it_ended_the_one_with_more_text_counts(tmp_path):
    """A page that lost its connection, and a server that wrote on; and the other way round."""
    async with devices(tmp_path) as ask:
        stream = secrets.token_hex(16)
        await ask.make_chat(stream={"id": stream, "next": 0})
        async with ask.answer(request_id=stream) as response:
            await first_event(response)
        short = {"content": "one ", "stream": None, "ended": stream, "note": "interrupted", "thought": 7}
        sent = {"changes": [{"kind": "node", "id": NODE, "base": 0, "patch": short}]}
        await ask(SPACE, "/v1/chats/changes", sent)
        assert (await ask.node())["content"] == "one "
        ask.pool.gate.admit(len(WORDS))
        node = await ask.until(lambda node: len(node["content"]) > 4)
        assert node["content"] == "".join(WORDS) and node["thought"] == 7 and "note" not in node
        _, answer = await ask(SPACE, "/v1/chats/changes", sent)
        assert answer["data"][0]["state"] == "stored" and answer["data"][0]["record"]["content"] == "".join(WORDS)
        _, chat = await ask(SPACE, f"/v1/chats/{CHAT_ID}")
        assert len(chat["nodes"]) == 2


async def test_an_answer_that_fails_says_why(tmp_path):
    async with devices(tmp_path, pieces=["one ", EngineFailure("the worker has died")], gate=False) as ask:
        await ask.make_chat()
        async with ask.answer() as response:
            await response.read()
        node = await ask.until(has_ended)
        assert (node["content"], node["error"], node["remedy"]) == ("one ", "the worker has died", "again")


async def test_a_chat_that_is_deleted_meanwhile_stays_so_and_its_answer_ends(tmp_path):
    async with devices(tmp_path) as ask:
        await ask.make_chat()
        async with ask.answer() as response:
            ask.pool.gate.admit(1)
            await first_event(response)
            assert (await ask(SPACE, f"/v1/chats/{CHAT_ID}", method="DELETE"))[0] == 200
            ask.pool.gate.admit(2)
            await ask.pool.until_open(0)
        assert (await ask(SPACE, f"/v1/chats/{CHAT_ID}"))[0] == 404
        assert await ask.store.run(lambda db: db.execute("SELECT * FROM chat_answers").fetchall()) == []


async def test_without_room_its_node_says_so_and_it_needs_a_reader(tmp_path, monkeypatch):
    patch(monkeypatch, writing, "GROWN_S", 0.0)
    async with devices(tmp_path) as ask:
        await ask.make_chat()
        async with ask.answer() as response:
            ask.pool.gate.admit(1)
            await first_event(response)
        await ask.until(lambda node: node["content"])
        held = await ask.store.run(lambda db: quota.held_bytes(db, "@127.0.0.1") + db.execute(
            "SELECT SUM(bytes) FROM holdings").fetchone()[0])
        with limited(held):
            ask.pool.gate.admit(3)
            await ask.pool.until_open(0)
            node = await ask.until(has_ended)
        assert node["error"].startswith("the server could not keep the rest") and "".join(WORDS[:4]).startswith(node["content"])


@contextlib.contextmanager
def limited(size):
    before = LIMITS.kept_bytes
    object.__setattr__(LIMITS, "kept_bytes", size)
    try:
        yield
    finally:
        object.__setattr__(LIMITS, "kept_bytes", before)


async def test_a_server_that_ends_notes_that_it_was_cut(tmp_path):
    async with devices(tmp_path) as ask:
        await ask.make_chat()
        async with ask.answer() as response:
            ask.pool.gate.admit(2)
            for _ in range(2):
                await first_event(response)
        await ask.place.front.recordings.close()
        node = await ask.until(has_ended)
        assert node["note"] == "interrupted" and node["content"].startswith("one ")


async def test_the_next_server_notes_what_a_killed_one_was_writing(tmp_path):
    async with devices(tmp_path) as ask:
        await ask.make_chat()
        place = growing.WrittenPlace(*await owner_of(ask), CHAT_ID, NODE, QUESTION, "c" * 32)
        await ask.store.run(lambda db: growing.begin(db, place, {"created": 3.0}, 5))
        await ask.store.run(lambda db: growing.write(db, place, {"content": "one ", "stream": {"id": "c" * 32, "next": 2}}, 5))
    async with devices(tmp_path) as ask:
        node = await ask.node()
        assert (node["content"], node["note"], node["ended"]) == ("one ", "interrupted", "c" * 32)
        assert has_ended(node)


async def owner_of(ask):
    [row] = await ask.store.run(lambda db: db.execute("SELECT DISTINCT owner FROM chat_records").fetchall())
    return row[0], "127.0.0.1"


# Every API that streams may have `chat`: what is stored is what was streamed.

THOUGHT_AND_SAID = (thought("Hm. "), "one ", thought("Or "), thought("two?"), "two ", Delta("calculator", '{"expression": "1+1", "result": "2"}'))
CALLED = (Delta("call", "", "look"), Delta("call", '{"a": '), Delta("call", "1}"), Delta("call", "{}", "listen"))
COUNT = {"messages": [{"role": "user", "content": "Count"}]}
STREAMED = {path: COUNT for path in ("/chat/completions", "/v1/chat/completions", "/api/v0/chat/completions", "/api/chat")} | {
    "/v1/responses": {"input": "Count"}, "/v1/messages": {**COUNT, "thinking": {"type": "enabled", "budget_tokens": 2000}}}


def read_stream(events):
    """(text, reasoning, [[id without its prefix, name, arguments]]) as a client of any API reads them."""
    text, reasoning, calls = "", "", {}
    for event in events:
        if "message" in event and "done" in event:  # Ollama's: its calls come whole, and have no ids
            text += event["message"]["content"]
            reasoning += event["message"].get("thinking", "")
            for call in event["message"].get("tool_calls", ()):
                calls[len(calls)] = ["", call["function"]["name"], json.dumps(call["function"]["arguments"])]
            continue
        delta = event["choices"][0]["delta"] if event.get("choices") else {}
        said = event.get("delta", {})
        said = {"text": said} if isinstance(said, str) else said
        kind = event.get("type", "")
        text += event.get("token", "") or delta.get("content", "") or (
            said.get("text", "") if kind in ("response.output_text.delta", "content_block_delta") else "")
        reasoning += event.get("reasoning", "") or delta.get("reasoning", "") or said.get("thinking", "") or (
            said.get("text", "") if kind == "response.reasoning_text.delta" else "")
        for call in delta.get("tool_calls", ()):
            calls.setdefault(call["index"], [call.get("id"), call["function"].get("name"), ""])[2] += call["function"]["arguments"]
        block = event.get("item", event.get("content_block", {}))
        if kind in ("response.output_item.added", "content_block_start") and block["type"] in ("function_call", "tool_use"):
            calls[event.get("output_index", event.get("index"))] = [block.get("call_id", block["id"]), block["name"], ""]
        if kind in ("response.function_call_arguments.delta", "content_block_delta"):
            added = said.get("partial_json") or (said.get("text", "") if kind != "content_block_delta" else "")
            if added:
                calls[event.get("output_index", event.get("index"))][2] += added
    return text, reasoning, [[name.split("_")[-1], *more] for name, *more in calls.values()]


@pytest.fixture
def encoders(monkeypatch):
    """All that are made."""
    made = []
    init = Encoder.__init__
    monkeypatch.setattr(Encoder, "__init__", lambda encoder, *arguments: made.append(encoder) or init(encoder, *arguments))
    return made


@pytest.mark.parametrize("path", [path for path in BODY_FIELDS if path in STREAMED or "chat" in {field.name for field in added_to(path)}])
async def test_what_is_stored_is_what_was_streamed(tmp_path, path, encoders):
    pieces = [said(each, tokens=(1,)) for each in THOUGHT_AND_SAID] + [said(*THOUGHT_AND_SAID, tokens=(1, 1))]
    with_calls = path != "/chat/completions"  # it shows none
    pieces += [said(each, tokens=(1,)) for each in CALLED] if with_calls else []
    async with devices(tmp_path, pieces=pieces, gate=False) as ask:
        await ask.make_chat()
        body = {**STREAMED[path], "chat": PLACE, **({} if path == "/chat/completions" else {"stream": True})}
        async with ask.place.client.post(ask.place.url + path, json=body, headers=ask.headers_of(SPACE)) as response:
            assert response.status == 200, await response.text()
            streamed = await response.text()
            stream_type = response.headers["Content-Type"]
        node = await ask.until(has_ended)
        url = f"{ask.place.url}/v1/streams/{node['ended']}"
        async with ask.place.client.get(f"{url}?from=2", headers=ask.headers_of(SPACE)) as response:
            rest = await response.text()
            assert response.headers["Content-Type"] == stream_type
    is_ndjson = stream_type == "application/x-ndjson"
    assert streamed.endswith(rest) and streamed.removesuffix(rest).count("\n" if is_ndjson else "\n\n") == 2
    frames = [json.loads(line.removeprefix("data: ")) for line in streamed.split("\n") if line.startswith(("data: {", "{"))]
    stored = [["" if is_ndjson else call["id"].split("_")[-1], call["name"], call["arguments"]] for call in node.get("calls", ())]
    assert (node["content"], node["reasoning"], stored) == read_stream(frames)
    assert node["content"] == "one two one two " and node["reasoning"] == "Hm. Or two?" * 2
    assert [call[1:] for call in stored] == ([["look", '{"a": 1}'], ["listen", "{}"]] if with_calls else [])
    assert [call["start"] for call in node["calculator"]] == [8, 16]
    assert node["ids"] == [1] * (8 + 4 * with_calls) and node["timings"]["completion_tokens"] == len(pieces)
    assert len(encoders) == 1, "one is made for each response"


async def test_the_node_of_a_response_that_is_kept_has_its_id(tmp_path, encoders):
    """A device made the node for its X-Request-Id, but what is kept gets an id of its own."""
    async with devices(tmp_path, gate=False) as ask:
        stream = secrets.token_hex(16)
        await ask.make_chat(stream={"id": stream, "next": 0})
        body = {"input": "Count", "stream": True, "store": True, "chat": PLACE}
        headers = {**ask.headers_of(SPACE), "X-Request-Id": stream}
        for status in (200, 409):  # then the node has another answer
            async with ask.place.client.post(ask.place.url + "/v1/responses", json=body, headers=headers) as response:
                assert response.status == status, await response.text()
                await response.read()
                name = response.headers["X-Request-Id"]
                if status == 200:
                    node = await ask.until(has_ended)
                    assert node["ended"] == name != stream and node["response"] == f"resp_{name}" and node["content"] == "".join(WORDS)
        assert len(encoders) == 2, "one for each request"
        status, kept = await ask(SPACE, f"/v1/responses/{node['response']}")
        assert status == 200 and kept["output"][0]["content"][0]["text"] == node["content"]
        body = {"messages": [{"role": "user", "content": "Count"}], "stream": True, "chat": PLACE}
        await ask(SPACE, "/v1/chats/changes", {"changes": [{"kind": "node", "id": NODE, "base": 0, "patch": {"stream": {"id": "c" * 32, "next": 0}, "ended": None}}]})
        async with ask.answer(request_id="c" * 32) as response:
            assert response.status == 200, await response.text()
            await response.read()
        assert "response" not in await ask.until(lambda node: node.get("ended") == "c" * 32), "this answer is not kept"


def test_the_page_and_the_server_say_the_same_of_an_answer_that_went_on():
    """The page reads the same file: tests/page/test_page_behaviour.py."""
    for case in json.loads((FIXTURES / "whole_answers.json").read_text()):
        assert growing.whole_of(case["earlier"], case["later"]) == case["whole"]
