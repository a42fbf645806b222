"""A running server whose model is scripted and whose tools are real, for tests of the server's own loop."""

import json
import sqlite3
import sys
import time
from contextlib import asynccontextmanager, closing
from secrets import token_hex

import aiohttp

import fake_tools
from chatlm.common.config import Settings
from chatlm.common.messages.tool_rounds import ApprovalMark
from chatlm.front.annexes.tools.approvals import key_of
from chatlm.front.api.approval_ids import approval_id
from chatlm.front.store.store import open_store
from fake_pool import serving
from scripted_pool import ScriptedPool


def calls(*pairs):
    """What a model writes to make calls: (tool, arguments)."""
    return "\n".join(f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>' for name, arguments in pairs)


def asked_request(database, name, digest, arguments):
    """An approval request as a server without keys would have asked it, which has this database: also one that its model would not write."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        [(secret,)] = connection.execute("SELECT value FROM secrets").fetchall()
    mark = ApprovalMark(key_of(secret, ""), int(time.time()) + 3600)
    return {"type": "mcp_approval_request", "id": approval_id(mark, token_hex(12), digest), "server_label": "fake", "name": name,
            "arguments": json.dumps(arguments)}


class ToolPlace:
    """A running server, its model, and the calls that its tools have got."""

    def __init__(self, pool, url, log, http):
        self.pool, self.url, self.log, self.http = pool, url, log, http

    @property
    def called(self):
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    @property
    def sent(self):
        """(role, content) of the messages of each request of the model."""
        return [[(message.role, message.content) for message in request.messages] for request in self.pool.requests]

    async def post(self, path, body, **headers):
        """(status, headers, body) of an answer."""
        async with self.http.post(self.url + path, json=body, headers=headers) as response:
            return response.status, response.headers, await response.json()

    async def events_of(self, path, body, **headers):
        async with self.http.post(self.url + path, json={**body, "stream": True}, headers=headers) as response:
            assert response.status == 200, await response.text()
            return [json.loads(line[6:]) for line in (await response.read()).splitlines() if line.startswith(b"data: ")]

    async def until_called(self, count):
        while len(self.called) < count:
            await self.http.get(self.url + "/v1/models")


@asynccontextmanager
async def tool_place(folder, *texts, faults=(), pool=None, servers=None, allowed=("*",), kind=ToolPlace, **settings):
    """texts: what the model writes, one for each request. The tool server is called fake; servers: others."""
    log = folder / "calls"
    config = folder / "mcp.json"
    program = {"command": sys.executable, "args": [fake_tools.__file__, *faults, "log", str(log)], "alwaysAllow": [*allowed]}
    config.write_text(json.dumps({"mcpServers": {"fake": program, **(servers or {})}}))
    pool = pool or ScriptedPool(*texts)
    chosen = Settings(mcp_config=str(config), **settings)
    async with serving(pool, chosen, await open_store(chosen)) as url, aiohttp.ClientSession() as http:
        yield kind(pool, url, log, http)
