"""How long a request waits for a model that has to take another one's place in memory.

    python bench/changing_models.py [--script /old/chat_server.py] [--models gen1 gen5] [--turns 6]

A server gets memory for one of two nanochat fixtures. After a pause, one request at a time asks for the other
model. Each figure is the whole answer of 8 tokens, its model's load included.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from servers import started

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests/fixtures/nanochat"


def wait_for_names(server, seconds=60):
    """The names of both models, once their headers are read."""
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        names = [model["id"] for model in server.get("/v1/models")["data"] if model.get("context_length")]
        if len(names) == 2:
            return names
        time.sleep(0.1)
    raise TimeoutError(f"the server does not list two models after {seconds} s")


def answer_s(server, name):
    begin_s = time.perf_counter()
    server.post("/v1/chat/completions", {"model": name, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8})
    return time.perf_counter() - begin_s


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--script", default=str(ROOT / "chat_server.py"))
    parser.add_argument("--models", nargs=2, default=["gen1", "gen5"])
    parser.add_argument("--turns", type=int, default=6)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            (Path(folder) / name).symlink_to(FIXTURES / name)
        command = [args.python, args.script, "--models", folder, "--models-memory", "230M", "--prefix-memory", "0"]
        environment = os.environ | {"PYTHONPATH": str(Path(args.script).parent)}
        with started(command, "chat_server", env=environment) as server:
            names = wait_for_names(server)
            print(f"first: {answer_s(server, names[0]):.2f} s")
            time.sleep(10)
            waits = [answer_s(server, names[turn % 2]) for turn in range(1, args.turns + 1)]
    print("changes:", " ".join(f"{seconds:.2f}" for seconds in waits), "s, median", f"{statistics.median(waits):.2f} s")


if __name__ == "__main__":
    main()
