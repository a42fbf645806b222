"""A page whose name resolves to this machine reaches the server from here, but under its own name."""

import asyncio
import json
import re
import socket

import pytest

from chatlm.common.config import ApiKey, Settings
from chatlm.front.annexes.downloads.row import DOWNLOAD_ROUTES
from chatlm.front.annexes.exports.row import EXPORT_ROUTES
from chatlm.front.annexes.tools.row import TOOL_ROUTES
from chatlm.front.front import ROUTES
from chatlm.front.server.access import server_urls
from chatlm.front.server.host_names import is_own_name, split_address
from fake_pool import FakePool, serving
from tool_rounds import tool_place

OPERATORS = [row for row in ROUTES if row.operator_act]
LOCAL = [(row.method, re.sub("{.*?}", "x", row.path)) for row in (*OPERATORS, *TOOL_ROUTES)]
OWN_NAME = socket.gethostname().lower()
LABEL = OWN_NAME.partition(".")[0]
OWN = ["localhost", "LOCALHOST", "localhost.", "LocalHost.:8000", "localhost:65535", "127.0.0.1",
       "127.0.0.1:8000", "127.9.8.7", "[::1]", "[::1]:8000", "[0:0:0:0:0:0:0:1]:1", "[::ffff:127.0.0.1]",
       "[::FFFF:7F00:1]:80",
       "0.0.0.0:8000", OWN_NAME, OWN_NAME.upper() + ".", LABEL, LABEL + ":8000", LABEL + ".local",
       LABEL.upper() + ".LOCAL.:8000"]
FOREIGN = [
    "evil.example", "evil.example:8000", "EVIL.example.", "localhost.evil.example",
    "127.0.0.1.evil.example", "evil.example:127.0.0.1", "localhost:8000.evil.example",
    "localhost@evil.example", "evil.example#localhost", "evil.example/localhost", "localhost, evil.example",
    "evil.example, localhost", "[::1].evil.example", "[::1]evil", "[2001:db8::1]:8000", "192.0.2.1",
    "192.0.2.1:8000", "[::ffff:192.0.2.1]", "224.0.0.1", "255.255.255.255", "no-such-box.local",
    f"{LABEL}.evil.example", f"evil.{LABEL}", f"{LABEL}.local.evil.example", f"evil-{LABEL}.local",
    "localhost..", ".", ":8000", "", "evil", "1", "xn--lcalhost-h2a", "loc\u0430lhost", "localho\u017ft",
    "[::1%25evil]"]


async def raw(url, sent):
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(sent)
    answer = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    return answer


async def asked(url, method, path, host, **headers):
    """(status, text) of what a browser sends that takes the server for a part of a page at `host`."""
    headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"} | headers
    sent = [f"{name}: {value}" for name, value in headers.items() if value is not None]
    lines = [f"{method} {path} HTTP/1.1", *sent]
    body = b'{"model": "fake-model", "name": "x", "arguments": {}}'
    head = "\r\n".join([*lines, "Connection: close", f"Content-Length: {len(body)}", "", ""])
    answer = await raw(url, head.encode() + body)
    return int(answer.split(None, 2)[1]), answer.partition(b"\r\n\r\n")[2].decode()


@pytest.mark.parametrize("method, path", LOCAL)
async def test_a_rebound_page_neither_operates_nor_uses_tools(method, path):
    pool = FakePool()
    async with serving(pool) as url:
        for host in FOREIGN:
            status, text = await asked(url, method, path, host)
            assert status == 403 and "none of them (--allowed-host" in text or status == 400, host
            for headers in {}, {"Sec-Fetch-Site": None}, {"Origin": "http://localhost"}:
                headers = {"Origin": None} | headers
                assert (await asked(url, method, path, host, **headers))[0] in (400, 403), host
        assert (await asked(url, "HEAD", path, "evil.example"))[0] in (403, 405)
    assert not pool.requests


MCP = {"type": "mcp", "server_label": "fake", "require_approval": "never"}
IN_BODIES = [("/v1/responses", {"input": "hi", "tools": [MCP]}),
             ("/v1/messages", {"max_tokens": 9, "messages": [{"role": "user", "content": "hi"}],
                               "mcp_servers": [{"type": "url", "name": "fake", "url": ""}],
                               "tools": [{"type": "mcp_toolset", "mcp_server_name": "fake"}]})]


@pytest.mark.parametrize("path, body", IN_BODIES)
async def test_a_rebound_page_has_no_tools_in_its_requests(tmp_path, path, body):
    async with tool_place(tmp_path, "Hello.", "Hello.") as place:
        for host, expected in ("evil.example:8000", 403), ("localhost:8000", 200):
            headers = {"Host": host, "Origin": f"http://{host}"}
            async with place.http.post(place.url + path, json=body, headers=headers) as response:
                text = await response.text()
                assert response.status == expected and ("--allowed-host" in text) == (expected == 403), text
        assert not place.called


async def test_this_machine_is_served_under_each_name_of_its_own():
    async with serving(FakePool()) as url:
        for host in OWN:
            for method, path in ("GET", "/models/downloads"), ("GET", "/v1/tools"), ("POST", "/models/load"):
                assert (await asked(url, method, path, host))[0] == 200, (path, host)


async def test_an_allowed_host_is_a_name_of_this_machine():
    async with serving(FakePool(), Settings(allowed_host=("box.example",))) as url:
        for host in "box.example", "BOX.example.:8000":
            assert (await asked(url, "GET", "/v1/tools", host))[0] == 200
        assert (await asked(url, "GET", "/v1/tools", "sub.box.example"))[0] == 403


async def test_a_key_needs_no_name():
    """A page that rebinds its name has no key to send."""
    keys = (ApiKey.hashed("secret", "ann", tools=("*",)),)
    async with serving(FakePool(), Settings(keys=keys)) as url:
        for path in "/models/downloads", "/v1/tools":
            assert (await asked(url, "GET", path, "evil.example"))[0] == 401
            assert (await asked(url, "GET", path, "box.example", Authorization="Bearer secret"))[0] == 200


async def test_old_clients_without_a_host_are_this_machine_s():
    async with serving(FakePool()) as url:
        answer = await raw(url, b"GET /v1/tools HTTP/1.0\r\n\r\n")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["data"] == []


def test_every_route_about_files_of_this_machine_is_an_operator_s():
    for row in (*DOWNLOAD_ROUTES, *EXPORT_ROUTES):
        assert row.operator_act, row.path
    others = [row for row in ROUTES if row.path.startswith("/models/") and not row.operator_act]
    assert not others


def test_only_addresses_of_interfaces_are_own():
    for url in server_urls("0.0.0.0", 8000):
        assert is_own_name(split_address(url.removeprefix("http://"))[0])
    assert [host for host in OWN if not is_own_name(split_address(host)[0])] == []
    assert [host for host in FOREIGN if is_own_name(split_address(host)[0])] == []
