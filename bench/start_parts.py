"""What a server's startup and memory consist of: a worker's startup part by part, and each process's memory by kind of mapping.

    python bench/start_parts.py [--rounds 3] [--server-args="--no-drafts"]

A worker's startup is repeated `rounds` times in a fresh process, one part after another: the least wall-clock and CPU time of each
part, and by how much the process grows in it (RSS). Then a server is started as a user would start it; once it has answered, the
memory of its processes is shown by kind of mapping: PSS (shared memory is divided among all processes that share it, including
others with the same libraries) and RSS. MB are 10**6 bytes. The default model, from the page cache.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from servers import our_server

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)     # with it each process that starts compiles our modules anew
ROOT = Path(__file__).resolve().parent.parent
SORTS = (                   # of mappings, by path; the first match counts
    ("torch's libraries", r"/torch/|libgomp"), ("decode_core", r"/decode_core/"), ("numpy's libraries", r"/numpy"),
    ("the model's file", r"\.gguf$"), ("tokenizers and other extensions", r"\.so(\.|$)"), ("Python", r"/python"),
    ("stacks and heap", r"^\[(heap|stack)"), ("shared without a file", r"^/dev/zero"), ("anonymous: weights, KV, objects", r"^$"))


def memory_by_sort(pid, field="Pss"):
    """A process's memory by kind of mapping, in MB."""
    sums, sort = Counter(), ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if match := re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+\s*(.*)", line):
            sort = next((name for name, pattern in SORTS if re.search(pattern, match[1])), "other files")
        elif line.startswith(f"{field}:"):
            sums[sort] += int(line.split()[1]) * 1024 / 1e6
    return sums


# 1. a worker's start, in a process of its own ---------------------------------------------------------------------


class Parts:
    """Measures the time since the last call, and by how much the process has grown."""

    def __init__(self):
        self.rows = []
        self.note("the interpreter", first=True)

    def note(self, name, first=False):
        cpu_s, held = time.process_time(), sum(memory_by_sort("self", "Rss").values())
        wall_s = cpu_s if first else time.perf_counter() - self.at
        before_s, before = (0.0, 0.0) if first else (self.cpu_s, self.held)
        self.rows.append((name, wall_s, cpu_s - before_s, held - before))
        self.held, self.cpu_s, self.at = held, time.process_time(), time.perf_counter()


def start_by_parts():
    """The parts of a worker's startup, in order; prints their rows as JSON."""
    parts = Parts()
    sys.path.insert(0, str(ROOT))
    from chatlm.common.config import Settings
    from chatlm.common.hub.find import resolve_model
    from chatlm.common.hub.local import no_progress
    from chatlm.worker import entry         # noqa: F401  what a worker imports first
    parts.note("import: our modules without torch")
    import numpy                            # noqa: F401
    parts.note("import numpy")
    from chatlm.worker import build, memory_plan, process        # noqa: F401
    from chatlm.worker.arrays.kinds import Device
    parts.note("import: our other modules")
    from chatlm.common.core import decode_core
    core = decode_core()
    parts.note(f"import decode_core{'' if core else ' (not there)'}")
    os.environ["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
    settings, device = Settings(), Device("cpu")
    source = resolve_model(settings, no_progress)
    parts.note("find the model")
    model = build.open_model(source, settings, device)
    parts.note("open its file")
    tokenizer = build.open_for_answers(model.text, model.vocabulary)
    parts.note("tokenizer")
    model, transformer, pages, context, _ = build.build_transformer(model, source, settings, device, no_progress, None)
    parts.note("weights into tiles, KV pages, buffers")
    engine = build.Engine(transformer, tokenizer, transformer.kernels, num_pages=pages, max_batch=settings.max_batch,
                          context_length=context, prefill_chunk=memory_plan.prefill_chunk(settings, device), drafts=settings.drafts)
    parts.note("engine")
    from chatlm.worker.engine.warm_up import WarmUp
    WarmUp(engine).begin()
    parts.note("warm-up: a token")
    del model
    process.give_memory_back()
    parts.note("memory given back")
    print(json.dumps(parts.rows))


def worker_table(rounds):
    sys.path.insert(0, str(ROOT))
    from chatlm.common.processes.start import own_threads, process_environment
    runs = [json.loads(subprocess.run([sys.executable, __file__, "--part"], check=True, capture_output=True, text=True,
                                      env=process_environment(own_threads())).stdout.splitlines()[-1]) for _ in range(rounds)]
    rows = [(same[0][0], *(min(row[column] for row in same) for column in (1, 2, 3))) for same in zip(*runs)]
    rows.append(("together", *(sum(row[column] for row in rows) for column in (1, 2, 3))))
    lines = ["| part of a worker's start | s | CPU s | MB more |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {name} | {wall:.2f} | {cpu:.2f} | {held:.0f} |" for name, wall, cpu, held in rows])


# 2. a server as it runs -------------------------------------------------------------------------------------------


def memories(pid):
    return memory_by_sort(pid), memory_by_sort(pid, "Rss")


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def server_table(more):
    with our_server(*more) as server:
        server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64})
        columns = {"front": memories(server.process.pid)}
        for number, child in enumerate(children(server.process.pid), 1):
            command = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            role = next((name for name in ("worker", "sandbox") if name.encode() in command), "other")
            columns[role if role not in columns else f"{role} {number}"] = memories(child)
    sums = {sort: [(pss[sort], rss[sort]) for pss, rss in columns.values()] for _, rss in columns.values() for sort in rss}
    rows = sorted(sums.items(), key=lambda item: -sum(pss for pss, _ in item[1]))
    rows.append(("together", [tuple(sum(memory.values()) for memory in pair) for pair in columns.values()]))
    lines = [f"ready after {server.ready_s:.2f} s", "", f"| mapping, MB: PSS, RSS | {' | '.join(columns)} | all: PSS |", "|---" * (len(columns) + 2) + "|"]
    for sort, pairs in rows:
        cells = [f"{pss:.0f}, {rss:.0f}" for pss, rss in pairs]
        lines.append(f"| {sort} | {' | '.join(cells)} | {sum(pss for pss, _ in pairs):.0f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--server-args", type=shlex.split, default=[])
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        return start_by_parts()
    print(worker_table(arguments.rounds), "", server_table(arguments.server_args), sep="\n")


if __name__ == "__main__":
    main()
