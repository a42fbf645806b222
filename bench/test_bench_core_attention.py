"""rope_append and paged_attention of decode_core: `pytest bench/test_bench_core_attention.py --benchmark-enable`.

SmolLM2-135M's attention (9 query heads on 3 kv heads, size 64, float16 cache). Decode runs walk through 264
MB of layers, so that no cache holds what they read. `read_share` is their GB/s over what the same threads
read without arithmetic, measured in turn. DECODE_CORE_THREADS (2) is the number of threads, DECODE_CORE_ISA
the instruction set.
"""

import mmap
import os
import statistics
import sys
import time
from pathlib import Path

import numpy
import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "1000")     # as the server sets it for its workers
sys.path.insert(0, os.environ.get("CHAT_SERVER_DIR") or str(Path(__file__).resolve().parent.parent))

compiled = pytest.importorskip("chatlm.worker.kernels.compiled", exc_type=ImportError)
from chatlm.worker.kernels.library import _core  # noqa: E402
from chatlm.worker.kernels.arrays import CODES, look_at, vector  # noqa: E402
from chatlm.worker.kernels.attention import check_cache, rope_job  # noqa: E402

H, Hkv, D, PAGE = 9, 3, 64, 16
THREADS = int(os.environ.get("DECODE_CORE_THREADS", "2"))


@pytest.fixture(scope="module", autouse=True)
def threads():
    before = compiled.get_threads()
    compiled.set_threads(THREADS)
    yield
    compiled.set_threads(before)


@pytest.fixture(scope="module")
def arena(request):
    """264 MB of float16 in huge pages where there are any (32 MB when nothing is measured)."""
    measured = request.config.getoption("benchmark_enable") or not request.config.getoption("benchmark_disable")
    size = (264 if measured else 32) << 20
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    array = numpy.frombuffer(memory, numpy.float16)
    array[:] = 0.01
    return array


def in_turns(*contestants, rounds=15):
    """The median seconds of each; they take turns `rounds` times."""
    times = [[] for _ in contestants]
    for _ in range(rounds):
        for run, spent in zip(contestants, times):
            begin = time.perf_counter()
            run()
            spent.append(time.perf_counter() - begin)
    return [statistics.median(spent) for spent in times]


@pytest.mark.parametrize("context, rows, window", [
    (128, 1, 0), (256, 1, 0), (512, 1, 0), (1024, 1, 0), (2048, 1, 0), (8192, 1, 0), (8192, 1, 512),
    (128, 8, 0), (1024, 8, 0), (8192, 8, 512), (128, 32, 0), (256, 32, 0), (1024, 32, 0)])
def test_decode_attention(benchmark, arena, context, rows, window):
    """One call for each layer that the arena holds, as in a step of the model."""
    benchmark.group = f"decode attention, {THREADS} threads, {_core.isa()}"
    pages = rows * -(-context // PAGE)
    layers = arena.size // (pages * Hkv * 2 * PAGE * D)
    if not layers:
        pytest.skip("the small arena of a run that measures nothing does not hold one layer")
    cache = arena[:layers * pages * Hkv * 2 * PAGE * D].reshape(layers, pages, Hkv, 2, PAGE * D)
    tables = numpy.random.default_rng(0).permutation(pages).reshape(rows, -1).tolist()
    plan = compiled.plan_attention(tables, [context] * rows, list(range(rows + 1)), H, Hkv, pages)
    _, attend_layer = make_step(plan, cache, rows, numpy.arange(rows) * 0 + context - 1, numpy.arange(rows))

    def attend():
        for layer in range(layers):
            attend_layer(layer, window)

    benchmark.pedantic(attend, rounds=5, warmup_rounds=1)
    if benchmark.stats:
        ours, read = in_turns(attend, lambda: _core.read_memory(arena.ctypes.data, arena.nbytes))
        seen = rows * min(context, window or context)
        benchmark.extra_info["us_per_layer"] = round(ours / layers * 1e6, 1)
        benchmark.extra_info["GB_per_s"] = round(seen * Hkv * 2 * D * 2 * layers / ours / 1e9, 1)
        benchmark.extra_info["read_GB_per_s"] = round(arena.nbytes / read / 1e9, 1)
        benchmark.extra_info["read_share"] = round(benchmark.extra_info["GB_per_s"] / benchmark.extra_info["read_GB_per_s"], 2)


def make_step(plan, cache, rows, positions, slots, qkv=None):
    """(rope_append of layer 0, paged_attention of a layer and window). Arguments are checked here once, as
    for a recorded step."""
    rng = numpy.random.default_rng(1)
    angles = numpy.outer(numpy.arange(8192), 10000.0 ** (-numpy.arange(D // 2) / (D // 2)))
    cos, sin = numpy.cos(angles).astype(numpy.float32), numpy.sin(angles).astype(numpy.float32)
    qkv = rng.standard_normal((rows, (H + 2 * Hkv) * D), numpy.float32) if qkv is None else qkv
    q, out = rng.standard_normal((rows, H, D), numpy.float32) / 8, numpy.zeros((rows, H * D), numpy.float32)
    kept = qkv, cos, sin, positions, slots, q, out, cache
    qkv_at, _, _, stride = look_at("qkv", qkv, ("float32",), rows, (H + 2 * Hkv) * D)
    indices = vector("positions", positions, "int64", rows), vector("slots", slots, "int64", rows)
    job, _ = rope_job(check_cache(cache[0]), (qkv_at, stride), (q.ctypes.data, rows, H), cos, sin, indices, (0, 0), (0, 0), (Hkv, False))

    def append(kept=kept):
        _core.rope_append(job)

    def attend(layer, window):
        _core.paged_attention(plan, window, q.ctypes.data, cache.ctypes.data + layer * cache[0].nbytes, CODES["float16"],
                              out.ctypes.data, D, 0.0, 0, cache[0, 0].size)

    return append, attend


@pytest.mark.parametrize("rows, context", [(256, 256), (256, 1024), (256, 4096), (64, 1024)])
def test_prefill_attention(benchmark, rows, context):
    """The last `rows` of `context` positions at once, against torch's two products in bfloat16 (attend_chunk)."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(THREADS)
    benchmark.group = f"prefill attention, {THREADS} threads, {_core.isa()}"
    pages = context // PAGE
    plan = compiled.plan_attention([list(range(pages))], [context], [0, rows], H, Hkv, pages)
    cache = numpy.random.default_rng(0).standard_normal((pages, Hkv, 2, PAGE * D)).astype(numpy.float16)
    q, out = numpy.random.default_rng(0).standard_normal((rows, H, D), numpy.float32) / 8, numpy.zeros((rows, H * D), numpy.float32)

    def attend():
        compiled.paged_attention(q, cache, plan, out)

    benchmark.pedantic(attend, rounds=10, warmup_rounds=1)
    if benchmark.stats:
        queries = torch.randn(rows, Hkv, H // Hkv, D).bfloat16()
        k, v = torch.randn(2, Hkv, context, D).bfloat16()
        positions = torch.arange(context)
        future = positions > positions[-rows:, None]
        mask = torch.zeros(1, 1, rows, context, dtype=torch.bfloat16).masked_fill_(future, -float("inf"))
        from chatlm.worker.ops.attention import attend_chunk
        with torch.inference_mode():
            ours, theirs = in_turns(attend, lambda: attend_chunk(queries, k, v, mask, 0.125))
        seen = sum(range(context - rows + 1, context + 1))
        benchmark.extra_info["ms"] = round(ours * 1e3, 2)
        benchmark.extra_info["torch_ms"] = round(theirs * 1e3, 2)
        benchmark.extra_info["times_torch"] = round(theirs / ours, 2)
        benchmark.extra_info["G_multiply_adds_per_s"] = round(seen * H * 2 * D / ours / 1e9)


@pytest.mark.parametrize("rows", [1, 8, 32, 256])
def test_rope_append(benchmark, rows):
    """One layer's rows against the torch reference: decode rows with a page each, or a chunk of a
    prompt."""
    torch = pytest.importorskip("torch")
    from chatlm.worker.ops.attention import rope_append_reference
    torch.set_num_threads(THREADS)
    benchmark.group = f"rope and append, {THREADS} threads, {_core.isa()}"
    chunk = rows > 32
    qkv = torch.randn(rows, (H + 2 * Hkv) * D)
    slots = torch.arange(rows) * (1 if chunk else PAGE + 1)
    positions = torch.arange(rows) if chunk else torch.arange(rows) + 100
    cache = torch.zeros(1, 64, Hkv, 2, PAGE * D, dtype=torch.float16)
    tables, lengths, starts = ([list(range(rows // PAGE))], [rows], [0, rows]) if chunk else (
        [[0]] * rows, [1] * rows, list(range(rows + 1)))
    plan = compiled.plan_attention(tables, lengths, starts, H, Hkv, 64)
    append, _ = make_step(plan, cache, rows, positions, slots, qkv)
    cos_sin, order = torch.randn(2, rows, D // 2).unbind(), torch.arange(rows)
    plain = torch.zeros(64 * PAGE, 2, Hkv, D)
    q = torch.zeros(rows, H * D)

    def ours():
        for _ in range(20):
            append()

    def reference():
        for _ in range(20):
            rope_append_reference(qkv, *cos_sin, order, slots, plain, out=q)

    reference()         # also where nothing is measured, so that it cannot rot
    benchmark(append)
    if benchmark.stats:
        with torch.inference_mode():
            spent, theirs = in_turns(ours, reference)
        benchmark.extra_info["us_per_row"] = round(spent / 20 / rows * 1e6, 2)
        benchmark.extra_info["reference_us_per_row"] = round(theirs / 20 / rows * 1e6, 2)
        benchmark.extra_info["times_reference"] = round(theirs / spent, 1)
