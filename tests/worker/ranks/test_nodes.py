"""Ranks that torchrun starts: two real agents on this machine stand for two nodes."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from chatlm.common.config import Settings
from chatlm.common.core import decode_core
from chatlm.common.errors import ConfigError
from chatlm.common.messages.protocol import Ready
from chatlm.common.messages.wire import HEADER, Channel, receive_into
from chatlm.common.processes import connect as connect_module, torchrun as processes_torchrun
from chatlm.common.processes.connect import Listener, dial, listen, proof
from chatlm.common.processes.launch import Torchrun, ranks_here, torchrun
from chatlm.common.processes.torchrun import ARRIVAL_PIPE, RankArrival, live_as_rank, serve_rank
from chatlm.worker.ranks.messages import RANK_PIPE, RankPages
from chatlm.worker.ranks.links import TcpLinks
from patching import patch
from real_server import SCRIPT, ask, events, free_port, get, gone, post, wait_for

pytestmark = pytest.mark.timeout(180)


class Agents:
    """Two agents of torchrun, `each` processes on both."""

    def __init__(self, model, *arguments, each=1, folders=(None, None)):
        self.model, self.arguments, self.each, self.folders, self.port = str(model), arguments, each, folders, free_port()
        self.agents = {node: self.start(node) for node in (1, 0)}

    def start(self, node):
        port = str(free_port())
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node), "--master-addr", "127.0.0.1",
             "--master-port", str(self.port), "--nproc-per-node", str(self.each), str(SCRIPT), "serve", self.model, "--port", port,
             "--host", "127.0.0.1", "--kv-cache-memory", "8M", "--stream-interval", "0", *self.arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.folders[node])

    def processes(self, node, word):
        return [process for process in psutil.Process(self.agents[node].pid).children(recursive=True) if word in process.cmdline()]

    def end(self, node):
        """Kill an agent and all that it has started, as a machine that loses its power."""
        processes = []
        with contextlib.suppress(psutil.NoSuchProcess):
            processes = [(agent := psutil.Process(self.agents[node].pid)), *agent.children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.agents[node].wait()
        return processes


@contextlib.contextmanager
def agents(model, *arguments, **options):
    """Yields the agents and the server's address."""
    both = Agents(model, *arguments, **options)
    try:
        yield both, wait_for(both.agents[0], r"(http://127\.0\.0\.1:\d+)")
    finally:
        for node, agent in both.agents.items():
            both.end(node)
            agent.stdout.close()


def text_of(url, on_piece=lambda count: None, tokens=60):
    """An answer's text; `on_piece` gets the number of pieces so far."""
    text = ""
    for count, line in enumerate(line for line in post(f"{url}/chat/completions", ask("hello", max_tokens=tokens)) if line.startswith(b"data: ")):
        text += json.loads(line[6:]).get("token", "")
        on_piece(count)
    return text


def tokens_of(layout):
    """So many that a test meets an answer in its middle. With --tp torch computes, slowly, and its last bits depend on the step."""
    return 60 if "--tp" in layout else 300


LAYOUTS = [pytest.param(("--tp", "2"), 1, "torch/reference", id="tp2"),
           pytest.param(("--pp", "2"), 1, "decode_core", id="pp2", marks=pytest.mark.slow),
           pytest.param(("--tp", "2", "--pp", "2"), 2, "torch/reference", id="tp2-pp2", marks=pytest.mark.slow)]


@pytest.mark.slow
@pytest.mark.parametrize("layout, each, kernels", LAYOUTS)
def test_two_nodes_keep_the_text_when_a_rank_dies(layout, each, kernels, nanochat_fixtures):
    """Two nodes serve and go on with the same text when a rank dies."""
    with agents(nanochat_fixtures / "gen5", *layout, each=each) as (both, url):
        expected = text_of(url, tokens=tokens_of(layout))
        assert len(expected) > 20
        ranks = both.processes(1, "rank")
        listening = {node: sum(each.status == psutil.CONN_LISTEN and each.laddr.port == int(url.rpartition(":")[2])
                               for process in psutil.Process(agent.pid).children(recursive=True) for each in process.net_connections())
                     for node, agent in both.agents.items()}
        assert len(ranks) == each and listening == {0: 1, 1: 0}
        assert text_of(url, lambda count: count == 1 and ranks[-1].kill(), tokens_of(layout)) == expected
        [worker] = (stats := get(f"{url}/stats"))["workers"]
        assert worker["restarts"] == 1 and gone(ranks)
        assert kernels in stats["kernels"]["linear"] or decode_core() is None

        ranks = both.processes(1, "rank")
        [front] = [process for process in psutil.Process(both.agents[0].pid).children() if process.environ()["RANK"] == "0"]
        front.send_signal(signal.SIGTERM)
        assert [agent.wait(90) for agent in both.agents.values()] == [0, 0]
        assert gone(ranks)


@pytest.mark.slow
@pytest.mark.timeout(400)       # a rank counts as hung after 30 s, or 20 of the slowest steps
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="POSIX")
@pytest.mark.parametrize("layout", [("--tp", "2"), ("--pp", "2")])
def test_a_hanging_remote_rank_is_replaced(layout, nanochat_fixtures):
    """A rank of another node that hangs is replaced, and the text goes on."""
    with agents(nanochat_fixtures / "gen5", *layout) as (both, url):
        expected, [rank] = text_of(url, tokens=tokens_of(layout)), both.processes(1, "rank")
        assert text_of(url, lambda count: count == 1 and rank.suspend(), tokens_of(layout)) == expected
        [worker] = get(f"{url}/stats")["workers"]
        assert worker["restarts"] == 1 and gone([rank]) and len(both.processes(1, "rank")) == 1


@pytest.mark.slow
def test_a_lost_node_comes_back_by_the_same_command(nanochat_fixtures):
    with agents(nanochat_fixtures / "gen5", "--pp", "2") as (both, url):
        expected = text_of(url, tokens=300)

        def lose(count):
            if count == 1:
                both.end(1)
                both.agents[1].stdout.close()
                both.agents[1] = both.start(1)
        assert text_of(url, lose, 300) == expected
        lost = both.end(0)
        assert both.agents[1].wait(60) and gone(lost)
        assert "is gone, so the node of rank 0 is too" in both.agents[1].stdout.read()


@pytest.mark.slow
def test_a_node_without_the_model_is_told_in_one_line(nanochat_fixtures, tmp_path):
    both = Agents("gen5", "--tp", "2", folders=(nanochat_fixtures, tmp_path))
    try:
        line = wait_for(both.agents[0], "^chat_server: .*")
        assert line.startswith(f"chat_server: rank 1 on {socket.gethostname()}: ") and "gen5" in line
        assert [agent.wait(60) for agent in both.agents.values()] == [1, 1]
    finally:
        for node, agent in both.agents.items():
            both.end(node)
            agent.stdout.close()


STARTED = dict(RANK="1", LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", MASTER_ADDR="10.0.0.1", MASTER_PORT="29500", TORCHELASTIC_RUN_ID="x")


@pytest.fixture
def started(monkeypatch):
    def start(**changes):
        for name, value in (STARTED | changes).items():
            monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
        sizes = dict(tensor_parallel_size=2)
        return lambda **settings: torchrun(Settings(**sizes | settings))
    return start


def test_what_torchrun_says_is_read(started):
    """What torchrun says is read, and without it nothing is."""
    assert started()() == Torchrun(1, 0, 2, 1, "10.0.0.1", 29500)
    assert ranks_here(Settings(tensor_parallel_size=2)) == 1
    assert started(TORCHELASTIC_RUN_ID=None)(tensor_parallel_size=1) is None         # some clusters set the others everywhere
    assert started()(url="http://a") is None and started(WORLD_SIZE="1")() is None and started(WORLD_SIZE=None)() is None
    assert ranks_here(Settings(tensor_parallel_size=2, pipeline_parallel_size=3)) == 6


@pytest.mark.parametrize("changes, settings, message", [
    (dict(WORLD_SIZE="3"), {}, "torchrun starts 3 processes .* but --tp 2 --pp 1 are 2 rank"),
    (dict(WORLD_SIZE="4"), dict(tensor_parallel_size=1), "torchrun starts 4 processes .* but --tp 1 --pp 1 are 1 rank"),
    (dict(MASTER_ADDR=None), {}, "MASTER_ADDR missing. Start it with torchrun"),
    (dict(TORCHELASTIC_RUN_ID=None, MASTER_PORT=None), {}, "MASTER_PORT, TORCHELASTIC_RUN_ID missing"),
    ({}, dict(num_workers=2), "leave out --num-gpus, --num-workers"), ({}, dict(ray_address="auto"), "leave out .* --ray-address")])
def test_a_start_that_cannot_work_is_refused(started, changes, settings, message):
    with pytest.raises(ConfigError, match=message):
        started(**changes)(**settings)


def test_the_refusal_is_one_line(default_model_path):
    run = subprocess.run([sys.executable, SCRIPT, "serve", str(default_model_path), "--tp", "2"], capture_output=True, text=True,
                         timeout=60, env=os.environ | STARTED | {"WORLD_SIZE": "5"})
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1 and "torchrun starts 5 processes" in run.stderr


def test_nodes_with_other_sizes_are_refused(started):
    start = started()()
    store = types.SimpleNamespace(look=lambda key: ["127.0.0.1", 1, "00", "--tp 1 --pp 2 and version 0 of chat_server.py"])
    with pytest.raises(ConfigError, match="rank 0 has --tp 1 --pp 2 and version 0 of .*, but rank 1 has --tp 2 --pp 1 and version [0-9a-f]{8} of"):
        live_as_rank(Settings(tensor_parallel_size=2), start, store, 1)


class StoreInMemory(processes_torchrun.RankStore):
    """torchrun's store, for threads of this process."""

    def __init__(self):
        self.keys, self.store = {"life": 0}, types.SimpleNamespace(add=self.add)

    def add(self, key, count):
        self.keys[key] += count
        return self.keys[key]

    life = property(lambda self: self.keys["life"])

    def put(self, key, value):
        self.keys[key] = value

    def look(self, key):
        return self.keys.get(key)


def tcp_links():
    """What makes the links to two ranks, and an event that is set when only rank 2 is missing."""
    config, one_is_there = types.SimpleNamespace(settings=Settings(tensor_parallel_size=3), device="cuda"), threading.Event()
    return lambda: TcpLinks(config, lambda stage, fraction: stage.startswith("waiting for rank 2 ") and one_is_there.set()), one_is_there


def come(store, life, frame):
    """Prove to know the secret that is in the store since a life, and send a first frame."""
    host, port, secret, _ = store.wait(store.life, lambda: store.life >= life and store.look(f"{store.life}/0") or None)
    connection = dial(host, port, bytes.fromhex(secret))
    connection.sendall(frame)
    return connection


def test_a_rank_that_leaves_early_returns_in_a_new_life(started, monkeypatch):
    """A rank that leaves before all have come meets them in a new life."""
    started(RANK="0", WORLD_SIZE="3", MASTER_ADDR="127.0.0.1")
    store, (gather, one_is_there) = StoreInMemory(), tcp_links()
    patch(monkeypatch, processes_torchrun, "RankStore", lambda: store)

    def rank(number, life):
        return come(store, life, ARRIVAL_PIPE.packed(RankArrival(number, f"node {number}", 0, 1)))

    with ThreadPoolExecutor(1) as thread:
        gathered = thread.submit(gather)
        lost = rank(1, 1)
        assert one_is_there.wait(30)
        lost.close()
        while store.life < 2:
            time.sleep(0.01)
        with rank(1, 2) as one, rank(2, 2) as two:
            links = gathered.result(30)
            assert links.life == 2 and [arrival.host for arrival in links.arrivals] == ["node 1", "node 2"]
            for channel in links.channels:
                channel.send(Ready({}))
            assert [Channel(each, RANK_PIPE).receive(wait=True) for each in (one, two)] == [[Ready({})]] * 2
            one.close()
            assert select.select([links.channels[0].connection], [], [], 30)[0]     # the system tells of the end a little later
            assert links.has_ended(1) and not links.has_ended(2) and str(links.failure(1)) == "rank 1 on node 1 has ended"
            for channel in links.channels:
                channel.connection.close()


def test_a_rank_that_finds_no_front_ends_too(started, monkeypatch):
    """A rank that comes after its front has ended ends too."""
    start, store = started()(), StoreInMemory()
    patch(monkeypatch, processes_torchrun, "RankStore", lambda: store)
    store.put("over", [1.0, 3])
    assert serve_rank(Settings(tensor_parallel_size=2), start) == 3
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")       # then it may be the front before that has ended
    looks = iter(range(3))
    monkeypatch.setattr(time, "sleep", lambda seconds: next(looks) == 2 and store.put("over", [2.0, 0]))
    assert serve_rank(Settings(tensor_parallel_size=2), start) == 0 and next(looks, None) is None


SECRET = b"a" * 32


@pytest.fixture
def listener():
    """A function that opens a Listener on this machine."""
    with contextlib.ExitStack() as stack:
        def make(**changes):
            listener = stack.enter_context(listen("127.0.0.1"))
            return stack.enter_context(Listener(listener, SECRET, **changes))
        yield make


@pytest.fixture
def connect():
    """A function that connects with a listener, from an address of this machine, and sends something."""
    with contextlib.ExitStack() as stack:
        def make(listener, data=b"", source="127.0.0.1"):
            peer = stack.enter_context(socket.create_connection(listener.socket.getsockname(), 10, (source, 0)))
            peer.sendall(data)
            return peer
        yield make


def prove(peer, secret=SECRET, first=b""):
    """What `dial` sends, and more."""
    theirs = peer.recv(32, socket.MSG_WAITALL)
    peer.sendall(b"n" * 32 + proof(secret, "front", theirs + b"n" * 32) + first)


def test_only_the_secret_admits_a_connection(listener):
    listener = listener()
    with ThreadPoolExecutor(1) as thread:
        host, port = listener.socket.getsockname()
        assert listener.accept(0.01) is None
        dialed = thread.submit(dial, host, port, b"b" * 32)
        assert listener.accept(0.5) is None and isinstance(dialed.exception(), (EOFError, ConnectionError))
        dialed = thread.submit(dial, host, port, SECRET)
        admitted, first = listener.accept(10)
        with admitted, dialed.result() as peer:
            peer.sendall(b"x")
            assert admitted.recv(9) == b"x" and admitted.gettimeout() is peer.gettimeout() is first is None


def test_who_knows_the_secret_waits_for_nobody(listener, connect):
    """Who knows the secret waits for nobody who has not proven it."""
    listener = listener()
    idle = [connect(listener, b"x" * sent) for sent in (0, 1, 31, 63, 0, 63)]
    with ThreadPoolExecutor(1) as thread:
        dialed = thread.submit(dial, *listener.socket.getsockname(), SECRET)
        admitted, _ = listener.accept(listener.PROOF_S / 2)
        admitted.close(), dialed.result().close()
    assert len(listener.handshakes) == len(idle)


def test_single_bytes_keep_no_peer_in_the_handshake(listener, connect, monkeypatch, caplog):
    """Bytes come as often as you like; the clock, which each look moves on, is all that counts."""
    listener, clock, sent = listener(), iter(range(0, 10**6, 2)), 0
    dripping = connect(listener)
    monkeypatch.setattr(connect_module, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    listener.PROOF_S = 60
    assert listener.accept(3) is None and len(listener.handshakes) == 1
    while listener.handshakes:
        dripping.sendall(b"x")
        sent += 1
        assert listener.accept(3) is None
    assert 5 < sent < 30 and caplog.messages == ["a connection was refused: no proof within 60 s"]


def test_the_address_with_most_handshakes_makes_room(listener, connect):
    """Where peers crowd, the address with the most makes room."""
    listener = listener()
    listener.MOST = 8
    honest = connect(listener, source="127.0.0.2")
    assert listener.accept(0.05) is None
    crowd = [connect(listener) for _ in range(40)]
    while crowd[-1].getsockname() not in [each.getpeername() for each in listener.handshakes]:
        assert listener.accept(0.05) is None
    assert len(listener.handshakes) == 8
    prove(honest)
    assert listener.accept(10)[0].getpeername() == honest.getsockname()


ARRIVAL = ARRIVAL_PIPE.packed(RankArrival(1, "a", 0, 1))
GARBAGE = {name: HEADER.pack(0, len(body)) + body for name, body in {
    "no JSON": b"\xff\n[", "too few fields": b"[]", "a list as rank": b'[[1],"a",0,1,null,null]', "text as rank": b'["1","a",0,1,null,null]',
    "no number of threads": b'[1,"a",0,1e999,null,null]'}.items()} | {
    "of an unknown kind": b"\xff" * 5, "too large": HEADER.pack(0, 1 << 30), "of another kind": RANK_PIPE.packed(RankPages(5)),
    "HTTP": b"GET / HTTP/1.1\r\n\r\n"}


@pytest.mark.parametrize("frame", GARBAGE.values(), ids=GARBAGE)
def test_a_first_frame_of_garbage_is_one_line(frame, listener, connect, caplog):
    """Who sends one is refused."""
    listener = listener(first=ARRIVAL_PIPE)
    prove(connect_and_see(listener, connect), first=frame)
    assert listener.accept(0.05) is None and not listener.handshakes
    [line] = caplog.messages
    assert line.startswith("a connection was refused: ") and "\n" not in line and "Traceback" not in caplog.text
    prove(connect_and_see(listener, connect), first=ARRIVAL)
    connection, arrival = listener.accept(10)
    connection.close()
    assert arrival == RankArrival(1, "a", 0, 1)


def connect_and_see(listener, connect):
    """A peer that the listener has sent its nonce."""
    peer = connect(listener)
    while peer.getsockname() not in [each.getpeername() for each in listener.handshakes]:
        assert listener.accept(0.02) is None
    return peer


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" + b"x" * 99, bytes(range(64)), b"\x16\x03\x01" + bytes(200)])
def test_who_leaves_without_proof_is_one_line(data, listener, connect, caplog):
    """Who sends no proof and leaves is refused in one line."""
    listener = listener(first=ARRIVAL_PIPE)
    peer = connect(listener, data)
    peer.shutdown(socket.SHUT_WR)
    assert listener.accept(0.05) is None and not listener.handshakes
    assert len(caplog.messages) == 1 and "\n" not in caplog.text.strip()


def test_ranks_meet_among_who_send_nonsense(started, monkeypatch, caplog):
    """torchrun's store gives the secret to whoever reaches it."""
    started(RANK="0", WORLD_SIZE="3", MASTER_ADDR="127.0.0.1")
    store, (gather, _) = StoreInMemory(), tcp_links()
    patch(monkeypatch, processes_torchrun, "RankStore", lambda: store)
    intruders = [ARRIVAL[:-1], ARRIVAL_PIPE.packed(RankArrival(7, "a", 0, 1)), ARRIVAL_PIPE.packed(RankArrival(0, "a", 0, 1)), RANK_PIPE.packed(RankPages(5)), b"\xff" * 99]
    with ThreadPoolExecutor(1) as thread, contextlib.ExitStack() as stack:
        gathered = thread.submit(gather)
        for frame in intruders:
            stack.enter_context(come(store, 1, frame))
        ranks = [stack.enter_context(come(store, 1, ARRIVAL_PIPE.packed(RankArrival(rank, f"node {rank}", 0, 1)))) for rank in (1, 2)]
        links = gathered.result(30)
        assert links.life == 1 and [arrival.host for arrival in links.arrivals] == ["node 1", "node 2"]
        for rank, channel in zip(ranks, links.channels):
            assert channel.connection.getpeername() == rank.getsockname()
            channel.connection.close()
    assert len([line for line in caplog.messages if "refused" in line]) >= 4 and "Traceback" not in caplog.text


def test_who_drips_has_one_deadline_too():
    """A socket's own timeout begins anew with each byte."""
    class Dripping:
        timeouts = []
        settimeout = timeouts.append

        def recv_into(self, view):
            view[0] = 5
            return 1
    data = bytearray(64)
    receive_into(Dripping(), data, time.monotonic() + 20)
    assert data == b"\5" * 64 and len(Dripping.timeouts) == 64
    assert sorted(Dripping.timeouts, reverse=True) == Dripping.timeouts and Dripping.timeouts[-1] < Dripping.timeouts[0] < 20
