"""Time of sampling one row, of two builds of decode_core in turns: `python bench/sample_turns.py build-before/lib build-after/lib`.

Each build is a folder for PYTHONPATH, made by `python setup.py build --build-base build-x --build-lib build-x/lib`. Both run in a
process of their own on one thread, a round of one after a round of the other, so that another load on the machine meets both alike.
Of each case the fastest call counts. `--isas avx2,avx512` and `--settings top_k,unfiltered` choose what is measured.
"""

import argparse
import json
import os
import subprocess
import sys
import time

SIZES = (32768, 49152, 151936)
SETTINGS = {"greedy": dict(temperature=0.0), "top_k": dict(top_k=50), "top_k_top_p": dict(top_k=40, top_p=0.95),
            "top_p": dict(top_k=0, top_p=0.95), "unfiltered": dict(top_k=0)}
ROWS = 8


def measure(isas: list[str], settings: list[str]) -> dict[str, float]:
    """Microseconds a row: the fastest of many calls with ROWS rows each."""
    import numpy as np

    import decode_core
    from chatlm.common.messages.requests import SamplingParams
    from chatlm.worker.ops.rows import SampleRow

    decode_core.set_threads(1)
    times = {}
    for V in SIZES:
        logits = (np.random.default_rng(V).standard_normal((ROWS, V)) * 3).astype(np.float32)
        for setting in settings:
            rows = [SampleRow(SamplingParams(seed=i, **SETTINGS[setting]), 1000 + i, [], 0) for i in range(ROWS)]
            batch = decode_core.SampleBatch(rows, V)
            for isa in isas:
                decode_core.set_isa(isa)
                fastest, end = float("inf"), time.perf_counter() + 0.05
                while time.perf_counter() < end:
                    begin = time.perf_counter()
                    decode_core.sample(logits, batch)
                    fastest = min(fastest, time.perf_counter() - begin)
                times[f"{isa} {setting} {V}"] = fastest / ROWS * 1e6
    return times


def run(build: str, arguments: argparse.Namespace) -> dict[str, float]:
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = [sys.executable, __file__, "--measure", "--isas", arguments.isas, "--settings", arguments.settings]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((os.path.abspath(build), here))}
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("builds", nargs="*", help="two folders with decode_core")
    parser.add_argument("--isas", default="avx2,avx512")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.isas.split(","), arguments.settings.split(","))))
        return
    best: list[dict[str, float]] = [{} for _ in arguments.builds]
    for _ in range(arguments.rounds):
        for times, build in zip(best, arguments.builds, strict=True):
            for case, us in run(build, arguments).items():
                times[case] = min(us, times.get(case, us))
    for case in best[0]:
        before, after = (times[case] for times in best)
        print(f"{case:32} {before:8.2f} {after:8.2f} us a row  {(after / before - 1) * 100:+6.1f} %")


if __name__ == "__main__":
    main()
