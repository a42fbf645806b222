"""A replica on Ray compared with a local one, in turns, with the default model: first tokens, and tokens per second of 1 and 16 streams.

    python bench/ray_replica.py [--rounds 5] [--tokens 64] [--streams 1,16]

It needs Ray (tests/peers/ray.txt). The cluster is a head and one node at 127.0.0.1 with all CPUs of this machine, so that both
replicas have the same number of threads; both are in memory, and one computes at a time. They differ in how messages travel: a
socket pair to the local one, TCP to the one on Ray. Goals: the first token at most 3 ms later, throughput at least 0.95.
"""

import argparse
import asyncio
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "CHAT_SERVER_CONFIG": ""}

from chatlm.common.config import Settings    # noqa: E402
from chatlm.common.messages.requests import Piece    # noqa: E402
from chatlm.common.processes.start import threads_per_worker    # noqa: E402
from chatlm.front.pool.pool import make_pool    # noqa: E402


async def answer(pool, name, tokens):
    """(seconds to the first token, times of all messages, tokens)"""
    from pools import greedy
    began_s, times, count = time.perf_counter(), [], 0
    async for event in pool.answer(greedy(name, tokens, f"{name}: tell me about rivers.", ignore_eos=True)):
        if isinstance(event, Piece):
            times.append(time.perf_counter())
            count += len(event.tokens)
    return times[0] - began_s, times, count


async def turn(pool, name, streams, tokens):
    """(median ms to the first token, tokens per second of all streams from the first token to the last)"""
    got = await asyncio.gather(*(answer(pool, f"{name} {stream}", tokens) for stream in range(streams)))
    first, last = min(times[0] for _, times, _ in got), max(times[-1] for _, times, _ in got)
    return 1e3 * statistics.median(ttft_s for ttft_s, *_ in got), (sum(count for *_, count in got) - streams) / (last - first)


async def compare(pools, streams, rounds, tokens):
    results = {name: [] for name in pools}
    for index in range(rounds):
        for name in [*pools][::1 if index % 2 else -1]:
            results[name].append(await turn(pools[name], f"{streams} {index}", streams, tokens))     # the same questions to both
    (local, far), digits = ([[*zip(*results[name])] for name in pools]), 1
    for column, what in enumerate(("first token, ms", "tok/s")):
        values = [statistics.median(each[column]) for each in (local, far)]
        ratios = sorted(theirs / ours for ours, theirs in zip(local[column], far[column]))
        more = sorted(theirs - ours for ours, theirs in zip(local[column], far[column]))
        print(f"{streams} streams, {what}: local {values[0]:.{digits}f}, Ray {values[1]:.{digits}f}; difference of each round "
              f"{statistics.median(more):+.1f} ({more[0]:+.1f} to {more[-1]:+.1f}), ratio {statistics.median(ratios):.3f} "
              f"({ratios[0]:.3f} to {ratios[-1]:.3f})", flush=True)


async def main(arguments):
    from ray.cluster_utils import Cluster
    threads = threads_per_worker(1)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    cluster.add_node(num_cpus=threads)
    common = dict(device_type="cpu", kv_cache_memory=256 << 20, max_batch=16, command="chat", drafts="none")
    pools = {"local": make_pool(Settings(**common)), "Ray": make_pool(Settings(ray_address=cluster.address, num_workers=1, **common))}
    try:
        for pool in pools.values():
            await pool.start()
            await pool.wait_ready()
            print(pool.workers[0].place, flush=True)
            await turn(pool, "warm", 16, 8)
        for streams in arguments.streams:
            await compare(pools, streams, arguments.rounds, arguments.tokens)
    finally:
        for pool in pools.values():
            await pool.close()
        cluster.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--streams", type=lambda text: [int(each) for each in text.split(",")], default=(1, 16))
    asyncio.run(main(parser.parse_args()))
