"""The front alone under load: many streams through the real pool and HTTP code, from workers that compute
nothing.

    python bench/load_front.py [--streams 1000] [--rate 20] [--seconds 20] [--workers 1]
    python bench/load_front.py --streams 20 --seconds 10 --slow-readers 5 --piece-bytes 100000
    python bench/load_front.py --ray                  the fake workers are on a Ray cluster of this machine (needs Ray)

The front has a core to itself; the fake workers and the clients share the others. The text of each piece is
the time at which its worker sent it, so a client measures the whole delay that pipe, front, socket and client
add. Every stream must get every piece. Clients that do not read must be dropped at no cost to the others.
Prints delays, losses and the front's memory.
"""

import argparse
import asyncio
import gc
import json
import os
import re
import socket
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(os.environ.setdefault("CHAT_SERVER_DIR", str(Path(__file__).resolve().parent.parent)))   # Ray runs a copy of this file
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
from chatlm.common.config import Settings    # noqa: E402
from chatlm.common.hub.find import resolve_model    # noqa: E402
from chatlm.common.memory import tune_gc    # noqa: E402
from chatlm.common.messages.protocol import WORKER_PIPE, Cancel, ModelCard, NewAnswer, Ready, Stepped    # noqa: E402
from chatlm.common.messages.requests import Delta, Ended, Piece, Usage    # noqa: E402
from chatlm.common.processes.child import die_with_parent, join_parent    # noqa: E402
from chatlm.common.processes.ray import ray_main    # noqa: E402
from chatlm.front.pool.catalogue import Catalogue
from chatlm.front.pool.pool import make_pool    # noqa: E402
from chatlm.front.serve import serve_forever    # noqa: E402
from chatlm.worker.weights.formats.nanochat.checkpoint import read_nanochat_tokenizer    # noqa: E402
from patching import replace_everywhere     # noqa: E402
from servers import free_port, started     # noqa: E402

# of the first process: the others inherit fewer
CORES = list(map(int, os.environ.setdefault("FAKE_CORES", ",".join(map(str, sorted(os.sched_getaffinity(0))))).split(",")))
FRONT_CORE, OTHER_CORES = CORES[:1], CORES[1:] or CORES
STAMP = re.compile(rb'"token": "([\d.]+)')


def worker_role(arguments):
    """A worker that sends each request a time stamp in every step, --rate steps a second, one message a
    step."""
    os.sched_setaffinity(0, OTHER_CORES)
    channel = join_parent(arguments, WORKER_PIPE)
    config, *_ = channel.receive(wait=True)
    rate, filler = float(os.environ["FAKE_RATE"]), "x" * int(os.environ["FAKE_PIECE_BYTES"])
    source = config.source or resolve_model(config.settings)
    text = read_nanochat_tokenizer(source.path, 284)
    gauges = dict.fromkeys(("running", "queued", "kv_pages_used", "kv_pages_total", "preemptions", "memory_used", "memory_total"), 0)
    channel.send(ModelCard(text, "fake", 1 << 20, (), {}, False, source=source))
    channel.send(Ready(gauges))
    left, tick = {}, time.monotonic()
    while True:
        for message in channel.receive(wait=not left):
            if isinstance(message, NewAnswer):
                left[message.id] = message.max_tokens
            elif isinstance(message, Cancel):
                left.pop(message.id, None)
        tick = max(tick + 1 / rate, time.monotonic() - 1 / rate)
        time.sleep(max(0.0, tick - time.monotonic()))
        stamp, events = f"{time.monotonic():.6f} {filler}", []
        for name in list(left):
            left[name] -= 1
            events.append((name, Piece((5,), (Delta("text", stamp),))))
            if not left[name]:
                events.append((name, Ended("length", "max_tokens", Usage(), 0.0)))
                del left[name]
        channel.send(Stepped(events, gauges))       # a ping needs an answer too


def front(port, workers, parent):
    """The real server with fake workers behind it."""
    die_with_parent(parent)
    tune_gc()
    os.sched_setaffinity(0, FRONT_CORE)
    settings = Settings(model=str(ROOT / "tests/fixtures/nanochat/gen5"), host="127.0.0.1", port=port, num_workers=workers,
                        device_type="cpu", max_batch=1024, max_queue=1024, ray_address=os.environ.get("FAKE_RAY"))
    catalogue = Catalogue(settings, make_pool(settings, worker_command=(sys.executable, __file__)))
    asyncio.run(serve_forever(settings, catalogue))


class Stream(asyncio.Protocol):
    """One client, which does as little as possible for each piece."""

    def __init__(self, tokens, reads=True):
        self.tokens, self.reads, self.times, self.tail = tokens, reads, [], b""     # times: (sent, received) of each piece
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport):
        self.transport = transport
        body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": self.tokens}).encode()
        transport.write(b"POST /chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
                        % (len(body), body))
        if not self.reads:
            transport.pause_reading()

    def data_received(self, data):
        now = time.monotonic()
        self.times += [(float(stamp), now) for stamp in STAMP.findall(data)]
        self.tail = (self.tail + data)[-400:]

    def connection_lost(self, error):
        if not self.ended.done():
            self.ended.set_result(b'"done": true' in self.tail)


def shown(delays):
    delays = sorted(delays)
    return ", ".join(f"{name} {1e3 * delays[min(len(delays) - 1, int(len(delays) * share))]:.1f} ms"
                     for name, share in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0)))


async def load(url_port, process, args):
    tokens = int(args.rate * args.seconds)
    loop, memory = asyncio.get_running_loop(), []

    async def connect(reads):
        connection = socket.socket()
        connection.setblocking(False)
        if not reads:       # otherwise the kernel buffers megabytes
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await loop.sock_connect(connection, ("127.0.0.1", url_port))
        return await loop.create_connection(lambda: Stream(tokens, reads), sock=connection)

    def cpu_s():
        workers = [sum(child.cpu_times()[:2]) for child in process.children(recursive=True)]
        return [sum(process.cpu_times()[:2]), sum(workers), time.process_time()]

    began_cpu, began_s = cpu_s(), time.monotonic()
    streams = [protocol for _, protocol in await asyncio.gather(*(connect(True) for _ in range(args.streams)))]
    slow = [protocol for _, protocol in await asyncio.gather(*(connect(False) for _ in range(args.slow_readers)))]
    everything = asyncio.gather(*(stream.ended for stream in streams))
    while not everything.done():
        await asyncio.wait([everything], timeout=args.seconds / 8)
        memory.append(process.memory_info().rss / 2**20)
    seconds = time.monotonic() - began_s
    times = [each for stream in streams for each in stream.times]
    all_there_s = max(stream.times[0][1] for stream in streams)
    shares = [f"{(now - before) / seconds:.0%}" for now, before in zip(cpu_s(), began_cpu)]
    print(f"{args.streams} streams, {args.rate:g} events a second each, {seconds:.1f} s: {len(times) / seconds:,.0f} events a second; "
          f"CPU: front {shares[0]} of its core, fake workers {shares[1]} and these clients {shares[2]} of the others")
    print(f"added delay: {shown([received - sent for sent, received in times if sent > all_there_s])}")
    print(f"  while the {args.streams} requests arrived, all at once ({all_there_s - began_s:.1f} s): "
          f"{shown([received - sent for sent, received in times if sent <= all_there_s])}")
    print(f"lost events: {args.streams * tokens - len(times)}; streams without their end: {sum(not s.ended.result() for s in streams)}")
    print("front's memory (MiB): " + " ".join(f"{each:.0f}" for each in memory))
    for stream in slow:
        stream.transport.resume_reading()
    if slow:
        ends = await asyncio.gather(*(stream.ended for stream in slow))
        print(f"slow readers dropped before their end: {sum(not end for end in ends)} of {len(slow)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("streams", 1000), ("rate", 20.0), ("seconds", 20.0), ("workers", 1), ("slow-readers", 0), ("piece-bytes", 0)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--ray", action="store_true")
    args = parser.parse_args()
    port = free_port()
    os.environ |= {"FAKE_RATE": str(args.rate), "FAKE_PIECE_BYTES": str(args.piece_bytes)}
    if args.ray:    # its nodes hand these variables to the workers
        os.sched_setaffinity(0, OTHER_CORES)
        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        from ray.cluster_utils import Cluster
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": args.workers})
        os.environ["FAKE_RAY"] = cluster.address
        for _ in range(10):     # its dashboard and agents take many seconds to start, on the clients' core
            if psutil.cpu_percent(2.0) < 20:
                break
    try:
        with started([sys.executable, __file__, "front", port, args.workers, os.getpid()], port=port) as server:
            os.sched_setaffinity(0, OTHER_CORES)
            gc.disable()        # so that pauses of the clients do not count as the front's
            asyncio.run(load(port, server.front, args))
    finally:
        if args.ray:
            cluster.shutdown()


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker_role(sys.argv[2:])
    elif sys.argv[1:2] == ["ray"]:
        from chatlm.common import program
        ours = {"chatlm/worker/entry.py": Path(__file__).read_bytes()}      # what the actors run as a worker
        replace_everywhere(program, "program_bytes", lambda: program.archive(program.program_sources() | ours))
        os.sched_setaffinity(0, OTHER_CORES)
        sys.exit(ray_main(sys.argv[2:]))
    elif sys.argv[1:2] == ["front"]:
        front(*map(int, sys.argv[2:]))
    else:
        main()
