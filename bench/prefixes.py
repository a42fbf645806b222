"""The first token of long prompts: computed, from the prefix cache, and from --prefix-store after a restart.

    python bench/prefixes.py MODEL --tokens 4000,16000 --rounds 3      MODEL must have such a context; one that is 1.1 B wide is meant

starts servers one after another. Each round has a prompt of random tokens: cold, when it is computed; warm, when sent again; restored,
when sent to a newly started server at once, with the store's files in the page cache; ahead, when sent to one that nobody has asked anything
for --idle seconds, so that it has restored the prompt. It prints the medians of all rounds, wall time and the processors' time of all the server's
processes, with the ratios to warm; then the bytes stored per token, and the share of all processors' time, while the prompt is computed, that
keeping takes: copies to memory in the worker, and what the front uses until everything is stored.

    python bench/prefixes.py MODEL --tokens 8000 --starts 4 --folder FOLDER --other PATH/chat_server.py

keeps the store in FOLDER, which may exist, and only starts servers: this checkout's and --other's in turns.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

from servers import ROOT, our_server, started


def first_token_s(server, ids):
    """(seconds to an answer of one token, of processors meanwhile, cached tokens of the prompt)."""
    busy_s, began_s = processors_s(server), time.monotonic()
    with server.open("/v1/completions", {"prompt": ids, "max_tokens": 1, "temperature": 0}, timeout_s=3600) as response:
        usage = json.load(response)["usage"]
    return time.monotonic() - began_s, processors_s(server) - busy_s, usage["prompt_tokens_details"]["cached_tokens"]


def processors_s(server):
    return sum(sum(process.cpu_times()[:2]) for process in server.processes())


def stats(server):
    body = server.get("/stats")
    return body["prefixes"], body["workers"][0]


def compute(flags, ids):
    """Seconds cold, bytes stored per token, and the share of processor time that keeping took."""
    with our_server(*flags) as server:
        front = server.front
        first_token_s(server, ids[:64][::-1])     # one-time costs of the first answers
        cold_s, _, cached = first_token_s(server, ids)
        assert cached == 0
        busy_s = sum(front.cpu_times()[:2])
        while stats(server)[0]["stored_pages"] < len(ids) // 16:
            time.sleep(0.2)
        stored_s = sum(front.cpu_times()[:2]) - busy_s
        keeping = (stats(server)[1]["keeping_s"] + stored_s) / (cold_s * psutil.cpu_count())
        return cold_s, stats(server)[0]["stored_bytes"] / len(ids), keeping


def start(script, flags, ids, idle_s):
    """A new server: (wall, processors') seconds of a restored first token, and of the median of five warm ones."""
    with started([sys.executable, script, *flags], "chat_server") as server:
        first_token_s(server, ids[:64][::-1])
        time.sleep(idle_s)
        *restored, cached = first_token_s(server, ids)
        assert cached > len(ids) - 32, f"only {cached} tokens were restored before it began to compute"
        warm = [first_token_s(server, ids)[:2] for _ in range(5)]
    return (*restored, *map(statistics.median, zip(*warm)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--tokens", default="4000,16000")
    parser.add_argument("--starts", type=int, default=3, help="of each kind")
    parser.add_argument("--idle", type=float, default=2.0, help="seconds")
    parser.add_argument("--folder", type=Path, help="of stores, one for each number of tokens")
    parser.add_argument("--other", help="chat_server.py of another version, which is only started")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for count in map(int, words.tokens.split(",")):
            measure(words, count, (words.folder or Path(folder)) / str(count))


def measure(words, count, store):
    dice = random.Random(count)
    ids = [dice.randrange(100, 1000) for _ in range(count)]
    flags = [*([words.model] if words.model else []), "--prefix-store", store, "--context-length", count + 64]
    if not store.exists():
        cold_s, bytes_per_token, share = compute(flags, ids)
        print(f"{count:,} tokens: cold {cold_s:.2f} s, {bytes_per_token:,.0f} bytes a token, keeping {share:.2%} of the processors", flush=True)
    kinds = {"restored": (ROOT / "chat_server.py", 0.0), "ahead": (ROOT / "chat_server.py", words.idle)}
    if words.other:
        kinds["other's restored"] = words.other, 0.0
    found = {name: [] for name in kinds}
    for _ in range(words.starts):
        for name, (script, idle_s) in kinds.items():
            found[name].append(start(script, flags, ids, idle_s))
    for name, runs in found.items():
        wall_s, busy_s, warm_s, warm_busy_s = map(statistics.median, zip(*runs))
        ratio, busy_ratio = (statistics.median(run[i] / run[i + 2] for run in runs) for i in (0, 1))
        print(f"{count:,} tokens, {name:17} {wall_s:.3f} s, processors {busy_s:.3f} s; warm {warm_s:.3f}, {warm_busy_s:.3f}; "
              f"to warm {ratio:.2f}, {busy_ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
