"""How long a start takes and what memory it ends with: two versions in turns, in units of what `import aiohttp` takes at that moment.

    python bench/start_turns.py [--rounds 7] [--before "/old/.venv/bin/python /old/chat_server.py"] [--server-args="--no-drafts"]

In each turn a server of the default model is started as a user starts it. The first byte is that of the page, ready is a 200 of /health, both
since the command and polled every 10 ms: at 2 ms the front took 0.16 s of processor time more, for its answers. Then it answers a prompt of 3,800
tokens and a short one, and the proportional set sizes of its processes are read. The unit is the wall-clock time of `python -c "import aiohttp"`
minus that of `python -c pass`, measured before each start, so that figures of a slow hour or machine can be compared. Medians, and the least.
Everything is in the page cache after the first turn, which does not count.
"""

import argparse
import contextlib
import http.client
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from urllib.parse import urlsplit

from servers import ROOT, Server
from stream_cost import processes, processor_s

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)     # with it each process that starts compiles our modules anew
WAIT_LIMIT_S = 120


def seconds_of(code):
    begun_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - begun_s


def unit_s():
    """What `import aiohttp` takes now: the least of three."""
    return min(seconds_of("import aiohttp") - seconds_of("pass") for _ in range(3))


def until_answered(server, path):
    """Seconds from the server's start until a GET gets a 200."""
    address = urlsplit(server.url)
    while time.perf_counter() - server.began_s < WAIT_LIMIT_S:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection(address.hostname, address.port, timeout=30)
            with contextlib.closing(connection):
                connection.request("GET", path)
                if connection.getresponse().status == 200:
                    return time.perf_counter() - server.began_s
        time.sleep(0.01)
    raise TimeoutError(server.last_words())


def proportional_set_size(pid):
    """In MB of 10**6 bytes."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)[1]) * 1024 / 1e6


def turn(name, command):
    """One start -> figure: value."""
    unit = unit_s()
    server = Server(command, name)
    try:
        first_s, ready_s = until_answered(server, "/"), until_answered(server, "/health")
        pids = processes(server)
        spent = {f"CPU s until ready, {role}": processor_s(pid) for role, pid in pids.items()}
        for text in ("river boats " * 1890, "Hello"):
            server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], "max_tokens": 32})
        sizes = {f"PSS, {role}, MB": proportional_set_size(pid) for role, pid in pids.items()}
    finally:
        server.stop()
    return {"import aiohttp, s": unit, "first byte, s": first_s, "ready, s": ready_s, "first byte, units": first_s / unit, "ready, units": ready_s / unit,
            **spent, "CPU s until ready": sum(spent.values()), **sizes, "PSS, MB": sum(sizes.values())}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--server-args", type=shlex.split, default=["--no-drafts", "--context-length", "4096"])
    parser.add_argument("--before", type=shlex.split, help="another version's command, started in turns with this one")
    arguments = parser.parse_args()
    commands = {"now": [sys.executable, str(ROOT / "chat_server.py")]} | ({"before": arguments.before} if arguments.before else {})
    figures = defaultdict(list)
    for number in range(-1, arguments.rounds):
        for name in list(commands)[::1 if number % 2 else -1]:
            measured = turn(name, commands[name] + arguments.server_args)
            for figure, value in measured.items() if number >= 0 else ():
                figures[figure, name].append(value)
    print(f"| figure: median (least) | {' | '.join(commands)} |", "|---" * (1 + len(commands)) + "|", sep="\n")
    for figure in dict.fromkeys(figure for figure, _ in figures):
        cells = [f"{statistics.median(figures[figure, name]):.3g} ({min(figures[figure, name]):.3g})" for name in commands]
        print(f"| {figure} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
