"""How much a server that watches a training run slows the training down.

    python bench/watch.py [--rounds 8] [--seconds 15] [--text FILE] [--asked] [--nice 19]

A training run with torch, on all cores, writes a checkpoint every --every seconds. The server runs next to it, alternately awake and
stopped (SIGSTOP), so that other load on the machine affects both states alike. Printed: the training's steps per second in each turn,
the medians, and by how much it is slower next to the server. --asked: one client asks `latest` all the time, one answer after another.
"""

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from servers import our_server

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
TRAINING = """
import sys, time
sys.path[:0] = [{support!r}]
import torch, tiny_training
from pathlib import Path
model = tiny_training.Model(dict(sequence_len=256, vocab_size=283, n_layer=4, n_head=4, n_kv_head=4, n_embd=128))
ids, step, written = torch.tensor(list((tiny_training.TEXT * 5).encode()))[:256], 0, time.monotonic()
while True:
    model.learn(ids)
    step += 1
    print(step, flush=True)
    if time.monotonic() - written > {every}:
        tiny_training.save(model, Path({base!r}) / "base_checkpoints" / "d4", step)
        written = time.monotonic()
"""


class Training:
    """The training process; counts its steps."""

    def __init__(self, base, every):
        code = TRAINING.format(support=str(ROOT / "tests" / "support"), base=str(base), every=every)
        self.process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True,
                                        env=os.environ | {"GOMP_SPINCOUNT": "1000"})    # otherwise other programs slow it down 20-fold
        self.steps = 0
        threading.Thread(target=self.count, daemon=True).start()

    def count(self):
        for line in self.process.stdout:
            self.steps = int(line)

    def speed(self, seconds):
        """Steps per second from now on."""
        before, began_s = self.steps, time.monotonic()
        time.sleep(seconds)
        return (self.steps - before) / (time.monotonic() - began_s)


def ask_forever(server, ended, counts):
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 64, "ignore_eos": True}
    while not ended.is_set():
        counts.append(server.post("/v1/chat/completions", body)["usage"]["completion_tokens"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 8), ("seconds", 15.0), ("every", 10.0), ("nice", 19)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--text")
    parser.add_argument("--asked", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "tests" / "fixtures" / "nanochat" / "gen1" / "tokenizer", Path(folder) / "tokenizer")
        training, ended, counts = Training(folder, options.every), threading.Event(), []
        try:
            more = ["--watch-text", options.text, "--results", f"{folder}/results"] if options.text else []
            with our_server("--watch", folder, "--nice", options.nice, *more) as server:     # ready once there is a checkpoint
                if options.asked:
                    threading.Thread(target=ask_forever, args=(server, ended, counts), daemon=True).start()
                training.speed(5)
                beside, alone, taken_s = [], [], 0.0
                for turn in range(options.rounds):
                    before_s = server.processor_s()
                    beside.append(training.speed(options.seconds))
                    taken_s += server.processor_s() - before_s
                    server.signal_all(signal.SIGSTOP)
                    alone.append(training.speed(options.seconds))
                    server.signal_all(signal.SIGCONT)
                    print(f"round {turn + 1}: {alone[-1]:.2f} steps/s alone, {beside[-1]:.2f} beside the server", flush=True)
                ended.set()
                models = server.get("/v1/models")["data"]
        finally:
            training.process.kill()
            training.process.wait()
    one, other = statistics.median(alone), statistics.median(beside)
    print(f"median of {options.rounds} turns of {options.seconds:g} s: {one:.2f} steps/s alone, {other:.2f} beside the server: "
          f"{1 - other / one:.1%} slower; {len(models)} checkpoints, {sum(counts)} tokens answered; the server took "
          f"{taken_s / options.rounds / options.seconds:.1%} of one core")


if __name__ == "__main__":
    main()
