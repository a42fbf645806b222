"""Whole steps of decode_core.Program on a model of random weights, without chat_server: tok/s and where each microsecond goes.

    python bench/program_steps.py [--batches 1,4,16] [--context 256] [--prompt 256] [--threads 1,2,0] [--pool 2] [--seconds 1] [--phases]
                                   [--kv float16,q8_0] [--plain]

The default is the default model's shape (SmolLM2-135M: Q4_1 layers, Q8_0 head). Thread counts alternate in
short repeats. The best is printed along with the median, because the two CPUs of a virtual machine may share a
core at one time and not at another. Several types of keys and values take turns too (the first is what `auto`
means with such weights). What a long context costs one stream:

    python bench/program_steps.py --kv float16,q8_0 --context 16384 --batches 1 --threads 0 --prompt 0 --seconds 4

--plain also measures, in turn, 182 calls from Python: one for each op of
the step, with the same compiled ops and the same buffers.
"""

import argparse
import itertools
import statistics
import time
from types import SimpleNamespace

import numpy as np

import decode_core

PAGE = 16
SMOLLM2 = SimpleNamespace(layers=30, C=576, H=9, Hkv=3, D=64, F=1536, V=49152, kind="q4_1", head="q8_0")


def random_matrix(arena, kind, rows, columns, generator):
    matrix = decode_core.Matrix(arena, kind, rows, columns)
    for first in range(0, rows, 4096):
        count = min(4096, rows - first)
        blocks = quantized(kind, count, columns, generator)
        matrix.fill(blocks, kind, first_tile=first // 16)
    return matrix


def quantized(kind, rows, columns, generator):
    """Random GGUF blocks with values small enough for a sensible forward pass."""
    blocks = columns // 32
    halves = lambda scale: (generator.random((rows, blocks, 1), np.float32) * scale).astype(np.float16).view(np.uint8)
    if kind == "q4_1":
        d = halves(0.02)
        m = (-7.5 * d.view(np.float16).astype(np.float32)).astype(np.float16).view(np.uint8)
        parts = [d, m, generator.integers(0, 256, (rows, blocks, 16), np.uint8)]
    else:
        parts = [halves(0.001), generator.integers(0, 256, (rows, blocks, 32), np.uint8)]
    return np.ascontiguousarray(np.concatenate(parts, axis=2).reshape(rows, -1))


class Model:
    """The ops of a llama-like model, recorded as chat_server records them."""

    def __init__(self, s, max_tokens, max_rows, pages, kv="float16", seed=0):
        self.s, generator = s, np.random.default_rng(seed)
        self.program, self.sampler = decode_core.Program(max_tokens, max_rows), decode_core.Sampler()
        p = self.program
        arena = decode_core.Arena(128 << 20)
        qkv = (s.H + 2 * s.Hkv) * s.D
        self.layers = layers = [{name: random_matrix(arena, s.kind, *shape, generator) for name, shape in
                   (("qkv", (qkv, s.C)), ("output", (s.C, s.H * s.D)), ("gate_up", (2 * s.F, s.C)), ("down", (s.C, s.F)))}
                  for _ in range(s.layers)]
        self.head = head = random_matrix(arena, s.head, s.V, s.C, generator)
        self.bytes = sum(m.nbytes for layer in layers for m in layer.values()) + head.nbytes
        page = np.float16(generator.standard_normal((s.Hkv, 2, PAGE * s.D)))
        if kv == "q8_0":
            codes = generator.integers(1, 256, page.shape, np.uint8)
            scales = np.full((s.Hkv, 2, PAGE * s.D // 32), 1 / 80, np.float16)
            page = np.concatenate((codes ^ np.array([[0], [128]], np.uint8), scales.view(np.uint8)), -1)      # signed those of values
        self.cache = np.empty((s.layers, pages, *page.shape), page.dtype if kv == "q8_0" else kv)
        self.cache[:] = page
        angles = np.outer(np.arange(pages * PAGE), 1e4 ** -(np.arange(0, s.D, 2) / s.D))
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        buffer = lambda columns, rows=max_tokens: np.zeros((rows, columns), np.float32)
        x, q, attended, hidden, ones = buffer(s.C), buffer(s.H * s.D), buffer(s.H * s.D), buffer(s.F), np.ones(s.C, np.float32)
        projected, last, logits = buffer(qkv), buffer(s.C, max_rows), buffer(s.V, max_rows)
        p.embed(head, p.token_ids, x)
        for layer, cache in zip(layers, self.cache):
            p.linear(x, layer["qkv"], projected, norm=(ones, 1e-5))
            p.rope_append(projected, cos, sin, p.positions, p.slots, cache, q)
            p.paged_attention(q, cache, p.attention, 0, attended)
            p.linear(attended, layer["output"], x, residual=x)
            p.linear(x, layer["gate_up"], hidden, norm=(ones, 1e-5), activation="swiglu")
            p.linear(hidden, layer["down"], x, residual=x)
        p.gather_rows(x, p.logit_rows, last)
        p.linear(last, head, logits, norm=(ones, 1e-5))
        p.sample(logits)
        self.buffers = x, q, attended, hidden, ones, projected, logits, cos, sin

    def plain_step(self, token_ids, starts, lengths, tables, rows):
        """A step of decode rows (one token each) or of one prompt, a call for each op; returns the drawn
        tokens."""
        s, T = self.s, len(token_ids)
        x, q, attended, hidden, ones, projected, logits, cos, sin = self.buffers
        x, q, attended, hidden, projected = (buffer[:T] for buffer in (x, q, attended, hidden, projected))
        positions = np.concatenate([np.arange(n - (b - a), n) for a, b, n in zip(starts, starts[1:], lengths)])
        pages = np.concatenate([np.repeat([table], b - a, axis=0) for a, b, table in zip(starts, starts[1:], tables)])
        slots = pages[np.arange(T), positions // PAGE] * PAGE + positions % PAGE
        plan = decode_core.plan_attention(tables, lengths, starts, s.H, s.Hkv, self.cache.shape[1])
        decode_core.embed(self.head, np.array(token_ids), x)
        for layer, cache in zip(self.layers, self.cache):
            decode_core.multiply(x, layer["qkv"], norm=(ones, 1e-5), out=projected)
            decode_core.rope_append(projected, cos, sin, positions, slots, cache, q.reshape(T, s.H, s.D))
            decode_core.paged_attention(q.reshape(T, s.H, s.D), cache, plan, attended)
            decode_core.multiply(attended, layer["output"], residual=x, out=x)
            decode_core.multiply(x, layer["gate_up"], norm=(ones, 1e-5), activation="swiglu", out=hidden)
            decode_core.multiply(hidden, layer["down"], residual=x, out=x)
        last = x[np.array(starts[1:]) - 1]
        decode_core.multiply(last, self.head, norm=(ones, 1e-5), out=logits[:len(last)])
        return self.sampler(logits[:len(last)], rows)


def sampling_rows(rows, position):
    params = SimpleNamespace(temperature=0.8, top_k=40, top_p=0.95, min_p=0.0, presence_penalty=0.0, frequency_penalty=0.0,
                             repetition_penalty=1.0, logit_bias=(), seed=1, choice=0)
    return [SimpleNamespace(params=params, position=position, tokens=[], prompt_tokens=0) for _ in range(rows)]


def sampling(rows, position, vocab):
    return decode_core.SampleBatch(sampling_rows(rows, position), vocab)


def decode(model, batch, context, steps):
    """us per step of `batch` sequences, pipelined as the engine does it: the next step starts before the last is finished."""
    pages = -(-(context + steps + 1) // PAGE)
    tables = [list(range(i * pages, (i + 1) * pages)) for i in range(batch)]
    sampler = sampling(batch, context, model.s.V)
    drawn = [~i for i in range(batch)]
    begin, tickets = time.perf_counter(), []
    for n in range(steps):
        sampler.positions[:] = context + n
        tickets.append(model.program.start(drawn if n else [5] * batch, [1] * batch, list(range(batch + 1)), [context + n + 1] * batch, tables,
                                           list(range(batch)), sampler))
        if len(tickets) == 2:
            model.program.finish(tickets.pop(0))
    for ticket in tickets:
        model.program.finish(ticket)
    return (time.perf_counter() - begin) / steps * 1e6


def prefill(model, tokens, context):
    pages = list(range(-(-(context + tokens) // PAGE)))
    begin = time.perf_counter()
    model.program.finish(model.program.start(list(range(tokens)), [1] * tokens, [0, tokens], [context + tokens], [pages], [tokens - 1],
                                             sampling(1, context + tokens, model.s.V)))
    return (time.perf_counter() - begin) * 1e6


def decode_plain(model, batch, context, steps):
    """us per step with one call per op."""
    pages = -(-(context + steps + 1) // PAGE)
    tables = [list(range(i * pages, (i + 1) * pages)) for i in range(batch)]
    rows, token_ids, begin = sampling_rows(batch, context), [5] * batch, time.perf_counter()
    for n in range(steps):
        for row in rows:
            row.position = context + n
        token_ids = model.plain_step(token_ids, list(range(batch + 1)), [context + n + 1] * batch, tables, rows)
    return (time.perf_counter() - begin) / steps * 1e6


def prefill_plain(model, tokens, context):
    pages = list(range(-(-(context + tokens) // PAGE)))
    begin = time.perf_counter()
    model.plain_step(list(range(tokens)), [0, tokens], [context + tokens], [pages], sampling_rows(1, context + tokens))
    return (time.perf_counter() - begin) * 1e6


def show_phases(model, run, tokens, rounds):
    """The least time of each phase over many steps, and their sum: what a step takes on an idle machine."""
    least, names, steps = None, [], 0
    for _ in range(rounds):
        run()
        for step in model.program.times():
            if step["tokens"] != tokens:
                continue                        # of the previous case
            phases, steps = [us for _, us in step["phases"]], steps + 1
            least, names = (phases if least is None else list(map(min, least, phases))), [what for what, _ in step["phases"]]
    kinds = {}
    for what, us in zip(names, least):
        kinds[what] = kinds.get(what, 0) + us
    print(f"    {sum(least):8.0f} us: sum of {len(names)} phases' least times over {steps} steps")
    for what, us in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"    {us:8.1f} us  {us / sum(least):6.1%}  {names.count(what):4d}  {what}")
    return sum(least)


def set_schedule(threads, pool):
    decode_core.set_threads(threads or pool)
    decode_core._core.force_schedule(threads, False)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--threads", default="1,2,0", help="forced widths; 0: the policy decides how many of the pool's threads work")
    parser.add_argument("--pool", type=int, default=2, help="threads of the pool for --threads 0; may be more than CPUs")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--kv", default="float16", help="types of keys and values, of float16, float32 and q8_0")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--phases", action="store_true", help="each phase's least time over many steps")
    parser.add_argument("--plain", action="store_true", help="beside it, a call from Python for each op")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    batches, threads = ([int(n) for n in text.split(",") if n] for text in (options.batches, options.threads))
    pages = max(batches + [1]) * (options.context // PAGE + 64) + 64
    models = {kv: Model(SMOLLM2, 512, 64, pages, kv) for kv in options.kv.split(",")}
    first = next(iter(models))
    print(f"weights {models[first].bytes / 1e6:.1f} MB, {decode_core.info()['isa']}, context {options.context}")
    steps = {b: max(8, int(options.seconds / options.repeats * 400 / (1 + b / 5))) for b in batches}
    cases = [(f"B={b}", b, lambda model, n=0, b=b: decode(model, b, options.context, n or steps[b]) / b,
              lambda model, b=b: decode_plain(model, b, options.context, steps[b]) / b) for b in batches]
    if options.prompt:
        cases.append(("prefill", options.prompt, lambda model, n=0: prefill(model, options.prompt, 0) / options.prompt,
                      lambda model: prefill_plain(model, options.prompt, 0) / options.prompt))
    for name, size, run, plain in cases:
        ways = list(itertools.product(threads, models))
        figures, plain_figures = {way: [] for way in ways}, {way: [] for way in ways}
        for _ in range(options.repeats):
            for n, kv in ways:
                set_schedule(n, options.pool)
                figures[n, kv].append(1e6 / run(models[kv]))
                if options.plain and n:                 # plain calls have no width policy
                    plain_figures[n, kv].append(1e6 / plain(models[kv]))
        for (n, kv), rates in figures.items():
            median, usual, model = statistics.median(rates), statistics.median(figures[n, first]), models[kv]
            beside = "" if kv == first else f", {median / usual:.2f} times {first}"
            print(f"{name:>8} {f'{n} threads' if n else 'adaptive '} {kv}: median {median:7.0f} best {max(rates):7.0f} tok/s{beside}")
            if plain_rates := plain_figures[n, kv]:
                rate = statistics.median(plain_rates)
                print(f"   plain calls: median {rate:7.0f} best {max(plain_rates):7.0f} tok/s; Program is {median / rate:.2f} times")
            if options.phases:
                set_schedule(n, options.pool)
                tokens = options.prompt if name == "prefill" else size
                quiet = show_phases(model, lambda: run(model, 16), tokens, options.rounds)
                print(f"    quiet: {1e6 * tokens / quiet:.0f} tok/s")


if __name__ == "__main__":
    main()
