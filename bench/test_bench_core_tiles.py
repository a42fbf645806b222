"""decode_core's tiles: `pytest bench/test_bench_core_tiles.py --benchmark-enable` (one thread).

Decoding: the weights are cold, since parts of 4 MB take turns out of more than 256 MB. extra_info: GB_per_s of
weights, and share_of_read, its ratio to what read_memory reads of the same memory in the same way. Prefill: the
weights are in the L2 cache; GMAC_per_s. Each figure is the 5th percentile of many short runs (0.1 to 1 ms),
so that a busy machine matters little.
"""

import time

import numpy as np
import pytest

core = pytest.importorskip("chatlm.worker.kernels.compiled", exc_type=ImportError)

KINDS = ["q4_1", "q4_0", "q8_0", "bf16", "f16", "f32"]
COLD_BYTES, PART_BYTES = 272 << 20, 4 << 20


@pytest.fixture(autouse=True)
def one_thread():
    before, isa = core.get_threads(), core.info()["isa"]
    core.set_threads(1)
    yield
    core.set_threads(before)
    core.set_isa(isa)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def activations(rows, columns):
    """Activations like a model's: in an eighth of the blocks a channel that is large in every row, and one
    that differs by row."""
    x = random(rows, columns)
    x[:, 40::256] *= 20
    x[np.arange(rows), np.arange(rows) * 577 % columns] = 20
    return x


def matrix_of(arena, kind, weights):
    matrix = core.Matrix(arena, kind, *weights.shape)
    matrix.fill(weights, "f32")
    return matrix


@pytest.fixture(scope="module")
def cold_parts():
    """(kind, K) -> as many matrices of about 4 MB as make 272 MB (few: two); the last kind asked for is kept."""
    kept = {}

    def get(kind, K, few):
        if kept.get("key") != (kind, K, few):
            kept.clear()
            arena = core.Arena(COLD_BYTES)
            one = core.Matrix(arena, kind, 16, K).nbytes
            rows = max(1, PART_BYTES // one) * 16
            weights = random(rows, K)
            kept["parts"] = [matrix_of(arena, kind, weights) for _ in range(2 if few else COLD_BYTES // (rows // 16 * one))]
            kept["key"] = (kind, K, few)
        return kept["parts"]
    return get


def seconds(benchmark):
    return float(np.percentile(benchmark.stats.stats.data, 5))


def in_turn(benchmark, parts, run, rounds=400):
    """Time run(part) on one part after another."""
    turn = iter(range(1 << 60))
    benchmark.pedantic(lambda: run(parts[next(turn) % len(parts)]), rounds=rounds, warmup_rounds=len(parts))
    return seconds(benchmark) if benchmark.stats else None


def read_rate(parts):
    times = []
    for i in range(5 * len(parts)):
        part = parts[i % len(parts)]
        start = time.perf_counter()
        core._core.read_memory(part.tiles.address, part.nbytes // 64 * 64)
        times.append(time.perf_counter() - start)
    return parts[0].nbytes / np.percentile(times, 5) / 1e9


@pytest.mark.parametrize("B", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("kind, K", [(kind, 576) for kind in KINDS] + [("q4_1", 1536)])
def test_decoding(benchmark, cold_parts, kind, K, B):
    parts = cold_parts(kind, K, few=not benchmark.enabled)
    x, out = activations(B, K), np.empty((B, parts[0].rows), np.float32)
    benchmark.group = f"tiles, decoding {kind} K={K}"
    if duration := in_turn(benchmark, parts, lambda part: core.multiply(x, part, out=out)):
        rate = parts[0].nbytes / duration / 1e9
        benchmark.extra_info |= {"GB_per_s": round(rate, 1), "share_of_read": round(rate / read_rate(parts), 2),
                                 "GMAC_per_s": round(B * parts[0].rows * K / duration / 1e9)}


@pytest.mark.parametrize("B", [8, 64, 256])
@pytest.mark.parametrize("isa", core.info()["offered_isas"])
@pytest.mark.parametrize("kind", KINDS)
def test_prefill(benchmark, kind, isa, B):
    core.set_isa(isa)
    N, K = 1024 if kind in ("q4_1", "q4_0", "q8_0") else 256, 576
    matrix, x, out = matrix_of(core.Arena(1 << 20), kind, random(N, K)), activations(B, K), np.empty((B, N), np.float32)
    benchmark.group = f"tiles, prefill {kind}"
    benchmark.pedantic(lambda: core.multiply(x, matrix, out=out, _groups_at_once=B), rounds=200 if isa != "portable" else 5,
                       warmup_rounds=2)
    if benchmark.stats:
        benchmark.extra_info["GMAC_per_s"] = round(B * N * K / seconds(benchmark) / 1e9)


AS_IN_FILES = "q4_1", "q8_0", "bf16", "q5_0", "q5_1", "q4_k", "q6_k", "iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "tq1_0", "q1_0", "q2_0"


@pytest.mark.parametrize("source, kind", [*((kind, kind) for kind in AS_IN_FILES), ("f32", "q8_0"), ("f32", "q4_0")])
def test_filling(benchmark, source, kind):
    """The cost of loading 1024 x 768 weights."""
    matrix = core.Matrix(core.Arena(4 << 20), kind, 1024, 768)
    rows = random(1024, 768) if source == "f32" else np.zeros((1024, core._core.row_bytes(core.tiles.KINDS[source], 768)), np.uint8)
    benchmark.group = "tiles, filling"
    benchmark(lambda: matrix.fill(rows, source))
    if benchmark.stats:
        benchmark.extra_info["ns_per_weight"] = round(seconds(benchmark) / 1024 / 768 * 1e9, 2)
