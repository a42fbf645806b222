"""How fast each op of a CPU is, for `check`: the fastest of a few runs, and how many bytes the op must move
in a run.

It needs only numpy, so an installation without torch measures too. cuda_timing.py does the same on a GPU.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from chatlm.common.config import PAGE_SIZE
from chatlm.common.messages.requests import SamplingParams
from chatlm.worker.arrays.kinds import as_kind
from chatlm.worker.kernels.library import _core
from chatlm.worker.kernels.plain_model import plain_model
from chatlm.worker.kernels.program import Program
from chatlm.worker.kernels.random_blocks import random_blocks
from chatlm.worker.kernels.sampling import SampleBatch
from chatlm.worker.kernels.tiles import COLUMNS, SOURCES, Arena, Matrix
from chatlm.worker.ops.rows import SampleRow

if TYPE_CHECKING:
    from chatlm.worker.model.blocks.model import Model

COLD = 96 << 20         # bytes of the copies that a measurement uses in turn, so that no cache holds them
RUNS = 5
CONTEXT = 1024          # keys of attention
ROWS = 64               # of the ops between products
SMALL: dict[str, Any] = dict(
    vocab_size=49152, layers=1, width=576, heads=9, kv_heads=3, head_size=64, ffn_size=1536,
    max_positions=CONTEXT)     # the default model
LARGE: dict[str, Any] = dict(
    vocab_size=128256, layers=1, width=4096, heads=32, kv_heads=8, head_size=128, ffn_size=14336,
    max_positions=CONTEXT)     # a model of 8 billion parameters


class Timed(NamedTuple):
    op: str
    what: str
    seconds: float
    bytes: int


def best(work: Callable[[], object], runs: int = RUNS) -> float:
    """Seconds of the fastest run. A first run is not counted."""
    times = []
    for _ in range(runs + 1):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def zeros(*shape: int) -> numpy.ndarray:
    return numpy.zeros(shape, numpy.float32)


def normal(seed: int, *shape: int) -> numpy.ndarray:
    """Random float32, normally distributed."""
    return numpy.random.default_rng(seed).standard_normal(shape, numpy.float32)


def read_bandwidth(size: int = 256 << 20) -> float:
    """Bytes per second that the threads of the Programs read from memory."""
    memory = numpy.ones(size, numpy.uint8)
    return size / best(lambda: _core.read_memory(memory.ctypes.data, size), 3 * RUNS)


def time_cpu() -> Iterator[Timed]:
    for sizes in (SMALL, LARGE):
        model = plain_model(**sizes)
        yield from time_row_ops(model)
        yield time_attention(model)
        yield time_attention(model, packed=True)
        yield time_sample(model)
        rows, columns = (2 * model.feed_width, model.width) if model.width < 1024 else (8192, model.width)
        for kind in COLUMNS:
            yield time_product(kind, rows, columns // COLUMNS[kind] * COLUMNS[kind])


def step_of(program: Program, tokens: int, length: int,
            sampling: SampleBatch | None = None) -> Callable[[], dict[str, float]]:
    """A function that runs a step of `tokens` tokens and returns {name of a phase: microseconds}."""
    pages = list(range(-(-length // PAGE_SIZE)))
    ids = list(range(tokens))

    def run() -> dict[str, float]:
        batch = ids, [0] * tokens, [0, tokens], [length], [pages], [tokens - 1]
        program.finish(program.start(*batch, sampling))
        return program.times()[-1]["kinds"]
    return run


def phases(run: Callable[[], dict], word: str = "") -> float:
    """Seconds of the phases whose name contains the word, in the fastest of some steps."""
    run()
    return min(sum(us for name, us in run().items() if word in name) for _ in range(RUNS)) / 1e6


def time_row_ops(model: Model, times: int = 16) -> Iterator[Timed]:
    """Time each op, many times over the same rows, which stay in a cache."""
    C = model.width
    rot = model.attention.head_size
    qkv_size = (model.attention.heads + 2 * model.attention.kv_heads) * rot
    kv_size = 2 * model.attention.kv_heads * rot
    shape = ROWS // PAGE_SIZE, model.attention.kv_heads, 2, PAGE_SIZE * rot
    cache = numpy.zeros(shape, numpy.float16)
    gate = normal(6, 1, 24)
    weight = normal(7, C)
    cos = normal(8, model.max_positions, rot // 2)
    sin = normal(9, model.max_positions, rot // 2)
    ops = {             # name -> (what records it, how many values the op moves for a row)
        "embed": (lambda p, x, out: p.embed(table, p.token_ids, out), 2 * C),
        "rms_norm": (lambda p, x, out: p.rms_norm(x, None, 1e-5, out), 2 * C),
        "layer_norm": (lambda p, x, out: p.layer_norm(x, weight, weight, 1e-5, out), 2 * C),
        "copy": (lambda p, x, out: p.copy(x, out), 2 * C),
        "mix": (lambda p, x, out: p.mix(x, x, 0.5, 0.5, out), 3 * C),
        "backout": (lambda p, x, out: p.backout(x, x, 0.5, out), 3 * C),
        "smear": (lambda p, x, out: p.smear(x, x, p.previous_token_ids, gate, 0.5, out), 3 * C),
        "softcap": (lambda p, x, out: p.softcap(x, 15.0, out), 2 * C),
        "rope_append": (lambda p, x, out: p.rope_append(x, cos, sin, p.positions, p.slots, cache, out),
                        qkv_size + qkv_size - kv_size + kv_size // 2)}
    for name, (record, moved) in ops.items():
        width = qkv_size if name == "rope_append" else C
        table = normal(10, ROWS, width)
        program = Program(ROWS, 1)
        x = zeros(ROWS, width)
        out = zeros(ROWS, width - kv_size if name == "rope_append" else width)
        program.embed(table, program.token_ids, x)
        for _ in range(times):
            record(program, x, out)
        seconds = phases(step_of(program, ROWS, ROWS)) / (times + (name == "embed"))
        yield Timed(name, f"{ROWS} rows of {width}", seconds, ROWS * moved * 4)


def time_attention(model: Model, packed: bool = False) -> Timed:
    """Time the attention of a decode row, over so many layers that no cache holds their keys."""
    size = model.attention.head_size
    block = PAGE_SIZE * model.attention.head_size
    if packed:
        block = block * 17 // 16            # bytes: 2 of scale for each 32 codes
    shape = CONTEXT // PAGE_SIZE, model.attention.kv_heads, 2, block
    kind = numpy.dtype(numpy.uint8 if packed else numpy.float16)
    layer = math.prod(shape) * kind.itemsize
    # scales of 0.01 too
    caches = numpy.full((max(1, COLD // layer), *shape), 33 if packed else 0.01, kind)
    q = zeros(1, model.attention.heads * size)
    out = zeros(1, model.attention.heads * size)
    program = Program(1, 1)
    program.embed(numpy.ones((1, model.attention.heads * size), numpy.float32), program.token_ids, q)
    for cache in caches:
        program.paged_attention(q, cache, program.attention, 0, out)
    seconds = phases(step_of(program, 1, CONTEXT), "attention") / len(caches)
    what = f"{CONTEXT} keys, {model.attention.heads}/{model.attention.kv_heads} heads of {size}"
    return Timed("paged_attention q8_0" if packed else "paged_attention", what, seconds, layer)


def time_sample(model: Model) -> Timed:
    V = model.vocab_size
    program = Program(1, 1)
    x = zeros(1, V)
    logits = zeros(1, V)
    program.embed(normal(7, 1, V) * 3, program.token_ids, x)
    program.gather_rows(x, program.logit_rows, logits)
    program.sample(logits)
    sampling = SampleBatch([SampleRow(SamplingParams(seed=1, top_k=50), 1)], V)
    seconds = phases(step_of(program, 1, 1, sampling), "sample")
    return Timed("sample", f"1 row of {V}, top-k 50", seconds, 4 * V)


def time_product(kind: str, rows: int, columns: int) -> Timed:
    """Time one row of x times weights that come from memory. The matrix repeats a few rows, which costs the
    same."""
    arena = Arena(1 << 20)
    few = 512
    first = Matrix(arena, kind, rows, columns)
    if kind in SOURCES:
        part = as_kind(normal(8, few, columns), SOURCES[kind][0])
    else:
        part = random_blocks(kind, few, columns)
    for tile in range(0, rows // 16, few // 16):
        first.fill(part, kind, first_tile=tile)
    matrices = [first, *(Matrix(arena, kind, rows, columns) for _ in range(COLD // first.nbytes))]
    for other in matrices[1:]:
        ctypes.memmove(other.tiles.address, first.tiles.address, first.nbytes)
    program = Program(1, 1)
    x = zeros(1, columns)
    out = zeros(1, rows)
    program.embed(normal(9, 1, columns), program.token_ids, x)
    for matrix in matrices:
        program.linear(x, matrix, out)
    seconds = phases(step_of(program, 1, 1), "linear") / len(matrices)
    return Timed(f"linear {kind}", f"1 row x {columns} -> {rows}", seconds, first.nbytes)
