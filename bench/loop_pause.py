"""How long one body blocks the front's event loop: the largest allowed bodies of every kind, for every route.

    python bench/loop_pause.py [--only WORD]

A server with the default model reads each body three times. For each callback of its event loop the processor
time of the thread is measured, so that other processes do not matter. The longest is shown with its name. The
goal is 50 ms. Bodies just below LIMITS.inline_bytes are read in the loop itself, larger ones in another
process.
"""

import argparse
import asyncio
import http.client
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, os.environ.get("CHAT_SERVER_DIR") or str(ROOT))
import chat_server      # noqa: E402
from chatlm.common.memory import tune_gc    # noqa: E402
from chatlm.common.config import LIMITS, Settings    # noqa: E402
from servers import free_port, started    # noqa: E402

NATIVE, CHAT, COMPLETIONS, TOKENIZE = "/chat/completions", "/v1/chat/completions", "/v1/completions", "/tokenize"
COMPARE = "/v1/compare"
HI = '"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2'


def filled(begin, item, end, size, separator=","):
    """A body of at most `size` bytes: as many items as fit."""
    count = (size - len(begin.encode()) - len(end.encode())) // len((item + separator).encode())
    return (begin + separator.join([item] * count) + end).encode()


def bodies(size):
    """(route, name, body) of about `size` bytes, of every kind that takes long to read."""
    user = '{"role": "user", "content": "'
    for route in (NATIVE, CHAT):
        yield route, "one text", filled('{"max_tokens": 2, "messages": [' + user, "word and, more ", '"}]}', size, "")
        yield route, "escapes", filled('{"max_tokens": 2, "messages": [' + user, "\\u00e9\\n", '"}]}', size, "")
        yield route, "emoji", filled('{"max_tokens": 2, "messages": [' + user, "\U0001f600", '"}]}', size, "")
        yield route, "messages", filled('{"max_tokens": 2, "truncate": "oldest", "messages": [', user + 'a"}', "]}", size)
        yield route, "empty messages", filled('{"messages": [', "{}", "]}", size)
        yield route, "unknown field of numbers", filled("{" + HI + ', "x": [', "1", "]}", size)
        yield route, "unknown field of lists", filled("{" + HI + ', "x": [', "[]", "]}", size)
        yield route, "stop strings", filled("{" + HI + ', "stop": [', '"a"', "]}", size)
    yield CHAT, "parts", filled('{"max_tokens": 2, "messages": [{"role": "user", "content": [', '{"type": "text", "text": "a"}', "]}]}", size)
    yield CHAT, "tools", filled("{" + HI + ', "tools": [', '{"type": "function", "function": {"name": "f"}}', "]}", size)
    yield CHAT, "required tools", filled("{" + HI + ', "tool_choice": "required", "tools": [',
                                         '{"type": "function", "function": {"name": "f"}}', "]}", size)
    yield CHAT, "a schema", filled("{" + HI + ', "response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [',
                                   '"ab"', "]}}}}", size)
    bias = ",".join(f'"{token}": 1' for token in range(size // 14))
    yield CHAT, "logit_bias", ("{" + HI + ', "n": 128, "logit_bias": {' + bias + "}}").encode()
    yield CHAT, "stop_token_ids", filled("{" + HI + ', "stop_token_ids": [', "1", "]}", size)
    yield COMPLETIONS, "a prompt of ids", filled('{"max_tokens": 1, "prompt": [', "1", "]}", size)
    yield COMPLETIONS, "prompts of ids", filled('{"max_tokens": 1, "prompt": [', "[" + ",".join(["1"] * (size // 280)) + "]", "]}", size)
    yield COMPLETIONS, "many prompts", filled('{"max_tokens": 1, "prompt": [', '"a"', "]}", size)
    yield COMPLETIONS, "empty prompts", filled('{"max_tokens": 1, "prompt": [', "[]", "]}", size)
    yield TOKENIZE, "one text", filled('{"with_pieces": true, "content": "', "a b! ", '"}', min(size, LIMITS.tokenized_characters), "")
    yield TOKENIZE, "ids", filled('{"with_pieces": true, "content": [', "1", "]}", min(size, 2 * LIMITS.tokenized_characters))
    yield TOKENIZE, "too many ids", filled('{"content": [', "1", "]}", size)
    yield TOKENIZE, "texts", filled('{"content": [', '"a"', "]}", min(size, 4 * LIMITS.tokenized_characters))
    yield "/detokenize", "ids", filled('{"tokens": [', "9", "]}", min(size, 2 * LIMITS.tokenized_characters))
    yield "/detokenize", "too many ids", filled('{"tokens": [', "9", "]}", size)
    yield "/apply-template", "messages", filled('{"messages": [', user + 'a"}', "]}", size)
    variants = '{"max_tokens": 2, "variants": [{}, {}, {}, {}, {}, {}, {}, {}], "messages": ['
    yield COMPARE, "messages", filled(variants, user + 'a"}', "]}", size)
    yield COMPARE, "messages of an eighth", filled(variants, user + 'a"}', "]}", size // 8)
    yield COMPARE, "one text", filled(variants + user, "word and, more ", '"}]}', size, "")
    for route in (NATIVE, COMPLETIONS, TOKENIZE):
        yield route, "nested lists", b'{"messages": ' + b"[" * (size // 2) + b"]" * (size // 2 - 20) + b"}"
        yield route, "no JSON", b"\xff" * size


def answers():
    """Small bodies with large answers: (route, name, body)."""
    long = '"ignore_eos": true, "max_tokens": 60, "n": 64'
    yield CHAT, "whole, logprobs", ('{"messages": [{"role": "user", "content": "Hi"}], "logprobs": true, "top_logprobs": 20, ' + long + "}").encode()
    yield COMPLETIONS, "whole, logprobs", ('{"prompt": "Hi", "logprobs": 20, ' + long + "}").encode()
    yield CHAT, "streamed", ('{"messages": [{"role": "user", "content": "Hi"}], "stream": true, ' + long + "}").encode()
    yield COMPLETIONS, "echo of a long prompt", ('{"prompt": "' + "word " * 4000 + '", "echo": true, "logprobs": 20, "max_tokens": 1}').encode()


def watched_server(port):
    """The server with every callback of its loop timed; each line on stdin asks for the longest since the
    previous line."""
    longest = [0.0, ""]
    original = asyncio.events.Handle._run

    def timed(handle):
        began_s = time.thread_time()
        original(handle)
        took_s = time.thread_time() - began_s
        if took_s > longest[0]:
            longest[:] = took_s, repr(handle)[:300]

    def answer():
        sys.stdin.readline()
        print(json.dumps(longest), flush=True)
        longest[:] = 0.0, ""

    async def serve(settings):
        asyncio.get_running_loop().add_reader(sys.stdin, answer)
        return await chat_server.serve_forever(settings)

    asyncio.events.Handle._run = timed
    tune_gc()
    asyncio.run(serve(Settings(host="127.0.0.1", port=port)))


def post(port, route, body):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", route, body)
        response = connection.getresponse()
        response.read()
        return response.status
    finally:
        connection.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="bodies whose route or kind contains this")
    args = parser.parse_args()
    port = free_port()
    with started([sys.executable, __file__, "server", port], port=port, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        def longest():
            print(file=server.process.stdin, flush=True)
            return next(json.loads(line) for line in server.process.stdout if line.startswith("["))     # after what a start writes

        sizes = {"inline": LIMITS.inline_bytes, "1 MiB": 1 << 20, "largest": LIMITS.body_bytes - 1}
        cases = [(name, *each) for name, size in sizes.items() for each in bodies(size)] + [("answer", *each) for each in answers()]
        worst = 0.0
        for size, route, what, body in cases:
            if args.only not in f"{size} {route} {what}":
                continue
            longest()
            statuses = {post(port, route, body) for _ in range(3)}
            took_s, where = longest()
            worst = max(worst, took_s)
            shown = f"   {where}" if took_s > 0.02 else ""
            print(f"{1e3 * took_s:7.1f} ms  {size:8} {route:22} {what:26} {len(body):>10,} bytes -> {sorted(statuses)}{shown}", flush=True)
        print(f"longest: {1e3 * worst:.1f} ms")


if __name__ == "__main__":
    watched_server(int(sys.argv[2])) if sys.argv[1:2] == ["server"] else main()
