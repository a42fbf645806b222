"""How long requests wait for models that have to take each other's place in memory.

    python bench/changing_models.py [--script /old/chat_server.py] [--turns 6]
    python bench/changing_models.py --seconds 60 [--clients 4] [--pauses 0 10]
    python bench/changing_models.py --models default qwen-0.5b --memory 900M --server-args "--kv-cache-memory 64M"
                                    --seconds 60

A server gets memory for one model at a time: nanochat fixtures, or those of bench/model_files.py, or files.
In the first form one client asks for the next model as soon as it has its answer, after a pause of ten
seconds; each figure is the whole answer, its model's load included.

With --seconds each model has --clients of its own, which ask it again and again, each after its model's
pause. Printed are how often the model changed, the share of the time in which an answer was computed, and
how long requests waited.
"""

import argparse
import itertools
import json
import os
import shlex
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from model_files import model_file
from servers import started

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests/fixtures/nanochat"


def path_of(name):
    return FIXTURES / name if (FIXTURES / name).exists() else model_file(name)


def wait_for_names(server, count, seconds=60):
    """The names of all models, once their headers are read."""
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        names = [model["id"] for model in server.get("/v1/models")["data"] if model.get("context_length")]
        if len(names) == count:
            return names
        time.sleep(0.1)
    raise TimeoutError(f"the server does not list {count} models after {seconds} s")


@dataclass(frozen=True)
class Answer:
    """Times are of the monotonic clock. From `begin_s` on it was computed; before, it waited."""

    name: str
    asked_s: float
    begin_s: float
    end_s: float

    @property
    def wait_s(self):
        return self.begin_s - self.asked_s


def answer(server, name, tokens):
    asked_s = time.monotonic()
    body = {"model": name, "messages": [{"role": "user", "content": "hello"}], "max_tokens": tokens}
    with server.open("/chat/completions", body) as response:
        last = json.loads(response.read().rpartition(b"data: ")[2])
    return Answer(name, asked_s, asked_s + last["timings"]["queue_ms"] / 1e3, time.monotonic())


def in_turns(server, names, turns, tokens):
    first = answer(server, names[0], tokens)
    print(f"first: {first.end_s - first.asked_s:.2f} s")
    time.sleep(10)
    answers = [answer(server, names[turn % len(names)], tokens) for turn in range(1, turns + 1)]
    took_s = [each.end_s - each.asked_s for each in answers]
    each_s = " ".join(f"{seconds:.2f}" for seconds in took_s)
    print(f"changes: {each_s} s, median {statistics.median(took_s):.2f} s")


def at_once(server, names, arguments):
    answers, end_s = [], time.monotonic() + arguments.seconds

    def ask_again_and_again(name, pause_s):
        while time.monotonic() < end_s:
            answers.append(answer(server, name, arguments.tokens))
            time.sleep(pause_s)

    pauses = itertools.chain(arguments.pauses, itertools.repeat(arguments.pauses[-1]))
    threads = [threading.Thread(target=ask_again_and_again, args=(name, pause_s))
               for name, pause_s in zip(names, pauses) for _ in range(arguments.clients)]
    begin_s = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report(names, answers, begin_s)


def report(names, answers, begin_s):
    answers.sort(key=lambda each: each.begin_s)
    took_s = max(each.end_s for each in answers) - begin_s
    changes = sum(before.name != after.name for before, after in itertools.pairwise(answers))
    share = computed_s(answers) / took_s
    print(f"{changes} changes in {took_s:.0f} s, answers computed in {share:.0%} of it")
    for name in names:
        waits_s = [each.wait_s for each in answers if each.name == name]
        middle_s = statistics.median(waits_s)
        print(f"{name}: {len(waits_s)} answers, waits p50 {middle_s:.2f} s, longest {max(waits_s):.2f} s")


def computed_s(answers):
    """The seconds in which at least one answer was computed. answers: by their begin."""
    total_s, until_s = 0.0, 0.0
    for each in answers:
        total_s += max(each.end_s - max(each.begin_s, until_s), 0.0)
        until_s = max(until_s, each.end_s)
    return total_s


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--script", default=str(ROOT / "chat_server.py"))
    parser.add_argument("--models", nargs="+", default=["gen1", "gen5"])
    parser.add_argument("--memory", default="230M",
                        help="--models-memory: enough for each model, and not for two, one of them without its KV pages")
    parser.add_argument("--server-args", type=shlex.split, default=[], help="more flags for the server, in one string")
    parser.add_argument("--tokens", type=int, default=8, help="of an answer, at most")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--seconds", type=float, help="for so long all models are asked at once")
    parser.add_argument("--clients", type=int, default=1, help="of each model")
    parser.add_argument("--pauses", type=float, nargs="+", default=[0.0],
                        help="before a client asks again, by model; the last is for the rest too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(arguments.models):    # served in this order
            path = path_of(name)
            (Path(folder) / f"{number}-{path.name}").symlink_to(path)
        command = [arguments.python, arguments.script, "--models", folder,
                   "--models-memory", arguments.memory, "--prefix-memory", "0", *arguments.server_args]
        environment = os.environ | {"PYTHONPATH": str(Path(arguments.script).parent)}
        with started(command, "chat_server", env=environment) as server:
            names = wait_for_names(server, len(arguments.models))
            if arguments.seconds:
                at_once(server, names, arguments)
            else:
                in_turns(server, names, arguments.turns, arguments.tokens)


if __name__ == "__main__":
    main()
