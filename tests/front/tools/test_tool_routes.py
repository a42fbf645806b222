"""GET /v1/tools and POST /v1/tools/call of a real server."""

import asyncio
import http.client
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path

import aiohttp
import pytest

import fake_tools
import real_server
from chatlm.common.config import Settings
from chatlm.front.annexes.tools.limits import MOST_CALL_BYTES
from chatlm.front.intake import budget as budgets
from chatlm.front.intake.budget import Budget
from fake_pool import FakePool, serving
from patching import patch

FAKE = str(Path(fake_tools.__file__))
SMALL = "--kv-cache-memory", "4M", "--max-batch", "2"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("tools")


def config(place, name="mcp.json", **servers):
    path = place / name
    path.write_text(json.dumps({"mcpServers": servers or {"fake": program(), "other": program("dies")}}))
    return path


def program(*faults, **fields):
    return {"command": sys.executable, "args": [FAKE, *faults], **fields}


@pytest.fixture(scope="module")
def url(place, nanochat_fixtures):
    with real_server.server(nanochat_fixtures / "gen5", "--mcp-config", config(place), "--tool-result", "1000", *SMALL) as (_, url):
        yield url


def ask(url, body=None, key=None, **headers):
    """(status, body) of a GET, or of a POST with a body."""
    headers |= {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error).get("error")


def call(at, name="fake__add", key=None, headers=None, **body):
    return ask(at + "/v1/tools/call", {"name": name, "arguments": {"a": 2, "b": 3}} | body, key, **(headers or {}))


def tools_of(url, **more):
    return {tool["name"]: tool for tool in ask(url + "/v1/tools", **more)[1]["data"]}


def test_tools_are_listed_with_their_servers(url):
    status, body = ask(url + "/v1/tools")
    assert status == 200
    tools = {tool["name"]: tool for tool in body["data"]}
    add = tools["fake__add"]
    assert (add["server"], add["tool"], add["description"], add["ask"]) == ("fake", "add", "adds two numbers", True)
    assert add["parameters"]["required"] == ["a", "b"] and add["annotations"] == {"readOnlyHint": True} and len(add["digest"]) == 16
    states = {server["label"]: server for server in body["servers"]}
    assert states["fake"]["state"] == "ready" and states["other"]["state"] == "failed" and "no licence found" in states["other"]["reason"]


def test_what_can_t_be_enforced_is_marked(url):
    tools = tools_of(url)
    if tools["fake__add"]["enforced"] is not True:
        assert tools["fake__add"]["enforced"] == "the model can't call tools"
    else:
        assert "not" in tools["fake__not_strict"]["enforced"]


def test_a_call_is_answered(url):
    status, body = call(url)
    assert status == 200 and body | {"ms": 0} == {"text": "5", "is_error": False, "cut": 0, "ms": 0, "images": []}
    assert call(url, "fake__wrong", arguments={})[1]["is_error"] is True
    long = call(url, "fake__long", arguments={"size": 9000})[1]
    assert long["cut"] == 8008 and "8,008 characters are missing" in long["text"]
    assert call(url, "fake__picture", arguments={})[1]["images"] == [{"mime_type": "image/png", "data": fake_tools.PIXEL}]


def test_pictures_are_read_though_the_default_model_is_broken(place, tmp_path, nanochat_fixtures):
    """The tool has run by then: its result must arrive, whatever models do. A picture that can't be read is named."""
    pytest.importorskip("transformers")
    pytest.importorskip("PIL")
    from tiny_sight import make_smolvlm, save_sight
    save_sight(tmp_path / "sees", "smolvlm", make_smolvlm())
    (tmp_path / "a-broken.gguf").write_bytes(b"GGUF" + bytes(100))
    servers = config(place, "pictures.json", fake=program(), broken=program("broken-picture"))
    with real_server.server("serve", tmp_path / "a-broken.gguf", tmp_path / "sees", "--mcp-config", servers, *SMALL) as (_, url):
        states = {model["id"]: model["state"] for model in ask(url + "/v1/models")[1]["data"]}
        assert states == {"a-broken": "failed", "sees": "unloaded"}
        assert ask(url + "/v1/chat/completions", {"model": "sees", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1})[0] == 200
        status, body = call(url, "fake__picture", arguments={})
        assert status == 200 and body["images"] == [{"mime_type": "image/png", "data": fake_tools.PIXEL}]
        status, body = call(url, "broken__picture", arguments={})
        assert status == 200 and body["images"] == [] and "[picture 1 can't be read: " in body["text"]


def test_a_call_can_be_streamed(url, place):
    path = place / "streamed"
    request = urllib.request.Request(url + "/v1/tools/call", json.dumps(
        {"name": "fake__slow", "arguments": {"path": str(path)}, "stream": True}).encode(), {"Content-Type": "application/json"})
    events = []
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        for line in response:
            if line.startswith(b"data: "):
                events.append(json.loads(line[6:]))
                path.touch()
    assert events[0] | {"progress": 1} == {"type": "progress", "progress": 1, "total": None, "message": "still waiting"}
    assert events[-1]["type"] == "result" and events[-1]["text"] == "it is there"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_call(url, place, stream):
    path = place / f"left-{stream}"
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    body = json.dumps({"name": "fake__slow", "arguments": {"path": str(path)}, "stream": stream})
    connection.request("POST", "/v1/tools/call", body, {"Content-Type": "application/json"})
    if stream:
        connection.getresponse().read(10)
    else:  # until the call has begun, which nothing shows
        call(url)
    connection.close()
    for _ in range(2000):
        if Path(f"{path}.cancelled").exists():
            break
        call(url)
    assert Path(f"{path}.cancelled").exists()


def test_a_tool_that_has_changed_is_not_called(url):
    digest = tools_of(url)["fake__add"]["digest"]
    assert call(url, digest=digest)[0] == 200
    status, error = call(url, digest="0" * 16)
    assert status == 409 and error["code"] == "tool_changed"


@pytest.mark.parametrize("body, status, words", [
    ({"name": "fake__nothing"}, 400, "fake__add"), ({"name": "add"}, 400, "fake__add"), ({"name": 7}, 400, "name"),
    ({"arguments": "{}"}, 400, "arguments"), ({"arguments": None}, 400, "arguments"), ({"command": "sh"}, 200, ""), ({"url": "http://x"}, 200, "")])
def test_a_body_names_a_tool_and_nothing_else(url, body, status, words):
    """There is no way to name a program, a URL or a header."""
    found, error = call(url, **body)
    assert found == status and (status == 200 or words in error["message"])


def test_arguments_may_be_a_file_s_text(url, place):
    """The body has at most MOST_CALL_BYTES."""
    path = place / "written"
    body = {"name": "fake__count", "arguments": {"path": str(path), "line": ""}}
    room = MOST_CALL_BYTES - len(json.dumps(body))
    body["arguments"]["line"] = "\u00e9\n" * (room // 8) + "x" * (room % 8)  # written as \\u00e9\\n
    assert len(json.dumps(body)) == MOST_CALL_BYTES and call(url, **body)[0] == 200
    assert path.read_text() == body["arguments"]["line"] + "\n"
    body["arguments"]["line"] += "x"
    status, error = call(url, **body)
    assert status == 413 and f"maximum size of {MOST_CALL_BYTES} bytes" in error["message"]
    assert path.read_text().count("\n") == room // 8 + 1


async def test_running_calls_hold_their_bodies(monkeypatch, place):
    """A client's calls hold at most its share of LIMITS.held_bytes. What is above waits, and is then refused."""
    budget = Budget(4 * 300_000)
    patch(monkeypatch, budgets, "Budget", lambda total, share=4: budget)
    path = place / "held"
    large = {"name": "fake__slow", "arguments": {"path": str(path), "text": "x" * 200_000}}
    async with serving(FakePool(), Settings(mcp_config=str(config(place, "held.json", fake=program())))) as url, aiohttp.ClientSession() as client:
        assert (await client.get(url + "/v1/tools")).status == 200  # once the tool server runs
        first = asyncio.ensure_future(client.post(url + "/v1/tools/call", json=large))
        while budget.used < 200_000:
            await asyncio.sleep(0.01)
        patch(monkeypatch, budgets, "BODY_S", 0.1)
        assert (await client.post(url + "/v1/tools/call", json=large)).status == 503
        path.touch()
        assert (await (await first).json())["text"] == "it is there" and budget.used == 0
        assert (await client.post(url + "/v1/tools/call", json=large)).status == 200


def test_pages_of_others_can_use_no_tool(place, nanochat_fixtures):
    """Whatever --cors-origin says, and whoever a proxy speaks for."""
    with real_server.server(nanochat_fixtures / "gen5", "--mcp-config", config(place, "cors.json", fake=program()), "--cors-origin", "*", "--cors-origin", "null", *SMALL) as (_, url):
        own = {"Origin": url}
        assert ask(url + "/v1/tools", **own)[0] == call(url, headers=own)[0] == 200      # the list waits for the tool server
        for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"},
                        {"X-Forwarded-For": "203.0.113.7"}):
            assert call(url, headers=headers)[0] == 403 and ask(url + "/v1/tools", **headers)[0] == 403


def test_keys_have_the_tools_that_their_field_names(place, nanochat_fixtures):
    keys = place / "keys.txt"
    keys.write_text("all: key-all tools=*\none: key-one tools=fake.add\nlabel: key-label tools=fake\nnone: key-none\n")
    path = config(place, "keys.json", fake=program(), fake2=program())
    with real_server.server(nanochat_fixtures / "gen5", "--mcp-config", path, "--api-key-file", keys, *SMALL) as (_, url):
        assert ask(url + "/v1/tools")[0] == 401 and call(url)[0] == 401
        names = {key: [*tools_of(url, key=key)] for key in ("key-all", "key-one", "key-label", "key-none")}
        assert len(names["key-all"]) == 2 * len(names["key-label"]) and names["key-one"] == ["fake__add"] and names["key-none"] == []
        assert all(name.startswith("fake__") for name in names["key-label"])
        assert ask(url + "/v1/tools", key="key-none")[1]["servers"] == [] and len(ask(url + "/v1/tools", key="key-one")[1]["servers"]) == 1
        assert call(url, key="key-one")[0] == call(url, "fake2__add", key="key-all")[0] == 200
        for key, name in (("key-one", "fake__show"), ("key-label", "fake2__add"), ("key-none", "fake__add")):
            status, error = call(url, name, key=key, arguments={})
            assert status == 403 and error["code"] == "tool_not_allowed"


def test_a_server_without_the_flag_has_no_tools(tiny_url):
    assert ask(tiny_url + "/v1/tools")[1]["data"] == []
    assert call(tiny_url)[0] == 403


def test_a_wrong_file_stops_the_start(place):
    import subprocess
    path = place / "wrong.json"
    path.write_text('{"mcpServers": {"x": {"comand": "y"}}}')
    ended = subprocess.run([sys.executable, str(real_server.SCRIPT), "--mcp-config", str(path), "--port", "0"], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and "did you mean command" in ended.stderr and len(ended.stderr.splitlines()) == 1
