"""--no-chats and --chats-keep-days of a real server."""

import json
import sqlite3
import time
import urllib.error
import urllib.request
from contextlib import closing

import pytest

from real_server import get, server

SPACE = "D" * 22
DAY_S = 86400


def asked(url, path, body=None, method=None):
    request = urllib.request.Request(url + path, json.dumps(body).encode() if body else None,
                                     {"X-Chat-Space": SPACE, "Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def an_id(number):
    return f"{number:032x}"


def written(number):
    """The changes that make a chat with one message."""
    return [{"kind": "chat", "id": an_id(number), "patch": {"created": 1, "title": f"Title{number}"}},
            {"kind": "node", "id": an_id(100 + number), "patch": {
                "created": 1, "conversation": an_id(number), "role": "user", "content": f"secret{number}word"}}]


def test_chats_that_nobody_has_changed_for_days_go_with_their_words(nanochat_fixtures, tmp_path):
    path = tmp_path / "store.db"
    with server(nanochat_fixtures / "gen5", "--database", path) as (_, url):
        asked(url, "/v1/chats/changes", {"changes": [each for number in (1, 2, 3) for each in written(number)]})
        rev = asked(url, "/v1/chats/changes?after=0")["rev"]
    with closing(sqlite3.connect(path)) as connection:
        # a device's clock says nothing; of chat 3 a message is new, of chat 2 all
        connection.execute("UPDATE chat_records SET changed = changed - ? WHERE name IN (?, ?, ?)",
                           (3 * DAY_S, an_id(1), an_id(101), an_id(3)))
        connection.commit()
    with server(nanochat_fixtures / "gen5", "--database", path) as (_, url):
        assert len(asked(url, "/v1/chats")["data"]) == 3        # they are kept for ever
    with server(nanochat_fixtures / "gen5", "--database", path, "--chats-keep-days", "2") as (_, url):
        news = asked(url, f"/v1/chats/changes?after={rev}&wait=25")["data"]
        assert [(row["kind"], row["id"], row["record"]) for row in news] == [("chat", an_id(1), None)]
        assert {row["id"] for row in asked(url, "/v1/chats")["data"]} == {an_id(2), an_id(3)}
        until = time.monotonic() + 60
        while b"secret1word" in b"".join(file.read_bytes() for file in tmp_path.iterdir()):
            assert time.monotonic() < until
        left = b"".join(file.read_bytes() for file in tmp_path.iterdir())
        assert b"secret2word" in left and b"secret3word" in left and b"Title1" not in left


@pytest.mark.parametrize("method, path, body", [
    ("GET", "/v1/chats", None), ("POST", "/v1/chats/changes", {"changes": written(1)}),
    ("GET", "/v1/chats/changes?after=0", None), ("GET", f"/v1/chats/{an_id(1)}", None),
    ("DELETE", f"/v1/chats/{an_id(1)}", None), ("DELETE", "/v1/chats?count=0", None),
    ("GET", "/v1/chats/search?q=a", None), ("GET", "/v1/chats/export", None)])
def test_without_chats_every_route_says_so(refusing, method, path, body):
    with pytest.raises(urllib.error.HTTPError) as caught:
        asked(refusing, path, body, method)
    error = json.load(caught.value)["error"]
    assert (caught.value.code, error["code"]) == (404, "no_chats") and "--no-chats" in error["message"]


@pytest.fixture(scope="module")
def refusing(nanochat_fixtures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refusing")
    with server(nanochat_fixtures / "gen5", "--database", folder / "store.db", "--no-chats") as (_, url):
        yield url


def test_without_chats_pages_are_not_told_of_them_and_no_answer_goes_into_one(refusing):
    assert "chats" not in get(f"{refusing}/stats")["annexes"]
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True,
            "chat": {"id": an_id(1), "node": an_id(2), "parent": an_id(3)}}
    with pytest.raises(urllib.error.HTTPError) as caught:
        asked(refusing, "/v1/chat/completions", body)
    assert caught.value.code == 404
    assert asked(refusing, "/v1/files")["data"] == []       # the rest of the database is there
