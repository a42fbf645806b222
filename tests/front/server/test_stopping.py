"""A server that stops before an answer has ended says 503 with Retry-After: clients then ask another one, or this one again."""

import http.client
import json
import signal
import threading
import time
import urllib.parse

import pytest
from real_server import get, server

CHAT = {"messages": [{"role": "user", "content": "Tell me a long story."}], "max_tokens": 6000, "ignore_eos": True}
WHOLE = {
    "/v1/chat/completions": CHAT, "/v1/completions": {"prompt": "Once", "max_tokens": 6000, "ignore_eos": True},
    "/v1/responses": {"input": "Tell me a long story.", "max_output_tokens": 6000, "ignore_eos": True}, "/v1/messages": CHAT,
    "/api/chat": {"messages": CHAT["messages"], "stream": False, "ignore_eos": True, "options": {"num_predict": 6000}},
    "/v1/embeddings": {"input": ["a long text " * 500] * 190}}     # no more tokens than a request may have
STREAMED = {"/v1/chat/completions": CHAT, "/v1/responses": WHOLE["/v1/responses"], "/v1/messages": CHAT, "/chat/completions": CHAT}


class Asked(threading.Thread):
    """A request in a thread: its status, headers and body once it has ended."""

    def __init__(self, url, path, body):
        super().__init__(daemon=True)
        self.path, self.body = path, body
        self.connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=120)
        self.begun = threading.Event()
        self.start()

    def run(self):
        self.connection.request("POST", self.path, json.dumps(self.body))
        response = self.connection.getresponse()
        self.status, self.headers = response.status, response.headers
        self.content = response.readline()
        self.begun.set()
        self.content += response.read()


def error_in(text):
    found = json.loads(text)
    error = found.get("response", found)["error"]
    return error if isinstance(error, str) else error["message"]


@pytest.mark.timeout(120)
def test_cut_answers_are_503_or_an_error_event(default_model_path):
    """Whole ones are 503, streams get an error."""
    with server(default_model_path, "--drain-timeout", "60") as (process, url):
        whole = [Asked(url, path, body) for path, body in WHOLE.items()]
        streams = [Asked(url, path, body | {"stream": True}) for path, body in STREAMED.items()]
        for stream in streams:
            assert stream.begun.wait(60)
        while not (stats := get(url + "/stats")["workers"][0]) or stats["running"] < len(streams) + len(whole) - 1:
            time.sleep(0.02)        # between two questions to a process of its own
        process.send_signal(signal.SIGTERM)
        for line in process.stdout:
            if "a second signal stops now" in line:
                break
        process.send_signal(signal.SIGTERM)
        for asked in (*whole, *streams):
            asked.join(60)
            assert not asked.is_alive(), asked.path
    for asked in whole:
        assert (asked.status, asked.headers["Retry-After"]) == (503, "10"), (asked.path, asked.status, asked.content[:200])
        assert error_in(asked.content) == "the server is shutting down"
        if asked.path == "/v1/messages":
            assert json.loads(asked.content)["error"]["type"] == "overloaded_error"
    for asked in streams:
        *_, last = [line.removeprefix("data: ") for line in asked.content.decode().splitlines() if line.startswith("data: ")]
        assert asked.status == 200 and error_in(last) == "the server is shutting down", (asked.path, last[:200])
