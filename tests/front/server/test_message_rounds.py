"""The server's own loop of tools in Messages, over a scripted model and real tool servers: blocks, pauses and what is refused."""

import aiohttp
import pytest

import fake_http_tools
import fake_tools
from chatlm.common.config import ApiKey
from chatlm.common.errors import EngineFailure, RequestError
from fake_pool import serving
from scripted_pool import ScriptedPool
from tool_rounds import calls, tool_place

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
HI = [{"role": "user", "content": "2 + 3?"}]
SERVER = {"type": "url", "name": "fake", "url": ""}
OWN = {"name": "mine", "input_schema": {"type": "object", "properties": {}}}
ADD = calls(("fake__add", {"a": 2, "b": 3}))
PICK = calls(("fake__pick", {"word": "red"}))
# of one call and the words after it, as Anthropic's server sends them
RECORDED = [("message_start",), ("content_block_start", 0, "mcp_tool_use"), ("content_block_delta", 0, "input_json_delta"), ("content_block_stop", 0),
            ("content_block_start", 1, "mcp_tool_result"), ("content_block_stop", 1), ("content_block_start", 2, "text"),
            ("content_block_delta", 2, "text_delta"), ("content_block_stop", 2), ("message_delta",), ("message_stop",)]


@pytest.fixture
def place(tmp_path):
    return lambda *texts, **more: tool_place(tmp_path, *texts, **more)


def asking(messages=HI, servers=(SERVER,), **more):
    return {"messages": messages, "max_tokens": 100, "mcp_servers": [*servers], **more}


async def asked(at, *arguments, **more):
    """The message with which the server answers."""
    status, _, body = await at.post(MESSAGES, asking(*arguments, **more))
    assert status == 200, body
    return body


async def refused(at, body, path=MESSAGES, **headers):
    """(status, words) of an error."""
    status, _, answer = await at.post(path, body, **headers)
    assert answer["type"] == "error", answer
    return status, answer["error"]["message"]


def order(events):
    """The types of events, each with its block, and without repeated deltas."""
    found = []
    for event in events:
        inner = event.get("content_block") or event.get("delta") or {}
        shape = (event["type"], event["index"], inner["type"]) if "type" in inner else (event["type"], event["index"]) if "index" in event else (event["type"],)
        if event["type"] != "ping" and (not found or found[-1] != shape):
            found.append(shape)
    return found


def used(message):
    """(tokens of prompts, tokens written)."""
    usage = message["usage"]
    return usage["input_tokens"] + usage["cache_read_input_tokens"], usage["output_tokens"]


def kinds(message):
    return [block["type"] for block in message["content"]]


# rounds

async def test_events_come_in_the_recorded_order(place):
    async with place(ADD, "It is five.") as at:
        events = await at.events_of(MESSAGES, asking())
    assert order(events) == RECORDED
    begun = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    name = begun[0]["id"]
    assert name.startswith("mcptoolu_") and begun[0] == {"type": "mcp_tool_use", "id": name, "name": "add", "server_name": "fake", "input": {}}
    assert begun[1] == {"type": "mcp_tool_result", "tool_use_id": name, "is_error": False, "content": [{"type": "text", "text": "5"}]}
    written = "".join(event["delta"].get("partial_json", "") for event in events if event["type"] == "content_block_delta")
    assert written == '{"a": 2, "b": 3}' and at.called == [["add", {"a": 2, "b": 3}]]
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert used(events[0]["message"]) == (7, 0) and used(events[-2]) == (14, 2)  # of both rounds


async def test_a_whole_answer_has_the_same_blocks(place):
    async with place("Let me see." + ADD, "It is five.") as at:
        answer = await asked(at)
    assert kinds(answer) == ["text", "mcp_tool_use", "mcp_tool_result", "text"] and answer["content"][1]["input"] == {"a": 2, "b": 3}
    assert answer["content"][1]["id"] == answer["content"][2]["tool_use_id"] and answer["stop_reason"] == "end_turn"
    assert used(answer) == (14, 2)
    assert at.sent == [[("user", "2 + 3?")], [("user", "2 + 3?"), ("assistant", "Let me see."), ("tool", "5")]]


async def test_results_follow_the_calls_of_their_round(place):
    async with place(calls(("fake__add", {"a": 2, "b": 3}), ("fake__wrong", {}), ("fake__pick", {"word": "red"})), "Done.") as at:
        answer = await asked(at)
    uses, results = answer["content"][:3], answer["content"][3:6]
    assert kinds(answer) == ["mcp_tool_use"] * 3 + ["mcp_tool_result"] * 3 + ["text"] and [use["id"] for use in uses] == [one["tool_use_id"] for one in results]
    assert [(one["is_error"], one["content"][0]["text"]) for one in results] == [(False, "5"), (True, "it went wrong"), (False, "picked red")]


async def test_what_comes_back_is_what_the_model_has_seen(place):
    """The blocks of an answer, in the next turn, are its rounds again."""
    async with place("Let me see." + ADD, PICK, "It is five.") as at:
        answer = await asked(at)
        await asked(at, [*HI, {"role": "assistant", "content": answer["content"]}, {"role": "user", "content": "Thanks."}])
        seen, later = (request.messages for request in at.pool.requests[2:])
        assert [(one.role, one.content) for one in later] == [*at.sent[2], ("assistant", "It is five."), ("user", "Thanks.")]
        for before, after in zip(seen, later):
            assert [call["function"] for call in (before.more or {}).get("tool_calls", ())] == [call["function"] for call in (after.more or {}).get("tool_calls", ())]
        # also without the servers: they are the model's memory
        await asked(at, [*HI, {"role": "assistant", "content": answer["content"]}, {"role": "user", "content": "Thanks."}], [])
    assert at.sent[4] == at.sent[3] and len(at.called) == 2


async def test_a_long_answer_pauses_and_goes_on(place):
    async with place(ADD, PICK, "It is five.", tool_rounds=2) as at:
        answer = await asked(at, stop_sequences=["pause"])
        assert answer["stop_reason"] == "pause_turn" and kinds(answer) == ["mcp_tool_use", "mcp_tool_result"] * 2 and answer["stop_sequence"] is None
        rest = await asked(at, [*HI, {"role": "assistant", "content": answer["content"]}])
    assert rest["content"] == [{"type": "text", "text": "It is five."}] and rest["stop_reason"] == "end_turn"
    assert at.sent[2] == [("user", "2 + 3?"), ("assistant", ""), ("tool", "5"), ("assistant", ""), ("tool", "picked red")]
    assert not at.pool.requests[2].template_options.get("continue_final_message") and len(at.called) == 2


async def test_a_call_is_required_in_the_first_round_only(place):
    for choice in {"type": "any"}, {"type": "tool", "name": "add"}, {"type": "tool", "name": "fake__add"}:
        async with place(ADD, "It is five.") as at:
            await asked(at, tool_choice=choice, tools=[toolset(False, add=True)])
        first, second = at.pool.requests
        assert first.params.grammar and not second.params.grammar and "fake__add" in first.params.tool_names, choice


async def test_a_tool_that_no_grammar_holds_can_be_required(place):
    for choice, enabled in ({"type": "any"}, {"add": True, "not_strict": True}), ({"type": "tool", "name": "not_strict"}, {"not_strict": True}):
        async with place(calls(("fake__not_strict", {"x": 1})), "Done.") as at:
            answer = await asked(at, tool_choice=choice, tools=[toolset(False, **enabled)])
            assert [name for name, _ in at.called] == ["not_strict"] and kinds(answer)[-1] == "text"
            at.log.unlink()
        assert all(f"fake__{name}" in at.pool.requests[0].params.grammar for name in enabled)


async def test_own_functions_end_the_answer(place):
    """A round with both runs the server's, and leaves its own to the client."""
    async with place(calls(("mine", {}), ("fake__add", {"a": 2, "b": 3})), "Done.") as at:
        answer = await asked(at, tools=[OWN])
        assert kinds(answer) == ["tool_use", "mcp_tool_use", "mcp_tool_result"] and answer["stop_reason"] == "tool_use"
        result = {"type": "tool_result", "tool_use_id": answer["content"][0]["id"], "content": "mine"}
        again = await asked(at, [*HI, {"role": "assistant", "content": answer["content"]}, {"role": "user", "content": [result]}], tools=[OWN])
    assert kinds(again) == ["text"] and at.sent[1] == [("user", "2 + 3?"), ("assistant", ""), ("tool", "5"), ("tool", "mine")]


async def test_max_tokens_are_of_all_rounds(place):
    async with place(ADD, ADD, "It is five.") as at:
        answer = await asked(at, max_tokens=9)
        assert [request.max_tokens for request in at.pool.requests] == [9, 8, 7] and answer["stop_reason"] == "end_turn"
        at.pool.texts = [ADD]
        answer = await asked(at, max_tokens=1)
    assert answer["stop_reason"] == "max_tokens" and kinds(answer) == ["mcp_tool_use", "mcp_tool_result"] and len(at.called) == 2
    assert answer["content"][1]["is_error"] and "limit of tokens" in answer["content"][1]["content"][0]["text"]


async def test_a_call_that_was_cut_off_is_not_run(place):
    pool = ScriptedPool(ADD.removesuffix("}}\n</tool_call>"))
    pool.reason = "length"
    async with place(pool=pool) as at:
        answer = await asked(at)
    assert (answer["stop_reason"], kinds(answer), answer["content"][0]["input"], at.called) == ("max_tokens", ["mcp_tool_use", "mcp_tool_result"], {}, [])


async def test_what_does_not_fit_ends_the_answer(place):
    class Small(ScriptedPool):
        async def answer(self, request):
            if len(request.messages) > 2:
                raise RequestError("too long", code="context_length_exceeded")
            async for event in super().answer(request):
                yield event

    async with place(pool=Small(ADD)) as at:
        answer = await asked(at)
    assert answer["stop_reason"] == "model_context_window_exceeded" and kinds(answer) == ["mcp_tool_use", "mcp_tool_result"]


async def test_no_client_tries_again_after_a_call(place):
    class Failing(ScriptedPool):
        async def answer(self, request):
            if len(request.messages) > 1:
                raise EngineFailure("the workers died too often")
            async for event in super().answer(request):
                yield event

    async with place(pool=Failing(PICK)) as at:
        status, headers, _ = await at.post(MESSAGES, asking())
        assert (status, headers["X-Should-Retry"]) == (500, "false")
        events = await at.events_of(MESSAGES, asking())
    assert events[-1]["type"] == "error" and events[-2] == {"type": "content_block_stop", "index": 1}


# which tools

def toolset(default=None, **configs):
    enabled = {} if default is None else {"default_config": {"enabled": default, "defer_loading": False}}
    return {"type": "mcp_toolset", "mcp_server_name": "fake", **enabled, "configs": {name: {"enabled": on} for name, on in configs.items()}}


EVERY = ["add", "count", "long", "not_stric", "odd_name_", "pick", "picture", "show", "slow", "wrong"]
CHOICES = [  # (the server, tools, the names of those that the model gets)
    ({}, [], EVERY), ({}, [toolset()], EVERY), ({}, [toolset(False, add=True)], ["add"]), ({}, [toolset(True, add=False)], EVERY[1:]),
    ({"tool_configuration": {"enabled": True, "allowed_tools": ["pick", "add"]}}, [], ["add", "pick"]), ({"tool_configuration": {"allowed_tools": None}}, [], EVERY),
    ({"tool_configuration": {"enabled": False}}, [], []), ({}, [toolset(False)], [])]


async def test_clients_choose_among_the_tools(place):
    async with place("Hello.") as at:
        for server, tools, names in CHOICES:
            await asked(at, servers=[SERVER | server], tools=[*tools, OWN])
            own, *offered = [tool["function"]["name"] for tool in at.pool.requests[-1].tools]
            assert own == "mine" and [name.removeprefix("fake__")[:9] for name in offered] == names


def changed(kind, reference):
    return {"role": "system", "content": [{"type": kind, "tool": reference}]}


ONE, ALL = {"type": "mcp_tool_reference", "server_name": "fake", "name": "add"}, {"type": "mcp_toolset_reference", "server_name": "fake"}


async def test_a_system_message_takes_tools_of_servers_away_and_back(place):
    """The head of the prompt keeps them."""
    async with place("It is 5.") as at:
        await asked(at)
        [first] = at.pool.requests
        for messages, gone in ([changed("tool_removal", ONE)], {"fake__add"}), ([changed("tool_removal", ONE), changed("tool_addition", ONE)], set()), (
                [changed("tool_removal", ALL)], {*first.params.tool_names}), (
                [changed("tool_removal", ALL), changed("tool_addition", ONE)], {*first.params.tool_names} - {"fake__add"}):
            await asked(at, [*HI, *messages])
            assert {*first.params.tool_names} - {*at.pool.requests[-1].params.tool_names} == gone
        assert [content for role, content in at.sent[1] if role == "system"] == ["The function fake__add can no longer be called."]
        for reference in ({"type": "mcp_tool_reference", "server_name": "fake", "name": "none"}, {"type": "mcp_toolset_reference", "server_name": "other"}):
            status, words = await refused(at, asking([*HI, changed("tool_removal", reference)]))
            assert status == 400 and "which is not in tools" in words


async def test_what_is_found_is_beside_the_tools_of_servers(place):
    """A round may call either; the last round, without calls, is not told of any."""
    own = {**OWN, "name": "late", "defer_loading": True}
    searched = [*HI, {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "mine", "input": {}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": [{"type": "tool_reference", "tool_name": "late"}]}]}]
    async with place(ADD, "5.") as at:
        message = await asked(at, searched, tools=[OWN, own])
        assert kinds(message) == ["mcp_tool_use", "mcp_tool_result", "text"]
        assert all("late" in request.params.tool_names for request in at.pool.requests) and [bool(each.tools) for each in at.pool.requests[1].messages].count(True) == 1
        status, words = await refused(at, asking(searched, tools=[OWN, {**own, "name": "fake__add"}]))
        assert status == 400 and '"late", which is not in tools' in words


async def test_only_what_needs_no_approval_is_offered(place):
    async with place("Hello.", allowed=("pick",)) as at:
        await asked(at)
        assert [tool["function"]["name"] for tool in at.pool.requests[0].tools] == ["fake__pick"]
        for tools, words in ([toolset(False, add=True)], "approve of each call of add"), ([toolset(False, ad=True)], "is no tool of fake; here it has add, "):
            status, error = await refused(at, asking(tools=tools))
            assert status == 400 and words in error
    async with place("Hello.", allowed=()) as at:
        status, error = await refused(at, asking())
        assert status == 400 and "no tool of the server fake runs without an approval" in error and not at.pool.requests


WRONG_SERVERS = [
    ({"name": "other"}, "mcp_servers[0] must be a tool server of --mcp-config: fake"), ({"name": None}, "mcp_servers[0].name"), ({"name": 7}, "mcp_servers[0].name"),
    ({"url": "https://elsewhere.example"}, "mcp_servers[0].url"), ({"url": 7}, "mcp_servers[0].url"), ({"authorization_token": "secret"}, "authorization_token"),
    ({"type": "stdio"}, "mcp_servers[0].type"), ({"tool_configuration": 7}, "tool_configuration"),
    ({"tool_configuration": {"enabled": "yes"}}, "tool_configuration"), ({"tool_configuration": {"allowed_tools": "add"}}, "allowed_tools"),
    ({"tool_configuration": {"allowed_tools": ["ad"]}}, "\"ad\" is no tool of fake; here it has add, ")]


async def test_what_only_an_operator_says_is_refused(place):
    async with place("Hello.") as at:
        for changes, words in WRONG_SERVERS:
            for path in MESSAGES, COUNT:
                status, error = await refused(at, asking(servers=[SERVER | changes]), path)
                assert status == 400 and words in error and "secret" not in error, error
    assert not at.pool.requests


WRONG_BODIES = [
    ({"mcp_servers": [SERVER, SERVER]}, "at most once"), ({"mcp_servers": [7]}, "mcp_servers"), ({"mcp_servers": "fake"}, "mcp_servers"),
    ({"tools": [toolset(), toolset()]}, "tools[1].mcp_server_name"), ({"tools": [toolset() | {"mcp_server_name": "other"}]}, "no mcp_toolset for the server fake"),
    ({"tools": [toolset(), toolset() | {"mcp_server_name": "other"}]}, "tools[1].mcp_server_name"), ({"tools": [toolset() | {"configs": []}]}, "tools[0].configs"),
    ({"tools": [toolset() | {"configs": {"add": True}}]}, "tools[0].configs.add"), ({"tools": [toolset() | {"default_config": {"enabled": 1}}]}, "default_config"),
    ({"tools": [toolset()], "mcp_servers": [SERVER | {"tool_configuration": {}}]}, "exclude each other"), ({"tools": [toolset()], "mcp_servers": []}, "one of mcp_servers"),
    ({"tools": [OWN | {"name": "fake__add"}]}, "fake__add has the name"), ({"tool_choice": {"type": "tool", "name": "ad"}}, "ad")]


async def test_bad_servers_and_toolsets_are_refused(place):
    async with place("Hello.") as at:
        for body, words in WRONG_BODIES:
            status, error = await refused(at, asking() | body)
            assert status == 400 and words in error, error
    assert not at.pool.requests


async def test_a_url_may_be_the_configured_one(place):
    server, handler = fake_http_tools.http_server()
    url = f"http://127.0.0.1:{server.server_port}/mcp"
    try:
        async with place(calls(("web__add", {"a": 2, "b": 3})), "Five.", servers={"web": {"url": url, "alwaysAllow": ["add"]}}) as at:
            answer = await asked(at, servers=[{"type": "url", "name": "web", "url": url}])
            assert answer["content"][1]["content"][0]["text"] == "5"
            status, error = await refused(at, asking(servers=[{"type": "url", "name": "web", "url": url + "/x"}]))
            assert status == 400 and f"{url}," not in error
    finally:
        server.shutdown()
        server.server_close()


async def test_one_name_on_two_servers_needs_the_whole_one(place):
    other = {"twin": {"command": fake_tools.sys.executable, "args": [fake_tools.__file__], "alwaysAllow": ["*"]}}
    async with place(ADD, "Five.", servers=other) as at:
        both = [SERVER, SERVER | {"name": "twin"}]
        status, error = await refused(at, asking(servers=both, tool_choice={"type": "tool", "name": "add"}))
        assert status == 400 and "fake__add, twin__add" in error
        await asked(at, servers=both, tool_choice={"type": "tool", "name": "twin__add"})
    assert at.pool.requests[0].params.tool_names == ("twin__add",)


async def test_a_server_that_failed_is_an_error(place):
    """The answer itself could not say it."""
    async with place("Hello.", servers={"dead": {"command": fake_tools.sys.executable, "args": [fake_tools.__file__, "dies"]}}) as at:
        status, error = await refused(at, asking(servers=[SERVER | {"name": "dead"}]))
    assert status == 503 and "the tool server dead does not run" in error and "no licence found" in error


# earlier calls

USE = {"type": "mcp_tool_use", "id": "mcptoolu_1", "name": "add", "server_name": "fake", "input": {"a": 2, "b": 3}}
RESULT = {"type": "mcp_tool_result", "tool_use_id": "mcptoolu_1", "is_error": False, "content": [{"type": "text", "text": "5"}]}


async def test_a_call_without_a_result_has_an_unknown_outcome(place):
    async with place("Hello.") as at:
        await asked(at, [*HI, {"role": "assistant", "content": [USE, USE | {"id": "mcptoolu_2"}, RESULT]}, {"role": "user", "content": "Well?"}])
        await asked(at, [*HI, {"role": "assistant", "content": [{"type": "text", "text": "Wait."}, USE]}, {"role": "user", "content": "Well?"}])
    lost = ("tool", "The call was cut off, so its outcome is unknown.")
    assert at.sent[0][1:] == [("assistant", ""), lost, ("tool", "5"), ("user", "Well?")] and at.sent[1][1:] == [("assistant", "Wait."), lost, ("user", "Well?")]


WRONG_BLOCKS = [
    ("assistant", [RESULT], "messages[1].content[0].tool_use_id"), ("assistant", [USE, RESULT, RESULT], "messages[1].content[2].tool_use_id"),
    ("assistant", [RESULT, USE], "messages[1].content[0]"), ("user", [USE, RESULT], "blocks of the assistant"), ("assistant", [USE | {"name": 7}], "name of"),
    ("assistant", [USE | {"id": None}], "id of"), ("assistant", [USE | {"server_name": []}], "server_name of"),
    ("assistant", [USE, RESULT | {"tool_use_id": {}}], "tool_use_id"), ("assistant", [USE, RESULT | {"content": 7}], "content"),
    ("assistant", [USE, RESULT, {"type": "odd"}], "messages[1].content[2]")]


async def test_blocks_that_fit_nothing_are_refused(place):
    async with place("Hello.") as at:
        for role, blocks, words in WRONG_BLOCKS:
            for path in MESSAGES, COUNT:
                status, error = await refused(at, asking([*HI, {"role": role, "content": blocks}]), path)
                assert status == 400 and words in error, error


async def test_tools_and_calls_are_counted(place):
    async with place(ADD, "Five.") as at:
        async def count(*arguments, **more):
            _, _, answer = await at.post(COUNT, {key: value for key, value in asking(*arguments, **more).items() if key != "max_tokens"})
            return answer["input_tokens"]
        answer = await asked(at)
        said = [*HI, {"role": "assistant", "content": answer["content"]}, {"role": "user", "content": "Thanks."}]
        with_tools, without = await count(said), await count(said, [])
        alone = await count([HI[0], said[2]], [])
        none = await count(said, tool_choice={"type": "none"})
    assert with_tools >= without == none > alone


# who reads it, and who may ask


async def test_a_stream_goes_on_without_its_reader(place, tmp_path):
    path = tmp_path / "gate"
    async with place(calls(("fake__slow", {"path": str(path)})), "Done.") as at:
        async with at.http.post(at.url + MESSAGES, json=asking(stream=True, resumable=True), headers={"X-Request-Id": "mine"}) as response:
            await response.content.readuntil(b"content_block_stop")
        path.touch()
        async with at.http.get(at.url + "/v1/streams/mine?from=0") as response:
            data = await response.read()
    assert b"mcp_tool_result" in data and b"message_stop" in data


async def test_keys_have_the_servers_of_their_field(place):
    keys = tuple(ApiKey.hashed(name, name)._replace(tools=tools) for name, tools in (("one", ("fake.add",)), ("none", ())))
    async with place("Hello.", keys=keys) as at:
        status, _, _ = await at.post(MESSAGES, asking(), **{"x-api-key": "one"})
        assert status == 200 and [tool["function"]["name"] for tool in at.pool.requests[0].tools] == ["fake__add"]
        status, error = await refused(at, asking(tools=[toolset(False, pick=True)]), **{"x-api-key": "one"})
        assert status == 400 and "here it has add" in error
        for path in MESSAGES, COUNT:
            status, error = await refused(at, asking(), path, **{"x-api-key": "none"})
            assert status == 403 and "may not use the tool server fake" in error


async def test_without_the_flag_they_are_ignored():
    async with serving(ScriptedPool("Hello.")) as url, aiohttp.ClientSession() as http:
        body = asking([*HI, {"role": "assistant", "content": [USE, RESULT]}, {"role": "user", "content": "Well?"}], [SERVER | {"url": "https://elsewhere.example"}],
                      tools=[toolset()])
        for path in MESSAGES, COUNT:
            body.pop("max_tokens", None) if path == COUNT else None
            async with http.post(url + path, json=body) as response:
                assert response.status == 200 and response.headers["X-Ignored-Fields"] == "mcp_servers"
                if path == MESSAGES:
                    assert response.headers["X-Ignored-Tools"] == "mcp_toolset, mcp_tool_use, mcp_tool_result"
