"""Replicas on a Ray cluster: TCP workers that prove who they are, nodes that come and go, a head that is lost.

CI has no Ray: tests/support/fake_ray.py stands for it, with real workers behind real connections. The tests of the night use
Ray itself, where it is installed."""

import asyncio
import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import chat_server
import forked
import fake_ray
from chatlm.common import errors
from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError
from chatlm.common.messages.protocol import RAY_PIPE, WORKER_PIPE, ActorAddress, Loading, NewPrompt, Node, Ping, RayConfig, StartActor
from chatlm.common.messages.requests import Finished
from chatlm.common.messages.wire import HEADER, Channel
from chatlm.common.processes import child
from chatlm.common.processes.connect import dial, tls_context
from chatlm.common.processes.ray import ray_main
from chatlm.common.processes.start import PROCESS_COMMAND
from chatlm.common.program import program_bytes
from chatlm.front.admission.sandbox import next_message
from chatlm.front.pool.pool import make_pool
from chatlm.front.pool.ray_nodes import NodeShare, RayActor, node_shares
from patching import patch
from pools import collect, greedy, tiny_settings

FAKE_RAY = (sys.executable, str(Path(fake_ray.__file__)))
SECRET = bytes(32)

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
async def cluster(nanochat_fixtures, tmp_path, monkeypatch):
    """A function that makes the nodes and starts a pool on them; at the end no process may be left."""
    file, pools = tmp_path / "cluster", []
    monkeypatch.setenv("FAKE_RAY", str(file))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def set_nodes(**cpus):
        part = file.with_suffix(".part")
        part.write_text(json.dumps(list(cpus.items())))
        part.replace(file)

    async def start(nodes, wait=True, **changes):
        if nodes is not None:
            set_nodes(**nodes)
        settings = tiny_settings(nanochat_fixtures, **{"ray_address": "auto", "num_workers": 0, "device_type": "cpu"} | changes)
        pools.append(pool := make_pool(settings, worker_command=FAKE_RAY))
        pool.placement.RETRY_S = 0.1
        await pool.start()
        if wait:
            await until(lambda: pool.supervisor.failure or pool.ready and all(worker.state == "ready" for worker in pool.workers))
        return pool

    start.set_nodes, start.lose_head = set_nodes, lambda: file.unlink()
    before = {each.pid for each in psutil.Process().children(recursive=True)}
    yield start
    for pool in pools:
        await pool.close()
    before |= {template.process.pid for template in forked.templates.values()}
    started = [each for each in psutil.Process().children(recursive=True) if each.pid not in before]
    await asyncio.to_thread(psutil.wait_procs, started, 30)
    assert not [each for each in started if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


async def until(condition):
    async def wait():
        while not condition():
            await asyncio.sleep(0.02)
    await asyncio.wait_for(wait(), 40)


async def answers(pool, *requests):
    return [text for text, _, _ in await asyncio.gather(*(collect(pool, request) for request in requests))]


@pytest.mark.slow
async def test_replicas_on_two_nodes_serve_as_local_ones(cluster, start_pool):
    local = await start_pool()
    pool = await cluster({"a": 1, "b": 2})
    requests = [greedy(f"{index}", text=f"hello {index}") for index in range(6)]
    assert await answers(pool, *requests) == await answers(local, *requests)
    stats = pool.stats()
    assert {worker["node"]: worker["state"] for worker in stats["workers"]} == {"host of a": "ready", "host of b": "ready"}
    assert stats["ray"] == {"state": "connected", "nodes": ["host of a", "host of b"]} and pool.model_name
    assert any("nanochat" in line for line in pool.describe())      # the nodes found the model, not the front


async def test_a_node_that_dies_changes_no_text(cluster, start_pool, tmp_path):
    """It dies in mid answer; one that comes serves."""
    cache = tmp_path / "cache"
    [wanted] = await answers(await start_pool(), greedy("local", 200, ignore_eos=True))
    pool = await cluster({"a": 1, "b": 1})
    died = []

    def end_its_node(piece, count):
        if count > 20 and not died:
            died.append(next(worker for worker in pool.workers if worker.jobs))
            cluster.set_nodes(**{name: 1 for name in "ab" if f"host of {name}" != died[0].node}, c=1)

    text, tokens, done = await collect(pool, greedy("far", 200, ignore_eos=True), end_its_node)
    assert text == wanted and died
    await until(lambda: {worker.node for worker in pool.workers if worker.state == "ready"} == {
        "host of c", *({"host of a", "host of b"} - {died[0].node})})
    assert await answers(pool, greedy("x", 200, ignore_eos=True), greedy("y", 200, ignore_eos=True)) == [wanted] * 2
    [script] = filter(Path.is_file, cache.rglob("*"))       # all used the same file, and those that were killed left nothing else
    assert script.name == "chatlm.pyz" and script.read_bytes() == program_bytes()


@pytest.mark.slow
async def test_on_ray_who_waits_is_told_the_position(cluster):
    """It is as on one machine."""
    pool = await cluster({"a": 1}, max_batch=1)
    holding = pool.answer(greedy("first", 10_000, ignore_eos=True))
    assert await anext(holding) and await anext(holding)
    waiting = [pool.answer(greedy(name, 5, client="c", progress=True)) for name in ("second", "third")]
    for events in waiting:
        await anext(events)
    assert [(await anext(events)).queue_position for events in waiting] == [1, 2]
    await holding.aclose()
    for events in waiting:
        assert isinstance([event async for event in events][-1], Finished)


@pytest.mark.slow
async def test_two_ranks_are_on_one_node(cluster):
    """It has CPUs for both."""
    pool = await cluster({"a": 1, "b": 2}, tensor_parallel_size=2)
    [worker] = pool.workers
    assert worker.node == "host of b" and "2 ranks (--pp 1 --tp 2)" in worker.place
    assert len(set(await answers(pool, greedy("x"), greedy("y")))) == 1


@pytest.mark.slow
async def test_without_its_head_a_cluster_goes_on(cluster):
    """New places wait."""
    pool = await cluster({"a": 1})
    lost = []

    def lose_head(piece, count):
        if not lost:
            lost.append(cluster.lose_head())
    long = asyncio.create_task(collect(pool, greedy("long", 200, ignore_eos=True), lose_head))
    await until(lambda: pool.stats()["ray"]["state"] not in ("connected", "connecting"))
    assert len((await long)[1]) == 200
    assert (await answers(pool, greedy("more"))) and pool.workers[0].restarts == 0
    cluster.set_nodes(a=1, b=1)
    await until(lambda: sum(worker.state == "ready" for worker in pool.workers) == 2)
    assert pool.stats()["ray"]["state"] == "connected" and pool.workers[0].restarts == 0


async def test_a_missing_cluster_is_a_config_error(cluster):
    pool = await cluster(None, wait=False)
    with pytest.raises(ConfigError, match="--ray-address auto: Could not find any running Ray instance"):
        await pool.wait_ready()


async def test_a_node_without_the_model_is_named(cluster, tmp_path):
    pool = await cluster({"a": 1}, wait=False, model=str(tmp_path / "none.gguf"))
    with pytest.raises(ConfigError, match="none.gguf"):
        await pool.wait_ready()
    assert pool.workers[0].state == "left out" and pool.workers[0].node == "host of a"


@pytest.mark.slow
async def test_the_first_node_that_comes_serves(cluster):
    """That there is none yet is a state."""
    pool = await cluster({}, wait=False)
    await until(lambda: "waiting for a node" in pool.supervisor.loading[0])
    cluster.set_nodes(late=1)
    await pool.wait_ready()
    assert await answers(pool, greedy("one"))


@pytest.mark.parametrize("changes, nodes, expected", [
    ({"num_workers": 0}, [("a", 4, 0), ("b", 2, 0), ("c", 0, 0)], (2, ["a4", "b2"])),
    ({"num_workers": 3}, [("a", 4, 0), ("b", 2, 0)], (3, ["a2", "b1", "a2", "b1"])),
    ({}, [("a", 4, 0), ("b", 2, 0)], (1, ["a4", "b2"])),
    ({}, [("a", 4, 2), ("b", 2, 0), ("c", 8, 1)], (3, ["a0", "c0", "a0"])),
    ({"num_gpus": "2"}, [("a", 4, 2), ("c", 8, 1)], (2, ["a0", "c0", "a0"])),
    ({"num_gpus": "9"}, [("a", 4, 2)], (9, ["a0", "a0"])),
    ({"device_type": "cpu", "num_workers": 0}, [("a", 4, 2)], (1, ["a4"])),
    ({"tensor_parallel_size": 2}, [("a", 4, 5), ("c", 8, 1)], (2, ["a0", "a0"])),
    ({"tensor_parallel_size": 2, "num_workers": 0}, [("a", 1, 0), ("c", 3, 0)], (1, ["c3"]))])
def test_node_shares_are_gpus_or_whole_nodes(changes, nodes, expected):
    """They are spread."""
    wanted, shares = node_shares(Settings(ray_address="auto", **changes), [Node(name, name, cpus, gpus) for name, cpus, gpus in nodes])
    assert (wanted, [f"{share.node.id}{share.cpus:g}" for share in shares]) == expected


# who may speak with a worker


@pytest.fixture
def certificates(tmp_path):
    """A folder of ca.pem, cert.pem and key.pem, and one of another authority."""
    folders = tmp_path / "ours", tmp_path / "others"
    for folder in folders:
        folder.mkdir()
        authority = ["-CA", "ca.pem", "-CAkey", "ca.key"]
        for name, signed in (("ca", []), ("cert", authority)):
            subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", f"/CN={name}",
                            "-keyout", f"{name.replace('cert', 'key')}.{'key' if name == 'ca' else 'pem'}", "-out", f"{name}.pem", *signed],
                           cwd=folder, check=True, capture_output=True)
    return folders


@pytest.fixture
def waiting_worker():
    """A function that starts what a worker does before its first message, with 15 connections that stay and say
    nothing: returns (process, port, secret)."""
    processes, connections = [], contextlib.ExitStack()

    def start(tls=""):
        code = ("import sys; "
                "from chatlm.common.messages.protocol import WORKER_PIPE, Ping; "
                "from chatlm.common.processes.child import join_parent; "
                "channel = join_parent(sys.argv[1:], WORKER_PIPE);\n"
                "[channel.send(message) for message in channel.receive(wait=True)]; channel.send(Ping())\n"
                "[print(message, flush=True) for message in channel.receive(wait=True)]")
        process = subprocess.Popen([sys.executable, "-c", code, f"127.0.0.1,{tls}", str(os.getpid())], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True, cwd=Path(chat_server.__file__).parent)
        processes.append(process)
        port, secret = json.loads(process.stdout.readline())
        for _ in range(15):     # one after another they would take longer than the minute that a worker waits
            connections.enter_context(socket.create_connection(("127.0.0.1", port)))
        return process, port, secret
    yield start
    connections.close()
    for process in processes:
        process.kill()
        process.communicate()


def actor_of_front():
    return RayActor(NodeShare(Node("a", "a", 1, 0), 1, 0, 1), lambda message: None)


async def exchange(actor, port, secret, tls=""):
    reader = await actor.connect(ActorAddress("x", "127.0.0.1", port, secret), tls)
    sent = [Loading("a stage", 0.5), NewPrompt("r", 0, tuple(range(200_000)))]
    heard = []
    for message in sent:        # the second is larger than a TLS record and a socket's buffer
        actor.writer.write(WORKER_PIPE.packed(message))
        if len(heard) == 0:
            heard.append(await next_message(reader, WORKER_PIPE))
    heard.append(await next_message(reader, WORKER_PIPE))
    return heard


def test_early_actors_are_left_for_ray(monkeypatch):
    """They are asked for before Ray runs."""
    ours, theirs = (Channel(end, RAY_PIPE) for end in socket.socketpair())
    patch(monkeypatch, child, "join_parent", lambda *arguments: theirs)
    patch(monkeypatch, errors, "require_library", lambda name, purpose: (_ for _ in ()).throw(ConfigError("no ray")))
    for message in (RayConfig("auto", ""), StartActor("w", "n", 1, 0)):
        ours.send(message)
    assert ray_main(("0", "0")) == 1
    [refusal] = ours.receive(wait=True)
    assert refusal.message == "--ray-address auto: no ray" and isinstance(theirs.receive(wait=True)[0], StartActor)
    for channel in (ours, theirs):
        channel.connection.close()


async def test_messages_pass_once_both_know_the_secret(waiting_worker):
    """Others were refused before."""
    process, port, secret = waiting_worker()
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await actor_of_front().connect(ActorAddress("x", "127.0.0.1", port, SECRET.hex()), "")
    with socket.create_connection(("127.0.0.1", port)) as liar:     # sends a message instead of a proof
        liar.sendall(WORKER_PIPE.packed(NewPrompt("r", 0, tuple(range(100)))))
        assert liar.recv(32)
        with contextlib.suppress(ConnectionResetError):
            assert liar.recv(1) == b""
    actor = actor_of_front()
    assert await exchange(actor, port, secret) == [Loading("a stage", 0.5), Ping()]
    assert "NewPrompt" in await asyncio.to_thread(process.stdout.readline)
    actor.writer.close()


async def test_a_worker_without_the_secret_learns_nothing():
    told = []

    async def impostor(reader, writer):
        writer.write(bytes(32))
        told.append(await reader.readexactly(64))
        writer.write(bytes(32))
        told.append(await reader.read())
        writer.close()
    async with await asyncio.start_server(impostor, "127.0.0.1", 0) as server:
        actor = actor_of_front()
        with pytest.raises(ConnectionError, match="does not know the secret"):
            await actor.connect(ActorAddress("x", "127.0.0.1", server.sockets[0].getsockname()[1], SECRET.hex()), "")
        actor.writer.close()
        await until(lambda: len(told) == 2)
    assert told[1] == b""


async def test_certificates_make_it_tls(waiting_worker, certificates):
    """Another authority is refused."""
    ours, others = certificates
    process, port, secret = waiting_worker(ours)
    for tls in (others, ""):
        with pytest.raises((OSError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(actor_of_front().connect(ActorAddress("x", "127.0.0.1", port, secret), str(tls)), 20)
    actor = actor_of_front()
    assert await exchange(actor, port, secret, str(ours)) == [Loading("a stage", 0.5), Ping()]
    assert actor.writer.get_extra_info("ssl_object").version() == "TLSv1.3"
    assert "NewPrompt" in await asyncio.to_thread(process.stdout.readline)
    actor.writer.close()


@pytest.mark.parametrize("frame", [b"GET / HTTP/1.1\r\n\r\n", WORKER_PIPE.packed(Ping()), HEADER.pack(0, 3) + b"[5]"])
def test_a_garbage_frame_is_refused_in_one_line(frame):
    """It is the first frame of a worker."""
    with subprocess.Popen([*PROCESS_COMMAND, "worker", "127.0.0.1,", str(os.getpid())], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        port, secret = json.loads(process.stdout.readline())
        with dial("127.0.0.1", port, bytes.fromhex(secret)) as front:
            front.sendall(frame)
            assert process.wait(30) == 1
        [line] = process.stderr.read().splitlines()
        assert line.startswith(b"the other end of the connection sends messages that are not ours: ")


def test_a_folder_without_certificates_is_refused(tmp_path):
    """It is a config error."""
    with pytest.raises(ConfigError, match="--ray-tls .*ca.pem"):
        tls_context(str(tmp_path), False)
    assert tls_context("", True) is None and ssl.HAS_TLSv1_3
