"""Decode steps on one GPU against the bytes they must read: random bfloat16 models in the shapes of nanochat d32 and Llama 8B.

    python bench/cuda_decode.py [--shapes d32 llama-8b] [--batches 1 8] [--context 1024] [--steps 200]

For each shape and batch it prints five things. `step`: the median over blocks of 20 steps, each started
before the previous one is finished, as the engine does. `graph`: the same graphs replayed without Python in
between. The floor: (weights + KV bytes) / copy bandwidth of the same device, measured first (bytes read and
written by copying 1 GiB). The ratios of the first two to the floor. And what the second graph of a step, which
draws, adds: the time of both graphs minus that of the first alone.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, os.environ.get("CHAT_SERVER_DIR") or str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from chatlm.common.config import PAGE_SIZE    # noqa: E402
from chatlm.common.messages.requests import SamplingParams    # noqa: E402
from chatlm.worker.model.batch import Batch    # noqa: E402
from chatlm.worker.kernels.choosing import load_kernels    # noqa: E402
from chatlm.worker.arrays.rotary import Rope    # noqa: E402
from chatlm.worker.model.blocks.attention import Attention, HeadNorms    # noqa: E402
from chatlm.worker.model.blocks.feed_forward import FeedForward    # noqa: E402
from chatlm.worker.model.blocks.input import Input    # noqa: E402
from chatlm.worker.model.blocks.layer import Layer    # noqa: E402
from chatlm.worker.model.blocks.lm_head import LmHead    # noqa: E402
from chatlm.worker.model.blocks.model import Model    # noqa: E402
from chatlm.worker.model.blocks.norms import RmsNorm    # noqa: E402
from chatlm.worker.model.transformer import Transformer    # noqa: E402
from chatlm.worker.ops.rows import SampleRow    # noqa: E402
from chatlm.worker.kernels.cuda_runner import GraphRunner  # noqa: E402

PLAIN, NORM = RmsNorm(1e-5, weights=False), RmsNorm(1e-5)
D32 = Layer(Attention(16, 16, 128, 128, Rope(128, direction=-1), norms=HeadNorms("after_rope", 1e-5, weights=False)),
            FeedForward(8192, "relu2"), PLAIN, PLAIN)
LLAMA_8B = Layer(Attention(32, 8, 128, 128, Rope(128, 500000.0)), FeedForward(14336), NORM, NORM)
SHAPES = {
    "d32": Model(65536, 2048, 4096, Input(norm=PLAIN), (D32,) * 32, PLAIN, LmHead(softcap=15.0)),
    "llama-8b": Model(128256, 4096, 8192, Input(), (LLAMA_8B,) * 32, NORM, LmHead())}


def random_model(model, kernels, device, dtype, **sizes):
    """A Transformer with small random weights, made on the device; dtype: "bfloat16" or "float32"."""
    random = torch.Generator(device).manual_seed(1)
    tensors = {}
    for name, shape in model.shapes().items():
        matrix = len(shape) > 1
        tensors[name] = torch.randn(shape, device=device, generator=random,
                                    dtype=getattr(torch, dtype) if matrix else torch.float32)
        tensors[name].mul_(0.02 if matrix else 1.0)
    return Transformer(model, tensors, kernels, device=device, dtype=dtype, **sizes)


def bytes_of_a_step(transformer, batch, context):
    """What a decode step must read: all weights except the unused rows of the embedding, and the keys and
    values."""
    weights = sum(tensor.nbytes for name, tensor in transformer.weights.items()
                  if name != "embed" and not name.endswith("value_embed"))
    page = transformer.layout.page_bytes
    return weights + batch * context * page // PAGE_SIZE


class Decoding:
    """`batch` sequences that grow by a token in every step; in the first step each has `context` keys."""

    def __init__(self, steps, batch, context, length):
        self.steps, self.batch, self.keys = steps, batch, context
        pages = -(-(context + length) // PAGE_SIZE)
        self.tables = [list(range(row * pages, (row + 1) * pages)) for row in range(batch)]
        self.params = [SamplingParams(seed=row) for row in range(batch)]
        self.ids, self.previous, self.ticket = [1] * batch, [1] * batch, None

    def step(self):
        """Start a step and finish the previous one."""
        rows = list(range(self.batch))
        batch = Batch(self.ids, self.previous, [*rows, self.batch], [self.keys] * self.batch, self.tables, rows)
        ticket = self.steps.start(batch, [SampleRow(params, self.keys) for params in self.params])
        if self.ticket:
            self.previous = self.steps.finish(self.ticket)
        self.ticket, self.ids, self.keys = ticket, [~row for row in rows], self.keys + 1

    def finish(self):
        return self.steps.finish(self.ticket)


def seconds_per_step(decoding, steps, block=20):
    """The median over blocks of steps, without the first block."""
    times = []
    for _ in range(max(2, steps // block)):
        begin = time.perf_counter()
        for _ in range(block):
            decoding.step()
        times.append((time.perf_counter() - begin) / block)
    decoding.finish()
    return statistics.median(times[1:])


def seconds_per_replay(steps, batch, replays=50, draws=True):
    """The graphs of the last steps, or the first alone, without Python in between."""
    graph = steps.graphs[next((rows, pages) for rows, pages in sorted(steps.graphs) if rows >= batch)]
    begin = time.perf_counter()

    def replay():
        for _ in range(replays):
            graph.compute()
            if draws:
                graph.draw()

    steps.queue.wait(steps.queue.submit(replay))
    return (time.perf_counter() - begin) / replays


def make_steps(model, kernels, device, dtype, batch, length, queue=None):
    pages = -(-length // PAGE_SIZE)
    transformer = random_model(model, kernels, device, dtype, num_pages=batch * pages, max_tokens=max(batch, 8))
    steps = GraphRunner(transformer, kernels.backend, max_batch=batch, context_length=length, queue=queue)
    steps.prepare(lambda fraction: None)
    return steps


def copy_bandwidth(device, size=1 << 30):
    """Bytes per second, read and written; the best of 10."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(10):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 2 * size / min(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    device = torch.device("cuda", 0)
    bandwidth = copy_bandwidth(device)
    print(f"{torch.cuda.get_device_name(device)}: copies {bandwidth / 1e12:.2f} TB/s")
    for shape in arguments.shapes:
        model = SHAPES[shape]
        kernels = load_kernels(device, model)
        assert kernels.backend.name == "decode_core/cuda", f"decode_core does not run here on CUDA: {kernels.names}"
        for batch in arguments.batches:
            length = arguments.context + arguments.steps + 20
            steps = make_steps(model, kernels, device, "bfloat16", batch, length)
            step = seconds_per_step(Decoding(steps, batch, arguments.context, arguments.steps + 20), arguments.steps)
            graph, without_draw = seconds_per_replay(steps, batch), seconds_per_replay(steps, batch, draws=False)
            floor = bytes_of_a_step(steps.transformer, batch, arguments.context + arguments.steps // 2) / bandwidth
            print(f"{shape} batch {batch} context {arguments.context}: step {step * 1e3:.3f} ms, graph {graph * 1e3:.3f} ms, "
                  f"floor {floor * 1e3:.3f} ms: {step / floor:.2f} and {graph / floor:.2f} times the floor; "
                  f"the draw's graph {(graph - without_draw) * 1e6:.1f} us")
            del steps
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
