"""MCP as servers really speak it, where the text of the protocol leaves room or is not kept."""

import os
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import spoken_mcp
from chatlm.front.tools.config import configs_in
from chatlm.front.tools.server import ServerState
from chatlm.front.tools.toolbox import Toolbox


@asynccontextmanager
async def opened(habit, way="program"):
    """(the toolbox, what a server behind a URL has seen)"""
    server = spoken_mcp.at_url(habit) if way == "url" else None
    program = {"command": sys.executable, "args": [str(Path(spoken_mcp.__file__)), habit]}
    table = {"fake": {"url": f"http://127.0.0.1:{server.server_port}/mcp"} if server else program}
    box = Toolbox(configs_in({"mcpServers": table}, "test", os.environ), 20, 16_384)
    box.start()
    await box.refresh()
    try:
        yield box, server.seen if server else []
    finally:
        await box.close()
        if server:
            server.shutdown()


async def call(box):
    [name, *_] = box.offered()
    return await box.call(box.offered()[name], {}, "me")


@pytest.mark.parametrize("way", ["program", "url"])
@pytest.mark.parametrize("habit", ["empty-cursor", "number-cursor", "null-cursor", "stuck-cursor"])
async def test_all_pages_are_read(habit, way):
    async with opened(habit, way) as (box, _):
        assert [*box.offered()] == ["fake__first", "fake__second"]
        notices = box.notices(box.servers[0])
        assert [*notices] == (["its list of tools has no end: a cursor came twice"] if habit == "stuck-cursor"
                              else [])


async def test_a_server_with_too_many_tools_says_so(caplog):
    """In its state, which /v1/tools and the page show, and in the log, once."""
    async with opened("many") as (box, _):
        [notice] = box.notices(box.servers[0])
        assert len(box.offered()) == 128 and notice.startswith("72 tools are left out (t128, t129, ")
        box.offered()
        assert caplog.text.count(notice) == 1


@pytest.mark.parametrize("way", ["program", "url"])
@pytest.mark.parametrize("habit", ["plain", "null-error", "text-ids", "bom", "crlf"])
async def test_answers_are_understood(habit, way):
    async with opened(habit, way) as (box, _):
        result = await call(box)
        assert (result.text, result.is_error) == ("done", False)


@pytest.mark.parametrize("habit, text, pictures", [
    ("picture-file", "[picture 1]", [("image/png", spoken_mcp.PNG)]),
    ("jpg", "[picture 1]", [("image/jpeg", spoken_mcp.PNG)]),
    ("data-url", "[picture 1]", [("image/png", spoken_mcp.PNG)]),
    ("text-file", "grüße", []), ("json-file", "grüße", []),
    ("zip-file", "[file:///a, which is not text]", []),
    ("structured", '{"celsius": 21.5}', []), ("plain-content", "plain text", [])])
async def test_results_have_embedded_files(habit, text, pictures):
    async with opened(habit) as (box, _):
        result = await call(box)
        assert result.text == text
        assert [(picture.mime_type, picture.data) for picture in result.pictures] == pictures


@pytest.mark.parametrize("habit", ["closes-once", "closes-twice"])
async def test_a_stream_that_is_closed_early_is_asked_for_again(habit):
    async with opened(habit, "url") as (box, seen):
        assert (await call(box)).text == "done"
        assert [last for how, _, last in seen if how == "GET"] == ["e1", "e2"][:1 + (habit == "closes-twice")]
        assert [method for _, _, method in seen].count("tools/call") == 1


async def test_the_last_event_needs_no_empty_line():
    async with opened("no-empty-line", "url") as (box, _):
        assert (await call(box)).text == "done"


@pytest.mark.parametrize("habit", ["loses-session-404", "loses-session-400", "loses-session-in-plain-text"])
async def test_a_call_that_never_began_for_its_session_is_made_in_a_new_one(habit):
    async with opened(habit, "url") as (box, seen):
        assert (await call(box)).text == "done"
        assert [method for _, _, method in seen].count("initialize") == 2


async def test_a_call_that_may_have_begun_is_not_made_again():
    async with opened("loses-without-a-word", "url") as (box, seen):
        result = await call(box)
        assert result.is_error and "the outcome is unknown" in result.text
        assert [method for _, _, method in seen].count("tools/call") == 1


async def test_other_refusals_keep_the_session():
    async with opened("loses-no-session", "url") as (box, seen):
        result = await call(box)
        assert result.is_error and "x must be a number" in result.text
        assert (await call(box)).text == "done"
        assert [method for _, _, method in seen].count("initialize") == 1


async def test_a_redirect_on_the_same_origin_is_followed():
    """At once to the new place from then on."""
    async with opened("redirects", "url") as (box, seen):
        assert (await call(box)).text == "done"
        assert [path for _, path, _ in seen].count("/mcp") == 1


async def test_a_redirect_that_would_lose_the_message_is_not_followed():
    async with opened("redirects-to-get", "url") as (box, seen):
        [server] = box.servers
        assert server.state is ServerState.FAILED
        assert "a redirect to another path of the same origin, which is not followed" in server.reason


async def test_schemas_are_made_usable():
    async with opened("odd-schemas") as (box, _):
        assert len(box.offered()) == 8
        assert all(isinstance(tool.tool.parameters, dict) and isinstance(
            tool.tool.parameters.get("properties", {}), dict) for tool in box.offered().values())
