"""Workers killed while the server's own loop of tools runs: no call is made twice, and the answer is what it would have been."""

import asyncio
import json
import random
import sys

import aiohttp
import pytest

import fake_tools
import tiny_gguf
from fake_pool import serving
from nightly import by_day

pytestmark = pytest.mark.timeout(600)
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "
SEEDS = 0, 1, 8, 15  # with these the model makes one call, and two calls in a round
MOMENTS = "queued", "prefill", "decode", "arguments", "unsent"


@pytest.fixture
async def place(start_pool, tmp_path, monkeypatch):
    """A running server whose worker dies as the ids of requests say, and the file with the calls that its tools got."""
    monkeypatch.setenv("STRUCK", str(tmp_path))
    config = tmp_path / "mcp.json"
    program = {"command": sys.executable, "args": [fake_tools.__file__, "log", str(tmp_path / "calls")], "alwaysAllow": ["*"]}
    config.write_text(json.dumps({"mcpServers": {"fake": program}}))
    numbers = tiny_gguf.LLAMA_NUMBERS | {"llama.context_length": 4096}
    metadata = tiny_gguf.small_gguf_metadata("gpt-2", **{"tokenizer.chat_template": TEMPLATE})
    model = tiny_gguf.write_gguf(tmp_path / "random.gguf", tiny_gguf.random_llama(numbers=numbers), numbers, metadata)
    pool = await start_pool(model=str(model), prefill_chunk=64, stream_interval=0.0, draft_memory=0, mcp_config=str(config), num_workers=2,
                            kv_cache_memory=16 << 20)
    async with serving(pool, pool.settings) as url, aiohttp.ClientSession() as http:
        yield url, http, tmp_path


async def asked(url, http, folder, name, seed):
    """(the answer's items without ids, the calls that its tools got)."""
    log = folder / "calls"
    log.write_text("")
    tool = {"type": "mcp", "server_label": "fake", "require_approval": "never", "allowed_tools": ["pick", "add"]}
    body = {"input": "Pick some.", "tools": [tool], "tool_choice": "required", "parallel_tool_calls": True, "seed": seed, "max_output_tokens": 200,
            "ignore_eos": True, "max_tool_calls": 5}
    async with http.post(url + "/v1/responses", json=body, headers={"X-Request-Id": name}) as response:
        answer = await response.json()
    assert response.status == 200, answer
    return [{key: value for key, value in item.items() if key != "id"} for item in answer["output"]], sorted(log.read_text().splitlines())  # they run at once


@pytest.mark.parametrize("runs", by_day([6, 10, 200], 6))
async def test_killed_workers_repeat_no_call(place, runs):
    url, http, folder = place
    rng = random.Random(runs)
    wanted = {}
    struck = 0
    for run in range(runs):
        seed = SEEDS[run % len(SEEDS)]
        if seed not in wanted:
            wanted[seed] = await asked(url, http, folder, f"calm-{run}", seed)
        name = f"kill-{rng.choice(MOMENTS)}-{run}"
        assert await asked(url, http, folder, name, seed) == wanted[seed], name
        struck += len([*folder.glob(f"{name}~*")])
    assert struck > runs and sorted(len(calls) for _, calls in wanted.values()) == [1, 2, 2, 2]


async def asked_as_messages(url, http, folder, name, seed):
    """The same for Messages: its blocks without ids, and the calls."""
    log = folder / "calls"
    log.write_text("")
    toolset = {"type": "mcp_toolset", "mcp_server_name": "fake", "default_config": {"enabled": False}, "configs": {"pick": {"enabled": True}, "add": {"enabled": True}}}
    body = {"messages": [{"role": "user", "content": "Pick some."}], "mcp_servers": [{"type": "url", "name": "fake", "url": ""}], "tools": [toolset],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": False}, "seed": seed, "max_tokens": 200, "ignore_eos": True}
    async with http.post(url + "/v1/messages", json=body, headers={"X-Request-Id": name}) as response:
        answer = await response.json()
    assert response.status == 200, answer
    return [{key: value for key, value in block.items() if key not in ("id", "tool_use_id")} for block in answer["content"]], sorted(log.read_text().splitlines())


@pytest.mark.parametrize("moments", by_day([" ".join(MOMENTS), "decode unsent"], "decode unsent"))
async def test_killed_workers_repeat_no_call_of_messages(place, moments):
    url, http, folder = place
    struck = 0
    for number, moment in enumerate(moments.split()):
        seed = SEEDS[number % len(SEEDS)]
        blocks, calls = await asked_as_messages(url, http, folder, f"calm-{number}", seed)
        assert [block["type"] for block in blocks].count("mcp_tool_result") >= len(calls) > 0
        name = f"kill-{moment}-{number}"
        assert await asked_as_messages(url, http, folder, name, seed) == (blocks, calls), name
        struck += len([*folder.glob(f"{name}~*")])
    assert struck >= len(moments.split())
