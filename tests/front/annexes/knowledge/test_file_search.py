"""`file_search` in Responses: what the model asks for is searched, shown, cited, kept and limited. The model
is scripted; stores are searched by their words."""

import asyncio
import json
import sqlite3
from contextlib import closing

import pytest

import knowledge_rows as rows
from annex_place import Place
from chatlm.common.config import Settings
from chatlm.common.errors import RequestError
from chatlm.front.annex import additions_of
from chatlm.front.annexes import ANNEXES
from chatlm.front.annexes.knowledge.file_search import NOTHING, NOTHING_ELSE, NO_ROOM
from chatlm.front.api.additions import Additions, Asked
from chatlm.front.serve import database_of
from chatlm.front.tools.rules import NOT_SHOWN, TOO_MANY
from scripted_pool import ScriptedPool
from tool_rounds import calls

RESPONSES = "/v1/responses"
PUMP = "Prime the pump with a litre of water."
VALVE = "The valve opens at nine bar."
SEARCHED = calls(("knowledge__file_search", {"queries": ["pump"]}))
LARGE = "x" * 100_000
ME = "@127.0.0.1"


class Stores(Place):
    """A server whose model is scripted, with a store of two passages in one file."""

    def __init__(self, pool, settings, store):
        super().__init__(pool=pool, settings=settings, store=store)
        self.path = settings.database
        self.store, self.file = self.made([(PUMP, []), (VALVE, [])], filename="pump.md")

    def made(self, passages, owner=ME, **more):
        """The ids of a new store and of its file."""
        number = rows.add_store(self.path, owner=owner)
        file, _ = rows.add_file(self.path, number, passages, **more)
        with closing(sqlite3.connect(self.path)) as connection:
            [[store]] = connection.execute("SELECT id FROM knowledge_stores WHERE number = ?", (number,))
            [[file]] = connection.execute("SELECT file FROM knowledge_files WHERE number = ?", (file,))
        return store, file

    def tool(self, *stores, **more):
        return {"type": "file_search", "vector_store_ids": [*stores] or [self.store], **more}

    async def ask(self, text="How is the pump primed?", tool=None, **more):
        status, headers, body = await self.post(
            RESPONSES, {"input": text, "tools": [tool or self.tool()], **more})
        assert status == 200, body
        return body

    async def refused(self, status, **more):
        code, _, body = await self.post(RESPONSES, {"input": "x", **more})
        assert code == status, body
        return body["error"]

    async def events(self, **more):
        _, _, text = await self.post(RESPONSES, {
            "input": "How is the pump primed?", "tools": [self.tool()], "stream": True, **more})
        return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


@pytest.fixture
async def serve(tmp_path):
    opened = []

    async def start(*texts, native=True, **more):
        settings = Settings(database=str(tmp_path / f"{len(opened)}.db"), **more)
        pool = ScriptedPool(*texts)
        pool.tokenizer.native_tools = native
        place = Stores(pool, settings, await database_of(settings, ANNEXES))
        opened.append(await place.__aenter__())
        return place
    yield start
    for place in opened:
        await place.__aexit__(None, None, None)


def kinds(body):
    return [item["type"] for item in body["output"]]


def result(place, request=-1):
    """What the model was told of its last call."""
    return [content for role, content in place.sent[request] if role == "tool"][-1]


@pytest.mark.parametrize("padding", ["", LARGE])
async def test_the_model_asks_reads_and_cites(serve, padding):
    place = await serve(SEARCHED, "With a litre [1].")
    body = await place.ask(padding=padding)
    assert kinds(body) == ["file_search_call", "message"]
    call, message = body["output"]
    assert call == {"id": call["id"], "type": "file_search_call", "status": "completed", "queries": ["pump"],
                    "results": None}
    assert call["id"].startswith("fs_") and body["tools"] == [place.tool()]
    assert message["content"][0]["annotations"] == [
        {"type": "file_citation", "file_id": place.file, "filename": "pump.md", "index": 13, "passage": 1}]
    assert f"[1] pump.md\n{PUMP}" in result(place) and VALVE not in result(place)
    [function] = [tool["function"] for tool in place.pool.requests[0].tools]
    assert function["name"] == "knowledge__file_search"


async def test_results_are_in_the_item_if_they_are_asked_for(serve):
    place = await serve(SEARCHED, "[1]")
    status, headers, body = await place.post(RESPONSES, {
        "input": "x", "tools": [place.tool()], "include": ["file_search_call.results", "a.b"]})
    [found] = body["output"][0]["results"]
    assert headers["X-Ignored-Fields"] == "include.a.b"
    assert (found["file_id"], found["filename"], found["text"], found["attributes"]) == (
        place.file, "pump.md", PUMP, {})
    assert 0 <= found["score"] <= 1


async def test_the_events_are_openais(serve):
    place = await serve(SEARCHED, "Water [1], [9] and [1].")
    events = await place.events()
    item = events[-1]["response"]["output"][0]
    of_call = [event for event in events if event.get("output_index") == 0]
    assert [event["type"] for event in of_call] == [
        "response.output_item.added", "response.file_search_call.in_progress",
        "response.file_search_call.searching", "response.file_search_call.completed",
        "response.output_item.done"]
    assert of_call[0]["item"] == {**item, "status": "in_progress", "queries": []}
    assert all(event["item_id"] == item["id"] for event in of_call[1:4]) and of_call[-1]["item"] == item
    added = [event for event in events if event["type"] == "response.output_text.annotation.added"]
    content = events[-1]["response"]["output"][1]["content"][0]
    assert [event["annotation"] for event in added] == content["annotations"]
    members = "annotation_index", "content_index", "output_index"
    assert [tuple(event[name] for name in members) for event in added] == [(0, 0, 1), (1, 0, 1)]
    assert [content["text"][each["index"]:][:3] for each in content["annotations"]] == ["[1]", "[1]"]
    assert [event["sequence_number"] for event in events] == [*range(len(events))]


async def test_a_later_search_goes_on_with_numbers_and_gives_nothing_twice(serve):
    again = calls(("knowledge__file_search", {"queries": ["pump", "valve"]}))
    place = await serve(SEARCHED, again, "Both [1] [2].")
    body = await place.ask(include=["file_search_call.results"])
    assert kinds(body) == ["file_search_call", "file_search_call", "message"]
    assert [[each["text"] for each in item["results"]] for item in body["output"][:2]] == [[PUMP], [VALVE]]
    assert f"[2] pump.md\n{VALVE}" in result(place)
    assert [each["passage"] for each in body["output"][2]["content"][0]["annotations"]] == [1, 2]


async def test_calls_of_one_turn_are_numbered_in_their_order(serve):
    both = calls(("knowledge__file_search", {"queries": ["valve"]}),
                 ("knowledge__file_search", {"queries": ["pump"]}))
    place = await serve(both, "[2]")
    body = await place.ask()
    told = [content for role, content in place.sent[1] if role == "tool"]
    assert f"[1] pump.md\n{VALVE}" in told[0] and f"[2] pump.md\n{PUMP}" in told[1]
    assert body["output"][-1]["content"][0]["annotations"][0]["passage"] == 2


async def test_there_are_three_rounds_of_searches(serve):
    texts = [calls(("knowledge__file_search", {"queries": [word]})) for word in ("pump", "valve", "moon")]
    place = await serve(*texts, "I know enough.")
    body = await place.ask()
    assert kinds(body) == ["file_search_call"] * 3 + ["message"]
    # the last round reads all of it before the question, and sees no calls that it might imitate
    [(role, asked)] = place.sent[3]
    assert PUMP in asked and VALVE in asked and NOTHING_ELSE not in asked
    assert asked.endswith("Question: How is the pump primed?")
    assert [bool(request.tools) for request in place.pool.requests] == [True, True, True, False]


async def test_functions_of_the_body_can_be_called_after_three_searches(serve):
    texts = [calls(("knowledge__file_search", {"queries": [word]})) for word in ("a", "b", "c", "d")]
    function = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    place = await serve(*texts, calls(("f", {})))
    status, _, body = await place.post(RESPONSES, {"input": "x", "tools": [place.tool(), function]})
    assert kinds(body) == ["file_search_call"] * 4 + ["function_call"]
    assert body["output"][3]["status"] == "failed" and result(place) == TOO_MANY


async def test_a_call_of_a_function_beside_a_search_is_the_clients(serve):
    function = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    place = await serve(SEARCHED + "\n" + calls(("f", {})), "Done [1].")
    status, _, body = await place.post(RESPONSES, {"input": "x", "tools": [place.tool(), function]})
    assert sorted(kinds(body)) == ["file_search_call", "function_call"] and len(place.pool.requests) == 1
    again = [{"role": "user", "content": "x"}, *body["output"],
             {"type": "function_call_output", "call_id": body["output"][-1]["call_id"], "output": "7"}]
    status, _, body = await place.post(RESPONSES, {"input": again, "tools": [place.tool(), function]})
    assert status == 200 and ("tool", NOT_SHOWN) in place.sent[1] and ("tool", "7") in place.sent[1]


# before the model is asked

def question(place, request=0):
    [*_, (role, content)] = place.sent[request]
    assert role == "user"
    return content


@pytest.mark.parametrize("choice", [{"type": "file_search"}, "required", {
    "type": "allowed_tools", "mode": "required", "tools": [{"type": "file_search"}]}])
async def test_a_choice_of_it_has_the_server_search_first(serve, choice):
    place = await serve("Like this [1].")
    body = await place.ask(tool_choice=choice)
    assert kinds(body) == ["file_search_call", "message"]
    assert body["output"][0]["queries"] == ["How is the pump primed?"] and len(place.pool.requests) == 1
    assert PUMP in question(place) and question(place).endswith("\n\nQuestion: How is the pump primed?")
    assert body["output"][1]["content"][0]["annotations"][0]["index"] == 10
    assert place.pool.requests[0].tools and not place.pool.requests[0].params.grammar


async def test_a_model_that_never_learned_to_call_has_it_searched_first(serve):
    place = await serve("Like this [1].", native=False)
    body = await place.ask()
    assert kinds(body) == ["file_search_call", "message"] and PUMP in question(place)
    assert not place.pool.requests[0].tools
    events = await place.events()
    assert [event["type"] for event in events][2:7] == [
        "response.output_item.added", "response.file_search_call.in_progress",
        "response.file_search_call.searching", "response.file_search_call.completed",
        "response.output_item.done"]
    assert "annotations" in str(await place.ask(tool_choice="none")) and PUMP not in question(place, -1)


async def test_a_question_that_follows_is_searched_with_the_one_before(serve):
    place = await serve("Yes.", native=False)
    said = [{"role": "user", "content": "Tell me of the pump."}, {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": "How is it primed?"}]
    body = await place.ask(said)
    assert body["output"][0]["queries"] == ["How is it primed?", "How is it primed?\nTell me of the pump."]


async def test_functions_of_the_body_stay_with_a_model_that_never_learned(serve):
    function = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    place = await serve(calls(("f", {})), native=False)
    for choice in "auto", {"type": "function", "name": "f"}:
        _, _, body = await place.post(RESPONSES, {
            "input": "pump", "tools": [place.tool(), function], "tool_choice": choice})
        assert [tool["function"]["name"] for tool in place.pool.requests[-1].tools] == ["f"]
        assert kinds(body)[-1] == "function_call" and kinds(body)[:-1] == ["file_search_call"] * (
            choice == "auto")


async def test_without_a_question_nothing_is_searched(serve):
    place = await serve("Hm.", native=False)
    assert kinds(await place.ask([{"role": "system", "content": "x"}])) == ["message"]


# earlier calls

async def test_a_kept_response_goes_on_with_its_searches(serve):
    place = await serve(SEARCHED, "First [1].", SEARCHED, "Second [1].", "Third.")
    first = await place.ask()
    assert (await place.get(f"{RESPONSES}/{first['id']}"))[1].count("file_search_call") == 1
    second = await place.ask("And then?", previous_response_id=first["id"],
                             include=["file_search_call.results"])
    assert [content for role, content in place.sent[2] if role == "tool"] == [NOT_SHOWN]
    assert second["output"][-1]["content"][0]["annotations"][0]["passage"] == 1
    await place.ask("And?", previous_response_id=second["id"])
    assert [content for role, content in place.sent[-1] if role == "tool"] == [
        NOT_SHOWN, f"pump.md\n{PUMP}"]     # what the item has, the model reads again
    status, text = await place.get(f"{RESPONSES}/{second['id']}/input_items")
    listed = json.loads(text)["data"]
    assert status == 200 and [each["type"] for each in listed if each["type"] != "message"] == [
        "file_search_call"]


async def test_items_that_are_sent_back_are_read_and_kept(serve):
    place = await serve(SEARCHED, "First [1].", "Second.", "Third.")
    first = await place.ask(store=False)
    items = [{"role": "user", "content": "x"}, *first["output"], {"role": "user", "content": "y"}]
    second = await place.ask(items)
    assert [role for role, _ in place.sent[-1]] == ["user", "assistant", "tool", "assistant", "user"]
    third = await place.ask("z", previous_response_id=second["id"])
    assert [role for role, _ in place.sent[-1]][:5] == ["user", "assistant", "tool", "assistant", "user"]
    assert third["status"] == "completed"
    for odd in ({"queries": None}, {"queries": [1, {}]}, {"results": "x"}, {"results": [1, {"text": 2}]},
                {"id": 7}):
        assert await place.ask([{**first["output"][0], **odd}, {"role": "user", "content": "x"}])


async def test_without_the_tool_earlier_searches_are_left_out(serve):
    place = await serve(SEARCHED, "First [1].", "Second.")
    first = await place.ask()
    status, headers, _ = await place.post(RESPONSES, {
        "input": [first["output"][0], {"role": "user", "content": "x"}]})
    assert status == 200 and headers["X-Ignored-Tools"] == "file_search_call"
    assert place.sent[-1] == [("user", "x")]
    assert (await place.post(RESPONSES, {"input": "y", "previous_response_id": first["id"]}))[0] == 200


# what is refused

async def test_wrong_entries_are_named(serve):
    place = await serve("x")
    other, _ = place.made([("x", [])], owner="key of another")
    unknown = "vs_" + "0" * 16
    said = []
    for name in (other, unknown):
        error = await place.refused(404, tools=[place.tool(place.store, name)])
        assert error["param"] == "tools[0].vector_store_ids[1]"
        said.append(error["message"].replace(name, ""))
    assert said[0] == said[1]
    for entry, words in (
            ({"vector_store_ids": []}, "tools[0].vector_store_ids must be a list of 1 to 8 ids"),
            ({"vector_store_ids": None}, "tools[0].vector_store_ids is missing"),
            ({"max_num_results": 51}, "tools[0].max_num_results must be an integer from 1 to 50, not 51"),
            ({"max_num_results": 0}, "tools[0].max_num_results"),
            ({"filters": {"type": "is"}}, "tools[0].filters.type must be one of eq"),
            ({"filters": []}, "tools[0].filters must be an object"),
            ({"ranking_options": {"score_threshold": 2}}, "tools[0].ranking_options must be"),
            ({"ranking_options": {"hybrid_search": {"text_weight": 1}}}, "hybrid_search")):
        error = await place.refused(400, tools=[place.tool(**entry)])
        assert words in error["message"], error
    error = await place.refused(400, tools=[place.tool(), place.tool()])
    assert error["param"] == "tools[1]" and "second entry of the type file_search" in error["message"]
    error = await place.refused(400, tools=[place.tool()], n=2)
    assert error["param"] == "n" and not place.pool.requests


async def test_an_expired_store_is_refused(serve):
    place = await serve("x")
    with closing(sqlite3.connect(place.path)) as connection, connection:
        connection.execute("UPDATE knowledge_stores SET expired = 1")
    assert (await place.refused(400, tools=[place.tool()]))["code"] == "expired"


async def test_what_its_options_say_holds(serve):
    place = await serve(SEARCHED, "x")
    passages = [(f"pump {number}", []) for number in range(3)]
    passages += [(f"moon {number}", []) for number in range(30)]
    store, _ = place.made(passages, attributes={"year": 1999}, filename="old.md")
    for more, count in (({}, 3), ({"max_num_results": 2}, 2), ({"filters": {
            "type": "eq", "key": "year", "value": 2000}}, 0), ({"filters": {
                "type": "lt", "key": "year", "value": 2000}}, 3),
            ({"ranking_options": {"score_threshold": 1.0}}, 0),
            ({"ranking_options": {"hybrid_search": {"embedding_weight": 1, "text_weight": 0}}}, 0)):
        place.pool.texts = [SEARCHED, "x"]
        body = await place.ask(tool=place.tool(store, **more), include=["file_search_call.results"])
        assert len(body["output"][0]["results"]) == count, more
    assert result(place) == NOTHING


# what goes wrong meanwhile

@pytest.mark.parametrize("arguments", [
    {}, {"queries": []}, {"queries": [" "]}, {"queries": 7}, {"queries": [{}]}])
async def test_a_call_without_queries_has_failed(serve, arguments):
    place = await serve(calls(("knowledge__file_search", arguments)), "Sorry.")
    body = await place.ask()
    assert (body["output"][0]["status"], body["output"][0]["queries"]) == ("failed", [])
    assert "queries must be a list" in result(place) and body["status"] == "completed"


async def test_a_store_that_is_deleted_between_rounds_is_not_searched(serve):
    valve = calls(("knowledge__file_search", {"queries": ["valve"]}))
    place = await serve(SEARCHED, valve, "Gone.")
    other, _ = place.made([("A valve of the other store.", [])], filename="other.md")
    place.pool.gate = asyncio.Event()
    asked = [asyncio.ensure_future(place.ask(tool=place.tool(*stores)))
             for stores in ((place.store, other),)]
    await place.pool.until_open(1)
    assert (await place.client.delete(f"{place.url}/v1/vector_stores/{place.store}")).status == 200
    place.pool.gate.set()
    body = await asked[0]
    assert [item.get("status") for item in body["output"]] == ["completed"] * 3
    assert "A valve of the other store." in result(place) and PUMP not in str(place.sent)


async def test_with_no_store_left_the_search_has_failed(serve):
    place = await serve(SEARCHED, "Gone.")
    place.pool.gate = asyncio.Event()
    asked = asyncio.ensure_future(place.events())
    await place.pool.until_open(1)
    await place.client.delete(f"{place.url}/v1/vector_stores/{place.store}")
    place.pool.gate.set()
    events = await asked
    done = events[-1]["response"]
    assert (done["output"][0]["status"], done["output"][0]["queries"], done["status"]) == (
        "failed", ["pump"], "completed")
    assert result(place) == f'there is no vector store "{place.store}".'
    assert "response.file_search_call.completed" not in [event["type"] for event in events]


async def test_a_client_that_leaves_ends_its_search(serve, monkeypatch):
    place = await serve(SEARCHED, "x")
    begun, ended = asyncio.Event(), asyncio.Event()
    knowledge = await place.front.opened(next(annex for annex in ANNEXES if annex.name == "knowledge"))

    async def hang(*arguments):
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
    monkeypatch.setattr(knowledge.search, "find", hang)
    asked = asyncio.ensure_future(place.ask())
    await asyncio.wait_for(begun.wait(), 20)
    asked.cancel()
    await asyncio.wait_for(ended.wait(), 20)
    place.pool.texts = ["Still here."]
    assert (await place.ask())["status"] == "completed"


async def test_passages_take_a_quarter_of_the_context_over_all_calls(serve):
    """A letter is a token here, of 4,096."""
    place = await serve(SEARCHED, calls(("knowledge__file_search", {"queries": ["pump 2", "pump"]})),
                        calls(("knowledge__file_search", {"queries": ["pump 3", "pump"]})), "x")
    store, _ = place.made([(f"pump {number} " + "y" * 350, []) for number in range(8)] + [("z", [])] * 30)
    body = await place.ask(tool=place.tool(store), include=["file_search_call.results"])
    found = [len(item["results"]) for item in body["output"][:3]]
    told = [content for role, content in place.sent[2] if role == "tool"]
    assert found == [2, 0, 0] and told[1:] == [NO_ROOM] and len(told[0]) < 1024


async def test_a_message_may_have_it_too(serve):
    place = await serve(SEARCHED, "With water [1].")
    status, _, body = await place.post("/v1/messages", {
        "max_tokens": 50, "messages": [{"role": "user", "content": "x"}], "tools": [place.tool()]})
    assert status == 200 and [block["type"] for block in body["content"]] == [
        "mcp_tool_use", "mcp_tool_result", "text"]
    assert PUMP in str(body["content"][1])


async def test_elsewhere_it_is_left_out_and_named(serve):
    place = await serve("x")
    for path in ("/v1/chat/completions",):
        status, headers, _ = await place.post(path, {
            "messages": [{"role": "user", "content": "x"}], "tools": [place.tool()], "stream": False})
        assert status == 200 and headers["X-Ignored-Tools"] == "file_search"


def test_a_line_of_a_batch_cannot_have_it():
    additions = Additions(additions_of(ANNEXES, ANNEXES))
    entry = {"type": "file_search", "vector_store_ids": ["vs_1"]}
    with pytest.raises(RequestError, match="a batch can't run tools"):
        additions.read(RESPONSES, Asked({}, [(0, entry)]), in_batch=True)


async def test_what_a_client_puts_back_is_kept(serve):
    """A search with its results, and a message with its citations: into a conversation, and as the input of a response, with and without the tool."""
    place = await serve(SEARCHED, "With a litre [1].", "Yes.", "Yes.")
    made = (await place.ask(include=["file_search_call.results"]))["output"]
    assert made[0]["results"] and made[1]["content"][0]["annotations"]
    _, _, talk = await place.post("/v1/conversations", {"items": made})
    _, listed = await place.get(f"/v1/conversations/{talk['id']}/items?order=asc")
    assert json.loads(listed)["data"] == made
    for tools in ([], [place.tool()]):
        status, _, body = await place.post(RESPONSES, {"input": [*made, {"role": "user", "content": "Sure?"}], "tools": tools})
        assert status == 200, body
        _, listed = await place.get(f"/v1/responses/{body['id']}/input_items?order=asc")
        kept = json.loads(listed)["data"][:2]
        assert [item | {"id": 0} for item in kept] == [item | {"id": 0} for item in made]
        assert (f"[1] pump.md\n{PUMP}" in str(place.sent[-1])) is False and ("litre [1]" in str(place.sent[-1]))
        assert (PUMP in str(place.sent[-1])) is bool(tools)
