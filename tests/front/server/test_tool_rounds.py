"""The server's own loop of tools, over a scripted model and real tool servers: rounds, calls and approvals of Responses."""

import asyncio
import json
import sys
from contextlib import asynccontextmanager

import aiohttp
import openai
import pytest

import fake_tools
from chatlm.common.config import ApiKey
from chatlm.common.errors import EngineFailure, RequestError
from chatlm.common.messages.requests import Message, Picture
from chatlm.front.annexes.tools.rounds import seed_of_round
from fake_pool import serving
from scripted_pool import ScriptedPool
from tool_rounds import ToolPlace, calls, tool_place

TOOL = {"type": "mcp", "server_label": "fake", "require_approval": "never"}
ASKING = {"type": "mcp", "server_label": "fake"}
OWN = {"type": "function", "name": "mine", "parameters": {"type": "object", "properties": {}}}
# of one call of a tool that the server runs, and the words after it: as OpenAI's server sends them
RECORDED = """created in_progress output_item.added mcp_list_tools.in_progress mcp_list_tools.completed output_item.done
    output_item.added mcp_call.in_progress mcp_call_arguments.delta mcp_call_arguments.done mcp_call.completed output_item.done
    output_item.added content_part.added output_text.delta output_text.done content_part.done output_item.done completed""".split()

ADD = calls(("fake__add", {"a": 2, "b": 3}))
PICK = calls(("fake__pick", {"word": "red"}))


class Place(ToolPlace):
    """Such a place, with OpenAI's client."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.client = openai.AsyncOpenAI(base_url=self.url + "/v1", api_key="any", max_retries=0)

    async def ask(self, input="2 + 3?", tools=(TOOL,), **more):
        return await self.client.responses.create(model="default", input=input, tools=tools, **more)

    async def events(self, **more):
        return [event async for event in await self.ask(stream=True, **more)]


@pytest.fixture
def place(tmp_path):
    @asynccontextmanager
    async def made(*texts, **more):
        async with tool_place(tmp_path, *texts, kind=Place, **more) as at, at.client:
            yield at
    return made


def types(events):
    return [event.type.removeprefix("response.") for event in events]


def kinds(response):
    return [item.type for item in response.output]


# rounds

async def test_events_come_in_the_recorded_order(place):
    async with place(ADD, "It is five.") as at:
        events = await at.events(tools=[TOOL | {"allowed_tools": ["add"]}])
    assert types(events) == RECORDED and [event.sequence_number for event in events] == [*range(len(events))]
    listed, call, message = [event.item for event in events if event.type == "response.output_item.done"]
    [tool] = listed.tools
    assert (tool.name, tool.description, tool.annotations) == ("add", "adds two numbers", {"readOnlyHint": True}) and tool.input_schema["required"] == ["a", "b"]
    assert (call.server_label, call.name, json.loads(call.arguments), call.output, call.error, call.status) == ("fake", "add", {"a": 2, "b": 3}, "5", None, "completed")
    assert events[-1].response.output == [listed, call, message] and message.content[0].text == "It is five."
    begun = [event.item for event in events if event.type == "response.output_item.added"]
    assert begun[0].tools == [] and (begun[1].arguments, begun[1].output, begun[1].status) == ("", None, "in_progress")
    assert [event.output_index for event in events if event.type.startswith("response.output_item")] == [0, 0, 1, 1, 2, 2]


async def test_a_whole_answer_is_that_of_the_stream(place):
    async with place(ADD, "It is five.") as at:
        whole = await at.ask()
        assert kinds(whole) == ["mcp_list_tools", "mcp_call", "message"] and whole.output_text == "It is five." and at.called == [["add", {"a": 2, "b": 3}]]
        assert (whole.usage.input_tokens, whole.usage.output_tokens) == (14, 2)  # of both rounds
    assert at.sent == [[("user", "2 + 3?")], [("user", "2 + 3?"), ("assistant", ""), ("tool", "5")]]
    first, second = at.pool.requests
    assert first.tools == second.tools and [tool["function"]["strict"] for tool in first.tools if tool["function"]["name"] == "fake__add"] == [True]
    assert second.messages[1].more["tool_calls"][0]["id"] == second.messages[2].more["tool_call_id"]


async def test_each_round_has_a_seed_and_an_entry_in_the_ledger(place):
    async with place(ADD, "It is five.") as at:
        await at.ask(extra_body={"seed": 7})
        async with aiohttp.ClientSession() as http, http.get(at.url + "/v1/usage") as response:
            total = (await response.json())["total"]
    assert [request.params.sampling.seed for request in at.pool.requests] == [7, seed_of_round(7, 1)] and seed_of_round(7, 1) != 7
    assert (total["requests"], total["prompt_tokens"], total["completion_tokens"]) == (2, 14, 2)


async def test_a_call_is_required_in_the_first_round_only(place):
    async with place(ADD, "It is five.") as at:
        assert (await at.ask(tool_choice={"type": "mcp", "server_label": "fake", "name": "add"})).output_text == "It is five."
        first, second = at.pool.requests
        assert first.params.grammar and not second.params.grammar and first.params.tool_names == ("fake__add",)
        with pytest.raises(openai.BadRequestError, match="tool_choice.server_label"):
            await at.ask(tool_choice={"type": "mcp", "server_label": "other"})


@pytest.mark.parametrize("allowed, choice", [
    (["add", "not_strict"], "required"), (["not_strict"], "required"), (["not_strict"], {"type": "mcp", "server_label": "fake", "name": "not_strict"}),
    (["add", "not_strict"], {"type": "allowed_tools", "mode": "required", "tools": [{"type": "mcp", "server_label": "fake"}]})])
async def test_a_tool_that_no_grammar_holds_can_be_required(place, allowed, choice):
    """A call is required all the same, only the arguments of this tool are any object."""
    async with place(calls(("fake__not_strict", {"x": 1})), "Done.") as at:
        response = await at.ask(tools=[TOOL | {"allowed_tools": allowed}], tool_choice=choice)
    first, second = at.pool.requests
    assert [name for name, _ in at.called] == ["not_strict"] and response.output_text == "Done."
    assert all(f"fake__{name}" in first.params.grammar for name in allowed) and ('\\"b\\"' in first.params.grammar) == ("add" in allowed)
    assert not second.params.grammar and second.params.tool_names == first.params.tool_names


async def test_own_functions_are_required_as_they_are(place):
    """Only of the operator's tools nothing is refused."""
    own = OWN | {"parameters": {"type": "object", "properties": {"x": {"not": {"type": "string"}}}}}
    async with place("Done.") as at:
        with pytest.raises(openai.BadRequestError, match="cannot be enforced"):
            await at.ask(tools=[TOOL, own], tool_choice="required")
    assert not at.pool.requests


async def test_tools_too_large_for_one_grammar_are_not_refused(place):
    """Then no call is required, but each is held to its tool's parameters. Own functions still are required."""
    async with place("Done.", servers={"large": {"command": sys.executable, "args": [fake_tools.__file__, "large"], "alwaysAllow": ["*"]}}) as at:
        large = TOOL | {"server_label": "large"}
        await at.ask(tools=[large], tool_choice="required")
        await at.ask(tools=[large, OWN], tool_choice="required")
    alone, beside = (request.params for request in at.pool.requests)
    assert len(alone.tool_names) == 60 and not alone.grammar and all(alone.call_grammars) and len(alone.call_grammars) == 60
    assert "mine" in beside.grammar and "large__" not in beside.grammar and len(beside.tool_names) == 61


async def test_results_come_in_the_order_of_calls(place, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    async with place(calls(("fake__slow", {"path": str(first)}), ("fake__wrong", {}), ("fake__slow", {"path": str(second)})), "Done.") as at:
        asking = asyncio.ensure_future(at.ask())
        await at.until_called(3)  # all run at once
        second.touch()
        await at.client.models.list()
        first.touch()
        response = await asking
    _, *made, _ = response.output
    assert [call.output for call in made] == ["it is there", None, "it is there"] and made[1].status == "failed"
    assert made[1].error.content == [{"type": "text", "text": "it went wrong"}]
    assert at.sent[1][2:] == [("tool", "it is there"), ("tool", "it went wrong"), ("tool", "it is there")]


async def test_four_calls_run_at_once(place, tmp_path):
    gates = [tmp_path / str(number) for number in range(6)]
    async with place(calls(*(("fake__slow", {"path": str(gate)}) for gate in gates)), "Done.") as at:
        asking = asyncio.ensure_future(at.ask())
        await at.until_called(4)
        assert {arguments["path"] for _, arguments in at.called} == {str(gate) for gate in gates[:4]}
        for gate in gates:
            gate.touch()
        await asking
    assert len(at.called) == 6


async def test_equal_calls_and_rounds_end(place):
    """The third equal call is not run; after the last round the model gets no tools."""
    async with place(PICK, tool_rounds=4) as at:
        response = await at.ask()
    assert at.called == [["pick", {"word": "red"}]] * 2 and [bool(request.tools) for request in at.pool.requests] == [True] * 4 + [False]
    assert [call.status for call in response.output if call.type == "mcp_call"] == ["completed"] * 2 + ["failed"] * 2
    assert at.sent[-1][-1] == ("tool", "Not run: the same call was made twice before. Use its result.")
    assert response.status == "completed" and response.output[-1].type == "message"


async def test_max_tool_calls_ends_calls(place):
    async with place(calls(*(("fake__pick", {"word": word}) for word in ("red", "green", "blue"))), "Done.") as at:
        response = await at.ask(max_tool_calls=2)
    assert sorted(arguments["word"] for _, arguments in at.called) == ["green", "red"] and response.max_tool_calls == 2      # both at once
    assert [json.loads(call.arguments)["word"] for call in response.output if call.type == "mcp_call"] == ["red", "green", "blue"]
    assert at.sent[1][-1] == ("tool", "Not run: the limit of calls is reached.") and not at.pool.requests[1].tools


async def test_max_output_tokens_are_of_all_rounds(place):
    async with place(ADD, ADD, "It is five.") as at:
        await at.ask(max_output_tokens=9)
        assert [request.max_tokens for request in at.pool.requests] == [9, 8, 7]
        at.pool.texts = [ADD]
        response = await at.ask(max_output_tokens=2)
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    last = response.output[-1]
    assert last.status == "failed" and "limit of tokens" in last.error.content[0]["text"] and len(at.called) == 3


async def test_a_call_that_was_cut_off_is_not_run(place):
    pool = ScriptedPool(ADD.removesuffix("}\n</tool_call>"))
    pool.reason = "length"
    async with place(pool=pool) as at:
        response = await at.ask()
    assert (response.status, response.output[-1].status, at.called) == ("incomplete", "failed", [])


async def test_own_functions_end_the_answer(place):
    """A round with both runs the server's, and leaves its own to the client."""
    async with place(calls(("fake__add", {"a": 2, "b": 3}), ("mine", {})), "Done.") as at:
        response = await at.ask(tools=[TOOL, OWN])
        assert kinds(response) == ["mcp_list_tools", "mcp_call", "function_call"] and response.output[1].output == "5" and response.status == "completed"
        again = await at.ask([*({"role": "user", "content": "2 + 3?"},), *(item.to_dict() for item in response.output),
                              {"type": "function_call_output", "call_id": response.output[2].call_id, "output": "mine"}], [TOOL, OWN])
    assert again.output_text == "Done." and kinds(again) == ["message"]  # the tools are listed in its input
    assert at.sent[1] == [("user", "2 + 3?"), ("assistant", ""), ("tool", "5"), ("assistant", ""), ("tool", "mine")]
    assert at.pool.requests[1].messages[1].more["tool_calls"][0]["function"] == {"name": "fake__add", "arguments": {"a": 2, "b": 3}}


async def test_reasoning_and_words_go_back_to_the_model(place):
    async with place("Let me see." + ADD, "It is five.") as at:
        response = await at.ask()
    assert kinds(response) == ["mcp_list_tools", "message", "mcp_call", "message"] and at.sent[1][1] == ("assistant", "Let me see.")


async def test_what_does_not_fit_ends_the_answer(place):
    """The calls have acted, so their items are not lost to an error."""
    class Small(ScriptedPool):
        async def answer(self, request):
            if len(request.messages) > 2:
                raise RequestError("too long", code="context_length_exceeded")
            async for event in super().answer(request):
                yield event

    async with place(pool=Small(ADD)) as at:
        response = await at.ask()
    assert (response.status, kinds(response)[-1], response.output[-1].output) == ("incomplete", "mcp_call", "5")


async def test_a_model_that_sees_gets_pictures(place):
    class Seeing(ScriptedPool):
        sees = True

        async def decode_picture(self, data, client):
            return Picture(1, 1, b"abc", bytes(16))

    for pool, seen in ((Seeing(calls(("fake__picture", {})), "A pixel."), True), (ScriptedPool(calls(("fake__picture", {})), "A pixel."), False)):
        async with place(pool=pool) as at:
            await at.ask()
        messages = pool.requests[1].messages
        assert messages[2].content.startswith("[picture 1]\none pixel") and ("not shown" in messages[2].content) is not seen
        assert messages[3:] == ((Message("user", "The pictures of the results above.", None, (Picture(1, 1, b"abc", bytes(16)),),
                                         ("The pictures of the results above.", 0)),) if seen else ())


async def test_a_server_that_failed_is_listed_with_its_reason(place):
    async with place("Hello.", servers={"dead": {"command": sys.executable, "args": [fake_tools.__file__, "dies"]}}) as at:
        events = await at.events(tools=[{"type": "mcp", "server_label": "dead"}])
    assert "mcp_list_tools.failed" in types(events) and "no licence found" in events[-1].response.output[0].error


class Failing(ScriptedPool):
    """Its worker fails after the first round."""

    async def answer(self, request):
        if len(request.messages) > 1:
            raise EngineFailure("the workers died too often")
        async for event in super().answer(request):
            yield event


async def test_no_client_tries_again_after_a_call(place):
    """OpenAI's client sends a request again after an error, but not if a tool has acted."""
    async with place(pool=Failing(PICK)) as at:
        at.client.max_retries = 2
        with pytest.raises(openai.InternalServerError):
            await at.ask()
        events = await at.events()
    assert len(at.called) == 2 and len(at.pool.requests) == 2 and events[-1].type == "response.failed"
    assert events[-1].response.output[1].output == "picked red"


# approvals

async def test_a_call_runs_once_it_is_approved(place):
    async with place(PICK, "It is red.", allowed=()) as at:
        events = await at.events()  # `never` is not enough: the operator wants a person to be asked
        assert types(events)[6:] == ["output_item.added", "output_item.done", "completed"] and at.called == []
        request = events[-1].response.output[-1]
        assert (request.type, request.server_label, request.name, request.arguments) == ("mcp_approval_request", "fake", "pick", '{"word": "red"}')
        said = [{"role": "user", "content": "2 + 3?"}, *(item.to_dict() for item in events[-1].response.output),
                {"type": "mcp_approval_response", "approval_request_id": request.id, "approve": True}]
        events = await at.events(input=said)
        assert types(events) == RECORDED[:2] + RECORDED[6:] and at.called == [["pick", {"word": "red"}]]
        call = events[-1].response.output[0]
        assert (call.type, call.approval_request_id, call.output) == ("mcp_call", request.id, "picked red")
        assert at.sent[1] == [("user", "2 + 3?"), ("assistant", ""), ("tool", "picked red")]
        # the next turn has it all, and nothing is called again
        response = await at.ask([*said, *(item.to_dict() for item in events[-1].response.output), {"role": "user", "content": "Thanks"}])
    assert response.output_text == "It is red." and len(at.called) == 1
    assert at.sent[2] == [*at.sent[1], ("assistant", "It is red."), ("user", "Thanks")]


@pytest.mark.parametrize("answer, told", [
    ({"approve": False}, "The user did not allow this call."), ({"approve": False, "reason": "too red"}, "The user did not allow this call. They say: too red"),
    (None, "Not run: the user has not answered whether to allow this call.")])
async def test_a_call_that_is_not_approved_does_not_run(place, answer, told):
    async with place(PICK, "Then not.", allowed=()) as at:
        [_, request] = (await at.ask()).output
        said = [{"role": "user", "content": "Pick."}, request.to_dict()]
        said.append({"type": "mcp_approval_response", "approval_request_id": request.id, **answer} if answer else {"role": "user", "content": "Well?"})
        response = await at.ask(said)
    assert response.output_text == "Then not." and at.called == [] and at.sent[1][2] == ("tool", told)


async def test_only_what_client_and_operator_allow_runs_unasked(place):
    both = calls(("fake__pick", {"word": "red"}), ("fake__add", {"a": 2, "b": 3}))
    for allowed, policy, ran in (("pick",), "never", ["pick"]), (("*",), None, []), (("*",), {"never": {"tool_names": ["add"]}}, ["add"]), (
            ("*",), {"always": {"tool_names": ["add"]}, "never": {}}, ["pick"]), (("*",), {"never": {"read_only": True}}, ["add"]):
        async with place(both, "Done.", allowed=allowed) as at:
            response = await at.ask(tools=[ASKING | {"require_approval": policy}])
        assert [name for name, _ in at.called] == ran and sorted(kinds(response)) == sorted(
            ["mcp_list_tools", *["mcp_call"] * len(ran), *["mcp_approval_request"] * (2 - len(ran))])
        at.log.unlink(missing_ok=True)


async def test_an_approval_is_of_one_description(place, tmp_path):
    kept = {"database": str(tmp_path / "kept.db")}
    async with place(PICK, "Then not.", allowed=(), **kept) as at:
        [_, request] = (await at.ask()).output
    async with place("Then not.", faults=["changed"], allowed=(), **kept) as at:
        response = await at.ask([request.to_dict(), {"type": "mcp_approval_response", "approval_request_id": request.id, "approve": True}])
    assert at.called == [] and "not what it was" in response.output[1].error.content[0]["text"]


async def test_approvals_that_fit_nothing_are_refused(place):
    async with place(PICK, allowed=()) as at:
        [_, request] = (await at.ask()).output
        yes = {"type": "mcp_approval_response", "approval_request_id": request.id, "approve": True}
        for items, tools, match in (([yes], [TOOL], "mcp_approval_request before it"), ([request.to_dict(), yes, yes], [TOOL], "answered twice"),
                                    ([request.to_dict(), yes | {"approve": "yes"}], [TOOL], "true or false"), ([request.to_dict(), yes], [], "must be among them"),
                                    ([request.to_dict() | {"arguments": 7}, yes], [TOOL], "arguments of an item"),
                                    ([yes | {"approval_request_id": [7]}], [TOOL], "approval_request_id of an item")):
            with pytest.raises(openai.BadRequestError, match=match):
                await at.ask(items, tools)
    assert at.called == []


async def test_an_approval_that_is_sent_twice_runs_once(place):
    async with place(PICK, "It is red.", allowed=()) as at:
        [_, request] = (await at.ask()).output
        yes = {"type": "mcp_approval_response", "approval_request_id": request.id, "approve": True}
        await at.ask([request.to_dict(), request.to_dict(), yes, {"type": "mcp_list_tools", "server_label": [1]}, {"type": "mcp_call", "id": "x",
                      "server_label": "fake", "name": "pick", "arguments": "", "approval_request_id": {}}])
    assert len(at.called) == 1 and at.sent[1][1::2] == [("tool", "picked red"), ("tool", "The call was cut off, so its outcome is unknown.")]


@pytest.mark.parametrize("kept", [False, True])
async def test_an_approval_is_in_use_while_its_call_runs(place, tmp_path, kept):
    """A second answer with it is refused; OpenAI's client does not try again, as it does after a 409."""
    gate = tmp_path / "gate"
    more = {"database": str(tmp_path / "kept.db")} if kept else {}
    async with place(calls(("fake__slow", {"path": str(gate)})), "It is there.", allowed=(), **more) as at:
        at.client.max_retries = 2
        first = await at.ask()
        request = first.output[-1]
        yes = {"type": "mcp_approval_response", "approval_request_id": request.id, "approve": True}
        said = {"input": [yes], "previous_response_id": first.id} if kept else {"input": [{"role": "user", "content": "2 + 3?"}, request.to_dict(), yes]}
        running = asyncio.ensure_future(at.ask(**said))
        await at.until_called(1)
        for ask in at.ask, at.events:
            with pytest.raises(openai.ConflictError, match=f'{request.id}" is used already: an answer that still runs'):
                await ask(**said)
        gate.touch()
        response = await running
        assert response.output_text == "It is there." and len(at.called) == 1 and not at.pool.in_rounds
        # nobody makes the call again, nor after a reload; whoever tries hears what came of it
        known = f"{response.id}, which has it" if kept else "has ended"
        with pytest.raises(openai.ConflictError, match=f"{known}.*its result is: it is there"):
            await at.ask(**said)
        if kept:
            assert (await at.ask("Thanks.", previous_response_id=response.id)).output_text == "It is there."
        assert len(at.called) == 1


async def test_keys_use_approvals_of_their_own(place, tmp_path):
    gate = tmp_path / "gate"
    keys = tuple(ApiKey.hashed(name, name)._replace(tools=("*",)) for name in ("one", "two"))
    async with place(calls(("fake__slow", {"path": str(gate)})), "It is there.", allowed=(), keys=keys) as at:
        said = {}
        for name in ("one", "two"):
            at.client.api_key = name
            [_, request] = (await at.ask()).output
            said[name] = [request.to_dict(), {"type": "mcp_approval_response", "approval_request_id": request.id, "approve": True}]
            at.pool.texts = [calls(("fake__slow", {"path": str(gate)})), "It is there."]
        with pytest.raises(openai.BadRequestError, match="is unknown"):
            await at.ask(said["one"])
        at.pool.texts = ["It is there."]
        running = []
        for name in ("one", "two"):
            at.client.api_key = name
            running.append(asyncio.ensure_future(at.ask(said[name])))
            await at.until_called(len(running))
        gate.touch()
        assert [response.output_text for response in await asyncio.gather(*running)] == ["It is there."] * 2


async def test_keys_of_one_owner_use_approvals_with_their_own_rights(place):
    """One key approves what another of its owner was asked, only if it may use the tool itself."""
    rights = {"all": ("*",), "also": ("fake.pick",), "other": ("fake.add",), "none": ()}
    keys = tuple(ApiKey.hashed(name, name, tools=tools, owner="ann") for name, tools in rights.items())
    async with place(calls(("fake__pick", {"word": "red"})), "It is red.", allowed=(), keys=keys) as at:
        at.client.api_key = "all"
        [_, request] = (await at.ask()).output
        said = [request.to_dict(), {"type": "mcp_approval_response", "approval_request_id": request.id, "approve": True}]
        at.client.api_key = "none"
        with pytest.raises(openai.PermissionDeniedError, match="may not use the tool server fake"):
            await at.ask(said)
        at.client.api_key = "other"
        with pytest.raises(openai.BadRequestError):
            await at.ask(said)
        assert at.called == []
        at.client.api_key = "also"
        assert (await at.ask(said)).output_text == "It is red." and len(at.called) == 1


async def test_an_approval_is_used_though_its_answer_was_cancelled(place, tmp_path):
    gate = tmp_path / "gate"
    async with place(calls(("fake__slow", {"path": str(gate)})), "It is there.", allowed=()) as at:
        [_, request] = (await at.ask()).output
        said = [request.to_dict(), {"type": "mcp_approval_response", "approval_request_id": request.id, "approve": True}]
        running = asyncio.ensure_future(at.ask(said))
        await at.until_called(1)
        running.cancel()
        while at.pool.in_rounds:
            await at.client.models.list()
        gate.touch()
        with pytest.raises(openai.ConflictError, match="its call began at 20.*Z, and nothing is known of its result"):
            await at.ask(said)
        assert len(at.called) == 1


async def test_arguments_that_are_no_object_are_not_asked_about(place):
    async with place('<tool_call>\n{"name": "fake__pick", "arguments": [1]}\n</tool_call>', "Then not.", allowed=()) as at:
        response = await at.ask()
    assert "mcp_approval_request" not in kinds(response) and at.called == []


# who reads it, and who may ask


async def test_a_stream_goes_on_without_its_reader(place, tmp_path):
    path = tmp_path / "gate"
    async with place(calls(("fake__slow", {"path": str(path)})), "Done.") as at, aiohttp.ClientSession() as http:
        body = {"input": "go", "tools": [TOOL | {"allowed_tools": ["slow"]}], "stream": True, "resumable": True}
        async with http.post(at.url + "/v1/responses", json=body, headers={"X-Request-Id": "mine"}) as response:
            await response.content.readuntil(b"mcp_call_arguments.done")
        path.touch()
        async with http.get(at.url + "/v1/streams/mine?from=0") as response:
            events = [json.loads(line[6:]) for line in (await response.read()).splitlines() if line.startswith(b"data: ")]
    assert [event["type"].removeprefix("response.") for event in events] == RECORDED


# what an entry of tools says instead, or what the body says: words of the error
REFUSED_ENTRIES = [
    ({"server_label": "other"}, "fake"),
    ({"server_label": None}, "server_label"),
    ({"server_label": 7}, "server_label"),
    *(({name: "x"}, f"{name}: tool servers are the operator's")
      for name in ("server_url", "connector_id", "tunnel_id", "authorization")),
    ({"headers": {"X": "y"}}, "headers"),
    ({"allowed_tools": "add"}, "allowed_tools"),
    ({"allowed_tools": ["ad"]}, "among add, "),
    ({"allowed_tools": {"read_only": "yes"}}, "allowed_tools"),
    ({"require_approval": "sometimes"}, "require_approval"),
    ({"require_approval": {"never": "add"}}, "require_approval.never"),
]
REFUSED = [
    *(({"tools": [TOOL | changes]}, words) for changes, words in REFUSED_ENTRIES),
    ({"tools": [TOOL, TOOL]}, "at most once"),
    ({"tools": [TOOL, OWN | {"name": "fake__add"}]}, "fake__add has the name"),
    ({"tools": [TOOL], "extra_body": {"n": 2}}, "n must be 1"),
    ({"tools": [TOOL], "extra_body": {"max_tool_calls": 0}}, "max_tool_calls"),
]


async def test_what_cannot_be_asked_of_tools_is_refused(place):
    """Who writes to the model names no server: its operator does."""
    async with place("Hello.") as at:
        for said, words in REFUSED:
            with pytest.raises(openai.BadRequestError, match=words):
                await at.ask(**said)
    assert not at.pool.requests


async def test_keys_have_the_servers_of_their_field(place):
    keys = tuple(ApiKey.hashed(name, name)._replace(tools=tools) for name, tools in (("all", ("*",)), ("one", ("fake.add",)), ("none", ())))
    async with place("Hello.", keys=keys) as at:
        for name, offered in (("all", 10), ("one", 1)):
            at.client.api_key = name
            assert len((await at.ask()).output[0].tools) == offered
        at.client.api_key = "none"
        with pytest.raises(openai.PermissionDeniedError, match="may not use the tool server fake"):
            await at.ask()


async def test_without_the_flag_they_are_ignored():
    pool = ScriptedPool("Hello.")
    async with serving(pool) as url, aiohttp.ClientSession() as http:
        body = {"input": [{"role": "user", "content": "hi"}, {"type": "mcp_approval_response", "approval_request_id": "x", "approve": True}],
                "tools": [TOOL | {"server_url": "https://elsewhere.example"}], "max_tool_calls": 3}
        async with http.post(url + "/v1/responses", json=body) as response:
            assert response.status == 200 and response.headers["X-Ignored-Tools"] == "mcp, mcp_approval_response"
            assert response.headers["X-Ignored-Fields"] == "max_tool_calls" and (await response.json())["output"][0]["type"] == "message"


# what a client puts back

async def test_what_a_client_puts_back_is_kept(place, tmp_path):
    """Lists, calls and requests for an approval: into a conversation, in which the request can still be answered, and as input."""
    async with place(PICK, "It is red.", "Fine.", allowed=(), database=str(tmp_path / "kept.db")) as at:
        made = [item.to_dict() for item in (await at.ask()).output]
        assert [item["type"] for item in made] == ["mcp_list_tools", "mcp_approval_request"]
        talk = await at.client.conversations.create(items=[{"role": "user", "content": "2 + 3?"}, *made])
        assert [item.to_dict() for item in (await at.client.conversations.items.list(talk.id, order="asc")).data][1:] == made
        yes = {"type": "mcp_approval_response", "approval_request_id": made[1]["id"], "approve": True}
        said = await at.ask([yes], extra_body={"conversation": talk.id})
        call = said.output[0].to_dict()
        assert (call["type"], call["output"]) == ("mcp_call", "picked red") and len(at.called) == 1
        other = await at.client.conversations.create(items=[call])
        assert [item.to_dict() for item in (await at.client.conversations.items.list(other.id)).data] == [call]
        response = await at.ask([*made, yes, call, {"role": "user", "content": "Thanks"}])
        kept = [item.to_dict() for item in (await at.client.responses.input_items.list(response.id, order="asc")).data]
        assert [item | {"id": ""} for item in kept[:4] if item["type"] != "mcp_approval_response"] == [item | {"id": ""} for item in (*made, call)]
        with pytest.raises(openai.BadRequestError, match="arguments of an item of type mcp_call must be a string"):
            await at.client.conversations.create(items=[call | {"arguments": 5}])
    assert len(at.called) == 1
