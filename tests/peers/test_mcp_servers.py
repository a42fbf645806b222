"""Tool servers that people use, run as their documents say. Those of npm are installed by the first test that needs them."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from chatlm.front.api.call_grammars import call_grammar
from chatlm.front.tools.config import configs_in
from chatlm.front.tools.server import ServerState
from chatlm.front.tools.toolbox import Toolbox
from peer_packages import NPM, made

NODE = "@modelcontextprotocol/server-{}/dist/index.js"


def python_program(name):
    """A program that pip has installed beside this Python, or anywhere."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or pytest.skip(f"{name} is not installed")


def node_program(name):
    if not shutil.which("npm"):
        pytest.skip("there is no npm")
    return str(made("mcp", "mcp.json", NPM, called="package.json") / "node_modules" / NODE.format(name))


async def result_of(fields, tool, **arguments):
    """(text of a call's result, whether it is an error, the server, the names of its tools)."""
    box = Toolbox(configs_in({"mcpServers": {"real": fields}}, "test", os.environ), 30, 16_384)
    box.start()
    try:
        await box.refresh()
        [server] = box.servers
        assert server.state is ServerState.READY, server.reason
        offered = box.offered()
        for one in offered.values():  # all can be enforced
            for tool_format in ("tagged", "json", "harmony", "gemma"):
                assert call_grammar(one.function, tool_format)
        result = await box.call(offered[f"real__{tool}"], arguments, "me")
        return result.text, result.is_error, server.client.is_modern, {one.tool.name for one in offered.values()}
    finally:
        await box.close()


async def test_the_time_server_tells_the_time():
    text, failed, is_modern, names = await result_of({"command": python_program("mcp-server-time")}, "get_current_time", timezone="Asia/Tokyo")
    assert '"timezone": "Asia/Tokyo"' in text and not failed and is_modern and names == {"get_current_time", "convert_time"}


async def test_its_errors_are_results():
    text, failed, *_ = await result_of({"command": python_program("mcp-server-time")}, "get_current_time", timezone="Nowhere/Town")
    assert failed and "Nowhere/Town" in text


async def test_the_git_server_shows_a_log(tmp_path):
    program = python_program("mcp-server-git")
    for words in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "the first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    text, failed, *_ = await result_of({"command": program}, "git_log", repo_path=str(tmp_path))
    assert "the first" in text and not failed


@pytest.mark.slow
async def test_the_everything_server_adds_and_shows_few_variables(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf-secret")
    fields = {"command": "node", "args": [node_program("everything")], "env": {"GIVEN": "yes"}}
    text, failed, is_modern, _ = await result_of(fields, "get-sum", a=2, b=3)
    assert "5" in text and not failed and not is_modern
    text, *_ = await result_of(fields, "get-env")
    assert "GIVEN" in text and "HF_TOKEN" not in text


@pytest.mark.slow
async def test_the_everything_server_runs_over_http():
    program = node_program("everything")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(["node", program, "streamableHttp"], env=os.environ | {"PORT": str(port)}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        while "listening" not in server.stderr.readline().lower():
            assert server.poll() is None
        text, failed, is_modern, _ = await result_of({"url": f"http://127.0.0.1:{port}/mcp"}, "get-sum", a=2, b=3)
        assert "5" in text and not failed and not is_modern
    finally:
        server.kill()
        server.wait()
        server.stderr.close()


@pytest.mark.slow
async def test_the_filesystem_server_reads_a_file(tmp_path):
    (tmp_path / "note.txt").write_text("what is in it")
    fields = {"command": "node", "args": [node_program("filesystem"), str(tmp_path)]}
    text, failed, *_ = await result_of(fields, "read_text_file", path=str(tmp_path / "note.txt"))
    assert text == "what is in it" and not failed
    text, failed, *_ = await result_of(fields, "read_text_file", path="/etc/passwd")
    assert failed and "root:" not in text


@pytest.mark.slow
async def test_the_memory_server_remembers(tmp_path):
    fields = {"command": "node", "args": [node_program("memory")], "env": {"MEMORY_FILE_PATH": str(tmp_path / "memory.json")}}
    entity = {"name": "Ada", "entityType": "person", "observations": ["wrote programs"]}
    await result_of(fields, "create_entities", entities=[entity])
    text, failed, *_ = await result_of(fields, "read_graph")
    assert "wrote programs" in text and not failed
