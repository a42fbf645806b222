"""How long an all_reduce takes between processes of one thread each, without checks of its arguments: medians over blocks of 200, as rank 0 sees them.

    python bench/ranks.py [--ranks 2] [--bytes 4096,8192,65536,1048576] [--blocks 40] [--hog]

--hog: one more process takes a CPU all the time.
"""

import argparse
import statistics
import subprocess
import sys
import time

import numpy as np

from decode_core.ranks import RankMemory, Ranks

BLOCK = 200


def run_rank(path: str, rank: int, sizes: list[int], blocks: int) -> None:
    ranks = Ranks(path, rank)
    for size in sizes:
        x, out = np.full((1, size // 4), 1.0, np.float32), np.empty((1, size // 4), np.float32)
        at = [(array.ctypes.data, size // 4) for array in (x, out)]
        each = []
        for _ in range(blocks + 1):
            begin = time.perf_counter()
            for _ in range(BLOCK):
                ranks.handle.exchange(True, 1, *at, (0, 0))         # as a recorded step does: nothing is checked again
            each.append((time.perf_counter() - begin) / BLOCK * 1e6)
        each = sorted(each[1:])                     # the first warms up
        assert (out == ranks.count).all()
        if rank == 0:
            print(f"{size:>8} bytes, {ranks.count} ranks: median {statistics.median(each):6.1f} us, best {each[0]:6.1f}, "
                  f"worst block {each[-1]:6.1f}", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--bytes", default="4096,8192,65536,1048576")
    options.add_argument("--blocks", type=int, default=40)
    options.add_argument("--hog", action="store_true")
    options.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    args = options.parse_args()
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
