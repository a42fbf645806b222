"""How fast each op is, for `check`: the best of a few runs, and the bytes that the op must move in one."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from . import _core
from . import cuda
from .cpu_proof import FLOATS
from .cuda_prompts import Prompt
from .cuda_weights import PackedMatrix
from .proof import Dice, random_blocks
from .program import Program
from .sampling import SampleBatch
from .tiles import COLUMNS, Arena, Matrix

COLD = 96 << 20         # bytes of copies that are used in turn, so that no cache holds them
RUNS = 5
CONTEXT, ROWS = 1024, 64        # keys of attention; rows of the ops between products
SMALL = dict(vocab_size=49152, layers=1, width=576, heads=9, kv_heads=3, head_size=64, ffn_size=1536,
             max_positions=CONTEXT)     # the default model
LARGE = dict(vocab_size=128256, layers=1, width=4096, heads=32, kv_heads=8, head_size=128, ffn_size=14336,
             max_positions=CONTEXT)     # a model of 8 billion parameters
MIXTURE = dict(experts=32, experts_per_token=4, sinks=True)     # as gpt-oss-20b has


class Timed(NamedTuple):
    op: str
    what: str
    seconds: float
    bytes: int


def best(work: Callable[[], object], runs: int = RUNS) -> float:
    """Seconds of the fastest run; a first one is not counted."""
    times = []
    for _ in range(runs + 1):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


# ---- on a CPU


def read_bandwidth(size: int = 256 << 20) -> float:
    """Bytes per second that the threads of the Programs read from memory."""
    memory = torch.ones(size, dtype=torch.uint8)
    return size / best(lambda: _core.read_memory(memory.data_ptr(), size), 3 * RUNS)


def time_cpu(script: SimpleNamespace) -> Iterator[Timed]:
    for sizes in (SMALL, LARGE):
        spec = script.ModelSpec(**sizes)
        yield from time_row_ops(spec, script)
        yield time_attention(spec, script)
        yield time_attention(spec, script, packed=True)
        yield time_sample(spec, script)
        rows, columns = (2 * spec.ffn_size, spec.width) if spec.width < 1024 else (8192, spec.width)
        for kind in COLUMNS:
            yield time_product(kind, rows, columns // COLUMNS[kind] * COLUMNS[kind])


def step_of(program: Program, tokens: int, length: int, script: SimpleNamespace,
            sampling: Any = None) -> Callable[[], dict[str, float]]:
    """What runs a step of the first rows of the tables; it returns the microseconds of the phases by name."""
    pages = list(range(-(-length // script.PAGE_SIZE)))
    ids = list(range(tokens))

    def run() -> dict[str, float]:
        batch = ids, [0] * tokens, [0, tokens], [length], [pages], [tokens - 1]
        program.finish(program.start(*batch, sampling))
        return program.times()[-1]["kinds"]
    return run


def phases(run: Callable[[], dict], word: str = "") -> float:
    """Seconds of the phases whose name has the word, in the fastest of some steps."""
    run()
    return min(sum(us for name, us in run().items() if word in name) for _ in range(RUNS)) / 1e6


def time_row_ops(spec: Any, script: SimpleNamespace, times: int = 16) -> Iterator[Timed]:
    """Each op many times over the same rows, which a cache holds."""
    dice, C, rot = Dice(torch.device("cpu"), 6), spec.width, spec.head_size
    qkv_size, kv_size = (spec.heads + 2 * spec.kv_heads) * rot, 2 * spec.kv_heads * rot
    shape = ROWS // script.PAGE_SIZE, spec.kv_heads, 2, script.PAGE_SIZE * rot
    cache = torch.zeros(shape, dtype=torch.float16)
    gate, weight = dice.normal(1, 24), dice.normal(C)
    cos, sin = script.rope_tables(spec, torch.device("cpu"))
    ops = {             # what it does with x and out; values that a row's op moves
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
        table, program = dice.normal(ROWS, width), Program(ROWS, 1)
        x = torch.zeros(ROWS, width)
        out = torch.zeros(ROWS, width - kv_size if name == "rope_append" else width)
        program.embed(table, program.token_ids, x)
        for _ in range(times):
            record(program, x, out)
        seconds = phases(step_of(program, ROWS, ROWS, script)) / (times + (name == "embed"))
        yield Timed(name, f"{ROWS} rows of {width}", seconds, ROWS * moved * 4)


def time_attention(spec: Any, script: SimpleNamespace, packed: bool = False) -> Timed:
    """A decode row over enough layers to be cold."""
    size, block = spec.head_size, script.PAGE_SIZE * spec.head_size
    block = block * 17 // 16 if packed else block           # bytes: with 2 of scale for each 32
    shape, dtype = (CONTEXT // script.PAGE_SIZE, spec.kv_heads, 2, block), torch.uint8 if packed else torch.float16
    layer = math.prod(shape) * dtype.itemsize
    caches = torch.full((max(1, COLD // layer), *shape), 33 if packed else 0.01, dtype=dtype)      # scales of 0.01 too
    q, out = torch.zeros(1, spec.heads * size), torch.zeros(1, spec.heads * size)
    program = Program(1, 1)
    program.embed(torch.ones(1, spec.heads * size), program.token_ids, q)
    for cache in caches:
        program.paged_attention(q, cache, program.attention, 0, out)
    seconds = phases(step_of(program, 1, CONTEXT, script), "attention") / len(caches)
    what = f"{CONTEXT} keys, {spec.heads}/{spec.kv_heads} heads of {size}"
    return Timed("paged_attention q8_0" if packed else "paged_attention", what, seconds, layer)


def time_sample(spec: Any, script: SimpleNamespace) -> Timed:
    V, program = spec.vocab_size, Program(1, 1)
    x, logits = torch.zeros(1, V), torch.zeros(1, V)
    program.embed(Dice(torch.device("cpu"), 7).normal(1, V) * 3, program.token_ids, x)
    program.gather_rows(x, program.logit_rows, logits)
    program.sample(logits)
    sampling = SampleBatch([script.SampleRow(script.SamplingParams(seed=1, top_k=50), 1)], V)
    seconds = phases(step_of(program, 1, 1, script, sampling), "sample")
    return Timed("sample", f"1 row of {V}, top-k 50", seconds, 4 * V)


def time_product(kind: str, rows: int, columns: int) -> Timed:
    """One row of x times weights that come from memory; the matrix repeats a few rows at the same cost."""
    arena, few, dice = Arena(1 << 20), 512, Dice(torch.device("cpu"), 8)
    first = Matrix(arena, kind, rows, columns)
    part = dice.normal(few, columns).to(FLOATS[kind]) if kind in FLOATS else random_blocks(kind, few, columns)
    for tile in range(0, rows // 16, few // 16):
        first.fill(part, kind, first_tile=tile)
    matrices = [first, *(Matrix(arena, kind, rows, columns) for _ in range(COLD // first.nbytes))]
    for other in matrices[1:]:
        ctypes.memmove(other.tiles.address, first.tiles.address, first.nbytes)
    program, x, out = Program(1, 1), torch.zeros(1, columns), torch.zeros(1, rows)
    program.embed(dice.normal(1, columns), program.token_ids, x)
    for matrix in matrices:
        program.linear(x, matrix, out)
    seconds = phases(step_of(program, 1, 1, SimpleNamespace(PAGE_SIZE=16)), "linear") / len(matrices)
    return Timed(f"linear {kind}", f"1 row x {columns} -> {rows}", seconds, first.nbytes)


# ---- on a GPU


def copy_bandwidth(queue: Any, size: int) -> float:
    """Bytes per second, read and written, of copying on the device."""
    source = torch.ones(size, dtype=torch.uint8, device=queue.device)
    target = torch.empty_like(source)
    return 2 * size / replayed(queue, lambda: target.copy_(source))


def replayed(queue: Any, work: Callable[[], Any]) -> float:
    """Seconds of `work` as a graph."""
    replay = queue.capture(work)
    return best(lambda: queue.wait(queue.submit(replay)))


def time_cuda(backend: Any, queue: Any, ops: Iterable[str], cold: int = 1 << 30, calls: int = 100,
              batches: tuple[int, ...] = (1, 32)) -> Iterator[Timed]:
    """Each kernel in a graph of many calls; pages come from memory, logits from the L2 cache."""
    for rows in batches[:1] + (cuda.MAX_PRODUCT_ROWS,) if "linear" in ops else ():
        for kind in ("bfloat16", *cuda.BLOCKS):
            work, what, calls_, moved = time_cuda_linear(backend, queue.device, rows, cold, calls, kind)
            yield Timed("linear", f"{kind}: {what}", replayed(queue, work) / calls_, moved)
    for rows in (*batches, 16 * batches[-1]) if "experts" in ops else ():
        work, what, calls_, moved = time_cuda_experts(backend, queue.device, rows, calls)
        yield Timed("experts", what, replayed(queue, work) / calls_, moved)
    timers = {"paged_attention": time_cuda_attention, "rope_append": time_cuda_rope,
              "sample": time_cuda_sample}
    if "prompt_attention" in ops:
        work, what, moved = time_cuda_prompt(backend, queue.device)
        yield Timed("prompt_attention", what, replayed(queue, work), moved)
    for rows in batches:
        for op in timers.keys() & {*ops}:
            work, what, calls_, moved = timers[op](backend, queue.device, rows, cold, calls)
            yield Timed(op, what, replayed(queue, work) / calls_, moved)


def cuda_layers(backend: Any, device: torch.device, rows: int, cold: int, calls: int) -> torch.Tensor:
    """Enough layers of pages to be cold, for this many rows of CONTEXT keys."""
    spec, size = backend.spec, backend.script.PAGE_SIZE
    shape = 2, rows * CONTEXT // size, spec.kv_heads, size, spec.head_size
    layers = min(calls, max(1, cold // (4 * rows * CONTEXT * spec.kv_heads * spec.head_size)))
    return torch.full((layers, *shape), 0.01, dtype=torch.bfloat16, device=device)


def time_cuda_attention(backend: Any, device: torch.device, rows: int, cold: int, calls: int) -> tuple:
    """(what a graph does, in words, in how many calls, bytes of each)"""
    spec, dice, cache = backend.spec, Dice(device, 9), cuda_layers(backend, device, rows, cold, calls)
    H, Hkv, D, width = spec.heads, spec.kv_heads, spec.head_size, CONTEXT // backend.script.PAGE_SIZE
    q, out = dice.normal(rows, H, D), torch.empty(rows, H * D, dtype=cache.dtype, device=device)
    table = dice.order(rows * width, torch.int32).view(rows, width)
    lengths = torch.full((rows,), CONTEXT, dtype=torch.int32, device=device)
    workspace = backend.workspace(rows, width, device)
    return (lambda: [backend.attend(q, layer, table, lengths, *workspace, out, 0) for layer in cache],
            f"{rows} x {CONTEXT} keys, {H}/{Hkv} heads of {D}", len(cache), 4 * rows * CONTEXT * Hkv * D)


def time_cuda_prompt(backend: Any, device: torch.device) -> tuple:
    """A prompt without a prefix. Long ones are bound by their arithmetic, not by the bytes that are counted."""
    spec, dice = backend.spec, Dice(device, 9)
    H, Hkv, D, half = spec.heads, spec.kv_heads, spec.head_size, torch.bfloat16
    q, kv = dice.normal(CONTEXT, H, D, dtype=half), dice.normal(2, Hkv, CONTEXT, D, dtype=half)
    prompt, out = Prompt(slice(0, CONTEXT), None, 0, 0, CONTEXT), torch.empty(CONTEXT, H * D, dtype=half, device=device)
    return (lambda: backend.prompts.attend(q, kv, prompt, out, 0), f"{CONTEXT} tokens, {H}/{Hkv} heads of {D}",
            2 * q.nbytes + kv.nbytes)


def time_cuda_linear(backend: Any, device: torch.device, rows: int, cold: int, calls: int,
                     kind: str) -> tuple:
    width = max(256, backend.spec.width // 256 * 256)
    outputs, few = min(8192, 2 * backend.spec.ffn_size), 128
    if kind in cuda.FLOATS:
        part = Dice(device, 9).normal(few, width, dtype=getattr(torch, kind))
    else:
        part = torch.from_numpy(random_blocks(kind, few, width)).to(device)
    blocks = part.repeat(-(-outputs // few), 1)[:outputs]
    count = min(calls, -(-cold // blocks.nbytes))
    copies = [blocks.clone() if kind in cuda.FLOATS else PackedMatrix([(kind, blocks.clone())], width) for _ in range(count)]
    x, out = Dice(device, 9).normal(rows, width), torch.empty(rows, outputs, device=device)
    return (lambda: [backend.products.linear(x, matrix, out) for matrix in copies],
            f"{rows} x {width} -> {outputs}", count, blocks.nbytes)


def time_cuda_experts(backend: Any, device: torch.device, rows: int, calls: int) -> tuple:
    """A layer whose experts take turns: together they are larger than a cache. One is a quarter as wide as the dense part."""
    spec, dice, few = backend.spec, Dice(device, 9), 32
    E, chosen, C, F = spec.experts, spec.experts_per_token, spec.width, spec.ffn_size // 4 // 32 * 32 or 32
    matrices = [PackedMatrix([("mxfp4", torch.from_numpy(random_blocks("mxfp4", few, columns)).to(device).repeat(outputs // few, 1))],
                             columns) for outputs, columns in ((2 * E * F, C), (E * C, F))]
    x, out, norm = dice.normal(rows, C), torch.empty(rows, C, device=device), backend.script.Norm(None, 1e-5)
    experts = torch.arange(rows * chosen, device=device).view(rows, chosen)
    logits = [torch.zeros(rows, E, device=device).scatter_(1, (experts + call * rows * chosen) % E, 1.0) for call in range(calls)]
    more = dict(norm=norm, biases=(None, None), activation="swiglu", chosen=chosen, sum_to_one=True)
    moved = min(E, rows * chosen) * sum(matrix.nbytes for matrix in matrices) // E
    return (lambda: [backend.mixture.experts(x, one, *matrices, out, **more) for one in logits],
            f"mxfp4: {rows} x {chosen} of {E}, {C} x {F}", calls, moved)


def time_cuda_rope(backend: Any, device: torch.device, rows: int, cold: int, calls: int) -> tuple:
    spec, cache = backend.spec, cuda_layers(backend, device, rows, cold, calls)
    H, Hkv, D = spec.heads, spec.kv_heads, spec.head_size
    cos, sin = backend.script.rope_tables(spec, device)
    qkv = Dice(device, 9).normal(rows, (H + 2 * Hkv) * D, dtype=cache.dtype)
    q, positions = torch.empty(rows, H * D, device=device), torch.arange(rows, device=device)
    return (lambda: [backend.rope_append(qkv, cos, sin, positions, positions, layer, q) for layer in cache],
            f"{rows} rows, {H}/{Hkv} heads of {D}", len(cache), qkv.nbytes + q.nbytes + 4 * rows * Hkv * D)


def time_cuda_sample(backend: Any, device: torch.device, rows: int, cold: int, calls: int) -> tuple:
    script, V = backend.script, backend.spec.vocab_size
    logits = Dice(device, 9).normal(rows, V)
    drawn = [script.SampleRow(script.SamplingParams(seed=i, top_k=50), 1) for i in range(rows)]
    draw = backend.drawing(logits, SampleBatch(drawn, V))
    return lambda: [draw() for _ in range(calls)], f"{rows} rows of {V}, top-k 50", calls, logits.nbytes
