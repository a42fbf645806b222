"""Tool servers over HTTP that are opened at the same moment, in a process of their own that has imported nothing for them yet."""

import json
import urllib.request

import real_server
from fake_http_tools import http_server


def test_several_are_opened_at_once(tmp_path, nanochat_fixtures):
    """What they need is imported once, and whole: of four, three failed at each start."""
    servers = [http_server()[0] for _ in range(4)]
    config = tmp_path / "mcp.json"
    config.write_text(json.dumps({"mcpServers": {
        f"s{number}": {"url": f"http://127.0.0.1:{server.server_address[1]}/"} for number, server in enumerate(servers)}}))
    log = []
    flags = "--mcp-config", config, "--kv-cache-memory", "4M", "--max-batch", "2"
    with real_server.server(nanochat_fixtures / "gen5", *flags, log=log, forked=False) as (_, url):
        with urllib.request.urlopen(f"{url}/v1/tools", timeout=60) as response:
            listed = json.load(response)
    for server in servers:
        server.shutdown()
    assert {server["label"]: server["state"] for server in listed["servers"]} == {f"s{number}": "ready" for number in range(4)}, listed["servers"]
    assert "Traceback" not in "".join(log)
