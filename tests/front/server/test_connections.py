"""Limits of connections: which are closed when there are too many, and readers that do not read."""

import asyncio
import contextlib
import json
import logging
import re
import resource
import socket
import subprocess
import sys

import aiohttp
import pytest

from chatlm.common.config import Settings
from chatlm.common.program import page_files, program_root
from chatlm.front.server import access, connections
from chatlm.front.server.access import client_at, network_of
from chatlm.front.server.connections import ConnectionTable
from fake_pool import FakePool, conversation, serving
from nightly import by_day
from patching import patch

SCRIPT = program_root() / "chat_server.py"
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
ALIVE = b'{"alive": true}'
PATIENCE_S = 60            # far more than anything here takes


class Client:
    """A connection from one of this machine's addresses."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, url, address="127.0.0.1"):
        port = int(url.rsplit(":", 1)[1])
        return cls(*await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0)))

    async def lives(self):
        """Is /livez answered?"""
        with contextlib.suppress(ConnectionError):
            self.writer.write(LIVEZ)
            header = await self.header()
            return header.startswith(b"HTTP/1.1 200") and await self.reader.readexactly(len(ALIVE)) == ALIVE
        return False

    async def header(self):
        with contextlib.suppress(asyncio.IncompleteReadError):
            return await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), PATIENCE_S)
        return b""

    async def ended(self):
        """Everything up to the end of the connection."""
        with contextlib.suppress(ConnectionError):
            return await asyncio.wait_for(self.reader.read(), PATIENCE_S)
        return b""

    def ask(self, path=b"/chat/completions", **fields):
        self.writer.write(posted(path, **fields))


def posted(path, **fields):
    body = json.dumps(conversation() | fields).encode()
    return b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (path, len(body), body)


async def asking(url, pool, count, address="127.0.0.1"):
    """Connections whose answers have begun."""
    clients = [await Client.connect(url, address) for _ in range(count)]
    for client in clients:
        before = pool.open
        client.ask()
        assert (await client.header()).startswith(b"HTTP/1.1 200"), before
    return clients


# how many


async def test_the_longest_idle_connection_makes_room():
    """Where there is no room the connection that was idle for longest goes."""
    async with serving(FakePool(), connections=16) as url:
        clients = [await Client.connect(url) for _ in range(16)]
        for client in [*clients[1:], clients[0]]:           # so the second has been idle for longest
            assert await client.lives()
        more = [await Client.connect(url) for _ in range(3)]
        for client in more:
            assert await client.lives()
        assert [await client.ended() for client in clients[1:4]] == [b""] * 3
        for client in (clients[0], *clients[4:], *more):
            assert await client.lives()


async def test_a_connection_without_a_request_is_idle():
    """A connection that has sent half of a request is idle too."""
    async with serving(FakePool(), connections=16) as url:
        silent = [await Client.connect(url) for _ in range(16)]
        for client in silent[8:]:
            client.writer.write(LIVEZ[:20])
        more = [await Client.connect(url) for _ in range(16)]
        assert all([await client.lives() for client in more])
        assert [await client.ended() for client in silent] == [b""] * 16


async def test_no_running_answer_ends_for_a_connection():
    """A running answer is never closed for a new connection."""
    pool = FakePool(gate=asyncio.Event())
    async with serving(pool, connections=16) as url:
        running = await asking(url, pool, 15)
        for _ in range(40):
            assert await (await Client.connect(url)).lives()
        pool.gate.set()
        for client in running:
            assert b'"done": true' in await client.reader.readuntil(b"\r\n0\r\n\r\n")


async def test_a_server_full_of_answers_is_503():
    """Where every connection has an answer, health is told, and anything else is 503."""
    pool = FakePool(gate=asyncio.Event())
    async with serving(pool, Settings(prefix="/chat"), connections=16) as url:
        running = [await Client.connect(url) for _ in range(16)]
        for client in running:
            client.ask(b"/chat/v1/chat/completions")
        await pool.until_open(16)
        served = dict.fromkeys(("livez", "readyz", "health", "metrics", "stats"), 200)
        for path, status in (served | dict.fromkeys(("", "v1/models", "static/chat.js"), 503)).items():
            client = await Client.connect(url)
            client.writer.write(b"GET /chat/%s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path.encode())
            answer = await client.ended()           # none of them is kept
            assert answer.startswith(b"HTTP/1.1 %d " % status), path
            assert (b"\r\nRetry-After: 1\r\n" in answer) == (status == 503)
        asking = await Client.connect(url)
        asking.ask(b"/chat/v1/chat/completions")
        answer = await asking.ended()
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ") and json.loads(body)["error"]["code"] == "overloaded"
        pool.gate.set()
        await pool.until_open(0)
        assert len(pool.requests) == 16
        for client in running:
            assert (await client.header()).startswith(b"HTTP/1.1 200")
        late = await Client.connect(url)
        late.ask(b"/chat/v1/chat/completions")
        assert (await late.header()).startswith(b"HTTP/1.1 200")


async def test_surplus_connections_push_the_oldest_out():
    """More surplus connections than a few push the oldest out."""
    pool = FakePool(gate=asyncio.Event())
    async with serving(pool, connections=16) as url:
        running = await asking(url, pool, 16)
        surplus = [await Client.connect(url) for _ in range(ConnectionTable.SURPLUS)]
        for client in surplus:                      # a body that never comes holds a connection too
            client.writer.write(b"POST /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n")
            assert (await client.header()).startswith(b"HTTP/1.1 405")
        assert await (await Client.connect(url)).lives()
        await surplus[0].ended()
        assert len(running) == pool.open
        pool.gate.set()
        await pool.until_open(0)
        for client in surplus:
            client.writer.close()


async def test_one_network_has_a_quarter_of_connections(monkeypatch):
    """The others have the rest."""
    patch(monkeypatch, access, "network_of", lambda address: "" if address == "127.0.0.1" else address)
    pool = FakePool(gate=asyncio.Event())
    async with serving(pool, connections=16) as url:
        old = await Client.connect(url, "127.0.0.3")
        greedy = await asking(url, pool, 4, "127.0.0.2")
        refused = await Client.connect(url, "127.0.0.2")
        refused.ask()
        assert (await refused.ended()).startswith(b"HTTP/1.1 503")
        idle = [await Client.connect(url, "127.0.0.4") for _ in range(40)]
        assert await idle[-1].lives() and [await client.ended() for client in idle[:36]] == [b""] * 36
        assert await old.lives()                    # none but their own went
        here = [await Client.connect(url) for _ in range(7)]
        assert all([await client.lives() for client in [old, *idle[36:], *here]])
        pool.gate.set()
        for client in greedy:
            assert b'"done": true' in await client.reader.readuntil(b"\r\n0\r\n\r\n")


async def test_ended_connections_leave_nothing_kept(monkeypatch):
    tables = []

    class Kept(ConnectionTable):
        def __init__(self, limit):
            super().__init__(limit)
            tables.append(self)

    patch(monkeypatch, connections, "ConnectionTable", Kept)
    patch(monkeypatch, access, "network_of", lambda address: address)
    pool = FakePool(gate=asyncio.Event())
    async with serving(pool, connections=16) as url:
        clients = await asking(url, pool, 4)
        clients += [await Client.connect(url, f"127.0.0.{2 + number % 9}") for number in range(60)]
        clients += [await Client.connect(url) for _ in range(3)]            # surplus
        assert await clients[-1].lives()
        pool.gate.set()
        for client in clients:
            client.writer.close()
        await pool.until_open(0)
    (table,) = tables
    assert not table.all and not table.networks and not table.surplus


@pytest.mark.parametrize("address, network", [
    ("127.0.0.1", ""), ("127.8.9.1", ""), ("::1", ""), ("::ffff:127.0.0.1", ""),
    ("192.0.2.7", "192.0.2.7"), ("::ffff:192.0.2.7", "192.0.2.7"), ("fe80::1%eth0", "fe80::/64"),
    ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"), ("2001:db8:1:3::1", "2001:db8:1:3::/64")])
def test_ipv6_connections_count_by_64_bits(address, network):
    """Those of IPv4 count by their address."""
    assert network_of(address) == network
    # and so do requests; this machine is known by its addresses
    assert client_at(address) == (network or address)


async def test_who_has_many_addresses_is_one_client(monkeypatch):
    addresses, pool = iter(["2001:db8:1:2::1", "2001:db8:1:2::2", "2001:db8:1:3::1"]), FakePool()
    monkeypatch.setattr(aiohttp.web.BaseRequest, "remote", property(lambda http: http.headers["X-From"]))
    async with serving(pool) as url, aiohttp.ClientSession() as session:
        for address in addresses:
            await (await session.post(f"{url}/chat/completions", json=conversation(), headers={"X-From": address})).read()
    assert [request.client for request in pool.requests] == ["2001:db8:1:2::/64"] * 2 + ["2001:db8:1:3::/64"]


# descriptors


def limited(soft, hard):
    """A limit of descriptors for a new process."""
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("soft, hard, raised, room", [
    (256, 1024, 1024, 734), (1024, 1024, 1024, 734), (256, 18_000, 8674, 8192), (64, 64, 64, 16),
    (18_000, 18_000, 18_000, 8192)])
def test_the_descriptor_limit_is_raised_as_needed(soft, hard, raised, room):
    if hard > resource.getrlimit(resource.RLIMIT_NOFILE)[1]:
        pytest.skip("this process has a lower hard limit")
    code = "import resource; " \
           "from chatlm.common.config import Settings; " \
           "from chatlm.front.server.connections import room_for_connections; " \
           "print(room_for_connections(Settings()), " \
           "*resource.getrlimit(resource.RLIMIT_NOFILE))"
    run = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, preexec_fn=limited(soft, hard),
                         capture_output=True, text=True, timeout=PATIENCE_S)
    assert run.stdout.split() == [str(room), str(raised), str(hard)], run.stderr


@contextlib.asynccontextmanager
async def server_of_its_own(folder, fixtures, descriptors):
    """The real server with this many descriptors: (URL, its log file)."""
    words = [SCRIPT, fixtures / "gen5", "--port", "0", "--host", "127.0.0.1", "--kv-cache-memory", "512K"]
    with open(folder / "log", "wb") as log:
        server = await asyncio.create_subprocess_exec(
            sys.executable, *words, stdout=subprocess.PIPE, stderr=log,
            preexec_fn=limited(min(64, descriptors), descriptors))
    try:
        while not (found := re.search(rb"http://127\.0\.0\.1:\d+", line := await server.stdout.readline())):
            assert line, (folder / "log").read_text()
        yield found[0].decode(), folder / "log"
    finally:
        server.kill()
        await server.communicate()


async def test_idle_connections_keep_nobody_out(tmp_path, nanochat_fixtures):
    """There are more of them here than descriptors."""
    async with server_of_its_own(tmp_path, nanochat_fixtures, 400) as (url, log):
        idle = [await Client.connect(url) for _ in range(600)]
        client = await Client.connect(url)
        assert await client.lives()
        client.ask(max_tokens=3, temperature=0)
        answer = await asyncio.wait_for(client.reader.readuntil(b"\r\n0\r\n\r\n"), PATIENCE_S)
        assert b'"done": true' in answer
        assert [await each.ended() for each in idle[:400]] == [b""] * 400
        assert log.stat().st_size < 4000 and "out of system resource" not in log.read_text()


async def test_running_out_of_descriptors_is_said_shortly(
        tmp_path, nanochat_fixtures):
    """The server serves again when there are some."""
    too_few = 24            # for the 16 connections that are always allowed
    async with server_of_its_own(tmp_path, nanochat_fixtures, too_few) as (url, log):
        idle = [await Client.connect(url) for _ in range(40)]
        for client in idle:
            client.writer.close()
        assert await (await Client.connect(url)).lives()
        text = log.read_text()
        assert len(text) < 20_000 and text.count("Traceback") < 10


# the log


def test_a_repeated_line_is_logged_once_a_second():
    """It says how often it came."""
    code = """import logging
from chatlm.common.config import Settings
from chatlm.common.log import log, start_logging
start_logging(Settings())
for number in range(10_000):
    accept_error = "socket.accept() out of system resource\\nsocket: <fd=7>"
    logging.getLogger("asyncio").error(accept_error, exc_info=OSError(24, "many"))
    log.warning("a request from %s is not HTTP", number)
    log.info("line %d", number)
log.error("once")
"""
    log = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True,
                         timeout=PATIENCE_S).stderr
    assert len(re.findall(r" line \d+\n", log)) == 10_000 and log.count(" once\n") == 1
    for words in (r"socket\.accept\(\) out of system resource", r"a request from \d+ is not HTTP"):
        written = len(re.findall(rf"^\S+ \S+ {words}$", log, re.MULTILINE))
        left_out = [int(number) for number in re.findall(rf"(\d+) more times: {words}$", log, re.MULTILINE)]
        assert written + sum(left_out) == 10_000 and len(left_out) <= written < 100
    assert log.count("socket: <fd=7>") == log.count("OSError: [Errno 24]") < 100


# readers that do not read


@contextlib.asynccontextmanager
async def counted(monkeypatch, pool):
    """The HTTP side with a tiny WRITE_S: its URL, and an event that is set when no connection is left."""
    none_left = asyncio.Event()

    class Counted(ConnectionTable):
        def remove(self, connection):
            super().remove(connection)
            if not self.all:
                none_left.set()

        def renew(self, connection):        # not through remove, which would set the event
            none_left.clear()

    patch(monkeypatch, connections, "ConnectionTable", Counted)
    patch(monkeypatch, connections, "WRITE_S", 0.2)
    async with serving(pool) as url:
        yield url, none_left


async def silent_reader(url, request):
    """A client that never reads, and whose kernel buffers only a few KB."""
    connection = socket.socket()
    connection.setblocking(False)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    loop, port = asyncio.get_running_loop(), int(url.rsplit(":", 1)[1])
    await loop.sock_connect(connection, ("127.0.0.1", port))
    await loop.sock_sendall(connection, request)
    return connection


def get(path):
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


LARGEST = max(page_files().items(), key=lambda item: len(item[1]))[0]
UNREAD = {      # the request, and whether its answer never ends
    "whole": (posted(b"/v1/chat/completions"), False), "native": (posted(b"/chat/completions"), False),
    "stream": (posted(b"/v1/chat/completions", stream=True), False),
    "resumable": (posted(b"/chat/completions", resumable=True), False),
    "between pieces": (posted(b"/chat/completions"), True), "pipelined": (32 * get("/openapi.json"), False),
    "a file": (get(f"/static/{LARGEST}"), False), "files": (20 * get(f"/static/{LARGEST}"), False)}


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux ends such connections")
@pytest.mark.parametrize("request_, held", UNREAD.values(), ids=UNREAD)
@pytest.mark.parametrize("size", by_day([60_000, 6_000_000], 6_000_000))
async def test_an_unread_response_ends_its_connection(monkeypatch, caplog, request_, held, size):
    pool = FakePool(["x" * min(size, 500_000)] * max(1, size // 500_000))
    if held:
        pool.gate = HeldAfter(1)
    async with counted(monkeypatch, pool) as (url, none_left):
        connection = await silent_reader(url, request_)
        await asyncio.wait_for(none_left.wait(), PATIENCE_S)
        await pool.until_open(0)
        connection.close()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


class HeldAfter:
    """A gate that passes the first pieces and holds the others for ever."""

    def __init__(self, pieces):
        self.pieces = pieces

    async def wait(self):
        self.pieces -= 1
        if self.pieces < 0:
            await asyncio.Event().wait()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux ends such connections")
async def test_a_slow_reader_gets_all_of_a_long_response(monkeypatch):
    """A client that reads now and then gets all of a long response."""
    pool = FakePool(["x" * 500_000] * 12)
    async with counted(monkeypatch, pool) as (url, none_left):
        connection = await silent_reader(url, posted(b"/v1/chat/completions"))
        received = 0
        while received < 6_000_000:
            received += len(await asyncio.get_running_loop().sock_recv(connection, 20_000))
        connection.close()
