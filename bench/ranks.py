"""How long an all_reduce takes between processes of one thread each, without checks of its arguments: medians over blocks of 200, measured by rank 0.
Its input is copied to the memory that the other ranks read, or written there directly, as a recorded product does; the two alternate.

    python bench/ranks.py [--ranks 2] [--bytes 4096,8192,65536,1048576] [--blocks 40] [--hog]
    python bench/ranks.py --model FILE [--layouts 1x1,2x1] [--streams 1,16] [--tokens 48] [--rounds 5]

--hog: one more process keeps a CPU busy.
--model: tokens per second of a whole replica in each layout (tp x pp) of the machine's threads, taking turns; medians over all rounds,
         and over those in which other programs and other guests of the host took less than --others of the CPUs' time.
"""

import argparse
import asyncio
import ctypes
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from chatlm.worker.kernels.ranks import RankMemory, Ranks

BLOCK = 200


def run_rank(path: str, rank: int, sizes: list[int], blocks: int) -> None:
    ranks = Ranks(path, rank)
    for size in sizes:
        count = size // 4
        x, out = np.full(count, 1.0, np.float32), np.empty(count, np.float32)
        shared = {}                                 # what the other ranks read: two buffers, alternating
        for _ in range(2):
            shared[ranks.handle.next] = np.ctypeslib.as_array((ctypes.c_float * count).from_address(ranks.handle.next))
            ranks.handle.exchange(True, 1, (x.ctypes.data, count), (out.ctypes.data, count), (0, 0))

        def exchange(at: int) -> None:              # as a recorded step does: nothing is checked again
            ranks.handle.exchange(True, 1, (at, count), (out.ctypes.data, count), (0, 0))

        def written_and_copied() -> None:
            x.fill(1.0)
            exchange(x.ctypes.data)

        def written_in_place() -> None:
            shared[at := ranks.handle.next].fill(1.0)
            exchange(at)

        ways = {"copied": lambda: exchange(x.ctypes.data), "written and copied": written_and_copied, "written in place": written_in_place,
                "written alone": lambda: x.fill(1.0)}
        times = {way: [] for way in ways}
        for _ in range(blocks + 1):
            for way, run in ways.items():
                begin = time.perf_counter()
                for _ in range(BLOCK):
                    run()
                times[way].append((time.perf_counter() - begin) / BLOCK * 1e6)
        assert (out == ranks.count).all()
        for way, each in times.items() if rank == 0 else ():
            each = sorted(each[1:])                 # the first warms up
            print(f"{size:>8} bytes, {ranks.count} ranks, {way:18}: median {statistics.median(each):6.1f} us, best {each[0]:6.1f}, "
                  f"worst block {each[-1]:6.1f}", flush=True)


async def streams_per_second(pool, count: int, tokens: int) -> float:
    """Tokens per second of `count` concurrent answers, from the moment when each has its first token."""
    from chatlm.common.messages.requests import AnswerParams, Piece, Request, SamplingParams
    firsts, ends = [], []

    async def one(index: int) -> None:
        ids, first = tuple((11 * index + 7 * i) % 1000 + 10 for i in range(16)), None
        params = AnswerParams(sampling=SamplingParams(seed=index), ignore_eos=True)
        request = Request(f"{time.monotonic()}-{index}", prompts=(ids,), max_tokens=tokens, params=params)
        async for event in pool.answer(request):
            if isinstance(event, Piece) and first is None:
                firsts.append(first := time.monotonic())
        ends.append(time.monotonic())

    await asyncio.gather(*(one(index) for index in range(count)))
    return count * (tokens - 1) / (max(ends) - statistics.fmean(firsts))


class Others:
    """The share of the CPUs' time that other programs or the host take."""

    def __init__(self):
        self.me = psutil.Process()
        self.before = self.now()

    def now(self) -> tuple[float, float]:
        all_, ours = psutil.cpu_times(), [process.cpu_times() for process in (self.me, *self.me.children(recursive=True))]
        busy = sum(all_) - all_.idle - all_.iowait - getattr(all_, "guest", 0) - getattr(all_, "guest_nice", 0)
        return busy - sum(each.user + each.system for each in ours), sum(all_) - getattr(all_, "guest", 0) - getattr(all_, "guest_nice", 0)

    def share(self) -> float:
        """Since the last call."""
        before, self.before = self.before, self.now()
        return (self.before[0] - before[0]) / (self.before[1] - before[1])


async def compare_layouts(args) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from chatlm.common.config import Settings
    from chatlm.front.pool.pool import make_pool
    pools = {}
    for layout in args.layouts.split(","):
        sizes = dict(zip(("tensor_parallel_size", "pipeline_parallel_size"), map(int, layout.split("x"))))
        known = {name: size for name, size in sizes.items() if size > 1}
        pools[layout] = pool = make_pool(Settings(model=args.model, kv_cache_memory=256 << 20, max_batch=16, drafts="none", **known))
        await pool.start()
        await pool.wait_ready()
    for count in map(int, args.streams.split(",")):
        rates, calm, others = {layout: [] for layout in pools}, [], Others()
        for turn in range(args.rounds + 1):
            found = {layout: await streams_per_second(pool, count, args.tokens) for layout, pool in pools.items()}
            share = others.share()
            print(f"{count:>3} streams, round {turn}: " + ", ".join(f"{layout} {rate:.2f}" for layout, rate in found.items())
                  + f" tok/s; others took {share:.1%}", flush=True)
            for layout, rate in found.items() if turn else ():          # the first warms up
                rates[layout].append(rate)
            if turn and share < args.others:
                calm.append(found)
        if calm:
            first, *_ = pools
            for layout in pools:
                ratios = [each[layout] / each[first] for each in calm]
                print(f"{count:>3} streams, {layout}, {len(calm)} rounds without others: median {statistics.median(each[layout] for each in calm):6.2f} "
                      f"tok/s, of the first in the same round {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)
        base = statistics.median(next(iter(rates.values())))
        for layout, each in rates.items():
            print(f"{count:>3} streams, {layout}: median {statistics.median(each):6.2f} tok/s ({min(each):.2f} to {max(each):.2f}), "
                  f"{statistics.median(each) / base:.2f} of the first", flush=True)
    for pool in pools.values():
        await pool.close()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--bytes", default="4096,8192,65536,1048576")
    options.add_argument("--blocks", type=int, default=40)
    options.add_argument("--hog", action="store_true")
    options.add_argument("--model")
    options.add_argument("--layouts", default="1x1,2x1")
    options.add_argument("--streams", default="1,16")
    options.add_argument("--tokens", type=int, default=48)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--others", type=float, default=0.03)
    options.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.model:
        return asyncio.run(compare_layouts(args))
    sizes = [int(size) for size in args.bytes.split(",")]
    if args.rank:
        return run_rank(args.rank[0], int(args.rank[1]), sizes, args.blocks)
    memory = RankMemory(args.ranks, max(sizes))
    hog = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if args.hog else None
    try:
        started = [subprocess.Popen([sys.executable, *sys.argv, "--rank", memory.path, str(rank)]) for rank in range(args.ranks)]
        for process in started:
            if process.wait():
                memory.poison()
                sys.exit("a rank failed")
    finally:
        if hog:
            hog.kill()


if __name__ == "__main__":
    main()
