"""Clients by others whose servers run tools: OpenAI's and Anthropic's packages, and Vercel's. They are installed as those of test_peers.py."""

import asyncio
import json
import shutil
import sys
from pathlib import Path

import pytest

import fake_tools
from peer_packages import INSTALL_S, NPM, made, made_venv
from real_server import server
from tool_rounds import calls, tool_place

HERE, RUN_S = Path(__file__).parent, 170
pytestmark = [pytest.mark.timeout(INSTALL_S + RUN_S + 60), pytest.mark.slow]


async def outcome(*command, cwd=None):
    """Run a client; returns the JSON on the last line that it prints."""
    process = await asyncio.create_subprocess_exec(*map(str, command), cwd=cwd, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    output, errors = await asyncio.wait_for(process.communicate(), RUN_S)
    assert process.returncode == 0, errors[-3000:].decode()
    return json.loads(output.strip().splitlines()[-1])


async def test_their_own_packages_let_the_server_call(default_model_path, tmp_path):
    config = tmp_path / "mcp.json"
    program = {"command": sys.executable, "args": [fake_tools.__file__, "log", str(tmp_path / "calls")], "alwaysAllow": ["*"]}
    config.write_text(json.dumps({"mcpServers": {"fake": program}}))
    python = made_venv("apis", "apis.txt")
    with server(default_model_path, "--mcp-config", config, "--kv-cache-memory", "64M") as (_, url):
        found = await outcome(python, HERE / "tools_peer.py", url)
    messages, responses = found["messages"], found["responses"]
    assert messages["kinds"] == messages["streamed"] == messages["old"] == ["mcp_tool_use", "mcp_tool_result", "text"] and messages["begun"] == 3
    assert messages["result"] == f"picked {messages['input']['word']}" and messages["same"] and messages["refused"] == [400] * 3
    assert messages["counts"][0] < messages["counts"][1] and messages["stop"] == "end_turn" and messages["later"] in ("end_turn", "max_tokens")
    assert responses["kinds"] == ["mcp_list_tools", "mcp_call", "message"] and responses["result"].startswith("picked ")


async def test_vercels_package_lets_the_server_call(tmp_path):
    """Over a scripted model, since it can't require a call of such a tool."""
    if not shutil.which("npm"):
        pytest.skip("there is no npm")
    node = made("node", "package.json", NPM)
    script = shutil.copy(HERE / "vercel_tools_peer.mjs", node)
    texts = [calls(("fake__add", {"a": 2, "b": 3})), "It is five."] * 2 + ["You are welcome."]
    async with tool_place(tmp_path, *texts * 3, *texts[:2], database=str(tmp_path / "kept.db")) as at:
        found = await outcome("node", script, at.url, cwd=node)
    responses, unkept, messages = found["responses"], found["unkept"], found["messages"]
    for each in responses, unkept, messages:
        assert each["text"] == each["streamed"] == "It is five." and each["later"] == "You are welcome." and each["finish"] == "stop"
        assert each["kinds"] == ["tool-call", "tool-result"] and each["usage"] == 2
    assert responses["result"]["output"] == unkept["result"]["output"] == "5" and messages["call"] == {"a": 2, "b": 3}
    assert messages["result"] == [{"type": "text", "text": "5"}] and at.called == [["add", {"a": 2, "b": 3}]] * 7
    assert found["approved"]["text"] == "It is five." and at.sent[16][1:] == [("assistant", ""), ("tool", "5")]
    # by default it refers to the items that Responses has kept; if it keeps none, it sends back no calls
    assert at.sent[4][1:] == at.sent[14][1:] == [("assistant", ""), ("tool", "5"), ("assistant", "It is five."), ("user", "Thanks.")]
    assert at.sent[9][1:] == [("assistant", "It is five."), ("user", "Thanks.")]
