"""What a server imports after its start is imported in threads: the event loop serves others meanwhile."""

import json
import os
import sys
import urllib.error
import urllib.request

import pytest

from real_server import server

# In each process: which modules of ours are looked for in the thread of a running event loop, in a file
SPY = """
import os, sys
class Spy:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("chatlm", "email", "prometheus_client", "sqlite3"):
            events = sys.modules.get("asyncio.events")
            if events and events._get_running_loop():
                with open(os.environ["SPY"], "a") as file:
                    file.write(name + "\\n")
sys.meta_path.insert(0, Spy())
"""
ASKED = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="its sandboxes are those of Linux")


@pytest.mark.parametrize("model, flags", [("default", ()), ("gen5", ("--database",))])
def test_no_room_is_imported_on_the_event_loop(model, flags, default_model_path, nanochat_fixtures, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SPY)
    found = tmp_path / "found"
    environment = os.environ | {"SPY": str(found), "PYTHONPATH": str(tmp_path)}
    flags = [*flags, tmp_path / "a.db"] if flags else []
    path = default_model_path if model == "default" else nanochat_fixtures / model
    with server(path, *flags, env=environment) as (_, url):
        found.write_text("")
        for path in ("/v1/runs", "/v1/runs/none?before=1&after=2", "/metrics", "/v1/batches", "/v1/files",
                     "/v1/tools", "/models/exports", "/models/hub", "/models/downloads", "/v1/responses/none",
                     "/v1/conversations/none", "/v1/usage", "/openapi.json", "/stats/history",
                     "/v1/models/none"):
            ask(url + path)
        for path, more in (
                ("/chat/completions", {}), ("/v1/messages", {}),
                ("/v1/chat/completions", {"response_format": {"type": "json_object"}}),
                ("/v1/responses", {"input": "Hello"}), ("/api/chat", {"stream": False}),
                ("/v1/embeddings", {"input": "Hello"}), ("/v1/compare", {"models": ["default", "default"]}),
                ("/v1/completions", {"prompt": "Hello", "padding": "x" * 100_000}), ("/v1/batches", {}),
                ("/models/delete", {"model": "none/none"}), ("/v1/conversations", {})):
            ask(url + path, json.dumps(ASKED | more).encode(), "application/json")
        ask(url + "/extract", b"--a\r\n\r\nHello\r\n--a--", "multipart/form-data; boundary=a")
        assert found.read_text() == ""


def ask(url, data=None, kind=""):
    """Whatever it answers."""
    try:
        request = urllib.request.Request(url, data, {"Content-Type": kind} if kind else {})
        with urllib.request.urlopen(request, timeout=60) as response:
            response.read()
    except urllib.error.HTTPError as error:
        assert error.code < 500 or error.code == 503, (url, error.read())
