"""Responses with tools that the server runs, through OpenAI's client and a real server with the default model: kept, continued after a restart, large."""

import json
import signal
from pathlib import Path
from contextlib import contextmanager

import openai
import pytest

from openai_routes import need_exact
from real_server import get, server, wait_for
from tiny_gguf import LLAMA_NUMBERS, random_llama, small_gguf_metadata, write_gguf
from shared_servers import logging_tools
from tool_rounds import asked_request

SMALL = "--kv-cache-memory", "64M", "--max-batch", "2"
TOOL = {"type": "mcp", "server_label": "fake", "require_approval": "never", "allowed_tools": ["pick"]}
ASKED = {"type": "mcp", "server_label": "asks", "allowed_tools": ["pick"]}


@pytest.fixture(scope="module")
def place(tools_server):
    """The folder of the shared server: its tools write there."""
    place = tools_server.database.parent
    (place / "asks.json").write_text(json.dumps({"mcpServers": {"asks": logging_tools(place)}}))
    return place


@contextmanager
def restarted(place, model):
    """A server that is started again over what it has kept."""
    flags = "--mcp-config", place / "asks.json", "--database", place / "restarted.db"
    with server(model, *flags, *SMALL) as (_, url):
        yield openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)


@pytest.fixture
def client(tools_server):
    return openai.OpenAI(base_url=tools_server.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def tiny(place):
    """The path of a tiny model, for servers that are started again."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    metadata = small_gguf_metadata("gpt-2", **{"tokenizer.chat_template": template})
    return write_gguf(place / "tiny.gguf", random_llama(vocab=len(metadata["tokenizer.ggml.tokens"])), LLAMA_NUMBERS | {"llama.context_length": 4096}, metadata)


def ask(client, input="Pick a colour.", tools=(TOOL,), **more):
    return client.responses.create(model="default", input=input, tools=tools, **{"max_output_tokens": 60, "temperature": 1, "extra_body": {"seed": 5}} | more)


def called(place):
    return (place / "calls").read_text().splitlines() if (place / "calls").exists() else []


def plain(response):
    """The items without their ids."""
    return [{name: value for name, value in item.to_dict().items() if name != "id"} for item in response.output]


def test_same_seed_and_same_results_give_the_same_answer(client, place):
    """Streamed, whole, kept, and with the client's own loop."""
    need_exact(str(client.base_url).removesuffix("/v1/"))
    before = len(called(place))
    whole = ask(client, tool_choice="required")
    assert [item.type for item in whole.output] == ["mcp_list_tools", "mcp_call", "message"]
    assert len(called(place)) == before + 1
    with client.responses.stream(model="default", input="Pick a colour.", tools=[TOOL], tool_choice="required", max_output_tokens=60, temperature=1,
                                 extra_body={"seed": 5}) as stream:
        streamed = [*stream][-1].response
    assert plain(streamed) == plain(whole) and streamed.usage.total_tokens == whole.usage.total_tokens
    assert client.responses.retrieve(whole.id).output == whole.output and client.responses.retrieve(streamed.id).output == streamed.output
    call = whole.output[1]
    assert call.status == "completed" and call.output == f"picked {json.loads(call.arguments)['word']}"
    # usage counts both rounds, and the second round's prompt has the result
    assert whole.usage.output_tokens <= 60 < whole.usage.input_tokens


def test_a_tool_that_no_grammar_holds_can_be_required(client, place):
    """The model has to call it, with whatever object; or the other one, whose arguments are held to its schema."""
    for allowed in ["not_strict"], ["not_strict", "pick"]:
        response = ask(client, tools=[TOOL | {"allowed_tools": allowed}], tool_choice="required", max_output_tokens=200)
        call = next(item for item in response.output if item.type == "mcp_call")
        assert call.name in allowed and (call.name == "pick" or response.status == "incomplete" or isinstance(json.loads(call.arguments), dict))


def test_a_kept_response_goes_on_with_its_calls(client, place):
    """What continues it sees call and result as a whole conversation in the input does."""
    need_exact(str(client.base_url).removesuffix("/v1/"))
    first = ask(client, tool_choice="required")
    before = len(called(place))
    continued = ask(client, "Which?", previous_response_id=first.id, temperature=0)
    said = [{"role": "user", "content": "Pick a colour."}, *(item.to_dict() for item in first.output), {"role": "user", "content": "Which?"}]
    alone = ask(client, said, temperature=0, store=False)
    assert continued.output_text == alone.output_text and continued.usage.input_tokens == alone.usage.input_tokens
    assert "mcp_list_tools" not in [item.type for item in continued.output]  # they are listed before
    kinds = [item.type for item in client.responses.input_items.list(continued.id, order="asc").data]
    assert kinds == ["message", "mcp_list_tools", "mcp_call", "message", "message"] and len(called(place)) - before <= 2


def test_calls_and_approvals_can_be_named_by_their_ids(client, place):
    """As Vercel's package names them in later turns."""
    need_exact(str(client.base_url).removesuffix("/v1/"))
    first = ask(client, tool_choice="required")
    said = [{"role": "user", "content": "Pick a colour."}, *({"type": "item_reference", "id": item.id} for item in first.output), {"role": "user", "content": "Which?"}]
    whole = [said[0], *(item.to_dict() for item in first.output), said[-1]]
    named, alone = (ask(client, items, temperature=0, tool_choice="none") for items in (said, whole))
    assert plain(named) == plain(alone) and named.usage.input_tokens == alone.usage.input_tokens and [item.type for item in named.output] == ["message"]
    [*_, request] = ask(client, tools=[ASKED], tool_choice="required").output
    before = len(called(place))
    yes = {"type": "mcp_approval_response", "approval_request_id": request.id, "approve": True}
    approved = ask(client, [said[0], {"type": "item_reference", "id": request.id}, yes], [ASKED], tool_choice="none")
    call = next(item for item in approved.output if item.type == "mcp_call")
    assert call.arguments == request.arguments and call.approval_request_id == request.id and len(called(place)) == before + 1


def test_an_approval_outlives_the_server(place, tiny):
    with restarted(place, tiny) as client:
        conversation = client.conversations.create()
        first = ask(client, tools=[ASKED], tool_choice="required", conversation=conversation.id, max_output_tokens=300)
        request = first.output[-1]
        assert request.type == "mcp_approval_request" and first.status == "completed"
        before = len(called(place))
    yes = {"type": "mcp_approval_response", "approval_request_id": request.id, "approve": True}
    with restarted(place, tiny) as client:
        response = ask(client, [yes], [ASKED], previous_response_id=first.id, max_output_tokens=16)
        assert response.output[0].type == "mcp_call" and response.output[0].approval_request_id == request.id
        assert response.output[0].output == f"picked {json.loads(request.arguments)['word']}" and len(called(place)) == before + 1
        # what goes on from there calls nothing again, and the approval is used up
        again = ask(client, "Thanks.", [ASKED], previous_response_id=response.id, tool_choice="none", max_output_tokens=16)
        assert [item.type for item in again.output] == ["message"] and len(called(place)) == before + 1
        with pytest.raises(openai.BadRequestError, match="answered twice"):
            ask(client, [yes], [ASKED], previous_response_id=response.id)
    with restarted(place, tiny) as client:
        with pytest.raises(openai.ConflictError, match=f"continue {response.id}, which has it"):
            ask(client, [yes], [ASKED], previous_response_id=first.id)
        assert len(called(place)) == before + 1
        # in a conversation too
        other = ask(client, [yes | {"approve": False}], [ASKED], conversation=conversation.id, tool_choice="none", max_output_tokens=16)
        assert other.output[-1].type == "message" and len(called(place)) == before + 1


def test_a_stopping_server_ends_what_it_has_begun(place, tiny):
    """An answer is one, however many rounds it has: a drain waits for all of them."""
    gate = place / "gate"
    tools = logging_tools(place) | {"alwaysAllow": ["*"]}
    (place / "drained.json").write_text(json.dumps({"mcpServers": {"fake": tools}}))
    with server(tiny, "--mcp-config", place / "drained.json", "--database", place / "drained.db", *SMALL) as (process, url):
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        request = asked_request(place / "drained.db", "slow", digest_of(url, "fake__slow"), {"path": str(gate)})
        said = [{"role": "user", "content": "Wait."}, request, {"type": "mcp_approval_response", "approval_request_id": request["id"], "approve": True}]
        events = iter(ask(client, said, [{"type": "mcp", "server_label": "fake"}], tool_choice="none", max_output_tokens=8, stream=True))
        while next(events).type != "response.mcp_call_arguments.done":
            pass
        process.send_signal(signal.SIGTERM)
        wait_for(process, "Stopping")
        with pytest.raises(openai.APIStatusError):
            ask(client)
        gate.touch()
        *_, last = events
        assert last.type == "response.incomplete" and last.response.output[1].output == "it is there"
        assert process.wait(30) == 0


def digest_of(url, name):
    return next(tool["digest"] for tool in get(url + "/v1/tools")["data"] if tool["name"] == name)


def in_background(client, gate, **more):
    """A response in the background whose tool waits for a file; returns it once the tool runs."""
    digest = digest_of(str(client.base_url).removesuffix("/v1/"), "fake__slow")
    request = asked_request(gate.parent / "kept.db", "slow", digest, {"path": str(gate)})
    yes = {"type": "mcp_approval_response", "approval_request_id": request["id"], "approve": True}
    response = ask(client, [{"role": "user", "content": "Wait."}, request, yes], [{"type": "mcp", "server_label": "fake"}], tool_choice="none",
                   max_output_tokens=8, background=True, **more)
    if not more:
        while len(response.output) < 2 or not Path(f"{gate}.begun").exists():
            response = client.responses.retrieve(response.id)
    return response


def test_a_response_in_the_background_goes_on_alone(client, place):
    """Its client asks for it later, also for its events."""
    gate = place / "later"
    running = in_background(client, gate)
    assert (running.status, running.background, running.output[1].type, running.output[1].status) == ("in_progress", True, "mcp_call", "incomplete")
    stream = client.responses.retrieve(running.id, stream=True, starting_after=4)
    first = next(iter(stream))
    assert first.sequence_number == 5
    gate.touch()
    *_, last = stream
    assert last.type == "response.incomplete" and last.response.output[1].output == "it is there"
    ended = running
    while ended.status == "in_progress":
        ended = client.responses.retrieve(running.id)
    assert ended.to_dict() == last.response.to_dict()
    assert client.responses.cancel(running.id).status == "incomplete"  # it has ended


def test_a_response_in_the_background_can_be_cancelled(client, place):
    gate = place / "never"
    running = in_background(client, gate)
    assert client.responses.cancel(running.id).status == "cancelled"
    while not (place / "never.cancelled").exists():
        client.models.list()
    assert client.responses.retrieve(running.id).output[1].status == "incomplete"
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel("resp_none")


def test_a_stream_in_the_background_outlives_its_reader(client, place):
    gate = place / "left"
    stream = in_background(client, gate, stream=True)
    begun = next(iter(stream)).response
    stream.close()
    gate.touch()
    while (response := client.responses.retrieve(begun.id)).status == "in_progress":
        pass
    assert response.output[1].output == "it is there" and response.output[-1].type == "message"


def test_what_is_not_kept_has_no_background(client):
    with pytest.raises(openai.BadRequestError, match="background"):
        ask(client, store=False, background=True)


def test_large_bodies_and_many_tools_are_read_in_a_sandbox(client, place):
    before = len(called(place))
    response = ask(client, [{"role": "user", "content": "Pick a colour."}, {"role": "user", "content": [{"type": "input_text", "text": ""}] * 3000}],
                   tool_choice="required")
    assert [item.type for item in response.output] == ["mcp_list_tools", "mcp_call", "message"] and len(called(place)) == before + 1
    tools = ask(client, "Hi", [{"type": "mcp", "server_label": "many"}], tool_choice="none", max_output_tokens=4).output[0].tools
    assert len(tools) > 20 and sum(len(tool.description) for tool in tools) > 1 << 16


def test_batches_run_no_tools(client):
    line = {"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": {"model": "default", "input": "Pick.", "tools": [TOOL]}}
    file = client.files.create(file=("lines.jsonl", json.dumps(line).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/responses", completion_window="24h")
    while batch.status not in ("failed", "completed"):
        batch = client.batches.retrieve(batch.id)
    assert batch.request_counts.failed == 1 and "a batch can't run tools" in client.files.content(batch.error_file_id).text
