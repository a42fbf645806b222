"""How much the evaluations of a watched run slow a chat: p50 and p99 of the time between tokens, and the time to the first.

    python bench/beside_evaluations.py [--rounds 6] [--seconds 20] [--pause 1] [--items 400]

Two servers of the same run, one with --watch-suite and one without, are awake in turns; the other one is stopped (SIGSTOP), so that other
load on the machine affects both states alike. In each turn one client chats with a step, 100 tokens at a time, and pauses between answers, in
which evaluations begin again. The goal: p99 within 10 %.
"""

import argparse
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from servers import our_server

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]


STEP, STEP_LIMIT_S = "d12-base@3", 60.0     # the last of the run


def wait_for_model(server, name):
    deadline_s = time.monotonic() + STEP_LIMIT_S
    while name not in (found := [model["id"] for model in server.get("/v1/models")["data"]]):
        if time.monotonic() > deadline_s:
            sys.exit(f"{name} is not served, but {', '.join(found)}")
        time.sleep(0.2)


def chat(server, model, gaps, firsts):
    body = {"model": model, "prompt": "the cat", "stream": True, "max_tokens": 100, "ignore_eos": True, "temperature": 0, "return_token_ids": True}
    last = began = time.monotonic()
    with server.open("/v1/completions", body) as response:
        for line in response:
            if b"token_ids" in line:
                now = time.monotonic()
                (firsts if last == began else gaps).append(1e3 * (now - last))
                last = now


def turn(server, model, options):
    gaps, firsts = [], []
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        chat(server, model, gaps, firsts)
        time.sleep(options.pause)
    return gaps, firsts


def show(name, gaps, firsts):
    at = lambda share: sorted(gaps)[int(share * len(gaps))]        # noqa: E731
    print(f"{name}: {len(firsts)} answers, between tokens p50 {at(0.5):.2f} ms, p99 {at(0.99):.2f} ms, first token median {statistics.median(firsts):.1f} ms",
          flush=True)
    return at(0.99)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 6), ("seconds", 20.0), ("pause", 1.0), ("items", 400)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = parser.parse_args()
    import bundles
    import tiny_training
    with tempfile.TemporaryDirectory() as folder:
        base, results = Path(folder) / "run", Path(folder) / "results"
        shutil.copytree(ROOT / "tests" / "fixtures" / "nanochat" / "gen1" / "tokenizer", base / "tokenizer")
        # a d12 but for its vocabulary, which need not have learnt anything
        model = tiny_training.Model({"sequence_len": 1024, "vocab_size": 283, "n_layer": 12, "n_head": 6, "n_kv_head": 6, "n_embd": 768})
        for step in range(1, 4):
            tiny_training.save(model, base / "base_checkpoints" / "d12", step)
        rows = [{"query": bundles.words(i, 12), "choices": [bundles.words(i + place, 3) for place in range(4)], "gold": i % 4} for i in range(options.items)]
        suite = bundles.write_bundle(Path(folder) / "bundle", [("choose", "multiple_choice", 5, {}, 25.0)], lambda label, kind: rows)
        common = ("--watch", base, "--nice", "0", "--no-drafts")
        with our_server(*common) as alone, our_server(*common, "--watch-suite", suite, "--results", results) as beside:
            for server in (alone, beside):
                wait_for_model(server, STEP)
                chat(server, STEP, [], [])
            beside.signal_all(signal.SIGSTOP)
            found = {"alone": ([], []), "beside": ([], [])}
            for _ in range(options.rounds):
                for name, awake, asleep in (("alone", alone, beside), ("beside", beside, alone)):
                    asleep.signal_all(signal.SIGSTOP)
                    awake.signal_all(signal.SIGCONT)
                    for kept, new in zip(found[name], turn(awake, STEP, options)):
                        kept += new
        judged = sum(len(path.read_bytes().split(b"\n")) - 1 for path in results.glob("*.jsonl"))
    one, other = (show(name, *found[name]) for name in ("alone", "beside"))
    print(f"p99 beside evaluations is {other / one:.3f} of that alone; {judged} items were judged meanwhile, each once")


if __name__ == "__main__":
    main()
