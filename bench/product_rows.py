"""Is one build or ISA of decode_core's products slower than another at any number of rows? One thread, weights in the cache.

    python bench/product_rows.py avx512 amx                       # AMX against VNNI, on a machine that has both
    python bench/product_rows.py avx512@/before/lib avx512        # another build (`setup.py build --build-lib`) against this one
    python bench/product_rows.py avx512 amx-emulated              # anywhere; emulated tiles are slow

[--kinds q8_0,q4_0] [--columns 576,2048,8192] [--rows 1,2,4] [--turns 8] [--slower 1.05]

The two run in separate processes, taking turns; each figure is the least of many repeats, since other programs only add
time. There is a line for each type and number of columns: rows, microseconds of the first, time of the second relative
to it, and an asterisk if that is above --slower. The exit status is 1 if there is one. With amx, each line ends with
the number of rows from which tiles were chosen here.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

KINDS = "q8_0,q4_0,q4_1,q4_k,q5_k,mxfp4,u4_g32,u4_g128"
ROWS = "1,2,3,4,6,8,9,10,12,14,16,17,20,24,31,32,48,64,96,128,192,256"
WEIGHTS = 1 << 18       # of a matrix, which fits the L2 cache in every type


def answer(isa):
    """A contestant's process: a line of JSON in, microseconds out."""
    from chatlm.worker.kernels import compiled
    import numpy
    from chatlm.worker.kernels.random_blocks import random_blocks
    from chatlm.worker.kernels.tiles import FROM_FILES, KINDS as NUMBERS
    compiled.set_isa(isa)
    compiled.set_threads(1)
    dice, matrices = numpy.random.default_rng(0), {}

    def matrix_of(kind, columns):
        if (kind, columns) not in matrices:
            matrices.clear()
            rows = WEIGHTS // columns // 32 * 32
            matrices[kind, columns] = matrix = compiled.Matrix(compiled.Arena(1 << 20), kind, rows, columns)
            if kind in FROM_FILES:      # nothing here quantizes to it
                matrix.fill(random_blocks(kind, rows, columns), kind)
            else:
                matrix.fill(dice.standard_normal((rows, columns), numpy.float32), "f32")
        return matrices[kind, columns]

    for line in sys.stdin:
        kind, columns, rows, seconds = json.loads(line)
        matrix, x = matrix_of(kind, columns), dice.standard_normal((rows, columns), numpy.float32)
        x[:, 40::256] *= 20         # outlier channels, as models have them
        x[range(rows), [row * 577 % columns for row in range(rows)]] = 20
        out, best, end = numpy.empty((rows, matrix.rows), numpy.float32), float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            begin = time.perf_counter()
            compiled.multiply(x, matrix, out=out, _groups_at_once=max(rows, 2))
            best = min(best, time.perf_counter() - begin)
        chosen = getattr(compiled._core, "amx_rows", lambda kind, columns: 0)(NUMBERS[kind], columns)
        print(json.dumps([best * 1e6, chosen]), flush=True)


def contestant(name):
    isa, _, folder = name.partition("@")
    paths = [folder] if folder else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])}
    return subprocess.Popen([sys.executable, __file__, "--answer", isa], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def ask(process, *question):
    process.stdin.write(json.dumps(question) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline() or "null")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestants", nargs=2)
    parser.add_argument("--kinds", default=KINDS)
    parser.add_argument("--columns", default="576,2048,8192")
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--slower", type=float, default=1.05)
    options = parser.parse_args()
    processes, slower = [contestant(name) for name in options.contestants], 0
    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.machine())
    print(f"{cpu}; {' beside '.join(options.contestants)}; rows: us of the first, share of it that the second takes")
    for kind in options.kinds.split(","):
        for columns in map(int, options.columns.split(",")):
            if kind.endswith("_k"):
                columns = -(-columns // 256) * 256
            line, chosen = [], 0
            for rows in map(int, options.rows.split(",")):
                best = [float("inf")] * 2
                for turn in range(options.turns):
                    for i in (0, 1) if turn % 2 else (1, 0):
                        told = ask(processes[i], kind, columns, rows, 0.01)
                        if told is None:
                            raise SystemExit(f"{options.contestants[i]} ended: what it said is above")
                        best[i], chosen = min(best[i], told[0]), told[1] if i else chosen
                share = best[1] / best[0]
                slower += share > options.slower
                line.append(f"{rows}: {best[0]:.1f} {share:.2f}{'*' if share > options.slower else ''}")
            print(f"{kind} K={columns}  {'  '.join(line)}" + (f"  (tiles from {chosen} rows)" if chosen else ""), flush=True)
    for process in processes:
        process.stdin.close()
        process.wait()
    print(f"{slower} slower than {options.slower}" if slower else "nothing is slower")
    raise SystemExit(bool(slower))


if __name__ == "__main__":
    answer(sys.argv[2]) if sys.argv[1:2] == ["--answer"] else main()
