"""Where a worker's decoding steps spend their time: its Python, its compiled phases, its threads. Without front and HTTP.

    python bench/worker_steps.py [MODEL] [--streams 16] [--tokens 128] [--rounds 5] [--width 2] [--threads 2] [--prompt 0]

The engine of a model (without MODEL: the default one) as a worker runs it, greedy, without drafts, writing its messages to a pipe that
is being read. A phase counts twice: with its least time over many steps, which says most on a machine where other programs run,
and with its median. The two differ where the weights are little more than the third cache: what of them is still there changes
from step to step. Python counts with the CPU time of its thread in the best of the rounds in which no phases are read.
--width forces the number of threads that compute a step (0: the policy decides); with more than one, the excess of the phases'
sum over its share of one thread's sum is the time that threads wait for each other and fetch from each other's caches.
--prompt measures the first token of so many random tokens instead, and each of its steps.
"""

import argparse
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch    # noqa: E402

from chatlm.worker.kernels import compiled    # noqa: E402
from chatlm.common.config import Settings    # noqa: E402
from chatlm.common.hub.find import resolve_model    # noqa: E402
from chatlm.common.hub.local import no_progress    # noqa: E402
from chatlm.common.messages.protocol import WORKER_PIPE    # noqa: E402
from chatlm.common.messages.requests import AnswerParams, SamplingParams    # noqa: E402
from chatlm.common.messages.wire import Channel    # noqa: E402
from chatlm.worker.build import build_engine    # noqa: E402
from chatlm.worker.engine import engine as engine_module    # noqa: E402
from chatlm.worker.engine.sequence import Assignment    # noqa: E402
from chatlm.worker.engine.warm_up import WarmUp    # noqa: E402
from chatlm.worker.gauges import Gauges    # noqa: E402
from chatlm.worker.engine.reports import Reports    # noqa: E402


class PythonParts:
    """CPU time of the main thread in some functions."""

    def __init__(self):
        self.spent_s = defaultdict(float)

    def timed(self, name, function):
        def run(*arguments):
            begun_s = time.thread_time()
            try:
                return function(*arguments)
            finally:
                self.spent_s[name] += time.thread_time() - begun_s
        return run

    def watch(self, engine, channel):
        for owner, names in ((engine.scheduler, ("schedule",)), (engine_module, ("make_batch", "sample_rows")), (engine.runner, ("start", "finish")),
                             (engine, ("_advance",)), (engine.drawn, ("_accept",)), (channel, ("send",))):
            for name in names:
                setattr(owner, name, self.timed(name, getattr(owner, name)))


class Phases:
    """The times of each phase, in us, over all steps with this many rows."""

    def __init__(self, rows):
        self.rows, self.names, self.times, self.whole, self.gaps = rows, (), [], [], []

    def note(self, steps):
        for step in steps:
            if step["tokens"] != self.rows or step["logit_rows"] != self.rows:
                continue
            names, times = zip(*step["phases"])
            if names != self.names:
                self.names, self.times = names, []
            self.times.append(times)
            self.whole.append(step["us"])
            self.gaps.append(step["gap_us"])

    def table(self):
        kinds = defaultdict(list)
        for name, times in zip(self.names, zip(*self.times)):
            kinds[name].append((min(times), statistics.median(times)))
        sums = {name: (len(both), *map(sum, zip(*both))) for name, both in kinds.items()}
        count, least, median = map(sum, zip(*sums.values()))
        lines = ["| phases | how many | least, us | median, us | share |", "|---|---|---|---|---|"]
        for name, (many, quick, usual) in sorted(sums.items(), key=lambda item: -item[1][2]):
            lines.append(f"| {name} | {many} | {quick:,.0f} | {usual:,.0f} | {usual / median:.1%} |")
        whole = statistics.median(self.whole)
        return "\n".join([*lines, f"| all | {count} | {least:,.0f} | {median:,.0f} | |", "",
                          f"{len(self.whole)} steps: least {min(self.whole):,.0f} us, median {whole:,.0f}, which is {whole / median:.2f} of the sum of "
                          f"its phases' medians and {whole / least:.2f} of that of their least; then {statistics.median(self.gaps):.1f} us to the next"])


def ask(engine, prompt, tokens, dice):
    """Queue an answer of so many tokens to a prompt of so many random ones."""
    ids = tuple(dice.randrange(1000, engine.tokenizer.vocab_size - 1000) for _ in range(prompt))
    engine.add(Assignment(f"answer {dice.random()}", ids, AnswerParams(sampling=SamplingParams(temperature=0.0), ignore_eos=True), tokens))


def stepper(engine, channel, interval_s=0.008):
    """A function that does a step as a worker does."""
    reports = Reports(channel, engine, Gauges(engine).read, interval_s)
    return lambda: reports.add(engine.step(reports.send))


def run_round(engine, channel, streams, tokens, dice, phases):
    """The decoding steps of several concurrent answers -> their number and the main thread's CPU time in s."""
    for _ in range(streams):
        ask(engine, 40, tokens, dice)
    step = stepper(engine, channel)
    while engine.queue.waiting or any(sequence.prefilling for sequence in engine.queue.running):
        step()
    steps, begun_s = 0, time.thread_time()
    while len(engine.queue.running) == streams:
        step()
        steps += 1
        if phases and steps % 16 == 0:  # a program remembers 16
            phases.note(engine.runner.program.times()[1:])
    spent_s = time.thread_time() - begun_s
    while engine.busy:
        step()
    return steps, spent_s


def run_prompt(engine, channel, tokens, dice):
    """A prompt of random tokens, alone -> the ms of each step up to its first token's."""
    ask(engine, tokens, 1, dice)
    step, times = stepper(engine, channel), []
    while engine.busy:
        begun_s = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - begun_s))
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="MODEL")
    for name, default in (("streams", 16), ("tokens", 128), ("rounds", 5), ("width", 2), ("threads", 2), ("prompt", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings, best = Settings(model=arguments.model, drafts="none"), None
    with torch.inference_mode():
        engine = build_engine(resolve_model(settings, no_progress), settings, torch.device("cpu"))[1]
        WarmUp(engine).complete(lambda fraction: None)
        compiled._core.force_schedule(arguments.width, False)
        ours, theirs = socket.socketpair()
        reader = subprocess.Popen(["cat"], stdin=theirs, stdout=subprocess.DEVNULL)
        theirs.close()
        channel, parts, phases, dice = Channel(ours, WORKER_PIPE), PythonParts(), Phases(arguments.streams), random.Random(1)
        parts.watch(engine, channel)
        for _ in range(arguments.rounds if arguments.prompt else 0):
            times = run_prompt(engine, channel, arguments.prompt, dice)
            print(f"first token of {arguments.prompt}: {sum(times):,.0f} ms, its steps {', '.join(f'{ms:,.0f}' for ms in times)}")
        for _ in range(0 if arguments.prompt else arguments.rounds):
            run_round(engine, channel, arguments.streams, arguments.tokens, dice, phases)
            parts.spent_s.clear()
            steps, spent_s = run_round(engine, channel, arguments.streams, arguments.tokens, dice, None)
            if best is None or spent_s / steps < best[0]:
                best = spent_s / steps, {name: spent / steps for name, spent in parts.spent_s.items()}
        ours.close()
        reader.wait()
    if arguments.prompt:
        return
    print(f"{compiled.info()['isa']}, {arguments.streams} rows, width {arguments.width}\n\n{phases.table()}\n")
    print("| Python, us of CPU a step | |\n|---|---|")
    for name, spent_s in sorted({**best[1], "all of the thread": best[0]}.items(), key=lambda item: -item[1]):
        print(f"| {name} | {1e6 * spent_s:.0f} |")


if __name__ == "__main__":
    main()
