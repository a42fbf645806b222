"""A second key beside every route: whatever one key sends to any route, what all share is held in short slices only.

The routes are those of the program's table, so a new one is in this test by itself. To each the first key sends bodies that are dear to read, and those that are
dear in its own way (DEAREST); the second key's small requests run beside. What is asserted are causes, not clocks: the processor time for which the event
loop and the store's thread were held at a stretch (chatlm/front/held.py), no 5xx, that the second key gets what it gets alone, that threads and memory are free again, also
after clients that have left, and that SIGTERM ends the server."""

import http.client
import json
import re
import socket
import sqlite3
import threading
import time
import urllib.parse
from contextlib import closing
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

from chatlm.common.config import LIMITS
from chatlm.front.front import ROUTES
from chatlm.front.store.quota import used_bytes
from nightly import WHOLE
from real_server import server
from sent_bodies import BASE
from shared_servers import KEYS, logging_tools

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).resolve().parents[2]
MOST_S = 0.25               # of the processor, at a stretch; a bound of the histogram
SIZE = 15 << 20 if WHOLE else 1 << 20
PAGES_BYTES = 256 << 10     # of the database, that a few rows may take: a vector store has tables of its own
SPACE = "S" * 22
FILE = b"# Tea\n\n" + b"Green tea is made of leaves. " * 40


class Sent(NamedTuple):
    body: bytes | None = None
    query: str = ""
    type: str = "application/json"
    status: int | None = None       # that its answer has: what is refused before it costs anything shows nothing


def dumped(value):
    return json.dumps(value, ensure_ascii=False).encode()


def form(*parts):
    """A multipart body of (head, data) pairs."""
    lines = [b"--cut\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + data for head, data in parts]
    return Sent(b"\r\n".join([*lines, b"--cut--\r\n"]), type="multipart/form-data; boundary=cut")


def dear_to_read(base, size):
    """Bodies whose reading costs much: depth, width, numbers, and texts of which a tokenizer makes nothing."""
    head = dumped(base)[:-1] + (b", " if base else b"")
    yield Sent(head + b'"more": ' + b"[" * (size // 2) + b"]" * (size // 2) + b"}")
    yield Sent(head + b'"more": ' + b'{"a":' * 400 + b"0" + b"}" * 400 + b', "most": [' + b"[[]]," * (size // 6) + b"0]}")
    yield Sent(head + b", ".join(b'"k%d": 0' % number for number in range(size // 14)) + b"}")
    yield Sent(head + b'"more": [' + b"1e5," * (size // 4 - 10) + b"1]}")
    yield Sent(head + b'"more": "' + "\u200b".encode() * (size // 3 - 10) + b'"}')


def chat(number, **patch):
    return {"kind": "chat", "id": f"{number:032x}", "patch": {"created": 1 + number, **patch}}


def node(number, **patch):
    return {"kind": "node", "id": f"{1 << 40 | number:032x}", "patch": {"created": 2 + number, "conversation": f"{0:032x}", "role": "user", "content": "x", **patch}}


FUNCTIONS = [{"type": "function", "function": {"name": f"f{number}", "parameters": {"type": "object", "properties": {
    f"p{each}": {"type": "string", "pattern": "^(a|b)*c{1,50}$"} for each in range(5)}}}} for number in range(1000)]
ENUM = {"type": "json_schema", "json_schema": {"name": "e", "schema": {"enum": [f"value {number}" for number in range(3000)]}}}
PATTERN = {"type": "json_schema", "json_schema": {"name": "e", "schema": {"type": "string", "pattern": "((a{1,50}b?){1,50}c|d){1,50}"}}}
HI = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
MANY = {"messages": [{"role": ("user", "assistant")[number % 2], "content": "x"} for number in range(499)], "max_tokens": 1}
ANSWERED = [*(Sent(dumped(HI | more), status=400) for more in ({"tools": FUNCTIONS}, {"tools": FUNCTIONS[:40], "tool_choice": "required"})),      # rendered, and then too long
    *(Sent(dumped(HI | more)) for more in (
    {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"}, {"response_format": ENUM}, {"response_format": PATTERN},
    {"logit_bias": {str(number): 1 for number in range(284)}}, {"stop": ["ab" * 500] * 4}, {"n": 128}, {"messages": MANY["messages"], "truncate": "oldest"}))]
WORDS = " ".join("w" * 60 + str(number) for number in range(100))
FILTER = {"type": "and", "filters": [{"type": "eq", "key": f"k{number}", "value": "v"} for number in range(1000)]}
# beside what is dear to read: what is dear in a route's own way
DEAREST = {
    ("POST", "/v1/chat/completions"): ANSWERED, ("POST", "/api/v0/chat/completions"): ANSWERED[:2],
    ("POST", "/v1/messages"): [Sent(dumped(MANY), status=400)],
    ("POST", "/v1/completions"): [Sent(dumped({"prompt": [5] * 100_000, "max_tokens": 1}), status=400), Sent(dumped({"prompt": ["x"] * 128, "max_tokens": 1}))],
    ("POST", "/v1/responses"): [Sent(dumped({"input": [{"role": "user", "content": "x"}] * 499, "max_output_tokens": 16}), status=400)],
    ("POST", "/tokenize"): [Sent(dumped({"content": "ab " * 170_000})), Sent(dumped({"content": "a" * 500_000}))],
    ("POST", "/detokenize"): [Sent(dumped({"tokens": [5] * 300_000}))],
    ("POST", "/apply-template"): [Sent(dumped(MANY))],
    ("POST", "/v1/embeddings"): [Sent(dumped({"input": ["Hi"] * 2048})), Sent(dumped({"input": "\u200b" * 400_000}), status=400)],
    ("POST", "/extract"): [Sent(b"word " * (SIZE // 5), "?name=a.txt", "text/plain"), Sent(b"<p>" * (SIZE // 3), "?name=a.html", "text/html", 400),
                           Sent(b"a,b\n" * (SIZE // 4), "?name=a.csv", "text/csv"), Sent(b"%PDF-1.7\n" + b"1 0 obj<<" * (SIZE // 9), "?name=a.pdf", "application/pdf", 400)],
    ("POST", "/v1/files"): [form(('name="purpose"', b"assistants"), ('name="file"; filename="a.txt"', b"x" * SIZE)),
                            form(*((f'name="f{number}"', b"x") for number in range(2000)))._replace(status=400),
                            form(('name="purpose"', b"batch"), ('name="file"; filename="a.jsonl"', b"{}\n" * 49_000))],
    ("POST", "/v1/chats/changes"): [Sent(dumped({"changes": changes})) for changes in (
        [chat(0), *(node(number) for number in range(499))], [chat(number, title="t" * 100) for number in range(500)],
        [node(0, calls=[{"id": "a", "name": "f", "arguments": "{}", "result": "r" * 10}] * 3000)], [node(0, ids=[1] * 100_000)],
        *([node(0, content=f"{number} " * 200_000)] for number in range(2)),
        [{"kind": "node", "id": f"{1 << 41 | number:032x}", "patch": None, "base": 0} for number in range(500)])],
    ("GET", "/v1/chats/search"): [Sent(query="?q=" + urllib.parse.quote(words)) for words in ("x", "w" * 4000, WORDS[:6000], "\u200b" * 600, '"' * 2000, "a* OR " * 500)],
    ("GET", "/v1/chats/changes"): [Sent(query="?limit=1000"), Sent(query="?after=0")],
    ("GET", "/v1/chats"): [Sent(query="?limit=100"), Sent(query="?q=" + "w" * 4000)],
    ("POST", "/v1/chats/files"): [Sent(b"\x89PNG\r\n\x1a\n" + b"\0" * min(SIZE, 4_000_000), type="image/png")],
    ("POST", "/v1/vector_stores/{id}/search"): [Sent(dumped({"query": query})) for query in ("tea", WORDS, "\u200b" * 5000, ["tea " * 500] * 8)] + [
        Sent(dumped({"query": "tea", "filters": FILTER}), status=400), Sent(dumped({"query": "tea", "filters": {"type": "and", "filters": [{"type": "and", "filters": FILTER["filters"][:15]}] * 4}}))],
    ("POST", "/v1/vector_stores/{id}/files"): [Sent(dumped({"file_id": "FILE", "attributes": {f"k{number}": "v" * 512 for number in range(16)}}))],
    ("POST", "/v1/vector_stores/{id}/file_batches"): [Sent(dumped({"file_ids": ["FILE", *(f"file-{number:024x}" for number in range(1400))]}), status=404)],
    ("POST", "/v1/conversations"): [Sent(dumped({"items": [{"type": "message", "role": "user", "content": "x"}] * 20, "metadata": {f"k{number}": "v" * 512 for number in range(16)}}))],
    ("POST", "/v1/conversations/{id}/items"): [Sent(dumped({"items": [{"type": "message", "role": "user", "content": "x" * 3000}] * 20}))],
    ("POST", "/v1/compare"): [Sent(dumped(HI | {"models": ["default"] * 8}))],
    ("GET", "/v1/usage"): [Sent(query="?from=0001-01-01&to=9999-12-31")],
}
NO_BASE = ("/models/load", "/models/unload")        # what an operator does to all: only what is refused is sent


class Key:
    """A client with a key."""

    def __init__(self, url, key):
        self.address = urllib.parse.urlsplit(url).netloc
        self.headers = {"Authorization": f"Bearer {key}", "X-Chat-Space": SPACE}

    def ask(self, method, path, sent=Sent()):
        """(status, body) of an answer."""
        connection = http.client.HTTPConnection(self.address, timeout=300)
        more = {"Content-Type": sent.type} if sent.body is not None else {}
        try:
            connection.request(method, path + sent.query, sent.body, self.headers | more)
            response = connection.getresponse()
            return response.status, response.read()
        except (BrokenPipeError, ConnectionResetError):       # it was refused before all of it was sent
            return 0, b""
        finally:
            connection.close()

    def leave(self, method, path, sent):
        """Sends a request, and goes away."""
        host, port = self.address.split(":")
        head = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        with socket.create_connection((host, int(port))) as connection:
            body = sent.body or b""
            connection.settimeout(60)
            try:
                connection.sendall(f"{method} {path}{sent.query} HTTP/1.1\r\nHost: {self.address}\r\n{head}Content-Type: {sent.type}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            except OSError:
                pass

    def json(self, method, path, value=None, sent=None):
        status, body = self.ask(method, path, sent or Sent(None if value is None else dumped(value)))
        assert status == 200, body
        return json.loads(body)

    def metrics(self):
        return self.ask("GET", "/metrics")[1].decode()


def held_longer(metrics, what):
    """How often something was held longer than MOST_S."""
    counts = dict(re.findall(rf'chat_server_held_seconds_bucket{{le="([^"]+)",what="{what}"}} ([\d.]+)', metrics))
    return float(counts["+Inf"]) - float(counts[str(MOST_S)]) if counts else 0.0


def kept(database):
    """(bytes that the database's pages take, bytes that count for each owner, owners of all rows)."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        def all_of(query):
            return connection.execute(query).fetchall()
        tables = [name for name, in all_of("SELECT name FROM sqlite_master WHERE type = 'table' AND sql LIKE '%owner TEXT%'")]
        owners = {owner for table in tables for owner, in all_of(f"SELECT DISTINCT owner FROM {table}")}
        return used_bytes(connection), dict(all_of("SELECT owner, bytes FROM holdings")), owners


BOUNDS = [row.split("|")[1:-1] for row in (ROOT / "SECURITY.md").read_text().partition("## What bounds each route")[2].partition("## Limits")[0].split("\n") if row.startswith("| `")]


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_security_md_says_what_bounds_it(route):
    """In one row, whose cells are all filled in."""
    [row] = [row for row in BOUNDS if any(fnmatch(f"{route.method} {route.path}", pattern) for pattern in re.findall("`([^`]+)`", row[0]))]
    assert len(row) == 6 and all(cell.strip() for cell in row)


def test_each_row_of_it_is_of_a_route():
    patterns = [pattern for row in BOUNDS for pattern in re.findall("`([^`]+)`", row[0])]
    assert [pattern for pattern in patterns if not any(fnmatch(f"{route.method} {route.path}", pattern) for route in ROUTES)] == []


@pytest.fixture(scope="module")
def place(nanochat_fixtures, default_embedder_path, tmp_path_factory):
    """A server with all that it can have, whose end is a part of the test."""
    folder = tmp_path_factory.mktemp("beside")
    (folder / "mcp.json").write_text(json.dumps({"mcpServers": {"fake": logging_tools(folder) | {"alwaysAllow": ["*"]}}}))
    flags = "--mcp-config", folder / "mcp.json", *(f"--api-key={key}" for key in KEYS)
    with server(nanochat_fixtures / "gen5", "--embedder", default_embedder_path, f"--database={folder / 'k.db'}", *flags) as (process, url):
        yield process, url, folder / "k.db"


@pytest.fixture(scope="module")
def names(place):
    """What the first key has, by the names in paths."""
    key = Key(place[1], KEYS[0])
    file = json.loads(key.ask("POST", "/v1/files", form(('name="purpose"', b"assistants"), ('name="file"; filename="tea.md"', FILE)))[1])["id"]
    lines = json.loads(key.ask("POST", "/v1/files", form(('name="purpose"', b"batch"), ('name="file"; filename="a.jsonl"', dumped(
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": HI}) + b"\n")))[1])["id"]
    store = key.json("POST", "/v1/vector_stores", {"file_ids": [file]})["id"]
    chat_id = chat(0)["id"]
    key.json("POST", "/v1/chats/changes", {"changes": [chat(0), *(node(number, content="words of tea " * 50) for number in range(499))]})
    conversation = key.json("POST", "/v1/conversations", {"items": [{"type": "message", "role": "user", "content": "x"}]})["id"]
    item = key.json("GET", f"/v1/conversations/{conversation}/items")["data"][0]["id"]
    batch = key.json("POST", "/v1/batches", {"input_file_id": lines, "endpoint": "/v1/chat/completions", "completion_window": "24h"})["id"]
    response = key.json("POST", "/v1/responses", {"input": "Hi", "max_output_tokens": 16})["id"]
    group = key.json("POST", f"/v1/vector_stores/{store}/file_batches", {"file_ids": [file]})["id"]
    model = key.json("GET", "/v1/models")["data"][0]["id"]
    return {"store": store, "file": file, "chats": chat_id, "conversations": conversation, "item": item, "batches": batch, "responses": response,
            "batch": group, "name": model, "files": file, "vector_stores": store}


def filled(path, names):
    """A path with what the first key has in its places, or with something long."""
    def of(match):
        kind = match[1]
        if kind == "id":
            kind = path.split("/")[2] if path.startswith("/v1/") else ""
        return urllib.parse.quote(names.get(kind, "n" * 2000), safe="")
    return re.sub(r"{(\w+)(?::[^}]*)?}", of, path)


def dear(route, names):
    if route.method == "POST":
        base = BASE.get(route.path, {}) if route.path not in NO_BASE else {}
        for size in (LIMITS.inline_bytes - 400, SIZE):      # the first is read on the event loop
            yield from dear_to_read(base, size) if route.path not in NO_BASE else [Sent(b"[" * size)]
    else:
        yield Sent(query="?limit=100&order=asc&after=" + "a" * 6000)
        yield Sent(query="?" + "&".join(f"k{number}=v" for number in range(600)))
    for sent in DEAREST.get((route.method, route.path), []):
        yield sent._replace(body=sent.body and sent.body.replace(b'"FILE"', dumped(names["file"])), status=sent.status or 200)


class Beside:
    """The second key's small requests, one after the other until the block ends."""

    SMALL = (("POST", "/v1/chat/completions", Sent(dumped(HI | {"temperature": 0, "max_tokens": 2}))), ("POST", "/tokenize", Sent(b'{"content": "Hi"}')),
             ("GET", "/v1/chats/changes", Sent()), ("GET", "/v1/vector_stores", Sent()), ("POST", "/v1/embeddings", Sent(b'{"input": "Hi", "model": "all-MiniLM-L6-v2"}')))

    def __init__(self, url):
        self.key = Key(url, KEYS[1])
        self.over = threading.Event()
        self.seen = {}      # (status, what is said) of each
        self.thread = threading.Thread(target=self.go_on)

    def go_on(self):
        while not self.over.is_set():
            for method, path, sent in self.SMALL:
                status, body = self.key.ask(method, path, sent)
                said = re.sub(rb'"(id|created|seed|timings)": [^,}]*', b"", body) if path != "/v1/chat/completions" or status != 200 else json.loads(body)["choices"][0]["message"]["content"]
                self.seen.setdefault(path, set()).add((status, said))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


@pytest.mark.parametrize("route", sorted(ROUTES, key=lambda route: route.method == "DELETE"), ids=lambda route: f"{route.method} {route.path}")
def test_a_key_holds_no_other(place, names, route):
    _, url, database = place
    key = Key(url, KEYS[0])
    path = filled(route.path, names)
    wrong = []
    before, (took, counted, _) = key.metrics(), kept(database)
    with Beside(url) as other:
        told = []
        for sent in dear(route, names):
            status, body = key.ask(route.method, path, sent)
            told.append((status, sent.query[:60], (sent.body or b"")[:60], body[:200]))
            if status >= 500 and status not in (501, 503) or sent.status not in (None, status):
                wrong.append(told[-1])
            key.leave(route.method, path, sent)
    after = key.metrics()
    held = {what: held_longer(after, what) - held_longer(before, what) for what in ("loop", "store")}
    assert held == {"loop": 0, "store": 0}, told
    assert not wrong
    takes, counts, owners = kept(database)
    assert owners == counts.keys() and len(owners) == 1       # nothing is the second key's
    assert takes - took <= 4 * max(sum(counts.values()) - sum(counted.values()), 0) + PAGES_BYTES
    assert {path: {status for status, _ in seen} for path, seen in other.seen.items()} == {path: {200} for _, path, _ in Beside.SMALL}
    assert all(len(seen) == 1 for seen in other.seen.values()), other.seen


def test_nothing_is_left_of_clients_that_have_left_and_a_signal_ends_it(place):
    process, url, _ = place
    key = Key(url, KEYS[1])

    def busy():
        return {what: float(count) for what, count in re.findall(r'chat_server_busy_threads{what="(\w+)"} ([\d.]+)', key.metrics()) if what != "store"}
    ends = time.monotonic() + 120
    while any(busy().values()):
        assert time.monotonic() < ends, busy()
        time.sleep(0.1)         # between two questions to a process of its own
    assert key.json("GET", "/stats")["queue_depth"] == 0
    assert "\nchat_server_held_bytes 0.0\n" in key.metrics()
    process.terminate()
    assert process.wait(60) == 0
