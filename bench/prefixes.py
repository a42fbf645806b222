"""The first token of long prompts: computed, from the prefix cache, and from --prefix-store after a restart.

    python bench/prefixes.py MODEL --tokens 4000,16000 --rounds 3      MODEL must have such a context; one that is 1.1 B wide is meant

starts servers one after another. Each round has a prompt of random tokens: cold, when it is computed; warm, when sent again; restored,
when sent to a newly started server, with the store's files in the page cache. It prints the best of all rounds, then the bytes stored
per token, and the share of all processors' time, while the prompt is computed, that keeping takes: copies to memory in the worker, and
what the front uses until everything is stored.
"""

import argparse
import json
import random
import tempfile
import time

import psutil

from servers import our_server


def first_token_s(server, ids):
    """(seconds to an answer of one token, cached tokens of the prompt)."""
    began_s = time.monotonic()
    with server.open("/v1/completions", {"prompt": ids, "max_tokens": 1, "temperature": 0}, timeout_s=3600) as response:
        usage = json.load(response)["usage"]
    return time.monotonic() - began_s, usage["prompt_tokens_details"]["cached_tokens"]


def stats(server):
    body = server.get("/stats")
    return body["prefixes"], body["workers"][0]


def measure(flags, count, dice, folder):
    """Seconds cold, warm and restored, bytes stored per token, and the share of processor time that keeping took."""
    ids, store = [dice.randrange(100, 1000) for _ in range(count)], ("--prefix-store", folder, "--context-length", count + 64)
    with our_server(*flags, *store) as server:
        front = server.front
        first_token_s(server, ids[:64][::-1])     # one-time costs of the first answers
        cold_s, cached = first_token_s(server, ids)
        assert cached == 0
        busy_s = sum(front.cpu_times()[:2])
        while stats(server)[0]["stored_pages"] < count // 16:
            time.sleep(0.2)
        stored_s = sum(front.cpu_times()[:2]) - busy_s
        warm_s, cached = min(first_token_s(server, ids) for _ in range(3))
        assert cached > count - 32
        bytes_per_token = stats(server)[0]["stored_bytes"] / count
        share = (stats(server)[1]["keeping_s"] + stored_s) / (cold_s * psutil.cpu_count())
    with our_server(*flags, *store) as server:
        first_token_s(server, ids[:64][::-1])
        restored_s, cached = first_token_s(server, ids)
        assert cached > count - 32, f"only {cached} tokens were restored before it began to compute"
    return cold_s, warm_s, restored_s, bytes_per_token, share


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--tokens", default="4000,16000")
    parser.add_argument("--rounds", type=int, default=3)
    words = parser.parse_args()
    flags, dice = ([words.model] if words.model else []), random.Random(1)
    print(f"{'tokens':>7} {'cold s':>8} {'warm s':>8} {'restored s':>10} {'cold / restored':>15} {'restored / warm':>15} {'bytes a token':>13} {'keeping':>8}")
    for count in map(int, words.tokens.split(",")):
        rounds = []
        for _ in range(words.rounds):
            with tempfile.TemporaryDirectory() as folder:
                rounds.append(measure(flags, count, dice, folder))
        cold_s, warm_s, restored_s, size, share = map(min, zip(*rounds))
        print(f"{count:7,} {cold_s:8.2f} {warm_s:8.3f} {restored_s:10.3f} {cold_s / restored_s:15.1f} {restored_s / warm_s:15.2f} "
              f"{size:13,.0f} {share:8.2%}", flush=True)


if __name__ == "__main__":
    main()
