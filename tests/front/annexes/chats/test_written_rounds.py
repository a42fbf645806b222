"""An answer with rounds of tools that the server writes into a chat: its calls have their results there."""

import json
from functools import partial

import pytest

import fake_pool
import tool_rounds
from chatlm.front.annexes import ANNEXES
from chatlm.front.front import create_app
from chatlm.front.serve import database_of
from tool_rounds import calls, tool_place

SPACE = {"X-Chat-Space": "A" * 22}
CHAT_ID, QUESTION, NODE = (f"{number:032x}" for number in (1, 2, 3))
CHAT = {"id": CHAT_ID, "node": NODE, "parent": QUESTION}
ADD = calls(("fake__add", {"a": 2, "b": 3}))
ASKED = {
    "/v1/responses": {"input": "2 + 3?", "tools": [{"type": "mcp", "server_label": "fake", "require_approval": "never"}]},
    "/v1/messages": {"messages": [{"role": "user", "content": "2 + 3?"}], "max_tokens": 99,
                     "mcp_servers": [{"type": "url", "name": "fake"}],
                     "tools": [{"type": "mcp_toolset", "mcp_server_name": "fake"}]},
}


@pytest.mark.parametrize("annexes", [ANNEXES, ANNEXES[::-1]], ids=["in their order", "the other way round"])
@pytest.mark.parametrize("path", ASKED)
async def test_calls_are_stored_with_their_results(tmp_path, monkeypatch, path, annexes):
    """Whether the rounds are around what writes the chat, or it is around them."""
    monkeypatch.setattr(fake_pool, "create_app", partial(create_app, annexes=annexes))
    monkeypatch.setattr(tool_rounds, "open_store", lambda settings: database_of(settings, ANNEXES))
    node = {"created": 2.0, "conversation": CHAT_ID, "role": "user", "content": "2 + 3?"}
    made = [{"kind": "chat", "id": CHAT_ID, "patch": {"created": 1.0}}, {"kind": "node", "id": QUESTION, "patch": node}]
    async with tool_place(tmp_path, f"Let me see. {ADD}", "It is five.", database=str(tmp_path / "store.db")) as at:
        assert (await at.post("/v1/chats/changes", {"changes": made}, **SPACE))[0] == 200
        events = await at.events_of(path, {**ASKED[path], "chat": CHAT}, **SPACE)
        assert at.called == [["add", {"a": 2, "b": 3}]] and "It is five." in json.dumps(events)
        async with at.http.get(f"{at.url}/v1/chats/{CHAT_ID}", headers=SPACE) as response:
            [answer] = [node for node in (await response.json())["nodes"] if node["id"] == NODE]
    [call] = answer["calls"]
    assert (call["name"], json.loads(call["arguments"]), call["result"]) == ("fake__add", {"a": 2, "b": 3}, "5")
    assert answer["content"].replace("\n", "") == "Let me see. It is five." and "stream" not in answer
    assert answer["timings"]["completion_tokens"] == 2
