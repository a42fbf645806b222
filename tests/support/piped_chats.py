"""The command `chat` with lines from a pipe."""

import asyncio
import os
import sys

from chatlm.common.config import Settings
from chatlm.front.pool import pool as pool_module
from chatlm.terminal import chat as terminal_chat
from patching import patch


def chat_with(pool, monkeypatch, lines, **settings):
    """`chat` over a pool, with these lines as a pipe: its exit status."""
    read, write = os.pipe()
    os.write(write, ("\n".join(lines) + "\n").encode())
    os.close(write)
    monkeypatch.setattr(sys, "stdin", os.fdopen(read))
    patch(monkeypatch, pool_module, "make_pool", lambda settings: pool)
    tools = {"tools": "all"} if settings.get("mcp_config") else {}
    return asyncio.run(terminal_chat.chat(Settings(command="chat", **tools | settings)))


def conversation(nodes):
    """What was said and called in each message, and how many tokens that took; without ids and times."""
    return [(node["role"], node["content"], [(call["name"], call["arguments"], call["result"]) for call in node.get("calls", ())],
             (node.get("timings") or {}).get("completion_tokens")) for node in nodes]
