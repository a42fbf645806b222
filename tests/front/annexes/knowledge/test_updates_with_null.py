"""null in bodies about what is kept: in an update it takes a value away; elsewhere it is as if absent, at any depth. No body ends with a 5xx."""

import pytest

from annex_bodies import STORE_FIELDS
from embedding_pool import knowing
from sent_bodies import STRANGE, lacking, members_of, nulled, replaced

ME = "A" * 22
TWICE = {"type": "static", "static": {"max_chunk_size_tokens": 200, "chunk_overlap_tokens": 50}}
FILTER = {"type": "and", "filters": [{"type": "eq", "key": "kind", "value": "a"}]}


@pytest.fixture
async def ask(tmp_path):
    async with knowing(tmp_path / "k.db") as asking:
        yield asking


async def bodies(ask):
    """A rich body for each route: pattern -> (path, body)."""
    store, [file] = await ask.store(ME, "Cats purr.")
    _, talk = await ask(ME, "/v1/conversations", {"metadata": {"a": "b"}})
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}], "status": "completed"}
    part = {"type": "output_text", "text": "Yes [1].", "annotations": [{"type": "file_citation", "file_id": "f", "index": 4}], "logprobs": []}
    of_tools = [{"id": "m1", "type": "mcp_call", "server_label": "s", "name": "n", "arguments": "{}", "status": "completed", "approval_request_id": None, "output": "5", "error": None},
                {"id": "m2", "type": "mcp_list_tools", "server_label": "s", "tools": [{"name": "n", "input_schema": {}}]}, {"id": "m3", "type": "mcp_approval_request", "server_label": "s", "name": "n", "arguments": "{}"},
                {"id": "m4", "type": "file_search_call", "status": "completed", "queries": ["q"], "results": [{"text": "t"}]}, {"id": "m5", "type": "message", "role": "assistant", "status": "completed", "content": [part]}]
    lines = await ask.file(ME, '{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "Hi"}]}}', "lines.jsonl", "batch")
    return {
        "/v1/batches": ("/v1/batches", {"input_file_id": lines, "endpoint": "/v1/chat/completions", "completion_window": "24h", "metadata": {"a": "b"}, "output_expires_after": {"anchor": "created_at", "seconds": 3600}}),
        "/v1/conversations": ("/v1/conversations", {"items": [item], "metadata": {"a": "b"}}), "/v1/conversations/{id}": (f"/v1/conversations/{talk['id']}", {"metadata": {"a": "c"}}),
        "/v1/conversations/{id}/items": (f"/v1/conversations/{talk['id']}/items", {"items": [item, *of_tools]}),
        "/v1/vector_stores": ("/v1/vector_stores", {"name": "n", "description": "d", "file_ids": [file], "chunking_strategy": TWICE, "expires_after": {"anchor": "last_active_at", "days": 3}, "metadata": {"a": "b"}, "embedding_model": "fake-model"}),
        "/v1/vector_stores/{id}": (f"/v1/vector_stores/{store}", {"name": "n", "expires_after": {"anchor": "last_active_at", "days": 3}, "metadata": {"a": "b"}}),
        "/v1/vector_stores/{id}/search": (f"/v1/vector_stores/{store}/search", {"query": "cats", "max_num_results": 3, "filters": FILTER, "ranking_options": {"ranker": "none", "score_threshold": 0.5}, "rewrite_query": False}),
        "/v1/vector_stores/{id}/files": (f"/v1/vector_stores/{store}/files", {"file_id": file, "attributes": {"kind": "a"}, "chunking_strategy": TWICE}),
        "/v1/vector_stores/{id}/files/{file}": (f"/v1/vector_stores/{store}/files/{file}", {"attributes": {"kind": "a"}}),
        "/v1/vector_stores/{id}/file_batches": (f"/v1/vector_stores/{store}/file_batches", {"files": [{"file_id": file, "attributes": {"kind": "a"}, "chunking_strategy": TWICE}], "attributes": {"kind": "b"}, "chunking_strategy": TWICE})}


CLEARED = {("/v1/vector_stores/{id}/files/{file}", "attributes"), ("/v1/conversations/{id}", "metadata")}       # required, so absent is refused


async def test_null_is_as_if_absent_and_nothing_is_a_5xx(ask):
    asked = await bodies(ask)
    assert {*asked} == {route for route, fields in STORE_FIELDS.items() if fields}
    different, failed = [], []
    for pattern, (path, body) in asked.items():
        assert (await ask(ME, path, body))[0] == 200, (pattern, await ask(ME, path, body))
        for place in members_of(body):
            statuses = [(await ask(ME, path, change(body, place)))[0] for change in (nulled, lacking)]
            if statuses[0] != statuses[1] and (pattern, place[0]) not in CLEARED:
                different.append((pattern, place, statuses))
            for value in STRANGE:
                status, answer = await ask(ME, path, replaced(body, place, value))
                if status >= 500:
                    failed.append((pattern, place, value, answer))
    assert different == [] and failed == []


async def test_null_takes_a_value_away(ask):
    store, [file] = await ask.store(ME, "Cats purr.", name="zoo", metadata={"a": "b"}, expires_after={"anchor": "last_active_at", "days": 1})
    path = f"/v1/vector_stores/{store}"
    for body, wanted in (({}, ("zoo", {"a": "b"}, 1)), ({"expires_after": None}, ("zoo", {"a": "b"}, None)), ({"metadata": None}, ("zoo", {}, None)), ({"name": None}, ("", {}, None)), ({"expires_after": {"anchor": None, "days": 2}}, ("", {}, 2))):
        status, shown = await ask(ME, path, body)
        assert status == 200, shown
        assert (shown["name"], shown["metadata"], (shown["expires_after"] or {}).get("days")) == wanted
        assert (shown["expires_at"] is None) == (wanted[2] is None) and shown["status"] == "completed"
    await ask(ME, f"{path}/files/{file}", {"attributes": {"kind": "a"}})
    assert (await ask(ME, f"{path}/files/{file}", {"attributes": None}))[1]["attributes"] == {}
    _, talk = await ask(ME, "/v1/conversations", {"metadata": {"a": "b"}})
    assert (await ask(ME, f"/v1/conversations/{talk['id']}", {"metadata": None}))[1]["metadata"] == {}
