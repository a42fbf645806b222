"""What a server has acknowledged of chats is there after it was killed, whenever that was; with the real model's server too."""

import contextlib
import http.client
import json
import random
import signal
import threading
import urllib.error
import urllib.request

import pytest

from real_server import server

SPACE = "C" * 22


def asked(url, path, body=None):
    request = urllib.request.Request(url + path, json.dumps(body).encode() if body else None, {"X-Chat-Space": SPACE})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def node(number, content):
    return {"kind": "node", "id": f"{number:032x}", "patch": {
        "created": 1, "conversation": f"{0:032x}", "role": "user", "content": content}}


def kill_while_writing(process, url, first, random_numbers):
    """Write nodes one after another until the server is killed; how many it has acknowledged."""
    kill_at = random_numbers.randrange(1, 60)
    number = first
    with contextlib.suppress(urllib.error.URLError, http.client.HTTPException, ConnectionError, ValueError):
        while True:
            if number - first == kill_at:
                threading.Thread(target=process.send_signal, args=[signal.SIGKILL]).start()
            [row] = asked(url, "/v1/chats/changes", {"changes": [node(number + 1, f"Word {number}")]})["data"]
            assert row["state"] == "stored"
            number += 1
    return number


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_nothing_acknowledged_is_lost(tmp_path, nanochat_fixtures, kills):
    random_numbers = random.Random(7)
    last = 0
    for _ in range(kills):
        with server(nanochat_fixtures / "gen5", "--database", tmp_path / "store.db") as (process, url):
            asked(url, "/v1/chats/changes", {"changes": [
                {"kind": "chat", "id": f"{0:032x}", "patch": {"created": 1, "title": "Kept"}}]})
            there = {row["id"] for row in asked(url, f"/v1/chats/{0:032x}")["nodes"]}
            assert {f"{number:032x}" for number in range(1, last + 1)} <= there
            assert len(there) <= last + 1  # and at most what was on its way
            last = kill_while_writing(process, url, max(last, len(there)), random_numbers)


def test_a_chat_of_the_real_model_is_kept_found_and_gone(default_url):
    """As a page does it: the answer of a real model is kept, another device reads, finds and deletes it."""
    answer = asked(default_url, "/v1/chat/completions", {
        "messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0,
        "max_tokens": 20})["choices"][0]["message"]["content"]
    chat = {"kind": "chat", "id": f"{0:032x}", "patch": {"created": 1, "title": "Capitals"}}
    said = node(2, answer)
    said["patch"] |= {"role": "assistant", "parent": f"{1:032x}"}
    asked(default_url, "/v1/chats/changes", {"changes": [chat, node(1, "What is the capital of France?"), said]})
    [found] = asked(default_url, "/v1/chats/search?q=paris")["data"]
    assert found["node"] == f"{2:032x}" and "Paris" in found["snippet"]
    assert asked(default_url, f"/v1/chats/{0:032x}")["nodes"][1]["content"] == answer
    request = urllib.request.Request(f"{default_url}/v1/chats/{0:032x}", method="DELETE",
                                     headers={"X-Chat-Space": SPACE})
    urllib.request.urlopen(request, timeout=60).close()
    assert asked(default_url, "/v1/chats/search?q=paris")["data"] == []
    page = asked(default_url, "/v1/chats/changes?after=1")
    assert [row["record"] for row in page["data"]] == [None]
