"""A client that gives up while its prompt is computed, and asks again: of a real server."""

import http.client
import json
import random
import re
import time
from urllib.parse import urlsplit

from real_server import get, post, server


def read_until_computed(url, body, least):
    """Ask for a stream, and leave once so many tokens of the prompt are computed; how many are."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    for line in response:
        if line.startswith(b"data: {"):
            done = json.loads(line[6:]).get("progress", {}).get("prompt_tokens_done", 0)
            if done >= least:
                response.close()
                connection.close()
                return done
    raise AssertionError("the prompt was computed before the client left")


def until_idle(url):
    deadline = time.monotonic() + 60
    while any(worker["running"] for worker in get(url + "/stats")["workers"]):
        assert time.monotonic() < deadline


def test_the_retry_of_a_cut_prompt_goes_on_where_it_was_cut(default_model_path):
    dice = random.Random(3)
    text = " ".join(dice.choice(["house", "tree", "river", "road", "stone", "wind"]) for _ in range(2500))
    body = {"messages": [{"role": "user", "content": text}], "stream": True, "max_tokens": 1, "temperature": 0,
            "progress": True, "stream_options": {"include_usage": True}}
    with server(default_model_path) as (process, url):      # one of its own: its log is read
        first = read_until_computed(url, body, 300)
        until_idle(url)
        second = read_until_computed(url, body, first + 300)   # it did not begin anew
        until_idle(url)
        with post(url + "/v1/chat/completions", body) as response:
            told = [json.loads(line[6:]) for line in response if line.startswith(b"data: {")]
        log = [line for line in drained(process) if "/v1/chat/completions" in line]
    usage = next(event["usage"] for event in told if event.get("usage"))
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert second <= cached + 15 and cached < usage["prompt_tokens"]
    progress = [event["progress"]["prompt_tokens_done"] for event in told if event.get("progress")]
    assert min(progress) >= cached
    assert [re.search(r" (\d+) \d+ ms (\d+)\+0 tokens cut ", line).groups() for line in log[:2]] == [
        ("499", str(usage["prompt_tokens"]))] * 2, log


def drained(process):
    """The lines that the server has logged so far."""
    lines = []
    while not process.stdout.lines.empty():
        lines.append(process.stdout.lines.get())
    return lines
