"""A model that calls tools by itself, in `chat`: rounds of calls, and a worker that is killed in between."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import fake_tools
from chatlm.common.config import Settings
from chatlm.front.pool.pool import make_pool
from chatlm.terminal.conversation import read_chats
from forked import DYING
from piped_chats import chat_with, conversation

CALLER = str(Path(__file__).parents[1] / "fixtures" / "caller")
LINES = ["/tools off all", "/tools on fake__get_current_time", "What time is it in Tokyo and in Paris?", "Thank you.", "What time is it in Tokyo?"]


def with_adapter(pool):
    """The pool, which answers everything with its adapter. The command would merge it, which takes longer at each start of a worker."""
    [adapter] = pool.adapters.all
    answer = pool.answer
    pool.answer = lambda request: answer(replace(request, params=replace(request.params, adapter=adapter)))
    return pool


@pytest.fixture
def chat(monkeypatch, tmp_path):
    """A function that has a chat with the model and returns (its nodes, the zones that the clock was asked for)."""
    def run(name="chat", worker_command=DYING, **settings):
        asked, saved = tmp_path / f"{name}.asked", tmp_path / f"{name}.json"
        config = tmp_path / "mcp.json"
        program = {"command": sys.executable, "args": [fake_tools.__file__, "clock", str(asked)], "alwaysAllow": ["*"]}
        config.write_text(json.dumps({"mcpServers": {"fake": program}}))
        options = Settings(adapter=(f"caller={CALLER}",), kv_cache_memory=60 << 20, mcp_config=str(config))
        pool = with_adapter(make_pool(options, worker_command))
        assert chat_with(pool, monkeypatch, [*LINES, f"/save {saved}"], mcp_config=str(config), **settings) == 0
        [chat] = read_chats(saved.read_text())
        return chat.path(), asked.read_text().split()
    return run


def calls_in(node):
    return [json.loads(call["arguments"])["timezone"] for call in node["calls"]]


@pytest.mark.slow
def test_a_killed_worker_repeats_no_call(chat, monkeypatch, tmp_path):
    """Two calls in one round, no call, one call. Then the same, but the worker is killed while the model writes a call, and again while it says
    what it was told: every token is the same."""
    struck = tmp_path / "struck"
    struck.mkdir()
    monkeypatch.setenv("STRUCK", str(struck))
    whole, asked = chat("whole", temperature=1.0, seed=11)
    [both, times, thanks, one, time] = [node for node in whole if node["role"] == "assistant"]
    assert [calls_in(node) for node in (both, one)] == [["Asia/Tokyo", "Europe/Paris"], ["Asia/Tokyo"]]
    assert asked == ["Asia/Tokyo", "Europe/Paris", "Asia/Tokyo"] and "calls" not in thanks
    assert (times["content"], time["content"]) == ("It is 15:44 in Tokyo and 07:44 in Paris.", "It is 15:44 in Tokyo.")
    orders = [struck / name for name in ("next-1-kill-arguments", "next-2-kill-words")]
    for order in orders:
        order.touch()
    killed, asked_again = chat("killed", temperature=1.0, seed=11)
    assert not any(order.exists() for order in orders)
    assert conversation(killed) == conversation(whole) and asked_again == asked
