"""What a streamed token costs the front and the worker: processor seconds of each process for 1,000 tokens.

    python bench/stream_cost.py [--clients 1,16] [--rounds 5] [--tokens 256] [--path /v1/chat/completions]
    python bench/stream_cost.py --before "/old/.venv/bin/python /old/chat_server.py"      # two versions, in turns

The default model as a user starts it, drafts off, so that each step gives each client one token. The clients are sockets of this
process, which reads what arrives and parses it later. Processor time is the system's own clock of a process, in nanoseconds; with that of
threads that have ended. Prompts have 40 tokens and count with the worker. Rounds alternate between the servers. Medians, and the least.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import shlex
import statistics
import sys
import time
from collections import defaultdict
from urllib.parse import urlsplit

from servers import ROOT, started

WORDS = "the river carried small boats past gardens and markets where people talked about weather bread and music".split()
ROLES = "worker", "sandbox"


def processor_s(pid):
    """Processor seconds of a process and its threads so far: the clock of clock_getcpuclockid(3)."""
    return time.clock_gettime((~pid << 3) | 2)


def processes(server):
    """The server's processes by their role."""
    found = {"front": server.process.pid}
    for process in server.processes()[1:]:
        role = next((word for word in process.cmdline() if word in ROLES), "other")
        found[role] = process.pid
    return found


class Client(asyncio.Protocol):
    """One streamed answer; `done` is set when the connection ends."""

    def __init__(self, host, path, body):
        self.request = (f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
                        f"Content-Length: {len(body)}\r\n\r\n").encode() + body
        self.parts = []
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport):
        transport.write(self.request)

    def data_received(self, data):
        self.parts.append(data)

    def connection_lost(self, error):
        if not self.done.done():
            self.done.set_result(b"".join(self.parts))


def body_of(seed, path, tokens):
    text = f"{seed} " + " ".join(random.Random(seed).choices(WORDS, k=25))
    body = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    asked = {"prompt": text} if path == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}
    return json.dumps(body | asked).encode()


async def answers(url, path, clients, tokens, seed):
    """Ask for this many answers at once; returns the seconds until all have ended, and what each client got."""
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    begun_s = time.perf_counter()
    made = await asyncio.gather(*(loop.create_connection(
        lambda number=number: Client(parts.netloc, path, body_of(seed + number, path, tokens)), parts.hostname, parts.port)
        for number in range(clients)))
    got = await asyncio.gather(*(client.done for _, client in made))
    return time.perf_counter() - begun_s, got


def measure(server, path, clients, tokens, seed):
    """One round: the processor milliseconds of each role for 1,000 tokens, tokens per second, and events per token."""
    pids = processes(server)
    before = {role: processor_s(pid) for role, pid in pids.items()}
    seconds, got = asyncio.run(answers(server.url, path, clients, tokens, seed))
    spent = {role: processor_s(pid) - before[role] for role, pid in pids.items()}
    for answer in got:
        if not answer.startswith(b"HTTP/1.1 200") or b"length" not in answer[-2000:]:
            raise RuntimeError(f"not an answer of {tokens} tokens: {answer[:300]!r} ... {answer[-500:]!r}")
    total = clients * tokens
    events = sum(len(re.findall(rb"\bdata: ", answer)) for answer in got)
    return {**{f"{role}, CPU ms for 1,000 tokens": 1e6 * spent_s / total for role, spent_s in spent.items()},
            "tok/s": total / seconds, "events for a token": events / total}


def shown(values):
    return f"{statistics.median(values):,.2f} ({min(values):,.2f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="1,16", help="a round of each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256, help="of each answer")
    parser.add_argument("--path", default="/v1/chat/completions", choices=("/v1/chat/completions", "/v1/completions", "/chat/completions"))
    parser.add_argument("--server-args", type=shlex.split, default=["--no-drafts"])
    parser.add_argument("--before", type=shlex.split, help="another version's command, measured in turns with this one")
    arguments = parser.parse_args()
    commands = {"now": [sys.executable, ROOT / "chat_server.py"]} | ({"before": arguments.before} if arguments.before else {})
    figures = defaultdict(list)     # (clients, figure, version): a value a round
    with contextlib.ExitStack() as running:
        servers = {name: running.enter_context(started([*command, *arguments.server_args], name)) for name, command in commands.items()}
        for turn in range(-1, arguments.rounds):        # the first warms up
            for clients in map(int, arguments.clients.split(",")):
                for name in list(servers)[::1 if turn % 2 else -1]:
                    seed = 1_000_000 + 10_000 * turn + 100 * clients
                    found = measure(servers[name], arguments.path, clients, arguments.tokens, seed)
                    for figure, value in found.items() if turn >= 0 else ():
                        figures[clients, figure, name].append(value)
    print(f"| clients | figure: median (least) | {' | '.join(commands)} |", "|---" * (2 + len(commands)) + "|", sep="\n")
    for clients, figure in dict.fromkeys((clients, figure) for clients, figure, _ in figures):
        cells = [shown(values) if (values := figures.get((clients, figure, name))) else "" for name in commands]
        print(f"| {clients} | {figure} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
