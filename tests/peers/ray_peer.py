"""Replicas on a real Ray cluster whose nodes are all at 127.0.0.1, with the default model: `ray_peer.py REPOSITORY`.

A replica of two ranks answers on one node. Then replicas of one: a node is killed in the middle of an answer, one is added,
the head is killed. At the end no worker may be left.
"""

import asyncio
import os
import sys
import time
from pathlib import Path

import psutil

# the second: Ray's name for "this cluster is one machine", without which a driver asked for 127.0.0.1 goes to the machine's own address
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1], "tests/support"))]

from ray.cluster_utils import Cluster   # noqa: E402

from chatlm.common.config import Settings    # noqa: E402
from chatlm.front.pool.pool import make_pool    # noqa: E402
from pools import collect, greedy   # noqa: E402

LIMIT_S = 90


async def until(condition, what):
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"{what} did not happen within {LIMIT_S} s"
        await asyncio.sleep(0.05)


def ready(pool):
    return {worker.node for worker in pool.workers if worker.state == "ready"}


def question(name, tokens=80):
    return greedy(name, tokens, "Tell me about rivers.", ignore_eos=True)


async def started(cluster, nodes, **changes):
    pool = make_pool(Settings(**{"ray_address": cluster.address, "num_workers": 0, "device_type": "cpu", "kv_cache_memory": 128 << 20,
                               "max_batch": 4, "command": "chat", "drafts": "none"} | changes))
    pool.placement.SILENT_S = 3.0
    await pool.start()
    await pool.wait_ready()
    await until(lambda: ready(pool) == nodes, f"{nodes} serve")
    return pool


def workers():
    """Our processes on the nodes, ranks too."""
    found = []
    for process in psutil.process_iter():
        try:
            if {"worker", "rank"} & set(process.cmdline()) and "raylet" in {parent.name() for parent in process.parents()}:
                found.append(process)
        except psutil.Error:
            pass
    return found


async def main():
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "node_name": "head"})
    nodes = {name: cluster.add_node(num_cpus=cpus, node_name=name) for name, cpus in (("a", 1), ("b", 2))}
    assert cluster.address.startswith("127.0.0.1:")

    pool = await started(cluster, {"b"}, tensor_parallel_size=2)
    text, *_ = await collect(pool, greedy("ranks", 20, "What is the capital of Japan?"))
    assert "Tokyo" in text and "2 ranks (--pp 1 --tp 2)" in pool.workers[0].place and len(workers()) == 2
    await pool.close()
    print("two ranks on one node:", text, flush=True)

    pool = await started(cluster, {"a", "b"})
    wanted, *_ = await collect(pool, question("first"))
    killed = []

    def kill_its_node(piece, count):
        if count > 30 and not killed:
            killed.append(next(worker.node for worker in pool.workers if worker.jobs))
            cluster.remove_node(nodes[killed[0]], allow_graceful=False)
    text, *_ = await collect(pool, question("continued"), kill_its_node)
    assert text == wanted and killed, "the text changed where its node died"
    other = "b" if killed == ["a"] else "a"
    cluster.add_node(num_cpus=1, node_name="c")
    await until(lambda: ready(pool) == {other, "c"}, "the new node serves")
    answers = await asyncio.gather(*(collect(pool, question(f"both {index}")) for index in range(6)))      # more than one has rows for
    assert {done.gpu for *_, done in answers} == {worker.gpu for worker in pool.workers} and {text for text, *_ in answers} == {wanted}
    print("a node died and one came", pool.stats()["ray"], flush=True)

    long = asyncio.create_task(collect(pool, question("long", 200)))
    await until(lambda: pool.dispatcher.jobs and pool.dispatcher.jobs["long"].output_ids, "an answer began")
    cluster.head_node.kill_gcs_server()
    _, tokens, _ = await long
    assert len(tokens) == 200 and ready(pool) == {other, "c"}
    await until(lambda: pool.stats()["ray"]["state"] != "connected", "the loss of the head is told")
    assert (await collect(pool, question("after")))[0] == wanted
    print("without its head:", pool.stats()["ray"]["state"], flush=True)
    await pool.close()
    await until(lambda: not workers(), "the workers' end")
    cluster.shutdown()


asyncio.run(main())
